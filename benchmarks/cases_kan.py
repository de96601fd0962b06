"""The KAN of three experts at once, forward and backward, and the copy all operators are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lesa import ops
from lesa.ops import reference
from lesa.training.experts import Kan as KanNet

from .cases import FUSED, Case, Form, Outputs, compiled
from .measuring import copies_beyond

GRID = (-3.0, 3.0)
WIDTHS = (51, 256, 256, 1)
# A weight, a scale and 8 spline coefficients an edge, float32.
KAN_BYTES = 4 * 10 * sum(i * o for i, o in pairwise(WIDTHS))
EXPERTS, STEPS = 3, 50


def kan_parameters(device: str, experts: int) -> list[list[Tensor]]:
    """Parameters (base, spline, scale) of every layer of the published KANs, initialised as the library does."""
    nets = [KanNet(WIDTHS[:-1], grid_range=GRID, constant=8.0).parts for _ in range(experts)]
    return [
        [torch.stack(parts).detach().to(device) for parts in zip(*layers, strict=True)]
        for layers in zip(*nets, strict=True)
    ]


def knots(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The published spline grid."""
    return reference.bspline_grid(5, 3, GRID, dtype).to(device)


def kan_chain(x: Tensor, layers: list[list[Tensor]], grid: Tensor) -> Tensor:
    """The KAN as a chain of plain layers."""
    for layer in layers:
        x = reference.kan_layer(x, *layer, grid, 3)
    return x


@dataclass
class KanInputs:
    """What one round reads."""

    x: Tensor
    layers: list[list[Tensor]]
    grad: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        """Of all layers, flat."""
        return [part for layer in self.layers for part in layer]


class Kan(Case):
    """All offsets of a 50-step request through the KANs of three stages, float32.

    Args:
        device: "cuda" or "cpu".
        cache: bytes; the inputs of all rounds are four times as large.
    """

    def __init__(self, device: str, cache: int) -> None:
        self.device, self.dtype = device, torch.float32
        self.knots = knots(torch.float32, torch.device(device))
        self.inputs = [self._inputs() for _ in range(copies_beyond(cache, self._read))]

    def _inputs(self) -> KanInputs:
        x = 2 * torch.rand(EXPERTS, STEPS, WIDTHS[0], device=self.device) - 1
        grad = torch.randn(EXPERTS, STEPS, 1, device=self.device)
        return KanInputs(x, kan_parameters(self.device, EXPERTS), grad)

    @property
    def _read(self) -> int:
        return EXPERTS * KAN_BYTES + 4 * EXPERTS * STEPS * WIDTHS[0]

    @property
    def bytes(self) -> int:
        """The least that must be moved: parameters and offsets read, one value a row written."""
        return self._read + 4 * EXPERTS * STEPS

    def formula(self, i: KanInputs, dtype: torch.dtype) -> Outputs:
        wide = torch.promote_types(dtype, torch.float32)
        layers = [[part.to(wide) for part in layer] for layer in i.layers]
        return self.outputs(self._one_by_one(i.x.to(wide), layers), KanInputs(i.x, layers, i.grad.to(wide)))

    def outputs(self, y: Tensor, i: KanInputs) -> Outputs:
        """What is compared and timed: the values."""
        return (y,)

    def forms(self, provider: str) -> dict[str, Form]:
        """Every way `provider` may do it; the fastest is reported."""
        if provider in FUSED:
            return {provider: lambda i: self.outputs(_fused(i, provider), i)}
        if provider == "compile":
            torch.compiler.reset()
            run = compiled(self._batched)
            return {"batched": lambda i: self.outputs(run(i.x, i.layers), i)}
        return {
            "batched": lambda i: self.outputs(self._batched(i.x, i.layers), i),
            "one by one": lambda i: self.outputs(self._one_by_one(i.x, i.layers), i),
        }

    def _one_by_one(self, x: Tensor, layers: list[list[Tensor]]) -> Tensor:
        grid = self.knots if x.dtype == torch.float32 else knots(x.dtype, x.device)
        rows = [[[part[e] for part in layer] for layer in layers] for e in range(EXPERTS)]
        return torch.stack([kan_chain(x[e], rows[e], grid) for e in range(EXPERTS)])

    def _batched(self, x: Tensor, layers: list[list[Tensor]]) -> Tensor:
        for base, spline, scale in layers:
            basis = reference.bspline_basis(x, self.knots, 3).flatten(-2)
            edges = (spline * scale.unsqueeze(-1)).flatten(2)
            x = torch.baddbmm(torch.bmm(F.silu(x), base.mT), basis, edges.mT)
        return x


class KanBackward(Kan):
    """The same with the gradients of all parameters; the offsets have none."""

    def _inputs(self) -> KanInputs:
        inputs = super()._inputs()
        for part in inputs.parameters:
            part.requires_grad_()
        return inputs

    @property
    def bytes(self) -> int:
        """As before, the rows' gradients read, the parameters' written."""
        return super().bytes + EXPERTS * KAN_BYTES + 4 * EXPERTS * STEPS

    def outputs(self, y: Tensor, i: KanInputs) -> Outputs:
        return y.detach(), *torch.autograd.grad(y, i.parameters, i.grad)


def _fused(i: KanInputs, backend: str) -> Tensor:
    x = i.x
    for layer in i.layers:
        x = ops.kan(x, *layer, GRID, backend=backend)
    return x


class Copy:
    """A copy within the device that moves as many bytes, half of them read and half written.

    Args:
        size: bytes.
        device: "cuda" or "cpu".
        cache: bytes; the inputs of all rounds are four times as large.
    """

    def __init__(self, size: int, device: str, cache: int) -> None:
        half = math.ceil(size / 32) * 16
        self.inputs = [self._inputs(half, device) for _ in range(copies_beyond(cache, 2 * half))]

    def _inputs(self, half: int, device: str) -> tuple[Tensor, Tensor]:
        source = torch.randint(2**31, (half // 4,), dtype=torch.int32, device=device)
        return source, torch.empty_like(source)

    def run(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """Copy one pair."""
        source, target = pair
        return target.copy_(source)
