"""Schedules on the surrogate: where to start, what a move promises, and the climb from move to move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..planner.build import closed_form, prior_error_gains
from ..planner.search import search
from ..planner.statistics import GUIDED
from ..planner.surrogate import Outcome
from ..plans import schedule
from .trials import Trials

_REACH = (1, -1, 2, -2, 4, -4)  # how far a computed step is moved
# A climb that looks at more schedules finds what the surrogate promises most of, which is not always what runs best.
_NEAR = 100


class Climber:
    """The search on the surrogate for one budget.

    Args:
        trials: the fitting requests.
        budget: computed steps.
        prices: how many schedules one climb may look at; more than 100 only where it is to go far.
        seed: of the order in which moves are tried.
    """

    def __init__(self, trials: Trials, budget: int, prices: int, seed: int) -> None:
        self._trials, self._statistics = trials, trials.statistics
        self._budget, self._most = budget, prices
        self._random = np.random.default_rng(seed)
        self._error_gains = prior_error_gains(trials.statistics, trials.count)
        self._prices: dict[tuple[int, ...], float] = {}

    def starts(self) -> list[tuple[int, ...]]:
        """Schedules to start from: the exact search on mean inner products, the paper's, even and front-loaded ones."""
        T, N = self._statistics.num_steps, self._budget
        gram, impulse_response = self._statistics.gram("output", GUIDED), self._statistics.impulse_response[-1]
        found = [search(gram, impulse_response, N), *published(T, N), spaced(T, N, 1.5)]
        return list(dict.fromkeys(found))

    def rows(self, computed: tuple[int, ...]) -> np.ndarray:
        """The surrogate's best rows [C, T, T]."""
        return self._trials.surrogate(self._error_gains).optimise(
            computed, closed_form(self._statistics, computed), 15
        )[0]

    def price(self, computed: tuple[int, ...]) -> float:
        """The objective that the surrogate promises."""
        if computed not in self._prices:
            surrogate = self._trials.surrogate(self._error_gains)
            self._prices[computed] = surrogate.optimise(computed, closed_form(self._statistics, computed), 5)[1]
        return self._prices[computed]

    @property
    def goes_far(self) -> bool:
        """Whether there is a climb that looks at more schedules."""
        return self._most > _NEAR

    def climb(self, starts: Sequence[tuple[int, ...]], far: bool = False) -> tuple[int, ...]:
        """The schedule of lowest price found by moving computed steps, from the two best starts on."""
        ends, most = [], self._most if far else min(self._most, _NEAR)
        for start in sorted(starts, key=self.price)[:2]:
            ends.append(self._descend(start, len(self._prices) + most // 2))
        return min(ends, key=self.price)

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

    @property
    def error_gains(self) -> np.ndarray:
        """[C, T, P] of the surrogate."""
        return self._error_gains

    def learn(self, error_gains: np.ndarray) -> None:
        """Take measured error gains [C, T, P] for the surrogate's."""
        self._error_gains = error_gains
        self._prices.clear()

    def step(
        self, computed: tuple[int, ...], weights: np.ndarray, outcome: Outcome, error_gains: np.ndarray, damping: float
    ) -> np.ndarray:
        """The rows after a step of Gauss-Newton from a measured outcome, see `Surrogate.step`."""
        return self._trials.surrogate(error_gains).step(computed, weights, outcome, damping)

    def _descend(self, computed: tuple[int, ...], until: int) -> tuple[int, ...]:
        improved = True
        while improved and len(self._prices) < until:
            improved = False
            for other in self.moves(computed):
                if self.price(other) < self.price(computed) - 1e-4:
                    computed, improved = other, True
                    break
                if len(self._prices) >= until:
                    break
        return computed


def published(num_steps: int, budget: int) -> list[tuple[int, ...]]:
    """The paper's schedule of this budget, where there is one, and the evenest schedule."""
    found = []
    for interval in range(1, num_steps + 1):
        computed = schedule.paper(num_steps, interval)
        if len(computed) == budget:
            found.append(computed)
            break
    found.append(spaced(num_steps, budget, 1.0))
    return found


def spaced(num_steps: int, budget: int, power: float) -> tuple[int, ...]:
    """`budget` steps, even for power 1, denser at the start above."""
    places = num_steps * (np.arange(budget) / budget) ** power
    steps: list[int] = []
    for i, place in enumerate(places):
        low = steps[-1] + 1 if steps else 0
        steps.append(int(min(max(round(place), low), num_steps - budget + i)))
    return tuple(steps)
