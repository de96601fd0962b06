"""Every operator: schema, fake, autograd, compilation, bad input, and the choice of a backend."""

from __future__ import annotations

import os

import pytest
import torch
from operators import OPERATORS, SERVED, arguments, first_output, served, tensors

from lesa import ops
from lesa.ops import _library

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


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@SERVED
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

    with served(loaded):
        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiles_in_one_graph_forward_and_backward(name: str) -> None:
    eager, compiled = arguments(name, torch.float32), arguments(name, torch.float32)
    # Inductor takes long, and adds nothing once the operators are traced: one of them stands for all.
    backend = "inductor" if name == "forecast" else "aot_eager"
    torch._dynamo.reset()
    for values, run in (
        (eager, first_output),
        (compiled, torch.compile(first_output, fullgraph=True, backend=backend)),
    ):
        run(name, values).square().sum().backward()
    pairs = list(zip(tensors(eager), tensors(compiled), strict=True))
    assert sum(one.grad is not None for one, _ in pairs) >= 3
    for one, other in pairs:
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad)


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


@SERVED
def test_bad_input(loaded: bool) -> None:
    for case in BAD:
        name, position, spoil = BAD[case]
        values = list(arguments(name, torch.float32))
        values[position] = spoil(values[position])
        with served(loaded), pytest.raises(ValueError):
            getattr(torch.ops.lesa, name)(*values)


@SERVED
def test_slots_of_int64_are_refused_with_the_remedy(loaded: bool) -> None:
    values = list(arguments("forecast", torch.float32))
    values[1] = values[1].long()
    with served(loaded), pytest.raises(ValueError, match=r"slots.*slots\.to\(torch\.int32\)"):
        torch.ops.lesa.forecast(*values)


def test_lists_in_the_place_of_tensors() -> None:
    history, slots, weights, bias = (part.detach() for part in arguments("forecast", torch.float32))
    with pytest.raises(TypeError, match=r"history .*torch\.stack\(history\)"):
        ops.forecast(list(history), [0, 1], [1.0, 1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="forecast: history"):
        ops.forecast(list(history), slots, weights, bias)  # type: ignore[arg-type]
    remedy = r"slots .*torch\.tensor\(slots, dtype=torch\.int32\)"
    layers = [(torch.ones(1, 1), torch.ones(1, 1, 8), torch.ones(1, 1))] * ops.LAYERS
    with pytest.raises(TypeError, match=f"predict: {remedy}"):
        ops.predict(history, slots.tolist(), weights, bias, torch.ones(1), layers, (-1.0, 1.0))
    with pytest.raises(TypeError, match=f"predict_loss: {remedy}"):
        ops.predict_loss(history, slots.tolist(), weights, bias, torch.ones(()), history[0])
    with pytest.raises(TypeError, match="predict_loss: alpha"):
        ops.predict_loss(history, slots, weights, bias, 1.0, history[0])  # type: ignore[arg-type]


def test_tensors_on_two_devices() -> None:
    for name in OPERATORS:
        values = list(arguments(name, torch.float32))
        position = next(i for i in range(1, len(values)) if isinstance(values[i], torch.Tensor))
        values[position] = values[position].to("meta")
        with pytest.raises(ValueError, match=f"{name} was given tensors on cpu, meta"):
            getattr(torch.ops.lesa, name)(*values)


def test_a_backend_asked_for_never_falls_back() -> None:
    history = torch.ones(2, 4)
    with pytest.raises(ValueError, match="backend='cuda'"):
        ops.forecast(history, [0], [1.0], backend="cuda")
    if not interpreted():
        with pytest.raises(RuntimeError, match="backend='triton'"):
            ops.forecast(history, [0], [1.0], backend="triton")
    with pytest.raises(RuntimeError, match="backend='cpp'"):
        ops.forecast(history.to("meta"), [0], [1.0], backend="cpp")
    values = arguments("forecast_head", torch.float32)
    with pytest.raises(RuntimeError, match="backend='cpp'"):
        ops.forecast_head(*values, backend="cpp")


def test_a_backend_that_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "load_cpp", lambda: False)
    assert ops.backend_of("forecast", torch.ones(1)) == "torch"
    assert "not built" in ops.describe()["cpp"]
    with pytest.raises(RuntimeError, match="backend='cpp'"):
        ops.forecast(torch.ones(2, 4), [0], [1.0], backend="cpp")


def test_the_backend_of_the_cpu() -> None:
    expected = "cpp" if _library.load_cpp() else "torch"
    assert ops.backend_of("forecast", torch.ones(1)) == expected
    assert ops.backend_of("forecast_head", torch.ones(1)) == "torch"
    assert ops.forecast(torch.ones(2, 4), [0, 1], [1.0, 2.0], backend=expected).tolist() == [3.0] * 4


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
