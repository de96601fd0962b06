"""Gather `Statistics`: run full requests, add up the inner products of their features, and forget the features."""

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

from ..models.denoisers import LAYOUTS, config_hash, denoiser_of
from ..models.gatherer import Gatherer
from ..models.works import Work, works_of
from ..planner.statistics import Statistics, StatisticsError, flow_impulse_response
from ..plans.plan import SITES
from ..runtime.driver import LesaWarning
from ..runtime.response import impulse_response_of

_SAME = 1e-4  # of sigma, between requests of one kind


def gather(
    target: Any,
    prompts: Sequence[str] | None = None,
    *,
    request: Mapping[str, Any] | None = None,
    requests: Sequence[Callable[[], Any]] | None = None,
    sigmas: Sequence[float] | None = None,
    guidance: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    batch: int = 1,
    sites: Sequence[str] | None = None,
    offload: bool = False,
) -> Statistics:
    """Run full requests and keep the mean inner products of their features.

    Nothing is written to disk. In memory are the T features of each site and context of one pipeline call (FLUX at
    1024x1024, 50 steps in bfloat16: 1.3 GB), and 64 MB for their product; each call's are dropped before the next.

    Where guidance is batched (one call for both halves, e.g. SDXL and DiT) there is one context, and its statistics
    are the mean over both halves. Where the denoiser also returns a variance, that part of the output is left out.
    What a pipeline does to the guided sum (Qwen-Image rescales it) is not in the statistics.

    Args:
        target: a diffusers pipeline, or a bare denoiser in a loop of your own.
        prompts: for a pipeline that takes prompts, at least one.
        request: keyword arguments of the pipeline call, JSON-able, e.g. {"num_inference_steps": 50}.
        requests: in the place of prompts: functions without arguments, each of which runs one request.
        sigmas: of a bare denoiser's requests, T + 1 with the final 0; None reads them from the timestep argument, which
            flow matching gives as sigma or 1000 * sigma.
        guidance: the weight of each context in what the scheduler is given, in the order the contexts are called; None
            takes (s, 1 - s) for a guidance scale s of the request, `true_cfg_scale` if above 1, else `guidance_scale`.
        seeds: of each prompt's noise; the prompt's index by default.
        batch: prompts run in one pipeline call.
        sites: "hidden", "output" or both; both by default, where the hidden site of the denoiser is known.
        offload: keep the features on the CPU until their product is made, which is slower.

    Raises:
        StatisticsError: features are not finite or were lost, or the requests are not of one kind.
        ValueError: an argument is out of place, or lesa is enabled on the target.
    """
    works = works_of(target, prompts, requests, request or {}, seeds, batch)
    return gather_works(target, works, request or {}, sigmas=sigmas, guidance=guidance, sites=sites, offload=offload)


def gather_works(
    target: Any,
    works: Sequence[Work],
    request: Mapping[str, Any],
    *,
    sigmas: Sequence[float] | None = None,
    guidance: Sequence[float] | None = None,
    sites: Sequence[str] | None = None,
    offload: bool = False,
    visit: Callable[[Gatherer, Any], None] | None = None,
) -> Statistics:
    """`gather` for requests that were put into calls before.

    Args:
        target, request, sigmas, guidance, sites, offload: see `gather`.
        works: the calls.
        visit: called after each of them with its features, before they are dropped, and what the call returned.
    """
    request = dict(request)
    denoiser = denoiser_of(target)
    sites = _sites(sites, denoiser)
    if sigmas is not None and not isinstance(target, torch.nn.Module):
        raise ValueError("sigmas is given together with a pipeline: its scheduler has them; leave it out")
    sums = _Sums()
    scheduler: Any = None if isinstance(target, torch.nn.Module) else getattr(target, "scheduler", None)
    with tqdm(total=sum(len(work.labels) for work in works), desc="gather", unit="request") as bar:
        for work in works:
            gatherer = Gatherer(sites, work.labels, offload)
            result = work.run(gatherer, "hidden" if "hidden" in sites else "output")
            if visit is not None:
                visit(gatherer, result)
            sums.add(gatherer, sigmas)
            bar.update(len(work.labels))
    assert sums.found is not None
    impulse_response = flow_impulse_response(sums.found.sigmas)
    if scheduler is not None:
        impulse_response = impulse_response_of(scheduler, len(scheduler.timesteps) - len(sums.found.timesteps))
    contexts = sums.found.contexts
    return Statistics(
        sigmas=sums.found.sigmas,
        timesteps=sums.found.timesteps,
        contexts=contexts,
        guidance=_guidance(target, request, contexts) if guidance is None else tuple(guidance),
        grams=sums.grams(),
        impulse_response=impulse_response,
        requests=sums.requests,
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


class _Sums:
    """The sums of the requests so far."""

    def __init__(self) -> None:
        self.found: _Found | None = None
        self.requests = 0
        self._sums: dict[str, np.ndarray] = {}

    def add(self, gatherer: Gatherer, sigmas: Sequence[float] | None) -> None:
        """Add one call's inner products, for each of its prompts."""
        if gatherer.request is None:
            raise StatisticsError(f"{gatherer.labels[0]} did not call the denoiser: each must run one request")
        levels = gatherer.request.sigmas or _bare_sigmas(gatherer.timesteps, sigmas)
        if len(levels) != len(gatherer.timesteps) + 1:
            raise StatisticsError(
                f"{gatherer.labels[0]} ran {len(gatherer.timesteps)} steps of {len(levels) - 1}: run whole requests"
            )
        wrong = next((step for step, level in enumerate(levels) if not math.isfinite(level)), None)
        if wrong is not None:
            raise StatisticsError(
                f"{gatherer.labels[0]} ran step {wrong} at sigma {levels[wrong]}: give finite sigmas or timesteps"
            )
        now = _Found(gatherer.contexts, tuple(levels), tuple(gatherer.timesteps))
        if self.found is None:
            self.found = now
        check_alike(self.found, now, gatherer.labels[0])
        count = len(gatherer.labels)
        for site in gatherer.sites:
            gram = gatherer.gram(site)
            self._sums[site] = self._sums.get(site, 0) + count * gram
        self.requests += count

    def grams(self) -> dict[str, np.ndarray]:
        """The means over the requests."""
        return {site: total / self.requests for site, total in self._sums.items()}


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
