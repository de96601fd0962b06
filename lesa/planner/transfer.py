"""A fitted plan at other noise levels and budgets, made of the model of the requests it was fitted to."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..plans.plan import Expected, Plan, PlanError
from .expectations import expectations
from .search import search
from .statistics import GUIDED, Statistics, flow_impulse_response
from .surrogate import Surrogate
from .tables import linear_extrapolation, plan_of

# A look at a schedule: so many steps of Gauss-Newton from Taylor's rows on, on the weights of so many newest steps.
_HASTY, _HASTY_GUIDED, _NEWEST = 1, 2, 3
# How many schedules are looked at for a better one, and about how many microseconds that may take, along with half of
# the search before it (T^2): a plan is made while one waits. With guidance or many computed steps a look takes longer.
_LOOKS, _PATIENCE = 50, 15_000
_WORTH = 0.02  # of the objective, for a move: what is promised less than that is chance
_TOGETHER = (2, 1)  # computed steps, next to each other, that are moved at once


def adapted(
    plan: Plan,
    budget: int | float | None = None,
    sigmas: Sequence[float] | None = None,
    impulse_response: np.ndarray | None = None,
) -> Plan:
    """The plan of another request, as near to a fit of its own as the fitted one's surrogate tells.

    Its schedule is the one of which the surrogate promises most: the searched one on the guided mean inner products,
    the fitted plan's own at the nearest noise levels, or what moving steps of these by one leads to. Its rows are the
    surrogate's best.

    What the guard may expect are the errors that its checks would have made in the fitting requests.

    Args:
        plan: fitted, with a surrogate.
        budget: see `lesa.adapting.plan_for`; the plan's own by default, or all steps where there are fewer.
        sigmas: the T' + 1 noise levels of the request, the final 0 included; the plan's own by default.
        impulse_response: [T' + 1, T'], see `Statistics`; by default the flow-matching one, or without `sigmas` the
            plan's own.

    Returns:
        A plan of the same model without a surrogate; `plan` itself where nothing differs from it.

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
    native, levels = (
        sigmas is None and impulse_response is None,
        plan.sigmas if sigmas is None else tuple(map(float, sigmas)),
    )
    total = len(levels) - 1
    number = min(plan.budget, total) if budget is None else computed_steps(budget, total)
    if native and number == plan.budget:
        return plan
    model = surrogate
    if not native:
        model = surrogate.at(
            plan.sigmas, levels, flow_impulse_response(levels) if impulse_response is None else impulse_response
        )
    there = statistics_of(plan, model, levels)
    schedules = {
        nearest(plan, levels, number): "nearest",
        search(there.gram("output", GUIDED), there.impulse_response[-1], number): "searched",
    }
    best = _moved(model, schedules)
    weights, _ = model.optimise(best, linear_extrapolation(best, len(model.guidance), total))
    more: dict[str, Any] = {"training": {"requests": surrogate.requests, "schedule": schedules.get(best, "moved")}}
    made = plan_of(there, best, weights, timesteps=plan.timesteps if sigmas is None else None, **more)
    return replace(made, expected=expected_by(model, made), likeness=plan.likeness)


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


def statistics_of(plan: Plan, surrogate: Surrogate, sigmas: Sequence[float]) -> Statistics:
    """The statistics of the output site that a surrogate of a plan's model holds; their timesteps are none."""
    return Statistics(
        sigmas=tuple(sigmas),
        timesteps=tuple(sigmas[:-1]),
        contexts=surrogate.contexts,
        guidance=tuple(surrogate.guidance.tolist()),
        grams={"output": surrogate.grams.mean(0)},
        impulse_response=surrogate.impulse_response,
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


def _moved(model: Surrogate, schedules: Collection[tuple[int, ...]]) -> tuple[int, ...]:
    """The best schedule found by moving steps of some schedules, the best of them first, as long as looks are left."""
    prices: dict[tuple[int, ...], float] = {}
    contexts = len(model.guidance)
    hasty = _HASTY if contexts == 1 else _HASTY_GUIDED
    looks = min(_LOOKS, (_PATIENCE - model.num_steps**2 // 2) // _microseconds(model, len(next(iter(schedules)))))

    def price(computed: tuple[int, ...]) -> float:
        if computed not in prices:
            rows = linear_extrapolation(computed, contexts, model.num_steps)
            prices[computed] = model.on(computed, _NEWEST).optimise(rows, hasty)[1]
        return prices[computed]

    ends = []
    for best in sorted(schedules, key=price):
        better: tuple[int, ...] | None = best
        while better is not None:
            best, better = better, None
            for moved in _neighbours(best, model.num_steps):
                if len(prices) >= looks:
                    break
                if price(moved) < price(best) - _WORTH:
                    better = moved
                    break
        ends.append(best)
    return min(ends, key=price)


def _neighbours(computed: tuple[int, ...], num_steps: int) -> Iterator[tuple[int, ...]]:
    """The schedules with two neighbouring computed steps, or one, moved by one; late ones, which cost, first."""
    for many in _TOGETHER:
        for i in range(len(computed) - many, 0, -1):
            for by in (1, -1):
                moved = (*computed[:i], *(step + by for step in computed[i : i + many]), *computed[i + many :])
                if moved[-1] < num_steps and all(before < after for before, after in pairwise(moved)):
                    yield moved


def _microseconds(model: Surrogate, budget: int) -> int:
    """About what a look takes on one core: calls, a system of so many weights, and the Gram matrices it reads."""
    C, T, _ = model.error_gains.shape
    return 400 + 2 * (C * budget) ** 2 // 3 + budget * (C * T) ** 2 // 800


def expected_by(surrogate: Surrogate, plan: Plan) -> dict[str, dict[int, Expected]]:
    """What the guard may expect of a plan of the output site that was not run: the errors in the full requests."""
    T = surrogate.num_steps
    own = {name: slice(c * T, (c + 1) * T) for c, name in enumerate(surrogate.contexts)}
    return expectations(
        plan.checks, {name: surrogate.grams[:, part, part] for name, part in own.items()}, measured=False
    )
