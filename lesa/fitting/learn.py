"""Learning from the requests that come: the first ones run in full and are watched, the next ones by what they told.

Requests cannot be repeated here, so no plan is tried out: the schedule and its rows are the surrogate's best, with the
error gains of a perfect model of Gaussian data.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..models.layouts import denoiser_of
from ..models.pipeline import FeatureRecorder
from ..planner.build import computed_steps, default_budget, plan_from_weights
from ..planner.statistics import Statistics, StatisticsError
from ..planner.surrogate import Surrogate
from ..plans.plan import Plan
from ..plans.rows import LesaWarning
from ..runtime.clock import Call, Request
from ..runtime.driver import Forecast, Stats
from ..runtime.runner import Adaptive, PlanRunner
from .fit import EFFORTS, finished
from .refine import Candidate, ScheduleSearch
from .trials import Gathering, reference_of, surrogate_of_requests

_MOST_KINDS = 16  # of requests: a few hundred kilobytes each
_DIGITS = 6  # kept of a sigma: noise levels come from float32


@dataclass(frozen=True)
class Watched:
    """What is known of the requests that were watched, see `Recorded`.

    Args:
        statistics: of all their images.
        grams: [P, C T, C T], inner products of the outputs of each image.
    """

    statistics: Statistics
    grams: np.ndarray

    @property
    def count(self) -> int:
        """P, how many images."""
        return len(self.grams)

    def surrogate(self, error_gains: np.ndarray) -> Surrogate:
        """The model of them with error gains [C, T, P]."""
        return surrogate_of_requests(self.statistics, self.grams, error_gains)


class Learner:
    """A driver at the output site that runs requests in full, learns a plan from them, and runs the next ones by it.

    A request counts when its last step ran in all contexts. Each kind of requests (noise levels and scheduler) is
    counted by itself; the first one of which enough were watched is learned from, and its plan adapts to the others. So
    a request to warm up does no harm. Not counted are interrupted requests, those that the budget covers, and those
    that tell nothing: a context does not run at every step, or an output is not finite (a warning says so).

    Memory holds the outputs of one request; of each image watched its inner products are kept.

    Args:
        target: a pipeline, or a bare denoiser in a loop of your own.
        requests: how many are watched; calls of the pipeline, whatever their batch.
        budget: computed steps of the plan: a number of them, or as a float in (0, 1] a share of each request's steps;
            None: `default_budget`, and the same share of other requests.
        runner: makes the driver of a plan.
        sigmas: the T + 1 noise levels of a bare denoiser's requests, the final 0 included.
        guidance: the weight of each context in what the scheduler is given; None finds them, see `Statistics.gather`.

    Attributes:
        stats: what happened since the first request.

    Raises:
        ValueError: `requests` is not a whole number of at least 1.
    """

    def __init__(
        self,
        target: Any,
        requests: int,
        budget: int | float | None = None,
        runner: Callable[[Plan], PlanRunner] = PlanRunner,
        *,
        sigmas: Sequence[float] | None = None,
        guidance: Sequence[float] | None = None,
    ) -> None:
        check_learn(requests)
        self._sigmas = None if sigmas is None else tuple(sigmas)
        self._denoiser, self._guidance = denoiser_of(target), guidance
        self._wanted, self._budget, self._make_runner = int(requests), budget, runner
        self.stats = Stats()
        self._kinds: OrderedDict[tuple, tuple[Gathering, list[list[np.ndarray]]]] = OrderedDict()
        self._recorder: FeatureRecorder | None = None  # None where the request is not watched
        self._num_steps = 0
        self._learned: Adaptive | None = None
        self._runner: Adaptive | None = None  # from the request after that
        self._tell_progress(0)

    @property
    def plan(self) -> Plan | None:
        """The plan of the latest request; None before anything is learned."""
        return None if self._learned is None else self._learned.plan

    def settle(self) -> None:
        """Wait for the pending error measurements."""
        if self._runner is not None:
            self._runner.settle()

    def begin(self, request: Request) -> None:
        """Start watching a request, or run it by the plan."""
        self._end_unfinished()
        self._runner = self._learned
        if self._runner is not None:
            return self._runner.begin(request)
        self.stats.requests += 1
        sigmas = request.sigmas or self._sigmas
        assert sigmas is not None
        self._num_steps = len(sigmas) - 1
        if self._steps_of_budget() >= self._num_steps:
            return self._warn(
                f"lesa learns nothing from requests of {self._num_steps} steps: the budget covers all of them; use a "
                "smaller budget="
            )
        self._recorder = FeatureRecorder([f"request {self.stats.requests}"], ("output",), error=StatisticsError)
        self._recorder.begin(request)

    def forecast(self, call: Call) -> Forecast | None:
        """Nothing is forecast while requests are watched.

        Raises:
            ValueError: a loop runs more steps than `sigmas` has.
        """
        if self._runner is not None:
            return self._runner.forecast(call)
        if call.step >= self._num_steps:
            raise ValueError(
                f"sigmas has {self._num_steps + 1} noise levels, but a request runs step {call.step + 1}: give T + 1 "
                "of them for T steps"
            )
        if self._recorder is not None:
            self._recorder.forecast(call)
        return None

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        """A step was computed."""
        if self._runner is not None:
            return self._runner.keep(call, feature)
        self.stats.computed += 1

    def refuse(self, call: Call, reason: str) -> None:
        """As the plan's driver has it; while requests are watched nothing is refused."""
        if self._runner is not None:
            self._runner.refuse(call, reason)

    def lose(self, reason: str) -> None:
        """As the plan's driver has it; outputs are never lost."""
        if self._runner is not None:
            self._runner.lose(reason)

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """Keep an output; the last one of a request ends it."""
        if self._runner is not None:
            return self._runner.observe(call, output)
        recorder = self._recorder
        if recorder is None:
            return
        recorder.observe(call, output)
        if all(len(own) == self._num_steps for own in recorder.features("output").values()):
            self._end(recorder)

    def _end_unfinished(self) -> None:
        """Drop what was recorded of an interrupted request; where all steps ran, its contexts must be told of."""
        if self._recorder is not None and len(self._recorder.timesteps) == self._num_steps:
            self._end(self._recorder)
        self._recorder = None

    def _end(self, recorder: FeatureRecorder) -> None:
        """Keep the inner products of a request, and learn when these are enough."""
        self._recorder = None
        request = recorder.request
        assert request is not None
        kind = _kind(request)
        known = kind in self._kinds
        gathering, grams = self._kinds.pop(kind) if known else (self._gathering(request), [])
        own: list[np.ndarray] = []
        try:
            recorder.label_images()
            gathering.add(recorder, lambda: own.extend(reference_of(recorder, None).grams))
        except StatisticsError as error:
            self._warn(f"lesa learns nothing from this request: {error}")
        else:
            grams.append(own)
        if grams:
            self._kinds[kind] = gathering, grams
        while len(self._kinds) > _MOST_KINDS:
            self._kinds.popitem(last=False)
        if len(grams) < self._wanted:
            self._tell_progress(max((len(grams) for _, grams in self._kinds.values()), default=0))
        else:
            self._learn(Watched(gathering.statistics(), np.concatenate(grams)))

    def _gathering(self, request: Request) -> Gathering:
        options: dict[str, Any] = {"sigmas": self._sigmas, "scheduler": request.scheduler, "guidance": self._guidance}
        return Gathering(self._denoiser, {}, ("output",), **options)

    def _learn(self, watched: Watched) -> None:
        """Make the plan for what was watched; the next request runs by it."""
        begin = time.perf_counter()
        plan = learned_plan(watched, self._steps_of_budget(), self._wanted)
        self._learned = Adaptive(plan, self._budget or plan.budget / plan.num_steps, self._runner_of)
        self._kinds.clear()
        self.stats.learning = f"learned from {self._requests}"
        computes, seconds = f"{plan.budget} of {plan.num_steps} steps", time.perf_counter() - begin
        tqdm.write(f"lesa {self.stats.learning} in {seconds:.1f} s: the next compute {computes}", file=sys.stderr)

    def _runner_of(self, plan: Plan) -> PlanRunner:
        runner = self._make_runner(plan)
        self.stats.guard, runner.stats = runner.stats.guard, self.stats
        return runner

    def _steps_of_budget(self) -> int:
        total = self._num_steps
        return default_budget(total) if self._budget is None else computed_steps(self._budget, total)

    @property
    def _requests(self) -> str:
        return f"{self._wanted} request{'s' if self._wanted > 1 else ''}"

    def _tell_progress(self, watched: int) -> None:
        self.stats.learning = f"watched {watched} of {self._requests}"

    def _warn(self, what: str) -> None:
        """Warn once per topic: the text before the first colon."""
        topic = what.partition(":")[0]
        if topic not in self.stats.told:
            self.stats.told.add(topic)
            warnings.warn(what, LesaWarning, stacklevel=2)


def learned_plan(watched: Watched, budget: int, requests: int) -> Plan:
    """The plan that the surrogate of some requests promises most of.

    Args:
        watched: their images.
        budget: computed steps.
        requests: how many, for `Plan.training`.
    """
    schedules = ScheduleSearch(watched, budget, EFFORTS["quick"].evaluations, 0)
    computed = schedules.climb(schedules.starts())
    weights, statistics = schedules.rows(computed), watched.statistics
    plan = plan_from_weights(statistics, computed, weights, timesteps=statistics.timesteps)
    figures = {"requests": requests, "schedule": "searched", "learned": True}
    return finished(Candidate("searched", plan, weights), schedules.error_gains, figures, watched, None)


def _kind(request: Request) -> tuple:
    """What requests that are learned from have in common: noise levels, and the scheduler with its settings."""
    scheduler = request.scheduler
    config = repr(sorted(dict(getattr(scheduler, "config", {})).items()))
    return tuple(round(sigma, _DIGITS) for sigma in request.sigmas or ()), type(scheduler).__name__, config


def check_learn(learn: Any) -> None:
    """Check how many requests are watched.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    if not isinstance(learn, (int, np.integer)) or isinstance(learn, bool) or learn < 1:
        raise ValueError(f"learn={learn!r}: expected how many requests are watched, a whole number of at least 1")
