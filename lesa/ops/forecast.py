"""Forecasts: a weighted sum of cached features plus a bias, and the operators of its gradients.

    F^ = sum_k w_k F_k + b,   so with g = dL/dF^:   dL/dw_k = <g, F_k>,   dL/db = sum g,   dL/dF_k = w_k g.

The backward therefore saves the inputs only: one pass over g and the features gives all sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import (
    call,
    check_like,
    check_row,
    check_slots,
    check_step,
    define,
    launches,
    no_second_derivative,
    no_tensor,
    wide_dtype,
)


def forecast(
    history: Tensor,
    slots: Tensor | Sequence[int],
    weights: Tensor | Sequence[float],
    bias: Tensor | float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Forecast a feature: sum_k weights[k] * history[slots[k]] + bias, accumulated in float32 or wider.

    Args:
        history: features [H, ...] of any floating dtype.
        slots: [K] int32 indices into the first axis, K <= 16; negative entries are unused.
        weights: [K]; float32, or float64 with a float64 history.
        bias: [] or [1], added to every element; dtype as `weights`. Sequences and floats are copied to the device.
        backend: "triton", "cpp" or "torch"; None takes the best there is.

    Returns:
        The forecast feature [...], in the history's dtype. Differentiable in history, weights and bias.

    Raises:
        TypeError: `history` is not a tensor.
        ValueError: a sequence names a slot outside the history, or lengths differ.
    """
    if not isinstance(history, Tensor):
        raise no_tensor("forecast", "history", history)
    if not isinstance(slots, Tensor):
        _check_sequence(slots, weights, history)
    return call("forecast", backend, history, *_row(history, slots, weights, bias))


def forecast_at(
    history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, step: Tensor, backend: str | None = None
) -> Tensor:
    """`forecast` by row `step` of a table, with the step on the device: one CUDA graph serves every step.

    Args:
        history: features [H, ...].
        slots: [T, K] int32; negative entries are left out.
        weights: [T, K], see `forecast`.
        bias: [T].
        step: [1] int64 on the history's device.
        backend: see `forecast`.

    Returns:
        The forecast feature [...], in the history's dtype. It has no gradient.
    """
    return call("forecast_at", backend, history, slots, weights, bias, step)


def forecast_into_(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    keep: Tensor,
    step: Tensor,
    backend: str | None = None,
) -> None:
    """`forecast_at` written to `history[keep[step]]`: nothing is allocated.

    Args:
        history: contiguous features [H, ...], changed in place.
        slots, weights, bias, step: see `forecast_at`.
        keep: [T] int32 slot of each step's forecast, negative to write none; it may be one that the row reads.
        backend: see `forecast`.
    """
    call("forecast_into_", backend, history, slots, weights, bias, keep, step)


def prepared_forecast(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    keep: Tensor,
    step: Tensor,
    backend: str | None = None,
) -> Callable[[], None]:
    """Prepare `forecast_into_` for many steps: the arguments are checked once, not at every step.

    Args:
        history, slots, weights, bias, keep, step, backend: see `forecast_into_`; their values may change between steps.

    Returns:
        Called without arguments, once a step, it makes the forecast.

    Raises:
        ValueError: the dtype or shape of an argument differs from the above.
    """
    if launches(history, backend):
        from ..kernels.forecast import prepare_forecast

        return prepare_forecast(None, history, slots, weights, bias, keep, step)
    return functools.partial(forecast_into_, history, slots, weights, bias, keep, step, backend)


def feature_sums(grad: Tensor, history: Tensor, slots: Tensor, backend: str | None = None) -> Tensor:
    """The sums that make the gradients of weights and bias: <grad, F_k> for every k, then sum(grad).

    Args:
        grad: [...] like one feature.
        history: features [H, ...].
        slots: [K] int32; negative entries give 0.
        backend: see `forecast`.

    Returns:
        [K + 1], float32 or wider. Two runs are bit-equal.
    """
    return call("feature_sums", backend, grad, history, slots)


def spread(grad: Tensor, coefficients: Tensor, slots: Tensor, size: int, backend: str | None = None) -> Tensor:
    """The gradient of the history: coefficients[k] * grad, summed at slots[k]; 0 elsewhere.

    Args:
        grad: [...] like one feature.
        coefficients: [K].
        slots: [K] int32; negative entries are left out.
        size: H.
        backend: see `forecast`.

    Returns:
        [H, ...] in the dtype of `grad`.
    """
    return call("spread", backend, grad, coefficients, slots, size)


def weighted_sum(history: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights[k] * history[slots[k]] in plain torch, in the wide dtype."""
    wide = wide_dtype(history)
    total = torch.zeros(history.shape[1:], dtype=wide, device=history.device)
    for k, slot in enumerate(slots.tolist()):
        if slot >= 0:
            total = torch.addcmul(total, history[slot].to(wide), weights[k].to(wide))
    return total


def _row(history: Tensor, slots: Any, weights: Any, bias: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(history)
    if not isinstance(slots, Tensor):
        slots = torch.tensor(slots, dtype=torch.int32, device=history.device)
    if not isinstance(weights, Tensor):
        weights = torch.tensor(weights, dtype=wide, device=history.device)
    if not isinstance(bias, Tensor):
        bias = torch.tensor(bias, dtype=wide, device=history.device)
    return slots, weights, bias


def _check_sequence(slots: Sequence[int], weights: Tensor | Sequence[float], history: Tensor) -> None:
    given = weights.numel() if isinstance(weights, Tensor) else len(weights)
    if len(slots) != given:
        raise ValueError(f"slots has {len(slots)} entries but weights has {given}: expected as many of each")
    size = history.shape[0] if history.dim() else 0
    outside = [slot for slot in slots if slot >= size]
    if outside:
        raise ValueError(f"slots={list(slots)} names {outside[0]}, but history holds slots 0 to {size - 1}")


def _plain_forecast(history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    check_row(history, slots, weights, bias)
    return (weighted_sum(history, slots, weights) + bias.reshape(()).to(wide_dtype(history))).to(history.dtype)


def _plain_forecast_at(history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, step: Tensor) -> Tensor:
    i = check_step(step, slots)
    return _plain_forecast(history, slots[i], weights[i], bias[i])


def _plain_forecast_into(
    history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, keep: Tensor, step: Tensor
) -> None:
    slot = int(keep[check_step(step, slots)])
    if slot >= 0:
        history[slot].copy_(_plain_forecast_at(history, slots, weights, bias, step))


def _plain_feature_sums(grad: Tensor, history: Tensor, slots: Tensor) -> Tensor:
    check_slots(history, slots)
    check_like("grad", grad, history[0])
    return sums_of(grad, history, slots)


def sums_of(grad: Tensor, history: Tensor, slots: Tensor) -> Tensor:
    """`feature_sums` in plain torch, of a gradient in any dtype."""
    wide = wide_dtype(history)
    flat = grad.to(wide).flatten()
    zero = flat.new_zeros(())
    sums = [flat @ history[slot].to(wide).flatten() if slot >= 0 else zero for slot in slots.tolist()]
    return torch.stack([*sums, flat.sum()])


def _plain_spread(grad: Tensor, coefficients: Tensor, slots: Tensor, size: int) -> Tensor:
    if int(slots.max()) >= size:
        raise ValueError(f"slots names {int(slots.max())}, but size={size}")
    wide = wide_dtype(grad)
    valid = slots >= 0
    share = torch.zeros(size, dtype=wide, device=grad.device)
    share = share.index_add(0, slots.clamp(min=0).long(), coefficients.to(wide) * valid)
    return (share.reshape(-1, *[1] * grad.dim()) * grad.to(wide)).to(grad.dtype)


def _triton_forecast(
    history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, step: Tensor | None = None
) -> Tensor:
    from ..kernels.forecast import launch_forecast_fwd

    return launch_forecast_fwd(None, history, slots, weights, bias, None, step)


def _triton_forecast_into(
    history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, keep: Tensor, step: Tensor
) -> None:
    from ..kernels.forecast import launch_forecast_fwd

    launch_forecast_fwd(None, history, slots, weights, bias, keep, step)


def _triton_feature_sums(grad: Tensor, history: Tensor, slots: Tensor) -> Tensor:
    from ..kernels.forecast import launch_feature_sums

    return launch_feature_sums(grad.contiguous(), history, slots)


def _triton_spread(grad: Tensor, coefficients: Tensor, slots: Tensor, size: int) -> Tensor:
    from ..kernels.forecast import launch_spread

    return launch_spread(grad.contiguous(), coefficients, slots, size)


def _setup_forecast(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    history, slots, weights, bias = inputs
    ctx.save_for_backward(history, slots, weights)
    ctx.bias_like = (bias.shape, bias.dtype)


def _backward_forecast(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    history, slots, weights = ctx.saved_tensors
    d_history = d_weights = d_bias = None
    if ctx.needs_input_grad[0]:
        d_history = torch.ops.lesa.spread(grad, weights, slots, history.shape[0])
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        sums = torch.ops.lesa.feature_sums(grad, history, slots)
        shape, dtype = ctx.bias_like
        d_weights, d_bias = sums[:-1].to(weights.dtype), sums[-1].reshape(shape).to(dtype)
    return d_history, None, d_weights, d_bias


def _fake_forecast(history: Tensor, *rest: Tensor) -> Tensor:
    return history.new_empty(history.shape[1:])


define(
    "forecast(Tensor history, Tensor slots, Tensor weights, Tensor bias) -> Tensor",
    _plain_forecast,
    _triton_forecast,
    _fake_forecast,
    _backward_forecast,
    _setup_forecast,
)
define(
    "forecast_at(Tensor history, Tensor slots, Tensor weights, Tensor bias, Tensor step) -> Tensor",
    _plain_forecast_at,
    _triton_forecast,
    _fake_forecast,
)
define(
    "forecast_into_(Tensor(a!) history, Tensor slots, Tensor weights, Tensor bias, Tensor keep, Tensor step) -> ()",
    _plain_forecast_into,
    _triton_forecast_into,
    lambda *args: None,
)
define(
    "feature_sums(Tensor grad, Tensor history, Tensor slots) -> Tensor",
    _plain_feature_sums,
    _triton_feature_sums,
    lambda grad, history, slots: history.new_empty(slots.shape[0] + 1, dtype=wide_dtype(history)),
    no_second_derivative,
)
define(
    "spread(Tensor grad, Tensor coefficients, Tensor slots, SymInt size) -> Tensor",
    _plain_spread,
    _triton_spread,
    lambda grad, coefficients, slots, size: grad.new_empty((size, *grad.shape)),
    no_second_derivative,
)
