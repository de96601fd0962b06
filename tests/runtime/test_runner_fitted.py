"""Fitted plans adapted to each request, on tiny pipelines."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from pipelines import CASES_BY_NAME
from written import BUDGET, fitted, shifted

import lesa
from lesa.models.hooks import attached
from lesa.planner.build import adapt, surrogate_of
from lesa.planner.statistics import flow_impulse_response
from lesa.plans.rows import PlanError
from lesa.runtime import runner
from lesa.runtime.clock import Request, sigmas_of
from lesa.runtime.runner import PlanRunner

pytestmark = pytest.mark.filterwarnings("error::lesa.LesaWarning")

FLUX, IMAGE = CASES_BY_NAME["flux_dev"], CASES_BY_NAME["flux_img2img"]


@pytest.fixture
def made(monkeypatch):
    """Every plan made of a fitted one, in order."""
    plans = []

    def counted(*args):
        plans.append(adapt(*args))
        return plans[-1]

    monkeypatch.setattr(runner, "adapt", counted)
    return plans


@functools.cache
def served():
    """A fitted plan of 12 steps at the noise levels of the tiny pipeline, and that pipeline."""
    pipe = FLUX.make()
    FLUX.call(pipe, steps=12)
    plan = fitted(1, 12, 5)
    sigmas = sigmas_of(pipe.scheduler)
    surrogate = surrogate_of(plan).at(plan.sigmas, sigmas, flow_impulse_response(sigmas)).to_arrays()
    timesteps = tuple(pipe.scheduler.timesteps.tolist())
    return replace(plan, sigmas=sigmas, timesteps=timesteps, surrogate=surrogate), pipe


@pytest.fixture
def pipe():
    plan, pipe = served()
    yield pipe
    lesa.disable(pipe)


def test_its_own_step_count_runs_by_the_plan_bit_for_bit(pipe, made):
    plan, _ = served()
    lesa.enable(pipe, replace(plan, surrogate=None), guard="off")
    assert isinstance(attached(pipe).driver, PlanRunner)
    before = FLUX.call(pipe, steps=12)
    lesa.enable(pipe, plan, guard="off")
    assert torch.equal(FLUX.call(pipe, steps=12), before)
    assert torch.equal(FLUX.call(pipe, steps=12), before)
    driver = attached(pipe).driver
    assert driver.plan is plan and made == [plan]
    assert driver._runner.plan == plan and driver._runner.plan.surrogate is None
    assert (lesa.stats(pipe).requests, lesa.stats(pipe).computed) == (2, 10)


def test_other_step_counts_have_plans_made_once(pipe, made):
    plan, _ = served()
    lesa.enable(pipe, plan, guard="off")
    made.clear()
    for steps in (9, 20, 9, 12, 20):
        FLUX.call(pipe, steps=steps)
        now = attached(pipe).driver.plan
        assert now.sigmas == sigmas_of(pipe.scheduler) and now.budget == 5
        assert (now is plan) == (steps == 12)
    assert [one.num_steps for one in made] == [9, 20]
    stats = lesa.stats(pipe)
    assert (stats.requests, stats.computed, stats.forecast) == (5, 25, 4 + 15 + 4 + 7 + 15) and not stats.refused
    lesa.enable(pipe, adapt(plan, None, made[1].sigmas), guard="off")
    by_itself = FLUX.call(pipe, steps=20)
    lesa.enable(pipe, plan, guard="off")
    probed = FLUX.call(pipe, steps=20)  # with the impulse response of its scheduler
    torch.testing.assert_close(probed, by_itself, rtol=1e-4, atol=1e-4)


def test_fewer_steps_than_computed_ones_stay_bit_equal(pipe):
    plan, _ = served()
    full = FLUX.call(pipe, steps=4)
    lesa.enable(pipe, plan, guard="warn")
    with pytest.warns(lesa.LesaWarning, match="budget="):
        assert torch.equal(FLUX.call(pipe, steps=4), full)
    assert (lesa.stats(pipe).computed, lesa.stats(pipe).forecast) == (4, 0)


@pytest.mark.parametrize(("budget", "computed"), [(3, (3, 3)), (0.5, (6, 10)), (1, (1, 1)), (5, (5, 5))])
def test_other_budgets(pipe, budget, computed, tmp_path):
    plan, _ = served()
    for source in (plan, plan.save(tmp_path / "plan.safetensors"), plan.save_pretrained(tmp_path / "folder").parent):
        lesa.enable(pipe, source, budget=budget, guard="off")
        for steps, wanted in zip((12, 20), computed, strict=True):
            FLUX.call(pipe, steps=steps)
            assert attached(pipe).driver.plan.budget == wanted
    lesa.enable(pipe, replace(plan, surrogate=None).save(tmp_path / "bare.safetensors"))
    with pytest.raises(ValueError, match="budget=3"):
        lesa.enable(pipe, tmp_path / "bare.safetensors", budget=3)
    assert isinstance(attached(pipe).driver, PlanRunner)


def test_a_request_is_its_own_where_noise_levels_and_response_are(made, monkeypatch):
    plan, _ = served()
    driver = runner.Adaptive(plan)
    made.clear()
    for off, own in ((0.0, True), (0.4, True), (1.6, False)):
        sigmas = tuple(sigma - off * runner._SAME * (i < 12) for i, sigma in enumerate(plan.sigmas))
        driver.begin(Request(12, sigmas))
        assert (driver.plan is plan) == own
    assert len(made) == 1
    driver.begin(Request(11, plan.sigmas[1:]))
    assert driver.plan.sigmas == plan.sigmas[1:] and len(made) == 2
    # What multistep schedulers make of the outputs at the same noise levels.
    monkeypatch.setattr(runner, "impulse_response_of", lambda *_: 0.9 * surrogate_of(plan).impulse_response)
    scheduler = type("Multistep", (), {"timesteps": plan.timesteps})()
    driver.begin(Request(12, plan.sigmas, scheduler))
    assert driver.plan is made[2] and driver.plan.sigmas == plan.sigmas
    driver.begin(Request(12, plan.sigmas))
    assert driver.plan is plan and len(made) == 3


@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
@pytest.mark.parametrize("budget", [None, 4])
def test_adapted_plans_expect_errors_of_their_own(pipe, budget):
    plan, _ = served()
    lesa.enable(pipe, plan, budget=budget)
    FLUX.call(pipe, steps=20)
    now, checks = attached(pipe).driver.plan, lesa.stats(pipe).checks
    assert now.num_steps == 20
    assert {c.step: c.expected for c in checks} == {step: e.error for step, e in now.expected["*"].items()} != {}


def test_image_to_image(made):
    pipe, (plan, _) = IMAGE.make(), served()
    lesa.enable(pipe, plan, guard="off")
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
    sigmas = shifted(20)

    def loop():
        sample = torch.ones(1, 8, 4)
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            sample = sample + (following - sigma) * denoiser(sample, timestep=torch.tensor(1000 * sigma))
        return sample

    full = loop()
    lesa.enable(denoiser, plan)
    with pytest.raises(PlanError, match="timestep"):
        loop()
    lesa.enable(denoiser, adapt(plan, sigmas=sigmas), guard="off")
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
    with pytest.raises(ValueError, match="guard="):
        lesa.enable(pipe, plan, guard="on")
    assert attached(pipe) is before


def test_a_fit_attaches_what_it_was_fitted_from(pipe):
    request = {"num_inference_steps": 8, "height": 32, "width": 32, "max_sequence_length": 8}
    with pytest.warns(lesa.LesaWarning, match="expected errors"):
        plan = lesa.fit(pipe, ["a", "b", "c"], budget=3, request=request, effort="quick")
    surrogate = surrogate_of(plan)
    assert (surrogate.requests, surrogate.num_steps, surrogate.contexts) == (2, 8, ("cond",))
    lesa.enable(pipe, plan)
    FLUX.call(pipe, steps=6)
    assert attached(pipe).driver.plan.budget == 3 and attached(pipe).driver.plan.num_steps == 6
