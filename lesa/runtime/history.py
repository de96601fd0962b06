"""History: the ring buffer of one context's features, and the rows that read it, on the features' device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import ops
from ..plans.plan import Plan
from ..plans.rows import Row


class Ring(torch.nn.Module):
    """The memory of a history: features, the plan's rows as tables, and the step they are read at.

    A compiled forecast step reads all of it in place, and no step makes it compile again: tables are buffers. Features
    are none, because torch.compile compiles again for each shape of a buffer.

    Args:
        feature: one feature; shape, dtype and device of the ring.
        plan: its rows and checks.
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
        self._capacity = max(plan.capacity, 1)
        keep = torch.tensor(plan.slots, dtype=torch.int32)
        self.history = torch.empty((self._capacity, *feature.shape), dtype=feature.dtype, device=feature.device)
        tensors = {
            **_tables(plan, context, ops.wide_dtype(feature)),
            "keep": keep,
            "target": torch.where(keep < 0, self._capacity, keep),
            "step": torch.zeros(1, dtype=torch.int64),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(feature.device), persistent=False)
        self._forget()

    def _forget(self) -> None:
        """Forget what was prepared for the memory there was."""
        self._forecast: Callable[[], None] | None = None
        self._questions: dict[tuple[int, int], Question] = {}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Ring:
        self._forget()
        self.history = fn(self.history)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:  # a copy has memory of its own
        return {**self.__dict__, "_forecast": None, "_questions": {}}

    def fits(self, feature: torch.Tensor) -> bool:
        """Whether features like this one can be kept here."""
        ring = self.history
        return (ring.shape[1:], ring.dtype, ring.device) == (feature.shape, feature.dtype, feature.device)

    def ask(self, step: int, slot: int, truth: torch.Tensor) -> Question:
        """Ask how far the row of `step` is from its true feature, and store that in a slot, if it has one.

        Returns:
            Reads the two sums of `ops.forecast_errors`.
        """
        question = self._questions.get((step, slot))
        if question is None:
            row = self.slots[step], self.weights[step], self.bias[step]
            kept = self.history[slot] if slot >= 0 else None
            compare = ops.prepared_errors(self.history, *row, kept, self.backend)
            question = Question(compare, truth.device, ops.wide_dtype(truth))
            self._questions[step, slot] = question
        question.ask(truth)
        return question

    def fill(self, slot: int) -> torch.Tensor:
        """Write the forecast of the current step into its slot; where it has none, into a spare one made once."""
        if slot < 0:
            slot = self._capacity
            if len(self.history) == slot:
                self._forget()
                with torch.inference_mode(False):
                    self.history = torch.cat([self.history, torch.empty_like(self.history[:1])])
        if self._forecast is None:
            row = (self.slots, self.weights, self.bias, self.target, self.step)
            self._forecast = ops.prepared_forecast(self.history, *row, self.backend)
        self._forecast()
        return self.history[slot]


class Question:
    """Asks a device for two numbers again and again; they must be read before it is asked again.

    Args:
        put: is given two numbers' memory on the device and a feature, and has the device write the numbers.
        device: that is asked.
        dtype: of the numbers.
    """

    def __init__(
        self, put: Callable[[torch.Tensor, torch.Tensor], None], device: torch.device, dtype: torch.dtype
    ) -> None:
        later = device.type == "cuda"
        self._put = put
        with torch.inference_mode(False):  # later requests may run outside inference mode
            self._sums = torch.empty(2, dtype=dtype, device=device)
            self._memory = torch.empty(2, dtype=dtype, pin_memory=True) if later else self._sums
        self._done = torch.cuda.Event() if later else None

    def ask(self, feature: torch.Tensor) -> None:
        """Ask, without waiting."""
        self._put(self._sums, feature)
        if self._done is not None:
            self._memory.copy_(self._sums, non_blocking=True)
            self._done.record()

    def is_there(self) -> bool:
        """Whether `read` would not wait."""
        return self._done is None or self._done.query()

    def read(self) -> list[float]:
        """Wait for the numbers."""
        if self._done is not None:
            self._done.synchronize()
        return self._memory.tolist()


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
        """Copy the feature of a computed step, of any shape, if a row reads it."""
        slot = self._plan.slots[step]
        if slot >= 0:
            self._prepare(feature).history[slot].copy_(feature.detach())
            self._steps[slot] = step

    def compare(self, step: int, feature: torch.Tensor) -> Question | None:
        """Store the feature of a computed step, and ask how far its check is from it.

        Args:
            step: whose row stands for the check.
            feature: of the step.

        Returns:
            Reads the two sums of `ops.forecast_errors`; None where what the check reads is not here.
        """
        row = self._plan.checks_of(self._context)[step]
        if self.ring is None or not self.ring.fits(feature) or not self.holds(row):
            self.store(step, feature)
            return None
        slot = self._plan.slots[step]
        asked = self.ring.ask(step, slot, feature.contiguous())
        if slot >= 0:
            self._steps[slot] = step
        return asked

    def drop(self, step: int) -> None:
        """Forget the feature of a computed step, if it is still here."""
        slot = self._plan.slots[step]
        if slot >= 0 and self._steps[slot] == step:
            self._steps[slot] = -1

    def select(self, step: int) -> Ring:
        """The ring, set to forecast `step` and taken to hold that forecast; what its row reads must be here."""
        assert self.ring is not None
        self.ring.step.fill_(step)
        slot = self._plan.slots[step]
        if slot >= 0:
            self._steps[slot] = step
        return self.ring

    def _prepare(self, feature: torch.Tensor) -> Ring:
        """A ring for features like this one; a new shape, dtype or device starts a new ring."""
        if self.ring is None or not self.ring.fits(feature):
            self.clear()
            with torch.inference_mode(False):  # later requests may run outside inference mode
                self.ring = Ring(feature, self._plan, self._context, self._backend)
        return self.ring


def _tables(plan: Plan, context: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The rows and checks of a plan; a check stands in the row of its own, computed step, which no forecast uses."""
    rows = {**plan.rows_of(context), **plan.checks_of(context)}
    width = max((len(row.steps) for row in rows.values()), default=1)
    slots = torch.full((plan.num_steps, width), -1, dtype=torch.int32)
    weights, bias = torch.zeros(slots.shape, dtype=dtype), torch.zeros(plan.num_steps, dtype=dtype)
    for step, row in rows.items():
        slots[step, : len(row.steps)] = torch.tensor([plan.slots[read] for read in row.steps], dtype=torch.int32)
        weights[step, : len(row.steps)] = torch.tensor(row.weights, dtype=dtype)
        bias[step] = row.bias
    return {"slots": slots, "weights": weights, "bias": bias}
