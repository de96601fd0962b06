"""`ops.forecast` against sums in higher precision."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from operators import DTYPES

from lesa import ops
from lesa.ops import reference
from lesa.plans.rows import MAX_READS


def exact(features: torch.Tensor, weights: list[float], bias: float) -> np.ndarray:
    """The sum in longdouble; below float64 it agrees with the float64 oracle."""
    parts = features.double().numpy().astype(np.longdouble)
    return np.tensordot(np.array(weights, np.longdouble), parts, 1) + np.longdouble(bias)


def assert_close(actual: torch.Tensor, features: torch.Tensor, weights: list[float], bias: float) -> None:
    """Error of at most 2 x (error of the plain formula in that dtype + eps x max|ref|)."""
    expected = exact(features, weights, bias)
    if features.dtype != torch.float64:
        oracle = reference.forecast(features.double(), weights, bias)
        assert np.abs(oracle.numpy() - expected).max(initial=0) <= 1e-12 * max(1, np.abs(expected).max(initial=0))
    plain = reference.forecast(features, weights, bias)
    allowed = 2 * (
        np.abs(plain.double().numpy() - expected).max(initial=0)
        + torch.finfo(features.dtype).eps * np.abs(expected).max(initial=0)
    )
    assert actual.dtype == features.dtype
    assert actual.shape == features.shape[1:]
    error = np.abs(actual.double().numpy() - expected).max(initial=0)
    assert error <= allowed, f"error {error}, allowed {allowed}"


@DTYPES
@pytest.mark.parametrize("reads", [1, 2, 5, MAX_READS])
def test_forecast(dtype: torch.dtype, reads: int, seed: int) -> None:
    rng = random.Random(seed + reads)
    torch.manual_seed(seed)
    history = torch.randn(MAX_READS + 2, 2, 9, 7).to(dtype)
    slots = rng.sample(range(len(history)), reads)
    weights = [rng.gauss(0, 2) for _ in slots]
    before = history.clone()
    for bias in (0.0, rng.gauss(0, 1)):
        assert_close(ops.forecast(history, slots, weights, bias), history[slots], weights, bias)
    assert torch.equal(history, before)


@DTYPES
def test_one_read_of_weight_one_is_the_feature_itself(dtype: torch.dtype) -> None:
    history = torch.randn(3, 50).to(dtype)
    result = ops.forecast(history, [1], [1.0])
    assert torch.equal(result, history[1])
    assert result.data_ptr() != history[1].data_ptr()


@DTYPES
def test_the_bias_alone(dtype: torch.dtype) -> None:
    history = torch.ones(1, 4, dtype=dtype)
    assert torch.equal(ops.forecast(history, [0], [0.0], -0.5), torch.full((4,), -0.5, dtype=dtype))


@DTYPES
def test_empty_and_scalar_features(dtype: torch.dtype) -> None:
    for shape in ((0, 5), (3, 0), (0,), ()):
        history = torch.randn(4, *shape).to(dtype)
        assert_close(ops.forecast(history, [0, 3], [2.0, -1.0], 0.5), history[[0, 3]], [2.0, -1.0], 0.5)


@DTYPES
def test_non_contiguous_history(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [0.3, -1.7, 2.4]
    base = torch.randn(6, 8, 10).to(dtype)
    for history in (base.transpose(0, 2), base[::2, :, ::3], base[:, :, :1].expand(6, 8, 4), base.permute(1, 2, 0)):
        assert not history.is_contiguous()
        assert_close(ops.forecast(history, [2, 0, 1], weights, 0.1), history[[2, 0, 1]], weights, 0.1)


def test_the_same_slot_twice() -> None:
    history = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(ops.forecast(history, [1, 1], [0.25, 0.5]), 0.75 * history[1], rtol=1e-15, atol=0)


def test_partial_sums_beyond_float16() -> None:
    history = torch.full((3, 4), 6e4, dtype=torch.float16)
    result = ops.forecast(history, [0, 1, 2], [2.0, 3.0, -4.0])
    assert torch.equal(result, history[0])


def test_small_terms_are_not_lost_in_bfloat16() -> None:
    history = torch.ones(MAX_READS, 4, dtype=torch.bfloat16)
    result = ops.forecast(history, list(range(MAX_READS)), [1.0] + [2.0**-9] * (MAX_READS - 1))
    assert torch.equal(result, torch.full((4,), 1 + 15 * 2.0**-9).bfloat16())
    assert result[0] > 1


def test_nan_of_an_unread_slot_stays_out() -> None:
    history = torch.stack((torch.ones(4), torch.full((4,), float("nan"))))
    assert ops.forecast(history, [0], [3.0]).tolist() == [3.0] * 4
    assert ops.forecast(history, [0, 1], [3.0, 0.0]).isnan().all()


def test_slots_and_weights_that_do_not_fit() -> None:
    history = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"slots=\[0, 2\]"):
        ops.forecast(history, [0, 2], [1.0, 1.0])
    with pytest.raises(ValueError, match="slots has 2 .* weights has 1"):
        ops.forecast(history, [0, 1], [1.0])


def test_works_under_inference_mode_and_outside() -> None:
    with torch.inference_mode():
        history = torch.ones(2, 3)
        assert ops.forecast(history, [0, 1], [1.0, 1.0]).tolist() == [2.0] * 3
    assert ops.forecast(history, [0, 1], [1.0, 1.0]).tolist() == [2.0] * 3


def test_second_derivatives_are_refused() -> None:
    history, weights = torch.randn(2, 5), torch.ones(2, requires_grad=True)
    slots, bias = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(())
    loss = ops.forecast(history, slots, weights, bias).square().sum()
    (first,) = torch.autograd.grad(loss, weights, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.sum().backward()
