"""What the KAN's kernels share, cubic B-splines in closed form and tiles of edges; and the backward kernel.

Of M bases on intervals of width h, whose middle is c, basis m is symmetric about u = m - (M - 1) / 2, where
u = (x - c) / h is the position of x. With w the distance from there,

    B_m(x) = (a^3 - 4 b^3) / 6,   a = max(2 - |w|, 0),   b = max(1 - |w|, 0),

which is zero beyond |w| = 2, so also beyond the grid extended by 3 intervals at both ends. At any x at most four bases
are nonzero. Functions named `..6` leave out the factor 1 / 6; the caller applies it once to a whole sum.

A position is kept as the nearest whole number and the rest: one float32 of u would lose digits of w near the ends of a
fine grid, which the derivative of a spline would show. h comes in two parts; the first has so few bits that its
multiples are exact.

The backward kernel, which `kan.py` launches: with g = dy and the moments A_qim = sum_t g_tq B_m(x_ti):

    d base = g^T silu(x),   d spline = scale A,   d scale = sum_m spline A,
    dx_ti = sum_q g_tq (base_qi silu'(x_ti) + scale_qi sum_m spline_qim B'_m(x_ti)),

so the backward saves x and the parameters only. One launch does all: a program computes a tile either of dx or of the
parameters' gradients.

Legend: T steps, X inputs, Q outputs, M spline bases, MP bases padded to a power of two, BQ, BX edges a tile,
DT, DQ, DX rows, outputs and inputs of a tile of dx; others as in kan.py.
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


@triton.jit
def _grad_x(
    p_dx,
    p_grad,
    p_x,
    p_base,
    p_spline,
    p_scale,
    i_x,
    T,
    X,
    Q,
    ST,
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
    PRECISION: tl.constexpr,
):
    # One tile of dx: the pointers point at its first row, and its first input is i_x.
    o_t, o_m, o_x = tl.arange(0, BT), tl.arange(0, MP), i_x + tl.arange(0, BX)
    if FORM == "dot":
        b_base_sum = tl.zeros([BT, BX], tl.float32)
        b_spline_sum = tl.zeros([BT, BX * MP], tl.float32)
        for i_q in range(0, Q, BQ):
            o_q = i_q + tl.arange(0, BQ)
            b_grad = load_rows(p_grad, o_t, o_q, T, Q, Q)
            b_base, b_spline, b_scale = load_edges(p_base, p_spline, p_scale, o_q, i_x, Q, X, M, MP, BX)
            b_spline = tl.reshape(b_spline * b_scale[:, :, None], [BQ, BX * MP])
            b_spline_sum += product(b_grad, b_spline, SIXTH, PRECISION)
            b_base_sum += product(2.0 * b_grad, b_base, 0.5, PRECISION)
        b_x = load_rows(p_x, o_t, o_x, T, X, ST)
        b_cell, b_rest = position(b_x, middle, inverse, width, width_rest)
        b_derivative = derivative6(b_cell[:, :, None], b_rest[:, :, None], o_m[None, None, :], M)
        b_splines = tl.sum(tl.reshape(b_spline_sum, [BT, BX, MP]) * b_derivative, 2) * inverse
        b_dx = b_splines + b_base_sum * silu_derivative(b_x)
    else:
        b_x = tl.load(p_x + o_x, mask=o_x < X, other=0.0).to(tl.float32)
        b_cell, b_rest = position(b_x, middle, inverse, width, width_rest)
        b_derivative = derivative6(b_cell[:, None], b_rest[:, None], o_m[None, :], M) * inverse
        b_silu = silu_derivative(b_x)
        b_sum = tl.zeros([BQ, BX], tl.float32)
        for i_q in range(0, Q, BQ):
            o_q = i_q + tl.arange(0, BQ)
            b_grad = tl.load(p_grad + o_q, mask=o_q < Q, other=0.0).to(tl.float32)
            b_base, b_spline, b_scale = load_edges(p_base, p_spline, p_scale, o_q, i_x, Q, X, M, MP, BX)
            b_sum += b_grad[:, None] * apply_edges(b_base, b_spline, b_scale, b_silu, b_derivative)
        b_dx = tl.sum(b_sum, 0)[None, :]
    m_dx = (o_t < T)[:, None] & (o_x < X)[None, :]
    tl.store(p_dx + o_t[:, None] * X + o_x[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_dx)


@triton.jit
def _grad_edges(
    p_dbase,
    p_dspline,
    p_dscale,
    p_grad,
    p_x,
    p_spline,
    p_scale,
    i_x,
    T,
    X,
    Q,
    Q_left,
    ST,
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
    PRECISION: tl.constexpr,
):
    # One tile of the parameters' gradients: the pointers point at its first output, and its first input is i_x.
    o_q, o_m, o_x = tl.arange(0, BQ), tl.arange(0, MP), i_x + tl.arange(0, BX)
    b_dbase = tl.zeros([BQ, BX], tl.float32)
    if FORM == "dot":
        b_flat = tl.zeros([BQ, BX * MP], tl.float32)
        for i_t in range(0, T, BT):
            o_t = i_t + tl.arange(0, BT)
            b_grad = tl.trans(load_rows(p_grad, o_t, o_q, T, Q_left, Q))
            b_x = load_rows(p_x, o_t, o_x, T, X, ST)
            b_cell, b_rest = position(b_x, middle, inverse, width, width_rest)
            b_basis = basis6(b_cell[:, :, None], b_rest[:, :, None], o_m[None, None, :], M)
            # Rows beyond T have a gradient of 0.
            b_flat += product(b_grad, tl.reshape(b_basis, [BT, BX * MP]), SIXTH, PRECISION)
            b_dbase += product(2.0 * b_grad, silu(b_x), 0.5, PRECISION)
        b_moment = tl.reshape(b_flat, [BQ, BX, MP])
    else:
        b_moment = tl.zeros([BQ, BX, MP], tl.float32)
        for i_t in range(0, T, BT):
            o_t = i_t + tl.arange(0, BT)
            b_grad = load_rows(p_grad, o_t, o_q, T, Q_left, Q)
            b_x = load_rows(p_x, o_t, o_x, T, X, ST)
            b_cell, b_rest = position(b_x, middle, inverse, width, width_rest)
            b_basis = basis6(b_cell[:, :, None], b_rest[:, :, None], o_m[None, None, :], M) * SIXTH
            b_moment += tl.sum(b_grad[:, :, None, None] * b_basis[:, None, :, :], 0)
            b_dbase += tl.sum(b_grad[:, :, None] * silu(b_x)[:, None, :], 0)
    o_edge = o_q[:, None] * X + o_x[None, :]
    m_edge = (o_q < Q_left)[:, None] & (o_x < X)[None, :]
    o_spline = o_edge[:, :, None] * M + o_m[None, None, :]
    m_spline = m_edge[:, :, None] & (o_m < M)[None, None, :]
    b_spline = load_splines(p_spline, o_q, i_x, Q_left, X, M, MP, BX)
    b_scale = load_rows(p_scale, o_q, o_x, Q_left, X, X)
    tl.store(p_dbase + o_edge, b_dbase.to(p_dbase.dtype.element_ty), mask=m_edge)
    tl.store(p_dscale + o_edge, tl.sum(b_spline * b_moment, 2).to(p_dscale.dtype.element_ty), mask=m_edge)
    b_dspline = b_scale[:, :, None] * b_moment
    tl.store(p_dspline + o_spline, b_dspline.to(p_dspline.dtype.element_ty), mask=m_spline)


@triton.jit
def _kan_bwd_kernel(
    p_dx,
    p_dbase,
    p_dspline,
    p_dscale,
    p_grad,
    p_x,
    p_base,
    p_spline,
    p_scale,
    T,
    X,
    Q,
    SE,
    ST,
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
    DT: tl.constexpr,
    DQ: tl.constexpr,
    DX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_e = tl.program_id(1).to(tl.int64)
    o_first = i_e * Q * X
    p_x += i_e * SE
    p_grad += i_e * T * Q
    p_base, p_spline, p_scale = p_base + o_first, p_spline + o_first * M, p_scale + o_first
    # Programs of dx come first: they run longest, so the last programs to finish are short ones.
    n_dx = 0
    if p_dx is not None:
        n_dx = tl.cdiv(T, DT) * tl.cdiv(X, DX)
    if i_program < n_dx:
        if p_dx is not None:
            i_t = (i_program // tl.cdiv(X, DX)).to(tl.int64) * DT
            i_x = i_program % tl.cdiv(X, DX) * DX
            p_dx += (i_e * T + i_t) * X
            p_grad += i_t * Q
            p_x += i_t * ST
            # fmt: off
            _grad_x(p_dx, p_grad, p_x, p_base, p_spline, p_scale, i_x, T - i_t, X, Q, ST,
                    middle, inverse, width, width_rest, M, MP, FORM, DT, DQ, DX, PRECISION)
            # fmt: on
    else:
        i_tile = i_program - n_dx
        i_q = (i_tile // tl.cdiv(X, BX)).to(tl.int64) * BQ
        i_x = i_tile % tl.cdiv(X, BX) * BX
        o_local = i_q * X
        o_first += o_local
        # fmt: off
        _grad_edges(p_dbase + o_first, p_dspline + o_first * M, p_dscale + o_first, p_grad + i_q, p_x,
                    p_spline + o_local * M, p_scale + o_local, i_x, T, X, Q, Q - i_q, ST,
                    middle, inverse, width, width_rest, M, MP, FORM, BT, BQ, BX, PRECISION)
        # fmt: on
