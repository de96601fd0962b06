"""Requests without a plan of their own, by generic plans, on tiny pipelines and in loops of one's own."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.cache_utils import CacheMixin
from pipelines import CASES_BY_NAME
from torch import Tensor
from written import shifted

import lesa
from lesa.forecasters import plan_of
from lesa.models.hooks import attached
from lesa.planner.build import default_budget
from lesa.planner.generic import FLOW, generic_plan
from lesa.planner.statistics import flow_impulse_response
from lesa.plans.plan import Plan
from lesa.plans.rows import PlanError
from lesa.runtime import runner
from lesa.runtime.clock import Request, impulse_response_of, sigmas_of

pytestmark = pytest.mark.filterwarnings("error::lesa.LesaWarning")

FLUX = CASES_BY_NAME["flux_dev"]
STEPS = 12
# The pipelines, what a default request of them predicts, and whether it has guidance.
KINDS = (
    ("flux_dev", FLOW, False),
    ("flux_img2img", FLOW, False),
    ("qwen_image", FLOW, True),
    ("wan", FLOW, True),
    ("sdxl", "epsilon", True),
    ("dit", "epsilon", True),
)


class Made(list[Plan]):
    """The generic plans that were made, in order, and what of."""

    def __init__(self) -> None:
        super().__init__()
        self.of: list[tuple] = []

    def __call__(self, *arguments: Any) -> Plan:
        self.of.append(arguments)
        self.append(generic_plan(*arguments))
        return self[-1]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    plans = Made()
    monkeypatch.setattr(runner, "generic_plan", plans)
    return plans


@pytest.fixture(scope="module")
def shared() -> Any:
    return FLUX.make()


@pytest.fixture
def pipe(shared: Any) -> Iterator[Any]:
    yield shared
    lesa.disable(shared)


def counts(target: Any) -> tuple[int, int, int]:
    stats = lesa.stats(target)
    assert not stats.refused
    return stats.requests, stats.computed, stats.forecast


# Loops of one's own


class Gauss(CacheMixin, torch.nn.Module):
    """The flow of data with another variance in each element; counts what it really computes.

    Args:
        sigmas: of its requests; a timestep stands for the next of them, whatever it says.
    """

    def __init__(self, sigmas: tuple[float, ...], timesteps: tuple[float, ...]) -> None:
        super().__init__()
        self.level = dict(zip(timesteps, sigmas, strict=False))
        self.variances = torch.logspace(-2, 1, 16)
        self.ran: list[float] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, shift: float = 0.0) -> Tensor:
        self.ran.append(float(timestep))
        sigma = self.level[float(timestep)]
        variances = self.variances.to(hidden_states.dtype)
        power = (1 - sigma) ** 2 * variances + sigma**2
        return (sigma - (1 - sigma) * variances) / power * hidden_states + shift


def exact(timestep: float) -> Tensor:
    return torch.tensor(timestep, dtype=torch.float64)


class Loop:
    """A request of `Gauss`, as its user writes it: contexts and batches may change at each step.

    Args:
        contexts: the contexts of each step, e.g. ("cond",) or ("cond", "uncond"); (None, None) are calls without names.
        batch: how often the batch holds the sample at each step.
        sigmas: T + 1 of them.
        scheduler: counts the steps; None for a bare denoiser.
    """

    def __init__(
        self,
        contexts: Callable[[int], tuple[str | None, ...]] = lambda step: (None,),
        batch: Callable[[int], int] = lambda step: 1,
        sigmas: tuple[float, ...] = shifted(STEPS),
        timesteps: tuple[float, ...] | None = None,
        scheduler: Any = None,
    ) -> None:
        self.contexts, self.batch, self.scheduler, self.sigmas = contexts, batch, scheduler, sigmas
        if scheduler is not None:
            scheduler.set_timesteps(len(sigmas) - 1)
            timesteps = tuple(map(float, scheduler.timesteps))
        self.timesteps = timesteps or tuple(1000.0 * sigma for sigma in sigmas[:-1])
        self.transformer = Gauss(sigmas, self.timesteps)

    def run(self, seed: int = 0, shape: tuple[int, ...] = (1, 8, 16), dtype: torch.dtype = torch.float32) -> Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.transformer.ran.clear()
        sample = noise.to(dtype)
        if self.scheduler is not None:
            self.scheduler.set_timesteps(len(self.sigmas) - 1)
        given = self.timesteps if self.scheduler is None else self.scheduler.timesteps
        for step, timestep in enumerate(given):
            sample = self.step(step, timestep if isinstance(timestep, Tensor) else exact(timestep), sample)
        return sample

    def step(self, step: int, timestep: Tensor, sample: Tensor) -> Tensor:
        doubled, outputs = torch.cat([sample] * self.batch(step)), []
        for i, name in enumerate(self.contexts(step)):
            with self.transformer.cache_context(name) if name else nullcontext():
                outputs += self.call(name or i, step, timestep, doubled).chunk(self.batch(step))
        first, last = outputs[0], outputs[-1]
        guided = first if len(outputs) == 1 else last + 2.0 * (first - last)
        if self.scheduler is not None:
            return self.scheduler.step(guided, timestep, sample).prev_sample
        return sample + (self.sigmas[step + 1] - self.sigmas[step]) * guided

    def call(self, context: str | int, step: int, timestep: Tensor, sample: Tensor) -> Tensor:
        """One denoiser call; contexts differ by a shift."""
        return self.transformer(sample, timestep=timestep, shift=0.1 * (context in (1, "uncond")))

    def ran(self) -> list[int]:
        """How many calls of each step were computed."""
        found = Counter(self.transformer.ran)
        return [found[timestep] for timestep in self.timesteps]


class Oracle(Loop):
    """A loop that forecasts by itself: `part(context, step)` is the plan, and the step it begins at."""

    part: Callable[[str | int, int], tuple[int, Plan]]

    def run(self, *given: Any, **more: Any) -> Tensor:
        self.kept: dict[tuple, Tensor] = {}
        return super().run(*given, **more)

    def call(self, context: str | int, step: int, timestep: Tensor, sample: Tensor) -> Tensor:
        begin, plan = self.part(context, step)
        row = plan.rows_of("*").get(step - begin)
        if row is None:
            self.kept[context, step] = super().call(context, step, timestep, sample)
            return self.kept[context, step]
        terms = [weight * self.kept[context, begin + q] for q, weight in zip(row.steps, row.weights, strict=True)]
        return torch.stack(terms).sum(0)


def check_against_oracle(loop: Loop, output: Tensor, part: Callable[[str | int, int], tuple[int, Plan]]) -> None:
    oracle = Oracle(loop.contexts, loop.batch, loop.sigmas, loop.timesteps, loop.scheduler)
    oracle.part = part
    torch.testing.assert_close(output, oracle.run(), rtol=1e-4, atol=1e-4)
    assert loop.ran() == oracle.ran()


def from_step(k: int, before: Any, after: Any) -> Callable[[int], Any]:
    return lambda step: before if step < k else after


# Pipelines


@pytest.mark.parametrize(("name", "prediction", "guided"), KINDS)
def test_each_kind_of_pipeline(name: str, prediction: str, guided: bool, made: Made) -> None:
    case, pipe = CASES_BY_NAME[name], CASES_BY_NAME[name].make()
    full = case.call(pipe, steps=STEPS)
    with lesa.enable(pipe) as run:
        assert run.plan is None
        first = case.call(pipe, steps=STEPS)
        plan = run.plan
        total = sum(timestep is not None for timestep in pipe.scheduler.timesteps)
        sigmas = sigmas_of(pipe.scheduler)[total - plan.num_steps :]
        response = impulse_response_of(pipe.scheduler, total - plan.num_steps)
        assert made == [plan] and made.of[0][:4] == (prediction, guided, default_budget(len(sigmas) - 1), sigmas)
        np.testing.assert_allclose(made.of[0][4], response)
        calls = max(1, len(case.contexts))
        own = (1, calls * plan.budget, calls * (plan.num_steps - plan.budget))
        assert plan.budget == default_budget(plan.num_steps) == 4 and counts(pipe) == own
        assert plan.num_steps == (9 if name == "flux_img2img" else STEPS)
        other = case.call(pipe, seed=1, steps=STEPS)
        again = case.call(pipe, steps=STEPS)
        assert torch.equal(first, again) and made == [plan] and run.plan is plan
        assert counts(pipe) == tuple(3 * count for count in own)
    assert torch.equal(case.call(pipe, steps=STEPS), full) and not torch.equal(first, full)
    lesa.enable(pipe, plan)  # the oracle
    assert torch.equal(case.call(pipe, steps=STEPS), first)
    assert torch.equal(case.call(pipe, seed=1, steps=STEPS), other)
    assert counts(pipe) == tuple(2 * count for count in own)


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image", "wan", "sdxl", "dit"])
def test_switching_guidance_switches_plans(name: str, made: Made) -> None:
    case = CASES_BY_NAME[name]
    pipe = case.make()
    lesa.enable(pipe)
    more = {"negative_prompt": ["dull"]} if name == "flux_dev" else {}
    outputs = [case.call(pipe, steps=STEPS, guidance=guided, **(more if guided else {})) for guided in (1, 0, 1, 0)]
    assert [one[1] for one in made.of] == [True, False] and not lesa.stats(pipe).refused
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_two_prompts_are_no_guidance(pipe: Any, made: Made) -> None:
    lesa.enable(pipe)
    FLUX.call(pipe, batch=2, steps=STEPS)
    FLUX.call(pipe, batch=1, images=3, steps=STEPS)
    assert [one[1] for one in made.of] == [False]


def test_plans_are_made_once_for_each_kind(pipe: Any, made: Made) -> None:
    scheduler = pipe.scheduler
    lesa.enable(pipe)
    for steps in (12, 20, 12, 20):
        FLUX.call(pipe, steps=steps)
        assert lesa.stats(pipe) and attached(pipe).driver.plan.num_steps == steps
    assert [plan.budget for plan in made] == [4, 6]
    FLUX.call(pipe, steps=12, size=(160, 160))  # a larger shift
    assert len(made) == 3 and made[2].sigmas != made[0].sigmas
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    FLUX.call(pipe, steps=12)
    assert len(made) == 4 and made[3].sigmas == sigmas_of(pipe.scheduler)
    pipe.scheduler = scheduler
    FLUX.call(pipe, steps=12)
    assert len(made) == 4 and attached(pipe).driver.plan is made[0]
    assert counts(pipe) == (7, 5 * 4 + 2 * 6, 5 * 8 + 2 * 14)


def test_few_plans_are_kept(pipe: Any, made: Made) -> None:
    driver = lesa.enable(pipe)._driver
    for steps in range(2, 2 + runner._MOST_PLANS + 2):
        FLUX.call(pipe, steps=steps, height=16, width=16)
    assert len(driver._plans) == runner._MOST_PLANS
    FLUX.call(pipe, steps=19, height=16, width=16)
    FLUX.call(pipe, steps=2, height=16, width=16)
    assert [plan.num_steps for plan in made] == [*range(2, 20), 2]


@pytest.mark.parametrize(("steps", "computed"), [(1, 1), (2, 1), (4, 2), (8, 4), (9, 4)])
@pytest.mark.parametrize("name", ["flux_dev", "wan"])
def test_short_requests(name: str, steps: int, computed: int, made: Made) -> None:
    case = CASES_BY_NAME[name]
    pipe, calls = case.make(), len(case.contexts)
    full = case.call(pipe, steps=steps)
    run = lesa.enable(pipe)
    output = case.call(pipe, steps=steps)
    assert counts(pipe) == (1, calls * computed, calls * (steps - computed))
    assert torch.equal(case.call(pipe, steps=steps), output) and torch.equal(output, full) == (steps == 1)
    assert counts(pipe) == (2, 2 * calls * computed, 2 * calls * (steps - computed))
    assert len(made) == (steps > 1) and (run.plan is None) == (steps == 1)


def test_a_budget_of_all_steps_is_told_and_bit_equal(pipe: Any) -> None:
    full = FLUX.call(pipe, steps=4)
    lesa.enable(pipe, budget=10)
    with pytest.warns(lesa.LesaWarning, match="budget="):
        assert torch.equal(FLUX.call(pipe, steps=4), full)
    assert counts(pipe) == (1, 4, 0)


def test_an_interrupted_request_counts_for_nothing(pipe: Any, made: Made) -> None:
    lesa.enable(pipe)
    whole = FLUX.call(pipe, steps=STEPS)

    def stop(last: int, _: Any, step: int, *__: Any) -> dict:
        if step == last:
            raise KeyboardInterrupt
        return {}

    for last in (0, 1, 2, 6, 11):
        with pytest.raises(KeyboardInterrupt):
            FLUX.call(pipe, steps=STEPS, seed=3, callback_on_step_end=functools.partial(stop, last))
        assert torch.equal(FLUX.call(pipe, steps=STEPS), whole)
    assert len(made) == 1 and not lesa.stats(pipe).refused


def test_requests_of_different_shapes(pipe: Any) -> None:
    sizes = ((32, 32), (48, 32), (32, 32))
    alone = []
    for size in sizes[:2]:
        with lesa.enable(pipe):
            alone.append(FLUX.call(pipe, steps=STEPS, size=size))
    lesa.enable(pipe)
    for size, expected in zip(sizes, [*alone, alone[0]], strict=True):
        assert torch.equal(FLUX.call(pipe, steps=STEPS, size=size), expected)
    for batch in (1, 3, 1):
        FLUX.call(pipe, steps=STEPS, batch=batch)
    assert counts(pipe) == (6, 24, 48)


def test_plans_in_turn_with_an_own_one(pipe: Any) -> None:
    with lesa.enable(pipe):
        generic = FLUX.call(pipe, steps=STEPS)
    reuse = plan_of("reuse", (0, 4, 8), sigmas_of(pipe.scheduler))
    with lesa.enable(pipe, reuse):
        own = FLUX.call(pipe, steps=STEPS)
    for plan, expected in ((None, generic), (reuse, own), (None, generic), (reuse, own)):
        run = lesa.enable(pipe, plan)
        assert torch.equal(FLUX.call(pipe, steps=STEPS), expected)
        assert (run.plan is reuse) == (plan is reuse)
    lesa.disable(pipe)
    with lesa.enable(pipe) as outer:
        with lesa.enable(pipe, budget=2) as inner:
            with lesa.enable(pipe, reuse):
                assert torch.equal(FLUX.call(pipe, steps=STEPS), own)
            assert not torch.equal(FLUX.call(pipe, steps=STEPS), generic) and inner.plan.budget == 2
        assert outer.plan is None
        assert torch.equal(FLUX.call(pipe, steps=STEPS), generic) and outer.stats.requests == 1
    assert attached(pipe) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["flux_dev", "qwen_image"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case = CASES_BY_NAME[name]
    pipe = case.make().to(dtype)
    pipe.transformer.to(dtype)
    full = case.call(pipe, steps=STEPS)
    lesa.enable(pipe)
    output = case.call(pipe, steps=STEPS)
    assert output.dtype == full.dtype and output.isfinite().all() and not lesa.stats(pipe).refused


def test_noise_levels_that_are_not_finite_are_refused(pipe: Any, made: Made) -> None:
    lesa.enable(pipe)
    whole = FLUX.call(pipe, steps=STEPS)
    with pytest.raises(PlanError, match="sigmas="):
        FLUX.call(pipe, sigmas=[1.0, 0.5, math.nan, 0.2])
    assert counts(pipe) == (1, 4, 8)
    assert torch.equal(FLUX.call(pipe, steps=STEPS), whole) and len(made) == 1
    driver = runner.Generic()
    for level in (math.nan, math.inf):
        with pytest.raises(PlanError, match="sigmas="):
            driver.begin(Request(2, (1.0, level, 0.0)))
    assert driver.stats.requests == 0
    with pytest.raises(PlanError, match="sigmas="):
        driver.begin(Request())


# Guidance that comes and goes


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "bare": lambda: None,
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=2.0),
}


def enabled(loop: Loop, **more: Any) -> tuple[Any, lesa.Stats]:
    """Lesa on a loop, and its stats."""
    target = loop.transformer if loop.scheduler is None else loop
    run = lesa.enable(target, **({"sigmas": loop.sigmas} if loop.scheduler is None else {}), **more)
    return run, run.stats


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize(("names", "k"), [(("cond", "uncond"), 1), ((None, None), 5), (("cond", "uncond"), 11)])
def test_guidance_that_goes(kind: str, names: tuple, k: int, made: Made) -> None:
    loop = Loop(from_step(k, names, names[:1]), scheduler=SCHEDULERS[kind]())
    run, stats = enabled(loop)
    output = loop.run()
    computed = set(run.plan.computed)
    assert loop.ran() == [(2 if step < k else 1) * (step in computed) for step in range(STEPS)]
    assert stats.computed == sum(loop.ran()) and stats.forecast == STEPS + k - stats.computed and not stats.refused
    assert [one[1] for one in made.of] == [True]
    check_against_oracle(loop, output, lambda context, step: (0, made[0]))


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize(
    ("names", "k"),
    [(("cond", "uncond"), 1), (("uncond", "cond"), 2), ((None, None), 2), (("uncond", "cond"), 5), ((None, None), 11)],
)
def test_guidance_that_comes(kind: str, names: tuple, k: int, made: Made) -> None:
    before = ("cond",) if names[0] else (None,)
    loop = Loop(from_step(k, before, names), scheduler=SCHEDULERS[kind]())
    run, stats = enabled(loop)
    output = loop.run()
    whole, rest = made
    assert run.plan is whole and whole.budget == 4 and [one[1] for one in made.of] == [False, True]
    left = max(1, sum(step >= k for step in whole.computed))
    assert (rest.num_steps, rest.budget, rest.sigmas) == (STEPS - k, left, whole.sigmas[k:])
    expected = [(step in whole.computed) + (step - k in rest.computed) for step in range(STEPS)]
    assert loop.ran() == expected and not stats.refused
    assert (stats.requests, stats.computed, stats.forecast) == (1, 4 + left, 2 * STEPS - k - 4 - left)
    check_against_oracle(loop, output, lambda context, step: (0, whole) if context in (0, "cond") else (k, rest))
    assert torch.equal(loop.run(), output) and len(made) == 2


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("k", [1, 5, 11])
def test_a_batch_that_doubles_or_halves(kind: str, before: int, after: int, k: int, made: Made) -> None:
    loop = Loop(batch=from_step(k, before, after), scheduler=SCHEDULERS[kind]())
    run, stats = enabled(loop)
    output = loop.run()
    whole, rest = made
    assert run.plan is whole and [one[1] for one in made.of] == [before == 2, after == 2]
    left = max(1, sum(step >= k for step in whole.computed))
    assert (rest.num_steps, rest.budget) == (STEPS - k, left)
    computed = [step in whole.computed if step < k else step - k in rest.computed for step in range(STEPS)]
    assert loop.ran() == computed and not stats.refused
    assert (stats.requests, stats.computed, stats.forecast) == (1, sum(computed), STEPS - sum(computed))
    check_against_oracle(loop, output, lambda context, step: (0, whole) if step < k else (k, rest))
    assert torch.equal(loop.run(), output) and len(made) == 2


LATE_SCHEDULERS = {**SCHEDULERS, "ddim": lambda: DDIMScheduler(clip_sample=False)}  # counts no steps


@pytest.mark.parametrize("kind", LATE_SCHEDULERS)
def test_a_context_that_comes_back_computes_what_it_misses(kind: str, made: Made) -> None:
    both = ("cond", "uncond")
    loop = Loop(lambda step: both if step in (0, 9, 10, 11) else both[:1], scheduler=LATE_SCHEDULERS[kind]())
    run, stats = enabled(loop, budget=6)
    with pytest.warns(lesa.LesaWarning, match="missing"):
        assert loop.run().isfinite().all()
    computed = run.plan.computed
    assert len(made) == 1 and not {9, 10, 11} <= set(computed) and stats.refused.total() > 0
    assert loop.ran() == [(step in computed) + (step in (0, 9, 10, 11)) for step in range(STEPS)]


def test_a_context_that_comes_late_where_the_scheduler_counts_no_steps(made: Made) -> None:
    for contexts in (("cond", "uncond"), ("uncond", "cond")):
        loop = Loop(from_step(5, ("cond",), contexts), scheduler=LATE_SCHEDULERS["ddim"]())
        _, stats = enabled(loop)
        loop.run()
        whole, rest = made
        assert (rest.num_steps, rest.sigmas) == (STEPS - 5, whole.sigmas[5:])
        assert stats.computed == whole.budget + rest.budget and not stats.refused
        made.clear()


# Bare denoisers


@pytest.mark.parametrize(
    "timesteps",
    [
        tuple(1000.0 * sigma for sigma in shifted(STEPS)[:-1]),
        tuple(shifted(STEPS)[:-1]),
        tuple(range(981, 0, -85)),
        tuple(np.linspace(40.0, -3.0, STEPS).tolist()),
    ],
    ids=["thousands", "sigmas", "integers", "logarithms"],
)
def test_timesteps_of_any_kind(timesteps: tuple, made: Made) -> None:
    loop = Loop(timesteps=tuple(map(float, timesteps[:STEPS])))
    run, _ = enabled(loop)
    by = loop.run()
    assert counts(loop.transformer) == (1, 4, 8)
    assert made.of[0][:4] == (FLOW, False, 4, loop.sigmas) and run.plan is made[0]
    assert (made.of[0][4] == flow_impulse_response(loop.sigmas)).all()
    other = Loop()
    loop.run(), loop.run(shape=(2, 4, 16))
    assert counts(loop.transformer) == (3, 12, 24) and len(made) == 1
    enabled(other)
    assert torch.equal(other.run(), by)


def test_levels_above_one_are_those_of_a_model_of_the_noise(made: Made) -> None:
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(STEPS)
    sigmas = tuple(map(float, scheduler.sigmas))
    assert sigmas[0] > 10.0
    loop = Loop(sigmas=sigmas, timesteps=tuple(map(float, scheduler.timesteps)))
    loop.transformer.forward = None  # type: ignore[assignment]

    class Noise(torch.nn.Module):
        ran = 0

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            self.ran += 1
            sigma = loop.transformer.level[float(timestep)]
            return sigma / (loop.transformer.variances + sigma**2) * sample

    def request() -> Tensor:
        sample = sigmas[0] * torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
        for step, timestep in enumerate(loop.timesteps):
            sample = sample + (sigmas[step + 1] - sigmas[step]) * denoiser(sample, exact(timestep))
        return sample

    denoiser = Noise()
    full = request()
    run = lesa.enable(denoiser, sigmas=sigmas, budget=5)
    output = request()
    assert denoiser.ran == STEPS + 5 and counts(denoiser) == (1, 5, 7)
    assert made.of[0][:3] == ("epsilon", False, 5)
    np.testing.assert_allclose(run.plan.sigmas, [sigma / (1 + sigma) for sigma in sigmas])
    assert (made.of[0][4] == flow_impulse_response(sigmas)).all()
    assert float((output - full).norm()) < 0.5 * float(full.norm())


@pytest.mark.parametrize("contexts", [(None,), ("cond", "uncond")])
@pytest.mark.parametrize("levels", [2, 5, STEPS])
def test_loops_longer_than_their_sigmas(contexts: tuple, levels: int) -> None:
    loop = Loop(lambda step: contexts)
    run = lesa.enable(loop.transformer, sigmas=shifted(levels - 1))
    for _ in range(2):
        with pytest.raises(PlanError, match=f"sigmas.* {levels - 1} steps"):
            loop.run()
    assert run.stats.requests == 2 and not run.stats.refused


@pytest.mark.parametrize("contexts", [(None,), (None, None), ("cond", "uncond")])
def test_timesteps_may_rise(contexts: tuple) -> None:
    rising = Loop(lambda step: contexts, timesteps=tuple(1.0 - sigma for sigma in shifted(STEPS)[:-1]))
    falling = Loop(lambda step: contexts)
    outputs = []
    for loop in (rising, falling):
        run, stats = enabled(loop)
        outputs.append([loop.run(seed) for seed in range(2)])
        assert stats.requests == 2 and stats.forecast and not stats.refused
    assert all(map(torch.equal, *outputs))
    falling.step(0, exact(falling.timesteps[0]), outputs[1][0])  # left after its first step
    assert torch.equal(falling.run(1), outputs[1][1]) and stats.requests == 4


def test_timesteps_that_rise_from_elsewhere_are_refused() -> None:
    loop = Loop(timesteps=tuple(2.0 - sigma for sigma in shifted(STEPS)[:-1]))
    enabled(loop)
    with pytest.raises(PlanError, match="timestep="):
        loop.run()


def test_loops_shorter_than_their_sigmas() -> None:
    loop = Loop()
    run, stats = enabled(loop)
    whole = loop.run()
    loop.step(0, exact(loop.timesteps[0]), whole)
    loop.step(1, exact(loop.timesteps[1]), whole)
    assert torch.equal(loop.run(), whole) and stats.requests == 3 and run.plan.num_steps == STEPS


def test_a_loop_that_goes_on_in_the_memory_of_outputs() -> None:
    """The first features are kept until the second step, when the plan is made."""

    class InPlace(Loop):
        def step(self, step: int, timestep: Tensor, sample: Tensor) -> Tensor:
            output = self.transformer(sample, timestep=timestep)
            return output.mul_(self.sigmas[step + 1] - self.sigmas[step]).add_(sample)

    results = []
    for loop in (Loop(), InPlace()):
        enabled(loop)
        results.append(loop.run())
    assert torch.equal(*results)


def test_a_forecast_that_overflows_is_computed() -> None:
    dtype = torch.float16

    class Large(Gauss):
        def forward(self, hidden_states: Tensor, timestep: Tensor, shift: float = 0.0) -> Tensor:
            sign = 1.0 if len(self.ran) % 2 else -1.0
            self.ran.append(float(timestep))
            return torch.full_like(hidden_states, sign * 0.9 * torch.finfo(dtype).max)

    loop = Loop(batch=from_step(4, 2, 1))
    loop.transformer = Large(loop.sigmas, loop.timesteps)
    _, stats = enabled(loop, budget=8)
    outputs = []
    loop.transformer.register_forward_hook(lambda *given: outputs.append(given[-1]))
    with pytest.warns(lesa.LesaWarning, match="not finite"):
        for step, timestep in enumerate(loop.timesteps):
            sample = torch.zeros(1, 8, 16, dtype=dtype)
            found = loop.transformer(torch.cat([sample] * loop.batch(step)), timestep=exact(timestep))
            assert found.isfinite().all() and found.dtype == dtype
    assert stats.refused.total() >= 1 and stats.computed + stats.forecast + stats.refused.total() == STEPS
    assert len(loop.transformer.ran) == stats.computed + stats.refused.total()
