"""Plans on the fly: statistics, or a fitted plan, serve every step count, spacing, shift and strength."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..planner.build import adapt, plan_for, surrogate_of
from ..planner.statistics import Statistics, flow_impulse_response
from ..plans.plan import Plan
from ..plans.rows import LesaWarning, PlanError
from .clock import Request
from .driver import Relay
from .runner import PlanRunner
from .scheduler import impulse_response_of

_MOST_PLANS = 16  # a few kilobytes each
_DIGITS = 6  # of a sigma; noise levels come from float32
_SAME = 1e-3  # of noise levels and impulse responses


class Adaptive(Relay):
    """A driver that makes a plan for each request out of statistics or a fitted plan, and has it run.

    A fitted plan runs requests of its own noise levels and impulse response itself, and those of a bare denoiser,
    which tells neither. For others `lesa.planner.build.adapt` makes plans of it, with their expected errors.

    Args:
        source: statistics of the denoiser's requests, or a plan with a surrogate.
        budget: see `plan_for`; a share is taken of each request's own steps. None, with a plan only, is the plan's own.
        site: see `plan_for`; a plan has its own.
        runner: makes the driver of a plan.

    Raises:
        PlanError: the plan has no surrogate.
        ValueError: no plan can be made of the statistics, or `budget` is none.
    """

    def __init__(
        self,
        source: Statistics | Plan,
        budget: int | float | None = None,
        site: str = "output",
        runner: Callable[[Plan], PlanRunner] = PlanRunner,
    ) -> None:
        self.site = source.site if isinstance(source, Plan) else site
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
                "a plan on the fly needs the noise levels of the request, which a bare denoiser does not tell: make "
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
            made = plan_for(self._source, self._budget, sigmas, impulse_response, site=self.site)
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
