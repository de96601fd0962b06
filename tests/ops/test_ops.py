"""Operations of the hot path against sums in higher precision."""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lesa import ops
from lesa.ops import _library, reference
from lesa.plans.rows import MAX_READS

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def exact(features: torch.Tensor, weights: list[float], bias: float) -> np.ndarray:
    """The sum in longdouble; below float64 it agrees with the float64 oracle."""
    parts = features.double().numpy().astype(np.longdouble)
    return np.tensordot(np.array(weights, np.longdouble), parts, 1) + np.longdouble(bias)


def assert_close(actual: torch.Tensor, features: torch.Tensor, weights: list[float], bias: float) -> None:
    """Error of at most 2 x (error of the plain formula in that dtype + eps x max|ref|)."""
    expected = exact(features, weights, bias)
    if features.dtype != torch.float64:
        oracle = reference.forecast(features.double(), weights, bias)
        assert np.abs(oracle.numpy() - expected).max(initial=0) <= 1e-12 * max(1, np.abs(expected).max(initial=0))
    plain = reference.forecast(features, weights, bias)
    allowed = 2 * (
        np.abs(plain.double().numpy() - expected).max(initial=0)
        + torch.finfo(features.dtype).eps * np.abs(expected).max(initial=0)
    )
    assert actual.dtype == features.dtype
    assert actual.shape == features.shape[1:]
    error = np.abs(actual.double().numpy() - expected).max(initial=0)
    assert error <= allowed, f"error {error}, allowed {allowed}"


@DTYPES
@pytest.mark.parametrize("reads", range(1, MAX_READS + 1))
def test_forecast(dtype: torch.dtype, reads: int, seed: int) -> None:
    rng = random.Random(seed + reads)
    torch.manual_seed(seed)
    history = torch.randn(MAX_READS + 2, 2, 9, 7).to(dtype)
    slots = rng.sample(range(len(history)), reads)
    weights = [rng.gauss(0, 2) for _ in slots]
    before = history.clone()
    for bias in (0.0, rng.gauss(0, 1)):
        assert_close(ops.forecast(history, slots, weights, bias), history[slots], weights, bias)
    assert torch.equal(history, before)


@DTYPES
def test_one_read_of_weight_one_is_the_feature_itself(dtype: torch.dtype) -> None:
    history = torch.randn(3, 50).to(dtype)
    result = ops.forecast(history, [1], [1.0])
    assert torch.equal(result, history[1])
    assert result.data_ptr() != history[1].data_ptr()


@DTYPES
def test_the_bias_alone(dtype: torch.dtype) -> None:
    history = torch.ones(1, 4, dtype=dtype)
    assert torch.equal(ops.forecast(history, [0], [0.0], -0.5), torch.full((4,), -0.5, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), ()], ids=str)
def test_empty_and_scalar_features(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    history = torch.randn(4, *shape).to(dtype)
    assert_close(ops.forecast(history, [0, 3], [2.0, -1.0], 0.5), history[[0, 3]], [2.0, -1.0], 0.5)


@DTYPES
def test_non_contiguous_history(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [0.3, -1.7, 2.4]
    base = torch.randn(6, 8, 10).to(dtype)
    for history in (base.transpose(0, 2), base[::2, :, ::3], base[:, :, :1].expand(6, 8, 4), base.permute(1, 2, 0)):
        assert not history.is_contiguous()
        assert_close(ops.forecast(history, [2, 0, 1], weights, 0.1), history[[2, 0, 1]], weights, 0.1)


def test_the_same_slot_twice() -> None:
    history = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(ops.forecast(history, [1, 1], [0.25, 0.5]), 0.75 * history[1], rtol=1e-15, atol=0)


def test_partial_sums_beyond_float16() -> None:
    history = torch.full((3, 4), 6e4, dtype=torch.float16)
    result = ops.forecast(history, [0, 1, 2], [2.0, 3.0, -4.0])
    assert torch.equal(result, history[0])


def test_small_terms_are_not_lost_in_bfloat16() -> None:
    history = torch.ones(MAX_READS, 4, dtype=torch.bfloat16)
    result = ops.forecast(history, list(range(MAX_READS)), [1.0] + [2.0**-9] * (MAX_READS - 1))
    assert torch.equal(result, torch.full((4,), 1 + 15 * 2.0**-9).bfloat16())
    assert result[0] > 1


def test_nan_of_an_unread_slot_stays_out() -> None:
    history = torch.stack((torch.ones(4), torch.full((4,), float("nan"))))
    assert ops.forecast(history, [0], [3.0]).tolist() == [3.0] * 4
    assert ops.forecast(history, [0, 1], [3.0, 0.0]).isnan().all()


def test_slots_and_weights_that_do_not_fit() -> None:
    history = torch.ones(2, 4)
    with pytest.raises(ValueError, match="names 2, but history holds slots 0 to 1"):
        ops.forecast(history, [0, 2], [1.0, 1.0])
    with pytest.raises(ValueError, match="slots has 2 entries but weights has 1"):
        ops.forecast(history, [0, 1], [1.0])


def test_works_under_inference_mode_and_outside() -> None:
    with torch.inference_mode():
        history = torch.ones(2, 3)
        assert ops.forecast(history, [0, 1], [1.0, 1.0]).tolist() == [2.0] * 3
    assert ops.forecast(history, [0, 1], [1.0, 1.0]).tolist() == [2.0] * 3


# Every operator: schema, fake, autograd, compilation


def rows(kind: torch.dtype, steps: int = 3) -> tuple[torch.Tensor, ...]:
    """Slots with one left out, weights, biases of a table, and the step."""
    slots = torch.tensor([[2, -1, 0], [1, 0, -1], [3, 3, 1]], dtype=torch.int32)[:steps]
    return slots, torch.randn(steps, 3, dtype=kind), torch.randn(steps, dtype=kind), torch.tensor([1])


def network(kind: torch.dtype, experts: int | None = None, inputs: int = 5, outputs: int = 4) -> list[torch.Tensor]:
    lead = () if experts is None else (experts,)
    shapes = ((outputs, inputs), (outputs, inputs, 8), (outputs, inputs))
    return [torch.randn(*lead, *shape, dtype=kind, requires_grad=True) for shape in shapes]


def arguments(name: str, kind: torch.dtype) -> tuple:
    """Arguments of every operator; floating inputs that have gradients require them."""
    torch.manual_seed(0)
    history = torch.randn(4, 2, 3, 6, dtype=kind)
    slots, weights, bias, step = rows(kind)
    keep = torch.tensor([-1, 2, 0], dtype=torch.int32)
    one = (slots[0], weights[0].requires_grad_(), bias[0].requires_grad_())
    grid = (-3.0, 3.0)
    if name == "forecast":
        return history.requires_grad_(), *one
    if name == "forecast_at":
        return history, slots, weights.detach(), bias.detach(), step
    if name == "forecast_into_":
        return history, slots, weights.detach(), bias.detach(), keep, step
    if name == "forecast_head":
        vectors = torch.randn(2, 6, dtype=kind), torch.randn(2, 6, dtype=kind)
        projection = torch.randn(5, 6, dtype=kind), torch.randn(5, dtype=kind)
        return history, slots, weights.detach(), bias.detach(), keep, step, *vectors, *projection, 1e-6
    if name == "feature_sums":
        return torch.randn(2, 3, 6, dtype=kind), history, slots[0]
    if name == "forecast_errors":
        return history, *(part.detach() for part in one), torch.randn(2, 3, 6, dtype=kind)
    if name == "spread":
        return torch.randn(2, 3, 6, dtype=kind), weights[0].detach(), slots[0], 4
    if name == "kan":
        return torch.randn(2, 3, 5, dtype=kind, requires_grad=True), *network(kind, 2), *grid
    if name == "kan_backward":
        detached = [part.detach() for part in network(kind, 2)]
        return torch.randn(2, 3, 4, dtype=kind), torch.randn(2, 3, 5, dtype=kind), *detached, *grid, True
    layers = [*network(kind), *network(kind, None, 4, 3), *network(kind, None, 3, 1)]
    if name == "predict":
        return history.requires_grad_(), *one, torch.randn(5, dtype=kind), layers, *grid
    assert name == "predict_loss"
    alpha = torch.randn((), dtype=kind, requires_grad=True)
    return history, *one, alpha, torch.randn(2, 3, 6, dtype=kind), False, True


OPERATORS = (
    *("forecast", "forecast_at", "forecast_into_", "forecast_head", "feature_sums", "spread"),
    *("kan", "kan_backward", "predict", "predict_loss", "forecast_errors"),
)
DIFFERENTIABLE = ("forecast", "kan", "predict", "predict_loss")


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_opcheck(name: str, kind: torch.dtype) -> None:
    results = torch.library.opcheck(getattr(torch.ops.lesa, name), arguments(name, kind))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


def test_no_operator_is_left_out() -> None:
    names = torch._C._dispatch_get_all_op_names()
    defined = {name.removeprefix("lesa::").partition(".")[0] for name in names if name.startswith("lesa::")}
    assert {n for n in defined if hasattr(torch.ops.lesa, n)} == set(OPERATORS)
    assert set(_library._plain) == set(OPERATORS)


def flat(values: Any) -> list[torch.Tensor]:
    parts = values if isinstance(values, (tuple, list)) else (values,)
    return [leaf for part in parts for leaf in (flat(part) if isinstance(part, (tuple, list)) else [part])]


def tensors(values: Any) -> list[torch.Tensor]:
    return [part for part in flat(values) if isinstance(part, torch.Tensor)]


def first_output(name: str, values: tuple) -> torch.Tensor:
    return tensors(getattr(torch.ops.lesa, name)(*values))[0]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("loaded", [True, False], ids=["this machine's backend", "plain torch"])
def test_gradients_in_float64(name: str, loaded: bool) -> None:
    values = arguments(name, torch.float64)
    leaves = [part for part in tensors(values) if part.requires_grad]
    assert len(leaves) >= 3

    def run(*parts: torch.Tensor) -> torch.Tensor:
        rest = iter(parts)
        filled = [
            [next(rest) for _ in part]
            if isinstance(part, list)
            else next(rest)
            if isinstance(part, torch.Tensor) and part.requires_grad
            else part
            for part in values
        ]
        return tensors(getattr(torch.ops.lesa, name)(*filled))[0]

    with contextlib.ExitStack() as stack:
        if not loaded:
            stack.enter_context(plain_only())
        assert torch.autograd.gradcheck(run, leaves)


@contextlib.contextmanager
def plain_only() -> Iterator[None]:
    """Serve CPU tensors by plain torch, as where the C++ library was not built."""
    library = torch.library.Library("lesa", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding is what is wanted
        for name in OPERATORS:
            library.impl(name, _library._plain[name], "CPU", allow_override=True)
        yield
        library._destroy()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiles_in_one_graph_forward_and_backward(name: str) -> None:
    eager, compiled = arguments(name, torch.float32), arguments(name, torch.float32)
    torch._dynamo.reset()
    for values, run in ((eager, first_output), (compiled, torch.compile(first_output, fullgraph=True))):
        run(name, values).square().sum().backward()
    pairs = list(zip(tensors(eager), tensors(compiled), strict=True))
    assert sum(one.grad is not None for one, _ in pairs) >= 3
    for one, other in pairs:
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad)


def test_second_derivatives_are_refused() -> None:
    history, weights = torch.randn(2, 5), torch.ones(2, requires_grad=True)
    slots, bias = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(())
    loss = ops.forecast(history, slots, weights, bias).square().sum()
    (first,) = torch.autograd.grad(loss, weights, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.sum().backward()


def errors_of(history: torch.Tensor, row: tuple[Any, ...], truth: torch.Tensor) -> torch.Tensor:
    forecast = reference.forecast(history[row[0]].double(), *row[1:])
    return torch.stack([(forecast - truth.double()).square().sum(), truth.double().square().sum()])


@DTYPES
@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (3, 5, 401)], ids=str)
@pytest.mark.parametrize("loaded", [True, False], ids=["this machine's backend", "plain torch"])
def test_forecast_errors(dtype: torch.dtype, shape: tuple[int, ...], loaded: bool, seed: int) -> None:
    torch.manual_seed(seed)
    kind = _library.wide_dtype(torch.empty(0, dtype=dtype))
    history, truth = torch.randn(6, *shape).to(dtype), torch.randn(shape).to(dtype)
    history[1] = float("nan")
    slots = torch.tensor([5, -1, 0, 3], dtype=torch.int32)
    weights, bias = torch.tensor([0.5, float("nan"), -2.0, 1.0], dtype=kind), torch.tensor(0.25, dtype=kind)
    with contextlib.ExitStack() as stack:
        if not loaded:
            stack.enter_context(plain_only())
        found = ops.forecast_errors(history, slots, weights, bias, truth)
        nothing = ops.forecast_errors(history, slots * 0 - 1, weights, bias * 0, truth)
    assert (found.shape, found.dtype) == ((2,), kind)
    expected = errors_of(history, ([5, 0, 3], [0.5, -2.0, 1.0], 0.25), truth)
    torch.testing.assert_close(found.double(), expected, rtol=1e-12 if kind == torch.float64 else 1e-6, atol=0)
    assert nothing[0] == nothing[1] == found[1]


@pytest.mark.parametrize("loaded", [True, False], ids=["this machine's backend", "plain torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_forecast_errors_of_what_is_not_finite(value: float, loaded: bool) -> None:
    history, slots = torch.ones(2, 50), torch.tensor([0, 1], dtype=torch.int32)
    row = slots, torch.ones(2), torch.zeros(())
    spoiled = history.clone()
    spoiled[1, 49] = value
    with contextlib.ExitStack() as stack:
        if not loaded:
            stack.enter_context(plain_only())
        assert ops.forecast_errors(history, *row, history[0]).tolist() == [50.0, 50.0]
        error, size = ops.forecast_errors(spoiled, *row, history[0]).tolist()
        assert not np.isfinite(error) and size == 50
        assert not ops.forecast_errors(history, *row, spoiled[1]).isfinite().any()


def test_forecast_errors_refuses_a_gradient() -> None:
    weights = torch.ones(1, requires_grad=True)
    slots = torch.tensor([0], dtype=torch.int32)
    found = ops.forecast_errors(torch.ones(1, 4), slots, weights, torch.zeros(()), torch.ones(4))
    with pytest.raises(NotImplementedError, match="forecast_errors has no gradient: detach"):
        found.sum().backward()


def test_parameters_narrower_than_the_features() -> None:
    """Features in float64, parameters in float32: what an uncast predictor is given."""
    values = list(arguments("predict", torch.float64))
    values[4] = values[4].float()
    values[5] = [part.detach().float().requires_grad_() for part in values[5]]
    first_output("predict", tuple(values)).sum().backward()
    assert all(part.grad is not None and part.grad.dtype == torch.float32 for part in values[5])


# Bad input: one error, the same whatever serves it

BAD = {
    "slot outside": ("forecast", 1, lambda slots: slots + 2),
    "slots of int64": ("forecast", 1, lambda slots: slots.long()),
    "too few weights": ("forecast", 2, lambda weights: weights[:2]),
    "weights of float16": ("forecast", 2, lambda weights: weights.half()),
    "two biases": ("forecast", 3, lambda bias: bias.repeat(2)),
    "features of int32": ("forecast", 0, lambda history: history.int()),
    "step before the first": ("forecast_at", 4, lambda step: step - 2),
    "step after the last": ("forecast_into_", 5, lambda step: step + 2),
    "grad of another shape": ("feature_sums", 0, lambda grad: grad[:1]),
    "slot outside the size": ("spread", 3, lambda size: 2),
    "inputs that do not fit": ("kan", 0, lambda x: x[..., :4]),
    "reversed grid": ("kan", 4, lambda low: 4.0),
    "scale that broadcasts": ("kan", 3, lambda scale: scale[..., :1]),
    "no newest slot": ("predict", 1, lambda slots: slots.flip(0).roll(1)),
    "target of another shape": ("predict_loss", 5, lambda target: target[:1]),
    "truth of another shape": ("forecast_errors", 4, lambda truth: truth[:1]),
    "truth of another dtype": ("forecast_errors", 4, lambda truth: truth.double()),
    "modulation that broadcasts": ("forecast_head", 6, lambda scale: scale[:, :1]),
    "projection of another width": ("forecast_head", 8, lambda weight: weight[:, :4]),
}


@pytest.mark.parametrize("loaded", [True, False], ids=["this machine's backend", "plain torch"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, loaded: bool) -> None:
    name, position, spoil = BAD[case]
    values = list(arguments(name, torch.float32))
    values[position] = spoil(values[position])
    with contextlib.ExitStack() as stack:
        if not loaded:
            stack.enter_context(plain_only())
        stack.enter_context(pytest.raises(ValueError))
        getattr(torch.ops.lesa, name)(*values)


@pytest.mark.parametrize("loaded", [True, False], ids=["this machine's backend", "plain torch"])
@pytest.mark.parametrize("name", ["forecast", "predict", "predict_loss", "forecast_errors"])
def test_slots_of_int64_are_told_the_remedy(name: str, loaded: bool) -> None:
    values = list(arguments(name, torch.float32))
    values[1] = values[1].long()
    refused = pytest.raises(ValueError, match=r"convert it with slots\.to\(torch\.int32\)")
    with contextlib.nullcontext() if loaded else plain_only(), refused:
        getattr(torch.ops.lesa, name)(*values)


def test_lists_in_the_place_of_tensors() -> None:
    history, slots, weights, bias = (part.detach() for part in arguments("forecast", torch.float32))
    with pytest.raises(TypeError, match=r"forecast: history is a list, expected a tensor; torch\.stack\(history\)"):
        ops.forecast(list(history), [0, 1], [1.0, 1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="forecast: history is a list"):
        ops.forecast(list(history), slots, weights, bias)  # type: ignore[arg-type]
    remedy = r"slots is a list, expected a tensor; torch\.tensor\(slots, dtype=torch\.int32\)"
    layers = [(torch.ones(1, 1), torch.ones(1, 1, 8), torch.ones(1, 1))] * ops.LAYERS
    with pytest.raises(TypeError, match=f"predict: {remedy}"):
        ops.predict(history, slots.tolist(), weights, bias, torch.ones(1), layers, (-1.0, 1.0))
    with pytest.raises(TypeError, match=f"predict_loss: {remedy}"):
        ops.predict_loss(history, slots.tolist(), weights, bias, torch.ones(()), history[0])
    with pytest.raises(TypeError, match="predict_loss: alpha is a float, expected a tensor; make one"):
        ops.predict_loss(history, slots, weights, bias, 1.0, history[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_on_two_devices(name: str) -> None:
    values = list(arguments(name, torch.float32))
    position = next(i for i in range(1, len(values)) if isinstance(values[i], torch.Tensor))
    values[position] = values[position].to("meta")
    with pytest.raises(ValueError, match=f"{name} was given tensors on cpu, meta"):
        getattr(torch.ops.lesa, name)(*values)


# Backends


def test_a_backend_asked_for_never_falls_back() -> None:
    history = torch.ones(2, 4)
    with pytest.raises(ValueError, match="backend='cuda': expected one of"):
        ops.forecast(history, [0], [1.0], backend="cuda")
    if not interpreted():
        with pytest.raises(RuntimeError, match="backend='triton' cannot run forecast: these are CPU tensors"):
            ops.forecast(history, [0], [1.0], backend="triton")
    with pytest.raises(RuntimeError, match="backend='cpp' cannot run forecast: it serves CPU tensors"):
        ops.forecast(history.to("meta"), [0], [1.0], backend="cpp")
    values = arguments("forecast_head", torch.float32)
    with pytest.raises(RuntimeError, match="backend='cpp' cannot run forecast_head: the C.. library has no kernel"):
        ops.forecast_head(*values, backend="cpp")


def test_a_backend_that_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "load_cpp", lambda: False)
    assert ops.backend_of("forecast", torch.ones(1)) == "torch"
    assert "not built" in ops.describe()["cpp"]
    with pytest.raises(RuntimeError, match="backend='cpp' cannot run forecast: the library is not built: install lesa"):
        ops.forecast(torch.ones(2, 4), [0], [1.0], backend="cpp")


def test_the_backend_of_the_cpu() -> None:
    expected = "cpp" if _library.load_cpp() else "torch"
    assert ops.backend_of("forecast", torch.ones(1)) == expected
    assert ops.backend_of("forecast_head", torch.ones(1)) == "torch"
    assert ops.forecast(torch.ones(2, 4), [0, 1], [1.0, 2.0], backend=expected).tolist() == [3.0] * 4


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
