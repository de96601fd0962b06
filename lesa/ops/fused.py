"""Forecasts that need not be written: passed through a denoiser's head, or compared with the truth.

With x the forecast, mu and r the mean and inverse deviation of its rows, s the scale, t the shift, W and c the
projection, the head is

    y = (r (x - mu) s + t) W^T + c = r ((x s) W^T - mu (s W^T)) + t W^T + c,

so one pass over the features gives the row sums and the projection together. The errors are

    e_0 = sum (x - F)^2,   e_1 = sum F^2,   of which sqrt(e_0 / e_1) is the relative error,

in one pass over the features and the truth F.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import call, check_head, check_like, check_row, define, launcher, launches, wide_dtype
from .forecast import _plain_forecast_at, weighted_sum


def forecast_head(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    keep: Tensor,
    step: Tensor,
    scale: Tensor,
    shift: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    eps: float,
    backend: str | None = None,
) -> Tensor:
    """Forecast a feature and apply the denoiser's head to it (AdaLayerNormContinuous and similar).

    Args:
        history: contiguous features [H, B, N, D], changed in place where `keep` says so.
        slots, weights, bias, step: see `forecast_at`.
        keep: [T] int32 slot of each step's forecast, if a later row reads it; negative to write none.
        scale: [B, D], the whole factor after the norm (1 + the modulation's scale).
        shift: [B, D].
        proj_weight: [C, D], as in Linear.
        proj_bias: [C] or None.
        eps: epsilon of the layer norm, which has no weights of its own.
        backend: see `forecast`.

    Returns:
        [B, N, C] in the history's dtype. It has no gradient.
    """
    row = (history, slots, weights, bias, keep, step)
    return call("forecast_head", backend, *row, scale, shift, proj_weight, proj_bias, eps)


def forecast_errors(
    history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, truth: Tensor, backend: str | None = None
) -> Tensor:
    """The squared error of a forecast and the square of the truth, each summed over all elements.

    Args:
        history: features [H, ...] of any floating dtype.
        slots: [K] int32, K <= 16; negative entries are unused.
        weights: [K], float32 (float64 with float64 features).
        bias: [] or [1], like `weights`.
        truth: the true feature [...], in the history's dtype.
        backend: see `lesa.ops.forecast`.

    Returns:
        [2], float32 or wider: sum (F^ - truth)^2 and sum truth^2; inf or NaN if an input is, or if a sum exceeds
        float32. Two runs are bit-equal. It has no gradient: a backward through it is refused.

    Raises:
        ValueError: the dtype or shape of an argument differs from the above.
    """
    return call("forecast_errors", backend, history, slots, weights, bias, truth)


def prepared_errors(
    history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, kept: Tensor | None, backend: str | None = None
) -> Callable[[Tensor, Tensor], None]:
    """Prepare `forecast_errors` of one row for many truths: the arguments are checked once, not at every call.

    Args:
        history, slots, weights, bias, backend: see `forecast_errors`; their values may change between calls.
        kept: a feature of the history to which each truth is copied; None copies nothing.

    Returns:
        Called with sums [2], float32 or wider, and a contiguous truth, it writes the two sums. For features on a CUDA
        device, sums may be pinned memory; read them once the device is done. Otherwise they are there on return.

    Raises:
        ValueError: the dtype or shape of an argument differs from the above; a truth is checked at its call.
    """
    if history.is_cuda and launches(history, backend):
        from ..kernels.forecast import prepare_forecast_errors

        return prepare_forecast_errors(history, slots, weights, bias, kept)

    def compare(sums: Tensor, truth: Tensor) -> None:
        with torch.inference_mode():  # autograd's part of an operator call takes longer than the operator
            found = forecast_errors(history, slots, weights, bias, truth, backend)
            sums.copy_(found, non_blocking=found.is_cuda)
            if kept is not None:
                kept.copy_(truth)

    return compare


def _plain_forecast_head(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    keep: Tensor,
    step: Tensor,
    scale: Tensor,
    shift: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    eps: float,
) -> Tensor:
    check_head(history, scale, shift, proj_weight, proj_bias)
    feature = _plain_forecast_at(history, slots, weights, bias, step)
    slot = int(keep[int(step)])
    if slot >= 0:
        history[slot].copy_(feature)
    normed = F.layer_norm(feature, feature.shape[-1:], eps=eps)
    modulated = normed * scale.to(feature.dtype).unsqueeze(1) + shift.to(feature.dtype).unsqueeze(1)
    cast = None if proj_bias is None else proj_bias.to(feature.dtype)
    return F.linear(modulated, proj_weight.to(feature.dtype), cast)


def _fake_forecast_head(history: Tensor, *rest: Tensor | float | None) -> Tensor:
    proj_weight = rest[7]
    assert isinstance(proj_weight, torch.Tensor)
    return history.new_empty((*history.shape[1:-1], proj_weight.shape[0]))


def _plain_forecast_errors(history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, truth: Tensor) -> Tensor:
    check_row(history, slots, weights, bias)
    check_like("truth", truth, history[0])
    wide = wide_dtype(history)
    forecast = weighted_sum(history, slots, weights) + bias.reshape(()).to(wide)
    return torch.stack([(forecast - truth.to(wide)).square().sum(), truth.to(wide).square().sum()])


def _triton_forecast_errors(history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, truth: Tensor) -> Tensor:
    from ..kernels.forecast import launch_forecast_errors

    return launch_forecast_errors(history, slots, weights, bias, truth.contiguous())


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "lesa.ops.forecast_errors has no gradient: detach its inputs, or train with lesa.ops.predict_loss"
    )


define(
    "forecast_head(Tensor(a!) history, Tensor slots, Tensor weights, Tensor bias, Tensor keep, Tensor step, "
    "Tensor scale, Tensor shift, Tensor proj_weight, Tensor? proj_bias, float eps) -> Tensor",
    _plain_forecast_head,
    launcher("head", "launch_forecast_head_fwd"),
    _fake_forecast_head,
)
define(
    "forecast_errors(Tensor history, Tensor slots, Tensor weights, Tensor bias, Tensor truth) -> Tensor",
    _plain_forecast_errors,
    _triton_forecast_errors,
    lambda history, *row: history.new_empty(2, dtype=wide_dtype(history)),
    _no_gradient,
)
