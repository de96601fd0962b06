"""Plans of one's own and forecasters by name that a fit measures beside the plans it searches."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..forecasters import FORECASTERS, rows_of
from ..models.denoisers import check_fit
from ..planner.build import served_by, written_out
from ..planner.statistics import Statistics
from ..plans.plan import MAX_READS, Plan, PlanError

TRAINED = "lesa"  # the forecaster that is no rule
NAMES = (*FORECASTERS, TRAINED)
_NAMED = re.compile("|".join(re.sub("<.*>", r"\\d+", name) for name in NAMES))
_SAME = 1e-4  # of sigma, as between requests of one kind


@dataclass(frozen=True)
class Given:
    """A plan of the user's, and how it is called in errors and figures."""

    name: str
    plan: Plan


def names_of(candidates: Sequence[Plan | str | os.PathLike[str]] | None) -> list[str]:
    """The forecasters among what `lesa.fit(candidates=...)` names, each once.

    Raises:
        ValueError: it is no list of plans, paths and names, or a name's number is outside its range.
    """
    if isinstance(candidates, (Plan, str, os.PathLike)):
        raise ValueError(f"candidates is one {type(candidates).__name__}: give a list, e.g. candidates=[plan]")
    found = []
    for i, one in enumerate(candidates or ()):
        if not isinstance(one, (Plan, str, os.PathLike)):
            raise ValueError(
                f"candidates[{i}] is a {type(one).__name__}: expected a Plan, the path of one, or a forecaster's name"
            )
        if isinstance(one, str) and _NAMED.fullmatch(one):
            if one != TRAINED:
                _check_number(i, one)
            found.append(one)
    return list(dict.fromkeys(found))


def read(
    candidates: Sequence[Plan | str | os.PathLike[str]] | None,
    effort: str = "default",
    budgets: Collection[int] | None = None,
) -> list[Given]:
    """The plans that `lesa.fit(candidates=...)` names.

    Args:
        candidates: plans, what `Plan.from_pretrained` takes, or names of forecasters, which are passed over.
        effort: of the fit.
        budgets: those asked for, where they are known.

    Raises:
        PlanError: one of them cannot be read.
        ValueError: see `names_of`; or a plan has none of the budgets, or the effort compares nothing.
    """
    names = names_of(candidates)
    given = []
    for i, one in enumerate(candidates or ()):
        if isinstance(one, Plan):
            given.append(Given(f"candidate {i} ({one.forecaster}, {one.site} site)", one))
        elif one not in names:
            given.append(Given(f"candidate {i} ({Path(one).name})", _load(one)))
    if candidates and effort == "quick":
        raise ValueError("candidates with effort='quick', which compares nothing: take another effort, or give none")
    if budgets is not None:
        check_budgets(given, budgets)
    return given


def check_denoiser(given: Sequence[Given], denoiser: torch.nn.Module) -> None:
    """Check that each was made for this denoiser.

    Raises:
        ValueError: one was not.
    """
    for one in given:
        try:
            check_fit(one.plan, denoiser)
        except PlanError as error:
            raise ValueError(f"{one.name} cannot be run: {error}, or leave it out") from error


def check_budgets(given: Sequence[Given], budgets: Collection[int]) -> None:
    """Check that each has one of the budgets asked for.

    Raises:
        ValueError: one has not.
    """
    for one in given:
        if one.plan.budget not in budgets:
            raise ValueError(
                f"{one.name} computes {one.plan.budget} steps, which is none of the budgets asked for "
                f"({', '.join(map(str, sorted(budgets)))}): add budget {one.plan.budget}, or leave it out"
            )


def check_requests(given: Sequence[Given], statistics: Statistics) -> None:
    """Check that each was made for requests like the recorded ones.

    Raises:
        ValueError: one was not.
    """
    for one in given:
        reason = misfit(one.plan, statistics)
        if reason is not None:
            raise ValueError(f"{one.name} does not fit the requests: {reason}; make it for these, or leave it out")


def misfit(plan: Plan, statistics: Statistics) -> str | None:
    """Why a plan does not serve requests of this kind; None where it does."""
    if plan.num_steps != statistics.num_steps:
        return f"it was made for {plan.num_steps} steps, they have {statistics.num_steps}"
    gap = float(np.abs(np.subtract(plan.sigmas, statistics.sigmas)).max())
    if gap > _SAME:
        return f"its sigmas differ from theirs by up to {gap:.3g}"
    if None not in (plan.config_hash, statistics.config_hash) and plan.config_hash != statistics.config_hash:
        return f"its denoiser has configuration {plan.config_hash}, theirs {statistics.config_hash}"
    missing = [context for context in statistics.contexts if not plan.rows_of(context)]
    if missing and plan.budget < plan.num_steps:
        return f"it has no rows for context {missing[0]!r}"
    return None


def served(plan: Plan, statistics: Statistics) -> Plan:
    """The plan with rows, checks and what is expected of these under the names that such requests use for contexts."""
    names = served_by(statistics)
    tables = {"rows": plan.rows_of, "checks": plan.checks_of, "expected": plan.expected_of}
    found: dict[str, Any] = {
        table: {name: own for name, context in names.items() if (own := own_of(context))}
        for table, own_of in tables.items()
    }
    return replace(plan, **found)


def table_of(plan: Plan, contexts: Sequence[str]) -> np.ndarray | None:
    """The rows [C, T, T] of a plan over computed steps, with forecasts that rows read written out in these.

    Returns:
        None where such rows cannot say what the plan does: they are of another site, have a bias, or would read more
        computed steps than a row can.
    """
    if plan.site != "output":
        return None
    if any(row.bias for context in contexts for row in plan.rows_of(context).values()):
        return None
    table = np.stack([written_out(plan, context) for context in contexts])
    table[:, list(plan.computed)] = 0.0
    return table if expressible(table, plan.computed) else None


def expressible(weights: np.ndarray, computed: Sequence[int]) -> bool:
    """Whether each row [C, T, T] reads only the newest computed steps before its own, as many as a row can."""
    T = weights.shape[-1]
    read = np.zeros((T, T), bool)
    for step in set(range(T)) - set(computed):
        read[step, [j for j in computed if j < step][-MAX_READS:]] = True
    return not weights[:, ~read].any() and bool(np.isfinite(weights).all())


def _check_number(index: int, name: str) -> None:
    try:
        rows_of(name, (0,), 2, np.eye(2))
    except ValueError as error:
        raise ValueError(f"candidates[{index}]={name!r}: {error}") from None


def _load(one: str | os.PathLike[str]) -> Plan:
    try:
        return Plan.from_pretrained(one)
    except PlanError as error:
        raise PlanError(f"{error}; forecasters that are known by name are {', '.join(NAMES)}") from error
