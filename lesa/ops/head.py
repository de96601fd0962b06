"""A forecast fused with the head of a diffusion transformer: layer norm, scale and shift, output projection.

With x the forecast, mu and r the mean and inverse deviation of its rows:

    y = (r (x - mu) * scale + shift) W^T + c = r ((x * scale) W^T - mu (scale W^T)) + shift W^T + c,

so that one pass over the features gives the row sums and the projection together, and x is never written.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_head
from ._library import call, define
from .forecast import _plain_forecast_at


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
    """Forecast a feature and bring it through the denoiser's head (AdaLayerNormContinuous and its like).

    Args:
        history: contiguous features [H, B, N, D]; `keep` says whether the forecast is written into it.
        slots, weights, bias, step: see `forecast_at`.
        keep: [T] int32 slot of each step's forecast where a later row reads it, else negative.
        scale: [B, D], the whole factor after the norm (1 + the modulation's scale).
        shift: [B, D].
        proj_weight: [C, D], as in Linear.
        proj_bias: [C] or None.
        eps: of the layer norm, which has no weights of its own.
        backend: see `forecast`.

    Returns:
        [B, N, C] in the history's dtype. It has no gradient.
    """
    row = (history, slots, weights, bias, keep, step)
    return call("forecast_head", backend, *row, scale, shift, proj_weight, proj_bias, eps)


def _plain(
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


def _triton(*args: Any) -> Tensor:
    from ..kernels.head import launch_forecast_head

    return launch_forecast_head(*args)


def _fake(history: Tensor, *rest: Tensor | float | None) -> Tensor:
    proj_weight = rest[7]
    assert isinstance(proj_weight, torch.Tensor)
    return history.new_empty((*history.shape[1:-1], proj_weight.shape[0]))


define(
    "forecast_head(Tensor(a!) history, Tensor slots, Tensor weights, Tensor bias, Tensor keep, Tensor step, "
    "Tensor scale, Tensor shift, Tensor proj_weight, Tensor? proj_bias, float eps) -> Tensor",
    _plain,
    _triton,
    _fake,
)
