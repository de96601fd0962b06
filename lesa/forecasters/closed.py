"""Closed-form rules: one row of weights from the step indices alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import factorial

import numpy as np
from numpy.polynomial import chebyshev as polynomials

from ..plans.plan import MAX_READS, Row


def reuse(past: Sequence[int], step: int) -> Row:
    """The newest computed feature again (FORA): F^_t = F_{s_j}.

    Args:
        past: computed steps before `step`, ascending, at least one.
        step: t, the step to forecast.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`.
    """
    return taylor(past, step, order=0)


def taylor(past: Sequence[int], step: int, order: int) -> Row:
    """Taylor forecast from recursive differences (TaylorSeer).

    D^0_j = F_{s_j}, D^i_j = (D^{i-1}_j - D^{i-1}_{j-1}) / (s_j - s_{j-1}) over computed steps s;
    F^_t = sum_{i <= order} D^i_j x^i / i! with x = t - s_j. Exact on sequences linear in the step.

    Args:
        past: computed steps before `step`, ascending, at least one.
        step: t, the step to forecast.
        order: highest difference used, 0 (reuse) to 15; lower where `past` has too few steps.

    Returns:
        A row over the newest `order + 1` steps of `past`.

    Raises:
        ValueError: `past` is empty, out of order, or reaches `step`; `order` is outside its range.
    """
    return _from_differences(past, step, order, lambda i, x: x**i / factorial(i))


def hermite(past: Sequence[int], step: int, order: int, scale: float = 0.5) -> Row:
    """Hermite forecast (HiCache): `taylor` with x^i replaced by scale^i H_i(scale x).

    F^_t = F_{s_j} + sum_{1 <= i <= order} D^i_j scale^i H_i(scale x) / i!, with the physicists' polynomials
    H_{i+1}(y) = 2 y H_i(y) - 2 i H_{i-1}(y) and both uses of the scale, as in the paper (arXiv 2508.16984) and its
    released code (default scale 0.5 there, 0.6 and 0.7 in its scripts; order 2).

    Args:
        past: computed steps before `step`, ascending, at least one.
        step: t, the step to forecast.
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
    """Ridge fit of Chebyshev polynomials to the past features, evaluated at the step (Spectrum).

    With tau_s = 2 s / T - 1 and phi(s) = (T_0(tau_s), ..., T_degree(tau_s)) the weights are
    phi(t)^T (Phi^T Phi + ridge I)^-1 Phi^T; every coefficient is shrunk, T_0's too, so they need not sum to one.
    Paper (arXiv 2603.01623): degree 4, ridge 0.1, no blending; the released code then also mixes in a linear
    forecast from the newest two features, blend * Chebyshev + (1 - blend) * Taylor-1, and recommends 0.5 to 1.

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
    check_past(past, step)
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
    # the ridge as further observations of value 0: better conditioned than the normal equations, and 0 is allowed
    observed = np.concatenate([basis[:-1], math.sqrt(ridge) * np.eye(degree + 1)])
    weights = blend * (basis[-1] @ np.linalg.pinv(observed)[:, : len(steps)])
    linear = taylor(steps, step, order=1)
    weights[-len(linear.steps) :] += (1.0 - blend) * np.array(linear.weights)
    return Row(steps, tuple(weights.tolist()))


def check_past(past: Sequence[int], step: int) -> None:
    """Refuse a `past` that is empty, out of order, or reaches `step`."""
    if not past or not all(a < b for a, b in pairwise((-1, *past, step))):
        raise ValueError(f"past={tuple(past)}: expected ascending computed steps before step {step}")


def _from_differences(past: Sequence[int], step: int, order: int, factor: Callable[[int, int], float]) -> Row:
    """The row of sum_i factor(i, x) D^i over the recursive differences D^i, with factor(0, x) = 1."""
    if not 0 <= order < MAX_READS:
        raise ValueError(f"order={order}: expected 0 to {MAX_READS - 1}; a row reads at most {MAX_READS} steps")
    check_past(past, step)
    steps = tuple(past[-order - 1 :])
    # one list a computed step: the weights of every feature in its D^i
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
