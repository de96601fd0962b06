"""What a plan's rows do to the final sample, to first order, and the rows that do least harm.

With v^_t what the scheduler is given at step t of an accelerated request and v_t in the full one, the samples differ by

    d_m = sum_(i < m) R[m, i] (v^_i - v_i)                                  R: the scheduler's impulse response

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

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..plans.plan import MAX_READS
from .interpolation import interpolation, learned
from .segments import Outcome, Segments


@dataclass(frozen=True)
class Surrogate:
    """The model of a denoiser's requests.

    Args:
        grams: [P, C T, C T], of each request's outputs, contexts first.
        impulse_response: [T + 1, T] of the scheduler.
        guidance: [C], the weight of each context in what the scheduler is given.
        error_gains: [C, T, P].
        contexts: the names of the C contexts, where anybody asks for them.

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

    @property
    def num_steps(self) -> int:
        """T, the number of steps of a request."""
        return len(self.impulse_response) - 1

    @property
    def requests(self) -> int:
        """P, how many requests."""
        return len(self.grams)

    def is_finite(self) -> bool:
        """Whether all its numbers are."""
        return all(
            np.isfinite(part).all() for part in (self.grams, self.impulse_response, self.guidance, self.error_gains)
        )

    def at(self, sigmas: Sequence[float], others: Sequence[float], impulse_response: np.ndarray) -> Surrogate:
        """The model of the same requests at other noise levels, interpolated in sigma as in `Statistics.at`.

        Where levels lie below all that are known, the weights of features are learned from the Gram matrices.

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
        return replace(self, grams=grams, impulse_response=impulse_response, error_gains=weights @ self.error_gains)

    def thinned(self, most: int = 8) -> Surrogate:
        """At most so many of the requests, evenly spaced: a plan that carries them stays small."""
        if self.requests <= most:
            return self
        kept = np.linspace(0, self.requests - 1, most).round().astype(int)
        return replace(self, grams=self.grams[kept], error_gains=self.error_gains[:, :, kept])

    def on(self, computed: Sequence[int], most: int = MAX_READS) -> Segments:
        """The model on one schedule, with the weights of so many of the newest computed steps to be varied."""
        return Segments(self.grams, self.impulse_response, self.guidance, self.error_gains, computed, most)

    def outcome(self, computed: Sequence[int], weights: np.ndarray) -> Outcome:
        """The predicted outcome of rows `weights` [C, T, T] on a schedule."""
        segments = self.on(computed)
        return segments.outcome(segments.priced(segments.reads(weights)))

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
        segments = self.on(computed)
        change = segments.change(outcome, segments.carried(segments.priced(segments.reads(weights))), damping)
        return segments.spread(weights, change)

    def optimise(
        self, computed: Sequence[int], weights: np.ndarray, iterations: int = 12, damping: float = 0.01
    ) -> tuple[np.ndarray, float]:
        """Rows [C, T, T] from `weights` on, bettered by up to `iterations` steps, and their predicted objective."""
        segments = self.on(computed)
        change, objective = segments.optimise(weights, iterations, damping)
        return segments.spread(weights, change), objective


def interpolated_error_gains(measured: np.ndarray, computed: Sequence[int], num_steps: int) -> np.ndarray:
    """Error gains [C, T, P] of all steps, interpolated from those measured at the computed ones [C, N, P].

    A computed step that sees the sample as it is, as the first one does, tells none, and is left out; without any that
    does, error gains are 0. They are cut to where first order means anything.
    """
    C, _, P = measured.shape
    error_gains = np.zeros((C, num_steps, P))
    steps, every = np.array(computed[1:]), np.arange(num_steps)
    for c in range(C):
        for p in range(P):
            told = np.isfinite(measured[c, 1:, p])
            if told.any():
                error_gains[c, :, p] = np.interp(every, steps[told], np.clip(measured[c, 1:, p][told], -8.0, 8.0))
    return error_gains
