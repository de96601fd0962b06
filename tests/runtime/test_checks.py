"""Checks: they measure the errors there are, change no output, and no forecast that is not finite stands."""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from pipelines import CASES_BY_NAME, Case
from test_compile import compiled_frames, made
from test_dropin import assert_same, counted, untouched
from torch.utils._python_dispatch import TorchDispatchMode

import lesa
from lesa.forecasters import check_rows, plan_of
from lesa.models import hooks, standins
from lesa.plans.plan import Plan
from lesa.plans.rows import Expected, Row
from lesa.runtime.checks import TOLERANCE, checked, deviation, relative_error, risky_steps
from lesa.runtime.clock import Call, Request, sigmas_of
from lesa.runtime.runner import PlanRunner

FLUX, QWEN = CASES_BY_NAME["flux_dev"], CASES_BY_NAME["qwen_image"]
STEPS = 12
COMPUTED = (0, 1, 4, 7, 10)
CHECKED = COMPUTED[2:]
ON_SITES = pytest.mark.parametrize("site", ["hidden", "output"])


def taylor_plan(case: Case, computed: tuple[int, ...] = COMPUTED, site: str = "output") -> Plan:
    """Taylor's first order at the noise levels of a request."""
    pipe = case.make()
    case.call(pipe, steps=STEPS)
    return plan_of("taylor-1", computed, sigmas_of(pipe.scheduler)[-STEPS - 1 :], site)


def checked_plan(case: Case, site: str, contexts: tuple[str, ...] = ("*",)) -> Plan:
    """Taylor's first order, checked by itself from the third computed step on, an error of 1 expected of each."""
    plan = taylor_plan(case, site=site)
    checks = {step: row for step, row in check_rows("taylor-1", COMPUTED, STEPS).items() if step in CHECKED}
    expected = {step: Expected(1.0, 1.0) for step in checks}
    tables = {"rows": plan.rows["*"], "checks": checks, "expected": expected}
    return replace(plan, **{name: dict.fromkeys(contexts, table) for name, table in tables.items()})


def enabled(case: Case, plan: Plan, guard: str = "warn") -> Any:
    pipe = case.make()
    lesa.enable(pipe, plan, guard=guard)
    return pipe


def measured(case: Case, plan: Plan, **request: Any) -> Plan:
    """The plan, expecting the errors that a request has."""
    pipe = enabled(case, plan)
    case.call(pipe, steps=STEPS, **request)
    expected: dict[str, dict[int, Expected]] = {}
    for check in lesa.stats(pipe).checks:
        expected.setdefault(check.context, {})[check.step] = Expected(check.error, 1.0)
    return replace(plan, expected=expected)


def scaled(plan: Plan, context: str, step: int, factor: float) -> Plan:
    """The plan with one expected error changed."""
    errors = {name: dict(by_step) for name, by_step in plan.expected.items()}
    errors[context][step] = Expected(errors[context][step].error * factor, 1.0)
    return replace(plan, expected=errors)


@ON_SITES
def test_the_errors_are_those_of_the_features(site: str) -> None:
    plan = checked_plan(FLUX, site)
    pipe = enabled(FLUX, plan)
    last = pipe.transformer.single_transformer_blocks[-1]
    features: list[torch.Tensor] = []
    if site == "hidden":
        last.register_forward_hook(lambda _, __, output: features.append(output[1].double()))
    else:
        pipe.transformer.proj_out.register_forward_hook(lambda _, __, output: features.append(output.double()))
    FLUX.call(pipe, steps=STEPS)
    checks = lesa.stats(pipe).checks
    assert [check.step for check in checks] == list(CHECKED)
    truth = dict(zip(COMPUTED, features, strict=True))
    for check in checks:
        row = plan.checks["*"][check.step]
        forecast = sum(w * truth[read] for w, read in zip(row.weights, row.steps, strict=True))
        true = truth[check.step]
        assert check.error == pytest.approx(float((forecast - true).norm() / true.norm()), rel=1e-5)
        assert check.error > 1e-4 and check.expected == 1.0 and check.ratio == check.error


@ON_SITES
def test_errors_as_expected_say_nothing_and_change_nothing(site: str) -> None:
    plan = measured(FLUX, checked_plan(FLUX, site))
    pipe = enabled(FLUX, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lesa.LesaWarning)
        output = FLUX.call(pipe, steps=STEPS)
    assert_same(output, FLUX.call(enabled(FLUX, plan, "off"), steps=STEPS))
    stats = lesa.stats(pipe)
    assert (stats.computed, stats.forecast, sum(stats.refused.values())) == (len(COMPUTED), STEPS - len(COMPUTED), 0)
    assert (len(stats.checks), stats.out_of_distribution, stats.guard) == (len(CHECKED), 0, "warn")
    assert all(check.ratio == pytest.approx(1.0) for check in stats.checks)


@ON_SITES
@pytest.mark.parametrize("step", CHECKED)
def test_a_larger_error_warns_once_and_the_plan_goes_on(site: str, step: int) -> None:
    plan = measured(FLUX, checked_plan(FLUX, site))
    context = next(iter(plan.expected))
    within = enabled(FLUX, scaled(plan, context, step, math.exp(-TOLERANCE * 0.999)))
    expected = FLUX.call(within, steps=STEPS)
    assert lesa.stats(within).out_of_distribution == 0
    pipe = enabled(FLUX, scaled(plan, context, step, math.exp(-TOLERANCE * 1.001)))
    with counted(FLUX.probes(pipe)) as counts, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lesa.LesaWarning)
        outputs = [FLUX.call(pipe, steps=STEPS) for _ in range(2)]
        stats = lesa.stats(pipe)
    assert counts == [2 * len(COMPUTED)] * len(counts)  # not one step more than the plan's
    for output in outputs:
        assert_same(output, expected)
    assert stats.out_of_distribution == 2
    assert [check.step for check in stats.checks if check.std > TOLERANCE] == [step]
    (told,) = (str(one.message) for one in caught if issubclass(one.category, lesa.LesaWarning))
    assert f"step {step}" in told and "1.5e+02 times" in told


@pytest.mark.parametrize("context", ["cond", "uncond"])
def test_each_context_has_errors_of_its_own(context: str) -> None:
    plan = measured(QWEN, checked_plan(QWEN, "output", ("cond", "uncond")), guidance=True)
    assert set(plan.expected) == {"cond", "uncond"}
    pipe = enabled(QWEN, scaled(plan, context, 7, math.exp(-1.1 * TOLERANCE)))
    with pytest.warns(lesa.LesaWarning, match=f"step 7 .{context}"):
        QWEN.call(pipe, steps=STEPS, guidance=True)
        stats = lesa.stats(pipe)
    assert len(stats.checks) == 2 * len(CHECKED)
    assert [(c.context, c.step) for c in stats.checks if c.std > TOLERANCE] == [(context, 7)]


def test_guidance_under_a_plan_fitted_without_is_told_and_runs_at_the_plans_speed() -> None:
    plan = measured(QWEN, checked_plan(QWEN, "output"))
    plan = replace(plan, expected={"*": plan.expected["cond"]}) if "cond" in plan.expected else plan
    pipe = enabled(QWEN, plan)
    with pytest.warns(lesa.LesaWarning, match="guidance"):
        QWEN.call(pipe, steps=STEPS, guidance=True)
    assert (lesa.stats(pipe).computed, lesa.stats(pipe).refused) == (2 * len(COMPUTED), Counter())


def test_figures_are_of_the_latest_request() -> None:
    plan = measured(FLUX, checked_plan(FLUX, "output"))
    pipe = enabled(FLUX, plan)
    for _ in range(2):
        FLUX.call(pipe, steps=STEPS)
        assert [check.step for check in lesa.stats(pipe).checks] == list(CHECKED)


def test_off_makes_no_check_and_holds_no_more_features() -> None:
    plan = checked_plan(FLUX, "output")
    far = replace(
        plan,
        checks={"*": {10: Row((0, 1, 4, 7), (0.25,) * 4)}},
        expected={"*": {10: Expected(1.0, 1.0)}},
    )
    assert far.capacity > plan.capacity == 2
    unknown = replace(far, expected={})  # nothing to compare an error with
    for source, guard, capacity in ((far, "off", 2), (unknown, "warn", 2), (far, "warn", far.capacity)):
        pipe = enabled(FLUX, source, guard)
        counts = operators(pipe)
        assert counts["lesa.forecast_errors.default"] == (capacity == far.capacity)
        (history,) = hooks.attached(pipe).driver._histories.values()
        assert len(history.ring.history) in (capacity, capacity + 1)  # a spare one for forecasts nothing reads
        assert lesa.stats(pipe).guard == ("warn" if capacity == far.capacity else "off")


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


def test_no_forecast_is_looked_at_that_must_be_finite() -> None:
    plan = measured(FLUX, checked_plan(FLUX, "hidden"))
    on, off = (operators(enabled(FLUX, plan, guard)) for guard in ("warn", "off"))
    assert (on["lesa.forecast_errors.default"], off["lesa.forecast_errors.default"]) == (len(CHECKED), 0)
    for name in ("aten._local_scalar_dense.default", "aten.isfinite.default", "aten.all.default"):
        assert on[name] == off[name]


@ON_SITES
@pytest.mark.parametrize("guard", ["warn", "off"])
def test_forecasts_that_overflow_are_computed_at_once(site: str, guard: str) -> None:
    plan = checked_plan(FLUX, site)
    rows = {step: Row(row.steps, (3e38, 3e38)[: len(row.steps)]) for step, row in plan.rows["*"].items()}
    pipe = enabled(FLUX, replace(plan, rows={"*": rows}), guard)
    with pytest.warns(lesa.LesaWarning, match="not finite"):
        output = FLUX.call(pipe, steps=STEPS)
    assert_same(output, untouched(FLUX, steps=STEPS))
    stats = lesa.stats(pipe)
    assert stats.refused["the forecast was not finite"] == STEPS - len(COMPUTED)
    assert (stats.computed, stats.forecast) == (len(COMPUTED), 0)


@ON_SITES
@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_a_checked_feature_that_is_not_finite_is_never_read(site: str) -> None:
    plan, step = checked_plan(FLUX, site), 4
    pipe = enabled(FLUX, plan)
    root = hooks.attached(pipe)
    keep = root.driver.keep

    def spoiled(call: Call, feature: torch.Tensor) -> None:
        feature = feature.clone()
        if call.step == step:
            feature.view(-1)[7] = math.nan
        keep(call, feature)

    root.driver.keep = spoiled
    output = FLUX.call(pipe, steps=STEPS)
    lesa.stats(pipe)
    # Every step whose forecast would have read it after the next check is computed instead; on the CPU that is all.
    lost = {s for s, row in plan.rows["*"].items() if step in row.steps}
    rows = {s: row for s, row in plan.rows["*"].items() if s not in lost}
    single = replace(plan, computed=tuple(sorted({*COMPUTED, *lost})), rows={"*": rows}, checks={}, expected={})
    assert_same(output, FLUX.call(enabled(FLUX, single), steps=STEPS))
    assert sum(lesa.stats(pipe).refused.values()) == len(lost) > 0


def test_all_computed_is_bit_equal() -> None:
    pipe = FLUX.make()
    FLUX.call(pipe, steps=STEPS)
    plan = Plan(tuple(range(STEPS)), sigmas_of(pipe.scheduler)[-STEPS - 1 :])
    checks = check_rows("taylor-1", range(STEPS), STEPS)
    expected = {step: Expected(1.0, 1.0) for step in checks}
    pipe = enabled(FLUX, replace(plan, checks={"*": checks}, expected={"*": expected}))
    assert_same(FLUX.call(pipe, steps=STEPS), untouched(FLUX, steps=STEPS))
    assert len(lesa.stats(pipe).checks) == STEPS - 1


@pytest.mark.parametrize("fused", [False, True], ids=["own head", "fused head"])
@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
def test_compiled_without_graph_breaks_and_recompilation(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    if fused:
        monkeypatch.setattr(standins.ops, "backend_of", lambda name, tensor: "triton")
    case = replace(FLUX, make=functools.partial(made, FLUX, "whole"))
    plan = measured(case, checked_plan(case, "hidden"))
    plan = scaled(plan, next(iter(plan.expected)), 4, 1e-3)
    expected = case.call(enabled(case, plan), steps=STEPS)
    pipe = case.make()
    before = compiled_frames()[0]
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    lesa.enable(pipe, plan)
    torch.testing.assert_close(FLUX.call(pipe, steps=STEPS), expected, rtol=1e-5, atol=1e-5)
    assert compiled_frames()[0] - before == 0
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(FLUX.call(pipe, steps=STEPS), expected, rtol=1e-5, atol=1e-5)
    assert lesa.stats(pipe).out_of_distribution == 2
    torch._dynamo.reset()


def small(computed: tuple[int, ...], total: int, **changes: Any) -> Plan:
    plan = plan_of("taylor-1", computed, tuple(1 - i / total for i in range(total + 1)), "output")
    return replace(plan, **changes)


def test_overflow_of_a_narrower_feature_than_its_sample() -> None:
    """A float16 feature overflows where the float32 sample of its request would not."""
    plan = small((0, 1), 4)
    rows = {2: Row((0, 1), (-1.0, 2.0)), 3: Row((1,), (1.0,))}
    runner, request = PlanRunner(replace(plan, rows={"*": rows})), Request(4, plan.sigmas)
    runner.begin(request)
    for step, value in enumerate((-60000.0, 40000.0)):
        call = Call("cond", step, None, torch.zeros(1), request, False)
        assert runner.forecast(call) is None
        runner.keep(call, torch.tensor([value], dtype=torch.float16))
    coming = runner.forecast(Call("cond", 2, None, torch.zeros(1), request, False))
    assert coming is not None and coming.accept is not None
    with pytest.warns(lesa.LesaWarning, match="not finite"):
        assert not coming.accept(coming.feature())
    coming = runner.forecast(Call("cond", 3, None, torch.zeros(1), request, False))
    assert coming is not None and coming.accept is not None and coming.accept(coming.feature())


def test_which_forecasts_may_not_be_finite() -> None:
    rows = {2: Row((0, 1), (-1.0, 2.0)), 3: Row((2,), (2.0**68,)), 4: Row((3,), (1.0,)), 5: Row((1,), (1.0,), 1e39)}
    plan = small((0, 1), 6, rows={"*": rows})
    assert risky_steps(plan, "any", torch.float16) == {2, 3, 4, 5}
    assert risky_steps(plan, "any", torch.float32) == risky_steps(plan, "any", torch.bfloat16) == {3, 4, 5}
    assert risky_steps(plan, "any", torch.float64) == frozenset()


def test_only_checks_that_can_be_judged_are_kept() -> None:
    plan = checked_plan(FLUX, "output")
    some = replace(plan, expected={"*": {4: Expected(1.0, 1.0)}})
    assert set(checked(some, "warn").checks["*"]) == set(checked(some, "warn").expected["*"]) == {4}
    assert not checked(some, "off").checks and not checked(replace(plan, expected={}), "warn").checks


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
