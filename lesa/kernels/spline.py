"""Shared by the KAN's kernels: cubic B-splines on a uniform grid in closed form, and tiles of edges.

Of M bases on intervals of width h, whose middle is c, basis m is symmetric about u = m - (M - 1) / 2, where
u = (x - c) / h is the position of x. With w the distance from there,

    B_m(x) = (a^3 - 4 b^3) / 6,   a = max(2 - |w|, 0),   b = max(1 - |w|, 0),

which is zero beyond |w| = 2, so also beyond the grid extended by 3 intervals at both ends. At any x at most four bases
are nonzero. Functions named `..6` leave out the factor 1 / 6; the caller applies it once to a whole sum.

A position is kept as the nearest whole number and the rest: one float32 of u would lose digits of w near the ends of a
fine grid, which the derivative of a spline would show. h comes in two parts; the first has so few bits that its
multiples are exact.

Legend: T steps, X inputs, Q outputs, M spline bases, MP bases padded to a power of two, BQ, BX edges a tile.
"""

import math

import triton
import triton.language as tl

SIXTH = tl.constexpr(1 / 6)


@triton.jit
def position(b_x, middle, inverse, width, width_rest):
    """u of the inputs x: the nearest whole number, and the rest."""
    b_x -= middle
    b_cell = tl.floor(b_x * inverse + 0.5)
    return b_cell, ((b_x - b_cell * width) - b_cell * width_rest) * inverse


@triton.jit
def basis6(b_cell, b_rest, o_m, M: tl.constexpr):
    """6 B_m at the positions u."""
    b_far = tl.maximum(2.0 - tl.abs(b_cell - (o_m - 0.5 * (M - 1)) + b_rest), 0.0)
    b_near = tl.maximum(b_far - 1.0, 0.0)
    return b_far * b_far * b_far - 4.0 * (b_near * b_near * b_near)


@triton.jit
def derivative6(b_cell, b_rest, o_m, M: tl.constexpr):
    """6 dB_m / du at the positions u."""
    b_w = b_cell - (o_m - 0.5 * (M - 1)) + b_rest
    b_far = tl.maximum(2.0 - tl.abs(b_w), 0.0)
    b_near = tl.maximum(b_far - 1.0, 0.0)
    b_derivative = 12.0 * b_near * b_near - 3.0 * b_far * b_far
    return tl.where(b_w < 0, -b_derivative, b_derivative)


@triton.jit
def silu(b_x):
    return b_x * tl.sigmoid(b_x)


@triton.jit
def silu_derivative(b_x):
    b_sigmoid = tl.sigmoid(b_x)
    return b_sigmoid * (1.0 + b_x * (1.0 - b_sigmoid))


@triton.jit
def load_rows(p_rows, o_row, o_column, ROWS, COLUMNS, STRIDE):
    """A tile of a matrix as float32, 0 beyond its ends."""
    m_tile = (o_row < ROWS)[:, None] & (o_column < COLUMNS)[None, :]
    o_tile = o_row.to(tl.int64)[:, None] * STRIDE + o_column[None, :]
    return tl.load(p_rows + o_tile, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def load_splines(p_spline, o_q, i_x, Q, X, M: tl.constexpr, MP: tl.constexpr, BX: tl.constexpr):
    """Coefficients [BQ, BX, MP] of the edges from i_x and its neighbours to o_q as float32, 0 beyond the ends."""
    o_flat = tl.arange(0, BX * MP)
    o_row = o_q[:, None] * (X * M)
    if M == MP:
        # One long row: with two indices, some compilers let neighbouring threads load distant edges.
        o_flat += i_x * M
        m_flat = o_flat < X * M
    else:
        m_flat = (i_x + o_flat // MP < X) & (o_flat % MP < M)
        o_flat = (i_x + o_flat // MP) * M + o_flat % MP
    m_spline = (o_q < Q)[:, None] & m_flat[None, :]
    b_spline = tl.load(p_spline + o_row + o_flat[None, :], mask=m_spline, other=0.0).to(tl.float32)
    return tl.reshape(b_spline, [o_q.shape[0], BX, MP])


@triton.jit
def load_edges(p_base, p_spline, p_scale, o_q, i_x, Q, X, M: tl.constexpr, MP: tl.constexpr, BX: tl.constexpr):
    """Base and scale [BQ, BX] and coefficients [BQ, BX, MP] of the edges from i_x and its neighbours to o_q."""
    o_x = i_x + tl.arange(0, BX)
    b_spline = load_splines(p_spline, o_q, i_x, Q, X, M, MP, BX)
    return load_rows(p_base, o_q, o_x, Q, X, X), b_spline, load_rows(p_scale, o_q, o_x, Q, X, X)


@triton.jit
def apply_edges(b_base, b_spline, b_scale, b_silu, b_basis6):
    """phi_qi [BQ, BX]: base_qi silu_i + scale_qi sum_m spline_qim basis_im; its derivative, given both derivatives.

    b_silu is [BX], b_basis6 [BX, MP].
    """
    b_sum = tl.sum(b_spline * b_basis6[None, :, :], 2) * SIXTH
    return b_base * b_silu[None, :] + b_scale * b_sum


@triton.jit
def _split(b_x):
    # The nearest number of 11 significant bits, and the rest, which fits 12 bits and a sign.
    b_high = ((b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return b_high, b_x - b_high


@triton.jit
def product(b_left, b_right, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """FACTOR times the product, in plain float32 ("ieee") or on tensor cores ("tf32x3"), as one term of a longer sum.

    Tensor cores multiply 11 bits of each operand, so both are split in two. They round every sum towards zero, so only
    short sums are as exact as float32. The factor must not be 1: it keeps the compiler from merging the caller's sum
    into theirs.
    """
    if PRECISION == "tf32x3":
        b_left, b_left_rest = _split(b_left)
        b_right, b_right_rest = _split(b_right)
        b_sum = tl.dot(b_left_rest, b_right, input_precision="tf32")
        b_sum = tl.dot(b_left, b_right_rest, b_sum, input_precision="tf32")
        return tl.dot(b_left, b_right, b_sum, input_precision="tf32") * FACTOR
    else:
        return tl.dot(b_left, b_right, input_precision=PRECISION) * FACTOR


def grid_numbers(bases: int, low: float, high: float) -> tuple[float, float, float, float]:
    """The last arguments of `position`: middle of the grid, 1 / h, and h in two parts, the first of 12 bits."""
    width = (high - low) / (bases - 3)
    mantissa, exponent = math.frexp(width)
    rounded = math.ldexp(round(math.ldexp(mantissa, 12)), exponent - 12)
    return (low + high) / 2, 1 / width, rounded, width - rounded
