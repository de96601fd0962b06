"""Schedule search: against every schedule there is, with costs from features written out."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from lesa.forecasters import taylor
from lesa.planner.search import dpcache, search


def problem(seed, steps):
    """Random features, their Gram matrix, and a random impulse response of both signs."""
    rng = np.random.default_rng([seed, steps])
    features = rng.normal(size=(steps, 6)) + 3.0 * rng.normal(size=6)
    return features, features @ features.T, rng.normal(size=steps)


def schedules(steps, budget, first=1):
    """Every schedule, the one with the earliest steps first."""
    return [(*range(first), *rest) for rest in combinations(range(first, steps), budget - first)]


def cost(features, impulse_response, computed, ridge=0.01):
    """The cost from the features themselves, c by ridge regression on an augmented system."""
    total, ends = 0.0, [*computed[1:], len(features)]
    for i, (q, n) in enumerate(zip(computed, ends, strict=True)):
        left = (impulse_response[q + 1 : n, None] * (features[q + 1 : n] - features[q])).sum(0)
        if i:
            slope = features[q] - features[computed[i - 1]]
            pull = np.sqrt(ridge) * np.linalg.norm(slope)
            c = np.linalg.lstsq(np.append(slope, pull)[:, None], np.append(left, 0.0), rcond=None)[0]
            left = left - c * slope
        total += np.sum(left**2)
    return total


def test_the_cost_worked_out_by_hand():
    # F = (0, 1, 3): after step 1 step 2 is off by 2 from reuse; c = 2 * 1 / (1.25 * 1) corrects 1.6 of it.
    features, impulse_response = np.array([[0.0], [1.0], [3.0]]), np.array([7.0, 1.0, 0.5])
    assert cost(features, impulse_response, (0, 1, 2)) == 0.0
    assert cost(features, impulse_response, (0, 1), ridge=0.25) == pytest.approx((0.5 * (2.0 - 1.6)) ** 2)
    assert cost(features, impulse_response, (0,)) == pytest.approx((1.0 * 1.0 + 0.5 * 3.0) ** 2)


@pytest.mark.parametrize(("steps", "budget"), [(9, 2), (12, 3), (11, 4), (10, 5)])
def test_no_schedule_is_better(seed, steps, budget):
    features, gram, impulse_response = problem(seed, steps)
    for ridge in (0.0, 0.01, 1.0):
        costs = {s: cost(features, impulse_response, s, ridge) for s in schedules(steps, budget)}
        assert search(gram, impulse_response, budget, ridge=ridge) == min(costs, key=costs.get)


def test_the_smallest_and_the_largest_budget(seed):
    _, gram, impulse_response = problem(seed, 12)
    assert search(gram, impulse_response, 1) == (0,) and search(gram, impulse_response, 12) == tuple(range(12))


def test_equal_schedules_are_decided_by_the_earliest_steps():
    gram, impulse_response = np.full((8, 8), 0.7), np.full(8, -0.1)  # one feature over and over: every schedule is free
    assert search(gram, impulse_response, 4) == (0, 1, 2, 3)
    # One jump between steps 3 and 4: a schedule that computes 4 is free, and (0, 1, 4) is the first of those.
    steps = np.array([0.0] * 4 + [1.0] * 4)
    assert search(np.outer(steps, steps), impulse_response, 3) == (0, 1, 4)


def test_the_search_computes_around_a_kink():
    # Linear in sigma with one kink at step 12: two steps give each slope, so the second line needs 12 and 13.
    sigmas = np.linspace(1.0, 0.0, 21)
    line = np.stack([sigmas[:-1], np.maximum(0.0, sigmas[12] - sigmas[:-1]), np.ones(20)], axis=1)
    assert search(line @ line.T, np.diff(sigmas), 4, ridge=0.0) == (0, 1, 12, 13)


def test_a_common_offset_of_the_features_costs_no_digits(seed):
    features, _, impulse_response = problem(seed, 30)
    far = features + 1e4
    assert search(far @ far.T, impulse_response, 6) == search(features @ features.T, impulse_response, 6)


GOOD = np.eye(4)


def test_bad_inputs_are_named():
    for gram, impulse_response, options, message in [
        (np.ones((4, 3)), np.ones(4), {}, r"gram has shape \(4, 3\)"),
        (np.triu(np.ones((4, 4))), np.ones(4), {}, "gram differs from its transpose by up to 1"),
        (GOOD * [1, 1, np.nan, 1], np.ones(4), {}, "gram holds nan at"),
        (GOOD, np.ones(5), {}, r"impulse_response has shape \(5,\): expected \[4\]"),
        (GOOD, np.ones((5, 4)), {}, "give the last row"),
        (GOOD, [1, 1, np.inf, 1], {}, r"impulse_response holds inf at \(2,\)"),
        (GOOD, np.ones(4), {"ridge": -1.0}, "ridge=-1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            search(gram, impulse_response, 2, **options)


@pytest.mark.parametrize(("budget", "message"), [(0, "budget=0"), (5, "budget=5"), (2.5, "budget=2.5")])
def test_bad_budgets_are_named(budget, message):
    with pytest.raises(ValueError, match=message):
        search(GOOD, np.ones(4), budget)


def line_cost(features, computed):
    """What DPCache counts: the error of the order-1 forecast of every step, root mean squares from the features."""
    total = 0.0
    for t in sorted(set(range(len(features))) - set(computed)):
        row = taylor([s for s in computed if s < t], t, order=1)
        total += np.sqrt(np.mean((np.array(row.weights) @ features[list(row.steps)] - features[t]) ** 2))
    return total


@pytest.mark.parametrize(("steps", "budget", "gap"), [(9, 4, 8), (12, 5, 4), (12, 6, 3), (14, 5, 8)])
def test_no_schedule_of_dpcache_is_better(seed, steps, budget, gap):
    features = np.random.default_rng([seed, steps]).normal(size=(steps, 6)).cumsum(0).cumsum(0)
    allowed = [s for s in schedules(steps, budget, first=3) if np.diff((*s, steps)).max() <= gap]
    costs = {s: line_cost(features, s) for s in allowed}
    assert dpcache(features @ features.T / 6, budget, gap=gap) == min(costs, key=costs.get)


def test_dpcache_worked_out_by_hand():
    # F = 0, 0, 0, 0, 1, 2, 3: after step 2 nothing moves until 4; steps 3 and 4 give the line, and nothing is missed.
    line = np.maximum(0.0, np.arange(7.0) - 3.0)[:, None]
    assert dpcache(line @ line.T, 5) == (0, 1, 2, 3, 4)
    # With one step less: (0, 1, 2, 4) has the slope (1 - 0) / 2 and misses 0.5 and 1; with 3 it is 1 + 2 + 3, with 5
    # it is 1 at step 4 and 1/3 at step 6, with 6 it is 1 + 2.
    assert [line_cost(line, (0, 1, 2, s)) for s in (3, 4, 5, 6)] == pytest.approx([6.0, 1.5, 4 / 3, 3.0])
    assert dpcache(line @ line.T, 4) == (0, 1, 2, 5)


def test_dpcache_of_every_step_and_of_few():
    for steps in (1, 2, 3, 5):
        assert dpcache(np.eye(steps), steps) == tuple(range(steps))


def test_bad_inputs_of_dpcache_are_named():
    for gram, budget, gap, named in [
        (np.eye(20), 2, 8, "budget=2"),
        (np.eye(20), 21, 8, "budget=21"),
        (np.eye(20), 4, 8, "budget=4: .* need 5"),
        (np.eye(20), 5, 0, "gap=0"),
        (np.ones((4, 3)), 3, 8, "gram has shape"),
        (np.full((4, 4), np.inf), 3, 8, "gram holds inf"),
    ]:
        with pytest.raises(ValueError, match=named):
            dpcache(gram, budget, gap=gap)
