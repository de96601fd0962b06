"""How far a forecast is from the truth: two sums in one pass over the features and the truth.

Legend: H ring slots, K window, L elements of a feature, S stride between slots, P partial sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_feature, check_history, check_row, guard
from .forecast import sum_parts


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
    p_part, p_history, p_slots, p_weights, p_bias, p_truth, S, L, K: tl.constexpr, BLOCK: tl.constexpr
):
    i_program = tl.program_id(0)
    o_tile = tl.arange(0, BLOCK)
    bias = tl.load(p_bias)
    b_error = tl.zeros([BLOCK], tl.float32)
    b_square = tl.zeros([BLOCK], tl.float32)
    i_start = i_program.to(tl.int64) * BLOCK
    for _ in range(i_program, tl.cdiv(L, BLOCK), tl.num_programs(0)):
        left = tl.minimum(L - i_start, BLOCK).to(tl.int32)
        b_truth = tl.load(p_truth + i_start + o_tile, mask=o_tile < left, other=0.0).to(tl.float32)
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
        i_start += tl.num_programs(0) * BLOCK
    tl.store(p_part + i_program * 2, tl.sum(b_error, 0))
    tl.store(p_part + i_program * 2 + 1, tl.sum(b_square, 0))


def launch_forecast_errors(
    history: Tensor,
    slots: Tensor,
    weights: Tensor,
    bias: Tensor,
    truth: Tensor,
    config: ErrorsConfig = ErrorsConfig(),  # noqa: B008 - immutable
) -> Tensor:
    """sum (F^ - truth)^2 and sum truth^2 with F^ = sum_k weights[k] * history[slots[k]] + bias, in a fixed order.

    Args:
        history: [H, *feature] float32, float16 or bfloat16, dense features.
        slots: [K] int32, -1 for an unused entry.
        weights: [K] float32.
        bias: one float32.
        truth: [*feature] in the history's dtype, contiguous.
        config: how the work is cut; it sets the order of the additions.

    Returns:
        [2] float32.

    Raises:
        ValueError: an argument has a dtype, shape or stride that is not as said.
    """
    check_history(history)
    window = check_row(slots, None, weights=weights, bias=bias)
    check_feature("truth", truth, history)
    length = truth.numel()
    if length == 0:
        return torch.zeros(2, dtype=torch.float32, device=history.device)
    tiles = triton.cdiv(length, config.block)
    programs = 1 if tiles <= config.alone else min(tiles, config.programs)
    parts = torch.empty(programs, 2, dtype=torch.float32, device=history.device)
    with guard(history):
        _forecast_errors_kernel[(programs,)](
            parts,
            history,
            slots,
            weights,
            bias,
            truth,
            history.stride(0),
            length,
            K=window,
            BLOCK=config.block,
            num_warps=config.warps,
        )
        return parts[0] if programs == 1 else sum_parts(parts, config.warps)
