"""How far a forecast is from the truth: two sums in one pass over the features and the truth.

Legend: H ring slots, K window, L elements of a feature, S stride between slots, P partial sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_feature, check_history, check_row
from .forecast import prepare_sum
from .launches import Launch


class ErrorsConfig(NamedTuple):
    """How the sums are cut: elements a tile, tiles that one program takes alone, programs at most, warps a program.

    Nothing here follows the machine: the order of the additions is part of the result.
    """

    block: int = 1024
    alone: int = 16  # a second launch takes longer
    programs: int = 1024
    warps: int = 4


@triton.jit
def _forecast_errors_kernel(
    p_part, p_truth, p_kept, p_history, p_slots, p_weights, p_bias, S, L, K: tl.constexpr, BLOCK: tl.constexpr
):
    i_program = tl.program_id(0)
    o_tile = tl.arange(0, BLOCK)
    bias = tl.load(p_bias)
    b_error = tl.zeros([BLOCK], tl.float32)
    b_square = tl.zeros([BLOCK], tl.float32)
    i_start = i_program.to(tl.int64) * BLOCK
    for _ in range(i_program, tl.cdiv(L, BLOCK), tl.num_programs(0)):
        left = tl.minimum(L - i_start, BLOCK).to(tl.int32)
        b_given = tl.load(p_truth + i_start + o_tile, mask=o_tile < left, other=0.0)
        b_truth = b_given.to(tl.float32)
        b_forecast = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            i_slot = tl.load(p_slots + k).to(tl.int64)
            weight = tl.where(i_slot >= 0, tl.load(p_weights + k), 0.0)
            m_tile = o_tile < tl.where(i_slot >= 0, left, 0)
            b_feature = tl.load(p_history + i_slot * S + i_start + o_tile, mask=m_tile, other=0.0)
            b_forecast += weight * b_feature.to(tl.float32)
        b_miss = tl.where(o_tile < left, b_forecast + bias - b_truth, 0.0)
        b_error += b_miss * b_miss
        b_square += b_truth * b_truth
        if p_kept is not None:
            tl.debug_barrier()  # it may be a slot that the row reads
            tl.store(p_kept + i_start + o_tile, b_given, mask=o_tile < left)
        i_start += tl.num_programs(0) * BLOCK
    tl.store(p_part + i_program * 2, tl.sum(b_error, 0))
    tl.store(p_part + i_program * 2 + 1, tl.sum(b_square, 0))


def prepare_forecast_errors(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    kept: Tensor | None = None,
    config: ErrorsConfig = ErrorsConfig(),  # noqa: B008 - immutable
) -> Callable[[Tensor, Tensor], None]:
    """What compares the forecast of one row, F^ = sum_k weights[k] * history[slots[k]] + bias, with one truth or many.

    Args:
        history: [H, *feature] float32, float16 or bfloat16, dense features.
        slots: [K] int32, -1 for an unused entry.
        weights: [K] float32.
        bias: one float32.
        kept: [*feature] in the history's dtype, contiguous, where each truth is copied to; it may be a feature that
            the row reads. None copies nothing.
        config: how the work is cut; it sets the order of the additions.

    Returns:
        Called with sums [2] float32, on the device or in pinned memory, and a truth [*feature] in the history's dtype,
        contiguous, it writes sum (F^ - truth)^2 and sum truth^2 to sums, in an order that depends on sizes and on
        which addresses are multiples of 16.

    Raises:
        ValueError: an argument has a dtype, shape or stride that is not as said; of a truth when it is given.
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
