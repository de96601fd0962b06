"""The oracle against closed forms that share no code with it."""

import pytest
import torch

from lesa.ops.reference import bspline_basis, bspline_grid, forecast, kan_layer

LOW, HIGH, INTERVALS, ORDER = -3.0, 3.0, 5, 3
SPACING = (HIGH - LOW) / INTERVALS
GRID = bspline_grid(INTERVALS, ORDER, (LOW, HIGH))


def cardinal(u: torch.Tensor) -> torch.Tensor:
    """The cubic B-spline with knots 0, 1, 2, 3, 4, from its four polynomial pieces."""
    v = (u - 2).abs()
    inner = 2 / 3 - v**2 + v**3 / 2
    outer = (2 - v) ** 3 / 6
    return torch.where(v < 1, inner, torch.where(v < 2, outer, torch.zeros_like(v)))


def closed_form(x: torch.Tensor) -> torch.Tensor:
    shift = torch.arange(INTERVALS + ORDER, dtype=x.dtype) - ORDER
    return cardinal((x.unsqueeze(-1) - LOW) / SPACING - shift)


def test_grid_is_the_range_and_its_extension():
    assert GRID.dtype == torch.float64
    expected = [LOW + SPACING * i for i in range(-ORDER, INTERVALS + ORDER + 1)]
    torch.testing.assert_close(GRID, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (GRID[ORDER], GRID[-ORDER - 1]) == (LOW, HIGH)


def test_cubic_basis_is_the_cardinal_spline():
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    basis = bspline_basis(x, GRID, ORDER)
    assert basis.shape == (1601, INTERVALS + ORDER)
    torch.testing.assert_close(basis, closed_form(x), rtol=0, atol=1e-14)


def test_values_at_the_ends_of_the_range():
    ends = bspline_basis(torch.tensor([LOW, HIGH], dtype=torch.float64), GRID, ORDER)
    expected = torch.zeros(2, 8, dtype=torch.float64)
    expected[0, :3] = expected[1, 5:] = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    torch.testing.assert_close(ends, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_bases_sum_to_one_inside_and_vanish_outside(order):
    grid = bspline_grid(INTERVALS, order, (LOW, HIGH))
    inside = torch.linspace(LOW, HIGH - (1e-9 if order == 0 else 0), 1001, dtype=torch.float64)
    basis = bspline_basis(inside, grid, order)
    assert basis.shape[-1] == INTERVALS + order
    torch.testing.assert_close(basis.sum(-1), torch.ones_like(inside), rtol=0, atol=1e-13)
    assert (basis >= 0).all()
    outside = torch.stack([grid[0] - 1e-9, grid[0] - 5, grid[-1] + 1e-9, grid[-1] + 5, grid[-1]])
    assert (bspline_basis(outside, grid, order) == 0).all()


def test_basis_on_uneven_knots():
    """Against the quadratic B-spline worked out by hand on knots 0, 1, 3, 6."""
    knots = torch.tensor([0.0, 1.0, 3.0, 6.0], dtype=torch.float64)
    x = torch.tensor([0.5, 1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    by_hand = [0.25 / 3, 1 / 3, 2 / 3 * 1 / 2 + 4 / 5 * 1 / 2, 3 / 5, 1 / 15]
    expected = torch.tensor(by_hand, dtype=torch.float64)
    torch.testing.assert_close(bspline_basis(x, knots, 2).squeeze(-1), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("derivative", [0, 1, 2])
def test_derivatives_are_continuous_at_the_knots(derivative):
    def value(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        columns = []
        for m in range(INTERVALS + ORDER):
            y = bspline_basis(x, GRID, ORDER)[:, m]
            for _ in range(derivative):
                (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            columns.append(y.detach())
        return torch.stack(columns, -1)

    eps = 1e-7
    below, above = value(GRID - eps), value(GRID + eps)
    torch.testing.assert_close(below, above, rtol=0, atol=10 * eps)
    assert above.abs().max() > 0.1


def test_basis_gradients():
    x = torch.linspace(-4.05, 4.15, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bspline_basis(x, GRID, ORDER), x)


def test_basis_keeps_shape_and_dtype():
    x = torch.zeros(2, 3, 4)
    basis = bspline_basis(x, GRID, ORDER)
    assert basis.shape == (2, 3, 4, 8) and basis.dtype == torch.float32


def layer_arguments(inputs: int, outputs: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(outputs, inputs), (outputs, inputs, INTERVALS + ORDER), (outputs, inputs)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def test_kan_layer_is_one_function_an_edge():
    base, coefficients, scale = layer_arguments(inputs=5, outputs=3, seed=1)
    x = torch.linspace(-5, 5, 20, dtype=torch.float64).reshape(4, 5)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for q in range(3):
        for i in range(5):
            v = x[:, i]
            spline = (coefficients[q, i] * closed_form(v)).sum(-1)
            expected[:, q] += base[q, i] * v / (1 + torch.exp(-v)) + scale[q, i] * spline
    actual = kan_layer(x, base, coefficients, scale, GRID, ORDER)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_kan_layer_gradients():
    x = torch.linspace(-3.9, 4.1, 4, dtype=torch.float64, requires_grad=True)
    parameters = [tensor.requires_grad_() for tensor in layer_arguments(inputs=4, outputs=2, seed=2)]
    assert torch.autograd.gradcheck(lambda *args: kan_layer(*args, GRID, ORDER), (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forecast_is_the_weighted_sum(dtype):
    features = torch.randn(4, 2, 3, dtype=dtype, generator=torch.Generator().manual_seed(3))
    weights = [0.5, -2.0, 0.0, 2.25]
    expected = sum(w * f.double() for w, f in zip(weights, features, strict=True)) + 0.125
    actual = forecast(features, weights, 0.125)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)
    torch.testing.assert_close(forecast(features, torch.tensor(weights), 0.125), actual, rtol=0, atol=0)
