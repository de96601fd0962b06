"""History: the ring buffer of one context's features, and the rows that read it, on the features' device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import ops
from ..plans.plan import Plan, Row
from .mailbox import Question


class Ring(torch.nn.Module):
    """The memory of a history: features, the plan's rows as tables, and the step they are read at.

    All of it are buffers, so that a compiled forecast step reads them in place and no step makes it compile again.

    Args:
        feature: one feature; shape, dtype and device of the ring.
        plan: its rows and checks.
        context: whose rows.
        backend: of the operators, see `lesa.ops.forecast`.
        least: slots, and reads of a row, that there is room for at least, so that another plan may take over.
    """

    history: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor
    keep: torch.Tensor
    target: torch.Tensor
    step: torch.Tensor

    def __init__(self, feature: torch.Tensor, plan: Plan, context: str, backend: str | None, least: int = 1) -> None:
        super().__init__()
        self.backend = backend
        width = max((len(row.steps) for row in _rows(plan, context).values()), default=1)
        wide, shape = ops.wide_dtype(feature), (plan.num_steps, max(width, least))
        self._capacity = max(plan.capacity, least)
        tensors = {
            "history": torch.empty((self._capacity, *feature.shape), dtype=feature.dtype, device=feature.device),
            "slots": torch.zeros(shape, dtype=torch.int32),
            "weights": torch.zeros(shape, dtype=wide),
            "bias": torch.zeros(plan.num_steps, dtype=wide),
            "keep": torch.zeros(plan.num_steps, dtype=torch.int32),
            "target": torch.zeros(plan.num_steps, dtype=torch.int32),
            "step": torch.zeros(1, dtype=torch.int64),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(feature.device), persistent=False)
        self._forget()
        self.follow(plan, context)

    def _forget(self) -> None:
        """Forget what was prepared for the memory there was."""
        self._forecast: Callable[[], None] | None = None
        self._questions: dict[tuple[int, int], Question] = {}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Ring:
        self._forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:  # a copy has memory of its own
        return {**self.__dict__, "_forecast": None, "_questions": {}}

    def follow(self, plan: Plan, context: str) -> None:
        """Take the rows and checks of a plan into the tables, in place: a compiled step sees no other ring.

        A check stands in the row of its own, computed step, which no forecast uses.
        """
        slots = torch.full(self.slots.shape, -1, dtype=self.slots.dtype)
        weights = torch.zeros(self.weights.shape, dtype=self.weights.dtype)
        bias = torch.zeros(self.bias.shape, dtype=self.bias.dtype)
        for step, row in _rows(plan, context).items():
            slots[step, : len(row.steps)] = torch.tensor([plan.slots[read] for read in row.steps], dtype=torch.int32)
            weights[step, : len(row.steps)] = torch.tensor(row.weights, dtype=weights.dtype)
            bias[step] = row.bias
        keep = torch.tensor(plan.slots, dtype=torch.int32)
        self.slots.copy_(slots)
        self.weights.copy_(weights)
        self.bias.copy_(bias)
        self.keep.copy_(keep)
        self.target.copy_(torch.where(keep < 0, self._capacity, keep))

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

    def ask(self, step: int, slot: int, truth: torch.Tensor) -> Callable[[], list[float]]:
        """Ask how far the row of `step` is from its true feature, and store that in a slot, if it has one.

        Returns:
            What waits for the two sums of `ops.forecast_errors`.
        """
        question = self._questions.get((step, slot))
        if question is None:
            row = self.slots[step], self.weights[step], self.bias[step]
            kept = self.history[slot] if slot >= 0 else None
            compare = ops.prepared_errors(self.history, *row, kept, self.backend)
            question = Question(compare, truth.device, ops.wide_dtype(truth))
            self._questions[step, slot] = question
        return question.ask(truth)

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


class History:
    """Holds the features that later forecasts of one context read.

    Args:
        plan: whose rows read them; another may take over for a while, in the memory that this one asks for.
        context: the cache context.
        backend: of the operators, see `lesa.ops.forecast`.
        least: room for another plan, see `Ring`.
    """

    def __init__(self, plan: Plan, context: str, backend: str | None = None, least: int = 1) -> None:
        self._home = self._plan = plan
        self._context, self._backend, self._least = context, backend, least
        self._steps = [-1] * plan.capacity
        self._computed: set[int] = set()
        self.ring: Ring | None = None

    def computed(self, besides: int = -1) -> set[int]:
        """The steps whose features were computed and are here, in other slots than `besides`."""
        return self._computed.intersection(step for slot, step in enumerate(self._steps) if slot != besides)

    def clear(self) -> None:
        """Forget all features and keep the memory for the next request."""
        self._steps = [-1] * len(self._steps)
        self._computed.clear()

    def holds(self, row: Row) -> bool:
        """Whether every feature that `row` reads is here."""
        return all(self._steps[self._plan.slots[step]] == step for step in row.steps)

    def weighted(self, weights: Mapping[int, float]) -> torch.Tensor | None:
        """The sum of features by step, each times its weight, in float32 or wider; None where one is not here."""
        if self.ring is None or not all(step in self._steps for step in weights):
            return None
        features = self.ring.history
        total = torch.zeros_like(features[0], dtype=ops.wide_dtype(features))
        for step, weight in weights.items():
            total.add_(features[self._steps.index(step)], alpha=weight)
        return total

    def prepare(self, feature: torch.Tensor) -> Ring:
        """A ring for features like this one; a new shape, dtype or device starts a new ring."""
        if self.ring is None or not self.ring.fits(feature):
            self.clear()
            with torch.inference_mode(False):  # later requests may run outside inference mode
                self.ring = Ring(feature, self._home, self._context, self._backend, self._least)
                if self._plan is not self._home:
                    self.ring.follow(self._plan, self._context)
        return self.ring

    def store(self, step: int, feature: torch.Tensor) -> None:
        """Copy the feature of a computed step, of any shape."""
        slot = self._plan.slots[step]
        if slot >= 0:
            self.prepare(feature).history[slot].copy_(feature.detach())
            self._hold(step, slot)

    def ask(self, step: int, feature: torch.Tensor) -> Callable[[], list[float]]:
        """Store the feature of a computed step, for which there is a ring, and ask how far its check is from it.

        Args:
            step: whose row stands for the check; what it reads is taken as it is.
            feature: of the step.

        Returns:
            What waits for the two sums of `ops.forecast_errors`.
        """
        assert self.ring is not None
        slot = self._plan.slots[step]
        answer = self.ring.ask(step, slot, feature.contiguous())
        if slot >= 0:
            self._hold(step, slot)
        return answer

    def _hold(self, step: int, slot: int) -> None:
        self._steps[slot] = step
        self._computed.add(step)

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

    def follow(self, plan: Plan, after: int) -> None:
        """Go over to another plan in the memory there is, with what is here of what its rows after a step read.

        Args:
            plan: of the same request, with at most as many slots and reads as there is room for.
            after: the last step that ran; steps up to it are not forecast any more.
        """
        rows = _rows(plan, self._context)
        wanted = {read for step, row in rows.items() if step > after for read in row.steps if read <= after}
        here = {step: slot for slot, step in enumerate(self._steps) if step in wanted}
        self._plan, self._steps = plan, [-1] * plan.capacity
        if self.ring is None:
            return
        # All of them are read before one is written: their slots may overlap.
        moved = {step: self.ring.history[slot].clone() for step, slot in here.items() if slot != plan.slots[step]}
        for step, feature in moved.items():
            self.ring.history[plan.slots[step]].copy_(feature)
        for step in here:
            self._steps[plan.slots[step]] = step
        self.ring.follow(plan, self._context)


def _rows(plan: Plan, context: str) -> dict[int, Row]:
    return {**plan.rows_of(context), **plan.checks_of(context)}
