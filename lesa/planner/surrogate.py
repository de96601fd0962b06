"""A linear model of what a plan's rows do to the final sample, and the rows that do least harm.

With v^_t what the scheduler is given at step t of an accelerated request and v_t in the full one, the samples differ by

    d_m = sum_(i < m) R[m, i] (v^_i - v_i)                                  R: the scheduler's impulse response

At a forecast step v^_t is a sum over contexts c and computed steps j of guidance_c w[c, t, j] v^_(c, j). At a computed
step the denoiser sees a sample that is off by d. To first order it returns v^_(c, j) = v_(c, j) + s[c, j] d_j, with an
error gain s for each request. So all errors lie in the span of the full requests' outputs, and their Gram matrices give
all costs.

On one schedule, with s_j the computed steps and m_q the targets' steps, rows and truth act through their sums

    a[q, c, j] = guidance_c sum_t R[m_q, t] w[c, t, j]        u_q = sum_t R[m_q, t] sum_c guidance_c v_(c, t)

over the forecast steps t, and the samples at the targets are off by

    d_q = sum_(c, j) a[q, c, j] (v_(c, j) + s[c, j] d_j) + sum_(c, j) guidance_c R[m_q, s_j] s[c, j] d_j - u_q

where the error d_j at a computed step is that of an earlier target. So d = (1 - K)^-1 (a v - u) with K strictly lower
triangular. The only features left are the C N outputs at computed steps and the N displacements u: whatever the number
of steps, Gram matrices of (C + 1) N are enough.

A sampler may scale its samples as it likes. So errors are counted in units of the final sample: those at step m are
multiplied by what the scheduler alone makes of them until the end, R[T, i] / R[m, i] for i < m (`carry`), and error
gains are divided by it. Then a scaled sampler has the same objective.

What is optimised are numbers B[k, c, j], added to the weights of all rows of segment k (the forecast steps after the
k-th computed one), which are close together. The same step of Gauss-Newton serves the model and a measured request,
since both come down to inner products: an `Outcome`.

Legend: P requests, C contexts, T steps, N computed steps, Q = N targets (the samples at the computed steps but the
first, and the final one), M = C N basis vectors v^_(c, j).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..plans.rows import MAX_READS
from .statistics import interpolation, learned

# Weight of the mean squared error at the computed steps beside that of the final sample: gains are only nearly right.
KAPPA = 1.0
_TINY, _TINY_SIGMA = 1e-30, 1e-6
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

    def scaled(self, by: np.ndarray) -> Outcome:
        """The outcome with the errors of the targets multiplied by numbers [Q]."""
        return replace(self, along=self.along * by[:, None, None], error=self.error * by[:, None] ** 2)


@dataclass(frozen=True)
class Evaluation:
    """What certain reads lead to, as far as the objective needs it.

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


@dataclass(frozen=True)
class Surrogate:
    """The model of a denoiser's requests.

    Args:
        grams: [P, C T, C T], of each request's outputs, contexts first.
        impulse_response: [T + 1, T] of the scheduler.
        guidance: [C], the weight of each context in what the scheduler is given.
        error_gains: [C, T, P].
        contexts: the names of the C contexts, where they are needed.

    Raises:
        ValueError: the shapes are not those of one C, T and P.
    """

    grams: np.ndarray
    impulse_response: np.ndarray
    guidance: np.ndarray
    error_gains: np.ndarray
    contexts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shapes = self.grams.shape, self.impulse_response.shape, self.guidance.shape, len(self.contexts or self.guidance)
        C, T, P = self.error_gains.shape
        expected = (P, C * T, C * T), (T + 1, T), (C,), C
        if shapes != expected:
            raise ValueError(
                f"grams, impulse_response, guidance and contexts of a surrogate have shapes {shapes}: expected "
                f"{expected}, as its error_gains [C, T, P] = {list(self.error_gains.shape)} have it"
            )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Surrogate:
        """The surrogate that `to_arrays` wrote, as in `Plan.surrogate`."""
        grams, response, slopes = (arrays[name].astype(np.float64) for name in ("grams", "response", "slopes"))
        C, T, P = slopes.shape
        half, below = np.triu_indices(C * T), np.tril_indices(T + 1, -1, T)
        upper, impulse_response = np.zeros((P, C * T, C * T)), np.zeros((T + 1, T))
        upper[:, half[0], half[1]], impulse_response[below] = grams, response
        together = np.kron(np.eye(C), np.tri(T))
        whole = together @ (upper + np.triu(upper, 1).transpose(0, 2, 1)) @ together.T
        return cls(whole, impulse_response, arrays["guidance"], slopes, tuple(arrays["contexts"].tolist()))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The surrogate as arrays of some tens of kilobytes (7 requests of 50 steps: 42, with guidance 150).

        What counts in the inner products are those of differences between features of neighbouring steps, many times
        smaller than the features: in float32 they keep their relative precision, and half of each matrix is enough.
        """
        C, T, _ = self.error_gains.shape
        apart = np.kron(np.eye(C), np.eye(T) - np.eye(T, k=-1))
        half = np.triu_indices(C * T)
        response = self.impulse_response[np.tril_indices(T + 1, -1, T)]
        narrow = response.astype(np.float32)  # exact for what was probed in float32
        return {
            "grams": (apart @ self.grams @ apart.T)[:, half[0], half[1]].astype(np.float32),
            "response": narrow if np.array_equal(narrow, response) else response,
            "guidance": np.asarray(self.guidance, np.float64),
            "slopes": self.error_gains.astype(np.float32),
            "contexts": np.array(self.contexts),
        }

    @property
    def num_steps(self) -> int:
        """T, the number of steps of a request."""
        return len(self.impulse_response) - 1

    @cached_property
    def carry(self) -> np.ndarray:
        """[T + 1], see `carry`."""
        return carry(self.impulse_response)

    @property
    def requests(self) -> int:
        """P, how many requests."""
        return len(self.grams)

    def at(self, sigmas: Sequence[float], others: Sequence[float], impulse_response: np.ndarray) -> Surrogate:
        """The model of the same requests at other noise levels, interpolated in sigma as in `Statistics.at`.

        Below all known levels the interpolation weights are learned from the Gram matrices.

        Args:
            sigmas: the T + 1 noise levels of this model, the final 0 included.
            others: the T' + 1 wanted ones.
            impulse_response: [T' + 1, T'] of the scheduler there.

        Raises:
            ValueError: lengths differ, or `others` are no noise levels.
        """
        if len(others) < 2 or not np.isfinite(others).all():
            raise ValueError(f"sigmas={others!r:.200}: expected the T + 1 finite noise levels of a request")
        if len(sigmas) != self.num_steps + 1:
            raise ValueError(f"{len(sigmas)} sigmas for a surrogate of {self.num_steps} steps: expected one more")
        weights = interpolation(sigmas[:-1], others[:-1])
        C, T, P = self.error_gains.shape
        blocks = self.grams.reshape(P, C, T, C, T).swapaxes(2, 3)  # [P, C, C, T, T]
        gram = np.einsum("pccij->ij", blocks) / (P * C)
        every = learned(weights, sigmas[:-1], others[:-1], gram)
        grams = (every @ blocks @ every.T).swapaxes(2, 3).reshape(P, C * len(every), -1)
        before, after = self.carry[:-1, None], carry(impulse_response)[:-1, None]
        gains = after * (weights @ (self.error_gains / before))
        return replace(self, grams=grams, impulse_response=impulse_response, error_gains=gains)

    def thinned(self, most: int = 8) -> Surrogate:
        """At most so many of the requests, evenly spaced: a plan that carries them stays small."""
        if self.requests <= most:
            return self
        kept = np.linspace(0, self.requests - 1, most).round().astype(int)
        return replace(self, grams=self.grams[kept], error_gains=self.error_gains[:, :, kept])

    def step(self, computed: Sequence[int], weights: np.ndarray, outcome: Outcome, damping: float) -> np.ndarray:
        """One damped step of Gauss-Newton on `Outcome.objective`, from an outcome predicted or measured.

        Args:
            computed: the schedule.
            weights: [C, T, T], the rows that led to `outcome`.
            outcome: at those rows, in the sampler's units.
            damping: of the change of each segment's displacement, relative to the normal matrix.

        Returns:
            [C, T, T], other rows.
        """
        segments = Segments(self, computed)
        outcome = outcome.scaled(segments.carry)
        change = segments.change(outcome, segments.carried(segments.evaluate(segments.reads(weights))), damping)
        return segments.with_change(weights, change)

    def optimise(self, computed: Sequence[int], weights: np.ndarray, iterations: int = 12) -> tuple[np.ndarray, float]:
        """Rows [C, T, T], from `weights` refined by up to `iterations` steps, and their predicted objective."""
        segments = Segments(self, computed)
        change, objective = segments.optimise(weights, iterations)
        return segments.with_change(weights, change), objective


class Segments:
    """A surrogate on one schedule, with errors in units of the final sample.

    Args:
        model: the surrogate.
        computed: the schedule.
        most: how many of the newest computed steps' weights are optimised in a row.
    """

    def __init__(self, model: Surrogate, computed: Sequence[int], most: int = MAX_READS) -> None:
        (C, T, _), N, steps = model.error_gains.shape, len(computed), list(computed)
        guidance = model.guidance
        ends = (*steps[1:], T)
        self._C, self._N, self._steps, self._guidance = C, N, np.array(steps), guidance
        self.carry = model.carry[list(ends)]  # [Q]
        self._grams, self._one = model.grams, np.eye(N)
        self._error_gains = model.error_gains[:, steps] / model.carry[steps, None]
        self._error_gains[:, 0] = 0.0  # the first computed step sees the sample as it is
        earlier = np.arange(T) < np.array(ends)[:, None]
        impulse_response = self.carry[:, None] * model.impulse_response[list(ends)] * earlier
        # What computed steps make of earlier errors reaches the targets.
        guided_gains = (guidance @ self._error_gains.reshape(C, -1)).reshape(N, -1)
        self._answers = guided_gains.T[:, None] * impulse_response[:, steps]
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

    def evaluate(self, reads: np.ndarray) -> Evaluation:
        """What such reads lead to."""
        N, M = self._N, self._C * self._N
        between = self._answers + (reads[..., None] * self._error_gains[:, None]).sum(0).transpose(2, 0, 1)
        system = np.zeros_like(between)  # 1 - K
        system[:, :, :-1] = -between[:, :, 1:]
        onward = np.linalg.inv(system + self._one)
        off = onward @ np.concatenate([reads.transpose(1, 0, 2).reshape(N, M), -self._one], 1)
        along = off @ self._inner
        return Evaluation(onward, along[:, :, :M], along @ off.transpose(0, 2, 1))

    def carried(self, evaluation: Evaluation) -> np.ndarray:
        """[Q, P, N]: what one unit, added to all forecasts of segment k, does to each target."""
        return (evaluation.onward @ self._spans).transpose(1, 0, 2)

    def outcome(self, evaluation: Evaluation) -> Outcome:
        """The predicted outcome in units of the final sample, with v^_(c, j) = v_(c, j) + s[c, j] d_j as its basis."""
        C, N = self._C, self._N
        error_gains = self._error_gains.reshape(C * N, -1).T
        before = np.tile(np.arange(-1, N - 1), C)  # the target at each one's step; any where the gain is 0
        along = evaluation.along + evaluation.errors[:, :, before] * error_gains[:, None]
        basis = evaluation.along[:, before] * error_gains[:, :, None]
        basis = self._inner[:, : C * N, : C * N] + basis + along[:, before].transpose(0, 2, 1) * error_gains[:, None]
        return Outcome(basis, along.transpose(1, 0, 2), evaluation.error)

    def change(self, outcome: Outcome, carried: np.ndarray, damping: float) -> np.ndarray:
        """[C, N, N], of the weights of context c and segment k on computed step j: a damped step of Gauss-Newton.

        Args:
            outcome: predicted, or measured and scaled by `carry`.
            carried: at the same rows.
            damping: of the change of each segment's displacement, relative to the normal matrix.
        """
        change = np.zeros((self._C, self._N, self._N))
        k, c, j = self._varied
        if not len(k):
            return change
        m, weight, within = self._system
        share = np.full((len(outcome.error), 1), KAPPA / max(len(outcome.error) - 1, 1))
        share[-1] = 1.0
        weighed = carried * (share / np.maximum(outcome.cost, _TINY))[:, :, None]
        pairs = weighed.transpose(1, 2, 0) @ carried.transpose(1, 0, 2)
        inner = outcome.basis.take(m, 1).take(m, 2) * np.outer(weight, weight)
        normal = (pairs.take(k, 1).take(k, 2) * inner).sum(0)
        gradient = (weighed.take(k, 2) * outcome.along.take(m, 2)).sum((0, 1)) * weight
        prior = inner.mean(0) * within
        size = np.trace(normal)
        system = normal + damping * size / max(np.trace(prior), _TINY) * prior
        system.flat[:: len(k) + 1] += max(1e-9 * size / len(k), _TINY)
        change[c, k, j] = -np.linalg.solve(system, gradient)
        return change

    def optimise(self, weights: np.ndarray, iterations: int) -> tuple[np.ndarray, float]:
        """The change [C, N, N] that up to so many steps make of rows [C, T, T], and the objective after it."""
        reads, total, damping = self.reads(weights), np.zeros((self._C, self._N, self._N)), 0.01
        evaluation = self.evaluate(reads)
        for _ in range(iterations):
            change = self.change(self.outcome(evaluation), self.carried(evaluation), damping)
            trial = reads + self._guidance[:, None, None] * (self._spans @ change)
            result = self.evaluate(trial)
            gained = evaluation.objective - result.objective
            if gained > 0:
                reads, evaluation, total, damping = trial, result, total + change, damping / 3
                if gained < _ENOUGH:
                    break
            else:
                damping *= 10
        return total, evaluation.objective

    def with_change(self, weights: np.ndarray, change: np.ndarray) -> np.ndarray:
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


def carry(impulse_response: np.ndarray) -> np.ndarray:
    """What the scheduler alone makes of an error in each sample until the end, the denoiser's outputs given.

    An impulse of step i is R[m, i] in the sample at step m > i and R[T, i] in the final one. Where the scheduler keeps
    only the last sample these have one ratio for all i < m; multistep ones nearly so.

    Args:
        impulse_response: R [T + 1, T].

    Returns:
        [T + 1], that of step 0, which no impulse reaches, as that of step 1. All 1 for Euler steps along a flow, and
        for schedulers that throw each sample away (those of models that predict the sample itself).
    """
    steps = impulse_response.shape[1]
    earlier = np.tri(steps + 1, steps, -1)[1:]
    then, last = ((earlier * response**2).sum(1) for response in (impulse_response[1:], impulse_response[-1:]))
    if not (np.minimum(then, last) > _TINY).all():
        return np.ones(steps + 1)
    ratio = np.sqrt(last / then)
    return np.concatenate([ratio[:1], ratio])


def unit_gains(impulse_response: np.ndarray) -> np.ndarray:
    """[T]: the error gains of a denoiser that sees one clean sample in whatever it is given, 1 / sigma for the noise.

    Sigma is counted in units of the final sample: it is what one unit of all outputs still to come does to that,
    whatever the model predicts. With x = sqrt(a) x_0 + sqrt(1 - a) noise it is sqrt((1 - a) / a), along a flow sigma
    itself. Divided by these, measured gains are of one size at all steps.

    Args:
        impulse_response: R [T + 1, T].
    """
    sigma = np.abs(impulse_response[-1, ::-1].cumsum()[::-1])
    return carry(impulse_response)[:-1] / np.maximum(sigma, _TINY_SIGMA)


def interpolated_error_gains(measured: np.ndarray, computed: Sequence[int], impulse_response: np.ndarray) -> np.ndarray:
    """Error gains [C, T, P] of all steps, interpolated from those measured at the computed ones [C, N, P].

    A computed step whose sample has no error, such as the first one, has no gain (NaN) and is left out; without any
    other, gains are 0. In units of `unit_gains` they are interpolated, and clipped to -8 and 8: beyond, a first-order
    model means nothing.

    Args:
        measured: in the sampler's units.
        computed: the schedule.
        impulse_response: [T + 1, T] of the scheduler.
    """
    C, _, P = measured.shape
    unit = unit_gains(impulse_response)
    own = np.clip(measured / unit[list(computed)][:, None], -8.0, 8.0)
    error_gains = np.zeros((C, len(unit), P))
    steps, every = np.array(computed[1:]), np.arange(len(unit))
    for c in range(C):
        for p in range(P):
            known = np.isfinite(measured[c, 1:, p])
            if known.any():
                error_gains[c, :, p] = np.interp(every, steps[known], own[c, 1:, p][known])
    return unit[:, None] * error_gains


def _cost(error: np.ndarray) -> np.ndarray:
    way = error[:-1].mean(0) if len(error) > 1 else 0.0
    return error[-1] + KAPPA * way


def _objective(error: np.ndarray) -> float:
    return float(np.log(np.maximum(_cost(error), _TINY)).mean())
