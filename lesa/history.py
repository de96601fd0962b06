"""History: the ring buffer of one context's features."""

from __future__ import annotations

import torch

from . import ops
from .plan import Row


class History:
    """Holds the features that later forecasts of one context read.

    Args:
        slots: the slot of each step's feature, -1 where none is kept (`Plan.slots`).
        capacity: number of slots (`Plan.capacity`).
    """

    def __init__(self, slots: tuple[int, ...], capacity: int) -> None:
        self._slots = slots
        self._steps = [-1] * capacity
        self._buffer: torch.Tensor | None = None

    def clear(self) -> None:
        """Forget all features and keep the memory for the next request."""
        self._steps = [-1] * len(self._steps)

    def holds(self, row: Row) -> bool:
        """Whether every feature that `row` reads is here."""
        return all(self._steps[self._slots[step]] == step for step in row.steps)

    def store(self, step: int, feature: torch.Tensor) -> None:
        """Copy the feature of `step`, of any shape; a new shape, dtype or device starts a new buffer."""
        slot = self._slots[step]
        if slot < 0:
            return
        buffer = self._buffer
        if buffer is None or (buffer.shape[1:], buffer.dtype, buffer.device) != (
            feature.shape,
            feature.dtype,
            feature.device,
        ):
            self.clear()
            with torch.inference_mode(False):  # later requests may run outside inference mode
                buffer = self._buffer = torch.empty(
                    (len(self._steps), *feature.shape), dtype=feature.dtype, device=feature.device
                )
        buffer[slot].copy_(feature.detach())
        self._steps[slot] = step

    def forecast(self, row: Row) -> torch.Tensor:
        """The feature that `row` forecasts, in the features' shape and dtype; `holds(row)` must be true."""
        assert self._buffer is not None
        slots = [self._slots[step] for step in row.steps]
        return ops.forecast(self._buffer, slots, row.weights, row.bias)
