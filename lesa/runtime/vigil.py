"""The guard at work: what it looks at in the requests that run by one plan, and when one of them has to leave it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..planner.build import written_out
from ..plans.plan import Expected, Plan, Row
from .clock import Call, Request
from .guard import Guard, deviation, relative_error
from .history import History
from .likeness import FAR, Weights, embedding_of
from .mailbox import answers_later
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
        answer: waits for the device and returns the two sums of `History.ask`.
        history: where the feature is stored.
        made: whether there was a forecast to compare with.
        expected: its error, if a request may leave its plan here.
        dtype: of the feature; errors as small as its rounding say nothing.
    """

    context: str
    step: int
    answer: Callable[[], list[float]]
    history: History
    made: bool
    expected: Expected | None
    dtype: torch.dtype


class Vigil:
    """Watches the requests of one plan.

    Of each computed feature that is checked the device is asked for its size and for the error of the forecast that
    would have been made. A GPU is not waited for: its answer is read once the next computed step is under way, as it
    has long been there, and only that of the last one which a request can leave at, as the step after it comes.
    From the sizes it follows that forecasts are finite. A size that is not known is taken to be one that float32 or
    bfloat16 can hold many times. float16 cannot: there the sizes of all that is read are asked for and waited for, as
    on a device that answers at once. All are asked for, too, where no request may leave its plan. A feature that is not
    asked for and not finite is read on: its output was not finite either, so the sample is spoiled from there.

    Args:
        guard: when a request leaves its plan.
        plan: with what it expects.
        saw: where to count.
    """

    def __init__(self, guard: Guard, plan: Plan, saw: Callable[[], GuardStats]) -> None:
        self.guard, self._plan, self._saw = guard, plan, saw
        self.judges = not guard.measures  # whether a request may leave its plan
        self._weights: Weights | None = None
        # No element of a context's computed features, as far as they are finite, is larger than this; nor of a
        # forecast that later rows read, by context and step.
        self._largest: dict[str, float] = {}
        self._kept: dict[tuple[str, int], float] = {}
        self._spoiled: set[tuple[str, int]] = set()  # contexts and steps whose features are not finite
        self._checks: list[_Check] = []
        self._checked = self._strange = False
        self.left: int | None = None
        # The last computed step after which a request can leave its plan: no later one is there to read answers at.
        self._last = max((step for step in plan.computed if step < plan.num_steps - 1), default=-1)
        judged = (step for expected in plan.expected.values() for step in expected)
        self._last_judged = max((step for step in judged if step < plan.num_steps - 1), default=-1)
        self._past: Past | None = None
        self._retrace: Retrace | None = None
        self._all_held = _holds_all(plan)

    def begin(self, request: Request) -> str | None:
        """A request starts; returns what people should be told of it."""
        if self._checked and self.left is None:
            self._saw().alert = False
        self._checked, self._strange, self.left, self._past, self._retrace = False, False, None, None, None
        self._largest.clear()
        self._kept.clear()
        self._spoiled.clear()
        self._checks.clear()
        if not self.judges:
            return None
        if self.guard.retrace:
            self._past = Past(request.sigmas or self._plan.sigmas, adds=not self._all_held)
        if self._altered(request.denoiser):
            self._suspect()
            return _ALTERED
        return None

    def look(self, call: Call) -> Retrace | None:
        """A call comes; returns the retrace that it must wait for, if a request has left its plan before."""
        past = self._past
        if call.step == 0 and self.judges and self._plan.likeness is not None and not self._strange:
            embedding = embedding_of(call.inputs)
            if embedding is not None and self._plan.likeness.distance(call.context, embedding) > FAR:
                self._suspect()
        if past is not None:
            past.note(call)
            if self.left is None or call.step <= self.left:
                return None
            self._retrace, self._past = past.retrace(call), None
        return self._retrace if self._retrace is not None and self._retrace.step == call.step else None

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """A call ended with an output."""
        if self._past is not None:
            self._past.saw(call, output)
            if call.step > self._last_judged and self.left is None and not any(c.expected for c in self._checks):
                self._past = None  # in no context can it leave any more
        elif self._retrace is not None:
            self._saw().retraced += self._retrace.ran
            self._retrace.ran = 0
            if call.context == self._retrace.last:
                self._retrace = None

    def catch_up(self, histories: Mapping[str, History], under_way: str | None) -> None:
        """What is forecast is no longer what the plan says: to be called before the first such step or change of plan.

        Args:
            histories: by context.
            under_way: the context of a call that has begun and not ended.
        """
        if self._past is not None:
            self._past.catch_up(under_way, lambda name, rates: self._moved(histories.get(name), name, rates))

    def _moved(self, history: History | None, context: str, rates: Sequence[float]) -> torch.Tensor | None:
        """The outputs of the first steps, each times its rate, by what they were made of."""
        if history is None:
            return None
        shares = np.asarray(rates) @ written_out(self._plan, context)[: len(rates)]
        return history.weighted({step: float(shares[step]) for step in self._plan.computed if step < len(rates)})

    def bound(self, call: Call, row: Row) -> float:
        """No element of the forecast of a row is larger."""
        largest, bound = self._largest.get(call.context, 0.0), abs(row.bias)
        if self._kept:
            for step, weight in zip(row.steps, row.weights, strict=True):
                bound += abs(weight) * self._kept.get((call.context, step), largest)
        else:
            bound += largest * row.gain
        if self._plan.slots[call.step] >= 0:
            self._kept[call.context, call.step] = bound
        return bound

    def is_finite(self, output: torch.Tensor) -> bool:
        """Whether what came of a forecast is finite; waits for the device."""
        finite = bool(output.isfinite().all())
        self._saw().replaced += not finite
        return finite

    def keep(self, call: Call, feature: torch.Tensor, history: History, plan: Plan) -> bool:
        """Have the feature of a computed step stored if it is read, and ask how far its forecast is from it.

        Then read what is due of what was asked; returns whether the request must leave its plan.

        Args:
            call: of the step.
            feature: of it.
            history: of the context.
            plan: that the request runs by now.
        """
        step, context, later = call.step, call.context, not _at_once(feature)
        row, expected = plan.checks_of(context).get(step), plan.expected_of(context).get(step)
        wanted = row is not None and (expected is not None or not self.judges)
        self._kept.pop((context, step), None)  # its forecast was refused
        if later and self._largest.get(context, 0.0) < _LARGEST:
            self._largest[context] = _LARGEST
        if wanted or (plan.slots[step] >= 0 and not (later and self.judges)):
            history.prepare(feature)
            made = wanted and row is not None and history.holds(row)
            if not made or not self.judges or step == plan.num_steps - 1:  # after it nothing can be made up for
                expected = None
            answer = history.ask(step, feature)
            self._checks.append(_Check(context, step, answer, history, made, expected, feature.dtype))
        else:
            history.store(step, feature)
        return self._settle(step, own=not later or step == plan.num_steps - 1)

    def settle_before(self, call: Call) -> bool:
        """As a call comes, read what was asked at the last computed step; whether the request must leave its plan.

        This and `keep` wait for the device, and drop features that are not finite from their histories.
        """
        return call.step > self._last and self._settle(call.step - 1, own=True)

    def _settle(self, ran: int, own: bool) -> bool:
        """Read what was asked before the last step that ran and, if `own`, at that one."""
        before = self.left
        due = [check for check in self._checks if check.step < ran + own]
        if due:
            self._checks = [check for check in self._checks if check.step >= ran + own]
        for check in due:
            squares, size = check.answer()
            if math.isfinite(size):
                self._largest[check.context] = max(self._largest.get(check.context, 0.0), math.sqrt(size))
                if check.made:
                    self._judge(check, relative_error(squares, size), ran)
            else:
                self._spoiled.add((check.context, check.step))
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
        if deviation(error, expected, torch.finfo(check.dtype).eps) > tolerance:
            ratio = error / expected.error if expected.error else math.inf
            saw.switches, saw.last, saw.alert, self.left = saw.switches + 1, (check.step, ratio), True, ran

    def keeps(self, step: int, contexts: Collection[str]) -> bool:
        """Whether no feature of a step was found not to be finite; that of a context to come will be."""
        return not any((context, step) in self._spoiled for context in contexts)

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


def _holds_all(plan: Plan) -> bool:
    """Whether histories hold all that a plan's outputs are made of, to the end of a request."""
    held = [plan.slots[step] for step in plan.computed if step < plan.num_steps - 1]
    forecast = set(range(plan.num_steps)) - set(plan.computed)
    rows = [row for rows in plan.rows.values() for row in rows.values()]
    return (
        plan.site == "output"
        and min(held, default=-1) >= 0
        and len(set(held)) == len(held)
        and all(plan.slots[step] < 0 for step in forecast)
        and not any(row.bias for row in rows)
    )


def _at_once(feature: torch.Tensor) -> bool:
    """Whether to wait for what was asked of a feature: there is nothing to wait for, or its size is needed."""
    return not answers_later(feature.device) or feature.dtype == torch.float16
