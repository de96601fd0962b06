"""Arguments of every operator, and a way to serve them by plain torch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lesa.ops import _library

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
SERVED = pytest.mark.parametrize("loaded", [True, False], ids=["backend of this machine", "plain torch"])
OPERATORS = (
    *("forecast", "forecast_at", "forecast_into_", "forecast_head", "feature_sums", "spread"),
    *("kan", "kan_backward", "predict", "predict_loss", "forecast_errors"),
)


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


def flat(values: Any) -> list[torch.Tensor]:
    parts = values if isinstance(values, (tuple, list)) else (values,)
    return [leaf for part in parts for leaf in (flat(part) if isinstance(part, (tuple, list)) else [part])]


def tensors(values: Any) -> list[torch.Tensor]:
    return [part for part in flat(values) if isinstance(part, torch.Tensor)]


def first_output(name: str, values: tuple) -> torch.Tensor:
    return tensors(getattr(torch.ops.lesa, name)(*values))[0]


@contextlib.contextmanager
def served(loaded: bool) -> Iterator[None]:
    """Serve CPU tensors by this machine's backend, or by plain torch, as if the C++ library was not built."""
    if loaded:
        yield
        return
    library = torch.library.Library("lesa", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding is what is wanted
        for name in OPERATORS:
            library.impl(name, _library._plain[name], "CPU", allow_override=True)
        yield
        library._destroy()
