"""Run the fitting requests: in full once, for their statistics; then by plans, to measure what these do."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import metrics, ops
from ..models.layouts import LAYOUTS, config_hash, denoiser_of
from ..models.pipeline import FeatureRecorder, PipelineCall, by_request, combined, without_variance
from ..planner.build import prior_error_gains
from ..planner.generic import FLOW, lasting_error_gains, levels_of
from ..planner.statistics import Statistics, StatisticsError, flow_impulse_response
from ..planner.surrogate import Outcome, Surrogate
from ..plans.plan import Plan
from ..plans.rows import SITES
from ..runtime.clock import Call, Request, impulse_response_of, prediction_of
from ..runtime.driver import Forecast, Relay
from ..runtime.runner import PlanRunner
from . import arguments

_MOST_DB = 100.0  # what equal pictures count as
_LEAST_SIDE = 7  # pixels of the smallest pictures that SSIM takes
_JITTER = 0.01  # relative, of a sample that a model encoded on a GPU
_SAME = 1e-4  # of sigma, between requests of one kind


def gather_calls(
    target: Any,
    calls: Sequence[PipelineCall],
    request: Mapping[str, Any],
    *,
    sigmas: Sequence[float] | None = None,
    scheduler: Any = None,
    guidance: Sequence[float] | None = None,
    sites: Sequence[str] | None = None,
    offload: bool = False,
    visit: Callable[[FeatureRecorder, Any], None] | None = None,
) -> Statistics:
    """Run full requests and keep the mean inner products of their features.

    Args:
        target, request, sigmas, scheduler, guidance, sites, offload: see `Statistics.gather`.
        calls: each runs one or more of the requests.
        visit: called after each call with its features, before they are dropped, and with what the call returned.

    Raises:
        StatisticsError: features are not finite or were lost, or the requests are not of one kind.
        ValueError: an argument is out of place.
    """
    sites = _sites(sites, denoiser_of(target))
    arguments.check_loop(target, sigmas, scheduler, guidance)
    gathering = Gathering(target, request, sites, sigmas=sigmas, scheduler=scheduler, guidance=guidance)
    requests = sum(len(call.labels) for call in calls)
    with tqdm(total=requests, desc="gather", unit="request") as bar:
        for call in calls:
            recorder = FeatureRecorder(call.labels, sites, offload=offload)
            result = call.run(recorder, "hidden" if "hidden" in sites else "output")
            gathering.add(recorder, visit and functools.partial(visit, recorder, result))
            bar.update(len(call.labels))
    return gathering.statistics()


class Gathering:
    """The statistics of full requests of one kind, added call by call.

    Args:
        target, request, sigmas, scheduler, guidance: see `Statistics.gather`; a pipeline's scheduler is its own.
        sites: of the features.
    """

    def __init__(
        self,
        target: Any,
        request: Mapping[str, Any],
        sites: Sequence[str],
        *,
        sigmas: Sequence[float] | None = None,
        scheduler: Any = None,
        guidance: Sequence[float] | None = None,
    ) -> None:
        self._target, self._request, self._sites = target, dict(request), sites
        self._sigmas, self._guidance = sigmas, guidance
        self._scheduler = scheduler if isinstance(target, torch.nn.Module) else getattr(target, "scheduler", None)
        self._first: _Found | None = None
        self._names: list[str] = []
        self._weights: tuple[float, ...] = ()
        self._impulse_response = np.zeros(0)
        self._totals: dict[str, np.ndarray] = {}
        self._requests = 0

    def add(self, recorder: FeatureRecorder, visit: Callable[[], None] | None = None) -> None:
        """Add what was recorded of one call; its features are dropped.

        Args:
            recorder: of the call.
            visit: called before they are dropped, and after guidance has combined a batch's parts.

        Raises:
            StatisticsError: features are not finite, or the call is not of one kind with the first.
        """
        label = recorder.labels[0]
        if recorder.request is None:
            raise StatisticsError(f"{label} did not call the denoiser: each must run one request")
        found = _found(recorder, recorder.request, self._sigmas, self._scheduler)
        for site in self._sites:
            recorder.check(site)
        if self._first is None:
            self._begin(recorder, found)
        assert self._first is not None
        check_alike(self._first, found, label)
        if recorder.summed != self._names:
            raise StatisticsError(
                f"{label} is not of one kind with the first: it runs {recorder.summed} in each step, not "
                f"{self._names}; gather each kind apart"
            )
        recorder.combine(self._weights)
        if visit is not None:
            visit()
        count = len(recorder.labels)
        for site in self._sites:
            self._totals[site] = self._totals.get(site, 0) + count * recorder.gram(site)
        self._requests += count

    def _begin(self, recorder: FeatureRecorder, found: _Found) -> None:
        """Learn from the first call what all have in common."""
        changes, self._names = recorder.changes(), recorder.summed
        self._weights = arguments.guidance_weights(self._target, self._request, self._names, changes, self._guidance)
        if isinstance(self._target, torch.nn.Module) and self._sigmas is None and self._scheduler is None:
            arguments.check_flow(changes, self._weights, found.sigmas, found.timesteps)
        self._impulse_response = flow_impulse_response(found.sigmas)
        if self._scheduler is not None:  # now, for other requests may set other timesteps
            skipped = len(self._scheduler.timesteps) - len(found.timesteps)
            self._impulse_response = impulse_response_of(self._scheduler, skipped)
        self._first = found

    def statistics(self) -> Statistics:
        """Of all calls so far, at least one."""
        first, denoiser, scheduler = self._first, denoiser_of(self._target), self._scheduler
        assert first is not None
        return Statistics(
            sigmas=first.sigmas,
            timesteps=first.timesteps,
            contexts=first.contexts,
            guidance=self._weights if len(first.contexts) > 1 else (1.0,),
            grams={site: total / self._requests for site, total in self._totals.items()},
            impulse_response=self._impulse_response,
            requests=self._requests,
            scheduler=None if scheduler is None else type(scheduler).__name__,
            denoiser=type(denoiser).__name__,
            config_hash=config_hash(denoiser),
            request=self._request,
        )


@dataclass(frozen=True)
class _Found:
    """What requests of one kind have in common."""

    contexts: tuple[str, ...]
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]


def _found(recorder: FeatureRecorder, request: Request, sigmas: Any, scheduler: Any) -> _Found:
    timesteps, label = recorder.timesteps, recorder.labels[0]
    levels = request.sigmas or arguments.levels_of_loop(timesteps, sigmas, scheduler)
    if len(levels) != len(timesteps) + 1:
        raise StatisticsError(f"{label} ran {len(timesteps)} steps of {len(levels) - 1}: run whole requests")
    wrong = next((step for step, level in enumerate(levels) if not math.isfinite(level)), None)
    if wrong is not None:
        raise StatisticsError(f"{label} ran step {wrong} at sigma {levels[wrong]}: give finite sigmas or timesteps")
    return _Found(tuple(recorder.contexts), tuple(levels), tuple(timesteps))


def _sites(sites: Sequence[str] | None, denoiser: torch.nn.Module) -> tuple[str, ...]:
    if sites is None:
        return SITES if type(denoiser).__name__ in LAYOUTS else ("output",)
    sites = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    if not sites or not set(sites) <= set(SITES):
        raise ValueError(f"sites={sites!r}: expected some of {SITES}")
    return sites


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


@dataclass
class Reference:
    """What is kept of a full run.

    Args:
        outputs: [C, T, B, L] of its B requests, in the denoiser's dtype.
        final: what the call returned: pictures [B, ...] in [0, 1], or None where it returned nothing of use.
        start: the first step's sample.
        parts: weights of the parts of guidance that one call of the denoiser holds; of their sum are the outputs.
    """

    outputs: Tensor
    final: np.ndarray | None
    start: Tensor
    parts: tuple[float, ...] = (1.0,)

    @cached_property
    def grams(self) -> np.ndarray:
        """[B, C T, C T]: the inner products of each request's outputs."""
        flat = (outputs.flatten(0, 1).double() for outputs in self.outputs.unbind(2))
        return np.stack([(own @ own.T / own.shape[1]).cpu().numpy() for own in flat])

    def drop_outputs(self) -> None:
        """Keep their inner products alone: nothing can be compared with these requests any more."""
        _, self.outputs = self.grams, self.outputs.new_empty(0)


@dataclass
class Measured:
    """What a plan did when the requests were run by it.

    Args:
        psnr: [P] in dB, of the pictures; of the final samples where there are none.
        outcome: inner products of its errors.
        error_gains: [C, N, P] of the denoiser's error in answer to the sample's, at the computed steps.
        refused: why forecasts could not be used; then more was computed than the plan says.
        final: the pictures [P, ...]; None where there are none.
        ssim: [P] of the pictures, where it was asked for.
    """

    psnr: np.ndarray
    outcome: Outcome
    error_gains: np.ndarray
    refused: tuple[str, ...] = ()
    final: np.ndarray | None = None
    ssim: np.ndarray | None = None

    @property
    def score(self) -> float:
        """Mean PSNR."""
        return float(self.psnr.mean())


@dataclass
class Trials:
    """Requests with their full runs.

    Args:
        calls: run the requests; none where these cannot be repeated.
        statistics: of the full runs.
        references: one a call.
        seconds: that the full runs took, together.
        prediction: what the denoiser predicts, one of `PREDICTIONS`.
    """

    calls: Sequence[PipelineCall]
    statistics: Statistics
    references: Sequence[Reference]
    seconds: float
    prediction: str = FLOW

    @property
    def labels(self) -> list[str]:
        """Names of the requests."""
        return [label for call in self.calls for label in call.labels]

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each context, or of each part of a batch, in what the scheduler is given."""
        parts = self.references[0].parts
        return parts if len(parts) > 1 else self.statistics.guidance

    @property
    def count(self) -> int:
        """P, how many requests."""
        return len(self.grams)

    @cached_property
    def grams(self) -> np.ndarray:
        """[P, C T, C T]: the inner products of each request's outputs."""
        return np.concatenate([reference.grams for reference in self.references])

    def surrogate(self, error_gains: np.ndarray) -> Surrogate:
        """The model of these requests with error gains [C, T, P]; with K P of them it holds each request K times."""
        known = self.statistics
        grams = np.tile(self.grams, (error_gains.shape[2] // self.count, 1, 1))
        return Surrogate(grams, known.impulse_response, np.asarray(known.guidance), error_gains, known.contexts)

    @property
    def predicts(self) -> tuple[str, tuple[float, ...]]:
        """What the denoiser predicts, and its noise levels from 1 to 0."""
        prediction, levels = levels_of(self.statistics.sigmas)
        return prediction if self.prediction == FLOW else self.prediction, levels

    @cached_property
    def assumed_gains(self) -> np.ndarray:
        """[C, T, 2 P], what may be true of a denoiser: first that errors heal, then that they last."""
        known, shape = self.statistics, (len(self.statistics.contexts), self.statistics.num_steps, self.count)
        prediction, levels = self.predicts
        lasting = lasting_error_gains(prediction, levels, known.impulse_response)
        return np.concatenate([prior_error_gains(known, self.count), np.broadcast_to(lasting, shape)], 2)

    @property
    def compares_pictures(self) -> bool:
        """Whether there are pictures, large enough for SSIM, and scikit-image, an extra, to take it with."""
        finals = [reference.final for reference in self.references]
        shapes = [None if final is None else final.shape for final in finals]
        pictures = all(s is not None and len(s) == 4 and s[3] == 3 and min(s[1:3]) >= _LEAST_SIDE for s in shapes)
        return pictures and find_spec("skimage") is not None

    def judge(self, measured: Measured) -> None:
        """Take the SSIM of pictures; for the best plan only, since of large pictures it takes long."""
        if measured.ssim is None and measured.final is not None and self.compares_pictures:
            references = [reference.final for reference in self.references if reference.final is not None]
            measured.ssim = metrics.ssim(measured.final, np.concatenate(references))

    def run(self, plan: Plan, calls: slice = slice(None)) -> Measured:
        """Run all requests by `plan`, or only those of some calls."""
        pairs = zip(self.calls[calls], self.references[calls], strict=True)
        parts = [self._run(plan, call, reference) for call, reference in pairs]
        finals = [part.final for part in parts if part.final is not None]
        return Measured(
            np.concatenate([part.psnr for part in parts]),
            Outcome(
                np.concatenate([part.outcome.basis for part in parts]),
                np.concatenate([part.outcome.along for part in parts], 1),
                np.concatenate([part.outcome.error for part in parts], 1),
            ),
            np.concatenate([part.error_gains for part in parts], 2),
            tuple(sorted({reason for part in parts for reason in part.refused})),
            np.concatenate(finals) if len(finals) == len(parts) else None,
        )

    def _run(self, plan: Plan, call: PipelineCall, reference: Reference) -> Measured:
        recorder = ErrorRecorder(plan, self.statistics, reference, call.labels[0])
        final = final_of(call.run(recorder, plan.site), len(call.labels))
        outcome, error_gains = recorder.measured()
        if final is not None and reference.final is not None:
            psnr = decibels(final, reference.final)
        else:
            psnr = -10 * np.log10(np.maximum(outcome.error[-1], 10 ** (-_MOST_DB / 10)))
        return Measured(psnr, outcome, error_gains, tuple(recorder.stats.refused), final)


def run_in_full(
    target: Any,
    calls: Sequence[PipelineCall],
    request: Mapping[str, Any],
    *,
    sigmas: Sequence[float] | None = None,
    scheduler: Any = None,
    guidance: Sequence[float] | None = None,
    check: Callable[[int], Any] = lambda num_steps: None,
) -> Trials:
    """Run requests in full, and keep their outputs and what they returned.

    Args:
        target, request, sigmas, scheduler, guidance: see `Statistics.gather`.
        calls: run the requests.
        check: given the number of steps once the first call has run; raises where nothing can be fitted.

    Raises:
        StatisticsError: the requests are not of one kind, or their features are not finite.
    """
    references: list[Reference] = []

    def visit(recorder: FeatureRecorder, result: Any) -> None:
        if not references:
            check(len(recorder.timesteps))
        references.append(reference_of(recorder, result))

    begin = time.perf_counter()
    options: dict[str, Any] = {"sigmas": sigmas, "scheduler": scheduler, "guidance": guidance}
    statistics = gather_calls(target, calls, request, **options, visit=visit)
    own = scheduler if isinstance(target, torch.nn.Module) else getattr(target, "scheduler", None)
    return Trials(calls, statistics, references, time.perf_counter() - begin, prediction_of(own))


class ErrorRecorder(Relay):
    """A driver that runs a plan and measures how far its samples are from those of the full requests.

    Args:
        plan: of either site; its outputs are compared.
        statistics: contexts, guidance and impulse response.
        reference: of the full requests.
        label: the name of the first of them, for errors.
    """

    def __init__(self, plan: Plan, statistics: Statistics, reference: Reference, label: str) -> None:
        super().__init__(PlanRunner(plan, guard="off"))
        self._start, self._label = reference.start, label
        outputs = reference.outputs
        self._statistics, self._outputs, self._parts = statistics, outputs, reference.parts
        self._wide = ops.wide_dtype(outputs)
        C, _, B, L = outputs.shape
        self._computed = {step: k for k, step in enumerate(plan.computed)}
        # The samples at the computed steps but the first, and the final one.
        targets = torch.tensor(statistics.impulse_response[[*plan.computed[1:], plan.num_steps]])
        self._targets = targets.to(outputs.device, self._wide)
        self._errors = torch.zeros(len(targets), B, L, dtype=self._wide, device=outputs.device)
        self._answers = torch.zeros(C, plan.budget, B, L, dtype=self._wide, device=outputs.device)
        self._error_gains = torch.zeros(C, plan.budget, B, dtype=self._wide, device=outputs.device)

    def forecast(self, call: Call) -> Forecast | None:
        """As the plan says.

        Raises:
            ValueError: the request does not start as in the full run.
        """
        if call.starts and not _alike(call.sample, self._start):
            raise ValueError(
                f"{self._label} starts from another sample when it runs again: each of requests must make the same "
                "request every time, so seed its noise"
            )
        return super().forecast(call)

    def observe(self, call: Call, output: Tensor) -> None:
        """Add the difference from the full request to the errors of all later targets."""
        super().observe(call, output)
        c = self._statistics.contexts.index(call.context)
        truth = self._outputs[c, call.step].to(self._wide)
        guided = combined(without_variance(output.detach(), call), self._parts)
        own = by_request(guided, truth.shape[0]).flatten(1).to(truth)
        k = self._computed.get(call.step)
        if k is not None:
            self._answers[c, k] = own
            if k:
                off = self._errors[k - 1]
                self._error_gains[c, k] = ((own - truth) * off).sum(1) / off.square().sum(1)
        weights = self._targets[:, call.step] * self._statistics.guidance[c]
        for target in weights.nonzero().flatten().tolist():
            self._errors[target].add_(own - truth, alpha=float(weights[target]))

    def moved(self, call: Call, scale: float) -> Tensor:
        """The sample of a call of the full request, as the plan's errors so far move it at a computed step.

        Args:
            call: of the full request.
            scale: of its sample beside the scheduler's.
        """
        k = self._computed.get(call.step, 0)
        if not k:
            return call.sample
        off = scale * self._errors[k - 1].unflatten(1, call.sample.shape[1:])
        return call.sample + torch.cat([off] * len(self._parts)).to(call.sample)

    def measured(self) -> tuple[Outcome, np.ndarray]:
        """Inner products of the errors, and the error gains."""
        basis = self._answers.flatten(0, 1).transpose(0, 1).double()  # [B, M, L]
        errors, length = self._errors.double(), self._errors.shape[2]
        outcome = Outcome(
            (basis @ basis.transpose(1, 2) / length).cpu().numpy(),
            (torch.einsum("bml,qbl->qbm", basis, errors) / length).cpu().numpy(),
            (errors.square().sum(2) / length).cpu().numpy(),
        )
        return outcome, self._error_gains.double().cpu().numpy()


def decibels(final: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """PSNR of each request [B], at most 100 dB: true PSNR of pictures in [0, 1]; of other values, over their range."""
    low, high = float(reference.min()), float(reference.max())
    peak = 1.0 if low >= 0 and high <= 1 else max(high - low, 1e-12)
    squared = np.square(final.astype(np.float64) - reference).reshape(len(final), -1).mean(1)
    return np.minimum(10 * np.log10(peak**2 / np.maximum(squared, 1e-30)), _MOST_DB)


def final_of(result: Any, count: int) -> np.ndarray | None:
    """Pictures, frames or samples [B, ...] out of what a pipeline or a function returned; None if there are none.

    Pictures of bytes, as of PIL, are brought to [0, 1]; one alone may come without its batch.
    """
    for name in ("images", "frames"):
        result = getattr(result, name, result)
    if isinstance(result, (tuple, list)) and result and isinstance(result[0], (Tensor, np.ndarray)):
        result = result[0] if len(result[0]) == count else result
    if isinstance(result, Tensor):
        result = result.detach().cpu()
        result = (result if result.dtype == torch.uint8 else result.float()).numpy()
    try:
        final = np.asarray(result)
        scale = 255 if final.dtype == np.uint8 else 1
        final = final.astype(np.float32) / np.float32(scale)
    except (TypeError, ValueError):
        return None
    if scale == 255 and count == 1 and final.ndim == 3 and len(final) != 1:
        final = final[None]
    return final if final.ndim >= 2 and len(final) == count else None


def reference_of(recorder: FeatureRecorder, result: Any) -> Reference:
    """What is kept of a full run, before its statistics are taken."""
    count = len(recorder.labels)
    outputs = [
        torch.stack([by_request(part, count).flatten(1) for part in own])
        for own in recorder.features("output").values()
    ]
    return Reference(torch.stack(outputs), final_of(result, count), recorder.start, recorder.weights)


def _alike(sample: Tensor, start: Tensor) -> bool:
    """Whether samples are equal but for what a device may do otherwise each time."""
    if sample.shape != start.shape:
        return False
    start = start.to(sample.device, torch.float32)
    return bool((sample.float() - start).norm() <= _JITTER * start.norm())
