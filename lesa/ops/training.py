"""What training runs: a KAN layer, the live predictor, and its loss with all gradients in one pass.

One KAN layer, for a batch of experts and steps in one launch (Eq. 9):

    y_q = sum_i base_qi silu(x_i) + scale_qi sum_m spline_qim B_m(x_i).

With A_qim = sum_t dy_tq B_m(x_ti):  d base = dy^T silu(x),  d spline = scale A,  d scale = sum_m spline A, and
dx_i = sum_q dy_q (base_qi silu'(x_i) + scale_qi sum_m spline_qim B'_m(x_i)). The backward saves the inputs only.

The live predictor (Eq. 4 to 7):

    F^ = F_last + alpha z,   z = sum_k w_k F_k + b,   alpha = KAN(dt).   With g = dL/dF^ and the sums S_k = <g, F_k>,
    S = sum g:   d alpha = sum_k w_k S_k + b S,   d w_k = alpha S_k,   d b = alpha S,   dF_k = alpha w_k g (+ g, last).

Its backward saves the inputs, alpha and the KAN's hidden values. `predict_loss` knows g while it streams the features,
so it forms the sums at once: its backward saves these alone, and scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._library import call, check_kan, check_like, check_row, define, launcher, no_second_derivative, wide_dtype
from .forecast import sums_of, weighted_sum

LAYERS = 3
_ORDER = 3


def kan(
    x: Tensor,
    base_weight: Tensor,
    spline_weight: Tensor,
    spline_scale: Tensor,
    grid_range: tuple[float, float],
    order: int = _ORDER,
    backend: str | None = None,
) -> Tensor:
    """A KAN layer on a uniform spline grid; forward and backward touch the order + 1 active bases only.

    Args:
        x: [T, I], or [E, T, I] for E experts at once.
        base_weight: [Q, I] or [E, Q, I].
        spline_weight: [Q, I, M] or [E, Q, I, M]; M - order intervals lie on `grid_range`.
        spline_scale: like `base_weight`.
        grid_range: (low, high) of the grid.
        order: degree of the pieces. The kernels serve 3; any other runs in plain torch.
        backend: see `lesa.ops.forecast`.

    Returns:
        [T, Q] or [E, T, Q], float32 or wider. Differentiable in everything but the grid.

    Raises:
        ValueError: `backend` is not "torch" and `order` is not 3.
    """
    low, high = grid_range
    if order != _ORDER:
        if backend not in (None, "torch"):
            raise ValueError(f"order={order}: backend {backend!r} has cubic splines only; leave backend out")
        parts = (part.to(wide_dtype(part)) for part in (x, base_weight, spline_weight, spline_scale))
        return _any_order(*parts, grid_range, order)  # type: ignore[call-arg, arg-type]
    if base_weight.dim() == 2:
        single = (part.unsqueeze(0) for part in (x, base_weight, spline_weight, spline_scale))
        return call("kan", backend, *single, float(low), float(high)).squeeze(0)
    x = x.expand(base_weight.shape[0], -1, -1)
    return call("kan", backend, x, base_weight, spline_weight, spline_scale, float(low), float(high))


def predict(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    dt: Tensor,
    layers: Sequence[tuple[Tensor, Tensor, Tensor]],
    grid_range: tuple[float, float],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Forecast with the expert of one stage in one launch: projection, KAN and residual update (Eq. 4 to 7).

    Args:
        history: features [H, ...].
        slots: [K] int32, the newest last; negative entries are unused, but the last must be used.
        weights: W [K], float32 (float64 with float64 features).
        bias: b, [] or [1].
        dt: time offsets [I] of Eq. 5.
        layers: (base weight [Q, I], spline weight [Q, I, M], spline scale [Q, I]) of each of three KAN layers, the
            last with Q = 1; cubic.
        grid_range: (low, high) of the spline grids.
        backend: see `lesa.ops.forecast`.

    Returns:
        The forecast feature [...] in the history's dtype, and alpha []. Differentiable in the features, W, b and all
        parameters of the KAN; not in dt.

    Raises:
        ValueError: the KAN does not have three layers.
    """
    if len(layers) != LAYERS:
        raise ValueError(
            f"layers has {len(layers)} entries: predict runs the paper's KAN of {LAYERS} layers; run others with "
            "lesa.ops.kan, and the forecast with lesa.ops.forecast"
        )
    flat = [part for layer in layers for part in layer]
    row = (history, slots, weights, bias, dt, flat, *map(float, grid_range))
    forecast, alpha, _, _ = call("predict", backend, *row)
    return forecast, alpha


def predict_loss(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    alpha: Tensor,
    target: Tensor,
    loss: str = "l1",
    want_forecast: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Forecast, loss against the true feature, and the gradients of W, b and alpha, in one pass.

    Args:
        history, slots, weights, bias: see `predict`.
        alpha: [], e.g. the output of a KAN.
        target: the true feature [...].
        loss: "l1" (the paper's), the mean absolute error, or "l2", the mean squared one.
        want_forecast: False does not write the forecast.
        backend: see `lesa.ops.forecast`.

    Returns:
        The loss [], float32 or wider, and the forecast [...] in the history's dtype ([0] if unwanted). The loss is
        differentiable in weights, bias and alpha; features and forecast are not.

    Raises:
        ValueError: `loss` is unknown.
    """
    if loss not in ("l1", "l2"):
        raise ValueError(f"loss={loss!r}: expected 'l1' or 'l2'")
    row = (history, slots, weights, bias, alpha, target, loss == "l2", want_forecast)
    value, forecast, _ = call("predict_loss", backend, *row)
    return value, forecast.detach()


def _any_order(x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, grid_range: tuple, order: int) -> Tensor:
    knots = reference.bspline_grid(spline.shape[-1] - order, order, grid_range, x.dtype).to(x.device)
    if base.dim() == 2:
        return reference.kan_layer(x, base, spline, scale, knots, order)
    layers = [reference.kan_layer(*parts, knots, order) for parts in zip(x, base, spline, scale, strict=True)]
    return torch.stack(layers)


def _plain_kan(x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    check_kan(x, base, spline, scale, low, high)
    x, base, spline, scale = (part.to(wide_dtype(part)) for part in (x, base, spline, scale))
    return _any_order(x, base, spline, scale, (low, high), _ORDER)


def _plain_kan_backward(
    grad: Tensor, x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, low: float, high: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, x, base, spline, scale = (part.to(wide_dtype(part)) for part in (grad, x, base, spline, scale))
    intervals = spline.shape[-1] - _ORDER
    knots = reference.bspline_grid(intervals, _ORDER, (low, high), x.dtype).to(x.device)
    basis = reference.bspline_basis(x, knots, _ORDER)
    moments = torch.einsum("etq,etim->eqim", grad, basis)
    d_base = grad.mT @ F.silu(x)
    d_scale, d_spline = (spline * moments).sum(-1), scale.unsqueeze(-1) * moments
    if not needs_x:
        return x.new_empty(0), d_base, d_spline, d_scale
    lower = reference.bspline_basis(x, knots, _ORDER - 1)
    derivative = (lower[..., :-1] - lower[..., 1:]) * (intervals / (high - low))
    sigmoid = x.sigmoid()
    dx = (grad @ base) * sigmoid * (1 + x * (1 - sigmoid))
    dx = dx + torch.einsum("etq,eqim,etim->eti", grad, spline * scale.unsqueeze(-1), derivative)
    return dx, d_base, d_spline, d_scale


def _triton_kan_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.kan import launch_kan_bwd

    dx, d_base, d_spline, d_scale = launch_kan_bwd(grad, x, *rest)
    return x.new_empty(0) if dx is None else dx, d_base, d_spline, d_scale


def _setup_kan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.low, ctx.high = inputs
    ctx.save_for_backward(*tensors)


def _backward_kan(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x = ctx.needs_input_grad[0]
    dx, *rest = torch.ops.lesa.kan_backward(grad.contiguous(), *ctx.saved_tensors, ctx.low, ctx.high, needs_x)
    return dx if needs_x else None, *rest, None, None


def _fake_kan_backward(
    grad: Tensor, x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, low: float, high: float, needs_x: bool
) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    return dx, *(torch.empty_like(part, memory_format=torch.contiguous_format) for part in (base, spline, scale))


def _plain_predict(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    dt: Tensor,
    params: list[Tensor],
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_row(history, slots, weights, bias, newest=True)
    values = [dt.unsqueeze(0)]
    for i in range(0, len(params), 3):
        base, spline, scale = params[i : i + 3]
        values.append(kan(values[-1], base, spline, scale, (low, high), backend="torch"))
    alpha = values[-1].reshape(())
    forecast = _residual(history, slots, weights, bias, alpha).to(history.dtype)
    return forecast, alpha, values[1].squeeze(0), values[2].squeeze(0)


def _plain_predict_loss(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    alpha: Tensor,
    target: Tensor,
    l2: bool,
    want_forecast: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_row(history, slots, weights, bias, newest=True)
    check_like("target", target, history[0])
    forecast = _residual(history, slots, weights, bias, alpha)
    error = forecast - target.to(forecast.dtype)
    count = max(error.numel(), 1)
    loss = (error.square() if l2 else error.abs()).sum() / count
    grad = (2 * error if l2 else error.sign()) / count
    d_row, d_alpha = _row_gradients(sums_of(grad, history, slots), weights, bias, alpha)
    written = forecast.to(history.dtype) if want_forecast else history.new_empty(0)
    return loss, written, torch.cat([d_row, d_alpha.reshape(1)])


def _residual(history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
    """F_last + alpha z, in the wide dtype."""
    wide = wide_dtype(history)
    z = weighted_sum(history, slots, weights) + bias.reshape(()).to(wide)
    return history[int(slots[-1])].to(wide) + alpha.to(wide) * z


def _row_gradients(sums: Tensor, weights: Tensor, bias: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """From S_k and S: the gradients of W and b [K + 1], and of alpha []."""
    d_alpha = sums[:-1] @ weights.to(sums.dtype) + sums[-1] * bias.reshape(()).to(sums.dtype)
    return alpha.to(sums.dtype) * sums, d_alpha


def _setup_predict(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    history, slots, weights, bias, dt, params, ctx.low, ctx.high = inputs
    _, alpha, hidden1, hidden2 = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(hidden1, hidden2)
    ctx.save_for_backward(history, slots, weights, bias, dt, alpha, hidden1, hidden2, *params)


def _backward_predict(ctx: Any, grad: Tensor | None, grad_alpha: Tensor | None, *hidden: None) -> tuple[Any, ...]:
    history, slots, weights, bias, dt, alpha, hidden1, hidden2, *params = ctx.saved_tensors
    d_history = d_weights = d_bias = None
    d_alpha = torch.zeros_like(alpha) if grad_alpha is None else grad_alpha
    if grad is not None:
        sums = torch.ops.lesa.feature_sums(grad, history, slots)
        d_row, from_forecast = _row_gradients(sums, weights, bias, alpha)
        d_alpha = d_alpha + from_forecast
        d_weights, d_bias = d_row[:-1].to(weights.dtype), d_row[-1].reshape(bias.shape)
        if ctx.needs_input_grad[0]:
            coefficients = torch.cat([alpha * weights[:-1], (1 + alpha * weights[-1]).reshape(1)])
            d_history = torch.ops.lesa.spread(grad, coefficients, slots, history.shape[0])
    flow = d_alpha.to(alpha.dtype).reshape(1, 1, 1)
    d_params: list[Tensor] = []
    for i, x in ((6, hidden2), (3, hidden1), (0, dt)):
        layer = [part.unsqueeze(0) for part in params[i : i + 3]]
        flow, *grads = torch.ops.lesa.kan_backward(flow, x.reshape(1, 1, -1), *layer, ctx.low, ctx.high, i > 0)
        d_params = [part.squeeze(0) for part in grads] + d_params
    return d_history, None, d_weights, d_bias, None, d_params, None, None


def _setup_predict_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, forecast, grads = output
    ctx.shapes = [(part.shape, part.dtype) for part in inputs[2:5]]
    # Else every backward would make a feature of zeros for the forecast.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(forecast, grads)
    ctx.save_for_backward(grads)


def _backward_predict_loss(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    (grads,) = ctx.saved_tensors
    scaled = grad * grads
    parts = scaled.split([grads.shape[0] - 2, 1, 1])
    d_row = [part.reshape(shape).to(dtype) for part, (shape, dtype) in zip(parts, ctx.shapes, strict=True)]
    return None, None, *d_row, None, None, None


def _fake_predict(
    history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, dt: Tensor, params: list[Tensor], *grid: float
) -> tuple[Tensor, ...]:
    wide = wide_dtype(params[0])
    hidden = (params[0].new_empty(params[i].shape[0], dtype=wide) for i in (0, 3))
    return history.new_empty(history.shape[1:]), params[0].new_empty((), dtype=wide), *hidden


def _fake_predict_loss(history: Tensor, slots: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide, want_forecast = wide_dtype(history), rest[-1]
    shape = history.shape[1:] if want_forecast else (0,)
    loss, grads = history.new_empty((), dtype=wide), history.new_empty(slots.shape[0] + 2, dtype=wide)
    return loss, history.new_empty(shape), grads


_PARAMETERS = "Tensor x, Tensor base, Tensor spline, Tensor scale, float low, float high"
define(
    f"kan({_PARAMETERS}) -> Tensor",
    _plain_kan,
    launcher("kan", "launch_kan_fwd"),
    lambda x, base, *rest: base.new_empty((base.shape[0], x.shape[1], base.shape[1]), dtype=wide_dtype(base)),
    _backward_kan,
    _setup_kan,
)
define(
    f"kan_backward(Tensor grad, {_PARAMETERS}, bool needs_x) -> (Tensor, Tensor, Tensor, Tensor)",
    _plain_kan_backward,
    _triton_kan_backward,
    _fake_kan_backward,
    no_second_derivative,
)
_ROW = "Tensor history, Tensor slots, Tensor weights, Tensor bias"
define(
    f"predict({_ROW}, Tensor dt, Tensor[] params, float low, float high) -> (Tensor, Tensor, Tensor, Tensor)",
    _plain_predict,
    launcher("predict", "launch_predict_fwd"),
    _fake_predict,
    _backward_predict,
    _setup_predict,
)
define(
    f"predict_loss({_ROW}, Tensor alpha, Tensor target, bool l2, bool want_forecast) -> (Tensor, Tensor, Tensor)",
    _plain_predict_loss,
    launcher("loss", "launch_predict_loss"),
    _fake_predict_loss,
    _backward_predict_loss,
    _setup_predict_loss,
)
