"""Guard: compares forecasts with the truth while a request runs, and has the rest computed where they are off.

At a computed step the forecast that would have been made costs one pass over the features. A plan says how large its
errors were in fitting; a request in which one is far larger is not one that the plan was made for. It leaves the plan:
what the forecasts so far did wrong is made up for at the next step, by computing it (see `retrace`) or, where that
cannot be done, by an estimate; all others are computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from ..planner.build import written_out
from ..plans.plan import ANY_CONTEXT, MAX_READS, Expected, Plan, PlanError, Row

# Standard deviations of the logarithm of an error. On emoji-flux captions like the fitted ones reach up to 3.8.
TOLERANCE = 5.0
# Requests are watched more closely where it is likely that they are none that the plan was made for.
ALERT = 2.0
# The past is interpolated by polynomials through so many computed steps, the nearest.
_POINTS = 4
_TINY = 1e-12


@dataclass(frozen=True)
class Guard:
    """When a request leaves its plan.

    Args:
        tolerance: by how many times its spread the logarithm of an error may exceed the one expected, above 0. With
            infinity every check is made and measured, and no request leaves its plan.
        alert: the tolerance, if it is smaller, of a request whose prompt or whose denoiser's weights are unlike those
            that the plan was fitted to (see `likeness`), and after a request that left its plan, until one stays within
            it; above 0.
        retrace: whether a request that leaves computes over again what was forecast, in one go: about as many denoiser
            calls as it ran steps. Else the next step adds an estimate of what is owed.

    Raises:
        ValueError: a number is not above 0.
    """

    tolerance: float = TOLERANCE
    alert: float = ALERT
    retrace: bool = True

    def __post_init__(self) -> None:
        for name, usual in (("tolerance", TOLERANCE), ("alert", ALERT)):
            value = getattr(self, name)
            if not isinstance(value, Real) or not float(value) > 0:
                raise ValueError(f"{name}={value!r}: expected more than 0, e.g. {usual}, times the spread of the error")

    @property
    def measures(self) -> bool:
        """Whether it only looks on."""
        return math.isinf(self.tolerance)


GuardOption = bool | float | Guard | None


def guard_for(option: GuardOption, plan: Plan) -> Guard | None:
    """The guard that `lesa.enable(..., guard=option)` asks for; None is none.

    Raises:
        PlanError: a guard is asked for, but the plan does not say which errors to expect.
        ValueError: the tolerance is not above 0.
    """
    known = any(plan.expected.values())
    if option is None:
        return Guard() if known else None
    if option is False:
        return None
    if isinstance(option, Guard):
        guard = option
    else:
        guard = Guard() if option is True else _guard_of(option)
    if not known and not guard.measures:
        raise PlanError(
            f"guard={option!r}: the plan does not say which errors to expect; fit it with this version, at least 4 "
            "prompts besides those held out (held_out=) and 3 computed steps, leave guard out, or pass "
            "guard=float('inf'), which only replaces forecasts that are not finite"
        )
    return guard


def _guard_of(option: Any) -> Guard:
    try:
        tolerance = math.nan if isinstance(option, str) else float(option)
    except (TypeError, ValueError):
        tolerance = math.nan
    if not tolerance > 0:
        raise ValueError(
            f"guard={option!r}: expected True, False, a lesa.Guard or a number above 0, e.g. {TOLERANCE}, times "
            "the spread of the error; False is off"
        )
    return Guard(tolerance)


def relative_error(squares: float, truth: float) -> float:
    """sqrt(squares / truth); 0 where both are 0."""
    if truth > 0:
        return math.sqrt(squares / truth)
    return 0.0 if squares == 0 else math.inf


def deviation(error: float, expected: Expected, least: float) -> float:
    """How far the logarithm of an error lies above the one expected, in spreads.

    Args:
        error: relative, at least 0 or NaN.
        expected: of this check.
        least: errors below it say nothing, e.g. the rounding of the features' dtype.

    Returns:
        A number; infinity where the error is no number.
    """
    if not error < math.inf:
        return math.inf
    return math.log(max(error, least) / max(expected.error, least)) / expected.std


def foreign(plan: Plan, contexts: Collection[str]) -> bool:
    """Whether guidance joined a request of a guarded plan that was fitted to requests of one context."""
    return len(contexts) > 1 and any(plan.expected.values()) and set(plan.rows) == {ANY_CONTEXT}


def rest_of(plan: Plan) -> Plan:
    """The plan of a request that computes all its steps from here on; without rows and checks."""
    return replace(
        plan,
        computed=tuple(range(plan.num_steps)),
        rows={context: {} for context in plan.rows},
        forecaster="none",
        stages=(),
        training={},
        checks={},
        expected={},
        surrogate=None,
        likeness=None,
    )


def leaving(plan: Plan, step: int, held: Collection[int]) -> Plan:
    """The plan for the rest of a request whose forecasts are off, where no retrace is made.

    What the request was given at forecast steps is known by then to be wrong: between computed steps the truth is
    interpolated, with the step just computed on the far side, many times more exactly than it was foretold. The step
    after `step` is forecast once more, and to that forecast is added what is owed,

        1 / h_t  sum_(i < t) h_i (F~_i - F^_i),    h: the impulse response of the final sample to each step's output,

    so that the sample comes back to where it would have been. All later steps are computed. At the hidden site, whose
    features do not add up to a sample, and where what a repayment reads is not held, all are computed at once.

    Args:
        plan: what the request ran by.
        step: the last step that it ran; where a forecast was refused, one that the plan does not compute.
        held: computed steps up to `step` whose features are held.

    Returns:
        A plan of the same request and site, its rows for all contexts of `plan`, without checks. Steps up to `step` are
        over, and count as computed.

    Raises:
        ValueError: `step` is no step of the plan.
    """
    if not 0 <= step < plan.num_steps:
        raise ValueError(f"step={step}: expected one of the plan's {plan.num_steps} steps")
    target = step + 1
    repaid: dict[str, Row] = {}
    if plan.site == "output" and step in held and target < plan.num_steps:
        found = {context: _repayment(plan, context, step, held) for context in plan.rows}
        repaid = {context: row for context, row in found.items() if row is not None}
    rest = rest_of(plan)
    if not len(repaid) == len(plan.rows) > 0:
        return rest
    computed = tuple(s for s in rest.computed if s != target)
    rows = {context: {target: row} for context, row in repaid.items()}
    return replace(rest, computed=computed, rows=rows, forecaster="repayment")


def _repayment(plan: Plan, context: str, step: int, held: Collection[int]) -> Row | None:
    """The row of the step after `step`; None where what it needs is not held."""
    known = sorted(s for s in held if s in plan.computed and s <= step)
    impulse_response = np.diff(plan.sigmas) if plan.impulse_response is None else plan.impulse_response
    target = step + 1
    if impulse_response[target] == 0 or any(row.bias for row in plan.rows_of(context).values()):
        return None
    given = written_out(plan, context)
    weights = _interpolated(known, target, plan.num_steps)
    for i in sorted(set(range(step)) - set(plan.computed)):
        owed = _interpolated(known, i, plan.num_steps) - given[i]
        weights += impulse_response[i] / impulse_response[target] * owed
    reads = [int(j) for j in np.flatnonzero(np.abs(weights) > _TINY)]
    if not set(reads) <= set(known) or not 1 <= len(reads) <= MAX_READS:
        return None
    return Row(tuple(reads), tuple(weights[reads].tolist()))


def _interpolated(known: list[int], target: int, num_steps: int) -> np.ndarray:
    """[T]: Lagrange's weights for a step, over the known ones nearest to it."""
    points = sorted(known, key=lambda s: (abs(s - target), -s))[:_POINTS]
    weights = np.zeros(num_steps)
    for s in points:
        weights[s] = math.prod((target - other) / (s - other) for other in points if other != s)
    return weights
