"""`lesa.fit`: a schedule and weights for a budget, searched on statistics and judged by running requests."""

from __future__ import annotations

import json
import os
import time
import warnings
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
from ..plans.rows import LesaWarning, PlanError
from . import arguments
from .arguments import Given, budgets_of
from .refine import Candidate, Refiner, ScheduleSearch, fingerprint
from .trials import Measured, Trials, check_alike, run_in_full

_SAME = 1e-3  # tolerance: two recordings are never bit-equal
_MOST_RULES = 2  # of the plain rules: run beside the plan on the held-out requests
_LEAST = 2  # always run: the published and the searched schedule
_NOT_ALWAYS = ("fitting_ssim", "held_out_ssim")  # removed: may come from an earlier fit


@dataclass(frozen=True)
class Effort:
    """What a fit may cost.

    Args:
        generations: the whole fit, recording included, in full requests' time.
        run_share: share of the remaining time for running candidates; the search takes the rest.
        evaluations: schedules evaluated on the surrogate, before the first run and again after it.
    """

    generations: int
    run_share: float
    evaluations: int


EFFORTS = {"quick": Effort(10, 0.0, 60), "default": Effort(40, 0.5, 100), "thorough": Effort(300, 0.5, 500)}


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
    scheduler: Any = None,
    guidance: Sequence[float] | None = None,
    folder: str | Path | None = None,
) -> Any:
    """Fit a plan: search its schedule, learn its weights, and judge both by running the requests.

    Each fitting request runs once in full. Its inner products (`lesa.Statistics`) and a linear model of the denoiser's
    errors (`lesa.planner.surrogate`) give schedules and weights. The best plans run; their measurements refine the
    weights and move computed steps. `fit` returns the best measured plan: on the fitting requests its mean PSNR is at
    least that of the paper's schedule with Taylor's forecast at the same budget, and that of each candidate. "quick"
    runs no candidates. The plan runs on the held-out requests too, beside reuse and Taylor's forecast on published
    schedules; if one of these is better, fit warns and returns it.

    Memory holds the outputs of all fitting requests (FLUX at 1024x1024, 50 steps, bfloat16: 26 MB each) and the
    features of one pipeline call. Expected errors need 4 requests and 3 computed steps. With "quick", held-out
    requests do not count.

    Args:
        target: a diffusers pipeline, or a bare denoiser in a loop of your own.
        prompts: for a pipeline; 8 prompts like those of later use are enough.
        budget: computed steps; or their share of all steps as a float in (0, 1], e.g. 0.2; or a list of these.
        requests: instead of prompts: functions without arguments; each runs one request, the same every time, and may
            return its pictures or sample [1, ...].
        request: keyword arguments of the pipeline call, JSON-able, e.g. {"num_inference_steps": 50}.
        effort: "quick", "default" or "thorough": at most about 10, 40 and 300 full requests' time for one budget,
            with the recording of 8. All run two calls with trial plans, to measure the error gains. Those
            but "quick" always run the paper's schedule, the searched plan and all candidates; many may take longer.
        candidates: plans for such requests, or what `Plan.from_pretrained` takes; each runs if its budget is fitted.
            Output-site candidates whose rows use only computed steps are also refined. If a candidate wins, fit
            returns that plan and adds this fit's figures.
        held_out: how many requests, the last ones, are only measured; by default an eighth, at least one of two.
        batch: prompts per pipeline call.
        seeds: the seed of each prompt's noise; by default the prompt's index.
        seed: random seed of the search.
        sigmas, scheduler: of the loop that calls a bare denoiser, see `Statistics.gather`.
        guidance: the weight of each context in the scheduler's input; found if left out, see `Statistics.gather`.
        folder: keeps the statistics and each budget's plan; `fit` does not repeat the budgets in it.

    Returns:
        A `Plan`, or for a list of budgets a dictionary of plans by computed steps. `plan.training` holds time, cost and
        PSNR.

    Raises:
        ValueError: an argument is not valid, the folder's plans were fitted to other requests, or a candidate cannot
            be read, is for other requests or has none of the budgets.
        StatisticsError: the requests are not of one kind, or their features are not finite.
    """
    if effort not in tuple(EFFORTS):
        raise ValueError(f"effort={effort!r}: expected one of {tuple(EFFORTS)}")
    wanted = arguments.check_budget(budget)
    hooks.check_free(target)
    arguments.check_loop(target, sigmas, scheduler, guidance)
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
    unlearned = 0 if EFFORTS[effort].run_share else held_out  # held-out requests that give no expected errors
    arguments.warn_if_few(count - unlearned, unlearned)
    options: dict[str, Any] = {"sigmas": sigmas, "scheduler": scheduler}

    def check(num_steps: int) -> None:
        arguments.check_budgets(given, budgets_of(wanted, num_steps))

    trials = run_in_full(target, fitting, request, **options, guidance=guidance, check=check)
    arguments.check_requests(given, trials.statistics)
    held_trials = run_in_full(target, held, request, **options, guidance=trials.weights) if held else None
    if held_trials is not None:
        check_alike(trials.statistics, held_trials.statistics, held[0].labels[0])
    if folder is not None:
        trials.statistics.save(folder / "statistics.safetensors")
    session = Session(trials, held_trials, effort, seed, numbers, given, folder)
    plans = {one: session.plan(one) for one in budgets_of(wanted, trials.statistics.num_steps)}
    return plans if arguments.is_list(budget) else next(iter(plans.values()))


@dataclass(frozen=True)
class Session:
    """The full runs of one fit, and the plans fitted to them.

    Args:
        trials: the fitting requests.
        held: the held-out requests, only measured.
        effort, seed, seeds, folder: see `fit`.
        given: the user's candidates.
    """

    trials: Trials
    held: Trials | None
    effort: str
    seed: int
    seeds: Sequence[int]
    given: Sequence[Given]
    folder: Path | None

    def plan(self, budget: int) -> Plan:
        """The plan for one budget, from the folder if it is there.

        Raises:
            ValueError: the folder's plan was fitted to other requests.
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
        """The figures that a plan in the folder must share to be used again."""
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
        if effort.run_share:  # these always run, however long they take
            runs = max(runs, _LEAST + len(given))
        schedules = ScheduleSearch(trials, budget, effort.evaluations, self.seed)
        refiner = Refiner(trials, schedules, budget, runs, given)
        best, kept_out = self._against_rules(refiner.run(), schedules)
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
        if kept_out is not None and self.held is not None:
            self.held.judge(kept_out)
        return finished(best, schedules.error_gains, figures, trials, kept_out)

    def _against_rules(self, best: Candidate, schedules: ScheduleSearch) -> tuple[Candidate, Measured | None]:
        """The best candidate, or a plain rule that does better, and what it did on the held-out requests.

        Where a rule leads there, both run on the fitting requests too: few requests may deceive.
        """
        if self.held is None:
            return best, None
        kept_out = self.held.run(best.plan)
        rules = schedules.rules()[:_MOST_RULES] if best.plan.budget < best.plan.num_steps else []
        for rule in rules:
            other = self.held.run(rule.plan)
            if other.score > kept_out.score:
                scores = self._overall(best, kept_out), self._overall(rule, other)
                if scores[1] > scores[0]:
                    warnings.warn(
                        f"the plan fitted for budget {best.plan.budget} has {scores[0]:.1f} dB, {rule.name} has "
                        f"{scores[1]:.1f} dB: fit returns that; more prompts, another effort or budget may help",
                        LesaWarning,
                        stacklevel=5,
                    )
                    best, kept_out = rule, other
        return best, kept_out

    def _overall(self, one: Candidate, kept_out: Measured) -> float:
        """The mean PSNR of all requests, the held-out ones among them."""
        one.measured = one.measured or self.trials.run(one.plan)
        return float(np.concatenate([one.measured.psnr, kept_out.psnr]).mean())

    def _made(self, path: Path, budget: int) -> Plan | None:
        try:
            plan = Plan.load(path)
        except PlanError:  # none, or damaged
            return None
        reason = arguments.misfit(plan, self.trials.statistics)
        if reason is not None:
            raise ValueError(
                f"folder={str(path.parent)!r}: {path.name} was fitted to other requests ({reason}): use another folder"
            )
        wanted = json.loads(json.dumps(self.identity(budget)))  # as the file has it, where tuples are lists
        found = {name: plan.training.get(name) for name in wanted}
        return plan if self._is_of(plan) and plan.budget == budget and found == wanted else None

    def _is_of(self, plan: Plan) -> bool:
        """Whether a plan was fitted to these recordings; the model's weights may have changed since."""
        if plan.surrogate is None:
            return True
        grams = surrogate_of(plan).grams
        gains = prior_error_gains(self.trials.statistics, self.trials.count)
        known = self.trials.surrogate(gains).thinned().grams
        return grams.shape == known.shape and bool(np.abs(grams - known).max() <= _SAME * np.abs(known).max())


def finished(
    best: Candidate, error_gains: np.ndarray, figures: Mapping[str, Any], trials: Trials, kept_out: Measured | None
) -> Plan:
    """The plan of the best candidate with all its figures.

    Args:
        error_gains: [C, T, P] of the fit's surrogate, for a best candidate that did not run.
        figures: for `Plan.training`.
        kept_out: what the plan did on the held-out requests.
    """
    plan = _served(best.plan, trials)
    training = {name: figure for name, figure in plan.training.items() if name not in _NOT_ALWAYS} | dict(figures)
    judged = {"fitting": best.measured, "held_out": kept_out}
    training |= {f"{name}_psnr": None if part is None else part.score for name, part in judged.items()}
    with_pictures = {name: part.ssim for name, part in judged.items() if part is not None and part.ssim is not None}
    training |= {f"{name}_ssim": float(ssim.mean()) for name, ssim in with_pictures.items()}
    model = _surrogate(best, error_gains, trials)
    plan = replace(plan, training=training, surrogate=None if model is None else model.to_arrays())
    measured = [part for part in (best.measured, kept_out) if part is not None] if best.measured is not None else []
    return replace(plan, expected=_expected(plan, model, trials, measured))


def _served(plan: Plan, trials: Trials) -> Plan:
    """The plan with its rows, checks and expected errors under these requests' context names."""
    names = served_by(trials.statistics)
    tables = {"rows": plan.rows_of, "checks": plan.checks_of, "expected": plan.expected_of}
    found: dict[str, Any] = {}
    for table, own_of in tables.items():
        found[table] = {name: own for name, context in names.items() if (own := own_of(context))}
    return replace(plan, **found)


def _surrogate(best: Candidate, error_gains: np.ndarray, trials: Trials) -> Surrogate | None:
    """The surrogate for `adapt`; None for a hidden-site plan."""
    if best.plan.site != "output":
        return None
    if best.measured is not None:
        response = trials.statistics.impulse_response
        error_gains = interpolated_error_gains(best.measured.error_gains, best.computed, response)
    return trials.surrogate(error_gains).thinned()


def _expected(plan: Plan, model: Surrogate | None, trials: Trials, measured: Sequence[Measured]) -> Mapping[str, Any]:
    """Expected errors of the plan's checks. A candidate whose checks we cannot compute keeps its own."""
    reads = {read for own in plan.checks.values() for row in own.values() for read in row.steps}
    if model is None or not reads <= set(plan.computed):
        return plan.expected
    if not measured:
        return expected_by(model, plan)
    # Checks use only computed steps: their inner products are enough.
    run = np.concatenate([part.outcome.basis for part in measured])
    N, T, grams = plan.budget, plan.num_steps, {}
    for c, context in enumerate(trials.statistics.contexts):
        grams[context] = np.zeros((len(run), T, T))
        own = slice(c * N, (c + 1) * N)
        grams[context][:, np.array(plan.computed)[:, None], plan.computed] = run[:, own, own]
    return expectations(plan.checks, grams, measured=True)
