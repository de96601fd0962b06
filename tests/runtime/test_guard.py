"""Guard: it sees the errors there are, leaves a plan at the step said and not before, and lets no NaN pass."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import CASES_BY_NAME, Case
from safetensors import safe_open
from safetensors.numpy import save as serialize
from test_compile import bare_graph_breaks, compiled_frames
from test_dropin import assert_same, counted, untouched
from test_plan import random_plan
from torch.utils._python_dispatch import TorchDispatchMode

import lesa
from lesa import assets
from lesa.forecasters import check_rows, plan_of
from lesa.models import exchange, hooks
from lesa.plans.plan import Expected, Plan, PlanError, Row
from lesa.runtime import vigil
from lesa.runtime.clock import Call, Request, sigmas_of
from lesa.runtime.guard import (
    ALERT,
    TOLERANCE,
    Guard,
    GuardOption,
    deviation,
    foreign,
    guard_for,
    leaving,
    relative_error,
)
from lesa.runtime.history import Ring
from lesa.runtime.runner import PlanRunner
from lesa.runtime.stats import GuardStats

FLUX, QWEN = CASES_BY_NAME["flux_dev"], CASES_BY_NAME["qwen_image"]
STEPS = 12
COMPUTED = (0, 1, 4, 7, 10)
CHECKED = COMPUTED[2:]
GUIDED = {"guidance": True}
ESTIMATE = Guard(retrace=False)
ON_SITES = pytest.mark.parametrize("site", ["hidden", "output"])


def taylor_plan(case: Case, computed: tuple[int, ...] = COMPUTED, site: str = "output") -> Plan:
    """Taylor's first order at the noise levels of a request."""
    pipe = case.make()
    case.call(pipe, steps=STEPS)
    return plan_of("taylor-1", computed, sigmas_of(pipe.scheduler)[-STEPS - 1 :], site)


def checked_plan(case: Case, site: str, contexts: tuple[str, ...] = ("*",)) -> Plan:
    """Taylor's first order, checked by itself from the third computed step on, its errors of spread 1."""
    plan = taylor_plan(case, site=site)
    checks = {step: row for step, row in check_rows("taylor-1", COMPUTED, STEPS).items() if step in CHECKED}
    return replace(plan, rows=dict.fromkeys(contexts, plan.rows["*"]), checks=dict.fromkeys(contexts, checks))


def enabled(case: Case, plan: Plan, guard: GuardOption = None) -> Any:
    pipe = case.make()
    lesa.enable(pipe, plan, guard=guard)
    return pipe


def measured(case: Case, plan: Plan, **request: Any) -> Plan:
    """The plan with the errors that a request has."""
    pipe = enabled(case, plan, math.inf)
    case.call(pipe, steps=STEPS, **request)
    saw = lesa.stats(pipe).guard
    assert saw is not None
    return replace(plan, expected={c: {s: Expected(e, 1.0) for s, e in own.items()} for c, own in saw.errors.items()})


def scaled(plan: Plan, context: str, step: int, factor: float) -> Plan:
    """The plan with one expected error changed."""
    errors = {name: dict(by_step) for name, by_step in plan.expected.items()}
    errors[context][step] = Expected(errors[context][step].error * factor, 1.0)
    return replace(plan, expected=errors)


def joined(plan: Plan, step: int, held: tuple[int, ...]) -> Plan:
    """What a request runs that leaves `plan` at `step`: its rows, one that repays, then none."""
    rest = leaving(plan, step, held)
    computed = {s for s in range(plan.num_steps) if s in (plan if s <= step else rest).computed}
    rows = {
        context: {s: (plan if s < step else rest).rows_of(context)[s] for s in set(range(plan.num_steps)) - computed}
        for context in plan.rows
    }
    return replace(plan, computed=tuple(sorted(computed)), rows=rows, checks={}, expected={})


def answers_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is asked as a GPU is."""
    monkeypatch.setattr(vigil, "_at_once", lambda feature: False)


# Where a request leaves its plan


@ON_SITES
def test_the_errors_are_those_of_the_features(site: str) -> None:
    plan = checked_plan(FLUX, site)
    pipe = enabled(FLUX, plan, math.inf)
    last = pipe.transformer.single_transformer_blocks[-1]
    features: list[torch.Tensor] = []
    if site == "hidden":
        last.register_forward_hook(lambda _, __, output: features.append(output[1].double()))
    else:
        pipe.transformer.proj_out.register_forward_hook(lambda _, __, output: features.append(output.double()))
    FLUX.call(pipe, steps=STEPS)
    saw = lesa.stats(pipe).guard
    assert saw.checks == len(CHECKED)
    truth = dict(zip(COMPUTED, features, strict=True))
    (errors,) = saw.errors.values()
    assert list(errors) == list(CHECKED)
    for step, error in errors.items():
        row = plan.checks["*"][step]
        forecast = sum(w * truth[read] for w, read in zip(row.weights, row.steps, strict=True))
        assert error == pytest.approx(float((forecast - truth[step]).norm() / truth[step].norm()), rel=1e-5)
        assert error > 1e-4


@ON_SITES
def test_no_switch_where_the_errors_are_as_expected(site: str) -> None:
    plan = measured(FLUX, checked_plan(FLUX, site))
    pipe = enabled(FLUX, plan)
    output = FLUX.call(pipe, steps=STEPS)
    assert_same(output, FLUX.call(enabled(FLUX, plan, False), steps=STEPS))
    stats = lesa.stats(pipe)
    assert (stats.computed, stats.forecast, sum(stats.refused.values())) == (len(COMPUTED), STEPS - len(COMPUTED), 0)
    assert stats.guard is not None
    assert (stats.guard.checks, stats.guard.switches, stats.guard.replaced, stats.guard.dropped) == (3, 0, 0, 0)
    assert str(stats).endswith(
        "guard: checks 3, switches 0, retraced 0 calls, requests unlike the fitted 0, "
        "not finite: forecasts 0, features 0"
    )


@ON_SITES
@pytest.mark.parametrize("step", CHECKED)
@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_a_larger_error_switches_at_its_step_and_the_next_request_starts_sparse(site: str, step: int) -> None:
    plan = measured(FLUX, checked_plan(FLUX, site))
    context = next(iter(plan.expected))
    # Just within the tolerance, then beyond it.
    within = enabled(FLUX, scaled(plan, context, step, math.exp(-TOLERANCE * 0.999)))
    FLUX.call(within, steps=STEPS)
    assert lesa.stats(within).guard.switches == 0
    strict = scaled(plan, context, step, math.exp(-TOLERANCE * 1.001))
    held = held_at(strict, step)
    single = joined(strict, step, held)
    expected = FLUX.call(enabled(FLUX, single), steps=STEPS)
    pipe = enabled(FLUX, strict, ESTIMATE)
    with counted(FLUX.probes(pipe)) as counts:
        first = FLUX.call(pipe, steps=STEPS)
    assert counts == [len(single.computed)] * len(counts)
    assert_same(first, expected)
    stats = lesa.stats(pipe)
    assert stats.guard.switches == 1
    assert stats.guard.last == (step, pytest.approx(math.exp(TOLERANCE * 1.001), rel=1e-3))
    assert (stats.computed, stats.forecast, sum(stats.refused.values())) == (
        len(single.computed),
        STEPS - len(single.computed),
        0,
    )
    assert_same(FLUX.call(pipe, steps=STEPS), expected)
    assert stats.guard.switches == 2
    assert stats.computed == 2 * len(single.computed)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_a_failure_while_a_request_leaves_its_plan_ends_with_it(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory as its features are moved, before or after its tables are: the next request is as a first one."""
    plan = measured(FLUX, checked_plan(FLUX, "output"))
    strict = scaled(plan, next(iter(plan.expected)), CHECKED[0], math.exp(-TOLERANCE * 1.001))
    expected = FLUX.call(enabled(FLUX, strict, ESTIMATE), steps=STEPS)
    pipe, follow = enabled(FLUX, strict, ESTIMATE), Ring.follow

    def failing(self: Ring, plan: Plan, context: str) -> None:
        leaves = plan.forecaster in ("repayment", "none")
        if late or not leaves:
            follow(self, plan, context)
        if leaves:
            raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(Ring, "follow", failing)
        FLUX.call(pipe, steps=STEPS)
    assert_same(FLUX.call(pipe, steps=STEPS), expected)
    assert not lesa.stats(pipe).refused and lesa.stats(pipe).guard.switches == 2


@pytest.mark.parametrize("context", ["cond", "uncond"])
@pytest.mark.parametrize("site", ["hidden", "output"])
@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_all_contexts_follow_the_one_that_switches(context: str, site: str) -> None:
    plan = measured(QWEN, checked_plan(QWEN, site, ("cond", "uncond")), **GUIDED)
    assert set(plan.expected) == {"cond", "uncond"}
    quiet = enabled(QWEN, plan)
    QWEN.call(quiet, steps=STEPS, **GUIDED)
    assert (lesa.stats(quiet).guard.switches, lesa.stats(quiet).guard.checks) == (0, 2 * len(CHECKED))
    pipe = enabled(QWEN, scaled(plan, context, 7, math.exp(-1.1 * TOLERANCE)), ESTIMATE)
    single = joined(plan, 7, held_at(plan, 7))
    expected = QWEN.call(enabled(QWEN, single), steps=STEPS, **GUIDED)
    for request in (1, 2):
        assert_same(QWEN.call(pipe, steps=STEPS, **GUIDED), expected)
        stats = lesa.stats(pipe)
        assert stats.guard.switches == request
        assert stats.computed == 2 * request * len(single.computed)
        assert not stats.refused


def test_nothing_is_left_at_the_last_step() -> None:
    """A check there sees what can no more be mended."""
    plan = plan_of("reuse", (0, 2, 5), tuple(1 - i / 6 for i in range(7)), "output")
    plan = replace(plan, checks={"*": {5: Row((2,), (1.0,))}}, expected={"*": {5: Expected(1e-6, 1.0)}})
    runner = PlanRunner(plan, guard=Guard())
    assert run_of_errors(runner, plan, 1.0) == 3
    assert (runner.stats.guard.checks, runner.stats.guard.switches) == (1, 0)


def test_a_switch_is_said_once() -> None:
    plan = measured(FLUX, checked_plan(FLUX, "output"))
    pipe = enabled(FLUX, scaled(plan, next(iter(plan.expected)), 4, 1e-3))
    with pytest.warns(lesa.LesaWarning, match="worse than in fitting") as caught:
        FLUX.call(pipe, steps=STEPS)
        FLUX.call(pipe, steps=STEPS)
    assert len(caught) == 1
    assert "switches 2 (last at step 4, 1e+03 x the expected error)" in str(lesa.stats(pipe))


def test_all_computed_is_bit_equal() -> None:
    pipe = FLUX.make()
    FLUX.call(pipe, steps=STEPS)
    plan = Plan(tuple(range(STEPS)), sigmas_of(pipe.scheduler)[-STEPS - 1 :])
    checks = {"*": check_rows("taylor-1", range(STEPS), STEPS)}
    guarded = enabled(FLUX, replace(plan, checks=checks), math.inf)
    assert_same(FLUX.call(guarded, steps=STEPS), untouched(FLUX, steps=STEPS))
    assert lesa.stats(guarded).guard.checks == STEPS - 1


# What is not finite


@ON_SITES
def test_forecasts_that_overflow_are_computed_at_once(site: str) -> None:
    plan = checked_plan(FLUX, site)
    rows = {step: Row(row.steps, (3e38, 3e38)[: len(row.steps)]) for step, row in plan.rows["*"].items()}
    pipe = enabled(FLUX, replace(plan, rows={"*": rows}), math.inf)
    with pytest.warns(lesa.LesaWarning, match="the forecast was not finite"):
        output = FLUX.call(pipe, steps=STEPS)
    assert_same(output, untouched(FLUX, steps=STEPS))
    stats = lesa.stats(pipe)
    assert stats.guard.replaced == stats.refused["the forecast was not finite"] == STEPS - len(COMPUTED)
    assert (stats.computed, stats.forecast) == (len(COMPUTED), 0)
    off = enabled(FLUX, replace(plan, rows={"*": rows}), False)
    assert not FLUX.call(off, steps=STEPS).isfinite().all()


@ON_SITES
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_a_computed_feature_that_is_not_finite_is_never_read(site: str, step: int) -> None:
    plan = checked_plan(FLUX, site)
    pipe = enabled(FLUX, plan, math.inf)
    root = hooks.attached(pipe)
    keep = root.driver.keep

    def spoiled(call: Call, feature: torch.Tensor) -> None:
        feature = feature.clone()
        if call.step == step:
            feature.view(-1)[7] = math.nan
        keep(call, feature)

    root.driver.keep = spoiled
    output = FLUX.call(pipe, steps=STEPS)
    # Every step whose forecast would have read it is computed instead.
    lost = {s for s, row in plan.rows["*"].items() if step in row.steps}
    assert lost
    rows = {s: row for s, row in plan.rows["*"].items() if s not in lost}
    single = replace(plan, computed=tuple(sorted({*COMPUTED, *lost})), rows={"*": rows}, checks={})
    assert_same(output, FLUX.call(enabled(FLUX, single), steps=STEPS))
    saw = lesa.stats(pipe).guard
    assert (saw.dropped, saw.replaced) == (1, 0)
    assert sum(lesa.stats(pipe).refused.values()) == len(lost)
    readers = [s for s, row in plan.checks["*"].items() if step in row.steps]
    assert saw.checks == len(CHECKED) - len({*readers, *({step} & set(CHECKED))})


@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_on_a_gpu_a_feature_that_is_not_finite_is_read_until_the_next_computed_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers_later(monkeypatch)
    rows = {s: Row((0, 2) if s > 2 else (0,), (1.0, 1.0)[: 2 if s > 2 else 1]) for s in (1, 3, 5, 6)}
    plan = small((0, 2, 4), 7, rows={"*": rows}, checks={"*": {4: Row((0,), (1.0,))}})
    runner, request = PlanRunner(plan, guard=Guard(math.inf)), Request(7, plan.sigmas)
    found, dropped = [], []
    runner.begin(request)
    for step in range(7):
        call = Call("cond", step, None, torch.zeros(1), request, False)
        coming = runner.forecast(call)
        found.append(None if coming is None else coming.feature().item())
        if coming is None:
            runner.keep(call, torch.tensor([math.nan if step == 2 else 1.0]))
        dropped.append(runner.stats.guard.dropped)
    assert found == [None, 1.0, None, pytest.approx(math.nan, nan_ok=True), None, None, None]
    assert dropped == [0, 0, 0, 0, 1, 1, 1]
    assert (runner.stats.guard.checks, sum(runner.stats.refused.values())) == (1, 2)


# What it costs


class Counting(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators(pipe: Any) -> Counter[str]:
    FLUX.call(pipe, steps=STEPS)
    with Counting() as mode:
        FLUX.call(pipe, steps=STEPS)
    return mode.counts


def test_off_makes_no_check_and_on_waits_at_computed_steps_only() -> None:
    plan = measured(FLUX, checked_plan(FLUX, "hidden"))
    bare = replace(plan, checks={}, expected={})
    off, without, on = (operators(enabled(FLUX, *args)) for args in ((plan, False), (bare, None), (plan, None)))
    assert off == without
    assert off["lesa.forecast_errors.default"] == 0
    # All computed features are read or checked.
    assert on["lesa.forecast_errors.default"] == len(COMPUTED)
    # No forecast is looked at: by the sizes of what they read all of them are finite.
    for name in ("aten._local_scalar_dense.default", "aten.isfinite.default", "aten.all.default"):
        assert on[name] == off[name]


def test_off_holds_no_more_features() -> None:
    plan = checked_plan(FLUX, "output")
    far = replace(plan, checks={"*": {10: Row((0, 1, 4, 7), (0.25,) * 4)}})
    assert far.capacity > plan.capacity == 2
    for guard, capacity in ((False, 2), (None, 2), (math.inf, far.capacity)):
        pipe = enabled(FLUX, far, guard)
        FLUX.call(pipe, steps=STEPS)
        (history,) = hooks.attached(pipe).driver._histories.values()
        assert len(history.ring.history) in (capacity, capacity + 1)  # a spare one for forecasts nothing reads
        assert (lesa.stats(pipe).guard is None) == (guard != math.inf)


@pytest.mark.parametrize("fused", [False, True], ids=["own head", "fused head"])
@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_compiled_without_graph_breaks_and_recompilation(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    breaks = bare_graph_breaks(FLUX, "whole")
    if fused:
        monkeypatch.setattr(exchange.ops, "backend_of", lambda name, tensor: "triton")
    plan = measured(FLUX, checked_plan(FLUX, "hidden"))
    plan = scaled(plan, next(iter(plan.expected)), 4, 1e-3)
    expected = FLUX.call(enabled(FLUX, plan), steps=STEPS)
    pipe = FLUX.make()
    before = compiled_frames()[0]
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    lesa.enable(pipe, plan)
    torch.testing.assert_close(FLUX.call(pipe, steps=STEPS), expected, rtol=1e-5, atol=1e-5)
    assert compiled_frames()[0] - before == breaks == 0
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(FLUX.call(pipe, steps=STEPS), expected, rtol=1e-5, atol=1e-5)
    assert lesa.stats(pipe).guard.switches == 2
    torch._dynamo.reset()


# What a request leaves its plan for


def small(computed: tuple[int, ...], total: int, **changes: Any) -> Plan:
    plan = plan_of("taylor-1", computed, tuple(1 - i / total for i in range(total + 1)), "output")
    return replace(plan, **changes)


def test_repayment_by_hand() -> None:
    """Steps of equal length; F(s) = s^2 at computed steps 0, 3 and 6 is known exactly between them."""
    plan = small((0, 3, 6, 10, 11), 14, training={"psnr": 30.0}, denoiser="Flux")
    rest = leaving(plan, 6, {0, 3, 6})
    assert rest.computed == (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13)
    feature = {s: float(s**2) for s in (0, 3, 6)}
    given = {1: 0.0, 2: 0.0, 4: 9 + 3.0, 5: 9 + 6.0}  # reuse, then the line through steps 0 and 3
    owed = sum(s**2 - value for s, value in given.items())
    row = rest.rows_of("any")[7]
    assert sum(w * feature[s] for s, w in zip(row.steps, row.weights, strict=True)) == pytest.approx(49 + owed)
    assert (rest.sigmas, rest.site, rest.denoiser) == (plan.sigmas, plan.site, plan.denoiser)
    assert not rest.checks and not rest.expected
    # Twice as long a step owes half as much; what an error does is what the plan says, not what its sigmas do.
    doubled = replace(plan, impulse_response=tuple(2.0 if s == 7 else 1.0 for s in range(14)))
    row = leaving(doubled, 6, {0, 3, 6}).rows_of("any")[7]
    assert sum(w * feature[s] for s, w in zip(row.steps, row.weights, strict=True)) == pytest.approx(49 + owed / 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"held": {0, 6}},
        {"held": {0, 3}},
        {"site": "hidden"},
        {"impulse_response": (1.0,) * 7 + (0.0,) * 7},
        {"bias": 1.0},
    ],
    ids=["one not held", "the newest not held", "hidden", "no response", "bias"],
)
def test_what_cannot_be_repaid_is_computed_at_once(changes: dict[str, Any]) -> None:
    plan = small((0, 3, 6, 10, 11), 14)
    held, bias = changes.pop("held", {0, 3, 6}), changes.pop("bias", 0.0)
    rows = {"*": {s: replace(row, bias=bias) for s, row in plan.rows["*"].items()}}
    rest = leaving(replace(plan, rows=rows, **changes), 6, held)
    assert rest.computed == tuple(range(14))
    assert rest.capacity == 0


def test_leaving_at_the_ends() -> None:
    plan = small((0, 3, 13), 14)
    assert leaving(plan, 13, {0, 3, 13}).computed == tuple(range(14))
    assert leaving(plan, 0, {0}).rows_of("any")[1] == Row((0,), (1.0,))
    assert leaving(plan, 4, {0, 3}).computed == tuple(range(14))  # a step whose forecast was refused
    with pytest.raises(ValueError, match="step=14: expected one of the plan's 14 steps"):
        leaving(plan, 14, {0, 3})


def test_a_rest_always_fits_in_what_there_is(seed: int) -> None:
    rng = random.Random(seed)
    repaid = 0
    for _ in range(200):
        plan = replace(random_plan(rng), site="output")
        rows = {c: {s: replace(row, bias=0.0) for s, row in own.items()} for c, own in plan.rows.items()}
        plan = replace(plan, rows=rows)
        step = rng.choice(plan.computed)
        held = set(held_at(plan, step))
        rest = leaving(plan, step, held)
        assert set(range(step + 2, plan.num_steps)) <= set(rest.computed)
        assert set(rest.rows) == set(plan.rows)
        assert rest.capacity <= max(plan.capacity, 1)
        for own in rest.rows.values():
            assert set(own) <= {step + 1}
            for row in own.values():
                repaid += 1
                assert set(row.steps) <= held
    assert repaid > 20


@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_a_repaid_sample_is_nearer_to_that_of_the_full_request() -> None:
    """Velocities that are smooth in time and do not depend on the sample: then all that is lost can be repaid."""
    total, step = 20, 9
    sigmas = tuple(1 - i / total for i in range(total + 1))
    truth = torch.stack(
        [torch.tensor([math.cos(0.2 * s), math.exp(-0.1 * s)], dtype=torch.float64) for s in range(total)]
    )
    plan = plan_of("taylor-2", (0, 4, step), sigmas, "output")
    late = replace(plan, checks={"*": {step: Row((4,), (1.0,))}}, expected={"*": {step: Expected(1e-6, 1.0)}})
    lost = {}
    for guard in (None, Guard()):
        runner, request = PlanRunner(late, guard=guard), Request(total, sigmas)
        runner.begin(request)
        given = []
        for s in range(total):
            call = Call("cond", s, None, torch.zeros(2, dtype=torch.float64), request, False)
            coming = runner.forecast(call)
            given.append(truth[s] if coming is None else coming.feature().clone())
            if coming is None:
                runner.keep(call, truth[s])
        lost[guard] = float((torch.stack(given)[: step + 2] - truth[: step + 2]).sum(0).norm())
    assert lost[Guard()] < 0.01 * lost[None], lost


# After a request that left its plan


def run_of_errors(runner: PlanRunner, plan: Plan, error: float) -> int:
    """A request whose only check is off by a relative error; returns how many steps were computed."""
    request, computed = Request(plan.num_steps, plan.sigmas), 0
    runner.begin(request)
    for step in range(plan.num_steps):
        call = Call("cond", step, None, torch.zeros(1, dtype=torch.float64), request, False)
        if runner.forecast(call) is None:
            computed += 1
            runner.keep(call, torch.tensor([1.0 if step < 2 else 1 / (1 + error)], dtype=torch.float64))
    return computed


@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_alert_after_one_that_left_until_one_stays() -> None:
    plan = plan_of("reuse", (0, 2), tuple(1 - i / 8 for i in range(9)), "output")
    plan = replace(plan, checks={"*": {2: Row((0,), (1.0,))}}, expected={"*": {2: Expected(0.01, 1.0)}})
    runner = PlanRunner(plan, guard=Guard())
    calm, above, far = (0.01 * math.exp(x) for x in (0.9 * ALERT, 1.1 * ALERT, 1.1 * TOLERANCE))
    assert not runner.stats.guard.alert
    for error, left in ((above, False), (far, True), (above, True), (calm, False), (above, False)):
        assert (run_of_errors(runner, plan, error) > 2) is left
    assert runner.stats.guard.switches == 2
    # A stricter tolerance is not loosened by the alert; and a driver that changes plans hands it on with its stats.
    strict = PlanRunner(plan, guard=Guard(0.5))
    for error in (0.01 * math.exp(0.6), 0.01 * math.exp(0.6)):
        assert run_of_errors(strict, plan, error) > 2
    later = PlanRunner(plan, guard=Guard())
    later.stats = strict.stats
    assert run_of_errors(later, plan, above) > 2


@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_overflow_of_a_narrower_feature_than_its_sample() -> None:
    plan = small((0, 1), 4, rows={"*": {2: Row((0, 1), (-3.0, 3.0)), 3: Row((1,), (1.0,))}})
    runner, request = PlanRunner(plan, guard=Guard(math.inf)), Request(4, plan.sigmas)
    runner.begin(request)
    for step, value in ((0, -2e4), (1, 2e4), (2, 0.0)):
        call = Call("cond", step, None, torch.zeros(3, dtype=torch.float32), request, False)
        coming = runner.forecast(call)
        if step < 2:
            runner.keep(call, torch.full((3,), value, dtype=torch.float16))
    assert coming is not None and coming.accept is not None
    assert not coming.accept(coming.feature()) and runner.stats.guard.replaced == 1


# Guidance under a plan that knows none


def test_foreign() -> None:
    plan = small((0, 2), 4, checks={"*": {2: Row((0,), (1.0,))}}, expected={"*": {2: Expected(0.1, 1.0)}})
    assert foreign(plan, {"cond": 1, "uncond": 1})
    assert not foreign(plan, ["cond"])
    assert not foreign(replace(plan, expected={}), ["cond", "uncond"])
    assert not foreign(replace(plan, rows=dict.fromkeys(("*", "cond"), plan.rows["*"])), ["cond", "uncond"])


def test_guidance_under_a_plan_fitted_without_is_computed() -> None:
    plan = measured(FLUX, checked_plan(FLUX, "output"))
    pipe = enabled(FLUX, plan)
    with pytest.warns(lesa.LesaWarning, match="2 contexts, the plan was fitted to fewer"):
        output = FLUX.call(pipe, steps=STEPS, **GUIDED)
    assert_same(output, untouched(FLUX, steps=STEPS, **GUIDED))
    assert lesa.stats(pipe).forecast == 0
    FLUX.call(pipe, steps=STEPS)
    assert lesa.stats(pipe).forecast == STEPS - len(COMPUTED)


# The runner against sums that keep everything


def with_random_checks(plan: Plan, rng: random.Random) -> Plan:
    checks: dict[str, dict[int, Row]] = {context: {} for context in plan.rows}
    for by_step in checks.values():
        for step in plan.computed[1:]:
            if rng.random() < 0.7:
                reads = tuple(rng.sample(range(step), rng.randint(1, min(step, 6))))
                by_step[step] = Row(reads, tuple(rng.gauss(0, 1) for _ in reads), rng.gauss(0, 1))
    return replace(plan, checks=checks)


@contextmanager
def requests_of(runner: PlanRunner, plan: Plan) -> Iterator[tuple[Request, list[str]]]:
    request = Request(plan.num_steps, plan.sigmas)
    runner.begin(request)
    contexts = [context for context in ("cond", "uncond") if plan.rows_of(context)]
    yield request, contexts[:1] if set(plan.rows) == {"*"} else contexts


@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
@pytest.mark.parametrize("tolerance", [math.inf, 0.5])
@pytest.mark.parametrize("late", [False, True], ids=["cpu", "gpu"])
def test_runner_equals_brute_force(tolerance: float, late: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU answers are read once the next step is computed; those of the last one, as the step after it comes."""
    if late:
        answers_later(monkeypatch)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    switches = 0
    for _ in range(40):
        plan = with_random_checks(random_plan(rng), rng)
        if tolerance < math.inf:
            errors = {c: {s: Expected(10 ** rng.uniform(-2, 2), 1.0) for s in by} for c, by in plan.checks.items()}
            plan = replace(plan, expected=errors)
        runner = PlanRunner(plan, guard=Guard(tolerance, alert=tolerance))
        saw = runner.stats.guard
        for _request in range(2):
            before, largest = saw.switches, {}
            with requests_of(runner, plan) as (request, contexts):
                kept: dict[str, list[torch.Tensor]] = {context: [] for context in contexts}
                active, found = plan, -1  # where the request was found to be off its plan
                last = max((s for s in plan.computed if s < plan.num_steps - 1), default=-1)
                for step in range(plan.num_steps):
                    for context in contexts:
                        call = Call(context, step, None, torch.zeros(1), request, False)
                        if active is plan and late and found == last < step:
                            active = joined(plan, last, held_at(plan, last))
                        coming = runner.forecast(call)
                        assert (coming is None) == (step in active.computed), (plan, step)
                        if coming is not None:
                            kept[context].append(coming.feature().clone())
                            assert coming.accept is None
                            row = active.rows_of(context)[step]
                            terms = [w * kept[context][s] for w, s in zip(row.weights, row.steps, strict=True)]
                            size = sum(term.abs().max() for term in terms) + abs(row.bias)
                            assert (kept[context][-1] - sum(terms) - row.bias).abs().max() <= 1e-13 * size, (plan, step)
                            continue
                        truth = torch.randn(3, 2, dtype=torch.float64)
                        row = active.checks_of(context).get(step)
                        runner.keep(call, truth)
                        if row is not None:
                            forecast = sum(w * kept[context][s] for w, s in zip(row.weights, row.steps, strict=True))
                            error = float((forecast + row.bias - truth).norm() / truth.norm())
                            largest[context, step] = error
                            known = active.expected_of(context).get(step) if step < plan.num_steps - 1 else None
                            if found < 0 and known is not None and deviation(error, known, 1e-16) > tolerance:
                                found = step
                        kept[context].append(truth)
                        if active is plan and found >= 0 and (not late or found < step):
                            active = joined(plan, step, held_at(plan, step))
                            assert saw.last[0] == found
            assert saw.switches - before == (active is not plan)
            switches += active is not plan
            for (context, step), error in largest.items():
                assert saw.errors[context][step] >= error * (1 - 1e-12)
        assert not runner.stats.refused
    assert (switches > 10) == (tolerance < math.inf), switches


@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
@pytest.mark.parametrize("shapes", [((3,), (3,)), ((3,), (5,))], ids=["a late context", "of another shape"])
def test_what_comes_after_a_switch_has_room_for_the_next_request(shapes: Any) -> None:
    rows = {5: Row((0, 1, 2, 3), (1.0, 2.0, 4.0, 8.0)), 7: Row((3, 6), (1.0, 1.0))}
    checks = {4: Row((3,), (1.0,))}
    expected = {"*": {4: Expected(1e-6, 1.0)}}
    plan = small((0, 1, 2, 3, 4, 6), 8, rows={"*": rows}, checks={"*": checks}, expected=expected)
    runner = PlanRunner(plan, guard=Guard())

    def run(start: int, context: str, shape: tuple[int, ...], steps: range) -> list[float]:
        found = []
        for step in steps:
            call = Call(context, step, None, torch.zeros(shape), request, False)
            coming = runner.forecast(call)
            if coming is None:
                runner.keep(call, torch.full(shape, start + step + 1.0))
            else:
                found.append(coming.feature().unique().item())
        return found

    request = Request(8, plan.sigmas)
    runner.begin(request)
    # Step 4 is off, but nothing reads it, so that it is not held: all others are computed.
    assert run(0, "first", shapes[0], range(8)) == []
    run(0, "first" if shapes[0] != shapes[1] else "late", shapes[1], range(6, 8))
    assert runner.stats.guard.switches == 1
    quiet = replace(plan, expected={"*": {4: Expected(1.0, 1.0)}})
    runner.plan = runner._sparse = quiet
    for context in ("first", "late"):
        runner.begin(request)
        assert run(0, context, shapes[1], range(8)) == [1 + 4 + 12 + 32, 4 + 7]


def held_at(plan: Plan, step: int) -> tuple[int, ...]:
    """Computed steps that are held when a request leaves its plan at `step`, where that one is held too."""
    slots: dict[int, int] = {}
    for s in range(step):
        if plan.slots[s] >= 0:
            slots[plan.slots[s]] = s
    if plan.slots[step] >= 0:
        slots[plan.slots[step]] = step
    return tuple(s for s in slots.values() if s in plan.computed)


# Options


def test_which_guard_is_asked_for() -> None:
    plan = small((0, 2), 4)
    known = replace(plan, checks={"*": {2: Row((0,), (1.0,))}}, expected={"*": {2: Expected(0.1, 1.0)}})
    assert guard_for(None, plan) is guard_for(False, plan) is guard_for(False, known) is None
    assert guard_for(None, known) == guard_for(True, known) == Guard(TOLERANCE) == Guard(5.0)
    assert guard_for(3, known) == Guard(3.0)
    assert guard_for(math.inf, plan) == Guard(math.inf)
    for option in (True, 1.5):
        with pytest.raises(PlanError, match=r"does not say which errors to expect; fit it with.*float\('inf'\)"):
            guard_for(option, plan)
        with pytest.raises(PlanError, match="does not say"):
            lesa.enable(FLUX.make(), small((0, 2), 4), guard=option)
    assert guard_for(Guard(3.0, 0.5), known) == Guard(3.0, 0.5)
    for tolerance in (0, -2.0, math.nan, "a", "5"):
        with pytest.raises(ValueError, match=f"guard={tolerance!r}: expected .* above 0.*False is off"):
            guard_for(tolerance, known)
    with pytest.raises(ValueError, match="tolerance=0.*more than 0"):
        Guard(0)
    with pytest.raises(ValueError, match="alert=0.*more than 0"):
        Guard(alert=0)
    with pytest.raises(ValueError, match="tolerance='x': expected more than 0"):
        Guard("x")


def test_deviation() -> None:
    assert deviation(0.1, Expected(0.1, 0.5), 1e-7) == 0
    assert deviation(0.1 * math.e, Expected(0.1, 0.5), 1e-7) == pytest.approx(2.0)
    # What rounding makes says nothing, in the error or in what is expected.
    assert deviation(1e-9, Expected(0.0, 0.5), 1e-7) == 0
    assert deviation(0.0, Expected(1e-3, 1.0), 1e-7) == pytest.approx(math.log(1e-4))
    assert deviation(math.nan, Expected(0.1, 1.0), 1e-7) == deviation(math.inf, Expected(0.1, 1.0), 1e-7) == math.inf


def test_relative_error() -> None:
    assert relative_error(4.0, 16.0) == 0.5
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(1.0, 0.0) == math.inf


# Files


@pytest.mark.parametrize(
    ("checks", "expected", "message"),
    [
        ({1: Row((0,), (1.0,))}, {}, "check of context 'c', step 1: the step is not computed"),
        ({0: Row((0,), (1.0,))}, {}, "check of context 'c', step 0: reads steps"),
        ({2: Row((2,), (1.0,))}, {}, "check of context 'c', step 2: reads steps"),
        ({2: Row((0,), (math.inf,))}, {}, "check of context 'c', step 2: weights"),
        (
            {2: Row((0,), (1.0,))},
            {3: Expected(1.0, 1.0)},
            "expected error of context 'c', step 3: the step has no check",
        ),
        ({2: Row((0,), (1.0,))}, {2: Expected(-1.0, 1.0)}, "expected error of context 'c', step 2 is .*error=-1.0"),
        ({2: Row((0,), (1.0,))}, {2: Expected(1.0, 0.0)}, "expected error of context 'c', step 2 is .*std=0.0"),
        ({2: Row((0,), (1.0,))}, {2: Expected(math.nan, 1.0)}, "expected error of context 'c', step 2 is .*error=nan"),
    ],
)
def test_every_misplaced_value_is_named(checks: Any, expected: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        small((0, 2), 4, checks={"c": checks}, expected={"c": expected})


def test_round_trip_and_joining(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        plan = with_random_checks(random_plan(rng), rng)
        errors = {
            c: {s: Expected(rng.random(), 0.1 + rng.random()) for s in by if rng.random() < 0.8}
            for c, by in plan.checks.items()
        }
        plan = replace(plan, expected=errors, impulse_response=tuple(rng.gauss(0, 1) for _ in range(plan.num_steps)))
        loaded = Plan.load(plan.save(tmp_path / "plan"))
        assert replace(loaded, library_version=None) == plan
        again = Plan.join(dict.fromkeys(plan.rows, plan))
        for context in plan.rows:
            assert again.checks_of(context) == plan.checks_of(context)
            assert again.expected_of(context) == plan.expected_of(context)


@pytest.mark.parametrize(
    "name", ["error", "spread", "timesteps", "likeness_center_0", "likeness_scatter", "likeness_weights"]
)
def test_a_damaged_file_blinds_no_guard(name: str, tmp_path: Path) -> None:
    plan = Plan.load(assets.fitted_path(10))
    path = replace(plan, timesteps=plan.sigmas[:-1]).save(tmp_path / "plan.safetensors")
    with safe_open(path, framework="np") as file:
        metadata, arrays = file.metadata(), {key: file.get_tensor(key).copy() for key in file.keys()}  # noqa: SIM118
    arrays[name][...] = math.nan
    path.write_bytes(serialize(arrays, metadata))
    with pytest.raises(PlanError):
        Plan.load(path)


def test_files_from_before_there_was_a_guard(tmp_path: Path) -> None:
    plan = small((0, 2), 4, checks={"*": {2: Row((0,), (1.0,))}}, expected={"*": {2: Expected(0.5, 0.3)}})
    path = plan.save(tmp_path / "plan")
    with safe_open(path, framework="np") as file:
        description = json.loads(file.metadata()["lesa"])
        arrays = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
    assert np.nanmax(arrays["error"]) == 0.5 and np.nanmax(arrays["spread"]) == 0.3
    largest = {**{name: array for name, array in arrays.items() if name != "spread"}, "expected": arrays["error"]}
    path.write_bytes(serialize(largest, {"lesa": json.dumps(description)}))
    assert (Plan.load(path).expected, Plan.load(path).checks) == ({}, plan.checks)
    old = {name: array for name, array in arrays.items() if name[:6] not in ("error", "spread", "check_")}
    for name in ("check_contexts", "expected_contexts"):
        del description[name]
    path.write_bytes(serialize(old, {"lesa": json.dumps(description)}))
    loaded = Plan.load(path)
    assert (loaded.checks, loaded.expected, loaded.rows) == ({}, {}, plan.rows)


def test_bounds_of_forecasts_that_are_read_begin_anew_at_computed_steps() -> None:
    """Else forecasts in float16 would wait for the device although nothing overflows."""
    plan = Plan.load(assets.plan_path(5))
    assert any(plan.slots[step] >= 0 for step in plan.rows_of("*"))
    looking = vigil.Vigil(Guard(math.inf), plan, GuardStats)
    looking._largest["*"] = 2.0**12
    bounds = [
        looking.bound(Call("*", step, None, torch.zeros(1), Request(), False), row)
        for step, row in sorted(plan.rows_of("*").items())
    ]
    assert sum(not bound < torch.finfo(torch.float16).max for bound in bounds) <= 1
