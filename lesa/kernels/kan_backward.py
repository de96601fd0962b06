"""The backward kernel of a KAN layer, which `kan.py` launches.

With g = dy and the moments A_qim = sum_t g_tq B_m(x_ti):

    d base = g^T silu(x),   d spline = scale A,   d scale = sum_m spline A,
    dx_ti = sum_q g_tq (base_qi silu'(x_ti) + scale_qi sum_m spline_qim B'_m(x_ti)),

so the backward saves x and the parameters only. One launch does all: a program computes a tile either of dx or of the
parameters' gradients.

Legend: as in kan.py; DT, DQ, DX are rows, outputs and inputs of a tile of dx.
"""

import triton
import triton.language as tl

from .spline import (
    SIXTH,
    apply_edges,
    basis6,
    derivative6,
    load_edges,
    load_rows,
    load_splines,
    position,
    product,
    silu,
    silu_derivative,
)


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
