"""How: each forecasting rule as a function that returns one row of weights, and plans made of such rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike

from ..plans.plan import ANY_CONTEXT, Plan, Row
from ..plans.schedule import check
from .closed import chebyshev, hermite, reuse, taylor
from .learned import l2p, l2p_released, l2p_table, regression

__all__ = [
    *("FORECASTERS", "LEARNED", "check_rows", "chebyshev", "hermite", "l2p", "l2p_released", "l2p_table"),
    *("plan_of", "regression", "reuse", "rows_of", "taylor"),
]

FORECASTERS = (
    *("reuse", "taylor-<order>", "hermite-<order>", "chebyshev-<degree>"),
    *("regression", "l2p", "l2p-released"),
)
LEARNED = ("regression", "l2p", "l2p-released")  # these need a Gram matrix

_NUMBERED = re.compile(r"(taylor|hermite|chebyshev)-(\d+)")


def plan_of(
    forecaster: str,
    computed: Iterable[int],
    sigmas: Sequence[float],
    site: str = "hidden",
    gram: ArrayLike | Mapping[str, ArrayLike] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    **provenance: Any,
) -> Plan:
    """A plan that forecasts by one rule.

    Args:
        forecaster: one of `FORECASTERS` with its number in place, e.g. "taylor-2", "regression".
        computed: computed steps, ascending, 0 among them.
        sigmas: T + 1 noise levels, the final 0 included.
        site: "hidden" or "output".
        gram: for "regression" and "l2p": [T, T] of the same site, one for all contexts or one for each by name.
        options: keywords of the rule's function, e.g. {"scale": 0.7} or {"towards": "taylor-1"}.
        provenance: further fields of `Plan`, e.g. `timesteps`, `denoiser`.

    Returns:
        A plan whose rows serve every context, or those that `gram` names.

    Raises:
        ValueError: the name is unknown, its Gram matrix is missing, or a value is out of place.
    """
    num_steps, steps = len(sigmas) - 1, tuple(computed)
    shared = not isinstance(gram, Mapping) or forecaster not in LEARNED
    grams: Mapping[str, Any] = {ANY_CONTEXT: gram} if shared else gram  # type: ignore[assignment]
    if not grams:
        raise ValueError("gram names no context: give one [T, T] matrix, or a mapping from context to matrix")
    rows = {context: rows_of(forecaster, steps, num_steps, one, **(options or {})) for context, one in grams.items()}
    return Plan(steps, tuple(sigmas), rows, site=site, forecaster=forecaster, **provenance)


def rows_of(
    forecaster: str, computed: Iterable[int], num_steps: int, gram: ArrayLike | None = None, **options: Any
) -> dict[int, Row]:
    """The row of every forecast step.

    Args:
        forecaster: see `plan_of`.
        computed: computed steps, ascending, 0 among them.
        num_steps: T, steps of a request.
        gram: [T, T], for "regression" and "l2p".
        options: keywords of the rule's function.

    Returns:
        A row, over computed steps before it, for each step that is not computed.

    Raises:
        ValueError: as `plan_of`.
    """
    steps = check(computed, num_steps)
    return _rows(forecaster, steps, num_steps, sorted(set(range(num_steps)) - set(steps)), gram, options)


def check_rows(
    forecaster: str, computed: Iterable[int], num_steps: int, gram: ArrayLike | None = None, **options: Any
) -> dict[int, Row]:
    """The row that would have forecast each computed step, from the second on.

    Args:
        forecaster, computed, num_steps, gram, options: see `rows_of`.

    Returns:
        A row, over computed steps before it, for each computed step but the first.

    Raises:
        ValueError: as `plan_of`.
    """
    steps = check(computed, num_steps)
    return _rows(forecaster, steps, num_steps, steps[1:], gram, options)


def _rows(
    forecaster: str,
    computed: tuple[int, ...],
    num_steps: int,
    wanted: Sequence[int],
    gram: Any,
    options: Mapping[str, Any],
) -> dict[int, Row]:
    rule = _rule(forecaster, num_steps, gram, dict(options))
    return {step: rule([s for s in computed if s < step], step) for step in wanted}


def _rule(forecaster: str, num_steps: int, gram: Any, options: dict[str, Any]) -> Callable[[Sequence[int], int], Row]:
    """The function of (past, step) that `forecaster` names."""
    match = _NUMBERED.fullmatch(forecaster)
    if match is None and forecaster not in ("reuse", *LEARNED):
        expected = ", ".join(map(repr, FORECASTERS))
        raise ValueError(f"forecaster={forecaster!r}: expected one of {expected}, e.g. 'taylor-2'")
    if forecaster in LEARNED and gram is None:
        raise ValueError(f"forecaster={forecaster!r} needs gram: give the [T, T] Gram matrix of recorded requests")
    if match is not None:
        number = int(match[2])
        if match[1] == "chebyshev":
            return lambda past, step: chebyshev(past, step, num_steps, number, **options)
        numbered = taylor if match[1] == "taylor" else hermite
        return lambda past, step: numbered(past, step, number, **options)
    if forecaster == "reuse":
        return lambda past, step: reuse(past, step, **options)
    if forecaster == "l2p-released":
        table = l2p_table(gram, **options)
        return lambda past, step: l2p_released(past, step, table)
    learned = regression if forecaster == "regression" else l2p
    return lambda past, step: learned(past, step, gram, **options)
