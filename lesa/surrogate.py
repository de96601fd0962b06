"""What a plan's rows do to the final sample, to first order, and the rows that do least harm.

With v^_t what the scheduler is given at step t of an accelerated request and v_t in the full one, the samples differ by

    d_m = sum_(i < m) R[m, i] (v^_i - v_i)                                  R: the scheduler's response

At a forecast step v^_t is a sum over contexts c and computed steps j of guidance_c w[c, t, j] v^_(c, j). At a computed
step the denoiser sees a sample that is off by d, and to first order answers v^_(c, j) = v_(c, j) + s[c, j] d_j, with a
slope s for each request. So all errors lie in the span of the full requests' outputs, priced by their Gram matrices.

What is varied are numbers B[k, c, j], added to the weights of all rows of segment k (the forecast steps after the k-th
computed one): for samples and steps so close together nothing else counts. The same step of Gauss-Newton serves the
model and a measured request, since both come down to inner products: an `Outcome`.

Legend: P requests, C contexts, T steps, N computed steps, Q targets (the samples at the computed steps but the first,
and the final one), M = C N basis vectors v^_(c, j).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .interpolation import interpolation
from .plan import MAX_READS

# Weight of the mean squared error at the computed steps beside that of the final sample: slopes are only nearly right.
KAPPA = 1.0
_TINY = 1e-30


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
        way = self.error[:-1].mean(0) if len(self.error) > 1 else 0.0
        return self.error[-1] + KAPPA * way

    @property
    def objective(self) -> float:
        """The mean logarithm of the cost: decibels, in which each request weighs the same."""
        return float(np.log(np.maximum(self.cost, _TINY)).mean())


@dataclass(frozen=True)
class Surrogate:
    """The model of a denoiser's requests.

    Args:
        grams: [P, C T, C T], of each request's outputs, contexts first.
        response: [T + 1, T] of the scheduler.
        guidance: [C], the weight of each context in what the scheduler is given.
        slopes: [C, T, P].
        contexts: the names of the C contexts, where anybody asks for them.

    Raises:
        ValueError: the shapes are not those of one C, T and P.
    """

    grams: np.ndarray
    response: np.ndarray
    guidance: np.ndarray
    slopes: np.ndarray
    contexts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shapes = self.grams.shape, self.response.shape, self.guidance.shape, len(self.contexts or self.guidance)
        C, T, P = self.slopes.shape
        expected = (P, C * T, C * T), (T + 1, T), (C,), C
        if shapes != expected:
            raise ValueError(
                f"grams, response, guidance and contexts of a surrogate have shapes {shapes}: expected {expected}, as "
                f"its slopes [C, T, P] = {list(self.slopes.shape)} have it"
            )

    @property
    def num_steps(self) -> int:
        """T, the number of steps of a request."""
        return len(self.response) - 1

    @property
    def requests(self) -> int:
        """P, how many requests."""
        return len(self.grams)

    def is_finite(self) -> bool:
        """Whether all its numbers are."""
        return all(np.isfinite(part).all() for part in (self.grams, self.response, self.guidance, self.slopes))

    def at(self, sigmas: Sequence[float], others: Sequence[float], response: np.ndarray) -> Surrogate:
        """The model of the same requests at other noise levels, interpolated in sigma as in `Statistics.at`.

        Args:
            sigmas: the T + 1 noise levels of this model, the final 0 included.
            others: the T' + 1 wanted ones.
            response: [T' + 1, T'] of the scheduler there.

        Raises:
            ValueError: lengths differ.
        """
        if len(sigmas) != self.num_steps + 1:
            raise ValueError(f"{len(sigmas)} sigmas for a surrogate of {self.num_steps} steps: expected one more")
        weights = interpolation(sigmas[:-1], others[:-1])
        every = np.kron(np.eye(len(self.guidance)), weights)
        return replace(self, grams=every @ self.grams @ every.T, response=response, slopes=weights @ self.slopes)

    def thinned(self, most: int = 8) -> Surrogate:
        """At most so many of the requests, evenly spaced: a plan that carries them stays small."""
        if self.requests <= most:
            return self
        kept = np.linspace(0, self.requests - 1, most).round().astype(int)
        return replace(self, grams=self.grams[kept], slopes=self.slopes[:, :, kept])

    def outcome(self, computed: Sequence[int], weights: np.ndarray) -> Outcome:
        """The predicted outcome of rows `weights` [C, T, T] on a schedule."""
        C, T, P = self.slopes.shape
        eye = np.eye(C * T).reshape(C, T, C * T)
        basis = np.zeros((C, len(computed), P, C * T))
        steps = np.zeros((T, P, C * T))  # v^_t - v_t
        targets = []
        for k, (step, end) in enumerate(zip(computed, (*computed[1:], T), strict=True)):
            off = _weighed(self.response[step, :step], steps[:step])
            if k:
                targets.append(off)
            answer = self.slopes[:, step, :, None] * off
            basis[:, k] = answer + eye[:, step, None]
            steps[step] = _weighed(self.guidance, answer)
            if end > step + 1:
                reads = self.guidance[:, None, None] * weights[:, step + 1 : end][:, :, list(computed[: k + 1])]
                forecast = _weighed(reads.transpose(1, 0, 2), basis[:, : k + 1])
                truth = _weighed(self.guidance, eye[:, step + 1 : end])
                steps[step + 1 : end] = forecast - truth[:, None]
        targets.append(_weighed(self.response[T], steps))
        flat = basis.reshape(-1, P, C * T).transpose(1, 0, 2)
        carried = flat @ self.grams
        errors = np.stack(targets, 1)  # [P, Q, C T]
        return Outcome(
            carried @ flat.transpose(0, 2, 1),
            (errors @ carried.transpose(0, 2, 1)).transpose(1, 0, 2),
            (errors @ self.grams * errors).sum(2).T,
        )

    def carry(self, computed: Sequence[int], weights: np.ndarray) -> np.ndarray:
        """[Q, P, N]: what one unit, added to all forecasts of segment k, does to each target."""
        C, T, P = self.slopes.shape
        N = len(computed)
        steps = np.zeros((T, P, N))
        answers = np.zeros((C, N, P, N))
        targets = []
        for k, (step, end) in enumerate(zip(computed, (*computed[1:], T), strict=True)):
            off = _weighed(self.response[step, :step], steps[:step])
            if k:
                targets.append(off)
            answers[:, k] = self.slopes[:, step, :, None] * off
            steps[step] = _weighed(self.guidance, answers[:, k])
            if end > step + 1:
                reads = self.guidance[:, None, None] * weights[:, step + 1 : end][:, :, list(computed[: k + 1])]
                steps[step + 1 : end] = _weighed(reads.transpose(1, 0, 2), answers[:, : k + 1])
                steps[step + 1 : end, :, k] += 1.0
        targets.append(_weighed(self.response[T], steps))
        return np.stack(targets)

    def step(self, computed: Sequence[int], weights: np.ndarray, outcome: Outcome, damping: float) -> np.ndarray:
        """One damped step of Gauss-Newton on `Outcome.objective`, from an outcome predicted or measured.

        Args:
            computed: the schedule.
            weights: [C, T, T], the rows that led to `outcome`.
            outcome: at those rows.
            damping: of the change of each segment's displacement, relative to the normal matrix.

        Returns:
            [C, T, T], other rows.
        """
        C, T, _ = weights.shape
        N = len(computed)
        ends = (*computed[1:], T)
        varied = [
            (k, c, j)
            for k in range(N)
            if ends[k] > computed[k] + 1
            for c in range(C)
            for j in range(max(0, k + 1 - MAX_READS), k + 1)
        ]
        if not varied:
            return weights
        k, c, j = np.array(varied).T
        m, gain = c * N + j, self.guidance[c]
        carried = self.carry(computed, weights)
        share = np.full(len(outcome.error), KAPPA / max(len(outcome.error) - 1, 1))
        share[-1] = 1.0
        importance = share[:, None] / np.maximum(outcome.cost, _TINY)  # [Q, P]
        pairs = np.einsum("qp,qpk,qpl->pkl", importance, carried, carried)
        normal = (pairs[:, k[:, None], k] * outcome.basis[:, m[:, None], m]).sum(0) * np.outer(gain, gain)
        slope = np.einsum("qp,qpn,qpn->n", importance, carried[:, :, k], outcome.along[:, :, m]) * gain
        spans = np.array([self.response[T, s + 1 : e].sum() for s, e in zip(computed, ends, strict=True)])
        prior = outcome.basis.mean(0)[m[:, None], m] * np.outer(gain, gain)
        prior *= np.where(k[:, None] == k, np.outer(spans[k], spans[k]), 0.0)
        scale = np.trace(normal) / max(np.trace(prior), _TINY)
        ridge = 1e-9 * np.trace(normal) / len(varied) * np.eye(len(varied))
        change = -np.linalg.lstsq(normal + damping * scale * prior + ridge, slope, rcond=1e-12)[0]
        rows = weights.copy()
        for (k_, c_, j_), value in zip(varied, change, strict=True):
            rows[c_, computed[k_] + 1 : ends[k_], computed[j_]] += value
        return rows

    def optimise(
        self, computed: Sequence[int], weights: np.ndarray, iterations: int = 12, damping: float = 0.01
    ) -> tuple[np.ndarray, float]:
        """Rows [C, T, T] from `weights` on, bettered by up to `iterations` steps, and their predicted objective."""
        outcome = self.outcome(computed, weights)
        for _ in range(iterations):
            trial = self.step(computed, weights, outcome, damping)
            result = self.outcome(computed, trial)
            gained = outcome.objective - result.objective
            if gained > 0:
                weights, outcome, damping = trial, result, damping / 3
                if gained < 1e-3:
                    break
            else:
                damping *= 10
        return weights, outcome.objective


def _weighed(weights: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Sums of terms [..., P, L] over their leading axes, by weights whose last axes those are."""
    summed, kept = terms.shape[:-2], weights.shape[: weights.ndim - terms.ndim + 2]
    number = math.prod(summed)
    sums = weights.reshape(math.prod(kept), number) @ terms.reshape(number, math.prod(terms.shape[-2:]))
    return sums.reshape(*kept, *terms.shape[-2:])


def spread_slopes(measured: np.ndarray, computed: Sequence[int], num_steps: int) -> np.ndarray:
    """Slopes [C, T, P] of all steps, interpolated from those measured at the computed ones [C, N, P].

    The first computed step sees the sample as it is and has none; slopes are cut to where first order means anything.
    """
    C, _, P = measured.shape
    slopes = np.zeros((C, num_steps, P))
    known = list(computed[1:])
    if not known:
        return slopes
    every = np.arange(num_steps)
    for c in range(C):
        for p in range(P):
            slopes[c, :, p] = np.interp(every, known, np.clip(np.nan_to_num(measured[c, 1:, p]), -8.0, 8.0))
    return slopes
