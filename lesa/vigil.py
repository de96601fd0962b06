"""The guard at work: what it looks at in the requests that run by one plan, and when one of them has to leave it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch

from .clock import Call, Request
from .guard import Guard, deviation, relative_error
from .history import History
from .likeness import FAR, Weights, embedding_of
from .plan import Plan, Row
from .retrace import Past, Retrace
from .stats import GuardStats

_ALTERED = (
    "the denoiser's weights are not those that the plan was fitted to (a LoRA, other precision?): the guard watches "
    "closely; fit again with these weights"
)


class Vigil:
    """Watches the requests of one plan.

    A computed step whose feature is read or checked waits for the device once, for its size and the error of the
    forecast that would have been made. From these sizes it follows that forecasts are finite.

    Args:
        guard: when a request leaves its plan.
        plan: with what it expects.
        saw: where to count.
    """

    def __init__(self, guard: Guard, plan: Plan, saw: Callable[[], GuardStats]) -> None:
        self.guard, self._plan, self._saw = guard, plan, saw
        self._weights: Weights | None = None
        # No element of a step's feature is larger than this, by context and step.
        self._bounds: dict[tuple[str, int], float] = {}
        self._checked = self._strange = False
        self.left: int | None = None
        judged = (step for expected in plan.expected.values() for step in expected)
        self._last_judged = max((step for step in judged if step < plan.num_steps - 1), default=-1)
        self._past: Past | None = None
        self._retrace: Retrace | None = None

    @property
    def judges(self) -> bool:
        """Whether a request may leave its plan."""
        return not self.guard.measures

    def begin(self, request: Request) -> str | None:
        """A request starts; returns what people should be told of it."""
        if self._checked and self.left is None:
            self._saw().alert = False
        self._checked, self._strange, self.left, self._past, self._retrace = False, False, None, None, None
        self._bounds.clear()
        if not self.judges:
            return None
        if self.guard.retrace:
            self._past = Past(request.sigmas or self._plan.sigmas)
        if self._altered(request.denoiser):
            self._suspect()
            return _ALTERED
        return None

    def look(self, call: Call) -> Retrace | None:
        """A call comes; returns the retrace that it must wait for, if a request has left its plan just before."""
        if not self.judges:
            return None
        if call.step == 0 and self._plan.likeness is not None and not self._strange:
            embedding = embedding_of(call.inputs)
            if embedding is not None and self._plan.likeness.distance(call.context, embedding) > FAR:
                self._suspect()
        if self._past is not None:
            self._past.note(call)
            if self.left is not None and call.step > self.left:
                self._retrace, self._past = self._past.retrace(call), None
        return self._retrace if self._retrace is not None and self._retrace.step == call.step else None

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """A call ended with an output."""
        if self._past is not None:
            self._past.saw(call, output)
            if self.left is None and call.step > self._last_judged:  # in no context can it leave any more
                self._past = None
        elif self._retrace is not None:
            self._saw().retraced += self._retrace.ran
            self._retrace.ran = 0
            if call.context == self._retrace.last:
                self._retrace = None

    def bound(self, call: Call, row: Row) -> float:
        """No element of the forecast of a row is larger; infinity where that is not known."""
        reads = (self._bounds.get((call.context, step), math.inf) for step in row.steps)
        bound = abs(row.bias) + sum(abs(w) * size for w, size in zip(row.weights, reads, strict=True))
        self._bounds[call.context, call.step] = bound
        return bound

    def is_finite(self, output: torch.Tensor) -> bool:
        """Whether what came of a forecast is finite; waits for the device."""
        finite = bool(output.isfinite().all())
        self._saw().replaced += not finite
        return finite

    def check(self, call: Call, feature: torch.Tensor, history: History, plan: Plan) -> tuple[bool, bool]:
        """Compare the forecast of a computed step with its feature.

        Args:
            call: of the step.
            feature: of it.
            history: of the context.
            plan: that the request runs by now.

        Returns:
            Whether the feature is finite, and whether the request must leave its plan.
        """
        step, guard = call.step, self.guard
        row, expected = plan.checks_of(call.context).get(step), plan.expected_of(call.context).get(step)
        wanted = row is not None and (guard.measures or expected is not None)
        if not wanted and plan.slots[step] < 0:
            return True, False
        ring = history.prepare(feature)
        checked = wanted and row is not None and history.holds(row)
        squares, size = ring.errors(step, feature.detach())
        self._bounds[call.context, step] = math.sqrt(size) if math.isfinite(size) else math.inf
        if not math.isfinite(size):
            self._saw().dropped += 1
            return False, False
        if not checked:
            return True, False
        error = relative_error(squares, size)
        self._saw().note(call.context, step, error)
        if expected is None or guard.measures or step == plan.num_steps - 1:  # after it nothing can be made up for
            return True, False
        self._checked = True
        closely = self._saw().alert or self._strange
        tolerance = min(guard.alert, guard.tolerance) if closely else guard.tolerance
        # An error as small as the rounding of features says nothing.
        leaves = deviation(error, expected, torch.finfo(feature.dtype).eps) > tolerance
        if leaves:
            self._leave(step, error / expected.error if expected.error else math.inf)
        return True, leaves

    def keeps(self, step: int, contexts: Collection[str]) -> bool:
        """Whether no feature of a step was found not to be finite; that of a context to come will be."""
        return all(self._bounds.get((context, step), 0.0) < math.inf for context in contexts)

    def _leave(self, step: int, ratio: float) -> None:
        saw = self._saw()
        saw.switches, saw.last, saw.alert, self.left = saw.switches + 1, (step, ratio), True, step

    def _altered(self, denoiser: torch.nn.Module | None) -> bool:
        """Whether the denoiser's weights are others than in fitting."""
        if self._plan.likeness is None or denoiser is None:
            return False
        if self._weights is None or not self._weights.serves(denoiser):
            self._weights = Weights(denoiser)
        return self._plan.likeness.altered(self._weights.read())

    def _suspect(self) -> None:
        """Watch this request closely."""
        self._strange = True
        self._saw().strange += 1
