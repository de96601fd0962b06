"""Learning from requests that come: what is recorded, what counts, and the plan that comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import CASES_BY_NAME, NEGATIVE, PROMPTS, Case, flux_dev
from torch import Tensor, nn

from lesa.fitting import learn
from lesa.fitting.learn import Learner
from lesa.fitting.refine import Refiner, ScheduleSearch
from lesa.fitting.trials import Measured, Trials, run_in_full
from lesa.forecasters import plan_of
from lesa.models import hooks
from lesa.models.pipeline import calls_of
from lesa.planner.build import adapt, surrogate_of
from lesa.planner.statistics import Statistics
from lesa.plans.plan import Plan
from lesa.plans.rows import LesaWarning
from lesa.runtime.runner import PlanRunner

STEPS, BUDGET = 10, 4
REQUEST = {"num_inference_steps": STEPS, "height": 32, "width": 32, "max_sequence_length": 8}
FLUX, QWEN, SDXL = (CASES_BY_NAME[name] for name in ("flux_dev", "qwen_image", "sdxl"))


@pytest.fixture
def pipe() -> Any:
    return flux_dev()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Trials]:
    """What each learner of a test learned from."""
    found = []

    def spy(images: Trials, budget: int) -> Plan:
        found.append(images)
        return made(images, budget)

    made = learn.learned_plan
    monkeypatch.setattr(learn, "learned_plan", spy)
    return found


def learner(pipe: Any, requests: int, budget: int | float | None = BUDGET, **more: Any) -> Learner:
    driver = Learner(pipe, requests, budget, **more)
    hooks.attach(pipe, driver, "output")
    return driver


def request(pipe: Any, seed: int, **more: Any) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(PROMPTS[seed], generator=generator, **{"output_type": "latent", **REQUEST, **more}).images


def guided_request(case: Case) -> dict[str, Any]:
    size = dict(zip(("height", "width"), case.size or (), strict=False))
    negative = {} if case is FLUX else {"negative_prompt": NEGATIVE}
    return {**case.request, "num_inference_steps": 6, **size, **negative}


@pytest.mark.parametrize("case", [FLUX, QWEN, SDXL], ids=lambda case: case.name)
def test_what_is_watched_is_what_a_fit_gathers(case: Case, watched: list[Trials]) -> None:
    pipe, asked = case.make(), guided_request(case)
    trials = run_in_full(pipe, calls_of(pipe, PROMPTS[:2], None, asked, None, 1), asked)
    driver = learner(pipe, 2, 3)
    plain = [case.call(pipe, seed, prompt=seed, steps=6) for seed in range(2)]
    hooks.detach(pipe)
    assert all(torch.equal(case.call(pipe, seed, prompt=seed, steps=6), plain[seed]) for seed in range(2))
    ours, theirs = watched[0].statistics, trials.statistics
    for name in ("sigmas", "timesteps", "contexts", "requests", "scheduler", "denoiser", "config_hash"):
        assert getattr(ours, name) == getattr(theirs, name)
    # Nobody tells the scale; what Qwen-Image does to the sum shows.
    np.testing.assert_allclose(ours.guidance, theirs.guidance, rtol=0.1)
    np.testing.assert_array_equal(ours.impulse_response, theirs.impulse_response)
    np.testing.assert_allclose(ours.grams["output"], theirs.grams["output"], rtol=1e-6)
    np.testing.assert_allclose(watched[0].grams[::-1], trials.grams, rtol=1e-6)
    assert driver.stats.computed == 2 * 6 * len(ours.contexts) and driver.stats.forecast == 0
    assert driver.plan is not None and driver.plan.budget == 3


@pytest.mark.parametrize("case", [FLUX, QWEN, SDXL], ids=lambda case: case.name)
def test_each_image_of_a_batch_is_watched_by_itself(case: Case, watched: list[Trials]) -> None:
    pipe = case.make()
    learner(pipe, 2, 3)
    for seed in range(2):
        case.call(pipe, seed, batch=2, prompt=2 * seed, steps=6)
    hooks.detach(pipe)
    (ours,) = watched
    assert ours.count == ours.statistics.requests == 4
    assert len({float(gram[0, 0]) for gram in ours.grams}) == 4
    np.testing.assert_allclose(ours.grams.mean(0), ours.statistics.grams["output"], rtol=1e-9)


def test_the_plan_is_that_of_a_quick_fit_that_probes_the_last_request(pipe: Any) -> None:
    calls = calls_of(pipe, PROMPTS[:4], None, REQUEST, None, 1)
    trials = run_in_full(pipe, calls, REQUEST)
    trials.references, trials.calls = trials.references[::-1], calls[-1:]
    best = Refiner(trials, ScheduleSearch(trials, BUDGET, 60, 0), BUDGET, 0).run()
    assert best.weights is not None
    weights, computed = best.weights[0], best.computed
    driver = learner(pipe, 4)
    assert driver.plan is None
    for seed in range(4):
        request(pipe, seed)
    plan = driver.plan
    assert plan is not None and plan.computed == computed and plan.site == "output"
    for step, row in plan.rows_of("cond").items():
        np.testing.assert_allclose(row.weights, weights[step, list(row.steps)], atol=1e-4)
    assert plan.training["requests"] == 4 and plan.training["learned"] is True
    assert plan.training["schedule"] == "searched"
    assert surrogate_of(plan).requests == 4
    assert plan.expected and set(plan.expected) == set(plan.checks)
    assert driver.stats.guard == "warn"


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    """What "reuse" on steps 0, 2 and 4 does to the last request when a learner runs it again."""
    found = []

    def spy(images: Trials, budget: int) -> Plan:
        found.append(images.run(plan_of("reuse", (0, 2, 4), images.statistics.sigmas, "output"), slice(1)))
        return made(images, budget)

    made = learn.learned_plan
    monkeypatch.setattr(learn, "learned_plan", spy)
    return found


@pytest.mark.parametrize("case", [FLUX, QWEN, SDXL], ids=lambda case: case.name)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_last_request_runs_again_as_in_the_pipeline(case: Case, batch: int, rerun: list[Measured]) -> None:
    """Separate contexts, batched guidance, and samples that the scheduler scales: the errors and their answers."""
    pipe = case.make()
    learner(pipe, 2, 3)
    for seed in range(2):
        case.call(pipe, seed, batch=batch, prompt=seed, steps=6)
    hooks.detach(pipe)
    asked = guided_request(case)
    functions = [lambda seed=seed: case.call(pipe, seed, batch=batch, prompt=seed, steps=6) for seed in range(2)]
    trials = run_in_full(pipe, calls_of(pipe, None, functions, {}, None, 1), asked)
    theirs = trials.run(plan_of("reuse", (0, 2, 4), trials.statistics.sigmas, "output"), slice(1, 2))
    assert rerun[0].outcome.error.shape == (3, batch) and (rerun[0].outcome.error > 0).all()
    np.testing.assert_allclose(rerun[0].outcome.error.mean(1), theirs.outcome.error[:, 0], rtol=0.02)
    if batch == 1:
        np.testing.assert_allclose(rerun[0].error_gains[:, 1:], theirs.error_gains[:, 1:], rtol=0.05, atol=0.01)


def test_learning_goes_on_where_the_last_request_cannot_run_again(pipe: Any) -> None:
    plain, calls = request(pipe, 0), []

    def fail(module: nn.Module, given: Any) -> None:
        calls.append(given)
        if len(calls) > STEPS:
            raise RuntimeError("out of memory")

    handle = pipe.transformer.proj_out.register_forward_pre_hook(fail)
    driver = learner(pipe, 1)
    with pytest.warns(LesaWarning, match="out of memory"):
        assert torch.equal(request(pipe, 0), plain)
    handle.remove()
    assert len(calls) == STEPS + 1 and driver.plan is not None and driver.plan.budget == BUDGET


def test_the_next_requests_run_by_the_plan(pipe: Any) -> None:
    driver = learner(pipe, 1)
    request(pipe, 0)
    assert (driver.stats.requests, driver.stats.computed, driver.stats.forecast) == (1, STEPS, 0)
    assert driver.plan is not None
    got = request(pipe, 1)
    assert (driver.stats.requests, driver.stats.computed) == (2, STEPS + BUDGET)
    assert driver.stats.forecast == STEPS - BUDGET and not driver.stats.refused
    hooks.attach(pipe, PlanRunner(replace(driver.plan, surrogate=None)), "output")
    assert torch.equal(request(pipe, 1), got)


def test_other_requests_adapt_the_plan(pipe: Any) -> None:
    driver = learner(pipe, 2, 0.4)
    for seed in range(2):
        request(pipe, seed)
    own = driver.plan
    assert own is not None and own.budget == 4
    request(pipe, 2, num_inference_steps=15)
    assert driver.plan is not None and driver.plan.budget == 6 and driver.plan.num_steps == 15
    assert driver.plan.computed == adapt(own, 0.4, driver.plan.sigmas).computed
    request(pipe, 2)
    assert driver.plan is own


@pytest.mark.parametrize(("steps", "computed"), [(8, 4), (10, 4), (20, 6)])
def test_the_default_budget(pipe: Any, steps: int, computed: int) -> None:
    driver = learner(pipe, 1, None)
    request(pipe, 0, num_inference_steps=steps)
    assert driver.plan is not None and driver.plan.budget == computed


def test_interrupted_requests_do_not_count(pipe: Any, watched: list[Trials]) -> None:
    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == STEPS - 2:
            raise RuntimeError("stopped")
        return values

    def interrupt(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 3
        return values

    driver = learner(pipe, 2)
    request(pipe, 0)
    assert "1 of 2" in driver.stats.learning and driver.stats.learning in str(driver.stats)
    with pytest.raises(RuntimeError, match="stopped"):
        request(pipe, 1, callback_on_step_end=stop)
    request(pipe, 2, callback_on_step_end=interrupt)
    assert "1 of 2" in driver.stats.learning and driver.plan is None
    request(pipe, 3)
    assert driver.plan is not None and driver.stats.requests == 4 and "2 of 2" in driver.stats.learning
    hooks.detach(pipe)
    trials = run_in_full(pipe, calls_of(pipe, [PROMPTS[0], PROMPTS[3]], None, REQUEST, [0, 3], 1), REQUEST)
    np.testing.assert_allclose(watched[0].grams[::-1], trials.grams, rtol=1e-6)


def test_each_kind_of_requests_counts_by_itself(pipe: Any, watched: list[Trials]) -> None:
    driver = learner(pipe, 2)
    with pytest.warns(LesaWarning, match="3 steps"):
        request(pipe, 0, num_inference_steps=3)  # the budget covers it
    request(pipe, 0)
    request(pipe, 1, num_inference_steps=12)
    assert driver.plan is None and "1 of 2" in driver.stats.learning
    request(pipe, 1, num_inference_steps=12)
    assert driver.plan is not None and driver.plan.num_steps == 12
    assert watched[0].count == 2 and not any(reference.outputs.numel() for reference in watched[0].references)


def test_another_scheduler_is_another_kind(pipe: Any) -> None:
    driver = learner(pipe, 2)
    request(pipe, 0)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    request(pipe, 1)
    assert driver.plan is None and "1 of 2" in driver.stats.learning


def test_disable_in_the_middle_leaves_the_denoiser_bit_equal(pipe: Any) -> None:
    plain = request(pipe, 1)
    forward = pipe.transformer.forward

    def disable(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            hooks.detach(pipe)
        return values

    driver = learner(pipe, 1)
    assert torch.equal(request(pipe, 1, callback_on_step_end=disable), plain)
    assert driver.plan is None and pipe.transformer.forward == forward and hooks.attached(pipe) is None
    assert torch.equal(request(pipe, 1), plain)


class Loop(nn.Module):
    """A denoiser whose answers depend on what it is given, and on a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) / 3)

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: float = 1.0) -> Tensor:
        return torch.tanh(hidden_states @ self.weight + prompt * timestep)


SIGMAS = np.linspace(1, 0, 9).tolist()


def loop(denoiser: nn.Module, seed: int, guided: bool = False, steps: int = 8, until: int | None = None) -> Tensor:
    sample = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))
    levels = np.linspace(1, 0, steps + 1)
    with torch.no_grad():
        for now, then in list(zip(levels, levels[1:], strict=False))[:until]:
            given = torch.tensor(float(now))
            out = denoiser(sample, given)
            if guided:
                out = 2.5 * out - 1.5 * denoiser(sample, given, prompt=0.2)
            sample = sample + float(then - now) * out
    return sample


@pytest.mark.parametrize("guided", [False, True])
def test_a_loop_of_ones_own(guided: bool, watched: list[Trials]) -> None:
    denoiser = Loop()
    functions = [lambda seed=seed: loop(denoiser, seed, guided) for seed in range(2)]
    theirs = Statistics.gather(denoiser, requests=functions)
    driver = learner(denoiser, 2, 3, sigmas=SIGMAS)
    loop(denoiser, 0, guided)
    loop(denoiser, 5, guided, until=6)
    assert driver.plan is None
    loop(denoiser, 1, guided)
    ours = watched[0].statistics
    assert driver.plan is not None and ours.guidance == theirs.guidance == ((2.5, -1.5) if guided else (1.0,))
    np.testing.assert_allclose(ours.impulse_response, theirs.impulse_response)
    # Two samples at a time: a batch that nobody counted are two requests.
    assert watched[0].count == 4
    np.testing.assert_allclose(ours.grams["output"], theirs.grams["output"], rtol=1e-6)
    loop(denoiser, 2, guided)
    assert driver.stats.forecast == 5 * (1 + guided)


@pytest.mark.parametrize("guided", [False, True])
def test_the_last_request_of_a_loop_runs_again(guided: bool, rerun: list[Measured]) -> None:
    """Arguments by position, two samples in a batch, and calls of one step that have no names."""
    denoiser = Loop()
    functions = [lambda seed=seed: loop(denoiser, seed, guided) for seed in range(2)]
    trials = run_in_full(denoiser, calls_of(denoiser, None, functions, {}, None, 1), {}, sigmas=SIGMAS)
    theirs = trials.run(plan_of("reuse", (0, 2, 4), SIGMAS, "output"), slice(1, 2))
    learner(denoiser, 2, 3, sigmas=SIGMAS)
    for run in functions:
        run()
    np.testing.assert_allclose(rerun[0].outcome.error.mean(1), theirs.outcome.error[:, 0], rtol=1e-4)


def test_a_loop_that_may_scale_its_samples_is_not_run_again(watched: list[Trials]) -> None:
    """Where levels exceed 1, loops divide their samples by what they like before the denoiser is given them."""
    denoiser, sigmas = Loop(), [4.0 * level for level in SIGMAS]
    learner(denoiser, 1, 3, sigmas=sigmas)
    loop(denoiser, 0)
    assert not watched[0].calls


def test_a_loop_of_more_steps_than_its_sigmas_is_refused() -> None:
    denoiser = Loop()
    driver = learner(denoiser, 2, 3, sigmas=SIGMAS)
    with pytest.raises(ValueError, match="sigmas"):
        loop(denoiser, 0, steps=9)
    assert driver.plan is None


@pytest.mark.parametrize("where", [(0, 3), (3, 5), (3, 8)])
def test_guidance_in_a_part_of_the_steps_is_told_and_not_counted(where: tuple[int, int]) -> None:
    denoiser, sample = Loop(), torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    driver = learner(denoiser, 1, 3, sigmas=SIGMAS)

    def run() -> None:
        for step, level in enumerate(SIGMAS[:-1]):
            for prompt in (1.0, 0.2)[: 1 + (where[0] <= step < where[1])]:
                denoiser(sample * level, torch.tensor(level), prompt)

    with torch.no_grad():
        run()
        with pytest.warns(LesaWarning, match="context"):  # when the next one starts, for more calls could have come
            run()
    assert driver.plan is None and "0 of 1" in driver.stats.learning and driver.stats.forecast == 0


def test_outputs_that_are_not_finite_are_told_and_not_counted() -> None:
    denoiser = Loop()
    driver = learner(denoiser, 1, 3, sigmas=SIGMAS)
    with torch.no_grad():
        denoiser.weight.fill_(float("nan"))
    with pytest.warns(LesaWarning, match="NaN"):
        loop(denoiser, 0)
    assert driver.plan is None and "0 of 1" in driver.stats.learning


def test_the_runner_that_is_given_runs_the_plan(pipe: Any) -> None:
    driver = learner(pipe, 4, runner=lambda plan: PlanRunner(plan, guard="off"))
    for seed in range(4):
        request(pipe, seed)
    request(pipe, 0)
    driver.settle()
    assert driver.stats.guard == "off" and not driver.stats.checks and driver.stats.forecast == STEPS - BUDGET


def test_learn_is_a_whole_number_of_requests(pipe: Any) -> None:
    for wrong in [0, -1, 2.5, True, "4", None]:
        with pytest.raises(ValueError, match="learn"):
            Learner(pipe, wrong, BUDGET)
