"""`lesa.fit`: a schedule and weights for a budget, searched on statistics and judged by running requests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models import hooks
from ..models.layouts import denoiser_of
from ..models.pipeline import PipelineCall, calls_of, check_functions, check_prompts, seeds_of
from ..planner.build import expectations, expected_by, prior_error_gains, served_by, surrogate_of
from ..planner.surrogate import Surrogate, interpolated_error_gains
from ..plans.plan import Plan
from ..plans.rows import PlanError
from . import arguments
from .arguments import Given
from .refine import Candidate, Refiner, ScheduleSearch, fingerprint
from .trials import Measured, Trials, check_alike, run_in_full

_SAME = 1e-3  # of inner products recorded twice, where no bits are the same
_LEAST = 2  # runs besides those of candidates: what is published, and what was searched
_NOT_ALWAYS = ("fitting_ssim", "held_out_ssim")  # figures that a given plan may have of an earlier fit


@dataclass(frozen=True)
class Effort:
    """What a fit may cost.

    Args:
        generations: in time of full requests, recording included.
        run_share: of what is left after recording that running candidates may take; the search takes the rest.
        evaluations: of schedules on the surrogate, before the first run and again after it.
    """

    generations: int
    run_share: float
    evaluations: int


EFFORTS = {
    "quick": Effort(10, 0.0, 60),
    "default": Effort(40, 0.5, 100),
    "thorough": Effort(300, 0.5, 500),
}


def fit(
    target: Any,
    prompts: Sequence[str] | None = None,
    *,
    budget: int | float | Sequence[int | float],
    requests: Sequence[Callable[[], Any]] | None = None,
    request: Mapping[str, Any] | None = None,
    effort: str = "default",
    candidates: Sequence[Plan | str | os.PathLike[str]] = (),
    held_out: int | None = None,
    batch: int = 1,
    seeds: Sequence[int] | None = None,
    seed: int = 0,
    sigmas: Sequence[float] | None = None,
    guidance: Sequence[float] | None = None,
    folder: str | Path | None = None,
) -> Any:
    """Fit a plan: search its schedule, learn its weights, and judge both by running the requests.

    The fitting requests are run in full once. Their inner products (`lesa.Statistics`) and a linear model of what the
    denoiser makes of errors (`lesa.planner.surrogate`) give schedules and weights. The best are run, their weights
    refined from what is measured, and their computed steps moved. The plan returned is the best one measured: its mean
    PSNR on the fitting requests is no worse than that of the paper's schedule with Taylor's forecast at the same
    budget, nor than that of any of `candidates`. "quick" compares nothing.

    In memory are the outputs of all fitting requests (FLUX at 1024x1024, 50 steps, bfloat16: 26 MB each) and the
    features of one pipeline call.

    The plan knows the errors to expect at its computed steps where there are at least four requests and three computed
    steps; with "quick", four besides those held out.

    Args:
        target: a diffusers pipeline, or a bare denoiser in a loop of your own.
        prompts: for a pipeline, 8 suffice; they should be like those of later use.
        budget: computed steps; or their share of all steps as a float in (0, 1], e.g. 0.2; or a list of these.
        requests: instead of prompts: functions without arguments, each of which runs one request and may return its
            pictures or sample [1, ...].
        request: keyword arguments of the pipeline call, JSON-able, e.g. {"num_inference_steps": 50}.
        effort: "quick", "default" or "thorough": at most about 10, 40 and 300 full requests' time for one budget,
            recording of 8 included. "quick" runs one call by a first plan, to see how the denoiser answers errors. The
            others run the paper's schedule, the searched plan and all candidates even where many prompts or candidates
            make that longer.
        candidates: plans, or what `Plan.from_pretrained` takes, for requests of this kind: each is run at its budget
            beside the searched ones. Those at the output site whose rows can be written over computed steps are
            refined like these. One that wins is returned as it is, with the figures of this fit in its `training` and
            its rows under the names of these requests' contexts.
        held_out: how many of the requests, the last ones, are kept out of fitting and only measured; by default an
            eighth of them, at least one where there are two.
        batch: prompts run in one pipeline call.
        seeds: of each prompt's noise; the prompt's index by default.
        seed: of the order in which moves are tried.
        sigmas: of a bare denoiser's requests, see `Statistics.gather`.
        guidance: the weight of each context in what the scheduler is given, see `Statistics.gather`.
        folder: keeps the statistics and each budget's plan. Budgets that lie there already are not fitted again, and a
            folder with plans of other requests is refused.

    Returns:
        A `Plan`, or for a list of budgets a dictionary of plans by computed steps. Its `training` says what it took
        and reached.

    Raises:
        ValueError: an argument is out of place, the folder holds plans of other requests, or a candidate cannot be
            read, is for other requests or has none of the budgets.
        StatisticsError: the requests are not of one kind, or their features are not finite.
    """
    if effort not in tuple(EFFORTS):
        raise ValueError(f"effort={effort!r}: expected one of {tuple(EFFORTS)}")
    wanted = arguments.check_budget(budget)
    hooks.check_free(target)
    if prompts is not None:
        check_prompts(prompts)
    if requests is not None:
        check_functions(requests)
    count = len(prompts if prompts is not None else requests or ())
    held_out, seed = arguments.check_held_out(held_out, count), arguments.check_seed(seed)
    given = arguments.read_candidates(candidates, effort)
    if all(isinstance(one, int) for one in wanted):
        arguments.check_budgets(given, [int(one) for one in wanted])
    arguments.check_denoiser(given, denoiser_of(target))
    request, numbers = request or {}, list(seeds_of(count, seeds, "request"))

    pictures = {} if isinstance(target, torch.nn.Module) else {"output_type": "np"}  # pictures are what is judged

    def calls(part: slice) -> list[PipelineCall]:
        some, functions = None if prompts is None else prompts[part], None if requests is None else requests[part]
        return calls_of(target, some, functions, request, numbers[part], batch, **pictures)

    fitting, held = calls(slice(count - held_out)), calls(slice(count - held_out, None)) if held_out else []
    if folder is not None:
        labels = [label for call in fitting for label in call.labels]
        folder = arguments.check_fit_folder(folder, wanted, labels, numbers, request)
    unlearned = 0 if EFFORTS[effort].run_share else held_out  # what is not run by the plan
    arguments.warn_if_few(count - unlearned, unlearned)
    options: dict[str, Any] = {"sigmas": sigmas, "guidance": guidance}
    trials = run_in_full(
        target,
        fitting,
        request,
        **options,
        check=lambda num_steps: arguments.check_budgets(given, arguments.budgets_of(wanted, num_steps)),
    )
    arguments.check_requests(given, trials.statistics)
    held_trials = run_in_full(target, held, request, **options) if held else None
    if held_trials is not None:
        check_alike(trials.statistics, held_trials.statistics, held[0].labels[0])
    if folder is not None:
        trials.statistics.save(folder / "statistics.safetensors")
    session = Session(trials, held_trials, effort, seed, numbers, given, folder)
    plans = {one: session.plan(one) for one in arguments.budgets_of(wanted, trials.statistics.num_steps)}
    return plans if arguments.is_list(budget) else next(iter(plans.values()))


@dataclass(frozen=True)
class Session:
    """The full runs of one fit, and the plans fitted to them.

    Args:
        trials: the requests to fit to.
        held: those that are only measured.
        effort, seed, folder: see `fit`.
        seeds: of the noise of all requests.
        given: the user's plans, which are run beside the searched ones.
    """

    trials: Trials
    held: Trials | None
    effort: str
    seed: int
    seeds: Sequence[int]
    given: Sequence[Given]
    folder: Path | None

    def plan(self, budget: int) -> Plan:
        """The plan for one budget; what lies in the folder is not made again.

        Raises:
            ValueError: the folder holds a plan of other requests.
        """
        if self.folder is None:
            return self._fit(budget)
        path = self.folder / f"plan-{budget}.safetensors"
        plan = self._made(path, budget)
        if plan is None:
            plan = self._fit(budget)
            plan.save(path)
        return plan

    def identity(self, budget: int) -> dict[str, Any]:
        """What a plan in the folder must agree with to be taken as made."""
        return {
            "effort": self.effort,
            "prompts": self.trials.labels,
            "seeds": self.seeds,
            "held_out": 0 if self.held is None else self.held.count,
            "seed": self.seed,
            "request": dict(self.trials.statistics.request),
            "guidance": list(self.trials.statistics.guidance),
            "given": [[one.name, fingerprint(one.plan)[:16]] for one in self._at(budget)],
        }

    def _at(self, budget: int) -> list[Given]:
        return [one for one in self.given if one.plan.budget == budget]

    def _fit(self, budget: int) -> Plan:
        begin = time.perf_counter()
        effort, given, trials = EFFORTS[self.effort], self._at(budget), self.trials
        recorded = trials.count + (0 if self.held is None else self.held.count)
        left = max(effort.generations - recorded, 0)
        runs = int(left * effort.run_share / (trials.count * budget / trials.statistics.num_steps))
        if effort.run_share:  # the floor, the searched plan and all given ones are run, whatever it takes
            runs = max(runs, _LEAST + len(given))
        schedules = ScheduleSearch(trials, budget, effort.evaluations, self.seed)
        refiner = Refiner(trials, schedules, budget, runs, given)
        best = refiner.run()
        if best.measured is not None:
            trials.judge(best.measured)
        recording = trials.seconds + (0.0 if self.held is None else self.held.seconds)
        seconds = time.perf_counter() - begin + recording
        figures = {
            **self.identity(budget),
            "evaluations": len(refiner.seen),
            "generations": seconds / (trials.seconds / trials.count),
            "seconds": seconds,
            "schedule": best.name,
            "candidates": [[name, score] for name, score in refiner.seen],
        }
        return finished(best, schedules.error_gains, figures, trials, self.held)

    def _made(self, path: Path, budget: int) -> Plan | None:
        try:
            plan = Plan.load(path)
        except PlanError:  # none, or damaged
            return None
        reason = arguments.misfit(plan, self.trials.statistics)
        if reason is not None:
            raise ValueError(
                f"folder={str(path.parent)!r} holds {path.name} of other requests ({reason}): name another"
            )
        wanted = json.loads(json.dumps(self.identity(budget)))  # as the file has it, where tuples are lists
        found = {name: plan.training.get(name) for name in wanted}
        return plan if self._is_of(plan) and plan.budget == budget and found == wanted else None

    def _is_of(self, plan: Plan) -> bool:
        """Whether a plan was fitted to what was recorded; weights may have changed since."""
        if plan.surrogate is None:
            return True
        grams = surrogate_of(plan).grams
        known = self.trials.surrogate(prior_error_gains(self.trials.statistics, self.trials.count)).thinned().grams
        return grams.shape == known.shape and bool(np.abs(grams - known).max() <= _SAME * np.abs(known).max())


def finished(
    best: Candidate, error_gains: np.ndarray, figures: Mapping[str, Any], trials: Trials, held: Trials | None
) -> Plan:
    """The plan of the best candidate, run on the requests that were held out, with all figures.

    Args:
        best: of the fit.
        error_gains: [C, T, P] of the fit's surrogate, for a best candidate that was not run.
        figures: of the fit.
        trials: the fitting requests.
        held: those that are only measured.
    """
    kept_out = None if held is None else held.run(best.plan)
    if held is not None and kept_out is not None:
        held.judge(kept_out)
    plan = _served(best.plan, trials)
    training = {
        **{name: figure for name, figure in plan.training.items() if name not in _NOT_ALWAYS},
        **figures,
        "fitting_psnr": None if best.measured is None else best.score,
        "held_out_psnr": None if kept_out is None else kept_out.score,
        **_ssim("fitting_ssim", best.measured),
        **_ssim("held_out_ssim", kept_out),
    }
    model = _surrogate(best, error_gains, trials)
    plan = replace(plan, training=training, surrogate=None if model is None else model.to_arrays())
    measured = [part for part in (best.measured, kept_out) if part is not None] if best.measured is not None else []
    return replace(plan, expected=_expected(plan, model, trials, measured))


def _served(plan: Plan, trials: Trials) -> Plan:
    """The plan with its rows, checks and expected errors under the names that such requests use for contexts."""
    names = served_by(trials.statistics)
    tables = {"rows": plan.rows_of, "checks": plan.checks_of, "expected": plan.expected_of}
    found: dict[str, Any] = {
        table: {name: own for name, context in names.items() if (own := own_of(context))}
        for table, own_of in tables.items()
    }
    return replace(plan, **found)


def _surrogate(best: Candidate, error_gains: np.ndarray, trials: Trials) -> Surrogate | None:
    """What adapted plans are made of; of the output site, as they are."""
    if best.plan.site != "output":
        return None
    if best.measured is not None:
        error_gains = interpolated_error_gains(best.measured.error_gains, best.computed, trials.statistics.num_steps)
    return trials.surrogate(error_gains).thinned()


def _expected(plan: Plan, model: Surrogate | None, trials: Trials, measured: Sequence[Measured]) -> Mapping[str, Any]:
    """The errors to expect of a plan's checks; those of a given plan that are of other features it knows."""
    reads = {read for own in plan.checks.values() for row in own.values() for read in row.steps}
    if model is None or not reads <= set(plan.computed):
        return plan.expected
    if not measured:
        return expected_by(model, plan)
    # Inner products at the computed steps, which is all that checks read.
    run = np.concatenate([part.outcome.basis for part in measured])
    N, T, grams = plan.budget, plan.num_steps, {}
    for c, context in enumerate(trials.statistics.contexts):
        grams[context] = np.zeros((len(run), T, T))
        own = slice(c * N, (c + 1) * N)
        grams[context][:, np.array(plan.computed)[:, None], plan.computed] = run[:, own, own]
    return expectations(plan.checks, grams, measured=True)


def _ssim(name: str, measured: Measured | None) -> dict[str, float]:
    """SSIM where there are pictures."""
    return {} if measured is None or measured.ssim is None else {name: float(measured.ssim.mean())}
