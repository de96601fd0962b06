"""Learned rules: one row of weights from a Gram matrix G_ij = mean of F_i * F_j over recorded requests."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..plans.plan import MAX_READS, Row
from .closed import check_past, taylor

_TOWARDS = re.compile(r"reuse|taylor-(\d+)")


def regression(
    past: Sequence[int],
    step: int,
    gram: ArrayLike,
    *,
    towards: str | None = "reuse",
    ridge: float = 0.01,
    window: int | None = 2,
    sum_to_one: bool = True,
) -> Row:
    """The row of least expected squared error, drawn towards a closed-form row.

    c = argmin E|F_t - sum_k c_k F_k|^2 + ridge * s * |c - c0|^2, c0 the row `towards`. With `sum_to_one` it is
    solved for the weights d of the differences F_k - F_last alone, F^_t = F_last + sum_k d_k (F_k - F_last), and
    only these are penalised. s is the mean diagonal of the Gram matrix of what is weighted (differences or
    features), so a ridge means the same at any scale of the features.

    Args:
        past: computed steps before `step`, ascending, at least one.
        step: t, the step to forecast.
        gram: [T, T], symmetric, mean of F_i * F_j.
        towards: "reuse" or "taylor-<order>" (within the window); None draws the penalised weights to 0, which is
            reuse where they sum to one.
        ridge: at least 0, relative; 0 takes the least change from `towards` where the features are dependent.
        window: how many of the newest steps are read, 1 to 16; None: all, at most 16.
        sum_to_one: keep the weights' sum at one.

    Returns:
        A row over the newest `window` steps of `past`, ascending.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`; `gram` does not cover the steps or is not finite;
            an option is outside its range.
    """
    if window is not None and not 1 <= window <= MAX_READS:
        raise ValueError(f"window={window}: expected 1 to {MAX_READS}, or None for all")
    if not ridge >= 0:
        raise ValueError(f"ridge={ridge}: expected a number of at least 0, e.g. 0.01")
    check_past(past, step)
    steps = tuple(past[-(window or MAX_READS) :])
    inner = _block(gram, (*steps, step))
    start = _start(steps, step, towards)
    if not sum_to_one:
        return Row(steps, tuple(_ridge_solve(inner, start, ridge).tolist()))
    # rows and columns of F_k - F_last, then of F_t - F_last
    change = np.delete(np.eye(len(inner)), -2, axis=0)
    change[:, -2] = -1.0
    weights = _ridge_solve(change @ inner @ change.T, start[:-1], ridge).tolist()
    return Row(steps, (*weights, 1.0 - math.fsum(weights)))


def l2p(past: Sequence[int], step: int, gram: ArrayLike, ridge: float = 1e-6) -> Row:
    """Unconstrained least squares over all past features: the fixed point of L2P's training on a schedule.

    L2P (arXiv 2604.26365) learns lower-triangular weights by the mean squared error; run to the end, on the steps
    that are there to be read, that is least squares. The released training stops early and reads forecasts too:
    `l2p_table` and `l2p_released` do as it does.

    Args:
        past: computed steps before `step`, ascending, at least one; the newest 16 are read.
        step: t, the step to forecast.
        gram: [T, T], symmetric, mean of F_i * F_j.
        ridge: at least 0, relative to the mean diagonal of the features' Gram matrix; against what float32 leaves of
            a Gram matrix.

    Returns:
        A row over the newest 16 steps of `past`, ascending.

    Raises:
        ValueError: as `regression`.
    """
    return regression(past, step, gram, towards=None, ridge=ridge, window=None, sum_to_one=False)


def l2p_table(gram: ArrayLike, iterations: int = 201, rate: float = 0.01) -> np.ndarray:
    """L2P's weights as its released code trains them, from the Gram matrix instead of the features.

    Every step is predicted from all true features before it; the loss is the mean squared error over steps
    1 to T - 1, the start is reuse, the optimiser Adam (0.9, 0.999, 1e-8), which moves by about `rate` an iteration
    and is stopped early. The gradient needs the Gram matrix only: 2 / (T - 1) * (W_t G - G_t).

    Args:
        gram: [T, T], symmetric, mean of F_i * F_j.
        iterations: of Adam, at least 0 (reuse); published 201.
        rate: of learning, above 0.

    Returns:
        [T, T] float64, strictly lower triangular: row t holds the weights of steps 0 to t - 1.

    Raises:
        ValueError: `gram` is not square or not finite; a number is outside its range.
    """
    if iterations < 0 or not rate > 0:
        raise ValueError(
            f"iterations={iterations}, rate={rate}: expected at least 0 and above 0; published 201 and 0.01"
        )
    full = _block(gram, range(len(np.asarray(gram))))
    total = len(full)
    weights = np.eye(total, k=-1)
    mean, square = np.zeros_like(full), np.zeros_like(full)
    for i in range(1, iterations + 1):
        gradient = np.tril(weights @ full - full, -1) * (2.0 / max(total - 1, 1))
        mean += 0.1 * (gradient - mean)
        square += 0.001 * (gradient**2 - square)
        weights -= rate * (mean / (1 - 0.9**i)) / (np.sqrt(square / (1 - 0.999**i)) + 1e-8)
    return weights


def l2p_released(past: Sequence[int], step: int, table: np.ndarray) -> Row:
    """L2P as released: row t of the table on every earlier output, the forecasts among them made the same way.

    The forecasts in between are weighted sums of computed features themselves, so the row over the computed steps
    alone gives the same result: c_t = sum_j W_tj e_j, where e_j is j itself if computed, else c_j.

    Args:
        past: computed steps before `step`, ascending, step 0 among them.
        step: t, the step to forecast.
        table: [T, T], of `l2p_table`.

    Returns:
        A row over the newest 16 steps of `past`, ascending; what older ones weigh goes to the oldest of them.

    Raises:
        ValueError: `past` lacks step 0, is out of order or reaches `step`; the table does not cover `step`.
    """
    check_past(past, step)
    if past[0] != 0:
        raise ValueError(f"past={tuple(past)}: expected step 0 first; the forecasts in between start from it")
    if step >= len(table):
        raise ValueError(f"step={step}: the table covers {len(table)} steps; train it on a Gram matrix of this request")
    column = {s: k for k, s in enumerate(past)}
    composed = np.zeros((step + 1, len(past)))
    for j in range(step + 1):
        if j in column:
            composed[j, column[j]] = 1.0
        else:
            composed[j] = table[j, :j] @ composed[:j]
    weights = composed[step, -MAX_READS:].copy()
    weights[0] += composed[step, :-MAX_READS].sum()
    return Row(tuple(past[-MAX_READS:]), tuple(weights.tolist()))


def _block(gram: ArrayLike, steps: Sequence[int]) -> np.ndarray:
    """The float64 block of `gram` at `steps`, checked."""
    full = np.asarray(gram)
    if full.ndim != 2 or full.shape[0] != full.shape[1]:
        raise ValueError(f"gram has shape {full.shape}: expected [T, T], one row and column a step")
    if steps[-1] >= len(full):
        raise ValueError(f"gram covers {len(full)} steps: step {steps[-1]} needs the statistics of a longer request")
    block = full[np.ix_(steps, steps)].astype(np.float64)
    if not np.isfinite(block).all():
        raise ValueError(f"gram holds values that are not finite at steps {tuple(steps)}: record the requests again")
    return block


def _start(steps: tuple[int, ...], step: int, towards: str | None) -> np.ndarray:
    """The weights, over `steps`, that a regression is drawn to."""
    start = np.zeros(len(steps))
    if towards is not None:
        match = _TOWARDS.fullmatch(towards)
        if match is None:
            raise ValueError(f"towards={towards!r}: expected 'reuse', 'taylor-<order>' or None")
        row = taylor(steps, step, int(match[1] or 0))
        start[-len(row.steps) :] = row.weights
    return start


def _ridge_solve(gram: np.ndarray, start: np.ndarray, ridge: float) -> np.ndarray:
    """argmin_c c'Ac - 2 c'b + ridge * mean(diag A) * |c - start|^2 with gram = (A b; b' .), nearest to `start`."""
    if not len(start) or math.isinf(ridge):
        return start
    # Rounded to float32, the Gram matrix of nearly equal features is none any more: A may deny what b claims.
    values, vectors = np.linalg.eigh(gram)
    sound = (vectors * values.clip(min=0.0)) @ vectors.T
    inner, target = sound[:-1, :-1], sound[:-1, -1]
    values, vectors = np.linalg.eigh(inner)
    damped = values.clip(min=0.0) + ridge * float(np.trace(inner)) / len(inner)
    keep = damped > np.finfo(np.float64).eps * len(inner) * values.max()
    change = vectors.T @ (target - inner @ start)
    return start + vectors @ np.divide(change, damped, out=np.zeros_like(change), where=keep)
