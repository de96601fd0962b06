"""A fitted plan at other noise levels and budgets: against what its features give there, in its file, on pipelines."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pipelines import CASES_BY_NAME
from safetensors import safe_open
from safetensors.numpy import save

import lesa
from lesa.models.hooks import attached
from lesa.planner import transfer
from lesa.planner.interpolation import interpolation
from lesa.planner.search import search
from lesa.planner.statistics import GUIDED, flow_impulse_response
from lesa.planner.surrogate import Surrogate
from lesa.planner.tables import closed_form, linear_extrapolation, plan_of
from lesa.planner.transfer import adapted, nearest, statistics_of
from lesa.plans.describe import describe
from lesa.plans.plan import ANY_CONTEXT, Plan, PlanError
from lesa.plans.planfile import packed
from lesa.runtime import adapting
from lesa.runtime.clock import Request, sigmas_of
from lesa.runtime.runner import PlanRunner

pytestmark = pytest.mark.filterwarnings("error::lesa.LesaWarning")

FLUX, IMAGE = CASES_BY_NAME["flux_dev"], CASES_BY_NAME["flux_img2img"]
STEPS, REQUESTS, LENGTH, BUDGET = 50, 7, 64, 8
DECIBELS = 10 / np.log(10)
CONTEXTS = {1: (("cond",), (1.0,)), 2: (("uncond", "cond"), (-2.0, 3.0))}  # not in the order of the alphabet


def spread(steps, shift=2.0):
    """The shifted sigmas of a request, the final 0 included."""
    even = np.linspace(1.0, 0.0, steps + 1)
    return tuple(shift * even / (1.0 + (shift - 1.0) * even))


def features(sigmas, count=1):
    """Smooth features [P, C, T, L] of requests at any noise levels, of unlike sizes, and error gains [C, T, P]."""
    rng = np.random.default_rng(5)
    phases, rates = rng.uniform(0, 6, (REQUESTS, count, 1, LENGTH)), rng.uniform(0.3, 7, (REQUESTS, 1, 1, LENGTH))
    levels = np.asarray(sigmas[:-1])[:, None]
    sizes = rng.uniform(0.3, 3, (REQUESTS, 1, 1, 1))
    outputs = sizes * (np.sin(levels * rates + phases) / rates + rng.normal(size=(REQUESTS, 1, 1, LENGTH)))
    error_gains = rng.uniform(0.2, 0.8, (count, 1, REQUESTS)) * (2.0 - np.asarray(sigmas[:-1]))[None, :, None]
    return outputs, error_gains


def model(sigmas, count=1):
    """The surrogate of these features."""
    outputs, error_gains = features(sigmas, count)
    flat = outputs.reshape(REQUESTS, -1, LENGTH)
    contexts, guidance = CONTEXTS[count]
    grams = flat @ flat.transpose(0, 2, 1) / LENGTH
    return Surrogate(grams, flow_impulse_response(sigmas), np.array(guidance), error_gains, contexts)


@functools.cache
def fitted(count=1, steps=STEPS, budget=BUDGET):
    """A plan as `lesa.fit` makes it."""
    sigmas = spread(steps)
    surrogate = model(sigmas, count)
    timesteps = tuple(1000 * s for s in sigmas[:-1])
    bare = Plan(tuple(range(steps)), sigmas, site="output", timesteps=timesteps)
    known = statistics_of(bare, surrogate, sigmas)
    computed = search(known.gram("output", GUIDED), known.impulse_response[-1], budget)
    weights, _ = surrogate.optimise(computed, closed_form(known, computed))
    made = plan_of(known, computed, weights, timesteps=timesteps, surrogate=surrogate)
    return replace(made, expected=transfer.expected_by(surrogate, made))


def table(plan, contexts):
    """A plan's rows [C, T, T]."""
    weights = np.zeros((len(contexts), plan.num_steps, plan.num_steps))
    for c, context in enumerate(contexts):
        for step, row in plan.rows_of(context).items():
            weights[c, step, list(row.steps)] = row.weights
    return weights


@pytest.fixture
def made(monkeypatch):
    """Every plan made of a fitted one, in order."""
    plans = []

    def counted(*args):
        plans.append(adapted(*args))
        return plans[-1]

    monkeypatch.setattr(adapting, "adapted", counted)
    return plans


# The surrogate


@pytest.mark.parametrize("count", [1, 2])
def test_the_surrogate_elsewhere_is_that_of_the_interpolated_features(count):
    sigmas, others = spread(STEPS), spread(23, 3.0)
    impulse_response = flow_impulse_response(others) * 1.5
    there = model(sigmas, count).at(sigmas, others, impulse_response)
    weights = interpolation(sigmas[:-1], others[:-1])
    outputs, error_gains = features(sigmas, count)
    flat = (weights @ outputs).reshape(REQUESTS, -1, LENGTH)
    np.testing.assert_allclose(there.grams, flat @ flat.transpose(0, 2, 1) / LENGTH, atol=1e-12)
    np.testing.assert_allclose(there.error_gains, np.einsum("ts,csp->ctp", weights, error_gains), atol=1e-12)
    assert there.impulse_response is impulse_response and there.contexts == CONTEXTS[count][0] and there.num_steps == 23
    # Features as smooth as these are at the other noise levels what their interpolation says, to a small share of what
    # they change by from step to step.
    truth = model(others, count)
    np.testing.assert_allclose(there.error_gains, truth.error_gains, atol=1e-9)
    step = np.diff(features(others, count)[0], axis=2)
    assert np.abs(weights @ outputs - features(others, count)[0]).max() < 0.02 * np.abs(step).max()


def test_the_surrogate_at_its_own_noise_levels_is_itself():
    known = model(spread(STEPS), 2)
    same = known.at(spread(STEPS), spread(STEPS), known.impulse_response)
    np.testing.assert_allclose(same.grams, known.grams, atol=1e-12)
    np.testing.assert_allclose(same.error_gains, known.error_gains, atol=1e-12)
    with pytest.raises(ValueError, match="21 sigmas for a surrogate of 50 steps"):
        known.at(spread(20), spread(STEPS), known.impulse_response)


def test_of_many_requests_some_are_kept():
    known = model(spread(STEPS))
    assert known.thinned() is known and known.thinned(7) is known
    some = known.thinned(3)
    np.testing.assert_array_equal(some.grams, known.grams[[0, 3, 6]])
    np.testing.assert_array_equal(some.error_gains, known.error_gains[:, :, [0, 3, 6]])


@pytest.mark.parametrize(
    "change",
    [
        {"grams": np.zeros((6, STEPS, STEPS))},
        {"grams": np.zeros((7, STEPS, STEPS + 1))},
        {"impulse_response": np.zeros((STEPS, STEPS))},
        {"guidance": np.ones(2)},
        {"contexts": ("cond", "uncond")},
    ],
)
def test_shapes_that_do_not_agree(change):
    with pytest.raises(ValueError, match="of a surrogate have shapes"):
        replace(model(spread(STEPS)), **change)


# In a plan and its file


@pytest.mark.parametrize("count", [1, 2])
def test_the_file_keeps_what_decides(count, tmp_path):
    """Rows and objective out of the file are those in float64 to 0.01 dB; out of rounded Gram matrices they are not."""
    plan = fitted(count)
    loaded = Plan.load(plan.save(tmp_path / "plan.safetensors"))
    exact, kept = plan.surrogate, loaded.surrogate
    assert kept.contexts == exact.contexts and np.array_equal(kept.guidance, exact.guidance)
    np.testing.assert_array_equal(kept.impulse_response, exact.impulse_response)
    np.testing.assert_allclose(kept.error_gains, exact.error_gains, rtol=1e-6)
    # First differences in time have the precision of float32 themselves.
    apart = [np.diff(np.diff(one.grams[:, :STEPS, :STEPS], axis=1), axis=2) for one in (exact, kept)]
    np.testing.assert_allclose(apart[1], apart[0], rtol=1e-6, atol=1e-12)
    rounded = replace(exact, grams=exact.grams.astype(np.float32).astype(np.float64))
    known, off = statistics_of(plan, exact, plan.sigmas), []
    for budget in (6, 10, 16):
        computed = search(known.gram("output", GUIDED), known.impulse_response[-1], budget)
        start = closed_form(known, computed)
        rows, objective = exact.optimise(computed, start)
        for other in (kept, rounded):
            again, promised = other.optimise(computed, start)
            off.append([promised - objective, exact.outcome(computed, again).objective - objective])
    worst = DECIBELS * np.abs(off).reshape(3, 2, 2).max(0).max(1)
    assert worst[0] < 0.01 < worst[1]


def test_the_file_is_small(tmp_path):
    plan = fitted()
    bare = replace(plan, surrogate=None).save(tmp_path / "bare").stat().st_size
    probed = replace(
        plan.surrogate, impulse_response=plan.surrogate.impulse_response.astype(np.float32).astype(np.float64)
    )
    grown = replace(plan, surrogate=probed).save(tmp_path / "whole").stat().st_size - bare
    assert 35_700 < grown < 43_000  # 7 halves of a matrix of 50 x 50, and little else
    np.testing.assert_array_equal(Plan.load(tmp_path / "whole").surrogate.impulse_response, probed.impulse_response)


def test_what_describes_a_plan_says_that_it_adapts():
    size = sum(array.nbytes for array in packed(fitted().surrogate).values()) / 1000
    assert f"other step counts, spacings and budgets, out of what it knows of 7 requests, {size:.0f} KB" in describe(
        fitted()
    )
    assert "adapts" not in describe(replace(fitted(), surrogate=None))


def test_plans_compare_join_and_change_as_before(tmp_path):
    plan = fitted(2)
    bare = replace(plan, surrogate=None)
    assert plan == bare and "surrogate" not in repr(plan)
    assert replace(plan, forecaster="other").surrogate is plan.surrogate
    assert Plan.load(bare.save(tmp_path / "bare")).surrogate is None
    same = Plan.join({"cond": plan, "uncond": replace(plan, training={})})
    assert same.surrogate is plan.surrogate
    assert Plan.join({"cond": plan, "uncond": bare}).surrogate is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surrogate": model(spread(20))}, "surrogate of 20 steps"),
        ({"surrogate": replace(model(spread(STEPS)), contexts=())}, r"contexts \(\): expected the 50 steps"),
        ({"surrogate": replace(model(spread(STEPS)), error_gains=np.full((1, STEPS, 7), np.nan))}, "finite numbers"),
        ({"site": "hidden"}, "surrogate with site='hidden'"),
    ],
)
def test_a_surrogate_that_does_not_fit_its_plan(change, message):
    with pytest.raises(PlanError, match=message):
        replace(fitted(), **change)


@pytest.mark.parametrize("name", ["grams", "response", "guidance", "slopes"])
def test_a_file_that_lacks_a_part_of_the_surrogate(name, tmp_path):
    path = fitted().save(tmp_path / "plan.safetensors")
    with safe_open(path, framework="np") as file:
        description = json.loads(file.metadata()["lesa"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    part = arrays.pop(f"surrogate_{name}")
    for wrong in ({}, {f"surrogate_{name}": part[:-1]}):
        path.write_bytes(save(arrays | wrong, {"lesa": json.dumps(description)}))
        with pytest.raises(PlanError, match="incomplete"):
            Plan.load(path)


# The plan of another request


def test_its_own_request_is_served_by_the_plan_itself():
    plan = fitted()
    assert adapted(plan) is plan and adapted(plan, BUDGET) is plan and adapted(plan, BUDGET / STEPS) is plan


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("steps", "shift", "budget"), [(28, 3.0, None), (50, 2.0, 12), (100, 1.0, 0.06)])
def test_rows_and_schedule_do_the_least_harm_there(count, steps, shift, budget):
    """Judged by the model of the features as they are there, not by the interpolated one that the plan was made of."""
    plan = fitted(count)
    own = (steps, shift) == (STEPS, 2.0)
    sigmas = spread(steps, shift)
    there = adapted(plan, budget, None if own else sigmas)
    assert there.budget == {None: BUDGET, 12: 12, 0.06: 6}[budget] and there.num_steps == steps
    np.testing.assert_allclose(there.sigmas, sigmas)
    assert there.timesteps == (plan.timesteps if own else None) and there.surrogate is None
    assert set(there.rows) == ({ANY_CONTEXT} if count == 1 else {ANY_CONTEXT, "cond", "uncond"})
    truth, contexts = model(sigmas, count), CONTEXTS[count][0]
    promised = truth.outcome(there.computed, table(there, contexts)).objective
    known = statistics_of(there, truth, sigmas)
    searched = search(known.gram("output", GUIDED), known.impulse_response[-1], there.budget)
    candidates = {searched, nearest(plan, sigmas, there.budget)}
    best = min(truth.optimise(computed, closed_form(known, computed), 30)[1] for computed in candidates)
    assert promised - best < 0.5 / DECIBELS
    # Far better than what anybody has without a fit there.
    taylor = truth.outcome(there.computed, closed_form(known, there.computed, "taylor-1")).objective
    assert promised < taylor - 3 / DECIBELS


@pytest.mark.parametrize("bad", ["search", "nearest"])
def test_the_better_of_both_schedules_is_taken(bad, monkeypatch):
    monkeypatch.setattr(transfer, "_LOOKS", 0)
    early = tuple(range(BUDGET))
    monkeypatch.setattr(transfer, bad, lambda *_: early)
    there = adapted(fitted(), None, spread(28))
    assert there.computed != early
    assert there.training["schedule"] == {"search": "nearest", "nearest": "searched"}[bad]
    monkeypatch.setattr(transfer, "search", lambda *_: early)
    monkeypatch.setattr(transfer, "nearest", lambda *_: early)
    assert adapted(fitted(), None, spread(28)).computed == early


def test_steps_are_moved_where_that_promises_more(monkeypatch):
    """From evenly spaced steps on, to a schedule none of whose neighbours is much better; within so many looks."""
    sigmas, even = spread(28), tuple(range(0, 28, 4))[:6]
    truth = model(fitted().sigmas).at(fitted().sigmas, sigmas, flow_impulse_response(sigmas))
    for name in ("search", "nearest"):
        monkeypatch.setattr(transfer, name, lambda *_: even)
    looked = []
    monkeypatch.setattr(
        transfer, "linear_extrapolation", lambda *args: (looked.append(args[0]), linear_extrapolation(*args))[1]
    )

    def price(computed):
        return truth.on(computed, transfer._NEWEST).optimise(linear_extrapolation(computed, 1, 28), transfer._HASTY)[1]

    prices = []
    monkeypatch.setattr(transfer, "_PATIENCE", 10**9)
    for looks in (0, 5, 500):
        monkeypatch.setattr(transfer, "_LOOKS", looks)
        looked.clear()
        there = adapted(fitted(), 6, sigmas)
        assert len(set(looked)) <= max(looks, 1)
        assert there.training["schedule"] == ("moved" if looks else "searched")
        prices.append(price(there.computed))
    assert prices[0] == price(even) > prices[1] > prices[2] + 0.1
    others = [
        tuple(step + by * (i <= k < i + many) for k, step in enumerate(there.computed))
        for i in range(1, 6)
        for many in (1, 2)
        for by in (-1, 1)
    ]
    others = [other for other in others if len(set(other)) == 6 and other[-1] < 28 and list(other) == sorted(other)]
    assert len(others) > 9 and min(map(price, others)) >= prices[2] - transfer._WORTH


def test_nearest_noise_levels_by_hand():
    rows = {1: lesa.Row((0,), (1.0,)), 4: lesa.Row((3,), (1.0,))}
    plan = Plan((0, 2, 3), (1.0, 0.8, 0.6, 0.4, 0.2, 0.0), {"*": rows})
    assert nearest(plan, plan.sigmas, 3) == (0, 2, 3)
    assert nearest(plan, (1.0, 0.9, 0.7, 0.63, 0.5, 0.45, 0.1, 0.0), 3) == (0, 3, 5)
    # Both would take level 0.5; the later one then takes the next.
    assert nearest(plan, (1.0, 0.5, 0.1, 0.0), 3) == (0, 1, 2)
    # Every later one needs room, too.
    assert nearest(plan, (1.0, 0.95, 0.9, 0.3, 0.0), 4) == (0, 1, 2, 3)
    # Half as many more places, between 1, 0.6, 0.4 and the end 0: 1, 0.8, 0.6, 0.5, 0.4 and 0.2.
    assert nearest(plan, tuple(np.linspace(1, 0, 11)), 6) == (0, 2, 4, 5, 6, 8)
    assert nearest(plan, plan.sigmas, 1) == (0,)


@pytest.mark.parametrize("count", [1, 2])
def test_the_guard_expects_what_the_checks_would_have_done(count):
    sigmas = spread(28, 3.0)
    plan, there = fitted(count), adapted(fitted(count), None, spread(28, 3.0))
    outputs = interpolation(plan.sigmas[:-1], sigmas[:-1]) @ features(plan.sigmas, count)[0]
    assert set(there.expected) == set(there.checks)
    for c, context in enumerate(CONTEXTS[count][0]):
        checks = there.checks_of(context)
        assert there.expected_of(context).keys() == set(sorted(checks)[1:]) != set()  # of the first nothing is expected
        for step in sorted(checks)[1:]:
            row = checks[step]
            forecast = np.einsum("k,pkl->pl", row.weights, outputs[:, c, list(row.steps)])
            truth = outputs[:, c, step]
            errors = np.linalg.norm(forecast - truth, axis=1) / np.linalg.norm(truth, axis=1)
            assert there.expected_of(context)[step].error == pytest.approx(np.exp(np.log(errors).mean()), rel=1e-4)


def test_the_response_decides_too():
    sigmas = spread(28)
    early = adapted(fitted(), None, sigmas, flow_impulse_response(sigmas) * (np.arange(28) < 10))
    plain = adapted(fitted(), None, sigmas)
    assert sum(step < 10 for step in early.computed) > sum(step < 10 for step in plain.computed) + 1


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "8"])
def test_budgets_that_are_none(budget):
    with pytest.raises(ValueError, match=f"budget={budget!r}: expected a number of computed steps"):
        adapted(fitted(), budget)


def test_a_plan_that_was_not_fitted_does_not_adapt():
    bare = replace(fitted(), surrogate=None)
    with pytest.raises(PlanError, match="serves its own 50 steps only.*fit it again"):
        adapted(bare, None, spread(20))
    with pytest.raises(PlanError, match="serves its own 50 steps only"):
        adapting.Adaptive(bare)
    with pytest.raises(ValueError, match="finite noise levels"):
        adapted(fitted(), None, (1.0, float("nan"), 0.0))


# On pipelines


@functools.cache
def served():
    """A fitted plan of 12 steps at the noise levels of the tiny pipeline, and that pipeline."""
    pipe = FLUX.make()
    FLUX.call(pipe, steps=12)
    plan = fitted(1, 12, 5)
    sigmas = sigmas_of(pipe.scheduler)
    surrogate = plan.surrogate.at(plan.sigmas, sigmas, flow_impulse_response(sigmas))
    timesteps = tuple(pipe.scheduler.timesteps.tolist())
    return replace(plan, sigmas=sigmas, timesteps=timesteps, surrogate=surrogate), pipe


@pytest.fixture
def pipe():
    plan, pipe = served()
    yield pipe
    lesa.disable(pipe)


def test_its_own_step_count_runs_by_the_plan_bit_for_bit(pipe, made):
    plan, _ = served()
    lesa.enable(pipe, replace(plan, surrogate=None), guard=False)
    assert isinstance(attached(pipe).driver, PlanRunner)
    before = FLUX.call(pipe, steps=12)
    lesa.enable(pipe, plan, guard=False)
    assert torch.equal(FLUX.call(pipe, steps=12), before)
    assert torch.equal(FLUX.call(pipe, steps=12), before)
    driver = attached(pipe).driver
    assert driver.plan is plan and made == [plan]
    assert driver._runner.plan == plan and driver._runner.plan.surrogate is None
    assert (lesa.stats(pipe).requests, lesa.stats(pipe).computed) == (2, 10)


def test_other_step_counts_have_plans_made_once(pipe, made):
    plan, _ = served()
    lesa.enable(pipe, plan, guard=False)
    made.clear()
    for steps in (9, 20, 9, 12, 20):
        FLUX.call(pipe, steps=steps)
        now = attached(pipe).driver.plan
        assert now.sigmas == sigmas_of(pipe.scheduler) and now.budget == 5
        assert (now is plan) == (steps == 12)
    assert [one.num_steps for one in made] == [9, 20]
    stats = lesa.stats(pipe)
    assert (stats.requests, stats.computed, stats.forecast) == (5, 25, 4 + 15 + 4 + 7 + 15) and not stats.refused
    lesa.enable(pipe, adapted(plan, None, made[1].sigmas), guard=False)
    by_itself = FLUX.call(pipe, steps=20)
    lesa.enable(pipe, plan, guard=False)
    torch.testing.assert_close(
        FLUX.call(pipe, steps=20), by_itself, rtol=1e-4, atol=1e-4
    )  # its impulse response was probed


def test_fewer_steps_than_computed_ones_stay_bit_equal(pipe):
    plan, _ = served()
    full = FLUX.call(pipe, steps=4)
    lesa.enable(pipe, plan, guard=True)
    with pytest.warns(lesa.LesaWarning, match="forecasts nothing in requests of 4 steps.*smaller budget="):
        assert torch.equal(FLUX.call(pipe, steps=4), full)
    assert (lesa.stats(pipe).computed, lesa.stats(pipe).forecast) == (4, 0)


@pytest.mark.parametrize(("budget", "computed"), [(3, (3, 3)), (0.5, (6, 10)), (1, (1, 1)), (5, (5, 5))])
def test_other_budgets(pipe, budget, computed, tmp_path):
    plan, _ = served()
    for source in (plan, plan.save(tmp_path / "plan.safetensors"), plan.save_pretrained(tmp_path / "folder").parent):
        lesa.enable(pipe, source, budget=budget, guard=False)
        for steps, wanted in zip((12, 20), computed, strict=True):
            FLUX.call(pipe, steps=steps)
            assert attached(pipe).driver.plan.budget == wanted
    lesa.enable(pipe, replace(plan, surrogate=None).save(tmp_path / "bare.safetensors"))
    with pytest.raises(ValueError, match="budget=3: the plan has one, 5 computed steps, and holds no statistics"):
        lesa.enable(pipe, tmp_path / "bare.safetensors", budget=3)
    assert isinstance(attached(pipe).driver, PlanRunner)


def test_a_request_is_its_own_where_noise_levels_and_response_are(made, monkeypatch):
    plan, _ = served()
    driver = adapting.Adaptive(plan)
    made.clear()
    for off, own in ((0.0, True), (0.4, True), (1.6, False)):
        sigmas = tuple(sigma - off * adapting._SAME * (i < 12) for i, sigma in enumerate(plan.sigmas))
        driver.begin(Request(12, sigmas))
        assert (driver.plan is plan) == own
    assert len(made) == 1
    driver.begin(Request(11, plan.sigmas[1:]))
    assert driver.plan.sigmas == plan.sigmas[1:] and len(made) == 2
    # What multistep schedulers make of the outputs at the same noise levels.
    monkeypatch.setattr(adapting, "impulse_response_of", lambda *_: 0.9 * plan.surrogate.impulse_response)
    scheduler = type("Multistep", (), {"timesteps": plan.timesteps})()
    driver.begin(Request(12, plan.sigmas, scheduler))
    assert driver.plan is made[2] and driver.plan.sigmas == plan.sigmas
    driver.begin(Request(12, plan.sigmas))
    assert driver.plan is plan and len(made) == 3


def test_plans_on_the_fly_are_guarded(pipe):
    """By their own expected errors: a request leaves its plan where a check is further off than the guard allows."""
    plan, _ = served()
    for budget in (None, 4):
        lesa.enable(pipe, plan, budget=budget, guard=float("inf"))
        FLUX.call(pipe, steps=20)
        now, saw = attached(pipe).driver.plan, lesa.stats(pipe).guard
        assert now.num_steps == 20 and saw.checks == len(now.checks["*"]) > 0 and saw.switches == 0
        (errors,) = saw.errors.values()
        expected = now.expected["*"]
        furthest = max(np.log(errors[step] / expected[step].error) / expected[step].std for step in expected)
        assert furthest > 0  # the written-down features are not the pipeline's
        lesa.enable(pipe, plan, budget=budget, guard=1.01 * furthest)
        FLUX.call(pipe, steps=20)
        assert lesa.stats(pipe).guard.switches == 0
        lesa.enable(pipe, plan, budget=budget, guard=0.99 * furthest)
        with pytest.warns(lesa.LesaWarning, match="worse than in fitting"):
            FLUX.call(pipe, steps=20)
        assert lesa.stats(pipe).guard.switches == 1
    lesa.enable(pipe, plan, budget=1, guard=True)  # nothing to check, but forecasts have to be finite
    FLUX.call(pipe, steps=20)
    assert lesa.stats(pipe).guard is not None and not attached(pipe).driver.plan.expected.get("*")


def test_image_to_image(made):
    pipe, (plan, _) = IMAGE.make(), served()
    lesa.enable(pipe, plan, guard=False)
    IMAGE.call(pipe, steps=12, strength=0.75)
    assert attached(pipe).driver.plan.sigmas == sigmas_of(pipe.scheduler)[-10:]
    assert (lesa.stats(pipe).computed, lesa.stats(pipe).forecast) == (5, 4) and not lesa.stats(pipe).refused


def test_a_bare_denoiser_has_the_plan_or_one_of_another_budget(made):
    (plan, _), bare = served(), FLUX.make().transformer
    for budget in (None, 3):
        lesa.enable(bare, plan, budget=budget)
        driver = attached(bare).driver
        assert driver.plan.budget == (budget or 5) and driver.plan.timesteps == plan.timesteps
        driver.begin(Request())
        assert driver._runner.plan == driver.plan == made[-1]


class Contracting(torch.nn.Module):
    """A bare denoiser whose requests end where they must, exactly."""

    def forward(self, hidden_states, timestep):
        return hidden_states * timestep / 1000


def test_a_loop_of_ones_own_at_another_step_count_is_told_what_to_do():
    plan, denoiser = replace(fitted(), denoiser=None, config_hash=None), Contracting()
    sigmas = spread(20)

    def loop():
        sample = torch.ones(1, 8, 4)
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            sample = sample + (following - sigma) * denoiser(sample, timestep=torch.tensor(1000 * sigma))
        return sample

    full = loop()
    lesa.enable(denoiser, plan)
    with pytest.raises(PlanError, match="timestep"):
        loop()
    lesa.enable(denoiser, adapted(plan, sigmas=sigmas), guard=False)
    assert 0 < float((loop() - full).abs().max()) < 0.05 * float((full - 1).abs().max())
    assert (lesa.stats(denoiser).computed, lesa.stats(denoiser).forecast) == (BUDGET, 20 - BUDGET)
    assert not lesa.stats(denoiser).refused


def test_what_does_not_fit_changes_nothing(pipe):
    plan, _ = served()
    lesa.enable(pipe, plan)
    before = attached(pipe)
    with pytest.raises(PlanError, match="made for WanTransformer3DModel"):
        lesa.enable(pipe, replace(plan, denoiser="WanTransformer3DModel"))
    with pytest.raises(ValueError, match="budget=0"):
        lesa.enable(pipe, plan, budget=0)
    with pytest.raises(PlanError, match="guard=True"):
        lesa.enable(pipe, replace(plan, expected={}), guard=True)
    assert attached(pipe) is before


def test_a_fit_attaches_what_it_was_fitted_from(pipe):
    request = {"num_inference_steps": 8, "height": 32, "width": 32, "max_sequence_length": 8}
    with pytest.warns(lesa.LesaWarning, match="no guard"):
        plan = lesa.fit(pipe, ["a", "b", "c"], budget=3, request=request, effort="quick")
    surrogate = plan.surrogate
    assert (surrogate.requests, surrogate.num_steps, surrogate.contexts) == (2, 8, ("cond",))
    lesa.enable(pipe, plan)
    FLUX.call(pipe, steps=6)
    assert attached(pipe).driver.plan.budget == 3 and attached(pipe).driver.plan.num_steps == 6
