"""The driver that keeps the features of one request until their inner products are made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..planner.statistics import StatisticsError
from ..runtime.clock import Call, Request
from ..runtime.likeness import embedding_of
from ..runtime.stats import Stats

_CHUNK = 1 << 26  # bytes of the widened features that one product reads


class Gatherer:
    """A driver that computes every step of one request and keeps its features until `gram` is asked for.

    Args:
        sites: of the features to keep.
        labels: names of the prompts of the request, for errors.
        offload: keep them on the CPU.
    """

    def __init__(self, sites: Sequence[str], labels: Sequence[str], offload: bool = False) -> None:
        self.stats = Stats()
        self.labels = labels
        self.sites = tuple(sites)
        self.request: Request | None = None
        self.timesteps: list[float] = []
        self.device: torch.device | None = None
        self._offload = offload
        self.embeddings: dict[str, Tensor] = {}
        self._features: dict[str, dict[str, list[Tensor]]] = {site: {} for site in sites}

    @property
    def contexts(self) -> tuple[str, ...]:
        """The contexts met, in their order."""
        return tuple(self._features[self.sites[0]])

    def begin(self, request: Request) -> None:
        """A request starts.

        Raises:
            StatisticsError: it is the second one.
        """
        if self.request is not None:
            raise StatisticsError(
                f"{self.labels[0]} runs more than one request (its timesteps start again): give one function a request"
            )
        self.request = request

    def forecast(self, call: Call) -> None:
        """Nothing is forecast; the timesteps are kept, and what the first calls are told of the prompts."""
        self.device = call.sample.device
        if call.step == 0 and (embedding := embedding_of(call.inputs)) is not None:
            self.embeddings[call.context] = embedding.cpu()
        if call.step == len(self.timesteps):
            self.timesteps.append(float(torch.as_tensor(call.timestep).max()))

    def keep(self, call: Call, feature: Tensor | None) -> None:
        """Keep a hidden feature."""
        if "hidden" in self.sites:
            assert feature is not None  # `lose` raises
            self._append("hidden", call, feature)

    def observe(self, call: Call, output: Tensor) -> None:
        """Keep an output, but for the variance that some denoisers append to their channels."""
        if "output" in self.sites:
            sample = call.sample
            with_variance = sample.dim() > 3 and output.shape[1] == 2 * sample.shape[1]
            self._append("output", call, output[:, : sample.shape[1]] if with_variance else output)

    def refuse(self, call: Call, reason: str) -> None:
        """Nothing is forecast, so nothing can be refused."""

    def lose(self, reason: str) -> None:
        """A request without its features is of no use.

        Raises:
            StatisticsError: always.
        """
        raise StatisticsError(f"the hidden features cannot be taken: {reason}; give sites=('output',)")

    def features(self, site: str) -> dict[str, list[Tensor]]:
        """The features of each context so far, one a step."""
        return self._features[site]

    def gram(self, site: str) -> np.ndarray:
        """The mean inner products [C * T, C * T] of a site's features, which are dropped.

        Raises:
            StatisticsError: a feature is missing, not finite, or of another size than the others.
        """
        by_context = self._features[site]
        for context, own in by_context.items():
            if len(own) != len(self.timesteps):
                raise StatisticsError(
                    f"context {context!r} ran {len(own)} of {len(self.timesteps)} steps in {self.labels[0]}: every "
                    "context must run at every step (no guidance interval)"
                )
        features = [feature for own in by_context.values() for feature in own]
        if len({feature.numel() for feature in features}) > 1:
            raise StatisticsError(
                f"features of site {site!r} differ in size within one request ({self.labels[0]}): contexts and steps "
                "must work on one sample"
            )
        assert self.device is not None
        gram = _gram([feature.flatten() for feature in features], self.device)
        wrong = ~np.isfinite(np.diag(gram)).reshape(len(by_context), -1)
        if wrong.any():
            step, context = np.argwhere(wrong.T)[0]  # the first in time: others may follow from it
            raise StatisticsError(self._blame(site, int(step), list(by_context)[context]))
        by_context.clear()
        return gram

    def _append(self, site: str, call: Call, feature: Tensor) -> None:
        # A copy: the feature may be a view of more, or its memory the denoiser's own.
        kept = feature.detach().to("cpu" if self._offload else feature.device, copy=True).contiguous()
        self._features[site].setdefault(call.context, []).append(kept)

    def _blame(self, site: str, step: int, context: str) -> str:
        feature, label = self._features[site][context][step], self.labels[0]
        if len(feature) % len(self.labels) == 0:  # a request orders its batch call first
            whole = feature.unflatten(0, (-1, len(self.labels))).isfinite().transpose(0, 1).flatten(1).all(1)
            label = self.labels[whole.tolist().index(False)]
        return (
            f"the feature of site {site!r}, step {step}, context {context!r}, {label} holds NaN or infinity: check the "
            "model's weights and dtype (float16 overflows in many transformers; bfloat16 does not)"
        )


def _gram(features: Sequence[Tensor], device: torch.device) -> np.ndarray:
    """Mean products of flat features, in float64; widened piece by piece, since they are large."""
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    size = features[0].numel()
    piece = max(_CHUNK // (8 * len(features)), 1)
    total = torch.zeros(len(features), len(features), dtype=torch.float64, device=device)
    for begin in range(0, size, piece):
        part = torch.stack([feature[begin : begin + piece] for feature in features]).to(device).double()
        total += part @ part.T
    total = total / size
    return ((total + total.T) / 2).cpu().numpy()
