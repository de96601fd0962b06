"""Between noise levels: what is known at the steps of one request, at the steps of another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SAME = 1e-6  # noise levels come from float32
_RIDGE = 1e-6  # towards what is not learned, relative


def interpolation(known: Sequence[float], wanted: Sequence[float]) -> np.ndarray:
    """Weights with which values at known noise levels give those at others.

    A level that comes twice in a request has a curve for each time.

    Args:
        known: T noise levels, in any order.
        wanted: T' noise levels.

    Returns:
        [T', T] float64; every row sums to one.
    """
    weights = np.zeros((len(wanted), len(known)))
    turns, wanted_turns = _turns(known), _turns(wanted)
    for turn in set(wanted_turns):
        last = {round(level / SAME): i for i, level in enumerate(known) if turns[i] <= turn}
        nodes = np.array([i for _, i in sorted(last.items())])
        rows = np.array([i for i, own in enumerate(wanted_turns) if own == turn])
        weights[np.ix_(rows, nodes)] = _curve(np.asarray(known)[nodes], np.asarray(wanted)[rows])
    return weights


def learned(weights: np.ndarray, known: Sequence[float], wanted: Sequence[float], gram: np.ndarray) -> np.ndarray:
    """The same weights, but those of noise levels below all known ones by least squares on the lowest known one.

    A level is taken to follow from the three levels above it as the lowest known one does from three levels as many
    times higher: towards no noise, features look alike at every scale.

    Args:
        weights: [T', T], of `interpolation`.
        known: T noise levels.
        wanted: T' noise levels.
        gram: [T, T], mean inner products of the features at the known ones.
    """
    rows, levels, others = weights.copy(), np.asarray(known), np.asarray(wanted)
    for i in np.flatnonzero(others < levels.min()):
        nodes = np.flatnonzero(weights[i])
        nodes = nodes[np.argsort(levels[nodes])]
        x = levels[nodes]
        at = max(others[i], x[0] - (x[1] - x[0]) / 2) if len(nodes) == 3 else 0.0
        if at > 0 and x[0] * x[2] / at <= levels.max():
            higher = interpolation(known, (x[0] * x / at).tolist())
            inner, start = higher @ gram @ higher.T, weights[i, nodes]
            ridge = _RIDGE * np.trace(inner) / 3 * np.eye(3)
            rows[i, nodes] += np.linalg.solve(inner + ridge, higher @ gram[:, nodes[0]] - inner @ start)
    return rows


def _turns(levels: Sequence[float]) -> list[int]:
    """How often each level came before: Heun's method calls the denoiser twice at one noise level."""
    keys = [round(level / SAME) for level in levels]
    return [keys[:i].count(key) for i, key in enumerate(keys)]


def _curve(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Weights [N', N] of the values at ascending x [N] in the cubic Hermite curve through them at `at` [N'].

    Its slope at a node is that of the parabola through the node and its neighbours, at an end of the outermost
    parabola's. Beyond its ends it goes on for half a step, and then stays: above straight; below, where features change
    the faster the less noise is left, as the parabola in the root of x through the three lowest nodes.
    """
    if len(x) == 1:
        return np.ones((len(at), 1))
    one, step = np.eye(len(x)), np.diff(x)
    rise = np.diff(one, axis=0) / step[:, None]
    slope = np.concatenate([rise, rise[-1:]])
    if len(x) > 2:
        before, after = step[:-1, None], step[1:, None]
        slope[1:-1] = (rise[:-1] * after + rise[1:] * before) / (before + after)
        slope[0], slope[-1] = 2 * rise[0] - slope[1], 2 * rise[-1] - slope[-2]
    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    h = step[left, None]
    inside = np.clip(at, x[0], x[-1])
    u = (inside - x[left])[:, None] / h
    values = (1 + 2 * u) * (1 - u) ** 2 * one[left] + u**2 * (3 - 2 * u) * one[left + 1]
    slopes = u * (1 - u) ** 2 * slope[left] - u**2 * (1 - u) * slope[left + 1]
    beyond = np.clip((at - inside)[:, None], -h / 2, h / 2)
    curve = values + h * slopes + beyond * np.where(beyond < 0, slope[0], slope[-1])
    below = at < x[0]
    if below.any() and len(x) > 2 and x[0] > 0:
        curve[below] = 0.0
        curve[below, :3] = _parabola(np.sqrt(x[:3]), np.sqrt(np.maximum(at[below], max(x[0] - step[0] / 2, 0.0))))
    return curve


def _parabola(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Weights [N', 3] of the values at x [3] in the parabola through them at `at` [N'], by Lagrange's formula."""
    weights = np.ones((len(at), 3))
    for i in range(3):
        for j in {0, 1, 2} - {i}:
            weights[:, i] *= (at - x[j]) / (x[i] - x[j])
    return weights
