"""`ops.forecast_head` and `ops.forecast_errors` against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from operators import DTYPES, SERVED, arguments, served

from lesa import ops
from lesa.ops import reference


@pytest.mark.parametrize("kept", [2, 0, -1])
def test_forecast_head_is_the_forecast_through_the_head(kept: int) -> None:
    history, slots, weights, bias, keep, step, scale, shift, proj, proj_bias, eps = arguments(
        "forecast_head", torch.float64
    )
    keep[1] = kept  # the row of step 1 reads slots 1 and 0
    x = weights[1, 0] * history[1] + weights[1, 1] * history[0] + bias[1]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
    expected = F.linear(normed * scale[:, None] + shift[:, None], proj, proj_bias)
    ring = history.clone()
    found = ops.forecast_head(ring, slots, weights, bias, keep, step, scale, shift, proj, proj_bias, eps)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if kept >= 0:
        history[kept] = x
    torch.testing.assert_close(ring, history, rtol=1e-14, atol=1e-14)


def errors_of(history: torch.Tensor, row: tuple[Any, ...], truth: torch.Tensor) -> torch.Tensor:
    forecast = reference.forecast(history[row[0]].double(), *row[1:])
    return torch.stack([(forecast - truth.double()).square().sum(), truth.double().square().sum()])


@DTYPES
@SERVED
@pytest.mark.parametrize("shape", [(0, 4), (3, 5, 401)], ids=str)
def test_forecast_errors(dtype: torch.dtype, shape: tuple[int, ...], loaded: bool, seed: int) -> None:
    torch.manual_seed(seed)
    kind = ops.wide_dtype(torch.empty(0, dtype=dtype))
    history, truth = torch.randn(6, *shape).to(dtype), torch.randn(shape).to(dtype)
    history[1] = float("nan")
    slots = torch.tensor([5, -1, 0, 3], dtype=torch.int32)
    weights, bias = torch.tensor([0.5, float("nan"), -2.0, 1.0], dtype=kind), torch.tensor(0.25, dtype=kind)
    with served(loaded):
        found = ops.forecast_errors(history, slots, weights, bias, truth)
        nothing = ops.forecast_errors(history, slots * 0 - 1, weights, bias * 0, truth)
    assert (found.shape, found.dtype) == ((2,), kind)
    expected = errors_of(history, ([5, 0, 3], [0.5, -2.0, 1.0], 0.25), truth)
    torch.testing.assert_close(found.double(), expected, rtol=1e-12 if kind == torch.float64 else 1e-6, atol=0)
    assert nothing[0] == nothing[1] == found[1]


@SERVED
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_forecast_errors_of_what_is_not_finite(value: float, loaded: bool) -> None:
    history, slots = torch.ones(2, 50), torch.tensor([0, 1], dtype=torch.int32)
    row = slots, torch.ones(2), torch.zeros(())
    spoiled = history.clone()
    spoiled[1, 49] = value
    with served(loaded):
        assert ops.forecast_errors(history, *row, history[0]).tolist() == [50.0, 50.0]
        error, size = ops.forecast_errors(spoiled, *row, history[0]).tolist()
        assert not np.isfinite(error) and size == 50
        assert not ops.forecast_errors(history, *row, spoiled[1]).isfinite().any()


def test_forecast_errors_refuses_a_gradient() -> None:
    weights = torch.ones(1, requires_grad=True)
    slots = torch.tensor([0], dtype=torch.int32)
    found = ops.forecast_errors(torch.ones(1, 4), slots, weights, torch.zeros(()), torch.ones(4))
    with pytest.raises(NotImplementedError, match="forecast_errors"):
        found.sum().backward()
