"""The drivers that run plans."""

from __future__ import annotations

import functools
import warnings

import torch

from ..plans.plan import Plan
from ..plans.rows import ANY_CONTEXT, LesaWarning, PlanError
from .checks import Checks, checked, risky_steps
from .clock import Call, Request
from .driver import Forecast, Stats
from .history import History

# Beyond this the weights were made for a visibly different schedule of noise levels.
_SIGMA_TOLERANCE = 0.05
_ELSEWHERE = "enable a plan made for yours; of a fitted one, lesa.planner.build.adapt(plan, sigmas=...) makes it"


class PlanRunner:
    """Runs one plan: a history for every context, a row for every forecast step.

    A forecast that may not be finite is looked at before it stands; no other one is waited for.

    Args:
        plan: the plan to run.
        backend: of the operators, see `lesa.ops.forecast`.
        guard: "warn" measures the errors that the plan knows how to judge; "off" measures nothing.
        stats: where to count; by default new ones.
    """

    def __init__(self, plan: Plan, backend: str | None = None, guard: str = "warn", stats: Stats | None = None) -> None:
        self.plan = plan
        self.stats = stats or Stats()
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
