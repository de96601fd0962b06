"""Closed-form rows against direct tensor implementations of what was published, and the names of all rules."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev as chebyshev_series
from numpy.polynomial import hermite as physicists

from lesa import ops
from lesa.forecasters import FORECASTERS, LEARNED, chebyshev, check_rows, hermite, plan_of, reuse, rows_of, taylor
from lesa.ops.reference import forecast
from lesa.plans.plan import Row
from lesa.plans.schedule import paper

COMPUTED = (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)


def apply(row: Row, features: torch.Tensor) -> torch.Tensor:
    return forecast(features[list(row.steps)], row.weights, row.bias)


def factors_direct(features: torch.Tensor, past: list[int], order: int) -> list[torch.Tensor]:
    """TaylorSeer's cache: factors updated at every computed step."""
    factors: list[torch.Tensor] = []
    previous = None
    for now in past:
        updated = [features[now]]
        for i in range(min(order, len(factors))):
            updated.append((updated[i] - factors[i]) / (now - previous))
        factors, previous = updated, now
    return factors


def taylor_direct(features: torch.Tensor, past: list[int], step: int, order: int) -> torch.Tensor:
    factors, x = factors_direct(features, past, order), step - past[-1]
    return sum(factor * x**i / math.factorial(i) for i, factor in enumerate(factors))


def hermite_direct(features: torch.Tensor, past: list[int], step: int, order: int, scale: float) -> torch.Tensor:
    """HiCache: numpy's physicists' series in place of the powers, contracted inside and outside."""
    factors, x = factors_direct(features, past, order), step - past[-1]
    return sum(
        factor * scale**i * physicists.Hermite.basis(i)(scale * x) / math.factorial(i)
        for i, factor in enumerate(factors)
    )


def chebyshev_direct(
    features: torch.Tensor, past: list[int], step: int, num_steps: int, degree: int, ridge: float
) -> torch.Tensor:
    """Spectrum: coefficients of every element by the normal equations, then the series at the step."""
    phi = chebyshev_series.chebvander(2 * np.array(past) / num_steps - 1, degree)
    observed = features[past].flatten(1).numpy()
    coefficients = np.linalg.solve(phi.T @ phi + ridge * np.eye(degree + 1), phi.T @ observed)
    values = chebyshev_series.chebval(2 * step / num_steps - 1, coefficients)
    return torch.from_numpy(values).reshape(features.shape[1:])


def random_features(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(features: torch.Tensor) -> np.ndarray:
    flat = features.flatten(1)
    return (flat @ flat.T / flat.shape[1]).numpy()


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


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.3])
@pytest.mark.parametrize("order", range(6))
def test_hermite_is_the_published_sum(order, scale, seed):
    features = random_features(seed, 50, 3, 4)
    for step in set(range(50)) - set(COMPUTED):
        past = [s for s in COMPUTED if s < step]
        row = hermite(past, step, order, scale)
        assert row.steps == tuple(past[-order - 1 :]) and row.bias == 0.0
        assert math.isclose(math.fsum(row.weights), 1.0, rel_tol=0, abs_tol=1e-10 * max(map(abs, row.weights)))
        size = sum(map(abs, row.weights))
        expected = hermite_direct(features, past, step, order, scale)
        torch.testing.assert_close(apply(row, features), expected, rtol=0, atol=1e-13 * max(1.0, size))


def test_a_hermite_row_worked_out_by_hand():
    """Order 2 at scale 1/2, x = 2: factors 1/2 * H_1(1) = 1 and 1/4 * H_2(1) / 2 = 1/4 of D^1 and D^2."""
    assert hermite((0, 1, 2), 4, 2, scale=0.5) == Row((0, 1, 2), (0.25, -1.5, 2.25))


def test_limits_of_the_hermite_scale():
    past = (0, 1, 2, 9)
    assert hermite(past, 12, 1, scale=math.sqrt(0.5)).weights == pytest.approx(taylor(past, 12, 1).weights, abs=1e-14)
    assert hermite(past, 12, 3, scale=1e-9).weights == pytest.approx((0, 0, 0, 1), abs=1e-15)
    assert hermite(past, 12, 0) == reuse(past, 12)
    assert hermite(past, 12, 2) == hermite(past, 12, 2, scale=0.5)


@pytest.mark.parametrize("ridge", [0.1, 1e-3, 5.0])
@pytest.mark.parametrize("degree", range(7))
def test_chebyshev_is_the_published_fit(degree, ridge, seed):
    features = random_features(seed, 50, 3, 4)
    for step in set(range(50)) - set(COMPUTED):
        past = [s for s in COMPUTED if s < step]
        row = chebyshev(past, step, 50, degree, ridge)
        assert row.steps == tuple(past) and row.bias == 0.0
        expected = chebyshev_direct(features, past, step, 50, degree, ridge)
        torch.testing.assert_close(apply(row, features), expected, rtol=1e-9, atol=1e-9)


def test_a_chebyshev_row_worked_out_by_hand():
    """Degree 1, T = 4, steps 0 and 2: tau = -1 and 0, and 1/2 at step 3; ridge 1 makes ((3, -1), (-1, 2))."""
    assert chebyshev((0, 2), 3, 4, degree=1, ridge=1.0).weights == pytest.approx((0.0, 0.5), abs=1e-15)


@pytest.mark.parametrize("degree", range(5))
def test_chebyshev_without_ridge_is_exact_on_polynomials(degree, seed):
    coefficients = random_features(seed, degree + 1)
    t = torch.arange(50, dtype=torch.float64)
    sequence = sum(c * (t / 50) ** i for i, c in enumerate(coefficients))
    for step in (15, 36, 49):
        row = chebyshev([s for s in COMPUTED if s < step], step, 50, degree, ridge=0.0)
        torch.testing.assert_close(apply(row, sequence), sequence[step], rtol=1e-7, atol=1e-7)


def test_chebyshev_blends_with_the_line_through_the_newest_two(seed):
    features, past = random_features(seed, 50, 7), [s for s in COMPUTED if s < 20]
    fit, line = (apply(row, features) for row in (chebyshev(past, 20, 50), taylor(past, 20, 1)))
    mixed = apply(chebyshev(past, 20, 50, blend=0.3), features)
    torch.testing.assert_close(mixed, 0.3 * fit + 0.7 * line, rtol=1e-12, atol=1e-12)
    assert chebyshev((0,), 1, 50, blend=0.0) == Row((0,), (1.0,))


def test_chebyshev_reads_the_newest_16_and_vanishes_under_a_heavy_ridge():
    past = tuple(range(20))
    assert chebyshev(past, 22, 50) == chebyshev(past[4:], 22, 50)
    assert max(map(abs, chebyshev(past, 22, 50, ridge=1e12).weights)) < 1e-10
    assert all(math.isfinite(w) for w in chebyshev((0,), 3, 4, degree=8, ridge=0.0).weights)


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


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: hermite((0, 3), 3, 1), "before step 3"),
        (lambda: hermite((0,), 3, 16), "order=16"),
        (lambda: hermite((0,), 3, 1, scale=0.0), "scale=0.0"),
        (lambda: hermite((0,), 3, 1, scale=math.nan), "scale=nan"),
        (lambda: chebyshev((), 3, 50), r"past=\(\)"),
        (lambda: chebyshev((0,), 50, 50), "num_steps=50"),
        (lambda: chebyshev((0,), 3, 50, degree=16), "degree=16"),
        (lambda: chebyshev((0,), 3, 50, degree=-1), "degree=-1"),
        (lambda: chebyshev((0,), 3, 50, ridge=-0.1), "ridge=-0.1"),
        (lambda: chebyshev((0,), 3, 50, ridge=math.inf), "ridge=inf"),
        (lambda: chebyshev((0,), 3, 50, blend=1.5), "blend=1.5"),
    ],
)
def test_bad_arguments_of_hermite_and_chebyshev_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


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


@pytest.mark.parametrize(
    "name", ["", "taylor", "taylor-", "taylor--1", "Taylor-1", "taylor-1.5", "hermite", "hermite-<order>"]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="expected one of 'reuse', 'taylor-<order>'"):
        plan_of(name, (0,), (1.0, 0.5, 0.0))


def test_plan_of_checks_the_schedule():
    with pytest.raises(ValueError, match="expected step 0 first"):
        plan_of("reuse", (1,), (1.0, 0.5, 0.0))


NAMES = ("reuse", "taylor-1", "taylor-3", "hermite-2", "chebyshev-4", "regression", "l2p", "l2p-released")


def test_every_rule_is_named_in_the_tests():
    assert {name.split("-")[0] for name in FORECASTERS} == {name.split("-")[0] for name in NAMES}
    assert {"l2p-released", *LEARNED} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_runs_through_the_operator(name, seed):
    features = random_features(seed, 50, 5, 6).cumsum(0)
    rows = rows_of(name, COMPUTED, 50, gram_of(features)) | check_rows(name, COMPUTED, 50, gram_of(features))
    assert set(rows) == set(range(1, 50))
    for step, row in rows.items():
        assert set(row.steps) <= {s for s in COMPUTED if s < step} and len(row.steps) <= 16
        expected = sum(w * features[s] for s, w in zip(row.steps, row.weights, strict=True))
        size = sum(map(abs, row.weights)) * features.abs().max().item()
        torch.testing.assert_close(ops.forecast(features, row.steps, row.weights), expected, rtol=0, atol=1e-14 * size)


@pytest.mark.parametrize("name", NAMES)
def test_a_check_row_is_the_forecast_row_of_the_schedule_without_that_step(name, seed):
    gram = gram_of(random_features(seed, 50, 30))
    checks = check_rows(name, COMPUTED, 50, gram)
    assert tuple(checks) == COMPUTED[1:]
    for step in COMPUTED[1:]:
        without = [s for s in COMPUTED if s != step]
        assert checks[step] == rows_of(name, without, 50, gram)[step]


def test_options_reach_the_rule():
    assert rows_of("hermite-2", COMPUTED, 50, scale=0.7)[12] == hermite(COMPUTED[:5], 12, 2, scale=0.7)
    assert rows_of("chebyshev-3", COMPUTED, 50, ridge=1.0, blend=0.5)[12] == chebyshev(
        COMPUTED[:5], 12, 50, 3, ridge=1.0, blend=0.5
    )
    plan = plan_of("hermite-2", (0, 1), (1.0, 0.6, 0.3, 0.0), options={"scale": 0.7})
    assert plan.rows_of("any")[2] == hermite((0, 1), 2, 2, scale=0.7)


@pytest.mark.parametrize("name", LEARNED)
def test_plan_of_learned_rules_serves_the_contexts_of_its_statistics(name, seed):
    sigmas = [1 - i / 12 for i in range(13)]
    grams = {context: gram_of(random_features(seed + i, 12, 40)) for i, context in enumerate(("cond", "uncond"))}
    plan = plan_of(name, (0, 1, 4, 8), sigmas, "output", grams)
    assert set(plan.rows) == {"cond", "uncond"} and plan.rows["cond"] != plan.rows["uncond"]
    for context, gram in grams.items():
        assert plan.rows[context] == rows_of(name, (0, 1, 4, 8), 12, gram)
        assert plan_of(name, (0, 1, 4, 8), sigmas, "output", gram).rows == {"*": plan.rows[context]}
    with pytest.raises(ValueError, match=f"'{name}' needs gram"):
        plan_of(name, (0, 1, 4, 8), sigmas)
    with pytest.raises(ValueError, match="gram names no context"):
        plan_of(name, (0, 1, 4, 8), sigmas, gram={})
