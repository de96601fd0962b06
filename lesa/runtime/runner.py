"""The driver that runs plans."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import torch

from ..plans.plan import MAX_READS, Plan, PlanError
from .clock import Call, Request
from .driver import Forecast, LesaWarning
from .guard import Guard, foreign, leaving, rest_of
from .history import History
from .retrace import Retrace
from .stats import GuardStats, Stats
from .vigil import Vigil

# Beyond this the weights were made for a visibly different schedule of noise levels.
_SIGMA_TOLERANCE = 0.05
_ELSEWHERE = "enable a plan made for yours; of a fitted one, lesa.planner.build.adapt(plan, sigmas=...) makes it"


class PlanRunner:
    """Runs one plan: a history for every context, a row for every forecast step.

    With a guard, computed steps read what the device was asked, a GPU at the step before (see `Vigil`), and a forecast
    that may overflow its dtype waits for itself. Without one nothing waits, and checks take no memory.

    Args:
        plan: the plan to run.
        backend: of the operators, see `lesa.ops.forecast`.
        guard: when a request leaves its plan; None runs the plan as it is.
    """

    def __init__(self, plan: Plan, backend: str | None = None, guard: Guard | None = None) -> None:
        self.plan = plan
        self._backend = backend
        self.stats = Stats()
        self._vigil = None if guard is None else Vigil(guard, plan, self._saw)
        if guard is not None:
            self._saw()
        self._sparse = replace(plan, checks={}, expected={}) if guard is None else plan
        self._use(self._sparse)
        self._histories: dict[str, History] = {}
        self._inputs: dict[str, tuple] = {}
        self._warned: set[str] = set()
        self._lost: str | None = None

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
        self._lost = None
        told = None if self._vigil is None else self._vigil.begin(request)
        if told is not None:
            self._tell(told)

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
        retrace = None if self._vigil is None else self._look(self._vigil, call)
        if retrace is not None:
            return retrace
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
        vigil, accept = self._vigil, None
        if vigil is not None and not vigil.bound(call, row) < torch.finfo(ring.history.dtype).max:
            accept = functools.partial(self._is_finite, vigil, call)
        return Forecast(lambda: ring.fill(slot), ring, accept)

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        """Store the feature of a computed step for later forecasts."""
        if call.step in self._computed:
            self.stats.computed += 1
        if feature is None or self._lost:  # nothing reads it
            return
        history, vigil = self._history(call.context), self._vigil
        if vigil is None:
            history.store(call.step, feature)
            return
        if vigil.keep(call, feature, history, self._active):
            self._leave(vigil, call.step, call.context)

    def refuse(self, call: Call, reason: str) -> None:
        """Count a step that had to be computed although the plan forecasts it, and say so once for each reason."""
        self._warn(reason)
        self.stats.refused[reason] += 1
        if self._vigil is not None:
            self._vigil.catch_up(self._histories, call.context)

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """What a plan does depends on no output, but a retrace does."""
        if self._vigil is not None:
            self._vigil.observe(call, output)

    def _use(self, plan: Plan) -> None:
        self._active, self._computed = plan, frozenset(plan.computed)

    def _saw(self) -> GuardStats:
        if self.stats.guard is None:  # whoever runs several plans gives all of them the same stats
            self.stats.guard = GuardStats()
        return self.stats.guard

    @property
    def _watches(self) -> bool:
        """Whether a request may leave its plan."""
        return self._vigil is not None and self._vigil.judges

    def _is_finite(self, vigil: Vigil, call: Call, output: torch.Tensor) -> bool:
        """Whether what came of a forecast is finite; else the step is computed."""
        finite = vigil.is_finite(output)
        if not finite:
            self.refuse(call, "the forecast was not finite")
        return finite

    def _look(self, vigil: Vigil, call: Call) -> Retrace | None:
        """What a call must wait for; a request may have to leave its plan before it."""
        if vigil.settle_before(call):
            self._leave(vigil, call.step - 1, None)
        retrace = vigil.look(call)
        if retrace is not None and any(self._active.rows.values()):  # what would have repaid
            self._follow(rest_of(self.plan), call.step - 1)
        return retrace

    def _leave(self, vigil: Vigil, step: int, under_way: str | None) -> None:
        """Run what comes after a computed step, in all contexts, by what the guard makes of the plan."""
        self._warn("forecasts are worse than in fitting, so the guard has the request leave its plan")
        slot = self._active.slots[step]
        held = set.intersection(*(self._history(context).computed(slot) for context in self._inputs))
        # Contexts that have not run this step yet will hold it too.
        if slot >= 0 and vigil.keeps(step, self._inputs):
            held.add(step)
        vigil.catch_up(self._histories, under_way)
        self._follow(leaving(self._sparse, step, held), step)

    def _follow(self, plan: Plan, step: int) -> None:
        """Run what comes after a step by another plan."""
        self._use(plan)  # first: were the rest interrupted, the next request would know what to put back
        for history in self._histories.values():
            history.follow(plan, step)

    def _warn(self, reason: str) -> None:
        self._tell(f"lesa computes steps in full: {reason}")

    def _tell(self, what: str) -> None:
        """Say something once."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(what, LesaWarning, stacklevel=2)

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
            self._warned.add("sigmas")  # once, however far the next are off
            self._tell(
                f"the sigmas of this request differ from the plan's by up to {gap:.3f} (another shift, spacing or "
                "resolution): forecasts will be less exact; make a plan for these sigmas"
            )

    def _check_position(self, call: Call) -> None:
        """A bare denoiser does not tell its step count: its timesteps show whether the plan fits."""
        total, timesteps = self.plan.num_steps, self.plan.timesteps
        if call.step >= total:
            raise PlanError(
                f"step {call.step + 1} of a request in context {call.context!r}, but the plan was made for {total} "
                f"steps: run {total} steps or {_ELSEWHERE}"
            )
        if call.request.num_steps is not None or timesteps is None:
            return
        expected, now = timesteps[call.step], float(torch.as_tensor(call.timestep).max())
        neighbours = [timesteps[i] for i in (call.step - 1, call.step + 1) if 0 <= i < total]
        tolerance = min((abs(expected - t) for t in neighbours), default=abs(expected)) / 2
        if not abs(now - expected) <= tolerance:  # NaN is not
            raise PlanError(
                f"step {call.step} came with timestep {now:g} but the plan, made for {total} steps, expects "
                f"{expected:g}: run the {total} timesteps of the plan or {_ELSEWHERE}"
            )
