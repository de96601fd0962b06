"""The KAN kernels against the oracle in float64 and its autograd."""

import pytest
import torch
from interpret import DEVICE, DTYPES, assert_close, poisoned

from lesa.kernels.kan import BackwardConfig, ForwardConfig, launch_kan_bwd, launch_kan_fwd
from lesa.ops.reference import bspline_grid, kan_layer

LOW, HIGH = -3.0, 3.0
NAMES = ("y", "dx", "dbase", "dspline", "dscale")
# experts, steps, inputs, outputs, bases
F32, F16 = DTYPES[:2]
# Forward by rows, dot and dot over spans; backward by rows (few steps, few outputs) and dot; tile edges; no elements.
SIZES = [
    ((1, 1, 51, 33, 8), F32),
    ((3, 1, 5, 7, 8), F16),
    ((1, 3, 51, 1, 4), F32),
    ((2, 3, 1, 9, 11), F32),
    ((1, 18, 17, 7, 5), F32),
    ((1, 33, 5, 17, 8), F16),
    ((1, 9, 9, 3, 8), F32),
    ((1, 18, 70, 5, 8), F32),
    ((1, 18, 0, 9, 8), F32),
    ((3, 7, 20, 1, 7), F16),
    ((1, 0, 5, 7, 8), F32),
    ((1, 18, 9, 9, 17), F32),
    *(((2, 18, 9, 17, 8), dtype) for dtype in DTYPES[2:]),
]
ROWS = BackwardConfig("rows", 4, 8, 8, 1, 16, 4)
DOT = BackwardConfig("dot", 16, 16, 2, 32, 32, 4)


@pytest.fixture(autouse=True)
def poison():
    """What a kernel leaves unwritten is NaN."""
    with poisoned():
        yield


def random_layer(seed, experts, steps, inputs, outputs, bases, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    edges = (experts, outputs, inputs)
    parameters = [draw(*edges), draw(*edges, bases), draw(*edges)]
    return draw(experts, steps, outputs), [draw(experts, steps, inputs) * 2.5, *(p.to(dtype) for p in parameters)]


def formula(grad, tensors, dtype):
    """y and all gradients by `lesa.ops.reference.kan_layer` in `dtype`."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    grid = bspline_grid(tensors[2].shape[3] - 3, 3, (LOW, HIGH), dtype).to(DEVICE)
    y = torch.stack([kan_layer(*parts, grid, 3) for parts in zip(*leaves, strict=True)])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


def check(results, grad, tensors, names=NAMES):
    """Every result is about as near to float64 as the plain float32 formula, rounded to the result's dtype."""
    exact, plain = formula(grad, tensors, torch.float64), formula(grad, tensors, torch.float32)
    for name, result, want, usual in zip(NAMES, results, exact, plain, strict=True):
        if name in names and result.numel():
            assert_close(result, usual.to(result.dtype), want)


def run(grad, tensors, forward=None, backward=None):
    y = launch_kan_fwd(*tensors, LOW, HIGH, forward)
    return [y, *launch_kan_bwd(grad, *tensors, LOW, HIGH, True, backward)]


@pytest.mark.parametrize(("size", "dtype"), SIZES)
def test_forward_and_gradients(size, dtype, seed):
    grad, tensors = random_layer(seed, *size, dtype=dtype)
    results = run(grad, tensors)
    assert [result.dtype for result in results] == [torch.float32] * 2 + [dtype] * 3
    check(results, grad, tensors)


FORMS = [
    (ForwardConfig("rows", 1, 8, 8), ROWS),
    (ForwardConfig("dot", 16, 16, 8, split=2, span=16), DOT),
    (ForwardConfig("dot", 32, 16, 16, split=4, precision="ieee"), DOT._replace(precision="ieee", rows=32)),
]


@pytest.mark.parametrize(
    ("size", "forms"),
    [((2, 1, 19, 18, 8), forms) for forms in FORMS]
    + [((1, 5, 12, 9, 6), forms) for forms in FORMS[:1]]
    + [((1, 18, 12, 9, 6), forms) for forms in FORMS[1:]],
)
def test_every_form(size, forms, seed):
    grad, tensors = random_layer(seed, *size)
    check(run(grad, tensors, *forms), grad, tensors)


@pytest.mark.parametrize(("form", "bases"), [("rows", 8), ("rows", 4), ("rows", 11), ("dot", 8), ("dot", 11)])
def test_knots_and_beyond_the_grid(form, bases, seed):
    grid = bspline_grid(bases - 3, 3, (LOW, HIGH), torch.float32)
    far = torch.tensor([1.0, 1.5, 4.0, 1e4, 1e8])
    x = torch.cat([grid, grid[0] - far, grid[-1] + far, torch.nextafter(grid, grid + 1)])
    grad, tensors = random_layer(seed, 1, 1, len(x), 5, bases)
    tensors[0] = x.reshape(1, 1, -1).to(DEVICE)
    # What silu adds grows with x, and would hide the splines behind it.
    tensors[1] = torch.zeros_like(tensors[1])
    forward = ForwardConfig("dot", 16, 16, 16, split=2) if form == "dot" else ForwardConfig(form, 1, 4, 16)
    results = run(grad, tensors, forward, DOT if form == "dot" else ROWS)
    check(results, grad, tensors, ("y", "dx", "dspline", "dscale"))
    outside = slice(len(grid), len(grid) + 2 * len(far))
    assert (results[1][..., outside] == 0).all() and (results[3][:, :, outside] == 0).all()


@pytest.mark.parametrize("steps", [1, 20])
def test_one_x_for_all_experts(steps, seed):
    grad, tensors = random_layer(seed, 3, steps, 19, 6, 8)
    tensors[0] = tensors[0][:1].expand(3, -1, -1)
    assert tensors[0].stride(0) == 0
    check(run(grad, tensors), grad, tensors)


def test_strides_are_no_matter(seed):
    grad, tensors = random_layer(seed, 2, 20, 6, 5, 8)
    want = run(grad, tensors)
    tensors[0] = tensors[0].mT.contiguous().mT
    tensors[1:] = [torch.stack([part, part], -1)[..., 0] for part in tensors[1:]]
    for got, result in zip(run(grad.mT.contiguous().mT, tensors), want, strict=True):
        assert got.is_contiguous() and torch.equal(got, result)
    expanded = torch.ones((), device=DEVICE).expand_as(grad)
    check(run(expanded, tensors), expanded, tensors)


@pytest.mark.parametrize("steps", [1, 20])
def test_parameters_alone(steps, seed):
    grad, tensors = random_layer(seed, 2, steps, 17, 6, 8)
    dx, *alone = launch_kan_bwd(grad, *tensors, LOW, HIGH, False)
    assert dx is None
    for got, want in zip(alone, launch_kan_bwd(grad, *tensors, LOW, HIGH, True)[1:], strict=True):
        assert torch.equal(got, want)


def test_two_runs_are_bit_equal(seed):
    grad, tensors = random_layer(seed, 1, 18, 9, 17, 8)
    for first, second in zip(run(grad, tensors), run(grad, tensors), strict=True):
        assert torch.equal(first, second)


def test_nan_stays_nan(seed):
    for steps in (1, 20):
        grad, tensors = random_layer(seed, 1, steps, 9, 6, 8)
        tensors[0][0, 0, 3] = float("nan")
        y = launch_kan_fwd(*tensors, LOW, HIGH)
        assert y[0, 0].isnan().all() and not y[0, 1:].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("layer", [(51, 256), (256, 256), (256, 1)])
def test_published_sizes(layer, steps, seed):
    grad, tensors = random_layer(seed, 3, steps, *layer, 8)
    check(run(grad, tensors), grad, tensors)
