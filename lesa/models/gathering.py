"""Gather `Statistics`: run full requests, add up the inner products of their features, and drop the features."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..planner.statistics import Statistics, StatisticsError, flow_impulse_response
from ..plans.rows import SITES, LesaWarning
from ..runtime.clock import Request, impulse_response_of
from .layouts import LAYOUTS, config_hash, denoiser_of
from .pipeline import FeatureRecorder, PipelineCall

_SAME = 1e-4  # of sigma, between requests of one kind


def gather_calls(
    target: Any,
    calls: Sequence[PipelineCall],
    request: Mapping[str, Any],
    *,
    sigmas: Sequence[float] | None = None,
    guidance: Sequence[float] | None = None,
    sites: Sequence[str] | None = None,
    offload: bool = False,
    visit: Callable[[FeatureRecorder, Any], None] | None = None,
) -> Statistics:
    """Run full requests and keep the mean inner products of their features.

    Args:
        target, request, sigmas, guidance, sites, offload: see `Statistics.gather`.
        calls: each runs one or more of the requests.
        visit: called after each call with its features, before they are dropped, and with what the call returned.

    Raises:
        StatisticsError: features are not finite or were lost, or the requests are not of one kind.
        ValueError: an argument is out of place.
    """
    request = dict(request)
    denoiser = denoiser_of(target)
    sites = _sites(sites, denoiser)
    if sigmas is not None and not isinstance(target, torch.nn.Module):
        raise ValueError("sigmas is given together with a pipeline: its scheduler has them; leave it out")
    _check_guidance(guidance)
    first: _Found | None = None
    totals: dict[str, np.ndarray] = {}
    requests = sum(len(call.labels) for call in calls)
    scheduler: Any = None if isinstance(target, torch.nn.Module) else getattr(target, "scheduler", None)
    with tqdm(total=requests, desc="gather", unit="request") as bar:
        for call in calls:
            recorder = FeatureRecorder(call.labels, sites, offload=offload)
            result = call.run(recorder, "hidden" if "hidden" in sites else "output")
            if recorder.request is None:
                raise StatisticsError(f"{call.labels[0]} did not call the denoiser: each must run one request")
            if visit is not None:
                visit(recorder, result)
            found = _found(recorder, recorder.request, sigmas)
            first = first or found
            check_alike(first, found, call.labels[0])
            for site in sites:
                totals[site] = totals.get(site, 0) + len(call.labels) * recorder.gram(site)
            bar.update(len(call.labels))
    assert first is not None
    impulse_response = flow_impulse_response(first.sigmas)
    if scheduler is not None:
        impulse_response = impulse_response_of(scheduler, len(scheduler.timesteps) - len(first.timesteps))
    return Statistics(
        sigmas=first.sigmas,
        timesteps=first.timesteps,
        contexts=first.contexts,
        guidance=_guidance(target, request, first.contexts) if guidance is None else tuple(guidance),
        grams={site: total / requests for site, total in totals.items()},
        impulse_response=impulse_response,
        requests=requests,
        scheduler=None if scheduler is None else type(scheduler).__name__,
        denoiser=type(denoiser).__name__,
        config_hash=config_hash(denoiser),
        request=request,
    )


@dataclass(frozen=True)
class _Found:
    """What requests of one kind have in common."""

    contexts: tuple[str, ...]
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]


def _found(recorder: FeatureRecorder, request: Request, sigmas: Sequence[float] | None) -> _Found:
    levels = request.sigmas or _bare_sigmas(recorder.timesteps, sigmas)
    if len(levels) != len(recorder.timesteps) + 1:
        raise StatisticsError(
            f"{recorder.labels[0]} ran {len(recorder.timesteps)} steps of {len(levels) - 1}: run whole requests"
        )
    wrong = next((step for step, level in enumerate(levels) if not math.isfinite(level)), None)
    if wrong is not None:
        raise StatisticsError(
            f"{recorder.labels[0]} ran step {wrong} at sigma {levels[wrong]}: give finite sigmas or timesteps"
        )
    return _Found(tuple(recorder.contexts), tuple(levels), tuple(recorder.timesteps))


def _check_guidance(guidance: Any) -> None:
    try:
        finite = guidance is None or all(math.isfinite(weight) for weight in guidance)
    except TypeError:
        finite = False
    if not finite:
        raise ValueError(f"guidance={guidance!r:.80}: expected a list of finite weights, one a context, e.g. [3, -2]")


def _sites(sites: Sequence[str] | None, denoiser: torch.nn.Module) -> tuple[str, ...]:
    if sites is None:
        return SITES if type(denoiser).__name__ in LAYOUTS else ("output",)
    sites = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    if not sites or not set(sites) <= set(SITES):
        raise ValueError(f"sites={sites!r}: expected some of {SITES}")
    return sites


def _bare_sigmas(timesteps: Sequence[float], sigmas: Sequence[float] | None) -> tuple[float, ...]:
    if sigmas is not None:
        return tuple(float(sigma) for sigma in sigmas)
    highest = max(timesteps)
    if highest > 1000 or min(timesteps) < 0:
        raise ValueError(
            f"timesteps from {min(timesteps):g} to {highest:g} are not those of flow matching (sigma, or "
            "1000 * sigma): give sigmas"
        )
    scale = 1.0 if highest <= 1 else 1000.0
    return (*(timestep / scale for timestep in timesteps), 0.0)


def check_alike(first: _Found | Statistics, now: _Found | Statistics, label: str) -> None:
    """Check that requests run the same steps in the same contexts.

    Raises:
        StatisticsError: they do not; `label` says which.
    """
    same = len(first.sigmas) == len(now.sigmas) and np.allclose(first.sigmas, now.sigmas, 0, _SAME)
    if not same or first.contexts != now.contexts:
        raise StatisticsError(
            f"{label} is not of one kind with the first: {len(now.sigmas) - 1} steps in contexts {list(now.contexts)} "
            f"at sigmas {now.sigmas!r:.60}, not {len(first.sigmas) - 1} in {list(first.contexts)} at "
            f"{first.sigmas!r:.60}; gather each kind apart"
        )


def _guidance(target: Any, request: Mapping[str, Any], contexts: Sequence[str]) -> tuple[float, ...]:
    """The weight of each context in what the scheduler is given: classifier-free guidance of two, by its scale."""
    if len(contexts) == 1:
        return (1.0,)
    scale = _argument(target, request, "true_cfg_scale")
    if scale is None or scale <= 1:
        scale = _argument(target, request, "guidance_scale")
    if scale is None or len(contexts) != 2:
        warnings.warn(
            f"what the scheduler is given is not known from contexts {list(contexts)} and the request: it is taken to "
            f"be {contexts[0]!r} alone; give guidance, one weight a context",
            LesaWarning,
            stacklevel=3,
        )
        return (1.0, *(0.0 for _ in contexts[1:]))
    unconditional = next((i for i, name in enumerate(contexts) if "uncond" in name or "neg" in name), 1)
    return tuple(1 - scale if i == unconditional else scale for i in range(2))


def _argument(target: Any, request: Mapping[str, Any], name: str) -> float | None:
    """An argument of the pipeline call, or its default."""
    value = request.get(name)
    if value is None and not isinstance(target, torch.nn.Module):
        parameter = inspect.signature(target.__call__).parameters.get(name)
        value = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return None if value is None else float(value)
