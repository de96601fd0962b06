"""The guard at work: what it looks at in the requests that run by one plan, and when one of them has to leave it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from .clock import Call, Request
from .guard import Guard, deviation, relative_error
from .history import History
from .likeness import FAR, Weights, embedding_of
from .mailbox import Mailbox, answers_later
from .plan import Expected, Plan, Row
from .retrace import Past, Retrace
from .stats import GuardStats

_ALTERED = (
    "the denoiser's weights are not those that the plan was fitted to (a LoRA, other precision?): the guard watches "
    "closely; fit again with these weights"
)
# A larger feature in a dtype that holds it has spoiled its request, as one that is not finite has.
_LARGEST = 2.0**60


class _Check(NamedTuple):
    """A computed feature whose size, and the error of the forecast of it, are under way on the device.

    Args:
        context, step: of the feature.
        answer: waits for the device and returns the two sums of `Ring.errors`.
        history: where the feature is stored.
        made: whether there was a forecast to compare with.
        expected: its error, if a request may leave its plan here.
        least: errors below it say nothing.
    """

    context: str
    step: int
    answer: Callable[[], list[float]]
    history: History
    made: bool
    expected: Expected | None
    least: float


class Vigil:
    """Watches the requests of one plan.

    Of each computed feature that is read or checked the device is asked for its size and for the error of the forecast
    that would have been made. A GPU is not waited for: its answer is read once the next computed step is under way, as
    it has long been there, and only that of the last one which a request can leave at, as the step after it comes.
    From the sizes it follows that forecasts are finite. While a size is not known it is taken to be one that float32
    or bfloat16 can hold many times; float16 cannot, so there it is waited for.

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
        self._checks: list[_Check] = []
        self._mailbox = Mailbox()
        self._checked = self._strange = False
        self.left: int | None = None
        # The last computed step after which a request can leave its plan: no later one is there to read answers at.
        self._last = max((step for step in plan.computed if step < plan.num_steps - 1), default=-1)
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
        self._checks.clear()
        if not self.judges:
            return None
        if self.guard.retrace:
            self._past = Past(request.sigmas or self._plan.sigmas)
        if self._altered(request.denoiser):
            self._suspect()
            return _ALTERED
        return None

    def look(self, call: Call) -> Retrace | None:
        """A call comes; returns the retrace that it must wait for, if a request has left its plan before."""
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
            over = call.step > self._last_judged and not any(check.expected for check in self._checks)
            if self.left is None and over:  # in no context can it leave any more
                self._past = None
        elif self._retrace is not None:
            self._saw().retraced += self._retrace.ran
            self._retrace.ran = 0
            if call.context == self._retrace.last:
                self._retrace = None

    def bound(self, call: Call, row: Row) -> float:
        """No element of the forecast of a row is larger; infinity where that is not known."""
        bound = abs(row.bias)
        for step, weight in zip(row.steps, row.weights, strict=True):
            bound += abs(weight) * self._bounds.get((call.context, step), math.inf)
        self._bounds[call.context, call.step] = bound
        return bound

    def is_finite(self, output: torch.Tensor) -> bool:
        """Whether what came of a forecast is finite; waits for the device."""
        finite = bool(output.isfinite().all())
        self._saw().replaced += not finite
        return finite

    def check(self, call: Call, feature: torch.Tensor, history: History, plan: Plan) -> None:
        """Ask how far the forecast of a computed step is from its feature.

        Args:
            call: of the step.
            feature: of it.
            history: of the context, before it stores the feature.
            plan: that the request runs by now.
        """
        step, measures = call.step, self.guard.measures
        row, expected = plan.checks_of(call.context).get(step), plan.expected_of(call.context).get(step)
        wanted = row is not None and (measures or expected is not None)
        if not wanted and plan.slots[step] < 0:
            return
        ring = history.prepare(feature)
        made = wanted and row is not None and history.holds(row)
        if not made or measures or step == plan.num_steps - 1:  # after it nothing can be made up for
            expected = None
        answer = self._mailbox.ask(ring.errors(step, feature.detach()))
        # An error as small as the rounding of features says nothing.
        least = torch.finfo(feature.dtype).eps
        self._checks.append(_Check(call.context, step, answer, history, made, expected, least))
        self._bounds[call.context, step] = _LARGEST

    def settle_before(self, call: Call) -> bool:
        """As a call comes, read what was asked at the last computed step; whether the request must leave its plan.

        This and `settle_after` wait for the device, and drop features that are not finite from their histories.
        """
        return call.step > self._last and self._settle(call.step - 1, own=True)

    def settle_after(self, call: Call, feature: torch.Tensor) -> bool:
        """Once the feature of a computed step is stored, read what is due; whether the request must leave its plan."""
        own = call.step == self._plan.num_steps - 1 or _at_once(feature)
        return self._settle(call.step, own)

    def _settle(self, ran: int, own: bool) -> bool:
        """Read what was asked before the last step that ran and, if `own`, at that one."""
        before, due = self.left, [check for check in self._checks if check.step < ran + own]
        self._checks = [check for check in self._checks if check.step >= ran + own]
        for check in due:
            squares, size = check.answer()
            if math.isfinite(size):
                self._bounds[check.context, check.step] = math.sqrt(size)
                if check.made:
                    self._judge(check, relative_error(squares, size), ran)
            else:
                self._bounds[check.context, check.step] = math.inf
                check.history.drop(check.step)
                self._saw().dropped += 1
        return before is None and self.left is not None

    def _judge(self, check: _Check, error: float, ran: int) -> None:
        saw, expected = self._saw(), check.expected
        saw.note(check.context, check.step, error)
        if expected is None or self.left is not None:
            return
        self._checked = True
        tolerance = min(self.guard.alert, self.guard.tolerance) if saw.alert or self._strange else self.guard.tolerance
        if deviation(error, expected, check.least) > tolerance:
            ratio = error / expected.error if expected.error else math.inf
            saw.switches, saw.last, saw.alert, self.left = saw.switches + 1, (check.step, ratio), True, ran

    def keeps(self, step: int, contexts: Collection[str]) -> bool:
        """Whether no feature of a step was found not to be finite; that of a context to come will be."""
        return all(self._bounds.get((context, step), 0.0) < math.inf for context in contexts)

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


def _at_once(feature: torch.Tensor) -> bool:
    """Whether to wait for what was asked of a feature: there is nothing to wait for, or its size is needed."""
    return not answers_later(feature) or feature.dtype == torch.float16
