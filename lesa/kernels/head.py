"""The forecast and the head of a denoiser in one pass: weighted sum, layer norm, modulation, projection.

With x the forecast, s = scale, t = shift, W the projection and m any number near the mean mu of a row,

    y = ((x - mu) rstd s + t) W^T + b = rstd (((x - m) s) W^T - (mu - m) (s W^T)) + t W^T + b,

so mu and rstd are needed only after the last channel. m is the mean of the row's first channels. Subtracting it before
the tensor cores round their operand makes the rounding error relative to the std of the row, not to its mean.
The channels may be split among programs. Each slice j then has its own m_j, and a second kernel joins the slices.
With A_j the slice's ((x - m_j) s) W_j^T,

    y = rstd sum_j (A_j - (mu - m_j) s_j W_j^T) + sum_j t_j W_j^T + b.

Legend: B batch, N tokens, D channels, C projected channels, H ring slots, K window, T steps, S strides,
BM, BD, BC tokens, channels and projected channels a tile, J slices, DJ channels a slice.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_history, check_row, guard, padded

MAX_CHANNELS = 256
# Three stages of eight tiles of features, and of one of the projection, 128 channels each.
_PIPELINE_BYTES = 3 * 128 * 2 * (8 * 16 + 128)


class HeadConfig(NamedTuple):
    """Tiling of the head: tokens and channels a tile, slices of the channels, warps, stages of the pipeline."""

    tokens: int
    channels: int
    slices: int
    warps: int
    stages: int


@triton.jit
def _load_modulation(p_scale, p_shift, o_d, D, OPERAND: tl.constexpr):
    # Rows 0 and 1 of an operand, because a product has at least 16 rows.
    o_row = tl.arange(0, 16)[:, None]
    b_scale = tl.load(p_scale + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    b_shift = tl.load(p_shift + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    return tl.where(o_row == 0, b_scale, tl.where(o_row == 1, b_shift, 0.0)).to(OPERAND)


@triton.jit
def _load_projection(p_proj, o_c, o_d, D, C, OPERAND: tl.constexpr):
    m_proj = (o_c < C)[:, None] & (o_d < D)[None, :]
    return tl.load(p_proj + o_c[:, None] * D + o_d[None, :], mask=m_proj, other=0.0).to(OPERAND)


@triton.jit
def _row_of(b_rows, ROW: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, 16) == ROW)[:, None], b_rows, 0.0), 0)


@triton.jit
def _forecast_head_fwd_kernel(
    p_out,
    p_moments,
    p_history,
    p_slots,
    p_weights,
    p_bias,
    p_keep,
    p_step,
    p_scale,
    p_shift,
    p_proj,
    p_proj_bias,
    S,
    S_SCALE,
    S_SHIFT,
    N,
    D,
    C,
    eps,
    K: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    J: tl.constexpr,
    DJ: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # With one slice p_out is y; with more it is [J, B, N + 2, C] float32 products, tokens N and N + 1 being s W^T and
    # t W^T, which a tile beyond the last makes, and p_moments is [J, B, N, 3] float32: m, sum(x - m), sum((x - m)^2).
    i_program = tl.program_id(0)
    NT = tl.cdiv(N, BM) + (J > 1)
    i_j = i_program % J
    i_token = (i_program // J) % NT * BM
    i_b = (i_program // J // NT).to(tl.int64)
    B = tl.num_programs(0) // J // NT
    i_d0 = i_j * DJ
    p_scale += i_b * S_SCALE
    p_shift += i_b * S_SHIFT
    o_m = tl.arange(0, BM)
    o_c = tl.arange(0, BC)
    m_c = (o_c < C)[None, :]
    b_rows = tl.zeros([16, BC], tl.float32)
    if J > 1:
        p_out += (i_j * B + i_b) * (N + 2) * C
        p_moments += (i_j * B + i_b) * N * 3
        if i_token >= N:
            for i_d in range(i_d0, tl.minimum(D, i_d0 + DJ), BD):
                o_d = i_d + tl.arange(0, BD)
                b_proj = _load_projection(p_proj, o_c, o_d, D, C, OPERAND)
                b_modulation = _load_modulation(p_scale, p_shift, o_d, D, OPERAND)
                b_rows = tl.dot(b_modulation, tl.trans(b_proj), b_rows, input_precision=PRECISION)
            o_row = tl.arange(0, 16)[:, None]
            tl.store(p_out + (N + o_row) * C + o_c[None, :], b_rows, mask=(o_row < 2) & m_c)
            return

    i_row = 0
    if p_step is not None:
        i_row = tl.load(p_step)
    i_slots, weights = (), ()
    for k in tl.static_range(K):
        i_slot = tl.load(p_slots + i_row * K + k).to(tl.int64)
        weights += (tl.where(i_slot >= 0, tl.load(p_weights + i_row * K + k), 0.0),)  # type: ignore[assignment]
        i_slots += (i_slot,)  # type: ignore[assignment]
    bias = tl.load(p_bias + i_row)
    o_origin = (i_b * N + i_token) * D
    left = tl.minimum(N - i_token, BM)

    b_mean = tl.zeros([BM], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_square = tl.zeros([BM], tl.float32)
    b_y = tl.zeros([BM, BC], tl.float32)
    for i_d in range(i_d0, tl.minimum(D, i_d0 + DJ), BD):
        o_d = i_d + tl.arange(0, BD)
        o_tile = o_m[:, None] * D + o_d[None, :]
        m_d = (o_d < D)[None, :]
        b_x = tl.zeros([BM, BD], tl.float32)
        for k in tl.static_range(K):
            m_x = (o_m < tl.where(i_slots[k] >= 0, left, 0))[:, None] & m_d
            p_x = p_history + (i_slots[k] * S + o_origin) + o_tile
            b_x += weights[k] * tl.load(p_x, mask=m_x, other=0.0, eviction_policy="evict_first").to(tl.float32)
        b_x += bias
        if p_keep is not None:
            i_keep = tl.load(p_keep + i_row).to(tl.int64)
            m_x = (o_m < tl.where(i_keep >= 0, left, 0))[:, None] & m_d
            tl.store(p_history + (i_keep * S + o_origin) + o_tile, b_x.to(p_history.dtype.element_ty), mask=m_x)
        if i_d == i_d0:
            b_mean = tl.sum(tl.where(m_d, b_x, 0.0), 1) / tl.minimum(D - i_d, BD)
        b_x = tl.where(m_d, b_x - b_mean[:, None], 0.0)
        b_sum += tl.sum(b_x, 1)
        b_square += tl.sum(b_x * b_x, 1)
        b_scale = tl.load(p_scale + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_proj = _load_projection(p_proj, o_c, o_d, D, C, OPERAND)
        b_y = tl.dot((b_x * b_scale[None, :]).to(OPERAND), tl.trans(b_proj), b_y, input_precision=PRECISION)
        if J == 1:
            b_modulation = _load_modulation(p_scale, p_shift, o_d, D, OPERAND)
            b_rows = tl.dot(b_modulation, tl.trans(b_proj), b_rows, input_precision=PRECISION)

    o_token = i_token + o_m
    m_token = o_token < N
    o_y = o_token[:, None] * C + o_c[None, :]
    m_y = m_token[:, None] & m_c
    if J > 1:
        tl.store(p_out + o_y, b_y, mask=m_y)
        tl.store(p_moments + o_token * 3, b_mean, mask=m_token)
        tl.store(p_moments + o_token * 3 + 1, b_sum, mask=m_token)
        tl.store(p_moments + o_token * 3 + 2, b_square, mask=m_token)
    else:
        b_sum /= D
        b_rstd = tl.rsqrt(tl.maximum(b_square / D - b_sum * b_sum, 0.0) + eps)
        b_y = b_rstd[:, None] * (b_y - b_sum[:, None] * _row_of(b_rows, 0)[None, :]) + _row_of(b_rows, 1)[None, :]
        if p_proj_bias is not None:
            b_y += tl.load(p_proj_bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
        tl.store(p_out + i_b * N * C + o_y, b_y.to(p_out.dtype.element_ty), mask=m_y)


@triton.jit
def _join_slices_kernel(
    p_out,
    p_part,
    p_moments,
    p_proj_bias,
    N,
    D,
    C,
    eps,
    BM: tl.constexpr,
    BC: tl.constexpr,
    J: tl.constexpr,
    DJ: tl.constexpr,
):
    NT = tl.cdiv(N, BM)
    i_b = (tl.program_id(0) // NT).to(tl.int64)
    B = tl.num_programs(0) // NT
    o_token = tl.program_id(0) % NT * BM + tl.arange(0, BM)
    m_token = o_token < N
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    m_y = m_token[:, None] & m_c[None, :]

    # The mean is summed relative to the first slice's m, so its error is relative to the std of the row.
    b_first = tl.load(p_moments + i_b * N * 3 + o_token * 3, mask=m_token, other=0.0)
    b_mean = tl.zeros([BM], tl.float32)
    for j in tl.static_range(J):
        p_j = p_moments + (j * B + i_b) * N * 3 + o_token * 3
        b_m = tl.load(p_j, mask=m_token, other=0.0)
        b_mean += (b_m - b_first) * tl.minimum(D - j * DJ, DJ) + tl.load(p_j + 1, mask=m_token, other=0.0)
    b_mean /= D

    b_square = tl.zeros([BM], tl.float32)
    b_y = tl.zeros([BM, BC], tl.float32)
    b_shift = tl.zeros([BC], tl.float32)
    for j in tl.static_range(J):
        p_j = p_moments + (j * B + i_b) * N * 3 + o_token * 3
        b_off = b_mean - (tl.load(p_j, mask=m_token, other=0.0) - b_first)
        b_sum = tl.load(p_j + 1, mask=m_token, other=0.0)
        b_square += tl.load(p_j + 2, mask=m_token, other=0.0)
        b_square += b_off * (b_off * tl.minimum(D - j * DJ, DJ) - 2.0 * b_sum)
        p_j = p_part + (j * B + i_b) * (N + 2) * C
        b_scale = tl.load(p_j + N * C + o_c, mask=m_c, other=0.0)
        b_shift += tl.load(p_j + (N + 1) * C + o_c, mask=m_c, other=0.0)
        b_part = tl.load(p_j + o_token[:, None] * C + o_c[None, :], mask=m_y, other=0.0)
        b_y += b_part - b_off[:, None] * b_scale[None, :]
    b_rstd = tl.rsqrt(tl.maximum(b_square / D, 0.0) + eps)
    b_y = b_rstd[:, None] * b_y + b_shift[None, :]
    if p_proj_bias is not None:
        b_y += tl.load(p_proj_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    p_out += i_b * N * C
    tl.store(p_out + o_token[:, None] * C + o_c[None, :], b_y.to(p_out.dtype.element_ty), mask=m_y)


def head_config(history: Tensor, window: int, projected: int) -> HeadConfig:
    """The tiling of the head of `history`, as measured (benchmarks/NOTES.md).

    The order of the sums follows the tiling: two runs on one machine are bit-equal, but machines with less shared
    memory than an A100 or H100 may round differently.

    Args:
        history: [H, B, N, D].
        window: K.
        projected: C.
    """
    if history.dtype != torch.bfloat16 or projected > 128 or history.shape[-1] % 16:
        return HeadConfig(tokens=16, channels=32, slices=1, warps=4, stages=1)
    narrow = history.shape[-1] < 1024
    if window > 8:  # 64 channels of so many features do not fit in the registers
        return HeadConfig(tokens=16, channels=32, slices=1 if narrow else 4, warps=4, stages=1)
    if (narrow or window > 4) and _shared_memory(history.device) >= _PIPELINE_BYTES:
        return HeadConfig(tokens=16, channels=128, slices=1, warps=8, stages=3)
    return HeadConfig(tokens=32, channels=64, slices=1 if narrow else 4, warps=4, stages=1)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program can have; without limit on devices other than CUDA."""
    if device.type != "cuda":
        return 1 << 30
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def launch_forecast_head_fwd(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    step: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    eps: float,
    config: HeadConfig | None = None,
) -> Tensor:
    """(layernorm(x, eps) * scale + shift) @ proj_weight^T + proj_bias, where x is the forecast, kept in registers.

    Args:
        history: [H, B, N, D] float32, float16 or bfloat16, dense features.
        slots, weights, bias, step: see `launch_forecast_fwd`.
        keep: one int32, the slot of the ring that x is also written to; negative writes none; [T] with `step`.
        scale: [B, D], the whole factor; channels contiguous.
        shift: [B, D]; channels contiguous.
        proj_weight: [C, D], contiguous; rounded to bfloat16 if the features are bfloat16.
        proj_bias: [C] or None.
        eps: added to the variance.
        config: the tiling; None chooses by shape.

    Returns:
        [B, N, C] in the history's dtype.

    Raises:
        ValueError: the dtype, shape or strides of an argument differ from the above, or C exceeds 256.
    """
    check_history(history)
    window = check_row(slots, step, weights=weights, bias=bias, keep=keep)
    _check_head(history, scale, shift, proj_weight, proj_bias)
    B, N, D = history.shape[1:]
    C = proj_weight.shape[0]
    out = torch.empty(B, N, C, dtype=history.dtype, device=history.device)
    if history.numel() == 0 or C == 0:
        return out
    config = config or head_config(history, window, C)
    slices = min(config.slices, triton.cdiv(D, config.channels))
    width = triton.cdiv(D, slices * config.channels) * config.channels
    slices = triton.cdiv(D, width)
    tiles = triton.cdiv(N, config.tokens)
    rows = max(16, padded(C))
    parts, moments = out, None
    if slices > 1:
        parts = torch.empty(slices, B, N + 2, C, dtype=torch.float32, device=history.device)
        moments = torch.empty(slices, B, N, 3, dtype=torch.float32, device=history.device)
    with guard(history):
        _forecast_head_fwd_kernel[(slices * (tiles + (slices > 1)) * B,)](
            parts,
            moments,
            history,
            slots,
            weights,
            bias,
            keep,
            step,
            scale,
            shift,
            proj_weight,
            proj_bias,
            history.stride(0),
            scale.stride(0),
            shift.stride(0),
            N,
            D,
            C,
            eps,
            K=window,
            BM=config.tokens,
            BD=config.channels,
            BC=rows,
            J=slices,
            DJ=width,
            OPERAND=tl.bfloat16 if history.dtype == torch.bfloat16 else tl.float32,
            # float16 is multiplied as tf32: it has the same precision, and the range that the unscaled products need.
            PRECISION="ieee" if history.dtype == torch.float32 else "tf32",
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if slices > 1:
            _join_slices_kernel[(triton.cdiv(N, 16) * B,)](
                out, parts, moments, proj_bias, N, D, C, eps, BM=16, BC=rows, J=slices, DJ=width
            )
    return out


def _check_head(history: Tensor, scale: Tensor, shift: Tensor, proj_weight: Tensor, proj_bias: Tensor | None) -> None:
    if history.dim() != 4:
        raise ValueError(f"history has shape {tuple(history.shape)}; expected [H, B, N, D]")
    B, _, D = history.shape[1:]
    C = proj_weight.shape[0]
    for name, tensor, rows in (("scale", scale, B), ("shift", shift, B), ("proj_weight", proj_weight, C)):
        if tensor.shape != (rows, D) or (D > 1 and tensor.stride(1) != 1):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
                f"expected {(rows, D)} with contiguous rows"
            )
    if C > MAX_CHANNELS:
        raise ValueError(f"proj_weight has {C} rows; the fused head takes at most {MAX_CHANNELS}")
    if not proj_weight.is_contiguous():
        raise ValueError(f"proj_weight has strides {proj_weight.stride()}; expected a contiguous tensor")
    if proj_bias is not None and (proj_bias.shape != (C,) or not proj_bias.is_contiguous()):
        raise ValueError(f"proj_bias has shape {tuple(proj_bias.shape)}; expected ({C},), contiguous")
