"""The live predictor in one launch: F^ = F_last + alpha z, z = sum_k w_k F_k + b, alpha = KAN(dt).

The KAN reads the schedule only. So the first programs evaluate it, a few outputs each, while all others stream the
features, form z and F_last, and need alpha just before they store. Programs pass values on as words of 64 bits, a
float32 below a flag: a word is read as a whole, so no fence is needed, and each reader sees whether the value is there.
Programs take their part in the order in which they start (by a ticket), so a program only waits for programs that are
already running.

With g = dL/dF^, S_k = <g, F_k> and S = sum g:   d w_k = alpha S_k,   d b = alpha S,   d alpha = sum_k w_k S_k + b S,
d F_k = alpha w_k g (+ g for the last), and d alpha goes back through the layers of the KAN. The backward therefore
saves the inputs, alpha and the hidden values, which the kernel writes for it; it needs no kernel of its own.

Legend: H ring slots, K window, L elements of a feature, S stride between slots, X inputs and Q outputs of a layer,
M spline bases, MP bases padded to a power of two, BQ, BX outputs and inputs a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kan_backward import apply_edges, basis6, grid_numbers, load_edges, position, silu
from .launch import check_history, check_row, guard, padded

READY = tl.constexpr(1 << 32)
# Words lie apart in memory, so waiting for alpha does not slow the tickets.
_ALPHA_WORD = 16
_HIDDEN_WORD = 32


class PredictConfig(NamedTuple):
    """Tiling: elements a streaming program, outputs and inputs a KAN program, warps a program.

    Streaming programs wait for alpha with their sums in registers. The more of them run at once, and the larger they
    are, the longer memory stays busy meanwhile.
    """

    block: int = 4096
    outputs: int = 1
    inputs: int = 256
    warps: int = 8


@triton.jit
def _publish(p_words, b_values, m_words):
    b_bits = b_values.to(tl.int32, bitcast=True).to(tl.int64) & (READY - 1)
    tl.atomic_xchg(p_words, b_bits | READY, mask=m_words, sem="relaxed")


@triton.jit
def _value(b_words):
    return b_words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _wait_for_all(p_words, m_words):
    b_words = tl.load(p_words, mask=m_words, other=READY, volatile=True)
    while tl.min(b_words, 0) < READY:
        b_words = tl.load(p_words, mask=m_words, other=READY, volatile=True)
    return _value(b_words)


@triton.jit
def _wait(p_word):
    word = tl.load(p_word, volatile=True)
    while word < READY:
        word = tl.load(p_word, volatile=True)
    return _value(word)


@triton.jit
def _kan_part(
    p_out,
    p_out_words,
    p_x,
    p_base,
    p_spline,
    p_scale,
    i_q,
    Q,
    X,
    middle,
    inverse,
    width,
    width_rest,
    WORDS: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    BQ: tl.constexpr,
    BX: tl.constexpr,
):
    # Outputs i_q to i_q + BQ of one layer. The loads of its parameters start before it waits for its inputs.
    o_q, o_m = i_q + tl.arange(0, BQ), tl.arange(0, MP)
    b_sum = tl.zeros([BQ, BX], tl.float32)
    for i_x in range(0, X, BX):
        o_x = i_x + tl.arange(0, BX)
        b_base, b_spline, b_scale = load_edges(p_base, p_spline, p_scale, o_q, i_x, Q, X, M, MP, BX)
        if WORDS:
            b_x = _wait_for_all(p_x + o_x, o_x < X)
        else:
            b_x = tl.load(p_x + o_x, mask=o_x < X, other=0.0).to(tl.float32)
        b_cell, b_rest = position(b_x, middle, inverse, width, width_rest)
        b_basis = basis6(b_cell[:, None], b_rest[:, None], o_m[None, :], M)
        b_sum += apply_edges(b_base, b_spline, b_scale, silu(b_x), b_basis)
    b_out = tl.sum(b_sum, 1)
    tl.store(p_out + o_q, b_out, mask=o_q < Q)
    _publish(p_out_words + o_q, b_out, o_q < Q)


@triton.jit
def _predict_fwd_kernel(
    p_forecast,
    p_alpha,
    p_hidden1,
    p_hidden2,
    p_words,
    p_history,
    p_slots,
    p_weights,
    p_bias,
    p_dt,
    p_base1,
    p_spline1,
    p_scale1,
    p_base2,
    p_spline2,
    p_scale2,
    p_base3,
    p_spline3,
    p_scale3,
    S,
    L,
    X,
    Q1,
    Q2,
    middle,
    inverse,
    width,
    width_rest,
    K: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    BLOCK: tl.constexpr,
    BQ: tl.constexpr,
    BX: tl.constexpr,
    ALPHA: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    i_ticket = tl.atomic_add(p_words, 1, sem="relaxed")
    p_words1 = p_words + HIDDEN
    p_words2 = p_words1 + Q1
    p_words += ALPHA
    n_first = tl.cdiv(Q1, BQ)
    n_hidden = n_first + tl.cdiv(Q2, BQ)
    # fmt: off
    if i_ticket < n_first:
        _kan_part(p_hidden1, p_words1, p_dt, p_base1, p_spline1, p_scale1, i_ticket.to(tl.int32) * BQ, Q1, X,
                  middle, inverse, width, width_rest, False, M, MP, BQ, BX)
    elif i_ticket < n_hidden:
        _kan_part(p_hidden2, p_words2, p_words1, p_base2, p_spline2, p_scale2, (i_ticket - n_first).to(tl.int32) * BQ,
                  Q2, Q1, middle, inverse, width, width_rest, True, M, MP, BQ, BX)
    elif i_ticket == n_hidden:
        _kan_part(p_alpha, p_words, p_words2, p_base3, p_spline3, p_scale3, 0, 1, Q2,
                  middle, inverse, width, width_rest, True, M, MP, 1, BX)
    # fmt: on
    else:
        o_start = (i_ticket - n_hidden - 1) * BLOCK
        o_tile = tl.arange(0, BLOCK)
        m_tile = o_start + o_tile < L
        p_tile = p_history + o_start
        b_z = tl.zeros([BLOCK], tl.float32)
        b_feature = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            i_slot = tl.load(p_slots + k).to(tl.int64)
            weight = tl.where(i_slot >= 0, tl.load(p_weights + k), 0.0)
            m_feature = o_start + o_tile < tl.where(i_slot >= 0, L, 0)
            b_feature = tl.load(p_tile + i_slot * S + o_tile, mask=m_feature, other=0.0).to(tl.float32)
            b_z += weight * b_feature
        b_z += tl.load(p_bias).to(tl.float32)
        # The last feature read is F_last.
        b_forecast = b_feature + _wait(p_words) * b_z
        tl.store(p_forecast + o_start + o_tile, b_forecast.to(p_forecast.dtype.element_ty), mask=m_tile)


def launch_predict_fwd(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    dt: Tensor,
    params: Sequence[Tensor],
    low: float,
    high: float,
    config: PredictConfig = PredictConfig(),  # noqa: B008 - immutable
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forecast with a live KAN of three layers.

    Args:
        history: [H, *feature] float32, float16 or bfloat16, dense features.
        slots: [K] int32, the newest last; -1 for an unused entry, which the last is not.
        weights: [K] float32.
        bias: one float32.
        dt: [X], offsets.
        params: base [Q, X], spline [Q, X, M] and scale [Q, X] of each layer; the last layer has Q = 1.
        low, high: range of the spline grids, which have M - 3 intervals.
        config: the tiling.

    Returns:
        The forecast [*feature] in the history's dtype; alpha [] and the values of both hidden layers, float32.

    Raises:
        ValueError: the dtype, shape or strides of an argument differ from the above.
    """
    check_history(history)
    window = check_row(slots, None, weights=weights, bias=bias)
    widths = [dt.numel(), *(params[i].shape[0] for i in (0, 3, 6))]
    if widths[3] != 1:
        raise ValueError(f"params has a last layer of {widths[3]} outputs; expected 1")
    device, bases = dt.device, params[1].shape[2]
    forecast = torch.empty(history.shape[1:], dtype=history.dtype, device=history.device)
    alpha = torch.empty((), dtype=torch.float32, device=device)
    hidden1, hidden2 = (torch.empty(width, dtype=torch.float32, device=device) for width in widths[1:3])
    words = torch.zeros(_HIDDEN_WORD + widths[1] + widths[2], dtype=torch.int64, device=device)
    programs = sum(triton.cdiv(width, config.outputs) for width in widths[1:3]) + 1
    programs += triton.cdiv(forecast.numel(), config.block)
    with guard(history):
        _predict_fwd_kernel[(programs,)](
            forecast,
            alpha,
            hidden1,
            hidden2,
            words,
            history,
            slots,
            weights,
            bias,
            dt.contiguous(),
            *(part.contiguous() for part in params),
            history.stride(0),
            forecast.numel(),
            *widths[:3],
            *grid_numbers(bases, low, high),
            K=window,
            M=bases,
            MP=padded(bases),
            BLOCK=config.block,
            BQ=config.outputs,
            BX=min(config.inputs, padded(max(widths[:3]))),
            ALPHA=_ALPHA_WORD,
            HIDDEN=_HIDDEN_WORD,
            num_warps=config.warps,
        )
    return forecast, alpha, hidden1, hidden2
