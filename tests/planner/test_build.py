"""Plans of statistics, and fitted plans adapted: against what the features themselves give, and through their file."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save
from written import BUDGET, CONTEXTS, STEPS, features, fitted, model, shifted, statistics

from lesa.forecasters import plan_of, rows_of
from lesa.planner import build
from lesa.planner.build import adapt, closed_form, linear_extrapolation, nearest, plan_for, statistics_of, surrogate_of
from lesa.planner.search import search
from lesa.planner.statistics import GUIDED, flow_impulse_response, interpolation
from lesa.planner.surrogate import Segments
from lesa.plans.plan import Plan
from lesa.plans.rows import ANY_CONTEXT, PlanError, Row

DECIBELS = 10 / np.log(10)


def table(plan, contexts):
    """A plan's rows [C, T, T]."""
    weights = np.zeros((len(contexts), plan.num_steps, plan.num_steps))
    for c, context in enumerate(contexts):
        for step, row in plan.rows_of(context).items():
            weights[c, step, list(row.steps)] = row.weights
    return weights


def outcome(surrogate, computed, weights):
    """What a surrogate predicts of rows [C, T, T]."""
    segments = Segments(surrogate, computed)
    return segments.outcome(segments.evaluate(segments.reads(weights)))


def test_a_plan_has_the_searched_schedule_and_rows_better_than_least_squares():
    known = statistics()
    plan = plan_for(known, 8)
    gram = known.gram("output", "cond")
    assert plan.computed == search(gram, known.impulse_response[-1], 8) and plan.site == "output"
    assert (plan.sigmas, plan.timesteps) == (known.sigmas, known.timesteps)

    def error(plan):
        """Squared error of the final sample, if the denoiser answered no error."""
        off = np.zeros(known.num_steps)
        for step, row in plan.rows[ANY_CONTEXT].items():
            off[list(row.steps)] += known.impulse_response[-1][step] * np.array(row.weights)
            off[step] -= known.impulse_response[-1][step]
        return off @ gram @ off

    assert error(plan) < 0.5 * error(plan_of("regression", plan.computed, known.sigmas, "output", gram))


def test_other_noise_levels_get_the_schedule_of_the_interpolated_statistics():
    sigmas = shifted(20, shift=3.0)
    plan = plan_for(statistics(), 6, sigmas)
    there = statistics().at(sigmas)
    assert plan.computed == search(there.gram("output", "cond"), np.diff(sigmas), 6)
    assert plan.sigmas == sigmas and plan.timesteps is None
    # An impulse response of the scheduler's own decides otherwise: here all that counts is what the last ten steps do.
    impulse_response = flow_impulse_response(sigmas) * (np.arange(20) >= 10)
    late = plan_for(statistics(), 6, sigmas, impulse_response)
    assert late.computed == search(there.gram("output", "cond"), impulse_response[-1], 6) != plan.computed
    assert plan_for(there, 6, impulse_response=impulse_response).computed == late.computed


def test_contexts_have_rows_of_their_own_on_one_schedule():
    known = statistics(("cond", "uncond"), (3.0, -2.0))
    plan = plan_for(known, 8)
    assert plan.computed == search(known.gram("output", GUIDED), known.impulse_response[-1], 8)
    assert plan.site == "output" and set(plan.rows) == {"*", "cond", "uncond"}
    assert plan.rows_of("default") == plan.rows_of("cond") != plan.rows_of("uncond")


@pytest.mark.parametrize(
    ("budget", "computed"),
    [(21, 20), (0.01, 1), (np.int64(4), 4), (np.float32(0.5), 10)],
)
def test_budgets_are_numbers_or_shares(budget, computed):
    assert plan_for(statistics(), budget, shifted(20)).budget == computed


@pytest.mark.parametrize("budget", [0, 1.5, True, "10"])
def test_other_budgets_are_refused(budget):
    with pytest.raises(ValueError, match=f"budget={budget!r}"):
        plan_for(statistics(), budget)


@pytest.mark.parametrize("count", [1, 2])
def test_the_file_keeps_what_decides(count, tmp_path):
    """Rows and objective out of the file are those in float64 to 0.01 dB; out of rounded Gram matrices they are not."""
    plan = fitted(count)
    loaded = Plan.load(plan.save(tmp_path / "plan.safetensors"))
    exact, kept = model(plan.sigmas, count), surrogate_of(loaded)
    assert kept.contexts == exact.contexts and np.array_equal(kept.guidance, exact.guidance)
    np.testing.assert_array_equal(kept.impulse_response, exact.impulse_response)
    np.testing.assert_allclose(kept.error_gains, exact.error_gains, rtol=1e-6)
    # First differences in time have the precision of float32 themselves.
    apart = [np.diff(np.diff(one.grams[:, :STEPS, :STEPS], axis=1), axis=2) for one in (exact, kept)]
    np.testing.assert_allclose(apart[1], apart[0], rtol=1e-6, atol=1e-12)
    rounded = replace(exact, grams=exact.grams.astype(np.float32).astype(np.float64))
    known, off = statistics_of(plan, exact, plan.sigmas), []
    for budget in (6, 10):
        computed = search(known.gram("output", GUIDED), known.impulse_response[-1], budget)
        start = closed_form(known, computed)
        rows, objective = exact.optimise(computed, start)
        for other in (kept, rounded):
            again, promised = other.optimise(computed, start)
            off.append([promised - objective, outcome(exact, computed, again).objective - objective])
    worst = DECIBELS * np.abs(off).reshape(2, 2, 2).max(0).max(1)
    assert worst[0] < 0.01 < worst[1]


def test_the_file_is_small(tmp_path):
    plan = fitted()
    bare = replace(plan, surrogate=None).save(tmp_path / "bare").stat().st_size
    known = model(plan.sigmas)
    response = known.impulse_response.astype(np.float32).astype(np.float64)  # as it is probed
    probed = replace(plan, surrogate=replace(known, impulse_response=response).to_arrays())
    grown = probed.save(tmp_path / "whole").stat().st_size - bare
    assert 35_700 < grown < 43_000  # 7 halves of a matrix of 50 x 50, and little else
    np.testing.assert_array_equal(surrogate_of(Plan.load(tmp_path / "whole")).impulse_response, response)
    assert "adapts" in Plan.summary(plan) and "adapts" not in Plan.summary(replace(plan, surrogate=None))


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
        ({"surrogate": model(shifted(20)).to_arrays()}, "surrogate: error gains"),
        ({"surrogate": replace(model(shifted(STEPS)), contexts=()).to_arrays()}, r"surrogate: contexts"),
        ({"surrogate": model(shifted(STEPS)).to_arrays() | {"slopes": np.full((1, STEPS, 7), np.nan)}}, "surrogate"),
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
        del description["checksum"]  # as older files, which have none
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    part = arrays.pop(f"surrogate_{name}")
    for wrong in ({}, {f"surrogate_{name}": part[:-1]}):
        path.write_bytes(save(arrays | wrong, {"lesa": json.dumps(description)}))
        with pytest.raises(PlanError, match="incomplete"):
            Plan.load(path)


def test_its_own_request_is_served_by_the_plan_itself():
    plan = fitted()
    assert adapt(plan) is plan and adapt(plan, BUDGET) is plan and adapt(plan, BUDGET / STEPS) is plan


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("steps", "shift", "budget"), [(28, 3.0, None), (50, 2.0, 12), (100, 1.0, 0.06)])
def test_rows_and_schedule_do_the_least_harm_there(count, steps, shift, budget):
    """Judged by the model of the features as they are there, not by the interpolated one that the plan was made of."""
    plan = fitted(count)
    own = (steps, shift) == (STEPS, 2.0)
    sigmas = shifted(steps, shift)
    there = adapt(plan, budget, None if own else sigmas)
    assert there.budget == {None: BUDGET, 12: 12, 0.06: 6}[budget] and there.num_steps == steps
    np.testing.assert_allclose(there.sigmas, sigmas)
    assert there.timesteps == (plan.timesteps if own else None) and there.surrogate is None
    assert set(there.rows) == ({ANY_CONTEXT} if count == 1 else {ANY_CONTEXT, "cond", "uncond"})
    truth, contexts = model(sigmas, count), CONTEXTS[count][0]
    promised = outcome(truth, there.computed, table(there, contexts)).objective
    known = statistics_of(there, truth, sigmas)
    searched = search(known.gram("output", GUIDED), known.impulse_response[-1], there.budget)
    candidates = {searched, nearest(plan, sigmas, there.budget)}
    best = min(truth.optimise(computed, closed_form(known, computed), 30)[1] for computed in candidates)
    assert promised - best < 0.5 / DECIBELS
    # Far better than what anybody has without a fit there.
    taylor = outcome(truth, there.computed, closed_form(known, there.computed, "taylor-1")).objective
    assert promised < taylor - 3 / DECIBELS


@pytest.mark.parametrize("bad", ["search", "nearest"])
def test_the_better_of_both_schedules_is_taken(bad, monkeypatch):
    monkeypatch.setattr(build, "_EVALUATIONS", 0)
    early = tuple(range(BUDGET))
    monkeypatch.setattr(build, bad, lambda *_: early)
    there = adapt(fitted(), None, shifted(28))
    assert there.computed != early
    assert there.training["schedule"] == {"search": "nearest", "nearest": "searched"}[bad]
    monkeypatch.setattr(build, "search", lambda *_: early)
    monkeypatch.setattr(build, "nearest", lambda *_: early)
    assert adapt(fitted(), None, shifted(28)).computed == early


def test_steps_are_moved_where_that_promises_more(monkeypatch):
    """From evenly spaced steps on, to a schedule without much better neighbours, within so many evaluations."""
    sigmas, even = shifted(28), tuple(range(0, 28, 4))[:6]
    truth = surrogate_of(fitted()).at(fitted().sigmas, sigmas, flow_impulse_response(sigmas))
    for name in ("search", "nearest"):
        monkeypatch.setattr(build, name, lambda *_: even)
    evaluated = []
    monkeypatch.setattr(
        build, "linear_extrapolation", lambda *args: (evaluated.append(args[0]), linear_extrapolation(*args))[1]
    )

    def cost(computed):
        return Segments(truth, computed, build._NEWEST).optimise(linear_extrapolation(computed, 1, 28), build._HASTY)[1]

    costs = []
    monkeypatch.setattr(build, "_PATIENCE", 10**9)
    for evaluations in (0, 5, 500):
        monkeypatch.setattr(build, "_EVALUATIONS", evaluations)
        evaluated.clear()
        there = adapt(fitted(), 6, sigmas)
        assert len(set(evaluated)) <= max(evaluations, 1)
        assert there.training["schedule"] == ("moved" if evaluations else "searched")
        costs.append(cost(there.computed))
    assert costs[0] == cost(even) > costs[1] > costs[2] + 0.1
    others = [
        tuple(step + by * (i <= k < i + many) for k, step in enumerate(there.computed))
        for i in range(1, 6)
        for many in (1, 2)
        for by in (-1, 1)
    ]
    others = [other for other in others if len(set(other)) == 6 and other[-1] < 28 and list(other) == sorted(other)]
    assert len(others) > 9 and min(map(cost, others)) >= costs[2] - build._WORTH


def test_nearest_noise_levels_by_hand():
    rows = {1: Row((0,), (1.0,)), 4: Row((3,), (1.0,))}
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
    sigmas = shifted(28, 3.0)
    plan, there = fitted(count), adapt(fitted(count), None, shifted(28, 3.0))
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
    sigmas = shifted(28)
    early = adapt(fitted(), None, sigmas, flow_impulse_response(sigmas) * (np.arange(28) < 10))
    plain = adapt(fitted(), None, sigmas)
    assert sum(step < 10 for step in early.computed) > sum(step < 10 for step in plain.computed) + 1


def test_a_plan_that_was_not_fitted_does_not_adapt():
    bare = replace(fitted(), surrogate=None)
    with pytest.raises(PlanError, match="serves its own 50 steps only"):
        adapt(bare, None, shifted(20))
    with pytest.raises(ValueError, match="finite noise levels"):
        adapt(fitted(), None, (1.0, float("nan"), 0.0))
    with pytest.raises(ValueError, match="budget=0"):
        adapt(fitted(), 0)


@pytest.mark.parametrize("computed", [(0,), (0, 1, 3, 6), (0, 4, 8), tuple(range(9))])
def test_linear_extrapolation_is_that_of_taylor(computed):
    rows = rows_of("taylor-1", computed, 9)
    expected = np.zeros((2, 9, 9))
    for step, row in rows.items():
        expected[:, step, list(row.steps)] = row.weights
    np.testing.assert_allclose(linear_extrapolation(computed, 2, 9), expected, atol=1e-12)
