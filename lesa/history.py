"""History: the ring buffer of one context's features, and the rows that read it, on the features' device."""

from __future__ import annotations

import torch

from . import ops
from .plan import Plan, Row


class Ring(torch.nn.Module):
    """The memory of a history: features, the plan's rows as tables, and the step they are read at.

    All of it are buffers, so that a compiled forecast step reads them in place and no step makes it compile again.

    Args:
        feature: one feature; shape, dtype and device of the ring.
        plan: its rows.
        context: whose rows.
        backend: of the operators, see `lesa.ops.forecast`.
    """

    history: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor
    keep: torch.Tensor
    target: torch.Tensor
    step: torch.Tensor

    def __init__(self, feature: torch.Tensor, plan: Plan, context: str, backend: str | None) -> None:
        super().__init__()
        self.backend = backend
        rows = plan.rows_of(context)
        width = max((len(row.steps) for row in rows.values()), default=1)
        wide = ops.wide_dtype(feature)
        slots = torch.full((plan.num_steps, width), -1, dtype=torch.int32)
        weights, bias = torch.zeros(plan.num_steps, width, dtype=wide), torch.zeros(plan.num_steps, dtype=wide)
        for step, row in rows.items():
            slots[step, : len(row.steps)] = torch.tensor([plan.slots[read] for read in row.steps], dtype=torch.int32)
            weights[step, : len(row.steps)] = torch.tensor(row.weights, dtype=wide)
            bias[step] = row.bias
        keep = torch.tensor(plan.slots, dtype=torch.int32)
        self._capacity = max(plan.capacity, 1)
        tensors = {
            "history": torch.empty((self._capacity, *feature.shape), dtype=feature.dtype, device=feature.device),
            "slots": slots,
            "weights": weights,
            "bias": bias,
            "keep": keep,
            "target": torch.where(keep < 0, self._capacity, keep),
            "step": torch.zeros(1, dtype=torch.int64),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(feature.device), persistent=False)

    def fits(self, feature: torch.Tensor) -> bool:
        """Whether features like this one can be kept here."""
        ring = self.history
        return (ring.shape[1:], ring.dtype, ring.device) == (feature.shape, feature.dtype, feature.device)

    def head(
        self,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """The forecast of the current step, brought through the denoiser's head; see `ops.forecast_head`."""
        row = (self.history, self.slots, self.weights, self.bias, self.keep, self.step)
        return ops.forecast_head(*row, scale, shift, weight, bias, eps, self.backend)

    def fill(self, slot: int) -> torch.Tensor:
        """Write the forecast of the current step into its slot; where it has none, into a spare one made once."""
        if slot < 0:
            slot = self._capacity
            if len(self.history) == slot:
                with torch.inference_mode(False):
                    self.history = torch.cat([self.history, torch.empty_like(self.history[:1])])
        ops.forecast_into_(self.history, self.slots, self.weights, self.bias, self.target, self.step, self.backend)
        return self.history[slot]


class History:
    """Holds the features that later forecasts of one context read.

    Args:
        plan: whose rows read them.
        context: the cache context.
        backend: of the operators, see `lesa.ops.forecast`.
    """

    def __init__(self, plan: Plan, context: str, backend: str | None = None) -> None:
        self._plan, self._context, self._backend = plan, context, backend
        self._steps = [-1] * plan.capacity
        self.ring: Ring | None = None

    def clear(self) -> None:
        """Forget all features and keep the memory for the next request."""
        self._steps = [-1] * len(self._steps)

    def holds(self, row: Row) -> bool:
        """Whether every feature that `row` reads is here."""
        return all(self._steps[self._plan.slots[step]] == step for step in row.steps)

    def store(self, step: int, feature: torch.Tensor) -> None:
        """Copy the feature of `step`, of any shape; a new shape, dtype or device starts a new ring."""
        slot = self._plan.slots[step]
        if slot < 0:
            return
        if self.ring is None or not self.ring.fits(feature):
            self.clear()
            with torch.inference_mode(False):  # later requests may run outside inference mode
                self.ring = Ring(feature, self._plan, self._context, self._backend)
        self.ring.history[slot].copy_(feature.detach())
        self._steps[slot] = step

    def select(self, step: int) -> Ring:
        """The ring, set to forecast `step` and taken to hold that forecast; what its row reads must be here."""
        assert self.ring is not None
        self.ring.step.fill_(step)
        slot = self._plan.slots[step]
        if slot >= 0:
            self._steps[slot] = step
        return self.ring
