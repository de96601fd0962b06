"""What decides, at each denoiser call, between computing and forecasting: the `Driver`, and the one that runs plans."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .clock import Call, Request
from .guard import Guard, deviation, foreign, leaving, relative_error, rest_of
from .history import History, Ring
from .likeness import FAR, Weights, embedding_of
from .plan import MAX_READS, Plan, PlanError, Row
from .retrace import Past, Retrace
from .stats import GuardStats, Stats

# Beyond this the weights were made for a visibly different schedule of noise levels.
_SIGMA_TOLERANCE = 0.05


class LesaWarning(UserWarning):
    """Something keeps lesa from its full speed or fidelity."""


@dataclass(frozen=True)
class Forecast:
    """A feature to come.

    Args:
        feature: writes it out and returns it; in memory that the next step may overwrite.
        ring: forecasts it too, together with the denoiser's head; None where the feature is not a plan's.
        accept: whether what the denoiser made of it may stand; where not, the step is computed. None: it may.
    """

    feature: Callable[[], torch.Tensor]
    ring: Ring | None = None
    accept: Callable[[torch.Tensor], bool] | None = None


class Driver(Protocol):
    """Decides what each denoiser call does; the hooks ask it, and count the forecasts they used in `stats`."""

    stats: Stats

    def begin(self, request: Request) -> None:
        """A new request starts, before its first denoiser call."""

    def forecast(self, call: Call) -> Forecast | Retrace | None:
        """The forecast of this step, or None to have it computed, or what must be computed over again before it is."""

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        """A step was computed; its feature is None where `lose` was called for it."""

    def refuse(self, call: Call, reason: str) -> None:
        """The forecast of this step could not be used; the step is computed instead."""

    def lose(self, reason: str) -> None:
        """No feature can be taken or given any more in this request."""

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """A step ended: what the denoiser returned for it, computed or forecast; copy it to keep it."""


class Relay:
    """A driver that has another one run the requests; subclasses change what they must.

    Args:
        runner: the other one; its stats are the relay's.
    """

    def __init__(self, runner: Driver) -> None:
        self._runner = runner
        self.stats = runner.stats

    def begin(self, request: Request) -> None:
        """Handed to the runner."""
        self._runner.begin(request)

    def forecast(self, call: Call) -> Forecast | Retrace | None:
        """What the runner says."""
        return self._runner.forecast(call)

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        """Handed to the runner."""
        self._runner.keep(call, feature)

    def refuse(self, call: Call, reason: str) -> None:
        """Handed to the runner."""
        self._runner.refuse(call, reason)

    def lose(self, reason: str) -> None:
        """Handed to the runner."""
        self._runner.lose(reason)

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """Handed to the runner."""
        self._runner.observe(call, output)


class PlanRunner:
    """Runs one plan: a history for every context, a row for every forecast step.

    With a guard, a computed step whose feature is read or checked waits for the device once, for its size and the error
    of the forecast that would have been made. From these sizes it follows that forecasts are finite; one that might
    overflow its dtype is looked at, and waits too. Without a guard nothing waits, and checks take no memory.

    Args:
        plan: the plan to run.
        backend: of the operators, see `lesa.ops.forecast`.
        guard: when a request leaves its plan; None runs the plan as it is.
    """

    def __init__(self, plan: Plan, backend: str | None = None, guard: Guard | None = None) -> None:
        self.plan = plan
        self._backend, self._guard = backend, guard
        self.stats = Stats()
        if guard is not None:
            self._saw()
        self._sparse = replace(plan, checks={}, expected={}) if guard is None else plan
        self._use(self._sparse)
        self._histories: dict[str, History] = {}
        self._inputs: dict[str, tuple] = {}
        self._warned: set[str] = set()
        self._lost: str | None = None
        # No element of a step's feature is larger than this, by context and step.
        self._bounds: dict[tuple[str, int], float] = {}
        self._weights: Weights | None = None
        # In the request that runs.
        self._checked, self._strange = False, False
        self._left: int | None = None
        self._past: Past | None = None
        self._retrace: Retrace | None = None

    def begin(self, request: Request) -> None:
        """Start a request with empty histories.

        Raises:
            PlanError: the request has another number of steps than the plan.
        """
        if request.num_steps is not None and request.num_steps != self.plan.num_steps:
            raise PlanError(
                f"this request runs {request.num_steps} denoiser steps but the plan was made for "
                f"{self.plan.num_steps}: call the pipeline with num_inference_steps={self.plan.num_steps}, "
                f"make a plan for {request.num_steps} steps, or lesa.disable(pipe) (image-to-image runs strength times "
                "num_inference_steps)"
            )
        if request.sigmas is not None:
            self._compare_sigmas(request.sigmas)
        self.stats.requests += 1
        for history in self._histories.values():
            history.clear()
            if self._active is not self._sparse:
                history.follow(self._sparse, self.plan.num_steps)
        self._use(self._sparse)
        self._inputs.clear()
        self._bounds.clear()
        self._lost = None
        if self._guard is not None and self._checked and self._left is None:
            self._saw().alert = False
        self._checked, self._strange, self._left, self._retrace = False, False, None, None
        keeps = self._watches and self._guard is not None and self._guard.retrace
        self._past = Past(request.sigmas or self.plan.sigmas) if keeps else None
        if self._watches and self._altered(request.denoiser):
            self._suspect("the denoiser's weights are not those that the plan was fitted to")

    def lose(self, reason: str) -> None:
        """Compute the rest of this request in full."""
        self._warn(reason)
        self._lost = reason

    def forecast(self, call: Call) -> Forecast | Retrace | None:
        """Forecast the feature of a step the plan does not compute.

        Raises:
            PlanError: a bare denoiser's calls do not follow the plan's timesteps.
        """
        self._check_position(call)
        if self._watches:
            self._look(call)
            if self._retrace is not None and call.step == self._retrace.step:
                return self._retrace
        signature = (call.sample.shape, call.sample.dtype, call.sample.device)
        changed = self._inputs.setdefault(call.context, signature) != signature
        if changed:
            self._inputs[call.context] = signature
            self._history(call.context).clear()
        if call.step in self._computed:
            return None
        if self._lost is None and self._watches and foreign(self.plan, self._inputs):
            self.lose(
                f"the request runs {len(self._inputs)} contexts, the plan was fitted to fewer (guidance was off then); "
                "fit it with the same guidance, or pass guard=False"
            )
        if self._lost:
            self.refuse(call, self._lost)
            return None
        row = self._active.rows_of(call.context).get(call.step)
        if row is None:
            self.refuse(call, f"the plan has no row for context {call.context!r}")
            return None
        if changed:
            self.refuse(call, "the sample changed shape, dtype or device in the middle of a request")
            return None
        history = self._history(call.context)
        if not history.holds(row):
            self.refuse(call, "a step that the forecast reads is not held (not run in this request, or not finite)")
            return None
        ring, slot = history.select(call.step), self._active.slots[call.step]
        safe = self._guard is None or self._bound(call, row) < torch.finfo(ring.history.dtype).max
        accept = None if safe else functools.partial(self._is_finite, call)
        return Forecast(lambda: ring.fill(slot), ring, accept)

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        """Store the feature of a computed step for later forecasts."""
        if call.step in self._computed:
            self.stats.computed += 1
        if feature is None or self._lost:  # nothing reads it
            return
        finite = self._guard is None or self._watch(self._guard, call, feature)
        history = self._history(call.context)
        if finite:
            history.store(call.step, feature)
        else:
            history.drop(call.step)

    def refuse(self, call: Call, reason: str) -> None:
        """Count a step that had to be computed although the plan forecasts it, and say so once for each reason."""
        self._warn(reason)
        self.stats.refused[reason] += 1

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """What a plan does depends on no output; what a retrace starts from is kept."""
        if self._past is not None:
            self._past.saw(call, output)
            if call.step == self.plan.num_steps - 1:
                self._past = None

    def _look(self, call: Call) -> None:
        """What the guard makes of a call before it runs."""
        if call.step == 0 and self.plan.likeness is not None and not self._strange:
            embedding = embedding_of(call.inputs)
            if embedding is not None and self.plan.likeness.distance(call.context, embedding) > FAR:
                self._suspect()
        if self._past is None:
            return
        self._past.note(call)
        if self._left is not None and call.step > self._left:
            self._retrace = self._past.retrace(call)
            self._past = None
            if self._retrace is not None:
                self._saw().retraced += self._retrace.calls
                self._follow(rest_of(self.plan), self._left)

    def _altered(self, denoiser: torch.nn.Module | None) -> bool:
        """Whether the denoiser's weights are others than in fitting."""
        if self.plan.likeness is None or denoiser is None:
            return False
        if self._weights is None or not self._weights.serves(denoiser):
            self._weights = Weights(denoiser)
        return self.plan.likeness.altered(self._weights.read())

    def _suspect(self, reason: str | None = None) -> None:
        """Watch this request more closely."""
        self._strange = True
        self._saw().strange += 1
        if reason is not None and reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"{reason} (a LoRA, other precision?): the guard watches closely; fit again with these weights",
                LesaWarning,
                stacklevel=2,
            )

    def _use(self, plan: Plan) -> None:
        self._active, self._computed = plan, frozenset(plan.computed)

    def _saw(self) -> GuardStats:
        if self.stats.guard is None:  # whoever runs several plans gives all of them the same stats
            self.stats.guard = GuardStats()
        return self.stats.guard

    @property
    def _watches(self) -> bool:
        """Whether a request may leave its plan."""
        return self._guard is not None and not self._guard.measures

    def _bound(self, call: Call, row: Row) -> float:
        """No element of the forecast of a row is larger; infinity where that is not known."""
        reads = (self._bounds.get((call.context, step), math.inf) for step in row.steps)
        bound = abs(row.bias) + sum(abs(w) * size for w, size in zip(row.weights, reads, strict=True))
        self._bounds[call.context, call.step] = bound
        return bound

    def _is_finite(self, call: Call, output: torch.Tensor) -> bool:
        """Whether what came of a forecast is finite; waits for the device."""
        if bool(output.isfinite().all()):
            return True
        self._saw().replaced += 1
        self.refuse(call, "the forecast was not finite")
        return False

    def _watch(self, guard: Guard, call: Call, feature: torch.Tensor) -> bool:
        """Compare the forecast of a computed step with its feature; whether the feature is finite. Waits once."""
        plan, step = self._active, call.step
        history = self._history(call.context)
        row, expected = plan.checks_of(call.context).get(step), plan.expected_of(call.context).get(step)
        wanted = row is not None and (guard.measures or expected is not None)
        if not wanted and plan.slots[step] < 0:
            return True
        ring = history.prepare(feature)
        checked = wanted and row is not None and history.holds(row)
        squares, size = ring.errors(step, feature.detach())
        if not math.isfinite(size):
            self._saw().dropped += 1
            self._bounds[call.context, step] = math.inf
            return False
        self._bounds[call.context, step] = math.sqrt(size)
        if checked:
            error = relative_error(squares, size)
            self._saw().note(call.context, step, error)
            if expected is not None and not guard.measures:
                # An error as small as the rounding of features says nothing.
                off = deviation(error, expected, torch.finfo(feature.dtype).eps)
                self._checked = True
                closely = self._saw().alert or self._strange
                if off > (min(guard.alert, guard.tolerance) if closely else guard.tolerance):
                    self._leave(step, error / expected.error if expected.error else math.inf)
        return True

    def _leave(self, step: int, ratio: float) -> None:
        """Run the rest of this request, in all contexts, by what the guard makes of its plan."""
        self._warn("forecasts are worse than in fitting, so the guard has the rest of the request computed")
        saw = self._saw()
        saw.switches, saw.last, saw.alert, self._left = saw.switches + 1, (step, ratio), True, step
        slot = self._active.slots[step]
        held = set.intersection(*(self._history(context).computed(slot) for context in self._inputs))
        # Contexts that have not run this step yet will hold it too.
        if slot >= 0 and all(self._bounds.get((context, step), 0.0) < math.inf for context in self._inputs):
            held.add(step)
        self._follow(leaving(self._sparse, step, held), step)

    def _follow(self, plan: Plan, step: int) -> None:
        """Run what comes after a step by another plan."""
        for history in self._histories.values():
            history.follow(plan, step)
        self._use(plan)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"lesa computes steps in full: {reason}", LesaWarning, stacklevel=2)

    def _history(self, context: str) -> History:
        if context not in self._histories:
            # What repays reads whatever is held.
            least = min(self._sparse.capacity, MAX_READS) if self._watches else 1
            self._histories[context] = history = History(self._sparse, context, self._backend, least)
            if self._active is not self._sparse:
                history.follow(self._active, self.plan.num_steps)
        return self._histories[context]

    def _compare_sigmas(self, sigmas: tuple[float, ...]) -> None:
        gap = max(abs(a - b) for a, b in zip(sigmas, self.plan.sigmas, strict=True))
        forecasts = self.plan.budget < self.plan.num_steps
        if forecasts and gap > _SIGMA_TOLERANCE and "sigmas" not in self._warned:
            self._warned.add("sigmas")
            warnings.warn(
                f"the sigmas of this request differ from the plan's by up to {gap:.3f} (another shift, spacing or "
                "resolution): forecasts will be less exact; make a plan for these sigmas",
                LesaWarning,
                stacklevel=2,
            )

    def _check_position(self, call: Call) -> None:
        """A bare denoiser does not tell its step count: its timesteps show whether the plan fits."""
        total, timesteps = self.plan.num_steps, self.plan.timesteps
        if call.step >= total:
            raise PlanError(
                f"step {call.step + 1} of a request in context {call.context!r}, but the plan was made for {total} "
                f"steps: run {total} steps or make a plan for your step count"
            )
        if call.request.num_steps is not None or timesteps is None:
            return
        expected, now = timesteps[call.step], float(torch.as_tensor(call.timestep).max())
        neighbours = [timesteps[i] for i in (call.step - 1, call.step + 1) if 0 <= i < total]
        tolerance = min((abs(expected - t) for t in neighbours), default=abs(expected)) / 2
        if abs(now - expected) > tolerance:
            raise PlanError(
                f"step {call.step} came with timestep {now:g} but the plan, made for {total} steps, expects "
                f"{expected:g}: run the {total} timesteps of the plan or make a plan for yours"
            )
