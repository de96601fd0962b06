"""Plans made of statistics, and fitted plans adapted to other requests.

    plan_for:  statistics of full requests -> searched schedule -> the surrogate's best rows
    adapt:     a fitted plan's surrogate at other noise levels -> the schedule of least predicted error -> its best rows

Rows of weights are arrays [C, T, T] here: row t of context c on the features of earlier steps.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from .. import forecasters
from ..plans.plan import Plan
from ..plans.rows import ANY_CONTEXT, MAX_READS, Expected, PlanError, Row
from ..plans.schedule import noise_levels
from .search import search
from .statistics import GUIDED, Statistics, flow_impulse_response
from .surrogate import Segments, Surrogate, carry, unit_gains

FITTED = "fitted"
ENOUGH = 4  # requests, to estimate a standard deviation

_STEEPEST = 2.0  # an error gain that was not measured, in units of the final sample
_TINY = 1e-30
_LEAST_STD = 0.2  # that of a few requests may be small by chance
_DOUBT = 0.25  # added to it where the features are of full requests, not of requests run by the plan

# An evaluation of a schedule: so many steps of Gauss-Newton from linear extrapolation, on the newest steps' weights.
_HASTY, _HASTY_GUIDED, _NEWEST = 1, 2, 3
# How many schedules are evaluated, and about how many microseconds that may take, along with half of the search before
# it (T^2): a request waits for its plan. With guidance or many computed steps an evaluation takes longer.
_EVALUATIONS, _PATIENCE = 50, 15_000
_WORTH = 0.02  # of the objective, for a move: a smaller predicted gain is chance
_TOGETHER = (2, 1)  # computed steps, next to each other, that are moved at once
_KEPT = 4  # surrogates of plans, unpacked


def plan_for(
    statistics: Statistics,
    budget: int | float,
    sigmas: Sequence[float] | None = None,
    impulse_response: np.ndarray | None = None,
) -> Plan:
    """The plan of a request, of the output site: the best schedule and rows on statistics at its noise levels.

    Args:
        statistics: of full requests at the noise levels they were gathered at.
        budget: computed steps: a number of them, at least 1 (all steps where it exceeds T), or as a float in (0, 1] a
            share of them.
        sigmas: the T + 1 noise levels of the request, the final 0 included; those of the statistics by default.
        impulse_response: [T + 1, T], see `Statistics`; by default the flow-matching one, or without `sigmas` the
            statistics' own.

    Returns:
        A plan with rows for each context of the statistics; those of the first serve contexts not named there.

    Raises:
        ValueError: a value is out of range, or the statistics lack the output site.
    """
    native = sigmas is None
    if not native or impulse_response is not None:
        statistics = statistics.at(statistics.sigmas if sigmas is None else sigmas, impulse_response)
    total = statistics.num_steps
    computed = search(statistics.gram("output", GUIDED), statistics.impulse_response[-1], computed_steps(budget, total))
    training = {"requests": statistics.requests, "schedule": "searched"}
    timesteps = statistics.timesteps if native else None
    gains, grams = prior_error_gains(statistics, 1), statistics.grams["output"][None]
    surrogate = Surrogate(grams, statistics.impulse_response, np.asarray(statistics.guidance), gains)
    weights, _ = surrogate.optimise(computed, linear_extrapolation(computed, len(gains), total))
    return plan_from_weights(statistics, computed, weights, timesteps=timesteps, training=training)


def adapt(
    plan: Plan,
    budget: int | float | None = None,
    sigmas: Sequence[float] | None = None,
    impulse_response: np.ndarray | None = None,
) -> Plan:
    """A fitted plan adapted to another request, with its surrogate in place of new recordings.

    The schedule is the one with the best objective that the surrogate predicts: the searched one on the guided mean
    inner products, the fitted plan's own at the nearest noise levels, or one found by moving steps of these. The rows
    are the surrogate's best. The expected errors are those of its checks in the fitting requests.

    Args:
        plan: fitted, with a surrogate.
        budget: see `plan_for`; the plan's own by default, or all steps where there are fewer.
        sigmas: the T' + 1 noise levels of the request, the final 0 included; the plan's own by default.
        impulse_response: [T' + 1, T'], see `Statistics`; by default the flow-matching one, or without `sigmas` the
            plan's own.

    Returns:
        A plan of the same model without a surrogate; `plan` itself where nothing differs from it.

    Raises:
        PlanError: the plan has no surrogate.
        ValueError: another argument is out of range.
    """
    fitted = surrogate_of(plan)
    levels = plan.sigmas
    if sigmas is not None:  # by a user, unless with an impulse response: a scheduler's levels need not end at 0
        levels = noise_levels(sigmas) if impulse_response is None else tuple(sigmas)
    native = sigmas is None and impulse_response is None
    total = len(levels) - 1
    number = min(plan.budget, total) if budget is None else computed_steps(budget, total)
    if native and number == plan.budget:
        return plan
    model = fitted
    if not native:
        response = flow_impulse_response(levels) if impulse_response is None else impulse_response
        model = fitted.at(plan.sigmas, levels, response)
    there = statistics_of(plan, model, levels)
    schedules = {
        nearest(plan, levels, number): "nearest",
        search(there.gram("output", GUIDED), there.impulse_response[-1], number): "searched",
    }
    best = moved(model, schedules)
    weights, _ = model.optimise(best, linear_extrapolation(best, len(model.guidance), total))
    more: dict[str, Any] = {"training": {"requests": fitted.requests, "schedule": schedules.get(best, "moved")}}
    made = plan_from_weights(there, best, weights, timesteps=plan.timesteps if sigmas is None else None, **more)
    return replace(made, expected=expected_by(model, made))


_unpacked: OrderedDict[int, tuple[Mapping[str, np.ndarray], Surrogate]] = OrderedDict()


def surrogate_of(plan: Plan) -> Surrogate:
    """The surrogate of a fitted plan; that of the same arrays is kept, for unpacking takes longer than most searches.

    Raises:
        PlanError: the plan has none.
    """
    arrays = plan.surrogate
    if arrays is None:
        raise PlanError(
            f"the plan serves its own {plan.num_steps} steps only: it does not hold what it was fitted from; fit it "
            "again with this version of lesa.fit, or adapt the statistics of its requests"
        )
    known = _unpacked.get(id(arrays))
    if known is None:
        known = _unpacked[id(arrays)] = arrays, Surrogate.from_arrays(arrays)
        while len(_unpacked) > _KEPT:
            _unpacked.popitem(last=False)
    return known[1]


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


def default_budget(num_steps: int) -> int:
    """The computed steps where nobody says how many: 30 % of T, at least 4; half of 8 steps or fewer, rounded up."""
    return max(4, round(0.3 * num_steps)) if num_steps > 8 else (num_steps + 1) // 2


def statistics_of(plan: Plan, surrogate: Surrogate, sigmas: Sequence[float]) -> Statistics:
    """The statistics of the output site that a surrogate of a plan's model holds; its timesteps are the sigmas."""
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
    """The plan's schedule at the nearest of other noise levels, its density scaled to another budget.

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


def moved(model: Surrogate, schedules: Collection[tuple[int, ...]]) -> tuple[int, ...]:
    """The best schedule found by moving steps of some schedules, the best of them first, as long as time is left."""
    costs: dict[tuple[int, ...], float] = {}
    contexts = len(model.guidance)
    hasty = _HASTY if contexts == 1 else _HASTY_GUIDED
    allowed = (_PATIENCE - model.num_steps**2 // 2) // _microseconds(model, len(next(iter(schedules))))
    evaluations = min(_EVALUATIONS, allowed)

    def cost(computed: tuple[int, ...]) -> float:
        if computed not in costs:
            rows = linear_extrapolation(computed, contexts, model.num_steps)
            costs[computed] = Segments(model, computed, _NEWEST).optimise(rows, hasty)[1]
        return costs[computed]

    ends = []
    for best in sorted(schedules, key=cost):
        better: tuple[int, ...] | None = best
        while better is not None:
            best, better = better, None
            for moved in _neighbours(best, model.num_steps):
                if len(costs) >= evaluations:
                    break
                if cost(moved) < cost(best) - _WORTH:
                    better = moved
                    break
        ends.append(best)
    return min(ends, key=cost)


def _neighbours(computed: tuple[int, ...], num_steps: int) -> Iterator[tuple[int, ...]]:
    """The schedules with two neighbouring computed steps, or one, moved by one; late ones, which cost most, first."""
    for many in _TOGETHER:
        for i in range(len(computed) - many, 0, -1):
            for by in (1, -1):
                moved = (*computed[:i], *(step + by for step in computed[i : i + many]), *computed[i + many :])
                if moved[-1] < num_steps and all(before < after for before, after in pairwise(moved)):
                    yield moved


def _microseconds(model: Surrogate, budget: int) -> int:
    """About what an evaluation takes on one core: calls, a linear system of the weights, and reading Gram matrices."""
    C, T, _ = model.error_gains.shape
    return 400 + 2 * (C * budget) ** 2 // 3 + budget * (C * T) ** 2 // 800


def closed_form(statistics: Statistics, computed: Sequence[int], forecaster: str = "regression") -> np.ndarray:
    """The rows [C, T, T] of a forecaster at the output site."""
    T = statistics.num_steps
    tables = np.zeros((len(statistics.contexts), T, T))
    for table, context in zip(tables, statistics.contexts, strict=True):
        gram = statistics.gram("output", context)
        for step, row in forecasters.rows_of(forecaster, computed, T, gram).items():
            table[step, list(row.steps)] = row.weights
    return tables


def linear_extrapolation(computed: Sequence[int], contexts: int, num_steps: int) -> np.ndarray:
    """The rows [C, T, T] of "taylor-1", the same for all contexts, without a loop: where an optimisation starts."""
    steps, every = np.asarray(computed), np.arange(num_steps)
    last = np.searchsorted(steps, every, side="right") - 1
    rows, before = np.zeros((num_steps, num_steps)), np.maximum(last - 1, 0)
    slope = np.where(last > 0, (every - steps[last]) / np.maximum(steps[last] - steps[before], 1), 0.0)
    rows[every, steps[last]] = 1.0 + slope
    rows[every, steps[before]] -= slope
    rows[steps] = 0.0
    return np.broadcast_to(rows, (contexts, num_steps, num_steps)).copy()


def prior_error_gains(statistics: Statistics, requests: int) -> np.ndarray:
    """Error gains [C, T, P] of P requests without a measurement: those of predicting the noise, 1 / sigma, limited."""
    response = statistics.impulse_response
    gains = np.minimum(unit_gains(response), _STEEPEST * carry(response)[:-1])
    return np.broadcast_to(gains[None, :, None], (len(statistics.contexts), len(gains), requests)).copy()


def plan_from_weights(
    statistics: Statistics, computed: tuple[int, ...], weights: np.ndarray, **provenance: Any
) -> Plan:
    """The plan of rows [C, T, T] at the output site, with checks by regression.

    Args:
        statistics: of the requests.
        computed: the schedule.
        weights: [C, T, T].
        provenance: further fields of `Plan`, e.g. `training`.
    """
    contexts, T = statistics.contexts, statistics.num_steps
    rows, checks = {}, {}
    for c, context in enumerate(contexts):
        rows[context] = _rows(weights[c], computed)
        checks[context] = forecasters.check_rows("regression", computed, T, statistics.gram("output", context))
    served = served_by(statistics)
    return Plan(
        computed,
        statistics.sigmas,
        {name: rows[context] for name, context in served.items()},
        site="output",
        forecaster=FITTED,
        denoiser=statistics.denoiser,
        config_hash=statistics.config_hash,
        checks={name: checks[context] for name, context in served.items()},
        **provenance,
    )


def _rows(weights: np.ndarray, computed: tuple[int, ...]) -> dict[int, Row]:
    """Rows [T, T] as a plan has them."""
    rows = {}
    for step in sorted(set(range(len(weights))) - set(computed)):
        reads = [j for j in computed if j < step][-MAX_READS:]
        rows[step] = Row(tuple(reads), tuple(float(weights[step, j]) for j in reads))
    return rows


def written_out(plan: Plan, context: str) -> np.ndarray:
    """[T, T]: each step's feature as weights over computed ones, forecasts that rows read written out; without bias."""
    rows, every = plan.rows_of(context), np.eye(plan.num_steps)
    for step in sorted(rows):
        every[step] = np.asarray(rows[step].weights) @ every[list(rows[step].steps)]
    return every


def served_by(statistics: Statistics) -> dict[str, str]:
    """Which context's rows serve each context that a plan names."""
    # A request may name its contexts otherwise, or not at all: image-to-image pipelines do not.
    first = {ANY_CONTEXT: statistics.contexts[0]}
    return first if len(statistics.contexts) == 1 else first | {context: context for context in statistics.contexts}


def expected_by(surrogate: Surrogate, plan: Plan) -> dict[str, dict[int, Expected]]:
    """The expected errors of the checks of a plan that was not run: their errors in the full requests."""
    T = surrogate.num_steps
    own = [slice(c * T, (c + 1) * T) for c in range(len(surrogate.contexts))]
    grams = [surrogate.grams[:, part, part] for part in own]
    return expectations(plan.checks, dict(zip(surrogate.contexts, grams, strict=True)), measured=False)


def expectations(
    checks: Mapping[str, Mapping[int, Row]], grams: Mapping[str, np.ndarray], measured: bool
) -> dict[str, dict[int, Expected]]:
    """The expected errors of checks, except each context's first one.

    The first check sees how much one early step differs from the next. That scatters so widely between requests that a
    few of them give no useful standard deviation.

    Args:
        checks: as in `Plan.checks`.
        grams: for each context of the requests the inner products [P, T, T] of P requests' features at the T steps, the
            first also for names that are not among them, such as "*"; only steps of checks and of their reads count.
        measured: whether these requests were run by the plan; else its later checks will see somewhat larger errors.

    Returns:
        As in `Plan.expected`; nothing with fewer than `ENOUGH` requests.
    """
    expected: dict[str, dict[int, Expected]] = {}
    first = next(iter(grams.values()))
    for context, own in checks.items():
        gram = grams.get(context, first)
        if len(gram) >= ENOUGH:
            errors = {step: relative_errors(gram, step, own[step]) for step in sorted(own)[1:]}
            expected[context] = {step: _expected(found, measured) for step, found in errors.items()}
    return expected


def relative_errors(gram: np.ndarray, step: int, row: Row) -> np.ndarray:
    """[P]: ||F^ - F|| / ||F|| of a row at a step, out of inner products [P, T, T]."""
    involved = [*row.steps, step]
    own = gram[:, involved][:, :, involved]
    off = np.array([*row.weights, -1.0])
    squares = np.maximum(own @ off @ off, 0.0)
    return np.sqrt(squares / np.maximum(gram[:, step, step], _TINY))


def _expected(errors: np.ndarray, measured: bool) -> Expected:
    """Mean and standard deviation of the logarithm: errors of easy and hard requests differ by factors."""
    logs = np.log(np.maximum(errors, _TINY))
    # Of one more request, whose own deviation comes on top of that of the mean.
    std = max(float(logs.std(ddof=1)) * math.sqrt(1 + 1 / len(logs)), _LEAST_STD)
    return Expected(float(np.exp(logs.mean())), std if measured else math.hypot(std, _DOUBT))
