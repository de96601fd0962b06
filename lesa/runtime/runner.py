"""The drivers that run plans: `PlanRunner` one plan, `Adaptive` and `Generic` a plan for each kind of request."""

from __future__ import annotations

import functools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..planner.build import adapt, default_budget, plan_for, surrogate_of
from ..planner.generic import generic_plan, levels_of
from ..planner.statistics import Statistics, flow_impulse_response
from ..plans.plan import Plan
from ..plans.rows import ANY_CONTEXT, LesaWarning, PlanError
from .checks import Checks, checked, risky_steps
from .clock import Call, Request, impulse_response_of, largest, prediction_of
from .driver import Forecast, Relay, Stats
from .history import History

_SIGMA_TOLERANCE = 0.05  # beyond this: visibly different noise levels
_MISSING = "a feature that the forecast needs is missing (its step did not run, or it was not finite)"
_ELSEWHERE = "enable a plan for your steps; plan.adapt(sigmas=...) makes one from a fitted plan"
_MOST_PLANS = 16  # a few kilobytes each
_DIGITS = 6  # kept of a sigma: noise levels come from float32
_SAME = 1e-3  # tolerance of noise levels and impulse responses


class PlanRunner:
    """Runs one plan: a history for every context, a row for every forecast step.

    Only forecasts that may overflow are checked; only these wait for the device.

    Args:
        backend: the operators' backend, see `lesa.ops.forecast`.
        guard: "warn" measures the errors of the plan's checks; "off" measures nothing.
    """

    def __init__(self, plan: Plan, backend: str | None = None, guard: str = "warn") -> None:
        self.plan = plan
        self.stats = Stats()
        self._checked_plan = checked(plan, guard)
        self.stats.guard = guard if self._checked_plan.checks else "off"
        self._backend = backend
        self._checks = Checks(self._checked_plan, self._tell)
        self._computed = frozenset(plan.computed)
        self._histories: dict[str, History] = {}
        self._contexts: dict[str, str] = {}  # of this request, and why features of theirs are missing
        self._risky: dict[tuple[str, torch.dtype], frozenset[int]] = {}
        self._lost: str | None = None

    def begin(self, request: Request) -> None:
        """Start a request with empty histories. One that stops before its noise is gone runs the plan's first steps.

        Raises:
            PlanError: the request has another number of steps than the plan.
        """
        total, stops = request.num_steps, request.sigmas is not None and request.sigmas[-1] > 0
        if total is not None and total != self.plan.num_steps and not (stops and total < self.plan.num_steps):
            raise PlanError(
                f"this request runs {total} denoiser steps but the plan was made for "
                f"{self.plan.num_steps}: call the pipeline with num_inference_steps={self.plan.num_steps}, "
                f"make a plan for {total} steps, or lesa.disable(pipe) (image-to-image runs strength x "
                "num_inference_steps steps)"
            )
        if request.sigmas is not None:
            self._compare_sigmas(request.sigmas)
        self._checks.begin(self.stats)
        self.stats.requests += 1
        for history in self._histories.values():
            history.clear()
        self._contexts.clear()
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
        self._contexts.setdefault(call.context, _MISSING)
        changed = call.changed
        if call.switched and self.plan.site == "hidden":
            changed = "another denoiser took over, whose hidden features are others"
        if changed:
            self._contexts[call.context] = changed
            self._history(call.context).clear()
        if call.step in self._computed:
            return None
        reason = self._lost
        row = self._checked_plan.rows_of(call.context).get(call.step)
        if reason is None and row is None:
            reason = f"the plan has no row for context {call.context!r}"
        elif reason is None and row is not None and not self._history(call.context).holds(row):
            reason = self._contexts[call.context]
        if reason is not None:
            self.refuse(call, reason)
            return None
        self._note_guidance()
        ring, slot = self._history(call.context).select(call.step), self._checked_plan.slots[call.step]
        accept = None
        if call.step in self._risky_steps(call.context, ring.history.dtype):
            accept = functools.partial(self._is_finite, call)
        return Forecast(lambda: ring.fill(slot), ring, accept)

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        """Store the feature of a computed step for later forecasts."""
        if call.step in self._computed:
            self.stats.computed += 1
        self.store(call, feature)

    def store(self, call: Call, feature: torch.Tensor | None) -> None:
        """Store the feature of a step that was counted before."""
        if feature is not None and self._lost is None:  # else no forecast needs it
            self._checks.keep(call, feature, self._history(call.context), self.stats)

    def refuse(self, call: Call, reason: str) -> None:
        """Count a step that is computed though the plan forecasts it, and warn once per reason."""
        self._warn(reason)
        self.stats.refused[reason] += 1

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """Does nothing: plans do not use outputs."""

    def settle(self) -> None:
        """Wait for the pending error measurements."""
        self._checks.settle(self.stats)

    def _is_finite(self, call: Call, output: torch.Tensor) -> bool:
        """Whether the output of a forecast is finite; else the step is computed. Waits for the device."""
        finite = bool(output.isfinite().all())
        if not finite:
            self.refuse(call, "the forecast was not finite")
        return finite

    def _note_guidance(self) -> None:
        """Warn if the request has guidance but the plan was fitted without it."""
        if len(self._contexts) > 1 and self._checked_plan.expected and set(self._checked_plan.rows) == {ANY_CONTEXT}:
            self._tell(
                f"this request calls the denoiser in {len(self._contexts)} contexts per step (guidance), but the plan "
                "was fitted without guidance. The plan goes on with worse pictures; fit it with the same guidance"
            )

    def _risky_steps(self, context: str, dtype: torch.dtype) -> frozenset[int]:
        key = context, dtype
        if key not in self._risky:
            self._risky[key] = risky_steps(self._checked_plan, context, dtype)
        return self._risky[key]

    def _warn(self, reason: str) -> None:
        self._tell(f"lesa computes steps in full: {reason}")

    def _tell(self, what: str) -> None:
        tell(self.stats, what)

    def _history(self, context: str) -> History:
        if context not in self._histories:
            self._histories[context] = History(self._checked_plan, context, self._backend)
        return self._histories[context]

    def _compare_sigmas(self, sigmas: tuple[float, ...]) -> None:
        # Not the last one: a plan for a request that stops early may end at 0.
        gap = max(abs(a - b) for a, b in zip(sigmas[:-1], self.plan.sigmas, strict=False))
        if self.plan.budget < self.plan.num_steps and gap > _SIGMA_TOLERANCE:
            self._tell(
                f"the sigmas of this request differ from the plan's: by up to {gap:.3f} (another shift, spacing or "
                "resolution), so forecasts will be less exact; make a plan for these sigmas"
            )

    def _check_position(self, call: Call) -> None:
        """Compare a bare denoiser's timesteps with the plan's: it tells no step count."""
        total, timesteps = self.plan.num_steps, self.plan.timesteps
        if call.step >= total:
            raise PlanError(
                f"step {call.step + 1} of a request in context {call.context!r}, but the plan was made for {total} "
                f"steps: run {total} steps or {_ELSEWHERE}"
            )
        if call.request.num_steps is not None or timesteps is None:
            return
        expected, now = timesteps[call.step], largest(call.timestep)
        neighbours = [timesteps[i] for i in (call.step - 1, call.step + 1) if 0 <= i < total]
        tolerance = min((abs(expected - t) for t in neighbours), default=abs(expected)) / 2
        if not abs(now - expected) <= tolerance:  # NaN is not
            raise PlanError(
                f"step {call.step} came with timestep {now:g} but the plan, made for {total} steps, expects "
                f"{expected:g}: run the {total} timesteps of the plan or {_ELSEWHERE}"
            )


class Adaptive(Relay):
    """A driver that makes and runs a plan for each kind of request, from statistics or a fitted plan.

    A fitted plan runs unchanged if noise levels and impulse response match, or on a bare denoiser, where both are
    unknown. Else `adapt` makes a plan.

    Args:
        source: statistics of the denoiser's requests, or a plan with a surrogate.
        budget: see `plan_for`; a float is a share of each request's steps. None, only with a plan: the plan's own.
        runner: makes the driver of a plan.

    Raises:
        PlanError: the plan has no surrogate.
        ValueError: the statistics give no plan, or `budget` is not valid.
    """

    def __init__(
        self,
        source: Statistics | Plan,
        budget: int | float | None = None,
        runner: Callable[[Plan], PlanRunner] = PlanRunner,
    ) -> None:
        self._source, self._budget, self._make_runner = source, budget, runner
        self._plans = _Plans()
        self._home = self._plan = self._made()
        self._runner: PlanRunner
        super().__init__(self._runner_of(self._home))

    @property
    def plan(self) -> Plan:
        """The plan of the latest request; before the first, the plan for the source's own noise levels."""
        return self._plan

    def begin(self, request: Request) -> None:
        """Start a request with the plan for its noise levels.

        Raises:
            PlanError: the request does not tell its noise levels, or they are not finite.
        """
        if request.sigmas is None and not isinstance(self._source, Plan):
            raise PlanError(
                "an adapted plan needs the noise levels of the request, which a bare denoiser does not tell: enable "
                "the plan that lesa.planner.build.plan_for(statistics, budget, sigmas) makes"
            )
        plan = self._plan_of(request)
        if plan is not self._plan:
            self._install(plan)
        super().begin(request)

    def settle(self) -> None:
        """Wait for the pending error measurements."""
        self._runner.settle()

    def _made(self, sigmas: Sequence[float] | None = None, impulse_response: np.ndarray | None = None) -> Plan:
        if isinstance(self._source, Plan):
            made = adapt(self._source, self._budget, sigmas, impulse_response)
        elif self._budget is None:
            raise ValueError("budget=None: with statistics say how many steps to compute, e.g. budget=10")
        else:
            made = plan_for(self._source, self._budget, sigmas, impulse_response)
        _warn_if_all(made)
        return made

    def _serves(self, sigmas: Sequence[float], impulse_response: np.ndarray | None) -> bool:
        """Whether the source plan matches the request without `adapt`."""
        if not isinstance(self._source, Plan) or len(sigmas) != len(self._source.sigmas):
            return False
        # Multistep schedulers use the same sigmas but have another impulse response.
        impulse_response = flow_impulse_response(sigmas) if impulse_response is None else impulse_response
        apart = float(np.abs(np.subtract(sigmas, self._source.sigmas)).max())
        return max(apart, float(np.abs(impulse_response - surrogate_of(self._source).impulse_response).max())) <= _SAME

    def _install(self, plan: Plan) -> None:
        # We cache plans but no runners: their histories hold features.
        self.settle()
        self._plan, self._runner = plan, self._runner_of(plan)
        self.stats.guard, self._runner.stats = self._runner.stats.guard, self.stats

    def _runner_of(self, plan: Plan) -> PlanRunner:
        # Drop the surrogate: a runner does not need it.
        return self._make_runner(plan if plan.surrogate is None else replace(plan, surrogate=None))

    def _plan_of(self, request: Request) -> Plan:
        if request.sigmas is None:  # a bare denoiser, with a fitted plan
            return self._home
        sigmas = request.sigmas

        def make() -> Plan:
            _check_finite(sigmas)
            impulse_response = _response(request)
            own = self._serves(sigmas, impulse_response)
            return self._home if own else self._made(sigmas, impulse_response)

        return self._plans.of(kind_of(request), make)


class Generic:
    """A driver that runs requests of any model by plans of generic statistics, one for each kind of request.

    The first step of a request, which every plan computes, tells its kind: with guidance it calls the denoiser in two
    contexts, or with a batch whose halves are equal. If a context comes later, changes its sample's shape or its
    conditions, or goes on with another denoiser, then the rest of the request is planned anew for that context.

    Args:
        budget: computed steps of each request, or their share; None takes `default_budget`.
        sigmas: of a bare denoiser's requests, T + 1 with the final 0.
        runner: makes the driver of a plan.
    """

    def __init__(
        self,
        budget: int | float | None = None,
        sigmas: Sequence[float] | None = None,
        runner: Callable[[Plan], PlanRunner] = PlanRunner,
    ) -> None:
        self.stats = Stats()
        self.plan: Plan | None = None  # of the latest request, from its second step on
        self._budget, self._make_runner = budget, runner
        self._bare = None if sigmas is None else _Kind.of_sigmas(sigmas)
        self._plans = _Plans()
        self._whole: PlanRunner | None = None  # of the latest request; its histories are used again
        self._request: Request | None = None
        self._kind: _Kind | None = None
        self._begin()

    def begin(self, request: Request) -> None:
        """Start a request; its plan follows at its second step.

        Raises:
            PlanError: the request does not tell its noise levels, or they are not finite.
        """
        self.settle()
        if request.sigmas is None and self._bare is None:
            raise PlanError("a bare denoiser does not tell its noise levels: give lesa.enable(denoiser, sigmas=[...])")
        if request.sigmas is not None:
            _check_finite(request.sigmas)
        self._left = self._first[0][0].timestep if self._first else None  # the last request ended at its first step
        self._begin()
        self._request, self._kind = request, self._bare if request.sigmas is None else _Kind.of_request(request)
        self.stats.requests += 1

    def _begin(self) -> None:
        self._first: list[tuple[Call, torch.Tensor | None]] = []
        self._parts: dict[str, _Part] = {}
        self._lost: str | None = None

    def forecast(self, call: Call) -> Forecast | None:
        """The forecast of a step by the plan of its context.

        Raises:
            PlanError: a bare denoiser runs more steps than it has sigmas, or its timesteps rise.
        """
        if call.step == 0:
            self._check_falling(call)
            return None
        assert self._kind is not None
        total = len(self._kind.levels) - 1
        if call.request.num_steps is None and call.step >= total:
            raise PlanError(
                f"sigmas are of {total} steps, but a request runs step {call.step + 1} in context {call.context!r}: "
                "give lesa.enable(denoiser, sigmas=[...]) a level for each step and the final 0"
            )
        if self._first:
            self._plan_request()
        part = self._parts.get(call.context)
        if part is None or call.changed or call.switched:
            part = self._parts[call.context] = self._rest(call)
            call = replace(call, changed=None, switched=False)
        return part.runner.forecast(part.placed(call))

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        """Store the feature of a computed step; those of the first step until the plan is there."""
        if call.step == 0:
            self.stats.computed += 1
            self._first.append((call, None if feature is None else feature.clone()))
        else:
            part = self._parts[call.context]
            part.runner.keep(part.placed(call), feature)

    def refuse(self, call: Call, reason: str) -> None:
        """Count a step that is computed though the plan forecasts it."""
        part = self._parts[call.context]
        part.runner.refuse(part.placed(call), reason)

    def lose(self, reason: str) -> None:
        """Compute the rest of this request in full."""
        self._lost = reason
        tell(self.stats, f"lesa computes steps in full: {reason}")
        for part in self._parts.values():
            part.runner.lose(reason)

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """Does nothing: plans do not use outputs."""

    def settle(self) -> None:
        """Wait for the pending error measurements."""
        for part in self._parts.values():
            part.runner.settle()

    def _check_falling(self, call: Call) -> None:
        """Requests of a bare denoiser are told apart by timesteps that turn back, so within one they go one way."""
        if call.request.num_steps is not None or self._left is None:
            return
        before, now = largest(self._left), largest(call.timestep)
        if now > before:
            raise PlanError(
                f"timestep={now:g} came after {before:g}, but in a request they must fall, or rise from 0: wrap the "
                "denoiser in a module that is given falling timesteps and turns them round, or enable the pipeline"
            )

    def _plan_request(self) -> None:
        """Plan the whole request, and hand the first step to it."""
        guided = len(self._first) > 1 or _doubled(self._first[0][0].sample)
        runner = self._runner_of(0, guided)
        for call, feature in self._first:
            self._parts[call.context] = _Part(0, runner)
            runner.forecast(call)
            runner.store(call, feature)
        self._first.clear()

    def _rest(self, call: Call) -> _Part:
        """The plan of the rest of a request from a call on, with the steps that were still to be computed."""
        guided = len(self._parts.keys() | {call.context}) > 1 or _doubled(call.sample)
        return _Part(call.step, self._runner_of(call.step, guided))

    def _runner_of(self, begin: int, guided: bool) -> PlanRunner:
        whole = self.plan if begin else None
        budget = None if whole is None else max(1, sum(step >= begin for step in whole.computed))
        plan = self._plan_of(begin, guided, budget)
        runner, requests = self._whole, self.stats.requests
        if begin or runner is None or runner.plan is not plan:
            runner = self._make_runner(plan)
            self.stats.guard, runner.stats = runner.stats.guard, self.stats
        if not begin:
            self.plan, self._whole = plan, runner
        assert self._request is not None
        runner.begin(replace(self._request, num_steps=plan.num_steps, sigmas=plan.sigmas))
        self.stats.requests = requests
        if self._lost is not None:
            runner.lose(self._lost)
        return runner

    def _plan_of(self, begin: int, guided: bool, budget: int | None) -> Plan:
        kind = self._kind
        assert kind is not None

        def make() -> Plan:
            levels, response = kind.levels[begin:], kind.impulse_response()
            response = None if response is None else response[begin:, begin:]
            wanted = budget or self._budget or default_budget(len(levels) - 1)
            plan = generic_plan(kind.prediction, guided, wanted, levels, response)
            if not begin:
                _warn_if_all(plan)
            return plan

        return self._plans.of((kind.key, begin, guided, budget), make)


@dataclass(frozen=True)
class _Part:
    """From which step on a context of a request runs by which runner."""

    begin: int
    runner: PlanRunner

    def placed(self, call: Call) -> Call:
        """The call with its step counted from the part's first one."""
        return replace(call, step=call.step - self.begin) if self.begin else call


@dataclass(frozen=True)
class _Kind:
    """What the plan of a request depends on besides guidance."""

    prediction: str
    levels: tuple[float, ...]
    key: tuple
    impulse_response: Callable[[], np.ndarray | None]

    @classmethod
    def of_request(cls, request: Request) -> _Kind:
        """That of a pipeline's request."""
        assert request.sigmas is not None
        return cls(prediction_of(request.scheduler), request.sigmas, kind_of(request), lambda: _response(request))

    @classmethod
    def of_sigmas(cls, sigmas: Sequence[float]) -> _Kind:
        """That of a loop of one's own: Euler steps along a flow, or of sigma / alpha where they exceed 1."""
        prediction, levels = levels_of(sigmas)
        response = flow_impulse_response(sigmas)
        return cls(prediction, levels, (levels,), lambda: response)


def tell(stats: Stats, what: str) -> None:
    """Warn once per topic: the text before the first colon, or all of why steps are computed."""
    topic = what if what.startswith("lesa computes") else what.partition(":")[0]
    if topic not in stats.told:
        stats.told.add(topic)
        warnings.warn(what, LesaWarning, stacklevel=2)


def _doubled(sample: torch.Tensor) -> bool:
    """Whether the two halves of a batch are the same, as guidance in one call makes them. Waits for the device."""
    half, odd = divmod(len(sample), 2)
    return half > 0 and not odd and torch.equal(sample[:half], sample[half:])


def _warn_if_all(plan: Plan) -> None:
    if plan.budget == plan.num_steps:
        what = f"lesa forecasts nothing in requests of {plan.num_steps} steps: the budget covers all steps"
        warnings.warn(f"{what}; use a smaller budget=", LesaWarning, stacklevel=2)


def _response(request: Request) -> np.ndarray | None:
    """The impulse response of a request's scheduler; some requests skip its first steps, or end before its last."""
    scheduler = request.scheduler
    if scheduler is None or request.num_steps is None:
        return None
    return impulse_response_of(scheduler, request.begin)[: request.num_steps + 1, : request.num_steps]


def kind_of(request: Request) -> tuple:
    """What requests of one kind share: noise levels, and the scheduler's class and settings.

    Together they fix the impulse response.
    """
    scheduler = request.scheduler
    settings = repr(sorted(dict(getattr(scheduler, "config", {})).items()))
    return tuple(round(sigma, _DIGITS) for sigma in request.sigmas or ()), type(scheduler).__name__, settings


def _check_finite(sigmas: Sequence[float]) -> None:
    if not all(map(math.isfinite, sigmas)):
        raise PlanError(
            f"sigmas={sigmas!r:.200} of the request are not finite: give finite sigmas, or check the scheduler's "
            "settings"
        )


class _Plans(OrderedDict[tuple, Plan]):
    """The plans of the latest kinds of requests."""

    def of(self, kind: tuple, make: Callable[[], Plan]) -> Plan:
        """The plan of a kind, made if it is not there."""
        if kind not in self:
            self[kind] = make()
            if len(self) > _MOST_PLANS:
                self.popitem(last=False)
        self.move_to_end(kind)
        return self[kind]
