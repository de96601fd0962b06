"""`lesa.fit`: a schedule and weights for a budget, searched on statistics and judged by running requests."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models import hooks
from ..models.denoisers import denoiser_of
from ..models.requests import check_prompts
from ..models.works import Work, check_functions, works_of
from ..plans.plan import Plan
from . import candidates as own
from .goals import check_folder, check_goal, check_held_out, check_seed, check_steps, warn_if_few
from .session import EFFORTS, Session

__all__ = ["EFFORTS", "Session", "fit"]


def fit(
    target: Any,
    prompts: Sequence[str] | None = None,
    *,
    budget: int | Sequence[int] | None = None,
    target_psnr: float | None = None,
    speedup: float | None = None,
    requests: Sequence[Callable[[], Any]] | None = None,
    request: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    effort: str = "default",
    sigmas: Sequence[float] | None = None,
    guidance: Sequence[float] | None = None,
    held_out: int | None = None,
    candidates: Sequence[Plan | str | os.PathLike[str]] | None = None,
    batch: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Any:
    """Fit a plan: search its schedule, learn its weights, and judge both by running the requests.

    The fitting requests are run in full once. Their inner products (`lesa.statistics`) and a linear model of what the
    denoiser makes of errors (`lesa.planner`) give schedules and weights; the best are run, their weights bettered
    from what is measured, their computed steps moved. "thorough" begins as "default" and searches farther; it also runs
    a rule of each kind in `lesa.forecasters` at the output site, on the published schedule and on the searched one, and
    even and front-loaded schedules; and it trains the paper's own forecaster, "lesa", for the paper's schedule, unless
    that takes more than half of what the effort leaves after recording. What it left out, and why, is in `skipped` of
    the plan's `training`.

    The plan returned is the best one measured: no worse in mean PSNR on the fitting requests than the paper's schedule
    with Taylor's forecast at the same budget, nor than any of `candidates`, nor than the paper's schedule with the
    paper's forecaster where that was trained; "quick" measures none of them. With candidates=["lesa"] it is trained in
    any case.

    In memory are the outputs of all fitting requests (FLUX at 1024x1024, 50 steps, bfloat16: 26 MB each) and the
    features of one of them.

    The plan tells the guard which errors to expect where there are at least four requests and three computed steps;
    with "quick", which runs none of them by the plan, four besides those held out, and more vaguely. Else it has no
    guard.

    Args:
        target: a diffusers pipeline, or a bare denoiser in a loop of your own.
        prompts: for a pipeline, 8 suffice; they should be like those of later use.
        budget: computed steps, or several numbers of them.
        target_psnr: instead of a budget: the smallest one that reaches this PSNR in dB on the fitting requests.
        speedup: instead of a budget: how many times fewer steps are computed, e.g. 5.0.
        requests: instead of prompts: functions without arguments, each of which runs one request and may return its
            pictures or sample [1, ...].
        request: keyword arguments of the pipeline call, JSON-able, e.g. {"num_inference_steps": 50}.
        seeds: of each prompt's noise; the prompt's index by default.
        effort: "quick", "default" or "thorough": at most about 10, 40 and 300 full requests' time for one budget,
            recording of 8 included. "quick" runs one request (of a batch, all of its first call) by a first plan, to
            see how the denoiser answers errors, and compares nothing. With the others the floor, the searched plan
            and all candidates are run even where many prompts or candidates make that longer, and training that is
            asked for comes on top.
        sigmas: of a bare denoiser's requests, see `lesa.gathering.gather`.
        guidance: the weight of each context in what the scheduler is given, see `lesa.gathering.gather`.
        held_out: how many of the requests, the last ones, are kept out of fitting and only measured; by default an
            eighth of them, at least one where there are two.
        candidates: plans of your own, or what `Plan.from_pretrained` takes, of any site and forecaster, for requests of
            this kind: each is run at its budget beside the searched ones; not with `target_psnr`. Those at the output
            site whose rows can be written over computed steps are bettered like these. One that wins is returned as it
            is, with the figures of this fit in its `training` and its rows under the names of these requests' contexts.
            Each costs one run of the fitting requests by it. Or names of forecasters, each of which is run on the
            paper's schedule of the budget (the evenest, where the paper has none) and on the searched one: those of
            `lesa.forecasters`, e.g. "taylor-2", at the output site; and "lesa", whose experts are trained on the
            fitting prompts for each of both, by the paper's recipe without calibration, at the hidden site where that
            is known. Training records once more, on disk (FLUX at 1024x1024, 50 steps: 1.3 GB a prompt), and passes
            over that three times a schedule, twice of these in requests by it.
        batch: prompts run in one pipeline call.
        seed: of the order in which moves are tried, and of training.
        folder: keeps the statistics, each budget's plan and, in trials-<budget>, what was measured of each plan that
            was run. Budgets that lie there already are not fitted again, and a folder with plans of other requests is
            refused. A fit that was interrupted, or one with more effort, records again, but runs nothing again that it
            finds there, as long as the recording is bit-equal. So does training, in training/, where its recording lies
            until the fit is done; else in a temporary folder.

    Returns:
        A `Plan`, or for several budgets a dictionary of plans by budget. Its `training` says what it took and reached:
        `evaluations` counts the plans measured, of which `found` were found in the folder; `seconds` and `generations`
        include the time that these and training once took.

    Raises:
        ValueError: an argument is out of place, the folder holds plans of other requests, a candidate cannot be read,
            is for other requests or has none of the budgets, or no budget reaches `target_psnr`.
        StatisticsError: the requests are not of one kind, or their features are not finite.
        RecordingError: training that was asked for cannot record, e.g. since the disk is full.
    """
    if effort not in EFFORTS:
        raise ValueError(f"effort={effort!r}: expected one of {tuple(EFFORTS)}")
    wanted = check_goal(budget, target_psnr, speedup)
    if target_psnr is not None and effort == "quick":
        raise ValueError("target_psnr with effort='quick', which measures no plan: take another effort")
    hooks.check_free(target)
    names = own.names_of(candidates)
    if target_psnr is not None and any(one not in names for one in candidates or ()):
        raise ValueError(
            "plans as candidates with target_psnr: it is not known which budgets are tried; give a budget, or names "
            "of forecasters only"
        )
    if own.TRAINED in names and (requests is not None or isinstance(target, torch.nn.Module)):
        raise ValueError(
            f"candidates names {own.TRAINED!r}, which is trained on prompts of a pipeline, not on requests: train it "
            "apart and give its plan, candidates=[plan]"
        )
    if prompts is not None:
        check_prompts(prompts)
    if requests is not None:
        check_functions(requests)
    count = len(prompts if prompts is not None else requests or ())
    held_out = check_held_out(held_out, count)
    seed = check_seed(seed)
    plans = own.read(candidates, effort, wanted)
    own.check_denoiser(plans, denoiser_of(target))
    given, kept = request or {}, count - held_out
    numbers = list(range(count)) if seeds is None else list(seeds)
    if count and len(numbers) != count:
        raise ValueError(f"{len(numbers)} seeds for {count} requests: give one seed a request")

    def works(part: slice) -> list[Work]:
        some, functions = None if prompts is None else prompts[part], None if requests is None else requests[part]
        return works_of(target, some, functions, given, numbers[part], batch, **_pictures(target))

    fitting, held = works(slice(kept)), works(slice(kept, None)) if held_out else []
    if folder is not None:
        folder = check_folder(folder, wanted, [label for work in fitting for label in work.labels], numbers, given)
    unlearned = 0 if EFFORTS[effort].share else held_out  # what is not run by the plan
    warn_if_few(count - unlearned, unlearned)
    with Session(
        target,
        fitting,
        held,
        given,
        sigmas=sigmas,
        guidance=guidance,
        effort=effort,
        seed=seed,
        folder=folder,
        seeds=numbers,
        given=plans,
        names=names,
        prompts=None if prompts is None else prompts[:kept],
        check=lambda num_steps: check_steps(num_steps, wanted, speedup),
    ) as session:
        if target_psnr is not None:
            return session.reach(target_psnr)
        budgets = wanted or []
        if speedup is not None:
            budgets = [max(1, round(session.num_steps / speedup))]
            own.check_budgets(plans, budgets)
        fitted = {one: session.plan(one) for one in budgets}
    return next(iter(fitted.values())) if isinstance(budget, (int, np.integer)) or speedup is not None else fitted


def _pictures(target: Any) -> dict[str, Any]:
    """Keyword arguments that make a pipeline return pictures: that is what is judged."""
    return {} if isinstance(target, torch.nn.Module) else {"output_type": "np"}
