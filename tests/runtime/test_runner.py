"""Plans on the fly: one set of statistics serves requests of any step count, on tiny pipelines."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from pipelines import CASES_BY_NAME
from written import shifted, statistics

import lesa
from lesa.models.hooks import attached
from lesa.planner.build import plan_for
from lesa.planner.search import search
from lesa.planner.statistics import GUIDED, flow_impulse_response
from lesa.plans.rows import PlanError
from lesa.runtime import runner
from lesa.runtime.clock import Request, impulse_response_of, sigmas_of
from lesa.runtime.runner import Adaptive

pytestmark = pytest.mark.filterwarnings("error::lesa.LesaWarning")

FLUX = CASES_BY_NAME["flux_dev"]
IMAGE = CASES_BY_NAME["flux_img2img"]
QWEN = CASES_BY_NAME["qwen_image"]


@pytest.fixture
def plans(monkeypatch):
    """Every plan made on the fly, in order."""
    made = []

    def counted(*args, **kwargs):
        made.append(plan_for(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(runner, "plan_for", counted)
    return made


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

    monkeypatch.setattr(runner, "impulse_response_of", impulse_response_of)
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
        driver.begin(Request(steps, shifted(steps)))
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
    known = statistics(("cond", "uncond"), (3.0, -2.0)).at(plan.sigmas, impulse_response)
    assert plan.computed == search(known.gram("output", GUIDED), impulse_response[-1], 4)
    assert (lesa.stats(pipe).computed, lesa.stats(pipe).forecast) == (8, 16)


# Refusals


def test_statistics_of_another_denoiser_are_refused():
    pipe = FLUX.make()
    for change in ({"denoiser": "WanTransformer3DModel"}, {"denoiser": None, "config_hash": "0" * 16}):
        with pytest.raises(PlanError, match="another denoiser"):
            lesa.enable(pipe, replace(statistics(), **change), budget=5)
        assert attached(pipe) is None


def test_a_bare_denoiser_is_refused_and_told_what_to_do():
    denoiser = FLUX.make().transformer
    with pytest.raises(ValueError, match="sigmas: a bare FluxTransformer2DModel"):
        lesa.enable(denoiser, statistics(), budget=5)
    assert attached(denoiser) is None
    with pytest.raises(PlanError, match="noise levels of the request"):
        Adaptive(statistics(), 5).begin(Request())
    lesa.enable(denoiser, plan_for(statistics(), 5))  # the way out


def test_a_budget_belongs_to_statistics(tmp_path):
    pipe = FLUX.make()
    plan = plan_for(statistics(), 5)
    with pytest.raises(ValueError, match="budget=6: .* budget of 5"):
        lesa.enable(pipe, plan, budget=6)
    with pytest.raises(ValueError, match="budget=None: with statistics say how many"):
        lesa.enable(pipe, statistics())
    with pytest.raises(PlanError, match="holds statistics.*budget=10"):
        lesa.enable(pipe, statistics().save(tmp_path / "statistics.safetensors"))
    with pytest.raises(ValueError, match="budget="):
        lesa.enable(pipe, plan.save(tmp_path / "plan.safetensors"), budget=5)
    with pytest.raises(ValueError, match="budget=0: expected"):
        lesa.enable(pipe, statistics(), budget=0)
    assert attached(pipe) is None
