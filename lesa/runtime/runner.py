"""The drivers that run plans: `PlanRunner` one plan, `Adaptive` an adapted plan for each kind of request."""

from __future__ import annotations

import functools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..planner.build import adapt, plan_for, surrogate_of
from ..planner.statistics import Statistics, flow_impulse_response
from ..plans.plan import Plan
from ..plans.rows import ANY_CONTEXT, LesaWarning, PlanError
from .checks import Checks, checked, risky_steps
from .clock import Call, Request, impulse_response_of
from .driver import Forecast, Relay, Stats
from .history import History

# Beyond this the weights were made for a visibly different schedule of noise levels.
_SIGMA_TOLERANCE = 0.05
_ELSEWHERE = "enable a plan made for yours; of a fitted one, plan.adapt(sigmas=...) makes it"
_MOST_PLANS = 16  # a few kilobytes each
_DIGITS = 6  # of a sigma; noise levels come from float32
_SAME = 1e-3  # of noise levels and impulse responses


class PlanRunner:
    """Runs one plan: a history for every context, a row for every forecast step.

    A forecast that may not be finite is looked at before it stands; no other one is waited for.

    Args:
        plan: the plan to run.
        backend: of the operators, see `lesa.ops.forecast`.
        guard: "warn" measures the errors that the plan knows how to judge; "off" measures nothing.
    """

    def __init__(self, plan: Plan, backend: str | None = None, guard: str = "warn") -> None:
        self.plan = plan
        self.stats = Stats()
        self._run = checked(plan, guard)
        self.stats.guard = guard if self._run.checks else "off"
        self._backend = backend
        self._checks = Checks(self._run, self._tell)
        self._computed = frozenset(plan.computed)
        self._histories: dict[str, History] = {}
        self._inputs: dict[str, tuple] = {}
        self._risky: dict[tuple[str, torch.dtype], frozenset[int]] = {}
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
        self._checks.begin(self.stats)
        self.stats.requests += 1
        for history in self._histories.values():
            history.clear()
        self._inputs.clear()
        self._lost = None

    def lose(self, reason: str) -> None:
        """Compute the rest of this request in full."""
        self._warn(reason)
        self._lost = reason

    def forecast(self, call: Call) -> Forecast | None:
        """Forecast the feature of a step the plan does not compute.

        Raises:
            PlanError: a bare denoiser's calls do not follow the plan's timesteps.
        """
        self._check_position(call)
        if call.step == self.plan.num_steps - 1:
            self._checks.settle(self.stats)
        signature = (call.sample.shape, call.sample.dtype, call.sample.device)
        changed = self._inputs.setdefault(call.context, signature) != signature
        if changed:
            self._inputs[call.context] = signature
            self._history(call.context).clear()
        if call.step in self._computed:
            return None
        reason = self._lost
        row = self._run.rows_of(call.context).get(call.step)
        if reason is None and row is None:
            reason = f"the plan has no row for context {call.context!r}"
        elif reason is None and changed:
            reason = "the sample changed shape, dtype or device in the middle of a request"
        elif reason is None and row is not None and not self._history(call.context).holds(row):
            reason = "a step that the forecast reads is not held (not run in this request, or not finite)"
        if reason is not None:
            self.refuse(call, reason)
            return None
        self._note_guidance()
        ring, slot = self._history(call.context).select(call.step), self._run.slots[call.step]
        accept = None
        if call.step in self._risky_steps(call.context, ring.history.dtype):
            accept = functools.partial(self._is_finite, call)
        return Forecast(lambda: ring.fill(slot), ring, accept)

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        """Store the feature of a computed step for later forecasts."""
        if call.step in self._computed:
            self.stats.computed += 1
        if feature is not None and self._lost is None:  # else nothing reads it
            self._checks.keep(call, feature, self._history(call.context), self.stats)

    def refuse(self, call: Call, reason: str) -> None:
        """Count a step that had to be computed although the plan forecasts it, and say so once for each reason."""
        self._warn(reason)
        self.stats.refused[reason] += 1

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """What a plan does depends on no output."""

    def settle(self) -> None:
        """Wait for the errors that are being measured."""
        self._checks.settle(self.stats)

    def _is_finite(self, call: Call, output: torch.Tensor) -> bool:
        """Whether what came of a forecast is finite; else the step is computed. Waits for the device."""
        finite = bool(output.isfinite().all())
        if not finite:
            self.refuse(call, "the forecast was not finite")
        return finite

    def _note_guidance(self) -> None:
        """Say so where guidance joined a request of a plan that was fitted to requests of one context."""
        if len(self._inputs) > 1 and self._run.expected and set(self._run.rows) == {ANY_CONTEXT}:
            self._tell(
                f"this request calls the denoiser in {len(self._inputs)} contexts a step (guidance), but the plan was "
                "fitted without guidance. The plan goes on, with less fidelity; fit it with the same guidance"
            )

    def _risky_steps(self, context: str, dtype: torch.dtype) -> frozenset[int]:
        key = context, dtype
        if key not in self._risky:
            self._risky[key] = risky_steps(self._run, context, dtype)
        return self._risky[key]

    def _warn(self, reason: str) -> None:
        self._tell(f"lesa computes steps in full: {reason}")

    def _tell(self, what: str) -> None:
        """Say something once: what stands before its first colon decides, the figures after it change."""
        topic = what if what.startswith("lesa computes") else what.partition(":")[0]
        if topic not in self.stats.told:
            self.stats.told.add(topic)
            warnings.warn(what, LesaWarning, stacklevel=2)

    def _history(self, context: str) -> History:
        if context not in self._histories:
            self._histories[context] = History(self._run, context, self._backend)
        return self._histories[context]

    def _compare_sigmas(self, sigmas: tuple[float, ...]) -> None:
        gap = max(abs(a - b) for a, b in zip(sigmas, self.plan.sigmas, strict=True))
        forecasts = self.plan.budget < self.plan.num_steps
        if forecasts and gap > _SIGMA_TOLERANCE:
            self._tell(
                f"the sigmas of this request differ from the plan's: by up to {gap:.3f} (another shift, spacing or "
                "resolution), so forecasts will be less exact; make a plan for these sigmas"
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


class Adaptive(Relay):
    """A driver that makes a plan for each request out of statistics or a fitted plan, and has it run.

    A fitted plan runs requests of its own noise levels and impulse response itself, and those of a bare denoiser,
    which tells neither. For others `lesa.planner.build.adapt` makes plans of it, with their expected errors.

    Args:
        source: statistics of the denoiser's requests, or a plan with a surrogate.
        budget: see `plan_for`; a share is taken of each request's own steps. None, with a plan only, is the plan's own.
        runner: makes the driver of a plan.

    Raises:
        PlanError: the plan has no surrogate.
        ValueError: no plan can be made of the statistics, or `budget` is none.
    """

    def __init__(
        self,
        source: Statistics | Plan,
        budget: int | float | None = None,
        runner: Callable[[Plan], PlanRunner] = PlanRunner,
    ) -> None:
        self._source, self._budget, self._make_runner = source, budget, runner
        self._plans: OrderedDict[tuple, Plan] = OrderedDict()
        self._home = self._plan = self._made()
        self._runner: PlanRunner
        super().__init__(self._runner_of(self._home))

    @property
    def plan(self) -> Plan:
        """The plan of the latest request; before the first, of a request like those of the source."""
        return self._plan

    def begin(self, request: Request) -> None:
        """Start a request with the plan of its noise levels, made now if they are new.

        Raises:
            PlanError: the request does not tell its noise levels, or they are not finite.
        """
        if request.sigmas is None and not isinstance(self._source, Plan):
            raise PlanError(
                "an adapted plan needs the noise levels of the request, which a bare denoiser does not tell: make "
                "the plan with lesa.planner.build.plan_for(statistics, budget, sigmas) and enable that"
            )
        plan = self._plan_of(request)
        if plan is not self._plan:
            self._install(plan)
        super().begin(request)

    def settle(self) -> None:
        """Wait for the errors that are being measured."""
        self._runner.settle()

    def _made(self, sigmas: Sequence[float] | None = None, impulse_response: np.ndarray | None = None) -> Plan:
        if isinstance(self._source, Plan):
            made = adapt(self._source, self._budget, sigmas, impulse_response)
        elif self._budget is None:
            raise ValueError("budget=None: with statistics say how many steps to compute, e.g. budget=10")
        else:
            made = plan_for(self._source, self._budget, sigmas, impulse_response)
        if made.budget == made.num_steps:
            warnings.warn(
                f"lesa forecasts nothing in requests of {made.num_steps} steps: all of them are within its budget; "
                "enable it with a smaller budget=",
                LesaWarning,
                stacklevel=2,
            )
        return made

    def _serves(self, sigmas: Sequence[float], impulse_response: np.ndarray | None) -> bool:
        """Whether a fitted plan, or the one made of it for its own noise levels, is the request's."""
        if not isinstance(self._source, Plan) or len(sigmas) != len(self._source.sigmas):
            return False
        # Multistep schedulers run the same noise levels, but make something else of an error.
        impulse_response = flow_impulse_response(sigmas) if impulse_response is None else impulse_response
        apart = float(np.abs(np.subtract(sigmas, self._source.sigmas)).max())
        return max(apart, float(np.abs(impulse_response - surrogate_of(self._source).impulse_response).max())) <= _SAME

    def _install(self, plan: Plan) -> None:
        # Plans are cached, runners are not: their histories are as large as features.
        self.settle()
        self._plan, self._runner = plan, self._runner_of(plan)
        self.stats.guard, self._runner.stats = self._runner.stats.guard, self.stats

    def _runner_of(self, plan: Plan) -> PlanRunner:
        # What a plan was fitted from is nothing that a runner, or what is compiled for it, should hold.
        return self._make_runner(plan if plan.surrogate is None else replace(plan, surrogate=None))

    def _plan_of(self, request: Request) -> Plan:
        if request.sigmas is None:  # of a bare denoiser; only a fitted plan gets here
            return self._home
        key = (tuple(round(sigma, _DIGITS) for sigma in request.sigmas), _identity(request.scheduler))
        plan = self._plans.get(key)
        if plan is None:
            if not all(map(math.isfinite, request.sigmas)):
                raise PlanError(
                    f"sigmas={request.sigmas!r:.200} of the request are not finite: give others, or see to what the "
                    "scheduler is given"
                )
            impulse_response = _response(request)
            own = self._serves(request.sigmas, impulse_response)
            plan = self._home if own else self._made(request.sigmas, impulse_response)
            self._plans[key] = plan
            if len(self._plans) > _MOST_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return plan


def _response(request: Request) -> np.ndarray | None:
    """The impulse response of a request's scheduler; image-to-image leaves out its first steps."""
    scheduler = request.scheduler
    if scheduler is None:
        return None
    assert request.num_steps is not None
    return impulse_response_of(scheduler, len(scheduler.timesteps) - request.num_steps)


def _identity(scheduler: Any) -> tuple[str, str]:
    """What the impulse response depends on besides the noise levels."""
    return type(scheduler).__name__, repr(sorted(dict(getattr(scheduler, "config", {})).items()))
