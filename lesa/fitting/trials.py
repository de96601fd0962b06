"""Trials: the fitting requests run in full once, then accelerated, and what is measured of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from ..models.gatherer import Gatherer
from ..models.works import Work
from ..planner.statistics import Statistics, StatisticsError
from ..planner.surrogate import Outcome, Surrogate
from ..plans.plan import Plan
from .watch import Watch

_MOST_DB = 100.0  # what equal pictures count as
_LEAST_SIDE = 7  # pixels of the smallest pictures that SSIM takes


@dataclass
class Reference:
    """What is kept of a full run.

    Args:
        outputs: [C, T, B, L] of its B requests, in the denoiser's dtype.
        final: what the call returned: pictures [B, ...] in [0, 1], or None where it returned nothing of use.
        embeddings: by context [m B, D] of its prompts, see `lesa.likeness.embedding_of`.
    """

    outputs: Tensor
    final: np.ndarray | None
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Measured:
    """A plan, run.

    Args:
        psnr: [P] in dB, of the pictures; of the final samples where there are none.
        outcome: inner products of its errors.
        error_gains: [C, N, P] of the denoiser's answers at the computed steps.
        refused: why forecasts could not be used; then more was computed than the plan says.
        final: the pictures [P, ...]; None where there are none, or they were not kept.
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
    """Fitting requests with their full runs.

    Args:
        works: the calls that run them.
        statistics: of the full runs.
        references: one a call.
        seconds: that the full runs took, together.
    """

    works: Sequence[Work]
    statistics: Statistics
    references: Sequence[Reference]
    seconds: float

    @property
    def count(self) -> int:
        """P, how many requests."""
        return sum(len(work.labels) for work in self.works)

    @property
    def seconds_a_request(self) -> float:
        """Of a full one."""
        return self.seconds / self.count

    @cached_property
    def grams(self) -> np.ndarray:
        """[P, C T, C T]: the inner products of each request's outputs."""
        grams = []
        for reference in self.references:
            for outputs in reference.outputs.unbind(2):
                flat = outputs.flatten(0, 1).double()
                grams.append((flat @ flat.T / flat.shape[1]).cpu().numpy())
        return np.stack(grams)

    def surrogate(self, error_gains: np.ndarray) -> Surrogate:
        """The model of these requests with error gains [C, T, P]."""
        known = self.statistics
        return Surrogate(self.grams, known.impulse_response, np.asarray(known.guidance), error_gains, known.contexts)

    @cached_property
    def identity(self) -> str:
        """A hash of what the full runs were asked for and gave."""
        statistics = self.statistics
        told = [[work.labels for work in self.works], statistics.sigmas, statistics.guidance, statistics.config_hash]
        found = hashlib.sha256(json.dumps(told).encode())
        finals = [reference.final for reference in self.references if reference.final is not None]
        for array in (statistics.impulse_response, self.grams, *finals):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    @property
    def compares_pictures(self) -> bool:
        """Whether there are pictures, large enough for SSIM, and scikit-image, an extra, to take it with."""
        finals = [reference.final for reference in self.references]
        shapes = [None if final is None else final.shape for final in finals]
        pictures = all(s is not None and len(s) == 4 and s[3] == 3 and min(s[1:3]) >= _LEAST_SIDE for s in shapes)
        return pictures and find_spec("skimage") is not None

    def judge(self, measured: Measured) -> None:
        """Take the SSIM of pictures at hand; for the best only, since of large ones it takes long."""
        if measured.ssim is None and measured.final is not None and self.compares_pictures:
            references = [reference.final for reference in self.references if reference.final is not None]
            measured.ssim = metrics.ssim(measured.final, np.concatenate(references))

    def run(self, plan: Plan, calls: int | None = None) -> Measured:
        """Run all requests by `plan`, or only those of the first `calls` calls."""
        works = zip(self.works[:calls], self.references[:calls], strict=True)
        parts = [self._run(plan, work, reference) for work, reference in works]
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

    def _run(self, plan: Plan, work: Work, reference: Reference) -> Measured:
        watch = Watch(plan, self.statistics, reference.outputs)
        final = final_of(work.run(watch, plan.site), len(work.labels))
        outcome, error_gains = watch.measured()
        if final is not None and reference.final is not None:
            psnr = decibels(final, reference.final)
        else:
            psnr = -10 * np.log10(np.maximum(outcome.error[-1], 10 ** (-_MOST_DB / 10)))
        return Measured(psnr, outcome, error_gains, tuple(watch.stats.refused), final)


def decibels(final: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """PSNR of each request [B], at most 100 dB: true PSNR of pictures in [0, 1]; of other values, over their range."""
    low, high = float(reference.min()), float(reference.max())
    peak = 1.0 if low >= 0 and high <= 1 else max(high - low, 1e-12)
    squared = np.square(final.astype(np.float64) - reference).reshape(len(final), -1).mean(1)
    return np.minimum(10 * np.log10(peak**2 / np.maximum(squared, 1e-30)), _MOST_DB)


def reference_of(gatherer: Gatherer, result: Any) -> Reference:
    """What is kept of a full run, before its statistics are taken.

    Raises:
        StatisticsError: it did not run.
    """
    count = len(gatherer.labels)
    if gatherer.request is None:
        raise StatisticsError(f"{gatherer.labels[0]} did not call the denoiser: each must run one request")
    outputs = [
        torch.stack([part.unflatten(0, (-1, count)).transpose(0, 1).flatten(1) for part in own])
        for own in gatherer.features("output").values()
    ]
    return Reference(torch.stack(outputs), final_of(result, count), gatherer.embeddings)


def final_of(result: Any, count: int) -> np.ndarray | None:
    """Pictures, frames or samples [B, ...] out of what a pipeline or a function returned; None if there are none."""
    for name in ("images", "frames"):
        result = getattr(result, name, result)
    if isinstance(result, (tuple, list)) and result and isinstance(result[0], (Tensor, np.ndarray)):
        result = result[0] if len(result[0]) == count else result
    if isinstance(result, Tensor):
        result = result.detach().float().cpu().numpy()
    try:
        final = np.asarray(result, np.float32)
    except (TypeError, ValueError):
        return None
    return final if final.ndim >= 2 and len(final) == count else None
