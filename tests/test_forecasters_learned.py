"""Rows from a Gram matrix against least squares on the features themselves."""

import math

import numpy as np
import pytest
import torch

from lesa.forecasters import l2p, l2p_released, l2p_table, regression, reuse, rows_of, taylor
from lesa.plans.plan import MAX_READS

T = 24
COMPUTED = (0, 1, 2, 3, 8, 12, 17, 21)
ELEMENTS = 400


def features_of(seed: int, steps: int = T, elements: int = ELEMENTS) -> np.ndarray:
    """Random walks with memory, so that neighbouring steps resemble each other: [steps, elements]."""
    walk = np.random.default_rng(seed).normal(size=(steps, elements)).cumsum(0)
    return 5 * np.random.default_rng(seed + 1).normal(size=elements) + walk


def gram_of(features: np.ndarray) -> np.ndarray:
    return features @ features.T / features.shape[1]


def stacked(columns: np.ndarray, target: np.ndarray, start: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regression on the elements by lstsq, the penalty as further observations: the oracle."""
    scale = math.sqrt(ridge * np.mean(columns**2) * len(columns))
    rows = np.concatenate([columns, scale * np.eye(columns.shape[1])])
    return np.linalg.lstsq(rows, np.concatenate([target, scale * start]), rcond=None)[0]


@pytest.fixture
def features(seed) -> np.ndarray:
    return features_of(seed)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("towards", ["reuse", "taylor-1", "taylor-2", None])
@pytest.mark.parametrize("window", [1, 2, 4, None])
def test_regression_is_ridge_regression_on_the_features(features, window, towards, ridge):
    for step in (5, 14, 23):
        past = [s for s in COMPUTED if s < step]
        steps = past[-window:] if window else past
        row = regression(past, step, gram_of(features), towards=towards, ridge=ridge, window=window, sum_to_one=False)
        start = np.zeros(len(steps))
        if towards:
            near = taylor(steps, step, {"reuse": 0, "taylor-1": 1, "taylor-2": 2}[towards])
            start[-len(near.steps) :] = near.weights
        assert row.steps == tuple(steps) and row.bias == 0.0
        assert row.weights == pytest.approx(stacked(features[steps].T, features[step], start, ridge), abs=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("towards", ["reuse", "taylor-1", None])
@pytest.mark.parametrize("window", [1, 2, 4, None])
def test_weights_that_sum_to_one_are_a_regression_on_differences(features, window, towards, ridge):
    for step in (5, 14, 23):
        past = [s for s in COMPUTED if s < step]
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
    past, step = list(COMPUTED[:6]), 14
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


@pytest.mark.parametrize("sum_to_one", [True, False])
@pytest.mark.parametrize(("towards", "order"), [("reuse", 0), ("taylor-1", 1), ("taylor-3", 3)])
def test_a_heavy_ridge_gives_the_row_it_is_drawn_to(features, towards, order, sum_to_one):
    past, step = COMPUTED[:6], 14
    expected = np.zeros(6)
    expected[-order - 1 :] = taylor(past, step, order).weights
    for ridge, within in ((1e9, 1e-6), (math.inf, 1e-14)):
        row = regression(
            past, step, gram_of(features), towards=towards, ridge=ridge, window=None, sum_to_one=sum_to_one
        )
        assert row.weights == pytest.approx(expected, abs=within)


def test_a_row_worked_out_by_hand():
    """F_0 = (1, 0), F_1 = (0, 1), F_2 = (2, 1): F_2 = 2 F_0 + F_1; on differences (1, -1) d = 1; ridge 1 halves it."""
    gram = gram_of(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]))
    assert regression((0, 1), 2, gram, ridge=0.0, sum_to_one=False).weights == pytest.approx((2, 1), abs=1e-14)
    assert regression((0, 1), 2, gram, ridge=0.0).weights == pytest.approx((1, 0), abs=1e-14)
    assert regression((0, 1), 2, gram, ridge=1.0).weights == pytest.approx((0.5, 0.5), abs=1e-14)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_the_ridge_knows_no_scale(features, scale):
    for options in ({"ridge": 0.1}, {"ridge": 0.1, "sum_to_one": False, "towards": None}, {"ridge": 0.0}):
        plain, scaled = (regression(COMPUTED[:6], 14, gram_of(features) * s, **options) for s in (1.0, scale))
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
        assert regression(COMPUTED[:4], 6, gram, ridge=ridge, towards="taylor-1").weights == pytest.approx((-3, 4))
        assert regression(COMPUTED[:4], 6, gram, ridge=ridge).weights == (0.0, 1.0)
        assert all(map(math.isfinite, l2p(COMPUTED, 23, gram).weights))


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


@pytest.mark.parametrize("past", [COMPUTED, COMPUTED[:1], tuple(range(20))])
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
    past, step = list(COMPUTED[:5]), 10
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


@pytest.mark.parametrize("iterations", [0, 1, 201])
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
            row = l2p_released([s for s in COMPUTED if s < step], step, table)
            np.testing.assert_allclose(np.array(row.weights) @ features[list(row.steps)], forecast, atol=1e-10)
        seen.append(features[step] if step in COMPUTED else forecast)


def test_released_rows_over_many_computed_steps_keep_their_sum(features):
    table = l2p_table(gram_of(features))
    row = l2p_released(range(20), 21, table)
    composed = table[21, :20] + table[21, 20] * table[20, :20]
    assert row.steps == tuple(range(4, 20))
    assert row.weights == pytest.approx([composed[:5].sum(), *composed[5:]], abs=1e-12)


def test_training_that_never_starts_is_reuse(features):
    rows = rows_of("l2p-released", COMPUTED, T, gram_of(features), iterations=0)
    for step, row in rows.items():
        past = [s for s in COMPUTED if s < step]
        assert dict(zip(row.steps, row.weights, strict=True)) == {s: float(s == past[-1]) for s in past}
        assert reuse(past, step).steps == (past[-1],)


def test_options_reach_the_regression(features):
    gram = gram_of(features)
    rows = rows_of("regression", COMPUTED, T, gram, towards="taylor-1", ridge=0.3, window=3)
    assert rows[14] == regression(COMPUTED[:6], 14, gram, towards="taylor-1", ridge=0.3, window=3)
    assert rows_of("regression", COMPUTED, T, gram)[14] == regression(COMPUTED[:6], 14, gram)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"past": ()}, r"past=\(\)"),
        ({"past": (0, 14)}, "before step 14"),
        ({"gram": np.zeros((3, 4))}, r"shape \(3, 4\)"),
        ({"gram": np.zeros(3)}, r"shape \(3,\)"),
        ({"gram": np.zeros((14, 14))}, "covers 14 steps: step 14"),
        ({"gram": np.full((T, T), np.nan)}, "not finite at steps"),
        ({"window": 0}, "window=0"),
        ({"window": 17}, "window=17"),
        ({"ridge": -1.0}, "ridge=-1.0"),
        ({"ridge": math.nan}, "ridge=nan"),
        ({"towards": "hermite-2"}, "towards='hermite-2'"),
        ({"towards": "taylor-16"}, "order=16"),
    ],
)
def test_bad_arguments_are_named(features, changes, named):
    with pytest.raises(ValueError, match=named):
        regression(**{"past": (0, 1), "step": 14, "gram": gram_of(features)} | changes)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: l2p((0,), 14, np.eye(T), ridge=-1.0), "ridge=-1.0"),
        (lambda: l2p_table(np.eye(T), iterations=-1), "iterations=-1"),
        (lambda: l2p_table(np.eye(T), rate=0.0), "rate=0.0"),
        (lambda: l2p_table(np.ones((2, 3))), r"shape \(2, 3\)"),
        (lambda: l2p_released((1,), 3, np.eye(T)), "expected step 0 first"),
        (lambda: l2p_released((0,), T, np.eye(T)), f"covers {T} steps"),
        (lambda: rows_of("l2p-released", (0,), T + 1, np.eye(T)), f"covers {T} steps"),
    ],
)
def test_bad_arguments_of_l2p_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
