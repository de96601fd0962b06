"""Retrace: a request that leaves its plan ends where the full request ends, in every pipeline that steps like Euler."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from pipelines import CASES_BY_NAME, Case
from test_dropin import counted, untouched
from test_guard import COMPUTED, ESTIMATE, STEPS, answers_later, checked_plan, enabled, measured, scaled, taylor_plan

import lesa
from lesa.forecasters import check_rows
from lesa.models import hooks
from lesa.plans.plan import Expected, Plan, Row
from lesa.runtime.clock import Call, Request
from lesa.runtime.guard import leaving
from lesa.runtime.inputs import Inputs
from lesa.runtime.retrace import Past
from lesa.runtime.vigil import Vigil

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


@pytest.mark.parametrize("site", ["hidden", "output"])
@pytest.mark.parametrize("step", [4, 10])
def test_narrow_dtypes_too(step: int, site: str) -> None:
    """Samplers round at each step what a retrace and its proof do not."""
    plan, found = strict(FLUX, site, step), []
    for guard in (2.0, False):
        pipe = FLUX.make().to(torch.bfloat16)
        full = FLUX.call(pipe, steps=STEPS)
        lesa.enable(pipe, plan, guard=guard)
        found.append(apart(FLUX.call(pipe, steps=STEPS).double(), full.double()))
        if guard:
            assert lesa.stats(pipe).guard.retraced == step
    assert found[0] < 0.1 * found[1], found


@pytest.mark.parametrize(("step", "ran"), [(4, 7), (7, 10), (10, 10)])
@pytest.mark.parametrize("contexts", [("*",), ("cond", "uncond")], ids=["one context", "two"])
def test_on_a_gpu_it_begins_where_the_answer_is_read(
    step: int, ran: int, contexts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is after the next computed step, or at the last; the request ends where the full one does all the same."""
    request = GUIDED if len(contexts) > 1 else {}
    plan = strict(FLUX, "output", step, contexts, **request)
    full = untouched(FLUX, steps=STEPS, **request)
    answers_later(monkeypatch)
    pipe = enabled(FLUX, plan)
    for number in (1, 2):
        assert apart(FLUX.call(pipe, steps=STEPS, **request), full) < 1e-5
        stats = lesa.stats(pipe)
        assert stats.guard.switches == number
        assert stats.guard.retraced == number * len(contexts) * ran
        assert stats.computed == number * len(contexts) * (sum(s <= ran for s in COMPUTED) + STEPS - 1 - ran)
    assert not stats.refused


@pytest.mark.parametrize("computed", [(0, 4, 7, 10), (0, 4, 7, 11), (0, 3, 9)], ids=str)
def test_on_a_gpu_the_last_check_that_can_act_does_so_as_on_a_cpu(
    computed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a sampler that is not Euler's too, whether or not the last step is computed."""
    plan = taylor_plan(FLUX, computed)
    checks = check_rows("taylor-1", computed, STEPS)
    last = max(step for step in checks if step < STEPS - 1)
    plan = replace(plan, checks={"*": checks}, expected={"*": {last: Expected(1e-12, 1.0)}})
    found = []
    for late in (False, True):
        if late:
            answers_later(monkeypatch)
        pipe = FLUX.make()
        pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        lesa.enable(pipe, plan)
        found.append(FLUX.call(pipe, steps=STEPS))
        stats = lesa.stats(pipe)
        assert (stats.guard.switches, stats.guard.last[0], stats.guard.retraced) == (1, last, 0)
        assert stats.computed == sum(s <= last for s in computed) + STEPS - last - 1  # step 0 is not held
    assert torch.equal(*found)
    assert not torch.equal(found[0], FLUX.call(enabled(FLUX, plan, False), steps=STEPS))


@pytest.mark.parametrize("late", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("first", ["cond", "uncond"])
def test_where_one_context_has_no_rows_all_is_counted(first: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = (0, 5, 11)  # at step 5 one step could repay
    plan = taylor_plan(FLUX, computed)
    own, check = "uncond" if first == "cond" else "cond", check_rows("taylor-1", computed, STEPS)[5]
    plan = replace(plan, rows={own: plan.rows["*"]}, checks={own: {5: check}}, expected={own: {5: Expected(1e-9, 1.0)}})
    assert leaving(plan, 5, {0, 5}).forecaster == "repayment"
    if late:
        answers_later(monkeypatch)
    pipe = enabled(FLUX, plan)
    full = untouched(FLUX, steps=STEPS, **GUIDED)
    assert apart(FLUX.call(pipe, steps=STEPS, **GUIDED), full) < 1e-5
    stats = lesa.stats(pipe)
    assert stats.guard.switches == 1 and stats.guard.retraced == 2 * 5
    assert stats.computed + stats.forecast + sum(stats.refused.values()) == 2 * STEPS


@pytest.mark.parametrize("guard", [None, ESTIMATE], ids=["retrace", "estimate"])
@pytest.mark.parametrize("at", [4, 5, 7])
def test_on_a_gpu_an_interrupted_request_leaves_nothing_behind(
    at: int, guard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_later(monkeypatch)
    plan = strict(FLUX, "output", 4)
    expected = FLUX.call(enabled(FLUX, plan, guard), steps=STEPS)

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise KeyboardInterrupt
        return {}

    pipe = enabled(FLUX, plan, guard)
    with pytest.raises(KeyboardInterrupt):
        FLUX.call(pipe, steps=STEPS, callback_on_step_end=stop)
    switches = lesa.stats(pipe).guard.switches
    assert switches == (at == 7)
    assert torch.equal(FLUX.call(pipe, steps=STEPS), expected)
    assert lesa.stats(pipe).guard.switches == switches + 1


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


@pytest.mark.parametrize("computed", [COMPUTED, (0, 3, 6, 9)], ids=["steps 0 and 1", "step 1 is reused"])
def test_other_samplers_are_seen(computed: tuple[int, ...]) -> None:
    """Under a sampler that takes several steps' outputs the estimate stands; its first step is one of Euler's."""
    plan = taylor_plan(FLUX, computed)
    checks = {s: row for s, row in check_rows("taylor-1", computed, STEPS).items() if s > 3}
    plan = replace(plan, checks={"*": checks}, expected={"*": {min(checks): Expected(1e-12, 1.0)}})
    for euler in (True, False):
        found = []
        for guard in (None, ESTIMATE):
            pipe = FLUX.make()
            if not euler:
                pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
            lesa.enable(pipe, plan, guard=guard)
            found.append(FLUX.call(pipe, steps=STEPS))
            stats = lesa.stats(pipe).guard
            assert stats.switches == 1
            assert (stats.retraced > 0) == (euler and guard is None)
        assert torch.equal(*found) != euler


@pytest.mark.parametrize("what", ["latents", "prompt_embeds"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_a_callback_changed_is_not_undone(what: str, at: int) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {what: tensors[what] + 0.3 * torch.sin(9 * tensors[what])} if step == at else {}

    plan = strict(FLUX, "output", 4)
    more = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": [what]}
    pipes = enabled(FLUX, plan), enabled(FLUX, plan, ESTIMATE)
    found = [FLUX.call(pipe, steps=STEPS, **more) for pipe in pipes]
    assert (lesa.stats(pipes[0]).guard.switches, lesa.stats(pipes[0]).guard.retraced) == (1, 0)
    assert torch.equal(*found)


def holding(plan: Plan) -> Plan:
    """The plan with rows that read all that was computed, most of it with weight 0, so that nothing is overwritten."""

    def wide(step: int, row: Row) -> Row:
        reads = [c for c in plan.computed if c < step]
        return Row(tuple(reads), tuple(dict(zip(row.steps, row.weights, strict=True)).get(c, 0.0) for c in reads))

    rows = {context: {step: wide(step, row) for step, row in own.items()} for context, own in plan.rows.items()}
    return replace(plan, rows=rows)


@pytest.mark.parametrize("refused", [None, 2, 8])
@pytest.mark.parametrize("step", [4, 10])
def test_outputs_are_not_added_up_where_a_plan_tells_what_they_come_to(
    step: int, refused: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = holding(strict(FLUX, "output", step))
    full = untouched(FLUX, steps=STEPS)
    added: list[int] = []
    add = Past._add
    monkeypatch.setattr(Past, "_add", lambda self, call, output: (added.append(call.step), add(self, call, output)))
    pipe = enabled(FLUX, plan)
    bound = Vigil.bound
    if refused is not None:  # as where a forecast is not finite
        infinite = lambda self, call, row: math.inf if call.step == refused else bound(self, call, row)  # noqa: E731
        monkeypatch.setattr(Vigil, "bound", infinite)
        monkeypatch.setattr(Vigil, "is_finite", lambda self, output: False)
    found = apart(FLUX.call(pipe, steps=STEPS), full)
    assert found < 1e-5
    stats = lesa.stats(pipe)
    early = refused is not None and refused < step
    assert (stats.guard.switches, stats.guard.retraced, sum(stats.refused.values())) == (1, step, early)
    # From the step where the plan was left, or that was refused, on.
    assert added == list(range(refused if early else step, step + 1))


@pytest.mark.parametrize("contexts", [("*",), ("cond", "uncond")], ids=["one context", "two"])
@pytest.mark.parametrize("refused", sorted({*range(2, STEPS)} - {*COMPUTED}))
def test_a_request_leaves_at_a_step_whose_forecast_is_refused(
    refused: int, contexts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that answers later, where a check is read at the next step that is computed."""
    request = GUIDED if len(contexts) > 1 else {}
    plan = holding(strict(FLUX, "output", 4, contexts, **request))
    full = untouched(FLUX, steps=STEPS, **request)
    answers_later(monkeypatch)
    bound = Vigil.bound
    infinite = lambda self, call, row: math.inf if call.step == refused else bound(self, call, row)  # noqa: E731
    monkeypatch.setattr(Vigil, "bound", infinite)
    monkeypatch.setattr(Vigil, "is_finite", lambda self, output: False)
    pipe = enabled(FLUX, plan)
    for requests in (1, 2):
        found = FLUX.call(pipe, steps=STEPS, **request)
        saw = lesa.stats(pipe).guard
        assert saw.switches == requests and saw.retraced > 0
        assert apart(found, full) < 1e-5


def test_a_sample_that_others_move_is_found_where_outputs_are_not_added_up() -> None:
    plan = holding(strict(FLUX, "output", 10))

    def change(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"latents": kwargs["latents"] * 1.01} if step == 6 else {}

    more = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents"]}
    pipes = enabled(FLUX, plan), enabled(FLUX, plan, ESTIMATE)
    found = [FLUX.call(pipe, steps=STEPS, **more) for pipe in pipes]
    assert (lesa.stats(pipes[0]).guard.switches, lesa.stats(pipes[0]).guard.retraced) == (1, 0)
    assert torch.equal(*found)


class Looking:
    """Looks at what is kept, at each call of a request."""

    def __init__(self, pipe: Any) -> None:
        self.driver = hooks.attached(pipe).driver
        self.seen: list[tuple[bool, bool]] = []
        pipe.transformer.norm_out.register_forward_pre_hook(lambda *_: self.look())

    def look(self) -> None:
        vigil = self.driver._vigil
        self.seen.append((vigil is not None and vigil._past is not None, vigil is not None and bool(vigil._retrace)))


def test_what_is_kept() -> None:
    plan = strict(FLUX, "hidden", 4)
    for guard, past in ((None, True), (ESTIMATE, False), (math.inf, False), (False, False)):
        pipe = enabled(FLUX, plan, guard)
        looking = Looking(pipe)
        FLUX.call(pipe, steps=STEPS)
        assert any(kept for kept, _ in looking.seen) is past
        assert any(retrace for _, retrace in looking.seen) is past
        if past:
            assert looking.seen[4][0] and looking.seen[5][1]
            # Nothing is kept once the steps have been computed over again.
            assert looking.seen[5 + 4 :] == [(False, True), *[(False, False)] * (STEPS - 6)]
            assert looking.driver._vigil._past is looking.driver._vigil._retrace is None


def test_what_is_computed_over_again_saves_nothing() -> None:
    pipe = enabled(FLUX, strict(FLUX, "output", 10))
    FLUX.call(pipe, steps=STEPS)
    stats = lesa.stats(pipe)
    # 6 steps forecast, 10 computed over again: more calls than without lesa.
    assert (stats.forecast, stats.guard.retraced) == (6, 10)
    assert stats.seconds_saved < 0
    assert "switches 1" in str(stats) and "retraced 10 calls" in str(stats)


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
    assert retrace is not None
    ran = 0
    while (inputs := retrace.next) is not None:
        step = 1 + ran // len(contexts)
        assert float(inputs.get("timestep")) == pytest.approx(loop.sigmas[step])
        assert inputs.get("more") is loop.past.inputs[list(contexts)[ran % len(contexts)]].get("more")
        retrace.take(loop.velocity(list(contexts)[ran % len(contexts)], inputs.sample, step))
        ran += 1
    assert ran == retrace.ran == 4 * len(contexts)
    assert retrace.last == list(contexts)[-1]
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


@pytest.mark.parametrize("wrong", ["shape", "dtype", "gradient", "written to", "one buffer of times"])
def test_calls_that_change_are_left(wrong: str) -> None:
    loop = Loop({"cond": 1.0}, 0.5)
    sample = loop.run(5, True)
    if wrong == "shape":
        sample = torch.cat([sample, sample])
    elif wrong == "dtype":
        sample = sample.float()
    elif wrong == "gradient":
        sample = sample.clone().requires_grad_()
    elif wrong == "written to":
        loop.past.inputs["cond"].get("more").mul_(1.0)
    call = loop.call("cond", 5, sample)
    if wrong == "one buffer of times":
        call = replace(call, timestep=loop.past._calls[-1][2])
    loop.past.note(call)
    assert loop.past.retrace(call) is None


def test_large_arguments_that_come_anew_are_not_kept() -> None:
    loop = Loop({"cond": 1.0}, 0.0)
    sample = loop.run(1, True)
    assert loop.past.inputs
    call = loop.call("cond", 1, sample)
    kwargs = {**call.inputs.kwargs, "more": torch.ones(1 << 17)}
    loop.past.note(replace(call, inputs=Inputs(NAMES, (), kwargs)))
    assert not loop.past.inputs and not loop.past.samples
    loop.past.note(loop.call("cond", 2, sample))
    assert not loop.past.inputs and loop.past.retrace(loop.call("cond", 2, sample)) is None


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
    total, steps = 50, 9
    past, sample = Past([1 - i / total for i in range(total + 1)]), noise.to(dtype)
    for step in range(steps + 1):
        call = {}
        outputs = {"cond": (first + 0.1 * step).to(dtype), "uncond": second.to(dtype)}
        for context, output in outputs.items():
            kwargs = {"hidden_states": sample, "timestep": step}
            call[context] = Call(context, step, step, sample, Request(), False, Inputs(NAMES, (), kwargs))
            past.note(call[context])
            if step < steps:
                past.saw(call[context], output)
        guided = 3 * outputs["cond"].double() - 2 * outputs["uncond"].double()
        if step < steps:
            sample = (sample.double() - guided / total).to(dtype)
    weights = past._guidance(call["cond"])
    assert weights is not None
    assert weights["cond"] == pytest.approx(3.0, abs=0.02) and math.isclose(sum(weights.values()), 1.0)
    # What is a hundred times the rounding is seen.
    assert past._guidance(replace(call["cond"], sample=sample + 0.05 * torch.randn(4096, generator=generator))) is None


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
