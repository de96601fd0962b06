"""The mathematics in plain torch: the oracle that kernels and plans are judged against.

Every function works in the dtype of its first tensor argument; give float64 for reference values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def forecast(features: Tensor, weights: Tensor | Sequence[float], bias: float | Tensor = 0.0) -> Tensor:
    """Weighted sum of cached features: F^ = sum_k weights[k] * features[k] + bias.

    Args:
        features: [K, ...].
        weights: [K].
        bias: a scalar, added to every element.

    Returns:
        [...], the dtype of `features`.
    """
    weights = torch.as_tensor(weights, dtype=features.dtype, device=features.device)
    return torch.tensordot(weights, features, dims=1) + bias


def bspline_grid(
    intervals: int, order: int, grid_range: tuple[float, float], dtype: torch.dtype = torch.float64
) -> Tensor:
    """Uniform knots over `grid_range`, carried on by `order` intervals at both ends.

    Returns:
        [intervals + 2 * order + 1], ascending.
    """
    low, high = grid_range
    steps = torch.arange(-order, intervals + order + 1, dtype=torch.float64)
    return (low + steps * ((high - low) / intervals)).to(dtype)


def bspline_basis(x: Tensor, grid: Tensor, order: int) -> Tensor:
    """All B-spline bases at `x`, by the Cox-de Boor recursion.

    B_{i,0}(x) = 1 on [g_i, g_{i+1}), else 0;
    B_{i,p}(x) = (x - g_i) / (g_{i+p} - g_i) B_{i,p-1}(x)
                 + (g_{i+p+1} - x) / (g_{i+p+1} - g_{i+1}) B_{i+1,p-1}(x).
    They sum to one inside the range the grid was extended from and vanish outside the grid.

    Args:
        x: [...].
        grid: [G], strictly ascending knots, G >= order + 2.
        order: p, the degree of the pieces; 3 is cubic.

    Returns:
        [..., G - 1 - order], the dtype of `x`.
    """
    grid = grid.to(x)
    x = x.unsqueeze(-1)
    basis = ((x >= grid[:-1]) & (x < grid[1:])).to(x.dtype)
    for p in range(1, order + 1):
        rising = (x - grid[: -p - 1]) / (grid[p:-1] - grid[: -p - 1])
        falling = (grid[p + 1 :] - x) / (grid[p + 1 :] - grid[1:-p])
        basis = rising * basis[..., :-1] + falling * basis[..., 1:]
    return basis


def kan_layer(x: Tensor, base_weight: Tensor, spline_weight: Tensor, scale: Tensor, grid: Tensor, order: int) -> Tensor:
    """One Kolmogorov-Arnold layer (Eq. 9): y_q = sum_i phi_qi(x_i), one learnable function an edge.

    phi_qi(v) = base_weight_qi * silu(v) + scale_qi * sum_m spline_weight_qim * B_m(v).

    Args:
        x: [..., I].
        base_weight: [Q, I].
        spline_weight: [Q, I, M], M = len(grid) - 1 - order.
        scale: [Q, I].
        grid: knots, see `bspline_grid`.
        order: degree of the spline pieces.

    Returns:
        [..., Q].
    """
    basis = bspline_basis(x, grid, order)
    spline = (spline_weight * scale.unsqueeze(-1)).flatten(1)
    return F.linear(F.silu(x), base_weight) + F.linear(basis.flatten(-2), spline)
