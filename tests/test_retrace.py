"""Retrace: a request that leaves its plan ends where the full request ends, in every pipeline that steps like Euler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from pipelines import CASES_BY_NAME, Case
from test_dropin import counted, untouched
from test_guard import COMPUTED, ESTIMATE, STEPS, checked_plan, enabled, measured, scaled

import lesa
from lesa import hooks
from lesa.clock import Call, Request
from lesa.inputs import Inputs
from lesa.plan import Plan
from lesa.retrace import Past

FLUX, QWEN, HUNYUAN = (CASES_BY_NAME[name] for name in ("flux_dev", "qwen_image", "hunyuan_video"))
GUIDED = {"guidance": True}
pytestmark = pytest.mark.filterwarnings("ignore::lesa.LesaWarning")


def strict(case: Case, site: str, step: int, contexts: tuple[str, ...] = ("*",), **request: Any) -> Plan:
    """A plan that a request leaves at `step`."""
    plan = measured(case, checked_plan(case, site, contexts), **request)
    return scaled(plan, next(iter(plan.expected)), step, 1e-9)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("site", ["hidden", "output"])
@pytest.mark.parametrize("step", [4, 10])
@pytest.mark.parametrize("case", [FLUX, HUNYUAN], ids=["flux", "hunyuan"])
def test_ends_where_the_full_request_ends(case: Case, step: int, site: str) -> None:
    plan = strict(case, site, step)
    full = untouched(case, steps=STEPS)
    off = apart(case.call(enabled(case, plan, False), steps=STEPS), full)
    pipe = enabled(case, plan)
    with counted(case.probes(pipe)) as counts:
        found = apart(case.call(pipe, steps=STEPS), full)
    assert off > 1e-3
    assert found < 1e-5, (found, off)
    stats = lesa.stats(pipe)
    before = sum(s <= step for s in COMPUTED)
    assert stats.guard.retraced == step  # steps 1 to `step`; step 0 was computed, its sample was never off
    assert stats.computed == before + STEPS - step - 1
    assert counts == [stats.computed + step] * len(counts)
    assert not stats.refused
    # The next request is on its plan again.
    case.call(pipe, steps=STEPS)
    assert stats.guard.switches == 2 and stats.guard.retraced == 2 * step


def test_guidance_is_seen() -> None:
    """Qwen-Image rescales the guided sum, which is no weighing of contexts: nothing is computed over again."""
    case = CASES_BY_NAME["flux_dev"]
    plan = strict(case, "output", 4, ("cond", "uncond"), **GUIDED)
    full = untouched(case, steps=STEPS, **GUIDED)
    pipe = enabled(case, plan)
    assert apart(case.call(pipe, steps=STEPS, **GUIDED), full) < 1e-5
    assert lesa.stats(pipe).guard.retraced == 2 * 4
    plan = strict(QWEN, "output", 4, ("cond", "uncond"), **GUIDED)
    pipe = enabled(QWEN, plan)
    estimated = QWEN.call(enabled(QWEN, plan, ESTIMATE), steps=STEPS, **GUIDED)
    assert torch.equal(QWEN.call(pipe, steps=STEPS, **GUIDED), estimated)
    assert (lesa.stats(pipe).guard.switches, lesa.stats(pipe).guard.retraced) == (1, 0)


def test_other_samplers_are_seen() -> None:
    """Under a sampler that takes several steps' outputs the estimate stands; its first step is one of Euler's."""
    plan = strict(FLUX, "output", 4)
    found = []
    for guard in (None, ESTIMATE):
        pipe = FLUX.make()
        pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        lesa.enable(pipe, plan, guard=guard)
        found.append(FLUX.call(pipe, steps=STEPS))
        stats = lesa.stats(pipe).guard
        assert (stats.switches, stats.retraced) == (1, 0)
    assert torch.equal(*found)


def test_what_is_computed_over_again_saves_nothing() -> None:
    pipe = enabled(FLUX, strict(FLUX, "output", 10))
    FLUX.call(pipe, steps=STEPS)
    stats = lesa.stats(pipe)
    # 6 steps forecast, 10 computed over again: more calls than without lesa.
    assert (stats.forecast, stats.guard.retraced) == (6, 10)
    assert stats.seconds_saved < 0
    assert "switches 1" in str(stats) and "retraced 10 calls" in str(stats)


def test_the_estimate_can_be_asked_for() -> None:
    pipe = enabled(FLUX, strict(FLUX, "output", 4), ESTIMATE)
    FLUX.call(pipe, steps=STEPS)
    assert (lesa.stats(pipe).guard.switches, lesa.stats(pipe).guard.retraced) == (1, 0)
    assert hooks.attached(pipe).driver._vigil._past is None


def test_nothing_is_kept_where_nothing_is_judged() -> None:
    pipe = enabled(FLUX, checked_plan(FLUX, "output"), math.inf)
    FLUX.call(pipe, steps=STEPS)
    assert hooks.attached(pipe).driver._vigil._past is None


@pytest.mark.parametrize("site", ["hidden", "output"])
def test_compiled(site: str) -> None:
    torch._dynamo.reset()
    plan, full = strict(FLUX, site, 4), untouched(FLUX, steps=STEPS)
    pipe = FLUX.make()
    pipe.transformer.compile(backend="aot_eager")
    lesa.enable(pipe, plan)
    assert apart(FLUX.call(pipe, steps=STEPS), full) < 1e-4
    with torch.compiler.set_stance("fail_on_recompile"):
        assert apart(FLUX.call(pipe, steps=STEPS), full) < 1e-4
    assert lesa.stats(pipe).guard.retraced == 2 * 4


# By hand: v = w x of a request with a wrong output at one step


class Loop:
    """Euler steps of a linear denoiser in some contexts, with an error added to what one step returns."""

    def __init__(self, contexts: dict[str, float], error: float, **breaks: Any) -> None:
        self.contexts, self.error, self.breaks = contexts, error, breaks
        self.sigmas = tuple(1 - i / 8 for i in range(9))
        self.past = Past(self.sigmas)
        self.request = Request(8, self.sigmas)

    def velocity(self, context: str, sample: torch.Tensor, step: int) -> torch.Tensor:
        own = 1 + list(self.contexts).index(context)
        return sample * own * (1 - 0.05 * step) + 0.1 * own**2

    def step(self, sample: torch.Tensor, step: int, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        guided = sum(self.contexts[c] * output for c, output in outputs.items())
        return sample + (self.sigmas[step + 1] - self.sigmas[step]) * guided * self.breaks.get("rate", 1.0)

    def call(self, context: str, step: int, sample: torch.Tensor) -> Call:
        kwargs = {"hidden_states": sample, "timestep": torch.tensor([self.sigmas[step]]), "more": torch.ones(2)}
        if self.breaks.get("residual"):
            kwargs["more"] = torch.full((2,), float(step))
        return Call(context, step, kwargs["timestep"], sample, self.request, False, Inputs(NAMES, (), kwargs))

    def run(self, until: int, wrong: bool) -> torch.Tensor:
        sample = torch.linspace(-1, 1, 6, dtype=self.breaks.get("dtype", torch.float64))
        for step in range(until):
            outputs = {}
            for context in self.contexts:
                call = self.call(context, step, sample)
                out = self.velocity(context, sample, step) + (self.error if wrong and step in (2, 3) else 0.0)
                if wrong:
                    self.past.note(call)
                    self.past.saw(call, out)
                outputs[context] = out
            sample = self.step(sample, step, outputs)
            if step == self.breaks.get("moved"):
                sample = sample + 0.01
            if self.breaks.get("noise"):
                sample = sample + 1e-3 * torch.sin(7.0 * sample)
        return sample


NAMES = ("hidden_states", "timestep", "more")


@pytest.mark.parametrize("contexts", [{"cond": 1.0}, {"cond": 3.5, "uncond": -2.5}, {"a": 2.0, "b": 1.5, "c": -2.5}])
def test_by_hand(contexts: dict[str, float]) -> None:
    loop = Loop(contexts, 0.5)
    seen, truth = loop.run(5, True), Loop(contexts, 0.0).run(6, False)
    call = loop.call("cond" if "cond" in contexts else "a", 5, seen)
    loop.past.note(call)
    retrace = loop.past.retrace(call)
    assert retrace is not None and retrace.calls == 4 * len(contexts)
    ran = 0
    while (inputs := retrace.next) is not None:
        step = 1 + ran // len(contexts)
        assert float(inputs.get("timestep")) == pytest.approx(loop.sigmas[step])
        assert inputs.get("more") is loop.past.inputs[list(contexts)[ran % len(contexts)]].get("more")
        retrace.take(loop.velocity(list(contexts)[ran % len(contexts)], inputs.sample, step))
        ran += 1
    assert ran == retrace.calls
    outputs = {}
    for context in contexts:
        given = retrace.given(loop.call(context, 5, seen).inputs)
        outputs[context] = retrace.repaid(loop.velocity(context, given.sample, 5))
    torch.testing.assert_close(loop.step(seen, 5, outputs), truth, rtol=1e-9, atol=1e-9)
    assert (seen - Loop(contexts, 0.0).run(5, False)).norm() > 0.01


BREAKS: dict[str, dict[str, Any]] = {
    "steps": {"rate": 1.01},
    "noise": {"noise": True},
    "more that changes": {"residual": True},
    "a sample moved later": {"moved": 3},
}


@pytest.mark.parametrize("breaks", BREAKS.values(), ids=BREAKS)
def test_what_is_no_euler_request_is_left(breaks: dict[str, Any]) -> None:
    loop = Loop({"cond": 1.0}, 0.5, **breaks)
    call = loop.call("cond", 5, loop.run(5, True))
    loop.past.note(call)
    assert loop.past.retrace(call) is None


def test_guidance_that_ends_early_is_left() -> None:
    loop = Loop({"cond": 3.0, "uncond": -2.0}, 0.0)
    sample = loop.run(4, True)
    for step in (4, 5):
        call = loop.call("cond", step, sample)
        loop.past.note(call)
        assert (loop.past.retrace(call) is None) == (step == 5)
    early = Loop({"cond": 1.0}, 0.0)
    call = early.call("cond", 1, early.run(1, True))
    early.past.note(call)
    assert early.past.retrace(call) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_other_sampler(dtype: torch.dtype, seed: int) -> None:
    """Samples of a narrow dtype are rounded at each step; guidance is still found."""
    generator = torch.Generator().manual_seed(seed)
    noise, first, second = torch.randn(3, 4096, generator=generator, dtype=torch.float64)
    total = 50
    past, sample = Past([1 - i / total for i in range(total + 1)]), noise.to(dtype)
    for step in range(3):
        outputs = {"cond": (first + 0.1 * step).to(dtype), "uncond": second.to(dtype)}
        for context, output in outputs.items():
            kwargs = {"hidden_states": sample, "timestep": step}
            call = Call(context, step, step, sample, Request(), False, Inputs(NAMES, (), kwargs))
            past.note(call)
            past.saw(call, output)
        guided = 3 * outputs["cond"].double() - 2 * outputs["uncond"].double()
        sample = (sample.double() - guided / total).to(dtype)
    weights = past._guidance()
    assert weights is not None
    assert weights["cond"] == pytest.approx(3.0, abs=0.05) and math.isclose(sum(weights.values()), 1.0)


def test_where_nothing_is_owed_nothing_changes() -> None:
    loop = Loop({"cond": 1.0}, 0.0)
    sample = loop.run(5, True)
    call = loop.call("cond", 5, sample)
    loop.past.note(call)
    retrace = loop.past.retrace(call)
    while (inputs := retrace.next) is not None:
        step = round(8 * (1 - float(inputs.get("timestep"))))
        retrace.take(loop.velocity("cond", inputs.sample, step))
    out = loop.velocity("cond", retrace.given(call.inputs).sample, 5)
    torch.testing.assert_close(retrace.repaid(out), out, rtol=1e-9, atol=1e-9)
