"""When to compute: the schedule of least error for a budget, by dynamic programming on a Gram matrix.

`search` counts the displacement of the final sample, `dpcache` the errors of the forecasts.

Between two computed steps q < n the sample should move by D = sum_t h_t F_t, q < t < n, where h is the impulse
response of the final sample to each step's output. The forecasts F_q + c_t (F_q - F_p), p the computed step before q,
move it by H F_q + c (F_q - F_p) with H = sum_t h_t and one free scalar c = sum_t h_t c_t. What c cannot correct,
|| D - H F_q - c (F_q - F_p) ||^2, is the cost of the segment (p, q, n): a quadratic form in the Gram matrix of F.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..plans.schedule import whole

# A cost or a norm below this share of the largest is what rounding left of zero.
_ROUNDING = 16 * np.finfo(np.float64).eps


def search(gram: ArrayLike, impulse_response: ArrayLike, budget: int, *, ridge: float = 0.01) -> tuple[int, ...]:
    """The schedule of exactly `budget` computed steps with the lowest cost.

    Args:
        gram: [T, T], inner products of the features of the output site, e.g. `Statistics.gram("output", GUIDED)`.
        impulse_response: [T], what one unit of each step's output does to the final sample, e.g. the last row of
            `Statistics.impulse_response`.
        budget: computed steps, 1 to T.
        ridge: pull of c towards 0 (reuse), relative to || F_q - F_p ||^2, at least 0.

    Returns:
        The computed steps, ascending, step 0 among them; of several best schedules the one with the earliest steps.

    Raises:
        ValueError: a shape or value is out of place.
    """
    gram, impulse_response = _checked(gram, impulse_response, ridge)
    budget = whole("budget", budget, 1, len(impulse_response))
    return _cheapest(_costs(gram, impulse_response, ridge), budget)


def dpcache(gram: ArrayLike, budget: int, *, gap: int = 8) -> tuple[int, ...]:
    """DPCache's schedule of exactly `budget` computed steps (arXiv 2602.22654), calibrated on recorded requests.

    Its rule is "taylor-1": F^_t = F_q + (t - q) / (q - p) (F_q - F_p), p and q the last two computed steps. The cost of
    the segment (p, q, n) is the sum of the errors of the steps between q and n, and steps 0, 1 and 2 are computed. The
    errors are root mean squares, since a Gram matrix does not hold the published mean absolute errors. Otherwise as in
    SGLang: the search over pairs is exact, gaps are at most 8. The authors' own code has order 2, gaps of up to 0.3 T
    and a search that keeps one predecessor only, and it also counts the error at n.

    Args:
        gram: [T, T], mean of F_i * F_j, e.g. `Statistics.gram("output", GUIDED)`.
        budget: computed steps, 3 (or T, if smaller) to T.
        gap: the largest distance between computed steps, and from the last of them to T, at least 1.

    Returns:
        The computed steps, ascending; of several best schedules the one with the earliest steps.

    Raises:
        ValueError: a shape or value is out of place, or so few steps cannot reach so far.
    """
    g = _checked_gram(gram)
    total = len(g)
    first = min(3, total)
    budget, gap = whole("budget", budget, first, total), whole("gap", gap, 1)
    if first - 1 + (budget - first + 1) * gap < total:
        least = first + -(-(total - first + 1) // gap) - 1
        raise ValueError(f"budget={budget}: at gaps of at most {gap}, {total} steps need {least}; or give a larger gap")
    costs = _line_costs(g)
    for q, cost in enumerate(costs):
        cost[1 if q < first - 1 else gap :] = np.inf
    return _cheapest(costs, budget)


def _line_costs(gram: np.ndarray) -> list[np.ndarray]:
    """For each q the summed errors of "taylor-1" in (p, q, n), [n - q - 1, p]; q = 0 has one column, which is free."""
    norms = gram.diagonal()
    costs = [np.zeros((len(gram), 1))]
    for q in range(1, len(gram)):
        p, t = np.arange(q), np.arange(q + 1, len(gram))[:, None]
        back = (t - q) / (q - p)  # the weight of -F_p
        ahead = 1.0 + back
        square = norms[t] + ahead**2 * norms[q] + back**2 * norms[p]
        square += 2.0 * (back * gram[t, p] - ahead * gram[t, q] - ahead * back * gram[q, p])
        costs.append(_prefix(np.sqrt(square.clip(min=0.0)), 0))
    return costs


def _cheapest(costs: list[np.ndarray], budget: int) -> tuple[int, ...]:
    """The schedule of the lowest sum of costs."""
    table = _table(costs, budget)
    # From the start: at each step the earliest of the best next ones.
    steps, p, q = [0], 0, 0
    for left in range(budget - 1, 0, -1):
        after = costs[q][:, p] + table[q + 1 :, left, q]
        p, q = q, q + 1 + int(after.argmin())
        steps.append(q)
    return tuple(steps)


def _costs(gram: np.ndarray, impulse_response: np.ndarray, ridge: float) -> list[np.ndarray]:
    """For each q the costs of the segments (p, q, n), [n - q - 1, p]; q = 0 has one column, which is reuse."""
    every = np.arange(len(impulse_response))
    sums = _prefix(impulse_response, 0)
    cross = _prefix(impulse_response[:, None] * gram, 0)  # <sum of h_t F_t over t < k, F_s>
    both = _prefix(_prefix(np.outer(impulse_response, impulse_response) * gram, 0), 1)
    squares, norms = both.diagonal(), gram.diagonal()
    # Of all q and n, those of n <= q left unread: H, <D_n, F_q> and || D_n - H F_q ||^2.
    size = sums - sums[1:, None]
    onward = cross.T - cross[every + 1, every][:, None]
    reuse = squares - 2.0 * both[1:] + squares[1:, None] - 2.0 * size * onward + size**2 * norms[:, None]
    # With c = B / ((1 + ridge) C), || E - c d ||^2 = || E ||^2 - gain B^2 / C.
    gain = (1.0 + 2.0 * ridge) / (1.0 + ridge) ** 2
    apart = norms[:, None] - 2.0 * gram + norms  # C, of q and p
    least = _ROUNDING * np.abs(both).max()
    costs = []
    for q in every:
        k = q + 1
        cost = reuse[q, k:, None]
        if q:
            along = onward[q, k:, None] - (cross[k:, :q] - cross[k, :q])
            along -= np.outer(size[q, k:], norms[q] - gram[q, :q])  # B
            norm = apart[q, :q]
            known = norm > _ROUNDING * norm.max()
            cost = cost - along**2 * np.divide(gain, norm, out=np.zeros(q), where=known)
        costs.append(np.where(cost > least, cost, 0.0))
    return costs


def _table(costs: list[np.ndarray], budget: int) -> np.ndarray:
    """Least cost from here on, [q, r, p]: q is computed, p was the one before, r computed steps are left, q included.

    Step T stands for the end of the request, where none is left.
    """
    total = len(costs)
    table = np.full((total + 1, budget + 1, total), np.inf)
    table[total, 0] = 0.0
    for q in reversed(range(total)):
        own = costs[q][:, None]  # [n - q - 1, 1, p]; where too few steps follow n, the table is infinite
        table[q, 1:, : own.shape[2]] = (own + table[q + 1 :, :-1, q, None]).min(axis=0)
    return table


def _prefix(values: np.ndarray, axis: int) -> np.ndarray:
    """Sums of the first k entries along `axis`, k = 0 to T."""
    widths = [(int(i == axis), 0) for i in range(values.ndim)]
    return np.pad(values.cumsum(axis), widths)


def _checked(gram: ArrayLike, impulse_response: ArrayLike, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of `search` as float64."""
    g, h = _checked_gram(gram), np.asarray(impulse_response, np.float64)
    if h.shape != (len(g),):
        hint = "; of a matrix [T + 1, T] give the last row" if h.ndim == 2 else ""
        raise ValueError(f"impulse_response has shape {h.shape}: expected [{len(g)}], one number a step of gram{hint}")
    _check_finite("impulse_response", h)
    if not 0.0 <= ridge < np.inf:
        raise ValueError(f"ridge={ridge}: expected a finite number of at least 0")
    return g, h


def _checked_gram(gram: ArrayLike) -> np.ndarray:
    """The Gram matrix as float64, as if F_0 had been taken off every feature.

    All weights sum to one, so this changes no cost; but rounding errors then scale with differences of features.
    """
    g = np.asarray(gram, np.float64)
    if g.ndim != 2 or g.shape[0] != g.shape[1] or not len(g):
        raise ValueError(f"gram has shape {g.shape}: expected [T, T], the inner products of T features")
    _check_finite("gram", g)
    gap = float(np.abs(g - g.T).max())
    if gap > 1e-5 * float(np.abs(g).max()):
        raise ValueError(f"gram differs from its transpose by up to {gap:g}: expected a symmetric matrix")
    g = (g + g.T) / 2.0
    return g - g[0] - g[:, :1] + g[0, 0]


def _check_finite(name: str, value: np.ndarray) -> None:
    if not np.isfinite(value).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
        raise ValueError(f"{name} holds {value[where]} at {where}: expected finite numbers; record it again")
