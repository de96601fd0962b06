"""The search for one budget: candidates run, the best one's rows bettered from what is measured, its steps moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from ..planner.build import closed_form, plan_from_weights
from ..planner.surrogate import interpolated_error_gains
from ..plans.plan import Plan
from .candidates import TRAINED, Given, expressible, table_of
from .climbing import Climber, published, spaced
from .kept import Kept, digest
from .promises import SCHEDULES, Promises
from .trials import Measured, Trials

# One of each kind in `lesa.forecasters.FORECASTERS`, those with an order or degree as their papers advise.
RULES = ("reuse", "taylor-1", "taylor-2", "hermite-2", "chebyshev-4", "regression", "l2p", "l2p-released")
# What is searched once the denoiser's answers are known; the latter with all effort only.
_AGAIN = (("searched again", False), ("searched far", True))
_STALLED = 0.02  # dB: what a step of Gauss-Newton must gain to be followed by another


@dataclass
class Candidate:
    """A plan, and what it did when it was run.

    Args:
        name: as told in figures.
        plan: what is run.
        weights: its rows [C, T, T]; None where it has none over computed outputs, and cannot be bettered.
        measured: None where it was not run.
    """

    name: str
    plan: Plan
    weights: np.ndarray | None
    measured: Measured | None = None

    @property
    def computed(self) -> tuple[int, ...]:
        """The schedule."""
        return self.plan.computed

    @property
    def score(self) -> float:
        """Mean PSNR over the fitting requests."""
        return -math.inf if self.measured is None else self.measured.score


class Refiner:
    """The search for one budget.

    Args:
        trials: the fitting requests.
        kept: runs plans on them.
        climber: the search on the surrogate.
        budget: computed steps.
        runs: how many candidates may be run on all requests: 0, or enough for the floor, `given`, `promises` and one
            more.
        given: plans of the user's with this budget, all of which are run.
        rules: forecasters to be run on the published schedule and on the searched one, as far as runs allow.
        promises: what is run besides, and what is left out.
    """

    def __init__(
        self,
        trials: Trials,
        kept: Kept,
        climber: Climber,
        budget: int,
        runs: int,
        given: Sequence[Given] = (),
        rules: Sequence[str] = (),
        promises: Promises = Promises(),  # noqa: B008 (frozen)
    ) -> None:
        self.seen: list[tuple[str, float]] = []
        self.skipped: list[tuple[str, str]] = list(promises.skipped)
        self.best: Candidate | None = None
        self._kept, self._climber, self._budget, self._left = kept, climber, budget, runs
        self._trials, self._statistics = trials, trials.statistics
        self._given, self._rules = given, rules
        self._promises = promises
        self._bettered: Candidate | None = None  # the best of those with weights
        self._taught: Candidate | None = None
        self._tried: set[str] = set()

    def run(self) -> Candidate:
        """Search, run, better: the best candidate measured, or without runs, after a probe, the one that promises most.

        Raises:
            ValueError: forecasts of a given plan are refused, or training that was asked for fails.
        """
        if not self._left:
            self._probe()
        searched = self._made("searched", self._climber.climb(self._climber.starts()))
        if not self._left:
            return searched
        with tqdm(total=self._left, desc=f"fit {self._budget}", unit="run") as self._bar:
            self._loop(searched)
        assert self.best is not None
        return self.best

    def _probe(self) -> None:
        """Run the first call by the exact search's schedule: one request tells how the denoiser answers errors."""
        with tqdm(total=1, desc=f"probe {self._budget}", unit="run") as bar:
            probe = self._made("probe", self._climber.starts()[0])
            measured = self._trials.run(probe.plan, calls=1)
            bar.update()
        if np.isfinite(measured.error_gains[:, 1:]).any():  # else no computed step saw an error
            error_gains = interpolated_error_gains(measured.error_gains, probe.computed, self._statistics.num_steps)
            self._climber.learn(
                np.broadcast_to(error_gains.mean(2, keepdims=True), self._climber.error_gains.shape).copy()
            )

    def _loop(self, searched: Candidate) -> None:
        """Run candidates as long as there are runs left."""
        floor = published(self._statistics.num_steps, self._budget)[0]
        name = "published schedule, taylor-1"
        self._try(self._made(name, floor, closed_form(self._statistics, floor, "taylor-1")))
        for one in self._given:
            self._try_given(one)
        if self._left:
            self._try(searched)
            # What was measured says how the denoiser answers errors: search once more with that.
            self._learn(searched)
        found = [searched]
        for name, far in _AGAIN[: 1 + self._climber.goes_far]:
            if self._left > len(self._promises.runs):
                starts = [*self._climber.starts(), *(one.computed for one in found)]
                made = self._made(name, self._climber.climb(starts, far))
                if digest(made.plan) not in self._tried:
                    found.append(self._try(made))
        best = max(found, key=lambda one: one.score).computed
        for promise in self._promises.runs:
            self._survey_one(str(promise), floor if promise.schedule == SCHEDULES[0] else best, promise.forecaster)
        if self._rules and self._left:
            self._survey(floor, best)
        polished = None
        while self._left:
            if polished is not self._bettered:
                self._polish()
                polished = self._bettered
            if self._left:
                self._move()

    def _made(self, name: str, computed: tuple[int, ...], weights: np.ndarray | None = None) -> Candidate:
        """A candidate, by default with the surrogate's rows."""
        weights = self._climber.rows(computed) if weights is None else weights
        plan = plan_from_weights(self._statistics, computed, weights, timesteps=self._statistics.timesteps)
        return Candidate(name, plan, weights)

    def _survey(self, floor: tuple[int, ...], searched: tuple[int, ...]) -> None:
        """Run what is published, and the surrogate's rows on plain schedules; at most half of the runs left."""
        until = self._left // 2
        T, N = self._statistics.num_steps, self._budget
        plain = {"even schedule": spaced(T, N, 1.0), "front-loaded schedule": spaced(T, N, 1.5)}
        wanted: list[tuple[str, tuple[int, ...], str | None]] = [(name, own, None) for name, own in plain.items()]
        for rule in self._rules:
            wanted += [(f"published schedule, {rule}", floor, rule), (f"searched schedule, {rule}", searched, rule)]
        for called, computed, one in wanted:
            self._survey_one(called, computed, one, until)

    def _survey_one(self, name: str, computed: tuple[int, ...], rule: str | None, until: int = -1) -> None:
        """Run a rule unless it ran or was left out under this name, or no more than `until` runs are left; say why."""
        if name in dict(self.seen) or name in dict(self.skipped):
            return
        reason = "no runs are left for it" if self._left <= until else self._try_rule(name, computed, rule)
        if reason is not None:
            self.skipped.append((name, reason))

    def _try_rule(self, name: str, computed: tuple[int, ...], rule: str | None) -> str | None:
        """Run a forecaster's rows, or without one the surrogate's; why not, where that cannot be."""
        made = self._trained(name, computed) if rule == TRAINED else self._ruled(name, computed, rule)
        if isinstance(made, str):
            return made
        if digest(made.plan) in self._tried:
            return "it is the same as one that was run"
        self._try(made)
        return None

    def _ruled(self, name: str, computed: tuple[int, ...], rule: str | None) -> Candidate | str:
        """A candidate of a rule at the output site, or why there is none."""
        try:
            weights = None if rule is None else closed_form(self._statistics, computed, rule)
        except ValueError as error:
            return str(error)
        if weights is not None and not expressible(weights, computed):
            return "its rows read more computed steps than a row of a plan can, or are not finite"
        return self._made(name, computed, weights)

    def _trained(self, name: str, computed: tuple[int, ...]) -> Candidate | str:
        """A candidate of the trained forecaster, or why there is none."""
        if len(computed) == self._statistics.num_steps:
            return "every step is computed: there is nothing to train for"
        plan = self._promises.train(computed)
        return plan if isinstance(plan, str) else Candidate(name, plan, table_of(plan, self._statistics.contexts))

    def _try_given(self, given: Given) -> None:
        weights = table_of(given.plan, self._statistics.contexts)
        found = self._try(Candidate(given.name, given.plan, weights))
        assert found.measured is not None
        if found.measured.refused:
            raise ValueError(
                f"{given.name} computes more than its {self._budget} steps: {'; '.join(found.measured.refused)}; mend "
                "that, or leave it out"
            )

    def _polish(self) -> None:
        """Gauss-Newton steps on the best candidate that has weights, until they gain nothing."""
        damping, failures = 0.01, 0
        while self._left and failures < 2:
            assert self._bettered is not None
            before = self._bettered.score
            self._follow(self._bettered, damping)
            gained = self._bettered.score > before + _STALLED
            damping, failures = (damping / 3, 0) if gained else (damping * 10, failures + 1)

    def _move(self) -> None:
        """Run the most promising schedule beside the best one, and better its rows while that gains anything."""
        assert self._bettered is not None
        self._learn(self._bettered)
        tried = {name for name, _ in self.seen}
        neighbours = self._climber.moves(self._bettered.computed)
        if not neighbours:
            self._left = 0
            return
        moves = [move for move in neighbours if str(move) not in tried] or self._climber.moves(neighbours[0])
        computed = min(moves, key=self._climber.price)
        found = self._try(self._made(str(computed), computed))
        while self._left and found is not self._bettered:
            following = self._follow(found, 0.01)
            if following.score <= found.score + _STALLED:
                return
            found = following

    def _follow(self, candidate: Candidate, damping: float) -> Candidate:
        """A Gauss-Newton step from a candidate, run."""
        assert candidate.measured is not None and candidate.weights is not None
        error_gains, outcome = self._error_gains(candidate), candidate.measured.outcome
        weights = self._climber.step(candidate.computed, candidate.weights, outcome, error_gains, damping)
        return self._try(self._made(f"{candidate.name.removesuffix(' +')} +", candidate.computed, weights))

    def _error_gains(self, candidate: Candidate) -> np.ndarray:
        assert candidate.measured is not None
        return interpolated_error_gains(candidate.measured.error_gains, candidate.computed, self._statistics.num_steps)

    def _learn(self, candidate: Candidate) -> None:
        """Take the error gains measured with a candidate for the surrogate's."""
        if candidate is not self._taught:
            self._taught = candidate
            self._climber.learn(self._error_gains(candidate))

    def _try(self, candidate: Candidate) -> Candidate:
        """Run a candidate, and keep it if it is the best."""
        candidate.measured = self._kept.measure(candidate.plan)
        self._left -= 1
        self._tried.add(digest(candidate.plan))
        self.seen.append((candidate.name, candidate.score))
        refused = candidate.measured.refused  # then it computed more than its budget
        if self.best is None or (candidate.score > self.best.score and not refused):
            self.best = candidate
        base = self._bettered
        if base is None or (candidate.score > base.score and candidate.weights is not None and not refused):
            self._bettered = candidate
        self._bar.update()
        self._bar.set_postfix_str(f"best {self.best.score:.2f} dB ({self.best.name}), now {candidate.score:.2f}")
        return candidate
