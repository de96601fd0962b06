"""A KAN layer for a batch of experts, forward and backward.

    y_tq = sum_i base_qi silu(x_ti) + scale_qi sum_m spline_qim B_m(x_ti)

A tile of rows times a tile of edges is a matrix product over the flat index (i, m), [BT, BX MP] x [BX MP, BQ], with
the bases in closed form. Few rows or few outputs are summed without a product. If there are few tiles, each program
sums only a span of the inputs, and a second launch adds up the spans. Everything else is one launch. The header of
kan_backward.py derives the gradients; the backward saves the inputs only.

Legend: E experts, T steps, X inputs, Q outputs, M spline bases, MP bases padded to a power of two, SE, ST strides of x,
BT, BQ, BX rows, outputs and inputs a tile, SPLIT parts of a tile's inputs that are summed apart, SPAN inputs a program.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kan_backward import (
    SIXTH,
    _kan_bwd_kernel,
    apply_edges,
    basis6,
    grid_numbers,
    load_edges,
    load_rows,
    load_splines,
    position,
    product,
    silu,
)
from .launch import guard, padded

# A product reads at least 16 rows. Up to so many rows or outputs, a loop over them is less work.
_FEW = 4
# Up to so many elements of y, a program of the forward takes a span of the inputs.
_SMALL = 1 << 16


class ForwardConfig(NamedTuple):
    """Tiling of a forward.

    Args:
        form: "rows" sums one row over a tile of edges, "dot" multiplies tiles of at least 16 rows and inputs.
        rows, outputs, inputs: sizes of the tile, powers of two.
        split: parts of the tile's inputs, each summed by other warps ("dot").
        precision: of products, "ieee" or "tf32x3".
        warps: warps a program.
        stages: depth of the pipeline of loads.
        span: inputs a program sums, a multiple of `inputs`; 0 for all. The sums of the spans are added up afterwards.
    """

    form: str
    rows: int
    outputs: int
    inputs: int
    split: int = 1
    precision: str = "tf32x3"
    warps: int = 4
    stages: int = 2
    span: int = 0


class BackwardConfig(NamedTuple):
    """Tiling of a backward, see ForwardConfig: tiles of the parameters' gradients and of dx (1 row in "rows")."""

    form: str
    rows: int
    outputs: int
    inputs: int
    dx_rows: int
    dx_outputs: int
    dx_inputs: int
    precision: str = "tf32x3"
    warps: int = 4
    stages: int = 2


def forward_config(steps: int, inputs: int, outputs: int, bases: int) -> ForwardConfig:
    """The tiling for x [*, steps, inputs] and `outputs` outputs."""
    if min(steps, outputs) <= _FEW:
        return ForwardConfig("rows", 1, min(2, padded(outputs)), min(256, padded(inputs)))
    # With few tiles, one program that goes through all inputs takes longest.
    if inputs > 64 and steps * outputs <= _SMALL:
        return ForwardConfig("dot", 16, 32, max(4, 64 // padded(bases)), split=4, stages=3, span=64)
    return ForwardConfig("dot", 16, 16, max(4, 128 // padded(bases)), split=4)


def backward_config(steps: int, inputs: int, outputs: int, bases: int) -> BackwardConfig:
    """The tiling for x [*, steps, inputs] and `outputs` outputs."""
    wide = min(128, padded(outputs))
    if steps <= _FEW:
        return BackwardConfig("rows", 1, min(8, wide), min(32, padded(inputs)), 1, wide, min(64, 512 // wide))
    if outputs <= _FEW:
        return BackwardConfig("rows", min(64, padded(steps)), 1, max(1, 64 // padded(bases)), 1, wide, 64 // wide)
    per_base = max(1, 8 // padded(bases))
    return BackwardConfig("dot", 32, 64, 8 * per_base, 64, 32, 4 * per_base)


@triton.jit
def _split_product(
    b_rows,
    b_edges,
    FACTOR: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    SPLIT: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # [SPLIT, BT, BQ]: each warp sums PART terms of all outputs, so no two warps read the same operands.
    b_rows = tl.permute(tl.reshape(b_rows, [BT, SPLIT, PART]), (1, 0, 2))
    b_edges = tl.permute(tl.reshape(b_edges, [BQ, SPLIT, PART]), (1, 2, 0))
    return product(b_rows, b_edges, FACTOR, PRECISION)


@triton.jit
def _kan_fwd_kernel(
    p_y,
    p_x,
    p_base,
    p_spline,
    p_scale,
    T,
    X,
    Q,
    SE,
    ST,
    SPAN,
    middle,
    inverse,
    width,
    width_rest,
    M: tl.constexpr,
    MP: tl.constexpr,
    FORM: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BX: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64) * BT
    i_q = tl.program_id(1).to(tl.int64) * BQ
    # Spans of one expert's inputs are neighbours.
    n_span = tl.cdiv(X, SPAN)
    i_span = tl.program_id(2) % n_span
    i_e = (tl.program_id(2) // n_span).to(tl.int64)
    E = tl.num_programs(2) // n_span
    p_x += i_e * SE + i_t * ST
    p_y += ((i_span * E + i_e) * T + i_t) * Q + i_q
    i_first = i_span * SPAN
    i_end = tl.minimum(X, i_first + SPAN)
    o_first = (i_e * Q + i_q) * X
    p_base, p_spline, p_scale = p_base + o_first, p_spline + o_first * M, p_scale + o_first
    o_t, o_q, o_m = tl.arange(0, BT), tl.arange(0, BQ), tl.arange(0, MP)
    T, Q_left = T - i_t, Q - i_q
    if FORM == "dot":
        b_parts = tl.zeros([SPLIT, BT, BQ], tl.float32)
        for i_x in range(i_first, i_end, 16 * SPLIT):
            o_x = i_x + tl.arange(0, 16 * SPLIT)
            b_silu = 2.0 * silu(load_rows(p_x, o_t, o_x, T, i_end, ST))
            b_base = load_rows(p_base, o_q, o_x, Q_left, i_end, X)
            b_parts += _split_product(b_silu, b_base, 0.5, BT, BQ, SPLIT, 16, PRECISION)
        for i_x in range(i_first, i_end, BX):
            o_x = i_x + tl.arange(0, BX)
            b_x = load_rows(p_x, o_t, o_x, T, X, ST)
            b_cell, b_rest = position(b_x, middle, inverse, width, width_rest)
            b_basis = basis6(b_cell[:, :, None], b_rest[:, :, None], o_m[None, None, :], M)
            b_spline = load_splines(p_spline, o_q, i_x, Q_left, X, M, MP, BX)
            b_spline *= load_rows(p_scale, o_q, o_x, Q_left, X, X)[:, :, None]
            b_parts += _split_product(b_basis, b_spline, SIXTH, BT, BQ, SPLIT, BX // SPLIT * MP, PRECISION)
        b_y = tl.sum(b_parts, 0)
        m_y = (o_t < T)[:, None] & (o_q < Q_left)[None, :]
        tl.store(p_y + o_t[:, None] * Q + o_q[None, :], b_y, mask=m_y)
    else:
        b_sum = tl.zeros([BQ, BX], tl.float32)
        for i_x in range(i_first, i_end, BX):
            o_x = i_x + tl.arange(0, BX)
            b_x = tl.load(p_x + o_x, mask=o_x < X, other=0.0).to(tl.float32)
            b_cell, b_rest = position(b_x, middle, inverse, width, width_rest)
            b_basis = basis6(b_cell[:, None], b_rest[:, None], o_m[None, :], M)
            b_base, b_spline, b_scale = load_edges(p_base, p_spline, p_scale, o_q, i_x, Q_left, X, M, MP, BX)
            b_sum += apply_edges(b_base, b_spline, b_scale, silu(b_x), b_basis)
        tl.store(p_y + o_q, tl.sum(b_sum, 1), mask=o_q < Q_left)


def launch_kan_fwd(
    x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, low: float, high: float, config: ForwardConfig | None = None
) -> Tensor:
    """A layer of cubic splines for E experts.

    Args:
        x: [E, T, X], any strides; 0 over E for one x that all experts read.
        base, scale: [E, Q, X], float32, float16 or bfloat16.
        spline: [E, Q, X, M].
        low, high: range of the grid, which has M - 3 intervals.
        config: the tiling; it sets the order of the additions.

    Returns:
        [E, T, Q] float32.
    """
    experts, steps, inputs = x.shape
    outputs, bases = spline.shape[1], spline.shape[3]
    cut = config or forward_config(steps, inputs, outputs, bases)
    span = cut.span or max(inputs, 1)
    sums = torch.empty(triton.cdiv(inputs, span), experts, steps, outputs, dtype=torch.float32, device=x.device)
    if sums.numel() == 0:
        return sums.new_zeros(sums.shape[1:])
    if x.stride(2) != 1:
        x = x.contiguous()
    with guard(x):
        _kan_fwd_kernel[(triton.cdiv(steps, cut.rows), triton.cdiv(outputs, cut.outputs), experts * len(sums))](
            sums,
            x,
            *(part.contiguous() for part in (base, spline, scale)),
            *(steps, inputs, outputs, x.stride(0), x.stride(1), span),
            *grid_numbers(bases, low, high),
            M=bases,
            MP=padded(bases),
            FORM=cut.form,
            BT=cut.rows,
            BQ=cut.outputs,
            BX=cut.inputs,
            SPLIT=cut.split,
            PRECISION=cut.precision,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    # The last program could do this, but zeroing its counter is a launch too. Torch adds so few terms in a fixed order.
    return sums[0] if len(sums) == 1 else sums.sum(0)


def launch_kan_bwd(
    grad: Tensor,
    x: Tensor,
    base: Tensor,
    spline: Tensor,
    scale: Tensor,
    low: float,
    high: float,
    needs_x: bool,
    config: BackwardConfig | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of `launch_kan_fwd`.

    Args:
        grad: [E, T, Q], of y.
        x, base, spline, scale, low, high: as given to the forward.
        needs_x: whether dx is wanted.
        config: the tiling; it sets the order of the additions.

    Returns:
        dx [E, T, X] in x's dtype or None, and the gradients of base, spline and scale, like these.
    """
    experts, steps, inputs = x.shape
    outputs, bases = spline.shape[1], spline.shape[3]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    dbase, dspline, dscale = (torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (base, spline, scale))
    if dspline.numel() == 0:
        return dx, dbase, dspline, dscale
    if x.stride(2) != 1:
        x = x.contiguous()
    cut = config or backward_config(steps, inputs, outputs, bases)
    tiles = triton.cdiv(outputs, cut.outputs) * triton.cdiv(inputs, cut.inputs)
    if needs_x:
        tiles += triton.cdiv(steps, cut.dx_rows) * triton.cdiv(inputs, cut.dx_inputs)
    with guard(x):
        _kan_bwd_kernel[(tiles, experts)](
            dx,
            dbase,
            dspline,
            dscale,
            grad.contiguous(),
            x,
            *(part.contiguous() for part in (base, spline, scale)),
            *(steps, inputs, outputs, x.stride(0), x.stride(1)),
            *grid_numbers(bases, low, high),
            M=bases,
            MP=padded(bases),
            FORM=cut.form,
            BT=cut.rows,
            BQ=cut.outputs,
            BX=cut.inputs,
            DT=cut.dx_rows,
            DQ=cut.dx_outputs,
            DX=cut.dx_inputs,
            PRECISION=cut.precision,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return dx, dbase, dspline, dscale
