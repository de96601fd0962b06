"""How a step is forecast: each published rule as a function that returns one row of weights, and plans of such rows.

Legend: F_t is the feature of step t, s_0 < ... < s_j are the computed steps before t ("past"), T is the number of steps
of a request, G_ij is the mean of F_i * F_j over recorded requests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from math import factorial
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev as polynomials
from numpy.typing import ArrayLike

from .plans.plan import Plan
from .plans.rows import ANY_CONTEXT, MAX_READS, Row
from .plans.schedule import check, noise_levels

__all__ = [
    *("FORECASTERS", "LEARNED", "check_rows", "chebyshev", "dmd", "foca", "hermite", "l2p", "l2p_released"),
    *("l2p_table", "plan_of", "rational", "regression", "reuse", "rows_of", "taylor"),
]

LEARNED = ("regression", "l2p", "l2p-released", "dmd")  # these need a Gram matrix
FORECASTERS = (
    *("reuse", "taylor-<order>", "hermite-<order>", "chebyshev-<degree>", "rational-<order>", "foca"),
    *LEARNED,
)

_NUMBERED = re.compile(r"(taylor|hermite|chebyshev|rational)-(\d+)")
_TOWARDS = re.compile(r"reuse|taylor-(\d+)")


def plan_of(
    forecaster: str,
    computed: Iterable[int],
    sigmas: Sequence[float],
    site: str = "hidden",
    gram: ArrayLike | Mapping[str, ArrayLike] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    **provenance: Any,
) -> Plan:
    """A plan that forecasts by one rule.

    Args:
        forecaster: one of `FORECASTERS` with its number in place, e.g. "taylor-2", "regression".
        computed: computed steps, ascending, 0 among them.
        sigmas: T + 1 noise levels, the final 0 included.
        site: "hidden" or "output".
        gram: for those in `LEARNED`: [T, T] of the same site, one for all contexts or one for each by name.
        options: keywords of the rule's function, e.g. {"scale": 0.7} or {"towards": "taylor-1"}.
        provenance: further fields of `Plan`, e.g. `timesteps`, `denoiser`.

    Returns:
        A plan whose rows serve every context, or those that `gram` names.

    Raises:
        ValueError: the name is unknown, its Gram matrix is missing, or a value is out of range.
    """
    sigmas = noise_levels(sigmas)
    num_steps, steps = len(sigmas) - 1, tuple(computed)
    shared = not isinstance(gram, Mapping) or forecaster not in LEARNED
    grams: Mapping[str, Any] = {ANY_CONTEXT: gram} if shared else gram  # type: ignore[assignment]
    if not grams:
        raise ValueError("gram names no context: give one [T, T] matrix, or a mapping from context to matrix")
    rows = {context: rows_of(forecaster, steps, num_steps, one, **(options or {})) for context, one in grams.items()}
    return Plan(steps, sigmas, rows, site=site, forecaster=forecaster, **provenance)


def rows_of(
    forecaster: str, computed: Iterable[int], num_steps: int, gram: ArrayLike | None = None, **options: Any
) -> dict[int, Row]:
    """The row of every forecast step.

    Args:
        forecaster: see `plan_of`.
        computed: computed steps, ascending, 0 among them.
        num_steps: T, steps of a request.
        gram: [T, T], for those in `LEARNED`.
        options: keywords of the rule's function.

    Returns:
        A row, over computed steps before it, for each step that is not computed.

    Raises:
        ValueError: as `plan_of`.
    """
    steps = check(computed, num_steps)
    rule = _rule(forecaster, num_steps, gram, options)
    wanted = sorted(set(range(num_steps)) - set(steps))
    return {step: rule([s for s in steps if s < step], step) for step in wanted}


def check_rows(
    forecaster: str, computed: Iterable[int], num_steps: int, gram: ArrayLike | None = None, **options: Any
) -> dict[int, Row]:
    """The row that would have forecast each computed step, from the second on.

    Args:
        forecaster, computed, num_steps, gram, options: see `rows_of`.

    Returns:
        A row, over computed steps before it, for each computed step but the first.

    Raises:
        ValueError: as `plan_of`.
    """
    steps = check(computed, num_steps)
    rule = _rule(forecaster, num_steps, gram, options)
    return {step: rule(steps[:i], step) for i, step in enumerate(steps) if i}


def _rule(forecaster: str, num_steps: int, gram: Any, options: dict[str, Any]) -> Callable[[Sequence[int], int], Row]:
    """The function of (past, step) that `forecaster` names."""
    match = _NUMBERED.fullmatch(forecaster)
    if match is None and forecaster not in ("reuse", "foca", *LEARNED):
        expected = ", ".join(map(repr, FORECASTERS))
        raise ValueError(f"forecaster={forecaster!r}: expected one of {expected}, e.g. 'taylor-2'")
    if forecaster in LEARNED and gram is None:
        raise ValueError(f"forecaster={forecaster!r} needs gram: give the [T, T] Gram matrix of recorded requests")
    if match is not None:
        number = int(match[2])
        if match[1] == "chebyshev":
            return lambda past, step: chebyshev(past, step, num_steps, number, **options)
        numbered: dict[str, Callable[..., Row]] = {"taylor": taylor, "hermite": hermite, "rational": rational}
        return lambda past, step: numbered[match[1]](past, step, number, **options)
    if forecaster == "reuse":
        return lambda past, step: reuse(past, step, **options)
    if forecaster == "foca":
        return lambda past, step: foca(past, step, **options)
    if forecaster == "l2p-released":
        table = l2p_table(gram, **options)
        return lambda past, step: l2p_released(past, step, table)
    learned: dict[str, Callable[..., Row]] = {"regression": regression, "l2p": l2p, "dmd": dmd}
    return lambda past, step: learned[forecaster](past, step, gram, **options)


def reuse(past: Sequence[int], step: int) -> Row:
    """The newest computed feature again (FORA, arXiv 2407.01425): F^_t = F_{s_j}.

    Args:
        past: computed steps before `step`, ascending, at least one.
        step: t, the step to forecast.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`.
    """
    return taylor(past, step, order=0)


def taylor(past: Sequence[int], step: int, order: int) -> Row:
    """Taylor forecast from recursive differences (TaylorSeer, arXiv 2503.06923).

    D^0_j = F_{s_j}, D^i_j = (D^{i-1}_j - D^{i-1}_{j-1}) / (s_j - s_{j-1}) over computed steps s;
    F^_t = sum_{i <= order} D^i_j x^i / i! with x = t - s_j. Exact on sequences linear in the step.

    Args:
        past, step: see `reuse`.
        order: highest difference used, 0 (reuse) to 15; lower where `past` has too few steps.

    Returns:
        A row over the newest `order + 1` steps of `past`.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`; `order` is outside its range.
    """
    return _from_differences(past, step, order, lambda i, x: x**i / factorial(i))


def hermite(past: Sequence[int], step: int, order: int, scale: float = 0.5) -> Row:
    """Hermite forecast (HiCache, arXiv 2508.16984): `taylor` with x^i replaced by scale^i H_i(scale x).

    F^_t = F_{s_j} + sum_{1 <= i <= order} D^i_j scale^i H_i(scale x) / i!, with the physicists' polynomials
    H_{i+1}(y) = 2 y H_i(y) - 2 i H_{i-1}(y). The scale is used twice, as in the paper and its released code (order 2;
    scale 0.5 by default, 0.6 and 0.7 in its scripts).

    Args:
        past, step: see `reuse`.
        order: highest difference used, 0 (reuse) to 15; lower where `past` has too few steps.
        scale: contraction, above 0; at 1/sqrt(2) order 1 is Taylor's, towards 0 every order becomes reuse.

    Returns:
        A row over the newest `order + 1` steps of `past`.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`; `order` or `scale` is outside its range.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale}: expected a finite number above 0, e.g. 0.5")

    def factor(i: int, x: int) -> float:
        below, value = 0.0, 1.0
        for k in range(i):
            below, value = value, 2 * scale * x * value - 2 * k * below
        return scale**i * value / factorial(i)

    return _from_differences(past, step, order, factor)


def chebyshev(
    past: Sequence[int], step: int, num_steps: int, degree: int = 4, ridge: float = 0.1, blend: float = 1.0
) -> Row:
    """Ridge fit of Chebyshev polynomials to the past features, evaluated at the step (Spectrum, arXiv 2603.01623).

    With tau_s = 2 s / T - 1 and phi(s) = (T_0(tau_s), ..., T_degree(tau_s)) the weights are
    phi(t)^T (Phi^T Phi + ridge I)^-1 Phi^T; every coefficient is shrunk, T_0's too, so they need not sum to one.
    The paper has degree 4, ridge 0.1 and no blending. The released code also mixes in a linear forecast from the newest
    two features, blend * Chebyshev + (1 - blend) * Taylor-1, and recommends a blend of 0.5 to 1.

    Args:
        past: computed steps before `step`, ascending, at least one; the newest 16 are fitted (published: all).
        step: t, the step to forecast.
        num_steps: T, steps of the request.
        degree: of the polynomial, 0 to 15.
        ridge: at least 0; at 0 the least-norm coefficients.
        blend: share of the fit, 0 (Taylor-1) to 1.

    Returns:
        A row over the newest 16 steps of `past`, ascending.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`; a number is outside its range.
    """
    _check_past(past, step)
    if step >= num_steps:
        raise ValueError(f"step={step}: expected a step of a request of num_steps={num_steps}")
    if not 0 <= degree < MAX_READS:
        raise ValueError(f"degree={degree}: expected 0 to {MAX_READS - 1}")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge={ridge}: expected a finite number, at least 0")
    if not 0 <= blend <= 1:
        raise ValueError(f"blend={blend}: expected 0 (Taylor-1) to 1 (Chebyshev alone)")
    steps = tuple(past[-MAX_READS:])
    basis = polynomials.chebvander(2.0 * np.array([*steps, step]) / num_steps - 1.0, degree)
    # The ridge as extra observations of value 0: better conditioned than the normal equations, and 0 is allowed.
    observed = np.concatenate([basis[:-1], math.sqrt(ridge) * np.eye(degree + 1)])
    weights = blend * (basis[-1] @ np.linalg.pinv(observed)[:, : len(steps)])
    linear = taylor(steps, step, order=1)
    weights[-len(linear.steps) :] += (1.0 - blend) * np.array(linear.weights)
    return Row(steps, tuple(weights.tolist()))


def rational(past: Sequence[int], step: int, order: int = 1, spread: float = 0.55) -> Row:
    """Barycentric interpolation on a bounded phase, evaluated at the step (ResilPhase, arXiv 2606.26769).

    The newest steps s_j and t are mapped to z = tanh(spread * (s - m) / r) with m the mean of the s_j and r the
    largest |s_j - m|. With w_j = 1 / prod_k (z_j - z_k) the weights are w_j / (z - z_j), divided by their sum: the
    polynomial of degree `order` in z. The phase of t stays below 1, so that far forecasts level off. As in the
    released code for FLUX, where the feature is what all blocks add to their input; order 1 and 0.55 are its values.

    Args:
        past, step: see `reuse`.
        order: degree in the phase, 0 (reuse) to 15; lower where `past` has too few steps.
        spread: of the phase, above 0, at most 5; towards 0 the phase is the step, and order 1 is Taylor's.

    Returns:
        A row over the newest `order + 1` steps of `past`; the weights sum to one.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`; `order` or `spread` is outside its range.
    """
    _check_order(order)
    if not 0 < spread <= 5:
        raise ValueError(f"spread={spread}: expected a number above 0, at most 5; published 0.55")
    _check_past(past, step)
    steps = tuple(past[-order - 1 :])
    centred = np.array([*steps, step]) - sum(steps) / len(steps)
    phase = np.tanh(spread * centred / (np.abs(centred[:-1]).max() or 1.0))
    apart = phase[:-1, None] - phase[:-1]
    np.fill_diagonal(apart, 1.0)
    weights = 1.0 / (apart.prod(axis=1) * (phase[-1] - phase[:-1]))
    return Row(steps, tuple((weights / weights.sum()).tolist()))


def foca(past: Sequence[int], step: int) -> Row:
    """The feature's path as an ODE, BDF2 predictor and Heun corrector (FoCa, arXiv 2508.16211).

    Step by step from t = k to k + 1, where F_k and F_{k-1} may be forecasts:
    P = 4/3 F_k - 1/3 F_{k-1} + 2/3 F'_k and F_{k+1} = F_k + 1/2 (F'_j + P'), P' = (3 P - 4 F_k + F_{k-1}) / 2.
    The authors' code is not public. Read into the paper's equations 7 and 8, as independent code does: F'_k is
    F_k - F_{k-1}, which makes P' the same; F'_j = (F_{s_j} - F_{s_{j-1}}) / (s_j - s_{j-1}). After x steps
    F^_t = F_{s_j} + x F'_j + (1 - 2^-x) (F_{s_j} - F_{s_j - 1} - F'_j). Exact on sequences linear in the step.

    Args:
        past, step: see `reuse`.

    Returns:
        A row over the newest 16 steps of `past`, ascending; the weights of older ones are added to the oldest of them.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`.
    """
    _check_past(past, step)
    unit, column = np.eye(len(past)), {s: j for j, s in enumerate(past)}
    slope, before, newest = np.zeros(len(past)), unit[0], unit[0]  # of F_k, in features of `past`
    for t in range(past[0] + 1, step + 1):
        if t in column:
            j = column[t]
            slope = (unit[j] - unit[j - 1]) / (t - past[j - 1])
            before, newest = newest, unit[j]
        else:
            before, newest = newest, newest + (slope + newest - before) / 2.0
    return _newest_reads(past, newest)


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
    """Ridge regression on recorded features, shrunk towards a closed-form row; a rule of this library.

    c = argmin E|F_t - sum_k c_k F_k|^2 + ridge * s * |c - c0|^2, where c0 is the row `towards`. With `sum_to_one` the
    unknowns are the weights d of the differences, F^_t = F_last + sum_k d_k (F_k - F_last), and only these are
    penalised. s is the mean diagonal of the Gram matrix of what is weighted (differences or features), so that a ridge
    means the same at any scale of the features.

    Args:
        past, step: see `reuse`.
        gram: [T, T], symmetric, mean of F_i * F_j.
        towards: "reuse" or "taylor-<order>" (within the window); None shrinks the penalised weights to 0, which is
            reuse where they sum to one.
        ridge: at least 0, relative; where features are dependent, 0 gives the solution nearest to `towards`.
        window: how many of the newest steps are read, 1 to 16; None reads all, at most 16.
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
    _check_past(past, step)
    steps = tuple(past[-(window or MAX_READS) :])
    inner = _block(gram, (*steps, step))
    start = _start(steps, step, towards)
    if not sum_to_one:
        return Row(steps, tuple(_ridge_solve(inner, start, ridge).tolist()))
    # Rows of F_k - F_last, then of F_t - F_last.
    change = np.delete(np.eye(len(inner)), -2, axis=0)
    change[:, -2] = -1.0
    weights = _ridge_solve(change @ inner @ change.T, start[:-1], ridge).tolist()
    return Row(steps, (*weights, 1.0 - math.fsum(weights)))


def l2p(past: Sequence[int], step: int, gram: ArrayLike, ridge: float = 1e-6) -> Row:
    """Least squares over all past features: where L2P's training converges (arXiv 2604.26365).

    L2P learns lower-triangular weights by the mean squared error. Trained to convergence, on computed steps alone, that
    is least squares. The released training stops early and reads forecasts too: see `l2p_table` and `l2p_released`.

    Args:
        past: computed steps before `step`, ascending, at least one; the newest 16 are read.
        step: t, the step to forecast.
        gram: [T, T], symmetric, mean of F_i * F_j.
        ridge: at least 0, relative to the mean diagonal of the Gram matrix; damps the rounding of float32.

    Returns:
        A row over the newest 16 steps of `past`, ascending.

    Raises:
        ValueError: as `regression`.
    """
    return regression(past, step, gram, towards=None, ridge=ridge, window=None, sum_to_one=False)


def l2p_table(gram: ArrayLike, iterations: int = 201, rate: float = 0.01) -> np.ndarray:
    """L2P's weights as its released code trains them (arXiv 2604.26365), on the Gram matrix instead of the features.

    Every step is predicted from all true features before it. The loss is the mean squared error over steps 1 to T - 1.
    Training starts at reuse and runs Adam (0.9, 0.999, 1e-8) for a fixed number of iterations. The gradient needs the
    Gram matrix only: 2 / (T - 1) * (W_t G - G_t).

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
    """L2P as released (arXiv 2604.26365): row t of the table applied to all earlier outputs, forecasts included.

    Earlier forecasts are weighted sums of computed features, so one row over the computed steps gives the same result:
    c_t = sum_j W_tj e_j, where e_j is the unit vector of j if j is computed, else c_j.

    Args:
        past: computed steps before `step`, ascending, step 0 among them.
        step: t, the step to forecast.
        table: [T, T], of `l2p_table`.

    Returns:
        A row over the newest 16 steps of `past`, ascending; the weights of older ones are added to the oldest of them.

    Raises:
        ValueError: `past` lacks step 0, is out of order or reaches `step`; the table does not cover `step`.
    """
    _check_past(past, step)
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
    return _newest_reads(past, composed[step])


def dmd(past: Sequence[int], step: int, gram: ArrayLike, history: int = 6, cutoff: float = 1e-4) -> Row:
    """Dynamic mode decomposition of the newest computed features (cache-dit 1.5; Prony 1795, Schmid 2010).

    With X = (F_{s_1}, ..., F_{s_{n-1}}) and Y = (F_{s_2}, ..., F_{s_n}) the operator Y X^+ has eigenvalues lambda and
    modes Phi; F^_t = Re Phi lambda^k b with b = Phi^+ F_{s_n} and k = (t - s_n) / gap. Exact on sums of up to n - 1
    exponentials. An operator knows one gap only, so the newest evenly spaced steps are fitted, as in the published
    code. Where these are fewer than 4 the row is Taylor's of order 1, and where the fit fails it is reuse. There each
    request is fitted to itself; here all are by the mean of their inner products. Its ridge of 1e-8 is left out.

    Args:
        past, step: see `reuse`.
        gram: [T, T], symmetric, mean of F_i * F_j; only the fitted steps are read.
        history: how many of the newest steps may be fitted, 4 to 16.
        cutoff: singular values of X below this share of the largest are noise, above 0 and below 1.

    Returns:
        A row over the fitted steps but the oldest, ascending; without a fit over the newest two or one.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`; `gram` does not cover the steps or is not finite;
            an option is outside its range.
    """
    if not 4 <= history <= MAX_READS:
        raise ValueError(f"history={history}: expected 4 to {MAX_READS}; published 6")
    if not 0 < cutoff < 1:
        raise ValueError(f"cutoff={cutoff}: expected a number between 0 and 1; published 1e-4")
    _check_past(past, step)
    steps = tuple(past[-history:])
    while len(steps) > 2 and len({b - a for a, b in pairwise(steps)}) > 1:
        steps = steps[1:]
    inner = _block(gram, steps)
    if len(steps) < 4:
        return taylor(past, step, order=1)
    values, vectors = np.linalg.eigh(inner[:-1, :-1])
    if values[-1] <= 0.0:
        return reuse(past, step)
    keep = values > cutoff**2 * values[-1]
    basis = vectors[:, keep] / np.sqrt(values[keep])  # X basis = U, the left singular vectors of X
    roots, modes = np.linalg.eig(basis.T @ inner[:-1, 1:] @ basis)
    modes = basis @ modes  # Phi = Y modes
    values, vectors = np.linalg.eigh(inner[1:, 1:])
    half = np.sqrt(values.clip(min=0.0))[:, None] * vectors.T  # |half c| = |Y c|
    amplitudes = np.linalg.lstsq(half @ modes, half[:, -1].astype(complex), rcond=None)[0]
    ahead = roots.astype(complex) ** ((step - steps[-1]) / (steps[1] - steps[0]))
    weights = (modes @ (ahead * amplitudes)).real
    return Row(steps[1:], tuple(weights.tolist())) if np.isfinite(weights).all() else reuse(past, step)


def _check_past(past: Sequence[int], step: int) -> None:
    """Refuse a `past` that is empty, out of order, or reaches `step`."""
    if not past or not all(a < b for a, b in pairwise((-1, *past, step))):
        raise ValueError(f"past={tuple(past)}: expected ascending computed steps before step {step}")


def _check_order(order: int) -> None:
    """Refuse an order that a row cannot have."""
    if not 0 <= order < MAX_READS:
        raise ValueError(f"order={order}: expected 0 to {MAX_READS - 1}; a row reads at most {MAX_READS} steps")


def _newest_reads(past: Sequence[int], weights: np.ndarray) -> Row:
    """The row of one weight for each step of `past`; what is older than the newest 16 goes to the oldest of them."""
    kept = weights[-MAX_READS:].copy()
    kept[0] += weights[:-MAX_READS].sum()
    return Row(tuple(past[-MAX_READS:]), tuple(kept.tolist()))


def _from_differences(past: Sequence[int], step: int, order: int, factor: Callable[[int, int], float]) -> Row:
    """The row of sum_i factor(i, x) D^i over the recursive differences D^i, with factor(0, x) = 1."""
    _check_order(order)
    _check_past(past, step)
    steps = tuple(past[-order - 1 :])
    # For each computed step the weights of all features in its D^i.
    differences = [[float(j == k) for k in range(len(steps))] for j in range(len(steps))]
    weights = differences[-1]
    for i in range(1, len(steps)):
        gaps = [new - old for old, new in pairwise(steps[i - 1 :])]
        differences = [
            [(n - o) / gap for o, n in zip(old, new, strict=True)]
            for (old, new), gap in zip(pairwise(differences), gaps, strict=True)
        ]
        share = factor(i, step - steps[-1])
        weights = [w + share * d for w, d in zip(weights, differences[-1], strict=True)]
    return Row(steps, tuple(weights))


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
    """The weights, over `steps`, towards which a regression shrinks."""
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
    # Rounding to float32 can make the Gram matrix of nearly equal features indefinite.
    values, vectors = np.linalg.eigh(gram)
    sound = (vectors * values.clip(min=0.0)) @ vectors.T
    inner, target = sound[:-1, :-1], sound[:-1, -1]
    values, vectors = np.linalg.eigh(inner)
    damped = values.clip(min=0.0) + ridge * float(np.trace(inner)) / len(inner)
    keep = damped > np.finfo(np.float64).eps * len(inner) * values.max()
    change = vectors.T @ (target - inner @ start)
    return start + vectors @ np.divide(change, damped, out=np.zeros_like(change), where=keep)
