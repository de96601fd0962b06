"""What `lesa.fit` is asked for, checked before anything runs or as soon as the first request tells its steps."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.layouts import check_fit
from ..planner.build import ENOUGH
from ..planner.statistics import Statistics
from ..plans import storage
from ..plans.plan import Plan
from ..plans.rows import LesaWarning, PlanError

_SAME = 1e-4  # of sigma, as between requests of one kind


@dataclass(frozen=True)
class Given:
    """A plan of the user's, and how it is called in errors and figures."""

    name: str
    plan: Plan


def check_budget(budget: Any) -> list[int | float]:
    """The budgets that are asked for: whole numbers of steps, and shares as floats.

    Raises:
        ValueError: it is no number of steps, no share, and no list of these.
    """
    several = list(budget) if is_list(budget) else [budget]
    if not several or not all(_is_steps(one) or _is_share(one) for one in several):
        raise ValueError(
            f"budget={budget!r:.80}: expected 1 or more computed steps, or a share of the steps above 0 and up to 1.0, "
            "e.g. 0.2, or a list of these"
        )
    return [int(one) if _is_steps(one) else float(one) for one in several]


def is_list(budget: Any) -> bool:
    """Whether a budget is several of them."""
    return isinstance(budget, (Sequence, np.ndarray)) and not isinstance(budget, str)


def budgets_of(wanted: Sequence[int | float], num_steps: int) -> list[int]:
    """The budgets asked for in steps, each once.

    Raises:
        ValueError: one is more than the steps of a request.
    """
    budgets = [one if isinstance(one, int) else max(1, round(one * num_steps)) for one in wanted]
    wrong = next((one for one in budgets if not 1 <= one <= num_steps), None)
    if wrong is not None:
        raise ValueError(f"budget={wrong}: expected 1 to {num_steps} computed steps, as many as a request has")
    return list(dict.fromkeys(budgets))


def check_held_out(held_out: Any, count: int) -> int:
    """How many of `count` requests are kept out of fitting, see `lesa.fit`.

    Raises:
        ValueError: it is no number of requests that leaves one to fit to.
    """
    if held_out is None:
        return max(1, count // 8) if count > 1 else 0
    if not isinstance(held_out, (int, np.integer)) or not 0 <= held_out < max(count, 1):
        raise ValueError(f"held_out={held_out!r} of {count} requests: at least one must be left to fit to")
    return int(held_out)


def check_seed(seed: Any) -> int:
    """The seed of a search.

    Raises:
        ValueError: it is no whole number of at least 0.
    """
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed={seed!r}: expected a whole number of at least 0")
    return int(seed)


def check_fit_folder(
    folder: Any,
    budgets: Sequence[int | float],
    labels: Sequence[str],
    seeds: Sequence[int],
    request: Mapping[str, Any],
) -> Path:
    """Check that a fit can write to a folder, and that nothing in it would be lost.

    Args:
        folder: see `lesa.fit`.
        budgets: whose plans will be written; shares stand for any number.
        labels: of the requests that are fitted to.
        seeds: of all requests.
        request: keyword arguments of the pipeline call.

    Returns:
        The folder.

    Raises:
        ValueError: it is no path, the folder cannot be made, or a plan there was fitted to other requests.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"folder={folder!r}: expected a path")
    folder = Path(folder)
    storage.check_folder(folder, "folder")
    which = {str(one) if isinstance(one, int) else "*" for one in budgets}
    paths = {path for one in which for path in folder.glob(f"plan-{one}.safetensors")}
    now = json.loads(json.dumps({"prompts": list(labels), "seeds": list(seeds), "request": dict(request)}))
    for path in sorted(paths):
        try:
            before = Plan.load(path).training
        except PlanError:  # none, or damaged
            continue
        other = [name for name, value in now.items() if name in before and before[name] != value]
        if other:
            raise ValueError(
                f"folder={str(folder)!r} holds {path.name}, fitted to other requests (another {', '.join(other)}): "
                "name another folder, or move that file away"
            )
    return folder


def warn_if_few(count: int, held_out: int) -> None:
    """Warn where a plan will not know expected errors.

    Args:
        count: requests that a fit could learn them from.
        held_out: others, from which it cannot.
    """
    if count < ENOUGH:
        besides = f" besides {held_out} held out" if held_out else ""
        warnings.warn(
            f"the plan will not know expected errors: that takes {ENOUGH} requests, here are {count}{besides}; give 8 "
            "prompts",
            LesaWarning,
            stacklevel=3,
        )


def read_candidates(candidates: Sequence[Plan | str | os.PathLike[str]], effort: str) -> list[Given]:
    """The plans of `lesa.fit(candidates=...)`.

    Raises:
        PlanError: one of them cannot be read.
        ValueError: it is no list of plans and paths, or the effort compares nothing.
    """
    if candidates is not None and (isinstance(candidates, str) or not isinstance(candidates, Sequence)):
        raise ValueError(f"candidates is one {type(candidates).__name__}: give a list, e.g. candidates=[plan]")
    given = []
    for i, one in enumerate(candidates or ()):
        if isinstance(one, Plan):
            given.append(Given(f"candidate {i} ({one.forecaster}, {one.site} site)", one))
        elif isinstance(one, (str, os.PathLike)):
            given.append(Given(f"candidate {i} ({Path(one).name})", Plan.from_pretrained(one)))
        else:
            raise ValueError(f"candidates[{i}] is a {type(one).__name__}: expected a Plan, or the path of one")
    if given and effort == "quick":
        raise ValueError("candidates with effort='quick', which compares nothing: take another effort, or give none")
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


def _is_steps(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def _is_share(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and bool(0 < value <= 1)
