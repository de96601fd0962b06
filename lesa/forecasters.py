"""How, in closed form: published forecasting rules as rows of weights over the computed steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import factorial
from typing import Any

from .plan import ANY_CONTEXT, MAX_READS, Plan, Row
from .schedule import check

_TAYLOR = re.compile(r"taylor-(\d+)")


def reuse(past: Sequence[int], step: int) -> Row:
    """The newest computed feature again (FORA): F^_t = F_{s_j}.

    Args:
        past: computed steps before `step`, ascending, at least one.
        step: t, the step to forecast.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`.
    """
    return taylor(past, step, order=0)


def taylor(past: Sequence[int], step: int, order: int) -> Row:
    """Taylor forecast from recursive differences (TaylorSeer).

    D^0_j = F_{s_j}, D^i_j = (D^{i-1}_j - D^{i-1}_{j-1}) / (s_j - s_{j-1}) over computed steps s;
    F^_t = sum_{i <= order} D^i_j x^i / i! with x = t - s_j. Exact on sequences linear in the step.

    Args:
        past: computed steps before `step`, ascending, at least one.
        step: t, the step to forecast.
        order: highest difference used, 0 (reuse) to 15; lower where `past` has too few steps.

    Returns:
        A row over the newest `order + 1` steps of `past`.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`; `order` is outside its range.
    """
    if not 0 <= order < MAX_READS:
        raise ValueError(f"order={order}: expected 0 to {MAX_READS - 1}; a row reads at most {MAX_READS} steps")
    if not past or not all(a < b for a, b in pairwise((-1, *past, step))):
        raise ValueError(f"past={tuple(past)}: expected ascending computed steps before step {step}")
    steps = tuple(past[-order - 1 :])
    # one list a computed step: the weights of every feature in its D^i
    differences = [[float(j == k) for k in range(len(steps))] for j in range(len(steps))]
    weights = differences[-1]
    for i in range(1, len(steps)):
        gaps = [new - old for old, new in pairwise(steps[i - 1 :])]
        differences = [
            [(n - o) / gap for o, n in zip(old, new, strict=True)]
            for (old, new), gap in zip(pairwise(differences), gaps, strict=True)
        ]
        factor = (step - steps[-1]) ** i / factorial(i)
        weights = [w + factor * d for w, d in zip(weights, differences[-1], strict=True)]
    return Row(steps, tuple(weights))


def plan_of(
    forecaster: str,
    computed: Iterable[int],
    sigmas: Sequence[float],
    site: str = "hidden",
    **provenance: Any,
) -> Plan:
    """A plan that forecasts by a published rule.

    Args:
        forecaster: "reuse" or "taylor-<order>", e.g. "taylor-2".
        computed: computed steps, ascending, 0 among them.
        sigmas: T + 1 noise levels, the final 0 included.
        site: "hidden" or "output".
        provenance: further fields of `Plan`, e.g. `timesteps`, `denoiser`.

    Returns:
        A plan whose rows serve every context.

    Raises:
        ValueError: the name is unknown or a value is out of place.
    """
    match = _TAYLOR.fullmatch(forecaster)
    if forecaster != "reuse" and match is None:
        raise ValueError(f"forecaster={forecaster!r}: expected 'reuse' or 'taylor-<order>', e.g. 'taylor-2'")
    order = int(match[1]) if match else 0
    steps = check(computed, len(sigmas) - 1)
    rows = {
        step: taylor([s for s in steps if s < step], step, order)
        for step in range(len(sigmas) - 1)
        if step not in steps
    }
    return Plan(steps, tuple(sigmas), {ANY_CONTEXT: rows}, site=site, forecaster=forecaster, **provenance)
