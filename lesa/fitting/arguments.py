"""What `lesa.fit` is asked for, checked before anything runs or as soon as the first request tells its steps."""

from __future__ import annotations

import inspect
import json
import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.layouts import check_fit
from ..models.pipeline import PART
from ..planner.build import ENOUGH
from ..planner.statistics import Statistics, apart_from_flow, guidance_of
from ..plans import storage
from ..plans.plan import Plan
from ..plans.rows import LesaWarning, PlanError
from ..plans.schedule import noise_levels
from ..runtime.clock import BFLOAT16, sigmas_of

_SAME = 1e-4  # of sigma, as between requests of one kind
_TINY = 1e-30
_GIVE = "give scheduler=, the diffusers scheduler of the loop, or sigmas=, its T + 1 noise levels"
# Shares of the sample's change that a model of it leaves unexplained. Samplers of higher order along a flow leave 0.1,
# bfloat16 samples 0.1 in 50 steps; what is no flow 0.3 and more.
_FLOW = 0.25
_CERTAIN, _UNCERTAIN = 0.25, 0.5  # of the weights of guidance: with which a scale is not asked, and a user is told
_DIGITS = 3  # kept of weights found: a device that rounds otherwise finds the same
_CLOSE = 0.1  # relative, between weights found and known: Qwen-Image's rescaled sum


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


def check_loop(target: Any, sigmas: Any, scheduler: Any, guidance: Any) -> None:
    """Check what is told of a loop of one's own before anything runs.

    Raises:
        ValueError: a pipeline has it itself, or sigmas, scheduler or guidance are none.
    """
    bare = isinstance(target, torch.nn.Module)
    for name, value in {"sigmas": sigmas, "scheduler": scheduler}.items():
        if value is not None and not bare:
            raise ValueError(f"{name} is given together with a pipeline: its scheduler has them; leave it out")
    if sigmas is not None and scheduler is not None:
        raise ValueError("sigmas, scheduler: both are given; a scheduler has its sigmas, leave them out")
    if sigmas is not None:
        noise_levels(sigmas)
    if scheduler is not None and not (hasattr(scheduler, "timesteps") and hasattr(scheduler, "step")):
        raise ValueError(f"scheduler is a {type(scheduler).__name__}: expected a diffusers scheduler")
    try:
        finite = guidance is None or all(math.isfinite(weight) for weight in guidance)
    except TypeError:
        finite = False
    if not finite:
        raise ValueError(f"guidance={guidance!r:.80}: expected a list of finite weights, one a context, e.g. [3, -2]")


def levels_of_loop(timesteps: Sequence[float], sigmas: Any, scheduler: Any) -> tuple[float, ...]:
    """The T + 1 noise levels of a loop of one's own that ran T timesteps.

    Raises:
        ValueError: `sigmas` or `scheduler` do not fit the timesteps, or these are not those of flow matching.
    """
    if sigmas is not None:
        return noise_levels(sigmas, len(timesteps))
    if scheduler is not None:
        own = torch.as_tensor(scheduler.timesteps).double().cpu().numpy()[-len(timesteps) :]
        size = max(np.abs(own).max(), _TINY) if len(own) == len(timesteps) else math.nan
        # Some denoisers take timesteps as they are, others from 0 to 1.
        if not any(np.allclose(np.multiply(timesteps, scale), own, 0, BFLOAT16 * size) for scale in (1, 1000)):
            raise ValueError(
                f"scheduler={type(scheduler).__name__} has {len(scheduler.timesteps)} timesteps {own.tolist()!r:.60}, "
                f"the loop ran {len(timesteps)}, {list(timesteps)!r:.60}: give the scheduler of the loop after its "
                "set_timesteps"
            )
        return sigmas_of(scheduler)[-len(timesteps) - 1 :]
    highest = max(timesteps)
    if highest > 1000 or min(timesteps) < 0:
        raise ValueError(
            f"timesteps from {min(timesteps):g} to {highest:g} are not those of flow matching (sigma, or "
            f"1000 * sigma): {_GIVE}"
        )
    scale = 1.0 if highest <= 1 else 1000.0
    return (*(timestep / scale for timestep in timesteps), 0.0)


def check_flow(
    changes: np.ndarray | None, guidance: Sequence[float], sigmas: Sequence[float], timesteps: Sequence[float]
) -> None:
    """Check that a loop whose timesteps were taken for noise levels runs along a flow.

    Args:
        changes: of the sample, see `guidance_of`; None where they are not known.
        guidance: weights of the outputs.
        sigmas: T + 1.
        timesteps: T.

    Raises:
        ValueError: its samples change otherwise.
    """
    apart = 0.0 if changes is None or not np.isfinite(changes).all() else apart_from_flow(changes, guidance, sigmas)
    if apart > _FLOW:
        raise ValueError(
            f"timesteps from {max(timesteps):g} to {min(timesteps):g} would be those of flow matching, but the samples "
            f"do not change as along a flow ({apart:.0%} of the change is another): {_GIVE}"
        )


def guidance_weights(
    target: Any,
    request: Mapping[str, Any],
    names: Sequence[str],
    changes: np.ndarray | None,
    given: Sequence[float] | None,
) -> tuple[float, ...]:
    """The weight of each context, or of each part of a batch, in what the scheduler is given.

    Args:
        target: a pipeline or a bare denoiser.
        request: keyword arguments of the pipeline call.
        names: of the contexts or parts.
        changes: of the sample, see `guidance_of`; None where they are not known.
        given: the user's weights.

    Raises:
        ValueError: the user's weights are not one for each name.
    """
    if given is not None:
        if len(given) != len(names) or (len(names) == 1 and given[0] != 1):
            alone = "one call a step has weight 1, leave guidance out" if len(names) == 1 else "give as many weights"
            raise ValueError(f"guidance={tuple(given)!r:.80} for {list(names)}: {alone}")
        return tuple(float(weight) for weight in given)
    if len(names) == 1:
        return (1.0,)
    known = _guidance_by_scale(target, request, names)
    found = None if changes is None or not np.isfinite(changes).all() else guidance_of(changes)
    if found is not None and (known is None or found[1] <= _CERTAIN):
        weights, share = tuple(round(float(weight), _DIGITS) for weight in found[0]), found[1]
        if known is not None and np.allclose(weights, known, 0, _CLOSE * np.abs(known).max()):
            return known
        if share > _UNCERTAIN:
            told = ", ".join(f"{weight:.3g}" for weight in weights)
            warnings.warn(
                f"the sampler does more with {list(names)} than to sum them ({share:.0%} of what it does to the sample "
                f"is another): their weights are taken to be ({told}); give guidance, one weight each",
                LesaWarning,
                stacklevel=4,
            )
        return weights
    if known is None:
        warnings.warn(
            f"what the scheduler is given is not known from {list(names)} and the request: it is taken to be "
            f"{names[0]!r} alone; give guidance, one weight each",
            LesaWarning,
            stacklevel=4,
        )
    return known or (1.0, *(0.0 for _ in names[1:]))


def _guidance_by_scale(target: Any, request: Mapping[str, Any], names: Sequence[str]) -> tuple[float, ...] | None:
    """The weights of classifier-free guidance of two, by its scale; None where there is none."""
    scale = _argument(target, request, "true_cfg_scale")
    if scale is None or scale <= 1:
        scale = _argument(target, request, "guidance_scale")
    if scale is None or len(names) != 2:
        return None
    first = 0 if names[0].startswith(PART) else 1  # of a batch, diffusers' pipelines have the unconditional part first
    unconditional = next((i for i, name in enumerate(names) if "uncond" in name or "neg" in name), first)
    return tuple(1 - scale if i == unconditional else scale for i in range(2))


def _argument(target: Any, request: Mapping[str, Any], name: str) -> float | None:
    """An argument of the pipeline call, or its default."""
    value = request.get(name)
    if value is None and not isinstance(target, torch.nn.Module):
        parameter = inspect.signature(target.__call__).parameters.get(name)
        value = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return None if value is None else float(value)


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
        raise ValueError("candidates with effort='quick', which runs none: take another effort, or give none")
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
