"""Weighted sums of cached features, the reductions that their gradients and errors need, and the gradient of the ring.

    F^ = sum_k w_k F_k + b,   so with g = dL/dF^:   dL/dw_k = <g, F_k>,   dL/db = sum g,   dL/dF_k = w_k g.

`feature_sums` makes all the sums in one pass over g and the features, `spread` writes w_k g into slot k: the backward
saves the inputs only. The errors of a forecast against a truth F are sum (F^ - F)^2 and sum F^2, in one pass too.

Legend: H ring slots, K window, KP window padded to a power of two, L elements of a feature, S stride between slots,
T steps, P partial sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, check_feature, check_grad, check_history, check_row, padded


class ForecastConfig(NamedTuple):
    """Tiling of the forecast: elements a program, warps a program, eviction hint of the loads."""

    block: int = 1024
    warps: int = 8
    hint: str = ""


# Bytes of a result that stays in the L2 cache (40 to 126 MB on the GPUs this was made for) if nothing pushes it out.
_KEPT = 32 * 2**20


def forecast_config(size: int) -> ForecastConfig:
    """The tiling for a feature of `size` bytes: features leave the cache first if the result fits in it."""
    return ForecastConfig(hint="evict_first" if size <= _KEPT else "")


class SumsConfig(NamedTuple):
    """Tiling of the sums: elements times slots a tile, elements a tile at most, programs at most, warps a program.

    It is the same on every machine, because it sets the order of the additions and so the last bits of the result.
    """

    tile: int = 8192
    block: int = 2048
    programs: int = 1024
    warps: int = 4


class ErrorsConfig(NamedTuple):
    """Tiling of the errors: elements a tile, tiles up to which one program suffices, programs at most, warps a program.

    It is the same on every machine, as for the sums.
    """

    block: int = 1024
    alone: int = 16  # a second launch, to add up, would take longer
    programs: int = 1024
    warps: int = 4


@triton.jit
def _forecast_fwd_kernel(
    p_out,
    p_history,
    p_slots,
    p_weights,
    p_bias,
    p_keep,
    p_step,
    S,
    L,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HINT: tl.constexpr,
):
    o_start = tl.program_id(0).to(tl.int64) * BLOCK
    i_row = 0
    if p_step is not None:
        i_row = tl.load(p_step)
    o_tile = tl.arange(0, BLOCK)
    # At most a block is left, so it fits 32 bits. For an unused slot nothing is left to load.
    left = tl.minimum(L - o_start, BLOCK).to(tl.int32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        i_slot = tl.load(p_slots + i_row * K + k).to(tl.int64)
        weight = tl.where(i_slot >= 0, tl.load(p_weights + i_row * K + k), 0.0)
        p_feature = p_history + i_slot * S + o_start
        m_tile = o_tile < tl.where(i_slot >= 0, left, 0)
        b_feature = tl.load(p_feature + o_tile, mask=m_tile, other=0.0, eviction_policy=HINT).to(tl.float32)
        b_sum += weight * b_feature
    b_sum += tl.load(p_bias + i_row)
    if p_keep is not None:
        i_slot = tl.load(p_keep + i_row).to(tl.int64)
        p_out = p_history + i_slot * S
        left = tl.where(i_slot >= 0, left, 0)
    tl.store(p_out + o_start + o_tile, b_sum.to(p_history.dtype.element_ty), mask=o_tile < left)


@triton.jit
def _feature_sums_kernel(
    p_part, p_grad, p_history, p_slots, S, L, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr
):
    i_program = tl.program_id(0)
    o_k = tl.arange(0, KP)
    o_tile = tl.arange(0, BLOCK)
    i_slots = tl.load(p_slots + o_k, mask=o_k < K, other=-1).to(tl.int64)
    p_features = (p_history + i_slots * S)[:, None]
    b_sums = tl.zeros([KP, BLOCK], tl.float32)
    b_total = tl.zeros([BLOCK], tl.float32)
    o_start = i_program.to(tl.int64) * BLOCK
    for _ in range(i_program, tl.cdiv(L, BLOCK), tl.num_programs(0)):
        m_tile = o_tile < tl.minimum(L - o_start, BLOCK).to(tl.int32)
        b_grad = tl.load(p_grad + o_start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        m_features = (i_slots >= 0)[:, None] & m_tile[None, :]
        b_features = tl.load(p_features + o_start + o_tile[None, :], mask=m_features, other=0.0).to(tl.float32)
        b_sums += b_grad[None, :] * b_features
        b_total += b_grad
        o_start += tl.num_programs(0) * BLOCK
    p_part += i_program * (K + 1)
    # The products of an unused slot are 0 g: NaN where g is not finite.
    tl.store(p_part + o_k, tl.where(i_slots >= 0, tl.sum(b_sums, 1), 0.0), mask=o_k < K)
    tl.store(p_part + K, tl.sum(b_total, 0))


@triton.jit
def _reduce_kernel(p_sum, p_part, P, K1: tl.constexpr, BLOCK: tl.constexpr):
    i_k = tl.program_id(0)
    o_part = tl.arange(0, BLOCK)
    b_part = tl.load(p_part + o_part * K1 + i_k, mask=o_part < P, other=0.0)
    tl.store(p_sum + i_k, tl.sum(b_part, 0))


@triton.jit
def _spread_kernel(
    p_out, p_grad, p_coefficients, p_slots, L, H, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr
):
    o_start = tl.program_id(0).to(tl.int64) * BLOCK
    o_k = tl.arange(0, KP)
    o_tile = tl.arange(0, BLOCK)
    m_tile = o_tile < tl.minimum(L - o_start, BLOCK).to(tl.int32)
    i_slots = tl.load(p_slots + o_k, mask=o_k < K, other=-1)
    b_coefficients = tl.load(p_coefficients + o_k, mask=o_k < K, other=0.0)
    b_grad = tl.load(p_grad + o_start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    p_out += o_start
    for i_slot in range(H):
        m_k = i_slots == i_slot
        coefficient = tl.sum(tl.where(m_k, b_coefficients, 0.0), 0)
        # A slot that no entry reads gets zeros, also where the gradient is not finite.
        b_out = tl.where(tl.max(m_k.to(tl.int32), 0) > 0, coefficient * b_grad, 0.0)
        tl.store(p_out + o_tile, b_out.to(p_out.dtype.element_ty), mask=m_tile)
        p_out += L


@triton.jit
def _forecast_errors_kernel(
    p_part, p_truth, p_kept, p_history, p_slots, p_weights, p_bias, S, L, K: tl.constexpr, BLOCK: tl.constexpr
):
    i_program = tl.program_id(0)
    o_tile = tl.arange(0, BLOCK)
    bias = tl.load(p_bias)
    b_error_sum = tl.zeros([BLOCK], tl.float32)
    b_truth_sum = tl.zeros([BLOCK], tl.float32)
    o_start = i_program.to(tl.int64) * BLOCK
    for _ in range(i_program, tl.cdiv(L, BLOCK), tl.num_programs(0)):
        left = tl.minimum(L - o_start, BLOCK).to(tl.int32)
        b_given = tl.load(p_truth + o_start + o_tile, mask=o_tile < left, other=0.0)
        b_truth = b_given.to(tl.float32)
        b_forecast = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            i_slot = tl.load(p_slots + k).to(tl.int64)
            weight = tl.where(i_slot >= 0, tl.load(p_weights + k), 0.0)
            m_tile = o_tile < tl.where(i_slot >= 0, left, 0)
            b_feature = tl.load(p_history + i_slot * S + o_start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
            b_forecast += weight * b_feature
        b_error = tl.where(o_tile < left, b_forecast + bias - b_truth, 0.0)
        b_error_sum += b_error * b_error
        b_truth_sum += b_truth * b_truth
        if p_kept is not None:
            tl.debug_barrier()  # the row may read this slot: all threads load before any stores
            tl.store(p_kept + o_start + o_tile, b_given, mask=o_tile < left)
        o_start += tl.num_programs(0) * BLOCK
    tl.store(p_part + i_program * 2, tl.sum(b_error_sum, 0))
    tl.store(p_part + i_program * 2 + 1, tl.sum(b_truth_sum, 0))


def launch_forecast_fwd(
    out: Tensor | None,
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    keep: Tensor | None = None,
    step: Tensor | None = None,
    config: ForecastConfig | None = None,
) -> Tensor:
    """sum_k weights[k] * history[slots[k]] + bias, in float32, to `out` or into the ring.

    Args:
        out: [*feature] in the history's dtype, contiguous; None makes it.
        history: [H, *feature] float32, float16 or bfloat16, dense features.
        slots: [K] int32, -1 for an unused entry; [T, K] with `step`.
        weights: float32, like `slots`.
        bias: one float32; [T] with `step`.
        keep: one int32, the slot to write to; [T] with `step`. A negative slot writes nothing.
        step: [1] int64 on the device, the row to use.
        config: the tiling; the result does not depend on it. None chooses by size.

    Returns:
        `out`, or `history` where `keep` is given.

    Raises:
        ValueError: the dtype, shape or strides of an argument differ from the above.
    """
    if keep is not None:
        out = None
    elif out is None:
        out = torch.empty(history.shape[1:], dtype=history.dtype, device=history.device)
    else:
        check_feature("out", out, history)
    prepare_forecast(out, history, slots, weights, bias, keep, step, config)()
    return history if out is None else out


def prepare_forecast(
    out: Tensor | None,
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    step: Tensor | None,
    config: ForecastConfig | None = None,
) -> Callable[[], None]:
    """Prepare `launch_forecast_fwd` for many launches; its arguments' values may change in place between them.

    Returns:
        Called without arguments, it launches.

    Raises:
        ValueError: the dtype, shape or strides of an argument differ from what is said there.
    """
    check_history(history)
    window = check_row(slots, step, weights=weights, bias=bias, keep=keep)
    if history.numel() == 0:
        return lambda: None
    length = history[0].numel()
    config = config or forecast_config(length * history.element_size())
    sizes = history.stride(0), length, window, config.block, config.hint
    fixed = out, history, slots, weights, bias, keep, step, *sizes
    return Launch(_forecast_fwd_kernel, triton.cdiv(length, config.block), fixed, num_warps=config.warps)


def launch_feature_sums(
    grad: Tensor,
    history: Tensor,
    slots: Tensor,
    config: SumsConfig = SumsConfig(),  # noqa: B008 - immutable
) -> Tensor:
    """S_k = sum(grad * history[slots[k]]) for every k and S_0 = sum(grad), in one pass and a fixed order.

    Args:
        grad: [*feature], contiguous, any of the feature dtypes.
        history: [H, *feature], dense features.
        slots: [K] int32, -1 for an unused entry, whose sum is 0.
        config: the tiling; it sets the order of the additions.

    Returns:
        [K + 1] float32, S_0 last.

    Raises:
        ValueError: the dtype, shape or strides of an argument differ from the above.
    """
    check_history(history)
    window = check_row(slots, None)
    check_grad(grad, history.shape[1:])
    if grad.numel() == 0 or history.numel() == 0:
        return torch.zeros(window + 1, dtype=torch.float32, device=grad.device)
    width = padded(window)
    block = min(config.tile // width, config.block)
    programs = min(triton.cdiv(grad.numel(), block), config.programs)
    parts = torch.empty(programs, window + 1, dtype=torch.float32, device=grad.device)
    sums = torch.empty(window + 1, dtype=torch.float32, device=grad.device)
    fixed = grad, history, slots, history.stride(0), grad.numel(), window, width, block
    Launch(_feature_sums_kernel, programs, fixed, num_warps=config.warps, num_stages=1)(parts)
    prepare_sum(parts, config.warps)(sums)
    return sums


def prepare_sum(parts: Tensor, warps: int) -> Callable[[Tensor], None]:
    """Prepare the sum of every column, in a fixed order.

    Args:
        parts: [P, sums] float32, contiguous: the partial sums, one row a program.
        warps: warps a program; with P it sets the order of the additions.

    Returns:
        Called with sums [sums] float32, on the device or in pinned memory, it writes the sums there.
    """
    programs, count = parts.shape
    return Launch(_reduce_kernel, count, (parts, programs, count, padded(programs)), num_warps=warps)


def launch_spread(grad: Tensor, coefficients: Tensor, slots: Tensor, H: int) -> Tensor:
    """Gradient of a weighted sum in the ring: (sum of coefficients[k] with slots[k] == h) * grad, zeros elsewhere.

    Args:
        grad: [*feature], contiguous, any of the feature dtypes.
        coefficients: [K] float32.
        slots: [K] int32, -1 for an unused entry.
        H: slots of the ring.

    Returns:
        [H, *feature], the dtype of `grad`.

    Raises:
        ValueError: the dtype, shape or strides of an argument differ from the above.
    """
    window = check_row(slots, None, coefficients=coefficients)
    check_grad(grad, grad.shape)
    out = torch.empty(H, *grad.shape, dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    block = 1024
    fixed = grad, coefficients, slots, grad.numel(), H, window, padded(window), block
    Launch(_spread_kernel, triton.cdiv(grad.numel(), block), fixed)(out)
    return out


def prepare_forecast_errors(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    kept: Tensor | None = None,
    config: ErrorsConfig = ErrorsConfig(),  # noqa: B008 - immutable
) -> Callable[[Tensor, Tensor], None]:
    """Prepare the errors of one row, F^ = sum_k weights[k] * history[slots[k]] + bias, against one truth or many.

    Args:
        history, slots, weights, bias: see `launch_forecast_fwd`, without `step`.
        kept: [*feature] in the history's dtype, contiguous, where each truth is copied to; it may be a feature that
            the row reads. None copies nothing.
        config: the tiling; it sets the order of the additions.

    Returns:
        Called with sums [2] float32, on the device or in pinned memory, and a truth [*feature] in the history's dtype,
        contiguous, it writes sum (F^ - truth)^2 and sum truth^2 to sums. The order of the additions depends on sizes,
        and on which addresses are multiples of 16.

    Raises:
        ValueError: the dtype, shape or strides of an argument differ from the above; a truth is checked at
            its call.
    """
    check_history(history)
    window = check_row(slots, None, weights=weights, bias=bias)
    if kept is not None:
        check_feature("kept", kept, history)
    shape, length = history.shape[1:], history.shape[1:].numel()
    tiles = triton.cdiv(length, config.block)
    programs = 1 if tiles <= config.alone else min(tiles, config.programs)
    fixed = kept, history, slots, weights, bias, history.stride(0), length, window, config.block
    errors = Launch(_forecast_errors_kernel, programs, fixed, num_warps=config.warps)
    parts = torch.empty(programs, 2, dtype=torch.float32, device=history.device)
    add_up = prepare_sum(parts, config.warps)

    def compare(sums: Tensor, truth: Tensor) -> None:
        if truth.shape != shape or truth.dtype != history.dtype or not truth.is_contiguous():
            check_feature("truth", truth, history)
        if not length:
            sums.zero_()
        elif programs == 1:
            errors(sums, truth)
        else:
            errors(parts, truth)
            add_up(sums)

    return compare


def launch_forecast_errors(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    truth: Tensor,
    config: ErrorsConfig = ErrorsConfig(),  # noqa: B008 - immutable
) -> Tensor:
    """Both sums [2] float32 of one truth; see `prepare_forecast_errors` for arguments and errors."""
    sums = torch.empty(2, dtype=torch.float32, device=history.device)
    prepare_forecast_errors(history, slots, weights, bias, None, config)(sums, truth)
    return sums
