"""A session of `lesa.fit`: one recording, and the plans fitted to it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models.gatherer import Gatherer
from ..models.works import Work
from ..planner.build import prior_error_gains, surrogate_of
from ..plans.plan import Plan, PlanError
from . import candidates
from .candidates import Given
from .climbing import Climber
from .finishing import finished, remembered
from .gathering import check_alike, gather_works
from .goals import check_steps
from .kept import Kept, digest
from .promises import promises_of
from .refining import RULES, Refiner
from .trainer import Trainer
from .trials import Reference, Trials, reference_of

_SAME = 1e-3  # of inner products recorded twice, where no bits are the same
_LEAST = 2  # runs besides those of candidates: what is published, and what was searched


@dataclass(frozen=True)
class Effort:
    """What a fit may cost.

    Args:
        generations: in time of full requests, recording included.
        share: of what is left after recording that running candidates may take; the search takes the rest.
        prices: schedules looked at on the surrogate, before the first run and again after it.
        rules: forecasters to be run as they are published.
        experts: whether the paper's forecaster is trained and run too, where that fits.
    """

    generations: int
    share: float
    prices: int
    rules: tuple[str, ...] = ()
    experts: bool = False


EFFORTS = {
    "quick": Effort(10, 0.0, 60),
    "default": Effort(40, 0.5, 100),
    "thorough": Effort(300, 0.5, 500, RULES, experts=True),
}


class Session:
    """One recording, and the plans fitted to it.

    Args:
        target, request, sigmas, guidance, effort, seed, folder: see `fit`.
        fitting: the calls to fit to.
        held: the calls that are only measured.
        seeds: of the noise of all of them.
        given: plans to run besides those searched.
        names: of forecasters to run besides, on the published schedule and on the searched one.
        check: given the steps of the first request, once it ran; raises where no plan can be made.
        prompts: of the fitting requests, for training; None where they are functions of the user's.

    A session is a context manager: at its end what training wrote is removed.

    Raises:
        ValueError: a given plan is not for these requests, or what `check` raises.
        StatisticsError: requests are not of one kind.
    """

    def __init__(
        self,
        target: Any,
        fitting: Sequence[Work],
        held: Sequence[Work],
        request: Mapping[str, Any],
        *,
        sigmas: Sequence[float] | None,
        guidance: Sequence[float] | None,
        effort: str,
        seed: int,
        folder: Path | None,
        seeds: Sequence[int] = (),
        given: Sequence[Given] = (),
        names: Sequence[str] = (),
        prompts: Sequence[str] | None = None,
        check: Callable[[int], None] = lambda num_steps: None,
    ) -> None:
        self._effort, self._seed, self._folder, self._seeds, self._given = effort, seed, folder, list(seeds), given
        self._names = list(names)

        def record(part: Sequence[Work]) -> Trials:
            references: list[Reference] = []

            def visit(gatherer: Gatherer, result: Any) -> None:
                if not references and gatherer.timesteps:
                    check(len(gatherer.timesteps))
                references.append(reference_of(gatherer, result))

            begin = time.perf_counter()
            statistics = gather_works(target, part, request, sigmas=sigmas, guidance=guidance, visit=visit)
            return Trials(part, statistics, references, time.perf_counter() - begin)

        self.trials = record(fitting)
        candidates.check_requests(given, self.trials.statistics)
        self.held = record(held) if held else None
        if self.held is not None:
            check_alike(self.trials.statistics, self.held.statistics, held[0].labels[0])
        self._likeness = remembered(target, [part for part in (self.trials, self.held) if part is not None])
        if folder is not None:
            self.trials.statistics.save(folder / "statistics.safetensors")
        self._trainer: Trainer | None = None
        if prompts is not None and (candidates.TRAINED in self._names or EFFORTS[effort].experts):
            own, where = self._seeds[: len(prompts)], None if folder is None else folder / "training"
            self._trainer = Trainer(target, prompts, own, request, self.trials.identity, seed, where)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._trainer is not None:
            self._trainer.close(done=kind is None)

    @property
    def num_steps(self) -> int:
        """T, the number of steps of a request."""
        return self.trials.statistics.num_steps

    def plan(self, budget: int) -> Plan:
        """The plan for one budget; what lies in the folder is not made again.

        Raises:
            ValueError: the budget is no number of computed steps, or the folder holds a plan of other requests.
        """
        check_steps(self.num_steps, [budget])
        path = None if self._folder is None else self._folder / f"plan-{budget}.safetensors"
        made = None if path is None else self._made(path, budget)
        if made is not None:
            return made
        plan = self._fit(budget)
        if path is not None:
            plan.save(path)
        return plan

    def reach(self, psnr: float) -> Plan:
        """The plan with the smallest budget that reaches `psnr` on the fitting requests, found by halving.

        Raises:
            ValueError: none does.
        """
        low, high = 1, self.num_steps
        best: Plan | None = None
        reached = -math.inf
        while low < high:
            middle = (low + high) // 2 if best is not None or low > 1 else min(10, high - 1)
            plan = self.plan(middle)
            reached = max(reached, plan.training["fitting_psnr"])
            if plan.training["fitting_psnr"] >= psnr:
                best, high = plan, middle
            else:
                low = middle + 1
        if best is None or best.budget != low:
            if low == self.num_steps:
                raise ValueError(f"target_psnr={psnr}: no budget below all steps reaches it (best {reached:.2f} dB)")
            best = self.plan(low)
        return best

    def identity(self, budget: int) -> dict[str, Any]:
        """What a plan in the folder must agree with to be taken as made."""
        return {
            "effort": self._effort,
            "prompts": [label for work in self.trials.works for label in work.labels],
            "seeds": self._seeds,
            "held_out": 0 if self.held is None else self.held.count,
            "seed": self._seed,
            "request": dict(self.trials.statistics.request),
            "guidance": list(self.trials.statistics.guidance),
            "given": [[one.name, digest(one.plan)[:16]] for one in self._at(budget)],
            "names": self._names,
        }

    def _at(self, budget: int) -> list[Given]:
        return [one for one in self._given if one.plan.budget == budget]

    def _fit(self, budget: int) -> Plan:
        effort, given = EFFORTS[self._effort], self._at(budget)
        begin = time.perf_counter()
        if self._trainer is not None:
            self._trainer.begin()
        recorded = self.trials.count + (0 if self.held is None else self.held.count)
        left = max(effort.generations - recorded, 0)
        promises = promises_of(self._names, effort.experts, self._trainer, self.trials, budget, left)
        runs = int((left - promises.cost) * effort.share / (self.trials.count * budget / self.num_steps))
        if effort.share:  # what is promised is measured, whatever it takes
            runs = max(runs, _LEAST + len(given) + len(promises.runs))
        kept = Kept(self.trials, None if self._folder is None else self._folder / f"trials-{budget}")
        climber = Climber(self.trials, budget, effort.prices, self._seed)
        refiner = Refiner(self.trials, kept, climber, budget, runs, given, effort.rules, promises)
        try:
            best = refiner.run()
        finally:  # also of a fit that is interrupted here, and goes on another time
            if refiner.best is not None and refiner.best.measured is not None:
                kept.judge(refiner.best.plan, refiner.best.measured, again=False)
        if best.measured is not None:
            kept.judge(best.plan, best.measured)
        spent = [kept.seconds, self.trials.seconds, 0.0 if self.held is None else self.held.seconds]
        if self._trainer is not None:
            spent.append(self._trainer.earlier)
        seconds = time.perf_counter() - begin + sum(spent)
        figures = {
            **self.identity(budget),
            "evaluations": len(refiner.seen),
            "found": kept.found,
            "generations": seconds / self.trials.seconds_a_request,
            "seconds": seconds,
            "schedule": best.name,
            "candidates": [[name, score] for name, score in refiner.seen],
        }
        if refiner.skipped:
            figures["skipped"] = [[name, reason] for name, reason in refiner.skipped]
        return finished(best, climber.error_gains, figures, self.trials, self.held, self._likeness)

    def _made(self, path: Path, budget: int) -> Plan | None:
        try:
            plan = Plan.load(path)
        except PlanError:  # none, or damaged
            return None
        reason = candidates.misfit(plan, self.trials.statistics)
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
        error_gains = prior_error_gains(self.trials.statistics, self.trials.count)
        known = self.trials.surrogate(error_gains).thinned().grams
        return grams.shape == known.shape and bool(np.abs(grams - known).max() <= _SAME * np.abs(known).max())
