"""Learning from the requests that come: the first ones run in full and are watched, the next ones by what they told."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..models.layouts import denoiser_of
from ..models.pipeline import FeatureRecorder, PipelineCall
from ..planner.build import computed_steps, default_budget
from ..planner.statistics import StatisticsError
from ..plans.plan import Plan
from ..runtime.clock import Call, Request, prediction_of
from ..runtime.driver import Forecast, Relay
from ..runtime.runner import Adaptive, PlanRunner, kind_of, tell
from .fit import EFFORTS, finished
from .refine import Refiner, ScheduleSearch
from .trials import ErrorRecorder, Gathering, Reference, Trials, reference_of

_MOST_KINDS = 16  # of requests: a few hundred kilobytes each


class Learner(Relay):
    """A driver at the output site that runs requests in full, learns a plan from them, and runs the next ones by it.

    A request counts when its last step ran in all contexts. Each kind of requests (noise levels and scheduler) is
    counted by itself; the first one of which enough were watched is learned from, and its plan adapts to the others. So
    a request to warm up does no harm. Not counted are interrupted requests, those that the budget covers, and those
    that tell nothing: a context does not run at every step, or an output is not finite (a warning says so).

    In the end the last one is run again by two trial plans, to measure how the denoiser answers errors: so this request
    calls the denoiser about 2 `budget` times more. Memory holds the outputs of one request, and the samples of the last
    one; of each image watched its inner products are kept.

    Args:
        target: a pipeline, or a bare denoiser in a loop of your own.
        requests: how many are watched; calls of the pipeline, whatever their batch.
        budget: computed steps of the plan: a number of them, or as a float in (0, 1] a share of each request's steps;
            None: `default_budget`, and the same share of other requests.
        runner: makes the driver of a plan.
        sigmas: the T + 1 noise levels of a bare denoiser's requests, the final 0 included.

    Raises:
        ValueError: `requests` (`learn=` of `lesa.enable`) is not a whole number of at least 1.
    """

    def __init__(
        self,
        target: Any,
        requests: int,
        budget: int | float | None = None,
        runner: Callable[[Plan], PlanRunner] = PlanRunner,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        if not isinstance(requests, (int, np.integer)) or isinstance(requests, bool) or requests < 1:
            raise ValueError(f"learn={requests!r}: expected how many requests to watch, a whole number of at least 1")
        super().__init__(FeatureRecorder([]))
        self._denoiser, self._sigmas = denoiser_of(target), sigmas
        self._wanted, self._budget, self._make_runner = int(requests), budget, runner
        self._kinds: OrderedDict[tuple, tuple[Gathering, list[Reference]]] = OrderedDict()
        self._calls: list[tuple[Call, float]] = []  # of the last request to watch
        self._is_last = False
        self._num_steps = 0
        self._learned: Adaptive | None = None
        self._tell_progress(0)

    @property
    def plan(self) -> Plan | None:
        """The plan of the latest request; None before anything is learned."""
        return None if self._learned is None else self._learned.plan

    def settle(self) -> None:
        """Wait for the pending error measurements."""
        if self._learned is not None:
            self._learned.settle()

    def begin(self, request: Request) -> None:
        """Start watching a request, or run it by the plan; an unfinished one is dropped."""
        before = self._runner
        if isinstance(before, FeatureRecorder) and before.sites and len(before.timesteps) == self._num_steps:
            self._end(before)  # a context did not run at every step, which is told
        if self._learned is not None:
            self._runner = self._learned
            return super().begin(request)
        self.stats.requests += 1
        self._num_steps = len(request.sigmas or self._sigmas or ()) - 1
        sites = ("output",) if self._computed_steps() < self._num_steps else ()
        if not sites:
            tell(self.stats, f"lesa learns nothing from requests of {self._num_steps} steps: the budget covers them")
        self._runner = FeatureRecorder([f"request {self.stats.requests}"], sites)
        watched = self._kinds.get(kind_of(request), (None, ()))[1]
        self._calls, self._is_last = [], bool(sites) and len(watched) + 1 == self._wanted
        super().begin(request)

    def forecast(self, call: Call) -> Forecast | None:
        """Nothing is forecast while requests are watched.

        Raises:
            ValueError: a loop runs more steps than `sigmas` has.
        """
        if isinstance(self._runner, FeatureRecorder) and call.step >= self._num_steps:
            raise ValueError(
                f"sigmas has {self._num_steps + 1} noise levels, but a request runs step {call.step + 1}: give one "
                "more than the loop has steps"
            )
        coming = super().forecast(call)
        if isinstance(self._runner, FeatureRecorder) and self._runner.sites and self._is_last:
            self._calls.append((replace(call, sample=self._runner.sample), _scale(call)))
        return coming

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """Keep an output; the last one of a request ends it."""
        super().observe(call, output)
        recorder = self._runner
        if isinstance(recorder, FeatureRecorder):
            self.stats.computed += 1
            if recorder.sites and all(len(own) == self._num_steps for own in recorder.features("output").values()):
                self._end(recorder)

    def lose(self, reason: str) -> None:
        """Watch this request no longer; compute the rest of it in full."""
        if self._learned is not None:
            return super().lose(reason)
        self._runner = FeatureRecorder([])  # which watches nothing
        tell(self.stats, f"lesa learns nothing from this request: {reason}")

    def _end(self, recorder: FeatureRecorder) -> None:
        """Keep the inner products of a request, and learn when these are enough."""
        self._runner = FeatureRecorder([])  # which watches nothing
        request = recorder.request or Request()
        kind = kind_of(request)
        if kind not in self._kinds:
            loop: dict[str, Any] = {"sigmas": self._sigmas, "scheduler": request.scheduler}
            self._kinds[kind] = Gathering(self._denoiser, {}, ("output",), **loop), []
        self._kinds.move_to_end(kind)
        gathering, references = self._kinds[kind]
        found: list[Reference] = []
        try:
            recorder.label_images()
            gathering.add(recorder, lambda: found.append(reference_of(recorder, None)))
            references[:0] = found  # the newest first: it alone can be run again
        except StatisticsError as error:
            tell(self.stats, f"lesa learns nothing from this request: {error}")
        if not references:
            del self._kinds[kind]
        if len(self._kinds) > _MOST_KINDS:
            self._kinds.popitem(last=False)
        self._tell_progress(max((len(own) for _, own in self._kinds.values()), default=0))
        if len(references) == self._wanted:
            calls = self._repeated(recorder, references[0])
            self._learn(Trials(calls, gathering.statistics(), references, 0.0, prediction_of(request.scheduler)))
        for reference in references[:1]:
            reference.drop_outputs()
        self._calls = []

    def _repeated(self, recorder: FeatureRecorder, reference: Reference) -> list[PipelineCall]:
        """The last request, to be run again; none where errors cannot be put into its samples."""
        fits = reference.start.numel() == len(reference.parts) * reference.outputs[0, 0].numel()
        unknown = self._sigmas is not None and max(self._sigmas) > 1.0  # how such a loop scales its samples
        if not fits or unknown or any(call.again is None for call, _ in self._calls):
            return []
        return [PipelineCall(tuple(recorder.labels), Replay(self._calls).run)]

    def _learn(self, watched: Trials) -> None:
        """Make the plan of what was watched; the next request runs by it."""
        try:
            plan = learned_plan(watched, self._computed_steps())
        except Exception as failure:  # of calls that no pipeline made; the request itself is complete
            again = f"the last request could not be run again ({type(failure).__name__}: {failure})"
            tell(self.stats, f"lesa assumes how the denoiser answers errors: {again}")
            plan = learned_plan(replace(watched, calls=()), self._computed_steps())
        self._learned = Adaptive(plan, self._budget or plan.budget / plan.num_steps, self._runner_of)
        self._kinds.clear()
        self.stats.learning += ", plan learned"
        computes = f"the next requests compute {plan.budget} of {plan.num_steps} steps"
        tqdm.write(f"lesa: {self.stats.learning}; {computes}", file=sys.stderr)

    def _runner_of(self, plan: Plan) -> PlanRunner:
        runner = self._make_runner(plan)
        self.stats.guard, runner.stats = runner.stats.guard, self.stats
        return runner

    def _computed_steps(self) -> int:
        total = self._num_steps
        return default_budget(total) if self._budget is None else computed_steps(self._budget, total)

    def _tell_progress(self, watched: int) -> None:
        self.stats.learning = f"{watched} of {self._wanted} requests watched"


@dataclass(frozen=True)
class Replay:
    """A watched request that can be run again by a plan, without the pipeline.

    Args:
        calls: of the denoiser, in order, and the scale of each one's sample beside the scheduler's.
    """

    calls: Sequence[tuple[Call, float]]

    def run(self, driver: ErrorRecorder, site: str) -> None:
        """Call the denoiser at the computed steps, on the samples that the plan's errors lead to."""
        driver.begin(self.calls[0][0].request)
        for call, scale in self.calls:
            coming = driver.forecast(call)
            if coming is None:
                assert call.again is not None
                output = call.again(driver.moved(call, scale))
                driver.keep(call, output)
            else:
                output = coming.feature()
            driver.observe(call, output)


def _scale(call: Call) -> float:
    """What the scheduler multiplies its sample by before the denoiser is given it."""
    scale = getattr(call.request.scheduler, "scale_model_input", None)
    return 1.0 if scale is None else float(scale(torch.ones(1), call.timestep))


def learned_plan(watched: Trials, budget: int) -> Plan:
    """The plan of which the surrogate promises most.

    Where the calls of `watched` can be run again, as in a quick fit, they tell the error gains; else these are assumed.
    """
    schedules = ScheduleSearch(watched, budget, EFFORTS["quick"].evaluations, 0)
    best = Refiner(watched, schedules, budget, 0).run()
    figures = {"requests": len(watched.references), "schedule": "searched", "learned": True}
    return finished(best, schedules.error_gains, figures, watched, None)
