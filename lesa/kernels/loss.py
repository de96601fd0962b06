"""The loss of a forecast and the gradients of its row, in one pass over the features and the target.

With F^ = F_last + alpha (sum_k w_k F_k + b), the error d = F^ - target of L elements and g = dL/dF^, which is
sign(d) / L for the mean absolute and 2 d / L for the mean squared error, all gradients follow from S_k = <g, F_k> and
S = sum g:

    d w_k = alpha S_k,   d b = alpha S,   d alpha = sum_k w_k S_k + b S.

The forward therefore computes the gradients at once, and the backward saves these K + 2 numbers only. Every program
writes its part of each sum; the program that finishes last adds up the parts in their order.

Legend: H ring slots, K window, KP window padded to a power of two, K2 K + 2 sums padded likewise, L elements of a
feature, S stride between slots, P programs, BP parts a tile, R lanes a tile, V elements a lane.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_history, check_row, guard, padded


class LossConfig(NamedTuple):
    """Tiling of the loss: lanes a tile, bytes a lane, programs at most, warps a program, stages of loads.

    All but warps and stages set the order of the additions, so they are the same on every machine.
    """

    lanes: int = 128
    bytes: int = 16
    programs: int = 132
    warps: int = 4
    stages: int = 4


def loss_config(K: int) -> LossConfig:
    """The tiling for a window: one stage less where four do not fit in the 99 KiB of small GPUs."""
    return LossConfig() if K <= 8 else LossConfig(stages=3)


@triton.jit
def _predict_loss_kernel(
    p_loss,
    p_forecast,
    p_grads,
    p_part,
    p_count,
    p_history,
    p_slots,
    p_weights,
    p_bias,
    p_alpha,
    p_target,
    S,
    L,
    inverse,
    K: tl.constexpr,
    KP: tl.constexpr,
    K2: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BP: tl.constexpr,
    SQUARED: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_program = tl.program_id(0)
    P = tl.num_programs(0)
    alpha = tl.load(p_alpha).to(tl.float32)
    bias = tl.load(p_bias).to(tl.float32)
    o_k = tl.arange(0, KP)
    i_slots = tl.load(p_slots + o_k, mask=o_k < K, other=-1).to(tl.int64)
    b_weights = tl.load(p_weights + o_k, mask=i_slots >= 0, other=0.0)
    # F_last is one of the features: its coefficient gets the 1 of the residual.
    b_coefficients = alpha * b_weights + tl.where(o_k == K - 1, 1.0, 0.0)
    p_features = p_history + (i_slots * S)[:, None]
    o_tile = tl.arange(0, R * V)
    b_sums = tl.zeros([KP, R], tl.float32)
    b_total = tl.zeros([R], tl.float32)
    b_loss = tl.zeros([R], tl.float32)
    o_start = i_program.to(tl.int64) * (R * V)
    for _ in tl.range(i_program, tl.cdiv(L, R * V), P, num_stages=STAGES):
        o_element = o_start + o_tile
        m_element = o_element < L
        m_features = (i_slots >= 0)[:, None] & m_element[None, :]
        b_features = tl.load(p_features + o_element[None, :], mask=m_features, other=0.0).to(tl.float32)
        b_target = tl.load(p_target + o_element, mask=m_element, other=0.0).to(tl.float32)
        b_forecast = tl.sum(b_coefficients[:, None] * b_features, 0) + alpha * bias
        if p_forecast is not None:
            tl.store(p_forecast + o_element, b_forecast.to(p_forecast.dtype.element_ty), mask=m_element)
        b_error = tl.where(m_element, b_forecast - b_target, 0.0)
        if SQUARED:
            b_grad = b_error
            b_each = b_error * b_error
        else:
            # NaN stays NaN: it compares unequal to itself, not greater or less.
            b_sign = tl.where(b_error > 0, 1.0, tl.where(b_error < 0, -1.0, 0.0))
            b_grad = tl.where(b_error == b_error, b_sign, b_error)
            b_each = tl.abs(b_error)
        # One thread holds neighbours and adds them up at once, so a sum needs one register.
        b_loss += tl.sum(tl.reshape(b_each, [R, V]), 1)
        b_total += tl.sum(tl.reshape(b_grad, [R, V]), 1)
        b_sums += tl.sum(tl.reshape(b_grad[None, :] * b_features, [KP, R, V]), 2)
        o_start += P * (R * V)
    tl.store(p_part + o_k * P + i_program, tl.sum(b_sums, 1), mask=o_k < K)
    tl.store(p_part + K * P + i_program, tl.sum(b_total, 0))
    tl.store(p_part + (K + 1) * P + i_program, tl.sum(b_loss, 0))
    # All warps store before one thread counts this program.
    tl.debug_barrier()
    if tl.atomic_add(p_count, 1, sem="acq_rel") == P - 1:
        o_sum = tl.arange(0, K2)
        b_parts = tl.zeros([K2, BP], tl.float32)
        for i_part in range(0, P, BP):
            o_part = i_part + tl.arange(0, BP)
            m_part = (o_sum < K + 2)[:, None] & (o_part < P)[None, :]
            p_parts = p_part + o_sum[:, None] * P + o_part[None, :]
            # Other programs wrote them: do not read this processor's own cache.
            b_parts += tl.load(p_parts, mask=m_part, other=0.0, cache_modifier=".cg")
        b_sum = tl.sum(b_parts, 1) * inverse
        tl.store(p_loss, tl.sum(tl.where(o_sum == K + 1, b_sum, 0.0), 0))
        if SQUARED:
            b_sum *= 2.0
        # The products of an unused slot are 0 g: NaN where g is not finite.
        m_used = (tl.load(p_slots + o_sum, mask=o_sum < K, other=-1) >= 0) | (o_sum == K)
        b_sum = tl.where(m_used, b_sum, 0.0)
        b_row = tl.load(p_weights + o_sum, mask=m_used & (o_sum < K), other=0.0)
        b_row = tl.where(o_sum == K, bias, b_row)
        tl.store(p_grads + o_sum, alpha * b_sum, mask=o_sum <= K)
        tl.store(p_grads + K + 1, tl.sum(b_row * b_sum, 0))


def launch_predict_loss(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    alpha: Tensor,
    target: Tensor,
    l2: bool,
    want_forecast: bool,
    config: LossConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the forecast F_last + alpha (sum_k w_k F_k + b), and its gradients.

    Args:
        history, slots, weights, bias: see `launch_predict_fwd`.
        alpha: one float32.
        target: [*feature], contiguous, any of the feature dtypes.
        l2: mean squared error instead of mean absolute error.
        want_forecast: whether the forecast is written.
        config: the tiling; it sets the order of the additions. None chooses.

    Returns:
        The loss [] float32, the forecast [*feature] in the history's dtype ([0] if unwanted), and [K + 2] float32: the
        gradients of the weights, of the bias and of alpha.

    Raises:
        ValueError: the dtype, shape or strides of an argument differ from the above.
    """
    check_history(history)
    window = check_row(slots, None, weights=weights, bias=bias)
    config = config or loss_config(window)
    shape = history.shape[1:]
    if target.shape != shape or not target.is_contiguous():
        raise ValueError(
            f"target has shape {tuple(target.shape)} and strides {target.stride()}; "
            f"expected a contiguous feature {tuple(shape)}"
        )
    device, length = history.device, target.numel()
    forecast = torch.empty(shape if want_forecast else 0, dtype=history.dtype, device=device)
    if length == 0:
        return torch.zeros((), device=device), forecast, torch.zeros(window + 2, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    grads = torch.empty(window + 2, dtype=torch.float32, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    vector = config.bytes // history.element_size()
    programs = min(triton.cdiv(length, config.lanes * vector), config.programs)
    part = torch.empty(window + 2, programs, dtype=torch.float32, device=device)
    with guard(history):
        _predict_loss_kernel[(programs,)](
            loss,
            forecast if want_forecast else None,
            grads,
            part,
            count,
            history,
            slots,
            weights,
            bias,
            alpha,
            target,
            history.stride(0),
            length,
            1 / length,
            K=window,
            KP=padded(window),
            K2=padded(window + 2),
            R=config.lanes,
            V=vector,
            BP=64,
            SQUARED=l2,
            STAGES=config.stages,
            num_warps=config.warps,
        )
    return loss, forecast, grads
