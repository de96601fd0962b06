"""The operators of training: dtypes and orders that the kernels do not serve."""

from __future__ import annotations

import pytest
import torch
from operators import arguments, first_output, network

from lesa import ops
from lesa.ops import reference


def test_parameters_narrower_than_the_features() -> None:
    """Features in float64, parameters in float32: what an uncast predictor is given."""
    values = list(arguments("predict", torch.float64))
    values[4] = values[4].float()
    values[5] = [part.detach().float().requires_grad_() for part in values[5]]
    first_output("predict", tuple(values)).sum().backward()
    assert all(part.grad is not None and part.grad.dtype == torch.float32 for part in values[5])


def test_splines_of_another_order_run_in_plain_torch() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    layer = [part.detach() for part in network(torch.float64)]
    knots = reference.bspline_grid(8 - 2, 2, (-3.0, 3.0))
    found = ops.kan(x, *layer, (-3.0, 3.0), order=2)
    assert torch.equal(found, reference.kan_layer(x, *layer, knots, 2))
    experts = [torch.stack([part, 2 * part]) for part in layer]
    batched = ops.kan(torch.stack([x, x]), *experts, (-3.0, 3.0), order=2)
    torch.testing.assert_close(batched[0], found)
    with pytest.raises(ValueError, match="order=2"):
        ops.kan(x, *layer, (-3.0, 3.0), order=2, backend="cpp")


def test_predict_takes_three_layers() -> None:
    history, slots, weights, bias, dt, params, low, high = arguments("predict", torch.float32)
    layers = [tuple(params[:3]), tuple(params[3:6])]
    with pytest.raises(ValueError, match="layers has 2 entries"):
        ops.predict(history, slots, weights, bias, dt, layers, (low, high))


def test_loss_is_l1_or_l2() -> None:
    history, slots, weights, bias, alpha, target, *_ = arguments("predict_loss", torch.float32)
    with pytest.raises(ValueError, match="loss='huber'"):
        ops.predict_loss(history, slots, weights, bias, alpha, target, "huber")
    value, forecast = ops.predict_loss(history, slots, weights, bias, alpha, target, "l2")
    torch.testing.assert_close(value, (forecast - target).square().mean())
    assert not forecast.requires_grad
    value, nothing = ops.predict_loss(history, slots, weights, bias, alpha, target, want_forecast=False)
    assert nothing.numel() == 0
    torch.testing.assert_close(value, (forecast - target).abs().mean())
