"""The C++ kernels for the CPU, against float64 and against torch's own rounding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lesa.ops import _library, reference

BUILT = _library.cpp_path() is not None
LEFT_OUT = os.environ.get("LESA_NO_CPP", "0") not in ("", "0")
cpp = torch.ops.lesa
needs_library = pytest.mark.skipif(not BUILT, reason="lesa._cpu was not built: pip install --no-build-isolation -e .")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
SHAPES = [(5,), (8,), (31,), (3, 5, 11), (1031,), (70001,)]
# Every shape in float32, an odd one and several chunks in the other dtypes.
FEATURES = pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, shape) for shape in SHAPES]
    + [(dtype, shape) for dtype in (torch.float64, torch.bfloat16, torch.float16) for shape in ((3, 5, 11), (70001,))],
    ids=str,
)
GRID = (-3.0, 3.0)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Load the library; let torch.empty give NaN."""
    _library.load_cpp()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor, terms: float = 0.0) -> None:
    """Error of at most 2 x (error of the plain formula + eps x max|exact|), in the dtype of `plain`.

    `terms` is the size of what sums that nearly cancel are made of, and stands for max|exact| where it is larger. In
    float64 `exact` is no better than what it is compared to: there the last three digits may differ.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == plain.dtype
    if exact.numel() == 0:
        return
    assert exact.isfinite().all()
    error = (actual.double() - exact).abs().max().item()
    largest = max(exact.abs().max().item(), terms)
    allowed = 2 * ((plain.double() - exact).abs().max().item() + torch.finfo(plain.dtype).eps * largest)
    if plain.dtype == torch.float64:
        allowed = 1e-12 * max(1.0, largest)
    assert error <= allowed, f"error {error}, allowed {allowed}"


def make_row(dtype: torch.dtype, reads: int, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A ring whose unread slots are NaN; the second of three or more entries is unused."""
    history = torch.randn(reads + 2, *shape).to(dtype)
    slots = torch.randperm(reads + 2)[:reads].to(torch.int32)
    if reads > 2:
        slots[1] = -1
    unread = [h for h in range(len(history)) if h not in slots.tolist()]
    history[unread] = float("nan")
    wide = wide_of(dtype)
    return history, slots, torch.randn(reads, dtype=wide), torch.randn((), dtype=wide)


def plain_forecast(history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    used = slots >= 0
    features = history[slots[used].long()].to(dtype)
    return reference.forecast(features, weights[used].to(dtype), bias.reshape(()).to(dtype))


def make_layer(
    outputs: int, inputs: int, bases: int, *experts: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    shape = (*experts, outputs, inputs)
    return [torch.randn(s, dtype=dtype) for s in (shape, (*shape, bases), shape)]


def plain_kan(x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    knots = reference.bspline_grid(spline.shape[-1] - 3, 3, GRID, dtype)
    parts = [part.to(dtype) for part in (x, base, spline, scale)]
    return torch.stack([reference.kan_layer(*one, knots, 3) for one in zip(*parts, strict=True)])


@pytest.mark.skipif(LEFT_OUT, reason="LESA_NO_CPP is set")
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler is here")
def test_the_library_is_there_where_a_compiler_is() -> None:
    assert BUILT, "the C++ kernels failed to build; see pip install --no-build-isolation -v -e ."


@needs_library
def test_the_library_serves_every_operator() -> None:
    sums = ("forecast", "forecast_at", "forecast_into_", "feature_sums", "forecast_errors")
    for name in (*sums, "kan", "kan_backward", "predict", "predict_loss"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lesa::{name}", "CPU")


@needs_library
@DTYPES
@pytest.mark.parametrize(("reads", "shape"), [*zip((1, 2, 3, 5, 8, 16), SHAPES, strict=True)], ids=str)
def test_forecast(dtype: torch.dtype, reads: int, shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed + reads)
    row = make_row(dtype, reads, shape)
    exact, plain = plain_forecast(*row, torch.float64), plain_forecast(*row, dtype)
    assert_close(cpp.forecast(*row), exact, plain)

    history, slots, weights, bias = row
    table = (torch.full_like(slots, 99), slots), (torch.full_like(weights, float("nan")), weights), (bias * 0 + 7, bias)
    rows = [torch.stack(pair) for pair in table]
    assert_close(cpp.forecast_at(history, *rows, torch.tensor([1])), exact, plain)
    for keep in (slots[-1].item(), (slots[-1].item() + 1) % len(history)):
        ring = history.clone()
        cpp.forecast_into_(ring, *rows, torch.tensor([99, keep], dtype=torch.int32), torch.tensor([1]))
        assert_close(ring[keep], exact, plain)
        ring[keep] = history[keep]
        assert torch.equal(ring.nan_to_num(7), history.nan_to_num(7))


@needs_library
@DTYPES
def test_one_element(dtype: torch.dtype) -> None:
    history, slots = torch.tensor([[3], [-2], [5]]).to(dtype), torch.tensor([2, 0], dtype=torch.int32)
    weights, bias = torch.tensor([2, -1], dtype=wide_of(dtype)), torch.tensor([0.5], dtype=wide_of(dtype))
    assert cpp.forecast(history, slots, weights, bias).tolist() == [7.5]
    assert cpp.feature_sums(history[1], history, slots).tolist() == [-10, -6, -2]
    loss, forecast, grads = cpp.predict_loss(history, slots, weights, bias, 2 * bias[0], history[1], True, True)
    assert (loss.item(), forecast.tolist(), grads.tolist()) == (12.5**2, [10.5], [125, 75, 25, 187.5])


@needs_library
def test_keeping_nothing_writes_nothing() -> None:
    ring = torch.ones(2, 40)
    slots, keep = torch.tensor([[0]], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)
    cpp.forecast_into_(ring, slots, torch.tensor([[3.0]]), torch.zeros(1), keep, torch.tensor([0]))
    assert torch.equal(ring, torch.ones(2, 40))


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("extra", [0, 1])
def test_16_bit_numbers_are_read_and_rounded_as_torch_does(dtype: torch.dtype, extra: int) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16)[: 2**16 - extra].view(dtype).unsqueeze(0)
    slots, zero = torch.tensor([0], dtype=torch.int32), torch.zeros(())
    same = cpp.forecast(every, slots, torch.ones(1), zero)
    assert torch.equal(same.nan_to_num(9), every[0].nan_to_num(9))
    assert torch.equal(same.isnan(), every[0].isnan())
    for weight in (
        1 + 2**-7,
        1 + 2**-8,
        1 / 3,
        2.0**-12,
        3 * 2.0**-17,
        1.003 * 2.0**-24,
        2.0**-130,
        1.0003,
        700.0,
        3e38,
    ):
        rounded = (every[0].float() * torch.tensor(weight)).to(dtype)
        actual = cpp.forecast(every, slots, torch.tensor([weight]), zero)
        assert torch.equal(actual.isnan(), rounded.isnan())
        assert torch.equal(actual.nan_to_num(9), rounded.nan_to_num(9))


@needs_library
@FEATURES
def test_feature_sums(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    history, slots, _, _ = make_row(dtype, 6, shape)
    grad = torch.randn(shape).to(dtype)

    def plain(wide: torch.dtype) -> Tensor:
        sums = [
            (grad.to(wide) * history[slot].to(wide)).sum() if slot >= 0 else torch.zeros((), dtype=wide)
            for slot in slots
        ]
        return torch.stack([*sums, grad.to(wide).sum()])

    assert_close(cpp.feature_sums(grad, history, slots), plain(torch.float64), plain(wide_of(dtype)))


@needs_library
@FEATURES
def test_forecast_errors(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    row, truth = make_row(dtype, 6, shape), torch.randn(shape).to(dtype)

    def plain(wide: torch.dtype) -> Tensor:
        error = plain_forecast(*row, wide) - truth.to(wide)
        return torch.stack([error.square().sum(), truth.to(wide).square().sum()])

    found, exact, rough = cpp.forecast_errors(*row, truth), plain(torch.float64), plain(wide_of(dtype))
    history, slots, weights, bias = row
    used = slots >= 0
    forecast = weights[used].double().abs() @ history[slots[used].long()].double().abs().flatten(1) + bias.abs()
    miss = (plain_forecast(*row, torch.float64) - truth).abs().flatten()
    terms = (miss * (forecast + truth.double().abs().flatten())).sum().item(), 0.0
    for i, size in enumerate(terms):
        assert_close(found[i], exact[i], rough[i], size)
    if len(shape) == 3:
        across = truth.mT.contiguous().mT
        assert torch.equal(cpp.forecast_errors(*row, across), found)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("experts", "points", "inputs", "outputs", "bases", "shared"),
    [
        (1, 1, 51, 70, 8, False),
        (3, 3, 2, 5, 4, True),
        (2, 4, 1, 64, 5, False),
        (3, 65, 9, 65, 8, False),
        (3, 65, 9, 65, 8, True),
        (1, 130, 16, 1, 11, False),
        (2, 0, 3, 4, 8, False),
        (1, 5, 0, 3, 8, False),
    ],
)
def test_kan(
    dtype: torch.dtype, experts: int, points: int, inputs: int, outputs: int, bases: int, shared: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = 2.5 * torch.randn(1 if shared else experts, points, inputs, dtype=dtype)
    knots = reference.bspline_grid(bases - 3, 3, GRID, dtype)
    x.view(-1)[: len(knots)] = knots[: x.numel()]
    x = x.expand(experts, -1, -1)
    layer = make_layer(outputs, inputs, bases, experts, dtype=dtype)
    grad = torch.randn(experts, points, outputs, dtype=dtype)
    assert_close(cpp.kan(x, *layer, *GRID), plain_kan(x, *layer, torch.float64), plain_kan(x, *layer, dtype))

    def gradients(wide: torch.dtype) -> list[Tensor]:
        leaves = [part.detach().to(wide).requires_grad_() for part in (x, *layer)]
        found = torch.autograd.grad((plain_kan(*leaves, wide) * grad.to(wide)).sum(), leaves)
        return list(found)

    actual = cpp.kan_backward(grad, x, *layer, *GRID, True)
    for part, exact, plain in zip(actual, gradients(torch.float64), gradients(dtype), strict=True):
        assert_close(part, exact, plain)
    nothing, *others = cpp.kan_backward(grad, x, *layer, *GRID, False)
    assert nothing.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(others, actual[1:], strict=True))


@needs_library
def test_kan_of_16_bit_parameters_is_that_of_their_float32_values() -> None:
    layer = [part.bfloat16() for part in make_layer(5, 6, 8, 2)]
    x, grad = torch.randn(2, 4, 6).bfloat16(), torch.randn(2, 4, 5)
    wide = [part.float() for part in (x, *layer)]
    assert torch.equal(cpp.kan(x, *layer, *GRID), cpp.kan(*wide, *GRID))
    narrow = cpp.kan_backward(grad, x, *layer, *GRID, True)
    for a, b in zip(narrow, cpp.kan_backward(grad, *wide, *GRID, True), strict=True):
        assert torch.equal(a, b.bfloat16())


@needs_library
@pytest.mark.parametrize("points", [1, 4])
def test_kan_of_values_far_out_and_nan(points: int) -> None:
    layer = make_layer(3, 1, 8, 1)
    for value in (1e30, -1e30, 9.0):
        y = cpp.kan(torch.full((1, points, 1), value), *layer, *GRID)
        torch.testing.assert_close(
            y, (layer[0] * torch.nn.functional.silu(torch.tensor(value))).mT.expand(1, points, 3)
        )
    assert cpp.kan(torch.full((1, points, 1), float("nan")), *layer, *GRID).isnan().all()


def make_predictor(dtype: torch.dtype) -> list[Tensor]:
    sizes = ((20, 11), (9, 20), (1, 9))
    return [part / 3 for outputs, inputs in sizes for part in make_layer(outputs, inputs, 8, dtype=wide_of(dtype))]


def plain_alpha(dt: Tensor, params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    values = [dt.reshape(1, 1, -1)]
    for i in (0, 3, 6):
        values.append(plain_kan(values[-1], *(part.unsqueeze(0) for part in params[i : i + 3]), dtype))
    return [values[3].reshape(()), values[1].flatten(), values[2].flatten()]


@needs_library
@FEATURES
def test_predict(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    row = make_row(dtype, 5, shape)
    params, dt = make_predictor(dtype), torch.randn(11, dtype=wide_of(dtype))
    forecast, *values = cpp.predict(*row, dt, params, *GRID)
    exact, plain = plain_alpha(dt, params, torch.float64), plain_alpha(dt, params, wide_of(dtype))
    assert [tuple(part.shape) for part in values] == [(), (20,), (9,)]
    assert_close(*(torch.cat([part.reshape(-1) for part in parts]) for parts in (values, exact, plain)))
    # The error of alpha is judged above; small features would show little else.
    newest, alpha = row[0][row[1][-1]], values[0]
    exact_forecast = newest.double() + alpha.double() * plain_forecast(*row, torch.float64)
    assert_close(forecast, exact_forecast, newest + alpha.to(dtype) * plain_forecast(*row, dtype))


@needs_library
@FEATURES
@pytest.mark.parametrize("l2", [False, True])
def test_predict_loss(dtype: torch.dtype, shape: tuple[int, ...], l2: bool, seed: int) -> None:
    torch.manual_seed(seed)
    history, slots, weights, bias = make_row(dtype, 5, shape)
    alpha = torch.randn((), dtype=wide_of(dtype))
    target = torch.randn(shape).to(dtype)

    def plain(wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaves = [part.detach().to(wide).requires_grad_() for part in (weights, bias, alpha)]
        z = plain_forecast(history, slots, *leaves[:2], wide)
        forecast = history[slots[-1]].to(wide) + leaves[2] * z
        error = forecast - target.to(wide)
        loss = error.square().mean() if l2 else error.abs().mean()
        grads = torch.autograd.grad(loss, leaves)
        return loss.detach(), forecast.detach(), torch.cat([part.reshape(-1) for part in grads])

    actual = cpp.predict_loss(history, slots, weights, bias, alpha, target, l2, True)
    narrow = plain(wide_of(dtype))
    used = slots >= 0
    z = (weights[used].double().abs() @ history[slots[used].long()].double().abs().flatten(1)) + bias.abs()
    grad = history[slots[-1]].double().abs().flatten() + alpha.abs() * z + target.double().abs().flatten() if l2 else 1
    terms = 0.0, 0.0, (grad * z).mean().item()
    for part, exact, rough, size in zip(actual, plain(torch.float64), narrow, terms, strict=True):
        assert_close(part, exact, rough.to(part.dtype), size)
    loss, nothing, grads = cpp.predict_loss(history, slots, weights, bias, alpha, target, l2, False)
    assert nothing.shape == (0,)
    assert torch.equal(loss, actual[0]) and torch.equal(grads, actual[2])


@needs_library
def test_a_perfect_forecast_has_no_gradient() -> None:
    history, slots = torch.randn(2, 100), torch.tensor([0, 1], dtype=torch.int32)
    alpha, zero = torch.tensor(2.0), torch.zeros(())
    loss, forecast, grads = cpp.predict_loss(history, slots, torch.zeros(2), zero, alpha, history[1], False, True)
    assert torch.equal(forecast, history[1])
    assert loss == 0 and not grads.any()


@needs_library
@DTYPES
def test_empty_features(dtype: torch.dtype) -> None:
    history, slots, weights, bias = make_row(dtype, 3, (4, 0))
    one = torch.ones((), dtype=wide_of(dtype))
    assert cpp.forecast(history, slots, weights, bias).shape == (4, 0)
    assert not cpp.feature_sums(history[0], history, slots).any()
    loss, _, grads = cpp.predict_loss(history, slots, weights, bias, one, history[0], True, True)
    assert loss == 0 and not grads.any()


@needs_library
def test_no_entry_is_used() -> None:
    row = torch.full((2, 5), float("nan")), torch.tensor([-1], dtype=torch.int32), torch.ones(1), torch.tensor([2.5])
    assert cpp.forecast(*row).tolist() == [2.5] * 5


@needs_library
@DTYPES
def test_features_that_are_not_dense(dtype: torch.dtype) -> None:
    history, slots, weights, bias = make_row(dtype, 4, (6, 10))
    expected = cpp.forecast(history, slots, weights, bias)
    across = history.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    assert torch.equal(cpp.forecast(across, slots, weights, bias), expected)
    grad = torch.randn(10, 6).to(dtype).T
    assert torch.equal(cpp.feature_sums(grad, across, slots), cpp.feature_sums(grad.contiguous(), history, slots))
    spread = history.repeat_interleave(2, 0)[::2]
    assert torch.equal(cpp.forecast(spread, slots, weights, bias), expected)
    rows = slots[None], weights[None], bias[None], slots[-1:].clone(), torch.tensor([0])
    cpp.forecast_into_(spread, *rows)
    assert torch.equal(spread[slots[-1]], expected)
    with pytest.raises(ValueError, match=r"history has strides .* call \.contiguous\(\)"):
        cpp.forecast_into_(across, *rows)


@needs_library
@DTYPES
def test_results_do_not_depend_on_the_threads(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    row = make_row(dtype, 4, (3, 1000_003))
    target = torch.randn(3, 1000_003).to(dtype)
    alpha = torch.ones((), dtype=wide_of(dtype))
    layer = make_layer(130, 70, 8, 2, dtype=wide_of(dtype))
    x, grad = torch.randn(2, 70, 70, dtype=alpha.dtype), torch.randn(2, 70, 130, dtype=alpha.dtype)

    def results() -> list[Tensor]:
        return [
            cpp.forecast(*row),
            cpp.feature_sums(target, *row[:2]),
            cpp.forecast_errors(*row, target),
            *cpp.predict_loss(*row, alpha, target, False, True),
            cpp.kan(x, *layer, *GRID),
            *cpp.kan_backward(grad, x, *layer, *GRID, True),
        ]

    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


H, ROW = torch.ones(3, 4), (torch.ones(2), torch.zeros(()))
LAYER = [torch.ones(1, 2, 3), torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3)]
REFUSED: list[tuple[str, Callable[[], object]]] = [
    (r"slots\[1\] is 3", lambda: cpp.forecast(H, int32(0, 3), *ROW)),
    (r"slots has dtype Long", lambda: cpp.forecast(H, torch.tensor([0, 1]), *ROW)),
    (r"slots has shape \[1, 2\]", lambda: cpp.forecast(H, int32([0, 1]), *ROW)),
    (r"slots has a window of 17", lambda: cpp.forecast(H, int32(*[0] * 17), *ROW)),
    (r"weights has shape \[2\]", lambda: cpp.forecast(H, int32(0), *ROW)),
    (r"weights has dtype Float", lambda: cpp.forecast(H.double(), int32(0, 1), *ROW)),
    (r"bias has shape \[2\]", lambda: cpp.forecast(H, int32(0, 1), ROW[0], torch.zeros(2))),
    (r"history has dtype Int", lambda: cpp.forecast(H.int(), int32(0, 1), *ROW)),
    (r"history has no axis of slots", lambda: cpp.forecast(torch.tensor(1.0), int32(0, 1), *ROW)),
    (
        r"step is 1",
        lambda: cpp.forecast_at(H, int32([0, 1]), ROW[0][None], ROW[1][None], torch.tensor([1])),
    ),
    (
        r"step has dtype Int",
        lambda: cpp.forecast_at(H, int32([0, 1]), ROW[0][None], ROW[1][None], int32(0)),
    ),
    (
        r"keep\[0\] is 3",
        lambda: cpp.forecast_into_(H, int32([0, 1]), ROW[0][None], ROW[1][None], int32(3), torch.tensor([0])),
    ),
    (r"grad has shape \[5\]", lambda: cpp.feature_sums(torch.ones(5), H, int32(0))),
    (r"grad has dtype Double", lambda: cpp.feature_sums(torch.ones(4).double(), H, int32(0))),
    (
        r"slots ends with -1",
        lambda: cpp.predict_loss(H, int32(0, -1), *ROW, torch.tensor(1.0), H[0], False, True),
    ),
    (
        r"target has shape \[3\]",
        lambda: cpp.predict_loss(H, int32(0, 1), *ROW, torch.tensor(1.0), torch.ones(3), False, True),
    ),
    (
        r"params has 3 tensors",
        lambda: cpp.predict(H, int32(0, 1), *ROW, torch.ones(3), [part[0] for part in LAYER], *GRID),
    ),
    (r"x has shape \[1, 5, 4\]", lambda: cpp.kan(torch.ones(1, 5, 4), *LAYER, *GRID)),
    (r"low=1, high=1", lambda: cpp.kan(torch.ones(1, 5, 3), *LAYER, 1.0, 1.0)),
    (
        r"spline has 3 coefficients an edge",
        lambda: cpp.kan(torch.ones(1, 5, 3), LAYER[0], LAYER[1][..., :3], LAYER[2], *GRID),
    ),
    (r"x has dtype Double", lambda: cpp.kan(torch.ones(1, 5, 3).double(), *LAYER, *GRID)),
    (
        r"grad has shape \[1, 5, 3\]",
        lambda: cpp.kan_backward(torch.ones(1, 5, 3), torch.ones(1, 5, 3), *LAYER, *GRID, True),
    ),
]


@needs_library
def test_refusals() -> None:
    for message, call in REFUSED:
        with pytest.raises(ValueError, match=message):
            call()


@needs_library
def test_the_plain_instructions_too() -> None:
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        pytest.skip("this is that run")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    command += ["-k", "not threads and not refusals and not library"]  # the same whatever the instructions
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
