"""Rows against direct implementations of what was published, and learned rows against least squares on features."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev as chebyshev_series
from numpy.polynomial import hermite as physicists

from lesa import ops
from lesa.forecasters import (
    FORECASTERS,
    LEARNED,
    chebyshev,
    check_rows,
    dmd,
    foca,
    hermite,
    l2p,
    l2p_released,
    l2p_table,
    plan_of,
    rational,
    regression,
    reuse,
    rows_of,
    taylor,
)
from lesa.ops.reference import forecast
from lesa.plans.rows import MAX_READS, Row
from lesa.plans.schedule import paper

COMPUTED = (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)
T = 24
SHORT = (0, 1, 2, 3, 8, 12, 17, 21)


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


def gram_of(features: torch.Tensor | np.ndarray) -> np.ndarray:
    flat = np.asarray(features).reshape(len(features), -1)
    return flat @ flat.T / flat.shape[1]


def features_of(seed: int, steps: int = T, elements: int = 400) -> np.ndarray:
    """Random walks with memory, so that neighbouring steps resemble each other: [steps, elements]."""
    walk = np.random.default_rng(seed).normal(size=(steps, elements)).cumsum(0)
    return 5 * np.random.default_rng(seed + 1).normal(size=elements) + walk


def stacked(columns: np.ndarray, target: np.ndarray, start: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regression on the elements by lstsq, the penalty as further observations: the oracle."""
    scale = math.sqrt(ridge * np.mean(columns**2) * len(columns))
    rows = np.concatenate([columns, scale * np.eye(columns.shape[1])])
    return np.linalg.lstsq(rows, np.concatenate([target, scale * start]), rcond=None)[0]


@pytest.mark.parametrize("order", [0, 2, 5])
def test_taylor_is_the_published_recursion(order, seed):
    features = random_features(seed, 50, 3, 4)
    for step in set(range(50)) - set(COMPUTED):
        past = [s for s in COMPUTED if s < step]
        row = taylor(past, step, order)
        assert row.steps == tuple(past[-order - 1 :]) and row.bias == 0.0
        expected = taylor_direct(features, past, step, order)
        scale = sum(map(abs, row.weights))
        torch.testing.assert_close(apply(row, features), expected, rtol=0, atol=1e-14 * max(1.0, scale))


def test_order_is_limited_by_the_computed_steps():
    for past in ((0,), (0, 1), (0, 2, 5)):
        assert taylor(past, 7, 5) == taylor(past, 7, len(past) - 1)


@pytest.mark.parametrize("order", [1, 4])
def test_taylor_is_exact_on_linear_sequences(order):
    t = torch.arange(50, dtype=torch.float64)
    sequence = 3.0 - 0.25 * t
    for step in (4, 8, 15, 36, 49):
        row = taylor([s for s in COMPUTED if s < step], step, order)
        torch.testing.assert_close(apply(row, sequence), sequence[step], rtol=1e-11, atol=1e-11)


def test_weights_sum_to_one():
    for order, step in itertools.product(range(5), (1, 2, 4, 22, 49)):
        row = taylor([s for s in COMPUTED if s < step], step, order)
        assert math.isclose(math.fsum(row.weights), 1.0, rel_tol=0, abs_tol=1e-11)


def test_errors_on_a_parabola_are_those_of_backward_differences():
    """On t^2 at spacing h Taylor-2 takes the slope h late: it misses by h x, Taylor-1 by h x + x^2."""
    t = torch.arange(50, dtype=torch.float64) ** 2
    past, step, h, x = (16, 23, 30), 35, 7, 5
    assert apply(taylor(past, step, 2), t).item() - step**2 == pytest.approx(-h * x, abs=1e-9)
    assert apply(taylor(past, step, 1), t).item() - step**2 == pytest.approx(-h * x - x**2, abs=1e-9)


@pytest.mark.parametrize(("order", "scale"), [(0, 0.5), (2, 0.5), (3, 1.3)])
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


@pytest.mark.parametrize(("degree", "ridge"), [(0, 0.1), (4, 1e-3), (6, 5.0)])
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


@pytest.mark.parametrize("degree", [1, 4])
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


def phases(past: list[int], step: float, spread: float) -> float:
    """ResilPhase's balanced mapping of a step."""
    mean = sum(past) / len(past)
    return math.tanh(spread * (step - mean) / max(abs(s - mean) for s in past))


@pytest.mark.parametrize(("order", "spread"), [(1, 0.55), (2, 0.55), (4, 1.5)])
def test_rational_is_the_published_quotient(order, spread, seed):
    features = random_features(seed, 50, 3, 4)
    for step in (5, 12, 31, 49):
        past = [s for s in COMPUTED if s < step][-order - 1 :]
        z, target = [phases(past, s, spread) for s in past], phases(past, step, spread)
        shares = [1 / math.prod(a - b for b in z if b != a) / (target - a) for a in z]
        expected = sum(share * features[s] for share, s in zip(shares, past, strict=True)) / sum(shares)
        row = rational([s for s in COMPUTED if s < step], step, order, spread)
        assert row.steps == tuple(past) and row.bias == 0.0
        size = sum(map(abs, row.weights))
        assert math.isclose(math.fsum(row.weights), 1.0, rel_tol=0, abs_tol=1e-13 * size)
        torch.testing.assert_close(apply(row, features), expected, rtol=0, atol=1e-12 * size)


def test_rational_is_exact_on_polynomials_in_the_phase():
    past, step = [2, 3, 9, 16], 20
    row = rational(past, step, 3)
    for degree in range(4):
        found = sum(w * phases(past, s, 0.55) ** degree for s, w in zip(row.steps, row.weights, strict=True))
        assert found == pytest.approx(phases(past, step, 0.55) ** degree, abs=1e-12)


def test_rational_is_taylor_at_a_narrow_spread_and_levels_off_at_a_wide_one():
    assert rational((0, 1, 9), 14, 1, spread=1e-5).weights == pytest.approx(taylor((0, 1, 9), 14, 1).weights, abs=1e-8)
    # Order 1 on (0, 2): the phases are -b, b and tanh(0.55 (t - 1)), at most 1, with b = tanh(0.55).
    b = math.tanh(0.55)
    assert rational((0, 2), 3).weights[1] == pytest.approx((math.tanh(1.1) + b) / (2 * b), abs=1e-14)
    assert rational((0, 2), 99).weights[1] == pytest.approx((1 + b) / (2 * b), abs=1e-14)
    assert rational((0, 4), 7, 0) == reuse((0, 4), 7) and rational((4,), 7, 3) == reuse((4,), 7)


def foca_direct(features: torch.Tensor, computed: list[int], step: int) -> torch.Tensor:
    """FoCa's equations 7 and 8, one step at a time, on the features and forecasts themselves."""
    known: dict[int, torch.Tensor] = {}
    for t in range(step + 1):
        if t in computed:
            known[t] = features[t]
            continue
        newest, before = known[t - 1], known.get(t - 2, known[t - 1])
        done = [s for s in computed if s < t]
        anchor = 0 * newest
        if len(done) > 1:
            anchor = (features[done[-1]] - features[done[-2]]) / (done[-1] - done[-2])
        predicted = 4 / 3 * newest - 1 / 3 * before + 2 / 3 * (newest - before)
        slope = (3 * predicted - 4 * newest + before) / 2
        known[t] = newest + (anchor + slope) / 2
    return known[step]


def test_foca_is_the_published_recursion(seed):
    features = random_features(seed, 50, 3, 4)
    for step in sorted(set(range(50)) - set(COMPUTED)):
        past = [s for s in COMPUTED if s < step]
        row = foca(past, step)
        size = sum(map(abs, row.weights))
        assert row.steps == tuple(past) and math.isclose(math.fsum(row.weights), 1.0, rel_tol=0, abs_tol=1e-13 * size)
        torch.testing.assert_close(apply(row, features), foca_direct(features, past, step), rtol=0, atol=1e-12 * size)


def test_foca_rows_worked_out_by_hand():
    """Steps 0 and 2: step 1 is reuse, so step 3 is F_2 + 1/2 ((F_2 - F_0) / 2 + F_2 - F_0), 3/4 of F_2 - F_0 on."""
    assert foca((0,), 3) == Row((0,), (1.0,))
    assert foca((0, 1), 3) == taylor((0, 1), 3, 1) == Row((0, 1), (-2.0, 3.0))
    assert foca((0, 2), 3) == Row((0, 2), (-0.75, 1.75))
    assert foca((0, 2), 4) == Row((0, 2), (-1.375, 2.375))
    # Steps 0, 1 and 4: step 3 was 3 F_1 - 2 F_0, so F_4 - F_3 = F_4 - 3 F_1 + 2 F_0; the slope is (F_4 - F_1) / 3.
    assert foca((0, 1, 4), 5).weights == pytest.approx((1.0, -1.5 - 1 / 6, 1.5 + 1 / 6), abs=1e-14)


def test_foca_is_exact_on_linear_sequences_and_reads_16_steps():
    sequence = 3.0 - 0.25 * torch.arange(50, dtype=torch.float64)
    for step in (4, 8, 15, 36, 49):
        row = foca([s for s in COMPUTED if s < step], step)
        torch.testing.assert_close(apply(row, sequence), sequence[step], rtol=1e-11, atol=1e-11)
    row, whole = foca(range(0, 40, 2), 41), foca(range(8, 40, 2), 41)
    assert row.steps == tuple(range(8, 40, 2)) and math.fsum(row.weights) == pytest.approx(1.0, abs=1e-12)
    assert row.weights[-1] == whole.weights[-1]


def dmd_direct(features: np.ndarray, fitted: list[int], step: int, cutoff: float = 1e-4) -> np.ndarray:
    """cache-dit's calibrator on the features: singular values of X, modes of the operator, amplitudes of the newest."""
    x, y = features[fitted[:-1]].T, features[fitted[1:]].T
    left, sizes, right = np.linalg.svd(x, full_matrices=False)
    rank = int((sizes > cutoff * sizes[0]).sum())
    mapped = y @ right[:rank].T / sizes[:rank]
    roots, vectors = np.linalg.eig(left[:, :rank].T @ mapped)
    modes = mapped @ vectors
    amplitudes = np.linalg.lstsq(modes, features[fitted[-1]].astype(complex), rcond=None)[0]
    horizon = (step - fitted[-1]) / (fitted[1] - fitted[0])
    return (modes @ (roots.astype(complex) ** horizon * amplitudes)).real


@pytest.mark.parametrize("fitted", [(2, 3, 4, 5), (1, 4, 7, 10, 13), (0, 2, 4, 6, 8, 10)])
def test_dmd_is_the_published_fit(features, fitted):
    for step in (fitted[-1] + 1, fitted[-1] + 4):
        row = dmd(fitted, step, gram_of(features))
        assert row.steps == fitted[1:] and row.bias == 0.0
        expected = dmd_direct(features, list(fitted), step)
        found = np.array(row.weights) @ features[list(row.steps)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("roots", [(0.9,), (0.8, 1.02), (0.7, 0.95 * np.exp(0.2j))])
def test_dmd_is_exact_on_sums_of_exponentials(roots, seed):
    shapes = np.random.default_rng(seed).normal(size=(2, len(roots), 200))
    sequence = (np.array(roots) ** np.arange(T)[:, None] @ (shapes[0] + 1j * shapes[1])).real
    for step in (12, 13, 18):
        row = dmd((1, 3, 5, 7, 9, 11), step, gram_of(sequence))
        found = np.array(row.weights) @ sequence[list(row.steps)]
        np.testing.assert_allclose(found, sequence[step], rtol=0, atol=1e-6 * np.abs(sequence).max())


def test_dmd_fits_the_newest_evenly_spaced_steps(features):
    gram = gram_of(features)
    assert dmd((0, 1, 2, 6, 9, 12, 15), 17, gram) == dmd((6, 9, 12, 15), 17, gram)
    assert dmd((0, 3, 6, 9, 12, 15), 17, gram, history=4) == dmd((6, 9, 12, 15), 17, gram)
    for past in ((4,), (0, 1, 2), (0, 1, 2, 9, 12, 15), (0, 4, 8, 13)):
        assert dmd(past, 17, gram) == taylor(past, 17, 1)
    # Later features are not read: the fit needs no more than the request has computed.
    later = gram.copy()
    later[16:] = later[:, 16:] = 0.0
    assert dmd((6, 9, 12, 15), 17, later) == dmd((6, 9, 12, 15), 17, gram)


def test_dmd_of_nothing_and_of_one_feature_over_and_over():
    assert dmd((0, 1, 2, 3), 6, np.zeros((T, T))) == reuse((0, 1, 2, 3), 6)
    assert math.fsum(dmd((0, 1, 2, 3), 6, np.ones((T, T))).weights) == pytest.approx(1.0, abs=1e-9)


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
        ((0, 3), 3, 1, "past="),
        ((3, 0), 5, 1, "past="),
        ((0,), 1, 16, "order=16"),
    ],
)
def test_bad_arguments_are_named(past, step, order, named):
    with pytest.raises(ValueError, match=named):
        taylor(past, step, order)


def test_bad_arguments_of_closed_forms_and_dmd_are_named():
    for call, named in [
        (lambda: hermite((0, 3), 3, 1), "past="),
        (lambda: hermite((0,), 3, 1, scale=0.0), "scale=0.0"),
        (lambda: chebyshev((), 3, 50), r"past=\(\)"),
        (lambda: chebyshev((0,), 50, 50), "num_steps=50"),
        (lambda: chebyshev((0,), 3, 50, degree=16), "degree=16"),
        (lambda: chebyshev((0,), 3, 50, ridge=-0.1), "ridge=-0.1"),
        (lambda: chebyshev((0,), 3, 50, blend=1.5), "blend=1.5"),
        (lambda: rational((0, 3), 3), "past="),
        (lambda: rational((0,), 3, order=16), "order=16"),
        (lambda: rational((0,), 3, spread=0.0), "spread=0.0"),
        (lambda: rational((0,), 3, spread=math.nan), "spread=nan"),
        (lambda: foca((), 3), r"past=\(\)"),
        (lambda: foca((3, 1), 4), "past="),
        (lambda: dmd((0, 3), 3, np.eye(T)), "past="),
        (lambda: dmd((0, 1, 2, 3), 4, np.eye(T), history=3), "history=3"),
        (lambda: dmd((0, 1, 2, 3), 4, np.eye(T), cutoff=0.0), "cutoff=0.0"),
        (lambda: dmd((0, 1, 2, 3), 4, np.eye(3)), "gram covers 3 steps"),
        (lambda: dmd((0, 1, 2, 3), 4, np.full((T, T), np.nan)), "gram holds"),
    ]:
        with pytest.raises(ValueError, match=named):
            call()


@pytest.mark.parametrize(
    ("name", "order", "num_steps", "interval"), [("reuse", 0, 50, 7), ("taylor-1", 1, 8, 3), ("taylor-2", 2, 5, 1)]
)
def test_plan_holds_one_row_a_forecast_step(name, order, num_steps, interval):
    computed = paper(num_steps, interval)
    sigmas = [1 - i / num_steps for i in range(num_steps + 1)]
    plan = plan_of(name, computed, sigmas, site="output", denoiser="Tiny")
    assert (plan.forecaster, plan.site, plan.denoiser, plan.computed) == (name, "output", "Tiny", computed)
    rows = plan.rows_of("any context")
    assert set(rows) == set(range(num_steps)) - set(computed)
    for step, row in rows.items():
        assert row == taylor([s for s in computed if s < step], step, order)


@pytest.mark.parametrize("name", ["", "taylor--1", "hermite-<order>"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"forecaster='{name}'"):
        plan_of(name, (0,), (1.0, 0.5, 0.0))


def test_plan_of_checks_the_schedule():
    with pytest.raises(ValueError, match="computed"):
        plan_of("reuse", (1,), (1.0, 0.5, 0.0))


NAMES = (
    *("reuse", "taylor-1", "taylor-3", "hermite-2", "chebyshev-4", "rational-1", "foca"),
    *("regression", "l2p", "l2p-released", "dmd"),
)


def test_every_rule_is_named_in_the_tests():
    assert {name.split("-")[0] for name in FORECASTERS} == {name.split("-")[0] for name in NAMES}
    assert {"l2p-released", *LEARNED} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_checks_run_through_the_operator(name, seed):
    features = random_features(seed, 50, 5, 6).cumsum(0)
    gram = gram_of(features)
    checks = check_rows(name, COMPUTED, 50, gram)
    # A check is the forecast of the schedule without that step.
    assert tuple(checks) == COMPUTED[1:]
    for step in (1, 9, 44):
        assert checks[step] == rows_of(name, [s for s in COMPUTED if s != step], 50, gram)[step]
    rows = rows_of(name, COMPUTED, 50, gram) | checks
    assert set(rows) == set(range(1, 50))
    for step, row in rows.items():
        assert set(row.steps) <= {s for s in COMPUTED if s < step} and len(row.steps) <= 16
        expected = sum(w * features[s] for s, w in zip(row.steps, row.weights, strict=True))
        size = sum(map(abs, row.weights)) * features.abs().max().item()
        torch.testing.assert_close(ops.forecast(features, row.steps, row.weights), expected, rtol=0, atol=1e-14 * size)


def test_options_reach_the_rule():
    assert rows_of("hermite-2", COMPUTED, 50, scale=0.7)[12] == hermite(COMPUTED[:5], 12, 2, scale=0.7)
    assert rows_of("chebyshev-3", COMPUTED, 50, ridge=1.0, blend=0.5)[12] == chebyshev(
        COMPUTED[:5], 12, 50, 3, ridge=1.0, blend=0.5
    )
    assert rows_of("rational-2", COMPUTED, 50, spread=1.0)[12] == rational(COMPUTED[:5], 12, 2, spread=1.0)
    plan = plan_of("hermite-2", (0, 1), (1.0, 0.6, 0.3, 0.0), options={"scale": 0.7})
    assert plan.rows_of("any")[2] == hermite((0, 1), 2, 2, scale=0.7)


@pytest.mark.parametrize("name", LEARNED)
def test_plan_of_learned_rules_serves_the_contexts_of_its_statistics(name, seed):
    sigmas = [1 - i / 12 for i in range(13)]
    grams = {context: gram_of(random_features(seed + i, 12, 40)) for i, context in enumerate(("cond", "uncond"))}
    plan = plan_of(name, (0, 2, 4, 6), sigmas, "output", grams)
    assert set(plan.rows) == {"cond", "uncond"} and plan.rows["cond"] != plan.rows["uncond"]
    for context, gram in grams.items():
        assert plan.rows[context] == rows_of(name, (0, 2, 4, 6), 12, gram)
        assert plan_of(name, (0, 2, 4, 6), sigmas, "output", gram).rows == {"*": plan.rows[context]}
    with pytest.raises(ValueError, match=f"'{name}' needs gram"):
        plan_of(name, (0, 2, 4, 6), sigmas)
    with pytest.raises(ValueError, match="gram names no context"):
        plan_of(name, (0, 2, 4, 6), sigmas, gram={})


@pytest.fixture
def features(seed) -> np.ndarray:
    return features_of(seed)


@pytest.mark.parametrize(
    ("window", "towards", "ridge"),
    [(2, "reuse", 0.0), (2, "taylor-1", 0.01), (4, "taylor-2", 1.0), (None, None, 0.01)],
)
def test_regression_is_ridge_regression_on_the_features(features, window, towards, ridge):
    for step in (5, 14, 23):
        past = [s for s in SHORT if s < step]
        steps = past[-window:] if window else past
        row = regression(past, step, gram_of(features), towards=towards, ridge=ridge, window=window, sum_to_one=False)
        start = np.zeros(len(steps))
        if towards:
            near = taylor(steps, step, {"reuse": 0, "taylor-1": 1, "taylor-2": 2}[towards])
            start[-len(near.steps) :] = near.weights
        assert row.steps == tuple(steps) and row.bias == 0.0
        assert row.weights == pytest.approx(stacked(features[steps].T, features[step], start, ridge), abs=1e-8)


@pytest.mark.parametrize(
    ("window", "towards", "ridge"),
    [(1, "reuse", 0.01), (2, "taylor-1", 0.0), (4, "taylor-1", 1.0), (None, None, 0.01)],
)
def test_weights_that_sum_to_one_are_a_regression_on_differences(features, window, towards, ridge):
    for step in (5, 14, 23):
        past = [s for s in SHORT if s < step]
        steps = past[-window:] if window else past
        row = regression(past, step, gram_of(features), towards=towards, ridge=ridge, window=window)
        start = np.zeros(len(steps))
        if towards == "taylor-1":
            near = taylor(steps, step, 1)
            start[-len(near.steps) :] = near.weights
        last = features[steps[-1]]
        free = np.zeros(0)
        if len(steps) > 1:
            free = stacked((features[steps[:-1]] - last).T, features[step] - last, start[:-1], ridge)
        assert row.steps == tuple(steps)
        assert row.weights == pytest.approx([*free, 1 - free.sum()], abs=1e-8)
        assert math.fsum(row.weights) == pytest.approx(1.0, abs=1e-12)


def test_no_other_weights_have_a_smaller_expected_error(features, seed):
    """The objective itself, over both constraints: every small move makes it worse."""
    past, step = list(SHORT[:6]), 14
    random = np.random.default_rng(seed)

    def error(weights):
        return np.mean((weights @ features[past] - features[step]) ** 2)

    free = np.array(regression(past, step, gram_of(features), ridge=0.0, window=None, sum_to_one=False).weights)
    tied = np.array(regression(past, step, gram_of(features), ridge=0.0, window=None).weights)
    assert error(free) < error(tied) < error(np.array([0, 0, 0, 0, 0, 1]))
    for _ in range(50):
        move = 0.01 * random.normal(size=len(past))
        assert error(free + move) > error(free)
        assert error(tied + move - move.mean()) > error(tied)


@pytest.mark.parametrize(
    ("towards", "order", "sum_to_one"), [("reuse", 0, True), ("taylor-3", 3, True), ("taylor-1", 1, False)]
)
def test_a_heavy_ridge_gives_the_row_it_is_drawn_to(features, towards, order, sum_to_one):
    past, step = SHORT[:6], 14
    expected = np.zeros(6)
    expected[-order - 1 :] = taylor(past, step, order).weights
    for ridge, within in ((1e9, 1e-6), (math.inf, 1e-14)):
        row = regression(
            past, step, gram_of(features), towards=towards, ridge=ridge, window=None, sum_to_one=sum_to_one
        )
        assert row.weights == pytest.approx(expected, abs=within)


def test_a_regression_row_worked_out_by_hand():
    """F_0 = (1, 0), F_1 = (0, 1), F_2 = (2, 1): F_2 = 2 F_0 + F_1; on differences (1, -1) d = 1; ridge 1 halves it."""
    gram = gram_of(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]))
    assert regression((0, 1), 2, gram, ridge=0.0, sum_to_one=False).weights == pytest.approx((2, 1), abs=1e-14)
    assert regression((0, 1), 2, gram, ridge=0.0).weights == pytest.approx((1, 0), abs=1e-14)
    assert regression((0, 1), 2, gram, ridge=1.0).weights == pytest.approx((0.5, 0.5), abs=1e-14)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_ridge_knows_no_scale(features, scale):
    for options in ({"ridge": 0.1}, {"ridge": 0.1, "sum_to_one": False, "towards": None}, {"ridge": 0.0}):
        plain, scaled = (regression(SHORT[:6], 14, gram_of(features) * s, **options) for s in (1.0, scale))
        assert scaled.weights == pytest.approx(plain.weights, abs=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_dependent_features_take_the_nearest_of_the_best_rows(features, ridge):
    same = features.copy()
    same[8] = same[3]
    row = regression((3, 8, 12), 14, gram_of(same), ridge=ridge, window=3)
    assert row.weights[0] == pytest.approx(row.weights[1], abs=1e-6) and max(map(abs, row.weights)) < 10
    alone = regression((8, 12), 14, gram_of(same), ridge=0.0)
    if not ridge:
        assert row.weights[0] + row.weights[1] == pytest.approx(alone.weights[0], abs=1e-6)
    for gram in (np.zeros((T, T)), np.ones((T, T))):
        assert regression(SHORT[:4], 6, gram, ridge=ridge, towards="taylor-1").weights == pytest.approx((-3, 4))
        assert regression(SHORT[:4], 6, gram, ridge=ridge).weights == (0.0, 1.0)
        assert all(map(math.isfinite, l2p(SHORT, 23, gram).weights))


def test_a_gram_matrix_rounded_to_float32_gives_sound_weights(seed):
    """Nearly equal features: rounding makes the differences' Gram matrix indefinite."""
    features = 1.0 + 1e-4 * features_of(seed)
    rounded = gram_of(features).astype(np.float32)
    newest = np.float64(rounded[-17:, -17:])
    differences = newest - newest[:, -1:] - newest[-1:] + newest[-1, -1]
    assert np.linalg.eigvalsh(differences).min() < 0
    for step in range(4, T):
        row = regression(range(step), step, rounded, window=None)
        exact = regression(range(step), step, gram_of(features), window=None)
        errors = [np.mean((np.array(r.weights) @ features[list(r.steps)] - features[step]) ** 2) for r in (row, exact)]
        assert errors[0] < 100 * errors[1] and max(map(abs, row.weights)) < 10


@pytest.mark.parametrize("past", [SHORT, SHORT[:1], tuple(range(20))])
def test_l2p_is_least_squares_over_all_past_features(features, past):
    step = past[-1] + 2
    row = l2p(past, step, gram_of(features), ridge=0.0)
    steps = list(past)[-MAX_READS:]
    assert row.steps == tuple(steps)
    expected = np.linalg.lstsq(features[steps].T, features[step], rcond=None)[0]
    assert row.weights == pytest.approx(expected, abs=1e-7)
    assert l2p(past, step, gram_of(features)).weights == pytest.approx(expected, abs=1e-3)


def test_l2p_is_where_training_ends(features):
    """Gradient descent on the features, all the way, from reuse: what L2P's training tends to."""
    past, step = list(SHORT[:5]), 10
    inputs, target = torch.from_numpy(features[past]), torch.from_numpy(features[step])
    weights = torch.tensor([0.0, 0, 0, 0, 1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-13, tolerance_change=0)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (weights @ inputs - target).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert l2p(past, step, gram_of(features), ridge=0.0).weights == pytest.approx(weights.tolist(), abs=1e-6)


@pytest.mark.parametrize("iterations", [1, 201])
def test_the_table_is_the_released_training_on_features(seed, iterations):
    """All requests' features at once, a masked matrix, Adam of torch at rate 0.01, the loss over the shifted steps."""
    requests = np.stack([features_of(seed + i, steps=12, elements=60) for i in range(3)]) / 5
    x = torch.from_numpy(requests)
    weight = torch.eye(12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.01)
    for _ in range(iterations):
        optimizer.zero_grad()
        ((weight.tril() @ x)[:, :-1] - x[:, 1:]).square().mean().backward()
        optimizer.step()
    table = l2p_table(np.mean([gram_of(f) for f in requests], axis=0), iterations)
    assert not np.triu(table).any()
    np.testing.assert_allclose(table[1:, :-1], weight.detach().tril()[:-1, :-1].numpy(), rtol=0, atol=1e-6)


def test_released_rows_are_the_table_run_on_its_own_forecasts(features):
    table = l2p_table(gram_of(features))
    seen: list[np.ndarray] = []
    for step in range(T):
        forecast = table[step, :step] @ np.array(seen) if seen else None
        if step:
            row = l2p_released([s for s in SHORT if s < step], step, table)
            np.testing.assert_allclose(np.array(row.weights) @ features[list(row.steps)], forecast, atol=1e-10)
        seen.append(features[step] if step in SHORT else forecast)


def test_released_rows_over_many_computed_steps_keep_their_sum(features):
    table = l2p_table(gram_of(features))
    row = l2p_released(range(20), 21, table)
    composed = table[21, :20] + table[21, 20] * table[20, :20]
    assert row.steps == tuple(range(4, 20))
    assert row.weights == pytest.approx([composed[:5].sum(), *composed[5:]], abs=1e-12)


def test_training_that_never_starts_is_reuse(features):
    rows = rows_of("l2p-released", SHORT, T, gram_of(features), iterations=0)
    for step, row in rows.items():
        past = [s for s in SHORT if s < step]
        assert dict(zip(row.steps, row.weights, strict=True)) == {s: float(s == past[-1]) for s in past}
        assert reuse(past, step).steps == (past[-1],)


def test_options_reach_the_regression(features):
    gram = gram_of(features)
    rows = rows_of("regression", SHORT, T, gram, towards="taylor-1", ridge=0.3, window=3)
    assert rows[14] == regression(SHORT[:6], 14, gram, towards="taylor-1", ridge=0.3, window=3)
    assert rows_of("regression", SHORT, T, gram)[14] == regression(SHORT[:6], 14, gram)


def test_bad_arguments_of_regression_are_named(features):
    for changes, named in [
        ({"past": ()}, r"past=\(\)"),
        ({"past": (0, 14)}, "past="),
        ({"gram": np.zeros((3, 4))}, "gram"),
        ({"gram": np.zeros((14, 14))}, "gram"),
        ({"gram": np.full((T, T), np.nan)}, "gram"),
        ({"window": 17}, "window=17"),
        ({"ridge": math.nan}, "ridge=nan"),
        ({"towards": "hermite-2"}, "towards='hermite-2'"),
        ({"towards": "taylor-16"}, "order=16"),
    ]:
        with pytest.raises(ValueError, match=named):
            regression(**{"past": (0, 1), "step": 14, "gram": gram_of(features)} | changes)


def test_bad_arguments_of_l2p_are_named():
    for call, named in [
        (lambda: l2p((0,), 14, np.eye(T), ridge=-1.0), "ridge=-1.0"),
        (lambda: l2p_table(np.eye(T), iterations=-1), "iterations=-1"),
        (lambda: l2p_table(np.eye(T), rate=0.0), "rate=0.0"),
        (lambda: l2p_table(np.ones((2, 3))), "gram"),
        (lambda: l2p_released((1,), 3, np.eye(T)), "past="),
        (lambda: l2p_released((0,), T, np.eye(T)), f"covers {T} steps"),
        (lambda: rows_of("l2p-released", (0,), T + 1, np.eye(T)), f"covers {T} steps"),
    ]:
        with pytest.raises(ValueError, match=named):
            call()
