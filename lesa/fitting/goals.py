"""What `lesa.fit` is asked for, checked before anything runs or as soon as the first request tells its steps."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from ..planner.build import ENOUGH
from ..plans import files
from ..plans.plan import Plan, PlanError
from ..runtime.driver import LesaWarning


def check_goal(budget: Any, target_psnr: Any, speedup: Any) -> list[int] | None:
    """The budgets that are asked for; None where they follow from a PSNR or a speed-up.

    Raises:
        ValueError: not one of the three is given, or it is no number that can be reached.
    """
    goals = {"budget": budget, "target_psnr": target_psnr, "speedup": speedup}
    given = [f"{name}={goal!r:.80}" for name, goal in goals.items() if goal is not None]
    if len(given) != 1:
        both = f", not {' and '.join(given)}" if given else ""
        raise ValueError(f"give one of budget, target_psnr and speedup{both}")
    if target_psnr is not None and not (_is_number(target_psnr) and 0 < target_psnr < math.inf):
        raise ValueError(f"target_psnr={target_psnr!r}: expected a number of dB above 0, e.g. 40.0")
    if speedup is not None and not (_is_number(speedup) and 1 < speedup < math.inf):
        raise ValueError(f"speedup={speedup!r}: expected a number above 1, e.g. 5.0 for a fifth of the steps")
    if budget is None:
        return None
    listed = isinstance(budget, (Sequence, np.ndarray)) and not isinstance(budget, str)
    several = list(budget) if listed else [budget]
    whole = (isinstance(one, (int, np.integer)) and not isinstance(one, bool) and one >= 1 for one in several)
    if not several or not all(whole):
        raise ValueError(f"budget={budget!r}: expected 1 or more computed steps, or a list of such numbers")
    return [int(one) for one in several]


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


def warn_if_few(count: int, held_out: int) -> None:
    """Say so where a fit learns no errors for the guard to expect.

    Args:
        count: requests that it could learn them from.
        held_out: others, which it does not.
    """
    if count < ENOUGH:
        besides = f" besides {held_out} held out (held_out=)" if held_out else ""
        warnings.warn(
            f"the plan will have no guard: it takes {ENOUGH} requests to learn which errors to expect, here are "
            f"{count}{besides}; 8 prompts suffice for all",
            LesaWarning,
            stacklevel=3,
        )


def check_steps(num_steps: int, budgets: Sequence[int] | None, speedup: float | None = None) -> None:
    """Check a goal against the steps of a request.

    Raises:
        ValueError: it computes more steps than there are, or none.
    """
    wrong = next((budget for budget in budgets or () if not 1 <= budget <= num_steps), None)
    if wrong is not None:
        raise ValueError(f"budget={wrong}: expected 1 to {num_steps} computed steps, as many as a request has")
    if speedup is not None and speedup > num_steps:
        raise ValueError(f"speedup={speedup:g}: a request has {num_steps} steps, one of which has to be computed")


def check_folder(
    folder: Any, budgets: Sequence[int] | None, labels: Sequence[str], seeds: Sequence[int], request: Mapping[str, Any]
) -> Path:
    """Check that a fit can write to a folder, and that nothing in it would be lost.

    Args:
        folder: see `lesa.fit`.
        budgets: whose plans will be written; None for any.
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
    files.check_folder(folder, "folder")
    which = ["*"] if budgets is None else budgets
    paths = [path for one in which for path in folder.glob(f"plan-{one}.safetensors")]
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


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
