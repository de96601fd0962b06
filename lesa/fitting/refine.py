"""The search for one budget: run candidates, refine the rows of the best from what is measured, move its steps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from tqdm.auto import tqdm

from ..planner.build import closed_form, plan_from_weights, prior_error_gains, written_out
from ..planner.generic import generic_statistics, lasting_response
from ..planner.search import search
from ..planner.statistics import GUIDED, Statistics
from ..planner.surrogate import Surrogate, interpolated_error_gains
from ..plans.plan import Plan
from ..plans.rows import ANY_CONTEXT, MAX_READS
from ..plans.schedule import published, spaced
from .arguments import Given
from .trials import Measured, Trials

_REACH = (1, -1, 2, -2, 4, -4)  # how far a computed step is moved
# A search that evaluates more schedules finds what the surrogate promises most of, which is not always what runs best.
_NEAR = 100
# Searches, each with the error gains measured in the runs before it; the last only with "thorough"'s evaluations.
_SEARCHES = (("searched", False), ("searched again", False), ("searched a third time", False), ("searched far", True))
_STALLED = 0.1  # dB: what a step of Gauss-Newton must gain to be followed by another
_MEASURED = 3  # how often the surrogate holds a request as measured, beside two assumed ones
_FEW = 3  # requests without guidance do not tell a schedule, only one of errors that last
_PROBES = 2  # by the second the errors are about as large as those of the plan that is looked for
_RULES = ("reuse", "taylor-1")


@dataclass
class Candidate:
    """A plan, and what it did when it was run.

    Args:
        name: as told in figures.
        plan: what is run.
        weights: its rows [C, T, T]; None where it has none over computed outputs, and cannot be refined.
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


class ScheduleSearch:
    """The search for schedules on the surrogate, for one budget.

    Args:
        trials: the fitting requests.
        budget: computed steps.
        evaluations: of schedules, for one search; more than 100 only where it may go far.
        seed: of the order in which moves are tried.

    Attributes:
        error_gains: [C, T, P], measured, see `learn`; before that those of errors that heal.
        goes_far: whether a search may evaluate more schedules than usual.
    """

    def __init__(self, trials: Trials, budget: int, evaluations: int, seed: int) -> None:
        self._trials, self._statistics = trials, trials.statistics
        self._budget, self._most = budget, evaluations
        self._random = np.random.default_rng(seed)
        self.goes_far = evaluations > _NEAR
        self.error_gains = prior_error_gains(trials.statistics, trials.count)
        self._lasting = trials.assumed_gains[:, :, trials.count :]
        self._few = len(trials.weights) == 1 and trials.count <= _FEW
        self._model = self._surrogate(trials.assumed_gains)
        self._judge = self._surrogate(self._lasting) if self._few else None  # of schedules, where it is another one
        self._evaluated: dict[tuple[int, ...], float] = {}

    def learn(self, error_gains: np.ndarray) -> None:
        """Take measured error gains [C, T, P] into the surrogate.

        A request or two do not tell how all others answer, least of all in the first steps. So the surrogate holds each
        request three times as measured, once as one whose errors heal, and once as one whose errors last.
        """
        self.error_gains = error_gains
        self._model = self._surrogate(np.concatenate([error_gains] * _MEASURED + [self._trials.assumed_gains], 2))
        self._evaluated.clear()

    def starts(self) -> list[tuple[int, ...]]:
        """Schedules to start from: the exact search on mean inner products, the paper's, even and front-loaded ones."""
        T, N = self._statistics.num_steps, self._budget
        gram, response = self._statistics.gram("output", GUIDED), self._statistics.impulse_response
        effect = lasting_response(response, self._lasting[0].mean(1)) if self._few else response[-1]
        return list(dict.fromkeys([search(gram, effect, N), *published(T, N), spaced(T, N, 1.5)]))

    def rows(self, computed: tuple[int, ...]) -> np.ndarray:
        """The surrogate's best rows [C, T, T]."""
        return self._model.optimise(computed, closed_form(self._statistics, computed), 15)[0]

    def rules(self) -> list[Candidate]:
        """Plain rules on the paper's and an even schedule, those first of which the surrogate promises most."""
        found = []
        for computed in published(self._statistics.num_steps, self._budget):
            for rule in _RULES:
                weights = closed_form(self._statistics, computed, rule)
                made = candidate(self._statistics, f"{rule} on {computed}", computed, weights)
                found.append((self._model.optimise(computed, weights, 0)[1], made))
        return [made for _, made in sorted(found, key=lambda pair: pair[0])]

    def objective(self, computed: tuple[int, ...]) -> float:
        """What the surrogate promises of a schedule, of few requests one whose errors last; lower is better."""
        if computed not in self._evaluated:
            model = self._model if self._judge is None else self._judge
            self._evaluated[computed] = model.optimise(computed, closed_form(self._statistics, computed), 5)[1]
        return self._evaluated[computed]

    def _surrogate(self, error_gains: np.ndarray) -> Surrogate:
        """The model of the requests; a generic one joins a single one without guidance."""
        model, known = self._trials.surrogate(error_gains), self._statistics
        if not self._few or self._trials.count > 1:
            return model
        prediction, levels = self._trials.predicts
        generic = generic_statistics(prediction, False, levels, known.impulse_response).gram("output", ANY_CONTEXT)
        scaled = generic * known.gram("output", GUIDED).trace() / known.num_steps
        grams = np.concatenate([model.grams, np.broadcast_to(scaled, model.grams.shape)])
        return replace(model, grams=grams, error_gains=np.concatenate([error_gains, error_gains], 2))

    def climb(self, starts: Sequence[tuple[int, ...]], far: bool = False) -> tuple[int, ...]:
        """The best schedule found by moving computed steps, from the two best starts on."""
        ends, most = [], self._most if far else min(self._most, _NEAR)
        for start in sorted(starts, key=self.objective)[:2]:
            ends.append(self._climb(start, len(self._evaluated) + most // 2))
        return min(ends, key=self.objective)

    def moves(self, computed: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Schedules with one computed step elsewhere, in random order."""
        T, moves = self._statistics.num_steps, []
        for i in range(1, len(computed)):
            rest = computed[:i] + computed[i + 1 :]
            for reach in _REACH:
                step = computed[i] + reach
                if 0 < step < T and step not in rest:
                    moves.append(tuple(sorted((*rest, step))))
        return [moves[i] for i in self._random.permutation(len(moves))]

    def _climb(self, computed: tuple[int, ...], until: int) -> tuple[int, ...]:
        improved = True
        while improved and len(self._evaluated) < until:
            improved = False
            for other in self.moves(computed):
                if self.objective(other) < self.objective(computed) - 1e-4:
                    computed, improved = other, True
                    break
                if len(self._evaluated) >= until:
                    break
        return computed


class Refiner:
    """The search for one budget.

    Args:
        trials: the fitting requests.
        schedules: the search on the surrogate.
        budget: computed steps.
        runs: how many candidates may be run on all requests: 0, or enough for the floor, `given` and one more.
        given: plans of the user's with this budget, all of which are run.
    """

    def __init__(
        self, trials: Trials, schedules: ScheduleSearch, budget: int, runs: int, given: Sequence[Given] = ()
    ) -> None:
        self.seen: list[tuple[str, float]] = []
        self.best: Candidate | None = None
        self._trials, self._statistics, self._schedules = trials, trials.statistics, schedules
        self._budget, self._left, self._given = budget, runs, given
        self._base: Candidate | None = None  # the best of those with weights, from which the search goes on
        self._learned_from: Candidate | None = None
        self._tried: set[str] = set()
        self._refining = True  # until a step of Gauss-Newton has lost

    def run(self) -> Candidate:
        """Search, run, refine: the best candidate measured, or without runs, after a probe, the most promising one.

        Raises:
            ValueError: forecasts of a given plan are refused.
        """
        self._probe()
        if not self._left:
            return self._made("searched", self._schedules.climb(self._schedules.starts()))
        with tqdm(total=self._left, desc=f"fit {self._budget}", unit="run") as self._bar:
            self._loop()
        assert self.best is not None
        return self.best

    def _probe(self) -> None:
        """Run some calls by trial plans: their requests tell how the denoiser answers errors."""
        if not self._trials.calls:
            return
        found: list[np.ndarray] = []
        computed = self._schedules.starts()[0]
        with tqdm(total=_PROBES, desc=f"probe {self._budget}", unit="run") as bar:
            for i in range(_PROBES):
                call = i % len(self._trials.calls)
                measured = self._trials.run(self._made("probe", computed).plan, slice(call, call + 1))
                bar.update()
                if not np.isfinite(measured.error_gains[:, 1:]).any():  # no computed step saw an error
                    return
                response = self._statistics.impulse_response
                found.append(interpolated_error_gains(measured.error_gains, computed, response).mean(2, keepdims=True))
                known = self._schedules.error_gains
                self._schedules.learn(np.broadcast_to(np.mean(found, 0), known.shape).copy())
                if i + 1 < _PROBES:
                    computed = self._schedules.climb(self._schedules.starts())

    def _loop(self) -> None:
        """Run candidates as long as there are runs left."""
        floor = published(self._statistics.num_steps, self._budget)[0]
        name = "published schedule, taylor-1"
        self._try(self._made(name, floor, closed_form(self._statistics, floor, "taylor-1")))
        for one in self._given:
            self._try_given(one)
        self._search()
        refined = None
        while self._left:
            if refined is not self._base:
                self._refine()
                refined = self._base
            if self._left:
                self._move()

    def _search(self) -> None:
        """Run the schedules that the surrogate promises most of, which say how the denoiser answers errors."""
        found: list[Candidate] = []
        for name, far in _SEARCHES[: len(_SEARCHES) - (not self._schedules.goes_far)]:
            if not self._left:
                return
            starts = [*self._schedules.starts(), *(one.computed for one in found)]
            made = self._made(name, self._schedules.climb(starts, far))
            if fingerprint(made.plan) not in self._tried:
                found.append(self._try(made))
                self._schedules.learn(np.mean([self._error_gains(one) for one in found], 0))

    def _made(self, name: str, computed: tuple[int, ...], weights: np.ndarray | None = None) -> Candidate:
        """A candidate, by default with the surrogate's rows."""
        weights = self._schedules.rows(computed) if weights is None else weights
        return candidate(self._statistics, name, computed, weights)

    def _try_given(self, given: Given) -> None:
        weights = table_of(given.plan, self._statistics.contexts)
        found = self._try(Candidate(given.name, given.plan, weights))
        assert found.measured is not None
        if found.measured.refused:
            raise ValueError(
                f"{given.name} computes more than its {self._budget} steps: {'; '.join(found.measured.refused)}; mend "
                "that, or leave it out"
            )

    def _refine(self) -> None:
        """Gauss-Newton steps on the best candidate that has weights, until they gain nothing."""
        damping, failures = 0.01, 0
        while self._left and self._refining and failures < 2:
            assert self._base is not None
            before = self._base.score
            self._step(self._base, damping)
            gained = self._base.score > before + _STALLED
            damping, failures = (damping / 3, 0) if gained else (damping * 10, failures + 1)

    def _move(self) -> None:
        """Run the most promising schedule beside the best one, and refine its rows while that gains anything."""
        assert self._base is not None
        self._learn(self._base)
        neighbours = self._schedules.moves(self._base.computed)
        moves = self._untried(neighbours)
        for neighbour in neighbours:  # all beside the best one are run: go two moves away
            moves = moves or self._untried(self._schedules.moves(neighbour))
        if not moves:
            self._left = 0
            return
        computed = min(moves, key=self._schedules.objective)
        found = self._try(self._made(str(computed), computed))
        while self._left and self._refining and found is not self._base:
            following = self._step(found, 0.01)
            if following.score <= found.score + _STALLED:
                return
            found = following

    def _untried(self, moves: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The schedules that were not run as moves yet."""
        tried = {name for name, _ in self.seen}
        return [move for move in moves if str(move) not in tried]

    def _step(self, candidate: Candidate, damping: float) -> Candidate:
        """Run a candidate after a step of Gauss-Newton; the first one that loses is the last for this budget."""
        assert candidate.measured is not None and candidate.weights is not None
        surrogate = self._trials.surrogate(self._error_gains(candidate))
        weights = surrogate.step(candidate.computed, candidate.weights, candidate.measured.outcome, damping)
        found = self._try(self._made(f"{candidate.name.removesuffix(' +')} +", candidate.computed, weights))
        self._refining = found.score > candidate.score
        return found

    def _error_gains(self, candidate: Candidate) -> np.ndarray:
        assert candidate.measured is not None
        response = self._statistics.impulse_response
        return interpolated_error_gains(candidate.measured.error_gains, candidate.computed, response)

    def _learn(self, candidate: Candidate) -> None:
        """Take the error gains measured with a candidate for the surrogate's."""
        if candidate is not self._learned_from:
            self._learned_from = candidate
            self._schedules.learn(self._error_gains(candidate))

    def _try(self, candidate: Candidate) -> Candidate:
        """Run a candidate, and keep it if it is the best."""
        candidate.measured = self._trials.run(candidate.plan)
        self._left -= 1
        self._tried.add(fingerprint(candidate.plan))
        self.seen.append((candidate.name, candidate.score))
        refused = candidate.measured.refused  # then it computed more than its budget
        if self.best is None or (candidate.score > self.best.score and not refused):
            self.best = candidate
        base = self._base
        if base is None or (candidate.score > base.score and candidate.weights is not None and not refused):
            self._base = candidate
        self._bar.update()
        self._bar.set_postfix_str(f"best {self.best.score:.2f} dB ({self.best.name}), now {candidate.score:.2f}")
        return candidate


def candidate(statistics: Statistics, name: str, computed: tuple[int, ...], weights: np.ndarray) -> Candidate:
    """A candidate with rows [C, T, T]."""
    return Candidate(name, plan_from_weights(statistics, computed, weights, timesteps=statistics.timesteps), weights)


def table_of(plan: Plan, contexts: Sequence[str]) -> np.ndarray | None:
    """The rows [C, T, T] of a plan over computed steps, with forecasts that rows read written out in these.

    Returns:
        None where such rows cannot say what the plan does: they are of another site, have a bias, or would read more
        computed steps than a row can.
    """
    if plan.site != "output":
        return None
    if any(row.bias for context in contexts for row in plan.rows_of(context).values()):
        return None
    table = np.stack([written_out(plan, context) for context in contexts])
    table[:, list(plan.computed)] = 0.0
    return table if expressible(table, plan.computed) else None


def expressible(weights: np.ndarray, computed: Sequence[int]) -> bool:
    """Whether each row [C, T, T] reads only the newest computed steps before its own, as many as a row can."""
    T = weights.shape[-1]
    read = np.zeros((T, T), bool)
    for step in set(range(T)) - set(computed):
        read[step, [j for j in computed if j < step][-MAX_READS:]] = True
    return not weights[:, ~read].any() and bool(np.isfinite(weights).all())


def fingerprint(plan: Plan) -> str:
    """A hash of all that a run of a plan depends on: its schedule, rows and site."""
    rows = {context: {step: asdict(row) for step, row in by_step.items()} for context, by_step in plan.rows.items()}
    told = [plan.site, plan.computed, plan.sigmas, rows]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
