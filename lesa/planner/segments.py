"""The surrogate on one schedule, in the few numbers that its rows and their errors come down to.

With s_j the computed steps, m_q the targets' steps and R the scheduler's impulse response, the rows of all forecast
steps t act through what they add up to at each target, and so does the truth they stand for:

    a[q, c, j] = guidance_c sum_t R[m_q, t] w[c, t, j]        u_q = sum_t R[m_q, t] sum_c guidance_c v_(c, t)

The samples at the targets are then off by (see `lesa.surrogate`)

    d_q = sum_(c, j) a[q, c, j] (v_(c, j) + s[c, j] d_j) + sum_(c, j) guidance_c R[m_q, s_j] s[c, j] d_j - u_q

where the error d_j at a computed step is that of an earlier target. So d = (1 - K)^-1 (a v - u) with K strictly lower
triangular, and the only features left are the C N outputs at computed steps and the N displacements u: however many
steps a request has, a plan is priced by Gram matrices of (C + 1) N.

Legend: P requests, C contexts, T steps, N computed steps, Q = N targets (the samples at the computed steps but the
first, and the final one), M = C N basis vectors v^_(c, j).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..plans.plan import MAX_READS

# Weight of the mean squared error at the computed steps beside that of the final sample: gains are only nearly right.
KAPPA = 1.0
_TINY = 1e-30
_ENOUGH = 1e-3  # of the objective: what a step must gain to be followed by another


@dataclass(frozen=True)
class Outcome:
    """Inner products, divided by the number of elements, of one plan's errors in P requests.

    Args:
        basis: [P, M, M], of the outputs v^_(c, j) at the computed steps, contexts first.
        along: [Q, P, M], of each target's error with them.
        error: [Q, P], mean squared errors of the targets, the final sample last.
    """

    basis: np.ndarray
    along: np.ndarray
    error: np.ndarray

    @property
    def cost(self) -> np.ndarray:
        """[P]: the final error and, with weight `KAPPA`, the mean of those on the way."""
        return _cost(self.error)

    @property
    def objective(self) -> float:
        """The mean logarithm of the cost: decibels, in which each request weighs the same."""
        return _objective(self.error)


@dataclass(frozen=True)
class Priced:
    """What certain reads lead to, as far as it takes to price them.

    Args:
        onward: [P, Q, Q], (1 - K)^-1: what an error added at one target does to itself and to later ones.
        along: [P, Q, M], inner products of the errors d with the outputs v_(c, j) of the full requests.
        errors: [P, Q, Q], of the errors with each other.
    """

    onward: np.ndarray
    along: np.ndarray
    errors: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """[Q, P]: mean squared errors of the targets."""
        return self.errors.diagonal(0, 1, 2).T

    @cached_property
    def objective(self) -> float:
        """As of an `Outcome`."""
        return _objective(self.error)


class Segments:
    """The surrogate on one schedule.

    Args:
        grams, impulse_response, guidance, error_gains: those of the surrogate.
        computed: the schedule.
        most: how many of the newest computed steps' weights are varied in a row.
    """

    def __init__(
        self,
        grams: np.ndarray,
        impulse_response: np.ndarray,
        guidance: np.ndarray,
        error_gains: np.ndarray,
        computed: Sequence[int],
        most: int = MAX_READS,
    ) -> None:
        (C, T, _), N, steps = error_gains.shape, len(computed), list(computed)
        ends = (*steps[1:], T)
        self._C, self._N, self._steps, self._guidance = C, N, np.array(steps), guidance
        self._grams, self._error_gains, self._one = grams, error_gains[:, steps], np.eye(N)
        self._error_gains[:, 0] = 0.0  # the first computed step sees the sample as it is
        impulse_response = impulse_response[list(ends)] * (np.arange(T) < np.array(ends)[:, None])
        # What computed steps answer to earlier errors goes on to the targets.
        self._answers = (guidance @ self._error_gains.reshape(C, -1)).reshape(N, -1).T[:, None] * impulse_response[
            :, steps
        ]
        self._forecast = impulse_response.copy()
        self._forecast[:, steps] = 0.0
        self._spans = np.add.reduceat(self._forecast, steps, axis=1)  # [Q, N], of each segment
        self._segment = np.searchsorted(self._steps, np.arange(T), side="right") - 1
        varied = [
            (k, c, j)
            for k in range(N)
            if ends[k] > steps[k] + 1
            for c in range(C)
            for j in range(max(0, k + 1 - most), k + 1)
        ]
        self._varied = np.array(varied, dtype=int).reshape(-1, 3).T

    def reads(self, weights: np.ndarray) -> np.ndarray:
        """[C, Q, N]: what rows [C, T, T] add up to at each target."""
        past = weights[:, :, self._steps] * (np.arange(weights.shape[1])[:, None] > self._steps)
        return self._guidance[:, None, None] * (self._forecast @ past)

    def priced(self, reads: np.ndarray) -> Priced:
        """What such reads lead to."""
        N, M = self._N, self._C * self._N
        between = self._answers + (reads[..., None] * self._error_gains[:, None]).sum(0).transpose(2, 0, 1)
        system = np.zeros_like(between)  # 1 - K
        system[:, :, :-1] = -between[:, :, 1:]
        onward = np.linalg.inv(system + self._one)
        off = onward @ np.concatenate([reads.transpose(1, 0, 2).reshape(N, M), -self._one], 1)
        along = off @ self._inner
        return Priced(onward, along[:, :, :M], along @ off.transpose(0, 2, 1))

    def carried(self, priced: Priced) -> np.ndarray:
        """[Q, P, N]: what one unit, added to all forecasts of segment k, does to each target."""
        return (priced.onward @ self._spans).transpose(1, 0, 2)

    def outcome(self, priced: Priced) -> Outcome:
        """As it is measured, with v^_(c, j) = v_(c, j) + s[c, j] d_j for a basis."""
        C, N = self._C, self._N
        error_gains = self._error_gains.reshape(C * N, -1).T
        before = np.tile(np.arange(-1, N - 1), C)  # the target at each one's step; any where the slope is 0
        along = priced.along + priced.errors[:, :, before] * error_gains[:, None]
        basis = priced.along[:, before] * error_gains[:, :, None]
        basis = self._inner[:, : C * N, : C * N] + basis + along[:, before].transpose(0, 2, 1) * error_gains[:, None]
        return Outcome(basis, along.transpose(1, 0, 2), priced.error)

    def change(self, outcome: Outcome, carried: np.ndarray, damping: float) -> np.ndarray:
        """[C, N, N], of the weights of context c and segment k on computed step j: a damped step of Gauss-Newton.

        Args:
            outcome: predicted or measured.
            carried: at the same rows.
            damping: of the change of each segment's displacement, relative to the normal matrix.
        """
        change = np.zeros((self._C, self._N, self._N))
        k, c, j = self._varied
        if not len(k):
            return change
        m, gain, within = self._system
        share = np.full((len(outcome.error), 1), KAPPA / max(len(outcome.error) - 1, 1))
        share[-1] = 1.0
        weighed = carried * (share / np.maximum(outcome.cost, _TINY))[:, :, None]
        pairs = weighed.transpose(1, 2, 0) @ carried.transpose(1, 0, 2)
        inner = outcome.basis.take(m, 1).take(m, 2) * np.outer(gain, gain)
        normal = (pairs.take(k, 1).take(k, 2) * inner).sum(0)
        slope = (weighed.take(k, 2) * outcome.along.take(m, 2)).sum((0, 1)) * gain
        prior = inner.mean(0) * within
        size = np.trace(normal)
        system = normal + damping * size / max(np.trace(prior), _TINY) * prior
        system.flat[:: len(k) + 1] += max(1e-9 * size / len(k), _TINY)
        change[c, k, j] = -np.linalg.solve(system, slope)
        return change

    def optimise(self, weights: np.ndarray, iterations: int, damping: float = 0.01) -> tuple[np.ndarray, float]:
        """The change [C, N, N] that up to so many steps make of rows [C, T, T], and the objective after it."""
        reads, total = self.reads(weights), np.zeros((self._C, self._N, self._N))
        priced = self.priced(reads)
        for _ in range(iterations):
            change = self.change(self.outcome(priced), self.carried(priced), damping)
            trial = reads + self._guidance[:, None, None] * (self._spans @ change)
            result = self.priced(trial)
            gained = priced.objective - result.objective
            if gained > 0:
                reads, priced, total, damping = trial, result, total + change, damping / 3
                if gained < _ENOUGH:
                    break
            else:
                damping *= 10
        return total, priced.objective

    def spread(self, weights: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Rows [C, T, T] with a change [C, N, N] added to all rows of each segment."""
        rows = weights.copy()
        forecast = np.setdiff1d(np.arange(len(self._segment)), self._steps)
        rows[:, forecast[:, None], self._steps] += change[:, self._segment[forecast]]
        return rows

    @cached_property
    def _system(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the varied weights: basis vectors, contexts' guidance, and the spans where two are of one segment."""
        k, c, j = self._varied
        spans = self._spans[-1, k]
        return c * self._N + j, self._guidance[c], np.where(k[:, None] == k, np.outer(spans, spans), 0.0)

    @cached_property
    def _inner(self) -> np.ndarray:
        """[P, M + Q, M + Q]: inner products of the outputs at computed steps, and of the displacements u."""
        C, N = self._C, self._N
        own = (np.arange(C)[:, None] * len(self._segment) + self._steps).ravel()
        truth = (self._guidance[:, None] * self._forecast[:, None]).reshape(N, -1)
        rows = np.concatenate([self._grams[:, own], truth @ self._grams], 1)
        return np.concatenate([rows[:, :, own], rows @ truth.T], 2)


def _cost(error: np.ndarray) -> np.ndarray:
    way = error[:-1].mean(0) if len(error) > 1 else 0.0
    return error[-1] + KAPPA * way


def _objective(error: np.ndarray) -> float:
    return float(np.log(np.maximum(_cost(error), _TINY)).mean())
