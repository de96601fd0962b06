"""Plans on the fly: one set of statistics serves requests of any step count, on tiny pipelines."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from pipelines import CASES_BY_NAME

import lesa
from lesa.models.hooks import attached
from lesa.planner.search import price, search
from lesa.planner.statistics import GUIDED, Statistics, flow_impulse_response
from lesa.plans.plan import ANY_CONTEXT, PlanError
from lesa.runtime import adapting
from lesa.runtime.adapting import Adaptive, plan_for
from lesa.runtime.clock import Request, sigmas_of
from lesa.runtime.response import impulse_response_of

pytestmark = pytest.mark.filterwarnings("error::lesa.LesaWarning")

FLUX = CASES_BY_NAME["flux_dev"]
IMAGE = CASES_BY_NAME["flux_img2img"]
QWEN = CASES_BY_NAME["qwen_image"]
STEPS = 50


def spread(steps, shift=2.0):
    """The shifted sigmas of a request, the final 0 included."""
    even = np.linspace(1.0, 0.0, steps + 1)
    return tuple(shift * even / (1.0 + (shift - 1.0) * even))


@functools.cache
def statistics(contexts=("cond",), guidance=(1.0,)):
    """Statistics of smooth features of sigma, written down instead of recorded."""
    sigmas = spread(STEPS)
    rng = np.random.default_rng(3)
    phases = rng.uniform(0.0, 6.0, (len(contexts), 1, 8))
    features = np.sin(np.asarray(sigmas[:-1])[None, :, None] * np.arange(1, 9) + phases) / np.arange(1, 9)
    flat = features.reshape(-1, 8)
    return Statistics(
        sigmas=sigmas,
        timesteps=tuple(1000.0 * s for s in sigmas[:-1]),
        contexts=contexts,
        guidance=guidance,
        grams={"output": flat @ flat.T / 8, "hidden": flat @ np.diag(np.arange(1.0, 9.0)) @ flat.T},
        impulse_response=flow_impulse_response(sigmas),
        requests=2,
    )


@pytest.fixture
def plans(monkeypatch):
    """Every plan made on the fly, in order."""
    made = []

    def counted(*args, **kwargs):
        made.append(plan_for(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(adapting, "plan_for", counted)
    return made


# The plan of a request


def test_a_plan_is_the_searched_schedule_with_least_squares_rows():
    known = statistics()
    plan = plan_for(known, 8, forecaster="regression")
    gram = known.gram("output", "cond")
    assert plan.computed == search(gram, known.impulse_response[-1], 8) and plan.site == "output"
    assert (plan.sigmas, plan.timesteps) == (known.sigmas, known.timesteps)
    for step, row in plan.rows[ANY_CONTEXT].items():
        past = [s for s in plan.computed if s < step][-2:]
        last = past[-1]
        weight = 0.0
        if len(past) == 2:
            slope = gram[last, last] - 2.0 * gram[last, past[0]] + gram[past[0], past[0]]
            along = gram[step, last] - gram[step, past[0]] - gram[last, last] + gram[last, past[0]]
            weight = along / (1.01 * slope)
        expected = [-weight, 1.0 + weight][-len(past) :]
        assert row.steps == tuple(past)
        np.testing.assert_allclose(row.weights, expected, atol=1e-9)


def test_fitted_rows_keep_the_schedule_and_lower_the_error_in_the_end():
    known = statistics()
    fitted, regression = (plan_for(known, 8, forecaster=name) for name in ("fitted", "regression"))
    assert fitted == plan_for(known, 8) and fitted.computed == regression.computed

    def error(plan):
        """Squared error of the final sample, if the denoiser answered no error."""
        off = np.zeros(known.num_steps)
        for step, row in plan.rows[ANY_CONTEXT].items():
            off[list(row.steps)] += known.impulse_response[-1][step] * np.array(row.weights)
            off[step] -= known.impulse_response[-1][step]
        return off @ known.gram("output", "cond") @ off

    assert error(fitted) < 0.5 * error(regression)
    with pytest.raises(ValueError, match="site='hidden' with forecaster='fitted'"):
        plan_for(known, 8, site="hidden", forecaster="fitted")


def test_other_noise_levels_get_the_schedule_of_the_interpolated_statistics():
    sigmas = spread(20, shift=3.0)
    plan = plan_for(statistics(), 6, sigmas)
    there = statistics().at(sigmas)
    assert plan.computed == search(there.gram("output", "cond"), np.diff(sigmas), 6)
    assert plan.sigmas == sigmas and plan.timesteps is None
    # An impulse response of the scheduler's own decides otherwise: here all that counts is what the last ten steps do.
    impulse_response = flow_impulse_response(sigmas) * (np.arange(20) >= 10)
    late = plan_for(statistics(), 6, sigmas, impulse_response)
    weighed = there.gram("output", "cond"), impulse_response[-1]
    assert price(*weighed, late.computed) < price(*weighed, plan.computed)
    assert plan_for(there, 6, impulse_response=impulse_response).computed == late.computed


def test_contexts_have_rows_of_their_own_on_one_schedule():
    known = statistics(("cond", "uncond"), (3.0, -2.0))
    plan = plan_for(known, 8, site="hidden")
    assert plan.computed == search(known.gram("output", GUIDED), known.impulse_response[-1], 8)
    assert plan.site == "hidden" and set(plan.rows) == {"*", "cond", "uncond"}
    assert plan.rows_of("default") == plan.rows_of("cond") != plan.rows_of("uncond")
    alone = replace(known, contexts=("cond",), guidance=(1.0,), grams={"output": known.gram("hidden", "uncond")})
    step = max(plan.rows_of("uncond"))
    own = adapting.plan_of("regression", plan.computed, known.sigmas, "hidden", gram=alone.gram("output", "cond"))
    assert plan.rows_of("uncond")[step] == own.rows_of("*")[step]


@pytest.mark.parametrize(
    ("budget", "computed"),
    [(1, 1), (7, 7), (21, 20), (0.3, 6), (0.01, 1), (1.0, 20), (np.int64(4), 4), (np.float32(0.5), 10)],
)
def test_budgets_are_numbers_or_shares(budget, computed):
    assert plan_for(statistics(), budget, spread(20)).budget == computed


@pytest.mark.parametrize("budget", [0, -3, 0.0, 1.5, math.nan, True, "10"])
def test_other_budgets_are_refused(budget):
    with pytest.raises(ValueError, match=f"budget={budget!r}: expected a number of computed steps of at least 1"):
        plan_for(statistics(), budget)


# On pipelines


def test_each_configuration_gets_its_plan_once(plans):
    pipe = FLUX.make()
    lesa.enable(pipe, statistics(), budget=5)
    plans.clear()
    sigmas = []
    for steps in (12, 20, 12):
        FLUX.call(pipe, steps=steps)
        sigmas.append(sigmas_of(pipe.scheduler))
        assert attached(pipe).driver.plan.num_steps == steps
    assert [plan.sigmas for plan in plans] == sigmas[:2]
    assert [plan.budget for plan in plans] == [5, 5]
    stats = lesa.stats(pipe)
    assert (stats.requests, stats.computed, stats.forecast) == (3, 15, 7 + 15 + 7)
    assert not stats.refused


def test_noise_levels_that_are_not_finite_are_one_error():
    pipe = FLUX.make()
    lesa.enable(pipe, statistics(), budget=5)
    with warnings.catch_warnings(), pytest.raises(lesa.PlanError, match=r"sigmas=\(1\.0, nan.* are not finite"):
        warnings.simplefilter("error", lesa.LesaWarning)
        FLUX.call(pipe, sigmas=[1.0, math.nan, 0.5, 0.2])
    FLUX.call(pipe, steps=12)
    assert lesa.stats(pipe).forecast == 7
    lesa.disable(pipe)


def test_a_plan_on_the_fly_runs_like_the_same_plan_enabled():
    pipe = FLUX.make()
    lesa.enable(pipe, statistics(), budget=0.25)
    on_the_fly = FLUX.call(pipe, steps=16)
    plan = attached(pipe).driver.plan
    lesa.disable(pipe)
    full = FLUX.call(pipe, steps=16)
    assert plan.computed == plan_for(statistics(), 4, sigmas_of(pipe.scheduler)).computed
    lesa.enable(pipe, plan)
    assert torch.equal(on_the_fly, FLUX.call(pipe, steps=16))
    assert not torch.equal(on_the_fly, full)


def test_what_is_computed_in_full_stays_bit_equal():
    pipe = FLUX.make()
    full = FLUX.call(pipe, steps=6)
    lesa.enable(pipe, statistics(), budget=10)
    with pytest.warns(lesa.LesaWarning, match="forecasts nothing in requests of 6 steps.*smaller budget="):
        assert torch.equal(FLUX.call(pipe, steps=6), full)
    assert (lesa.stats(pipe).computed, lesa.stats(pipe).forecast) == (6, 0)


def test_image_to_image_is_a_request_of_fewer_noise_levels(plans):
    pipe = IMAGE.make()
    lesa.enable(pipe, statistics(), budget=4)
    plans.clear()
    for strength, steps in ((0.75, 9), (0.5, 6), (0.75, 9)):
        IMAGE.call(pipe, steps=12, strength=strength)
        plan = attached(pipe).driver.plan
        assert plan.sigmas == sigmas_of(pipe.scheduler)[-steps - 1 :]
        assert plan.computed == plan_for(statistics(), 4, plan.sigmas).computed
    assert len(plans) == 2
    stats = lesa.stats(pipe)
    assert (stats.computed, stats.forecast) == (12, 5 + 2 + 5) and not stats.refused


def test_the_response_of_the_scheduler_decides_on_the_schedule(monkeypatch):
    asked = []

    def impulse_response_of(scheduler, begin):
        assert scheduler.step_index is None  # no update was made yet
        asked.append((scheduler, begin))
        return flow_impulse_response(sigmas_of(scheduler)[begin:]) * (np.arange(9) >= 5)

    monkeypatch.setattr(adapting, "impulse_response_of", impulse_response_of)
    pipe = IMAGE.make()
    lesa.enable(pipe, statistics(), budget=3)
    IMAGE.call(pipe, steps=12, strength=0.75)
    assert asked == [(pipe.scheduler, 3)]
    sigmas = sigmas_of(pipe.scheduler)[-10:]
    impulse_response = flow_impulse_response(sigmas) * (np.arange(9) >= 5)
    assert attached(pipe).driver.plan.computed == plan_for(statistics(), 3, sigmas, impulse_response).computed
    assert attached(pipe).driver.plan.computed != plan_for(statistics(), 3, sigmas).computed


def test_another_scheduler_with_the_same_noise_levels_gets_a_plan_of_its_own(plans):
    pipe = FLUX.make()
    lesa.enable(pipe, statistics(), budget=4)
    FLUX.call(pipe, steps=8)
    plans.clear()
    FLUX.call(pipe, steps=8)
    assert not plans
    before = sigmas_of(pipe.scheduler)
    pipe.scheduler = type("Other", (type(pipe.scheduler),), {}).from_config(pipe.scheduler.config)
    FLUX.call(pipe, steps=8)
    assert len(plans) == 1 and sigmas_of(pipe.scheduler) == before


def test_both_branches_of_guidance_are_forecast():
    pipe = QWEN.make()
    lesa.enable(pipe, statistics(("cond", "uncond"), (3.0, -2.0)), budget=4)
    QWEN.call(pipe, steps=10, guidance=True)
    stats = lesa.stats(pipe)
    assert (stats.requests, stats.computed, stats.forecast) == (1, 8, 12) and not stats.refused


def test_the_cache_forgets_the_configuration_unused_for_longest(plans):
    driver = Adaptive(statistics(), 3)
    for steps in (*range(4, 20), 4, 20, 4, 5):
        driver.begin(Request(steps, spread(steps)))
    counts = [plan.num_steps for plan in plans[1:]]
    assert counts == [*range(4, 20), 20, 5]


def test_statistics_are_read_from_their_file(tmp_path):
    pipe = FLUX.make()
    lesa.enable(pipe, statistics().save(tmp_path / "statistics.safetensors"), budget=5)
    FLUX.call(pipe, steps=12)
    assert lesa.stats(pipe).computed == 5


def test_solvers_of_higher_order_are_asked_for_their_response():
    wan = CASES_BY_NAME["wan"]
    pipe = wan.make()
    lesa.enable(pipe, statistics(("cond", "uncond"), (3.0, -2.0)), budget=4)
    wan.call(pipe, steps=12)
    plan = attached(pipe).driver.plan
    impulse_response = impulse_response_of(pipe.scheduler)
    assert not np.allclose(impulse_response, flow_impulse_response(plan.sigmas), atol=1e-2)
    known = statistics(("cond", "uncond"), (3.0, -2.0)).at(plan.sigmas)
    assert plan.computed == search(known.gram("output", GUIDED), impulse_response[-1], 4)
    assert (lesa.stats(pipe).computed, lesa.stats(pipe).forecast) == (8, 16)


# Refusals


def test_statistics_of_another_denoiser_are_refused():
    pipe = FLUX.make()
    for change in ({"denoiser": "WanTransformer3DModel"}, {"denoiser": None, "config_hash": "0" * 16}):
        with pytest.raises(PlanError, match="the statistics are of another denoiser"):
            lesa.enable(pipe, replace(statistics(), **change), budget=5)
        assert attached(pipe) is None


def test_a_bare_denoiser_is_refused_and_told_what_to_do():
    denoiser = FLUX.make().transformer
    with pytest.raises(ValueError, match=r"a bare FluxTransformer2DModel .* lesa.runtime.adapting.plan_for"):
        lesa.enable(denoiser, statistics(), budget=5)
    assert attached(denoiser) is None
    with pytest.raises(PlanError, match="noise levels of the request"):
        Adaptive(statistics(), 5).begin(Request())
    lesa.enable(denoiser, plan_for(statistics(), 5))  # the way out


def test_a_budget_belongs_to_statistics(tmp_path):
    pipe = FLUX.make()
    plan = plan_for(statistics(), 5)
    with pytest.raises(ValueError, match="budget=6: the plan has one, 5 computed steps"):
        lesa.enable(pipe, plan, budget=6)
    with pytest.raises(ValueError, match="budget=None: with statistics say how many"):
        lesa.enable(pipe, statistics())
    with pytest.raises(PlanError, match="holds statistics.*budget=10"):
        lesa.enable(pipe, statistics().save(tmp_path / "statistics.safetensors"))
    with pytest.raises(ValueError, match="holds no statistics"):
        lesa.enable(pipe, plan.save(tmp_path / "plan.safetensors"), budget=5)
    with pytest.raises(ValueError, match="budget=0: expected"):
        lesa.enable(pipe, statistics(), budget=0)
    assert attached(pipe) is None
