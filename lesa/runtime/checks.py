"""Checks: at a computed step, the comparison of a forecast with the true feature.

A fitted plan has the expected errors. If an error is far above the expected one, lesa warns once. The plan goes on in
any case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..plans.plan import Plan
from ..plans.rows import Expected, Row
from .clock import Call
from .driver import Check, Stats
from .history import History, Question

GUARDS = ("warn", "off")
# In standard deviations of log(error). With captions similar to the fitting ones the largest was 3.8 (emoji-flux).
TOLERANCE = 5.0
# We assume that no element is larger in float32 or bfloat16: such a sample is already broken.
_LARGEST = 2.0**60


class _Pending(NamedTuple):
    """A comparison that the device still computes; errors below `least` are only rounding."""

    context: str
    step: int
    asked: Question
    history: History
    least: float


class Checks:
    """Measures the errors of one plan's checks.

    We wait for the GPU only at the last step; finished results are read earlier.

    Args:
        plan: its checks all have expected errors, see `checked`.
        tell: called with each warning's text.
    """

    def __init__(self, plan: Plan, tell: Callable[[str], None]) -> None:
        self._plan, self._tell = plan, tell
        self._pending: list[_Pending] = []
        self._noted = False

    def __getstate__(self) -> dict[str, Any]:  # a copy has no pending comparisons
        return {**self.__dict__, "_pending": []}

    def begin(self, stats: Stats) -> None:
        """Start a request: drop the errors of the earlier one."""
        self.settle(stats)
        stats.checks.clear()
        self._noted = False

    def keep(self, call: Call, feature: torch.Tensor, history: History, stats: Stats) -> None:
        """Store the feature of a computed step, and measure its check."""
        if call.step not in self._plan.checks_of(call.context):
            history.store(call.step, feature)
        elif (asked := history.compare(call.step, feature)) is not None:
            least = torch.finfo(feature.dtype).eps
            self._pending.append(_Pending(call.context, call.step, asked, history, least))
        self.settle(stats, wait=False)

    def settle(self, stats: Stats, wait: bool = True) -> None:
        """Read the finished comparisons, or wait for all."""
        while self._pending and (wait or self._pending[0].asked.is_there()):
            self._read(self._pending.pop(0), stats)

    def _read(self, pending: _Pending, stats: Stats) -> None:
        squares, size = pending.asked.read()
        if not math.isfinite(size):
            pending.history.drop(pending.step)  # steps that need it are computed instead
            return
        expected = self._plan.expected_of(pending.context)[pending.step]
        error = relative_error(squares, size)
        check = Check(pending.context, pending.step, error, expected.error, deviation(error, expected, pending.least))
        stats.checks.append(check)
        if check.std > TOLERANCE and not self._noted:
            self._noted = True
            stats.out_of_distribution += 1
            self._tell(
                f"this request is different from the fitting requests: at step {check.step} ({check.context}) the "
                f"forecast error is {error:.2g}, {check.ratio:.2g} times the expected {check.expected:.2g}. Its "
                "prompt, guidance or model weights (a LoRA?) differ from those in fitting. The plan goes on; for "
                "better pictures fit with requests like this one, or raise the budget"
            )


def checked(plan: Plan, guard: str) -> Plan:
    """The plan with only the checks that are measured; the others would take memory."""
    checks: dict[str, Mapping[int, Row]] = {}
    if guard == "warn":
        for context in sorted({*plan.checks, *plan.expected}):
            known = plan.expected_of(context)
            if rows := {step: row for step, row in plan.checks_of(context).items() if step in known}:
                checks[context] = rows
    expected = {context: {step: plan.expected_of(context)[step] for step in rows} for context, rows in checks.items()}
    return replace(plan, checks=checks, expected=expected)


def relative_error(squares: float, truth: float) -> float:
    """sqrt(squares / truth); 0 if both are 0."""
    if truth > 0:
        return math.sqrt(squares / truth)
    return 0.0 if squares == 0 else math.inf


def deviation(error: float, expected: Expected, least: float) -> float:
    """By how many standard deviations the logarithm of an error exceeds the expected one.

    Args:
        error: relative, at least 0 or NaN.
        expected: the check's expected error.
        least: errors below it are only rounding.

    Returns:
        A number; infinity if the error is not finite.
    """
    if not error < math.inf:
        return math.inf
    return math.log(max(error, least) / max(expected.error, least)) / expected.std


def risky_steps(plan: Plan, context: str, dtype: torch.dtype) -> frozenset[int]:
    """The forecast steps whose forecast may overflow, though all computed features are finite.

    In float16 any forecast may overflow. In wider types only if chained weights multiply past the limit.
    """
    rows, limit = plan.rows_of(context), torch.finfo(dtype).max
    if limit < _LARGEST:
        return frozenset(rows)
    bounds: dict[int, float] = {}
    for step, row in sorted(rows.items()):
        read = (abs(w) * bounds.get(s, _LARGEST) for s, w in zip(row.steps, row.weights, strict=True))
        bounds[step] = sum(read) + abs(row.bias)
    return frozenset(step for step, bound in bounds.items() if not bound < limit)
