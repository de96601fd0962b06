"""One layer of a Kolmogorov-Arnold network, for a batch of experts and steps in one launch.

    y_q = sum_i base_qi silu(x_i) + scale_qi sum_m spline_qim B_m(x_i)            (Eq. 9)

With A_qim = sum_t dy_tq B_m(x_ti):  d base = dy^T silu(x),  d spline = scale A,  d scale = sum_m spline A, and
dx_i = sum_q dy_q (base_qi silu'(x_i) + scale_qi sum_m spline_qim B'_m(x_i)). The backward saves the inputs only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._checks import check_kan
from ._library import call, define, no_second_derivative, no_setup, wide_dtype

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
        order: degree of the pieces. The kernels serve 3; others run in plain torch.
        backend: see `lesa.ops.forecast`.

    Returns:
        [T, Q] or [E, T, Q], float32 or wider. Differentiable in everything but the grid.

    Raises:
        ValueError: a backend other than "torch" is asked for with another order.
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


def _any_order(x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, grid_range: tuple, order: int) -> Tensor:
    knots = reference.bspline_grid(spline.shape[-1] - order, order, grid_range, x.dtype).to(x.device)
    if base.dim() == 2:
        return reference.kan_layer(x, base, spline, scale, knots, order)
    layers = [reference.kan_layer(*parts, knots, order) for parts in zip(x, base, spline, scale, strict=True)]
    return torch.stack(layers)


def _plain(x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    check_kan(x, base, spline, scale, low, high)
    x, base, spline, scale = (part.to(wide_dtype(part)) for part in (x, base, spline, scale))
    return _any_order(x, base, spline, scale, (low, high), _ORDER)


def _plain_backward(
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
    slope = (lower[..., :-1] - lower[..., 1:]) * (intervals / (high - low))
    sigmoid = x.sigmoid()
    dx = (grad @ base) * sigmoid * (1 + x * (1 - sigmoid))
    dx = dx + torch.einsum("etq,eqim,etim->eti", grad, spline * scale.unsqueeze(-1), slope)
    return dx, d_base, d_spline, d_scale


def _triton(x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    from ..kernels.kan import launch_kan_fwd

    return launch_kan_fwd(x, base, spline, scale, low, high)


def _triton_backward(
    grad: Tensor, x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, low: float, high: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.kan import launch_kan_bwd

    dx, *rest = launch_kan_bwd(grad.contiguous(), x, base, spline, scale, low, high, needs_x)
    d_base, d_spline, d_scale = rest
    return x.new_empty(0) if dx is None else dx, d_base, d_spline, d_scale


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.low, ctx.high = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x = ctx.needs_input_grad[0]
    dx, *rest = torch.ops.lesa.kan_backward(grad.contiguous(), *ctx.saved_tensors, ctx.low, ctx.high, needs_x)
    return dx if needs_x else None, *rest, None, None


def _fake_backward(
    grad: Tensor, x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, low: float, high: float, needs_x: bool
) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    return dx, *(torch.empty_like(part, memory_format=torch.contiguous_format) for part in (base, spline, scale))


_PARAMETERS = "Tensor x, Tensor base, Tensor spline, Tensor scale, float low, float high"
define(
    f"kan({_PARAMETERS}) -> Tensor",
    _plain,
    _triton,
    lambda x, base, *rest: base.new_empty((base.shape[0], x.shape[1], base.shape[1]), dtype=wide_dtype(base)),
    _setup,
    _backward,
)
define(
    f"kan_backward(Tensor grad, {_PARAMETERS}, bool needs_x) -> (Tensor, Tensor, Tensor, Tensor)",
    _plain_backward,
    _triton_backward,
    _fake_backward,
    no_setup,
    no_second_derivative,
)
