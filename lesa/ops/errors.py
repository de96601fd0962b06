"""How far a forecast is from the truth: what the guard asks at computed steps.

    e_0 = sum (F^ - F)^2,   e_1 = sum F^2,   F^ = sum_k w_k F_k + b,   so the relative error is sqrt(e_0 / e_1).

One pass over the features and the truth; the forecast is neither rounded nor written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import check_like, check_row
from ._library import call, define, launches, no_setup, wide_dtype
from .forecast import weighted_sum


def forecast_errors(
    history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, truth: Tensor, backend: str | None = None
) -> Tensor:
    """The squared error of a forecast and the square of the truth, each summed over all elements.

    Args:
        history: features [H, ...] of any floating dtype.
        slots: [K] int32, K <= 16; negative entries are left out and their slots not read.
        weights: [K], float32 (float64 with float64 features).
        bias: [] or [1], like `weights`.
        truth: the true feature [...], in the history's dtype.
        backend: see `lesa.ops.forecast`.

    Returns:
        [2], float32 or wider: sum (F^ - truth)^2 and sum truth^2; inf or NaN where an input is, or where a sum is
        beyond float32. Two runs are bit-equal. It has no gradient: a backward through it is refused.

    Raises:
        ValueError: an argument has a dtype or a shape that is not as said.
    """
    return call("forecast_errors", backend, history, slots, weights, bias, truth)


def prepared_errors(
    history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, kept: Tensor | None, backend: str | None = None
) -> Callable[[Tensor, Tensor], None]:
    """`forecast_errors` of one row, for many truths: what does not change is looked at once.

    Args:
        history, slots, weights, bias, backend: see `forecast_errors`; what they hold may change meanwhile.
        kept: a feature of the history, where each truth is copied to; None copies nothing.

    Returns:
        Called with sums [2], float32 or wider, and a truth, contiguous, it writes the two sums. Those of a CUDA device
        may be in pinned memory, and are there once the device is done; those of others on the CPU are there as it
        returns.

    Raises:
        ValueError: an argument has a dtype or a shape that is not as said; of a truth when it is given.
    """
    if history.is_cuda and launches(history, backend):
        from ..kernels.errors import prepare_forecast_errors

        return prepare_forecast_errors(history, slots, weights, bias, kept)

    def compare(sums: Tensor, truth: Tensor) -> None:
        with torch.inference_mode():  # what autograd does about an operator takes longer than the operator
            found = forecast_errors(history, slots, weights, bias, truth, backend)
            sums.copy_(found, non_blocking=found.is_cuda)
            if kept is not None:
                kept.copy_(truth)

    return compare


def _plain_errors(history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, truth: Tensor) -> Tensor:
    check_row(history, slots, weights, bias)
    check_like("truth", truth, history[0])
    wide = wide_dtype(history)
    forecast = weighted_sum(history, slots, weights) + bias.reshape(()).to(wide)
    return torch.stack([(forecast - truth.to(wide)).square().sum(), truth.to(wide).square().sum()])


def _triton_errors(history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, truth: Tensor) -> Tensor:
    from ..kernels.errors import launch_forecast_errors

    return launch_forecast_errors(history, slots, weights, bias, truth.contiguous())


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "lesa.ops.forecast_errors has no gradient: detach its inputs, or train with lesa.ops.predict_loss"
    )


define(
    "forecast_errors(Tensor history, Tensor slots, Tensor weights, Tensor bias, Tensor truth) -> Tensor",
    _plain_errors,
    _triton_errors,
    lambda history, *row: history.new_empty(2, dtype=wide_dtype(history)),
    no_setup,
    _no_gradient,
)
