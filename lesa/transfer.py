"""A fitted plan at other noise levels and budgets, made of the model of the requests it was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .expectations import expectations
from .plan import Expected, Plan, PlanError
from .search import search
from .statistics import GUIDED, Statistics
from .surrogate import Surrogate
from .tables import closed_form, plan_of

_GLANCE = 4  # steps of Gauss-Newton that tell two schedules apart
# For moves a hasty look must do, of so many requests and steps, at so many schedules: a plan is made while one waits.
# The larger they are the longer each look takes.
_HASTY_REQUESTS, _HASTY, _LOOKS, _WORK = 3, 2, 12, 3600


def adapted(
    plan: Plan,
    budget: int | float | None = None,
    sigmas: Sequence[float] | None = None,
    response: np.ndarray | None = None,
) -> Plan:
    """The plan of another request, as near to a fit of its own as the fitted one's surrogate tells.

    Its schedule is the searched one on the guided mean inner products, the fitted plan's own at the nearest noise
    levels, or the better of them with some steps moved by one, whichever the surrogate says does least harm; its rows
    are the surrogate's best.

    What the guard may expect are the errors that its checks would have made in the fitting requests.

    Args:
        plan: fitted, with a surrogate.
        budget: see `lesa.adapting.plan_for`; the plan's own by default, or all steps where there are fewer.
        sigmas: the T' + 1 noise levels of the request, the final 0 included; the plan's own by default.
        response: [T' + 1, T'], see `Statistics`; by default the flow-matching one, or without `sigmas` the plan's own.

    Returns:
        A plan of the same model without a surrogate; without `sigmas` and `response` and at its own budget `plan`.

    Raises:
        PlanError: the plan has no surrogate.
        ValueError: another argument is out of place.
    """
    surrogate = plan.surrogate
    if surrogate is None:
        raise PlanError(
            f"the plan serves its own {plan.num_steps} steps only: it does not hold what it was fitted from; fit it "
            "again with this version of lesa.fit, or adapt the statistics of its requests"
        )
    known = there = statistics_of(plan, surrogate)
    native = sigmas is None and response is None
    total = plan.num_steps if sigmas is None else len(sigmas) - 1
    number = min(plan.budget, total) if budget is None else computed_steps(budget, total)
    if native and number == plan.budget:
        return plan
    model = surrogate
    if not native:
        there = known.at(plan.sigmas if sigmas is None else sigmas, response)
        model = surrogate.at(plan.sigmas, there.sigmas, there.response)
    schedules = {
        nearest(plan, there.sigmas, number): "nearest",
        search(there.gram("output", GUIDED), there.response[-1], number): "searched",
    }
    schedules.setdefault(_moved(model, there, list(schedules)), "moved")
    rows = {computed: model.optimise(computed, closed_form(there, computed), _GLANCE) for computed in schedules}
    best = min(rows, key=lambda computed: rows[computed][1])
    weights, _ = model.optimise(best, rows[best][0])
    more: dict[str, Any] = {"training": {"requests": surrogate.requests, "schedule": schedules[best]}}
    made = plan_of(there, best, weights, timesteps=plan.timesteps if sigmas is None else None, **more)
    return replace(made, expected=expected_by(model, made))


def computed_steps(budget: Any, total: int) -> int:
    """The computed steps of a budget in a request of `total` steps.

    Raises:
        ValueError: it is neither a number of steps nor a share of them.
    """
    if isinstance(budget, (int, np.integer)) and not isinstance(budget, bool) and budget >= 1:
        return min(int(budget), total)
    if isinstance(budget, (float, np.floating)) and 0.0 < budget <= 1.0:
        return max(1, round(float(budget) * total))
    raise ValueError(
        f"budget={budget!r}: expected a number of computed steps of at least 1, or a share of them as a float above 0 "
        "and up to 1"
    )


def statistics_of(plan: Plan, surrogate: Surrogate) -> Statistics:
    """The statistics of the output site that a plan's surrogate holds."""
    return Statistics(
        sigmas=plan.sigmas,
        timesteps=plan.sigmas[:-1] if plan.timesteps is None else plan.timesteps,
        contexts=surrogate.contexts,
        guidance=tuple(surrogate.guidance.tolist()),
        grams={"output": surrogate.grams.mean(0)},
        response=surrogate.response,
        requests=surrogate.requests,
        denoiser=plan.denoiser,
        config_hash=plan.config_hash,
    )


def nearest(plan: Plan, sigmas: Sequence[float], budget: int) -> tuple[int, ...]:
    """The plan's schedule at the nearest of other noise levels; for another budget as dense, in proportion, everywhere.

    Args:
        plan: whose schedule it is.
        sigmas: the T' + 1 noise levels, the final 0 included.
        budget: computed steps, 1 to T'.
    """
    ends = [plan.sigmas[step] for step in (*plan.computed, plan.num_steps)]
    wanted = np.interp(np.arange(budget) / budget, np.arange(plan.budget + 1) / plan.budget, ends)
    levels = np.asarray(sigmas[:-1])
    steps: list[int] = []
    for i, level in enumerate(wanted):
        first, last = (steps[-1] + 1 if steps else 0), len(levels) - budget + i
        steps.append(0 if i == 0 else first + int(np.abs(levels[first : last + 1] - level).argmin()))
    return tuple(steps)


def _moved(model: Surrogate, there: Statistics, schedules: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The better of some schedules, its steps moved by one where that promises more; late ones, which cost, first."""
    few = model.thinned(_HASTY_REQUESTS)
    prices: dict[tuple[int, ...], float] = {}

    def price(computed: tuple[int, ...]) -> float:
        if computed not in prices:
            prices[computed] = few.optimise(computed, closed_form(there, computed, "taylor-1"), _HASTY)[1]
        return prices[computed]

    best = min(schedules, key=price)
    looks = min(_LOOKS, _WORK // (there.num_steps * len(best)))
    for i in range(len(best) - 1, 0, -1):
        for by in (1, -1):
            moved = (*best[:i], best[i] + by, *best[i + 1 :])
            fits = moved[i] < there.num_steps and len(set(moved)) == len(moved) and len(prices) < looks
            if fits and price(moved) < price(best):
                best = moved
                break
    return best


def expected_by(surrogate: Surrogate, plan: Plan) -> dict[str, dict[int, Expected]]:
    """What the guard may expect of a plan of the output site that was not run: the errors in the full requests."""
    T = surrogate.num_steps
    own = {name: slice(c * T, (c + 1) * T) for c, name in enumerate(surrogate.contexts)}
    return expectations(
        plan.checks, {name: surrogate.grams[:, part, part] for name, part in own.items()}, measured=False
    )
