"""Closed-form rows against a direct tensor implementation of the published recursion."""

import math

import pytest
import torch

from lesa.forecasters import plan_of, reuse, taylor
from lesa.plan import Row
from lesa.reference import forecast
from lesa.schedule import paper

COMPUTED = (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)


def apply(row: Row, features: torch.Tensor) -> torch.Tensor:
    return forecast(features[list(row.steps)], row.weights, row.bias)


def taylor_direct(features: torch.Tensor, past: list[int], step: int, order: int) -> torch.Tensor:
    """TaylorSeer as a cache would run it: factors updated at every computed step, then summed."""
    factors: list[torch.Tensor] = []
    previous = None
    for now in past:
        updated = [features[now]]
        for i in range(min(order, len(factors))):
            updated.append((updated[i] - factors[i]) / (now - previous))
        factors, previous = updated, now
    x = step - previous
    return sum(factor * x**i / math.factorial(i) for i, factor in enumerate(factors))


@pytest.mark.parametrize("order", range(6))
def test_taylor_is_the_published_recursion(order):
    features = torch.randn(50, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in set(range(50)) - set(COMPUTED):
        past = [s for s in COMPUTED if s < step]
        row = taylor(past, step, order)
        assert row.steps == tuple(past[-order - 1 :]) and row.bias == 0.0
        expected = taylor_direct(features, past, step, order)
        scale = sum(map(abs, row.weights))
        torch.testing.assert_close(apply(row, features), expected, rtol=0, atol=1e-14 * max(1.0, scale))


@pytest.mark.parametrize("past", [(0,), (0, 1), (0, 1, 2), (0, 2, 5)])
def test_order_is_limited_by_the_computed_steps(past):
    assert taylor(past, 7, 5) == taylor(past, 7, len(past) - 1)


@pytest.mark.parametrize("order", range(1, 5))
def test_taylor_is_exact_on_linear_sequences(order):
    t = torch.arange(50, dtype=torch.float64)
    sequence = 3.0 - 0.25 * t
    for step in (4, 8, 15, 36, 49):
        row = taylor([s for s in COMPUTED if s < step], step, order)
        torch.testing.assert_close(apply(row, sequence), sequence[step], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", range(5))
def test_weights_sum_to_one(order):
    for step in (1, 2, 4, 22, 49):
        row = taylor([s for s in COMPUTED if s < step], step, order)
        assert math.isclose(math.fsum(row.weights), 1.0, rel_tol=0, abs_tol=1e-11)


def test_errors_on_a_parabola_are_those_of_backward_differences():
    """On t^2 at spacing h Taylor-2 takes the slope h late: it misses by h x, Taylor-1 by h x + x^2."""
    t = torch.arange(50, dtype=torch.float64) ** 2
    past, step, h, x = (16, 23, 30), 35, 7, 5
    assert apply(taylor(past, step, 2), t).item() - step**2 == pytest.approx(-h * x, abs=1e-9)
    assert apply(taylor(past, step, 1), t).item() - step**2 == pytest.approx(-h * x - x**2, abs=1e-9)


def test_known_rows():
    assert taylor((0, 1, 2, 3), 5, 1) == Row((2, 3), (-2.0, 3.0))
    assert taylor((0, 1, 2, 3), 4, 2) == Row((1, 2, 3), (0.5, -2.0, 2.5))
    assert taylor((0, 4), 6, 1) == Row((0, 4), (-0.5, 1.5))


def test_reuse_is_the_newest_computed_feature():
    assert reuse((0, 4, 8), 11) == Row((8,), (1.0,)) == taylor((0, 4, 8), 11, 0)


@pytest.mark.parametrize(
    ("past", "step", "order", "named"),
    [
        ((), 3, 1, r"past=\(\)"),
        ((0, 3), 3, 1, "before step 3"),
        ((3, 0), 5, 1, "ascending"),
        ((0, 0), 5, 1, "ascending"),
        ((-1, 0), 5, 1, "ascending"),
        ((0,), 1, -1, "order=-1"),
        ((0,), 1, 16, "order=16"),
    ],
)
def test_bad_arguments_are_named(past, step, order, named):
    with pytest.raises(ValueError, match=named):
        taylor(past, step, order)


@pytest.mark.parametrize(("name", "order"), [("reuse", 0), ("taylor-0", 0), ("taylor-1", 1), ("taylor-2", 2)])
@pytest.mark.parametrize(("num_steps", "interval"), [(50, 7), (8, 3), (4, 4), (5, 1)])
def test_plan_holds_one_row_a_forecast_step(name, order, num_steps, interval):
    computed = paper(num_steps, interval)
    sigmas = [1 - i / num_steps for i in range(num_steps + 1)]
    plan = plan_of(name, computed, sigmas, site="output", denoiser="Tiny")
    assert (plan.forecaster, plan.site, plan.denoiser, plan.computed) == (name, "output", "Tiny", computed)
    rows = plan.rows_of("any context")
    assert set(rows) == set(range(num_steps)) - set(computed)
    for step, row in rows.items():
        assert row == taylor([s for s in computed if s < step], step, order)


@pytest.mark.parametrize("name", ["", "taylor", "taylor-", "taylor--1", "Taylor-1", "taylor-1.5", "hermite"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="expected 'reuse' or 'taylor-<order>'"):
        plan_of(name, (0,), (1.0, 0.5, 0.0))


def test_plan_of_checks_the_schedule():
    with pytest.raises(ValueError, match="expected step 0 first"):
        plan_of("reuse", (1,), (1.0, 0.5, 0.0))
