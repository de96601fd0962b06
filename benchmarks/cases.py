"""The operators on features in a benchmark: inputs, plain formulas, and the form of every provider.

Sizes: B batch, N tokens, D channels, C projected channels, K window, L values of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lesa import ops
from lesa.ops import reference

from .measuring import Expected, copies_beyond, expected

FUSED = ("triton", "cpp")
MODE = "max-autotune-no-cudagraphs"
EPS = 1e-6
ROWS, ROW = 4, 2


class Shape(NamedTuple):
    """Sizes of a model's feature and of its projection."""

    B: int
    N: int
    D: int
    C: int


SHAPES = {
    "flux": Shape(1, 4096, 3072, 64),  # FLUX, 1024 x 1024
    "qwen": Shape(1, 6889, 3072, 64),  # Qwen-Image, 1328 x 1328
    "hunyuan": Shape(1, 20400, 3072, 64),  # HunyuanVideo, 480 x 640, 65 frames
    "wan": Shape(1, 32760, 5120, 64),  # Wan, 480 x 832, 81 frames
    "emoji": Shape(1, 256, 256, 48),  # the bundled emoji-flux
    "tiny": Shape(1, 24, 40, 8),  # --quick
}


@dataclass
class Inputs:
    """What one round reads; each round has its own."""

    history: Tensor
    target: Tensor
    layers: list[list[Tensor]] = field(default_factory=list)
    features: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.features = list(self.history)


Outputs = tuple[Tensor, ...]
Form = Callable[[Any], Outputs]


class Case:
    """What rows on the same inputs share: the inputs of all rounds, and the expected results on the first."""

    inputs: Sequence[Any]
    dtype: torch.dtype
    slack = 2.0  # tolerances that the others' error may reach

    def formula(self, i: Any, dtype: torch.dtype) -> Outputs:
        """The operator in plain torch, computed in `dtype`."""
        raise NotImplementedError

    def judged(self, outputs: Outputs) -> Outputs:
        """The outputs as they are compared."""
        return outputs

    def expected(self) -> list[Expected]:
        """The expected outputs on the first inputs, see `measuring.expected`."""
        exact, plain = (self.formula(self.inputs[0], dtype) for dtype in (torch.float64, self.dtype))
        return expected([part.detach() for part in self.judged(exact)], [part.detach() for part in self.judged(plain)])


class FeatureCase(Case):
    """Inputs of an operator on features, too large for the cache, and its forms by provider.

    The window lies in the ring in order, which the providers that read the ring as one matrix need. Rows, modulation
    and projection are the same in all rounds: at most 0.4 MB.

    Args:
        shape: of the features.
        k: window.
        dtype: of the features.
        device: "cuda" or "cpu".
        cache: bytes; the inputs of all rounds are four times as large.
    """

    def __init__(self, shape: Shape, k: int, dtype: torch.dtype, device: str, cache: int) -> None:
        self.shape, self.k, self.dtype, self.device = shape, k, dtype, device
        B, N, D, C = shape
        self.L = B * N * D
        self.slots = torch.arange(k, dtype=torch.int32, device=device)
        self.weights = torch.randn(ROWS, k, device=device)
        self.bias = torch.randn(ROWS, device=device)
        self.step = torch.tensor([ROW], device=device)
        self.w, self.b = self.weights[ROW].clone(), self.bias[ROW].clone()
        # Sequences of plain numbers, as torch's scalar arguments take them.
        self.numbers, self.number = self.w.tolist(), self.b.item()
        self.w_low, self.b_low = self.w.to(dtype), self.b.to(dtype)
        self.scale = (1 + 0.3 * torch.randn(B, D, device=device)).to(dtype)
        self.shift = torch.randn(B, D, device=device).to(dtype)
        self.proj = (torch.randn(C, D, device=device) / D**0.5).to(dtype)
        self.proj_bias = torch.randn(C, device=device).to(dtype)
        self.inputs = [self._inputs() for _ in range(copies_beyond(cache, self._read))]

    @property
    def _read(self) -> int:
        """Bytes of the inputs of one round."""
        return self.k * self.L * self.dtype.itemsize

    def _inputs(self) -> Inputs:
        B, N, D, _ = self.shape
        ring = torch.randn(self.k + 1, B, N, D, device=self.device, dtype=self.dtype)
        return Inputs(ring[: self.k], ring[self.k])

    @property
    def bytes(self) -> int:
        """The least that must be moved: the window read, the forecast written."""
        return (self.k + 1) * self.L * self.dtype.itemsize

    def formula(self, i: Inputs, dtype: torch.dtype) -> Outputs:
        return (reference.forecast(i.history.to(dtype), self.w.to(dtype), self.b.to(dtype)),)

    def forms(self, provider: str) -> dict[str, Form]:
        """Every way `provider` may do it; the fastest is reported."""
        if provider in FUSED:
            return {provider: self.fused(provider)}
        if provider == "compile":
            torch.compiler.reset()
        return getattr(self, provider)()

    def fused(self, backend: str) -> Form:
        """lesa's operator."""
        return lambda i: (ops.forecast(i.history, self.slots, self.w, self.b, backend),)

    def eager(self) -> dict[str, Form]:
        """The best torch can do with the operations it has."""
        return {name: lambda i, form=form: (form(i),) for name, form in self.sums.items()}

    def paper(self) -> dict[str, Form]:
        """As in the released code: a stack, Linear(K, 1) over its last axis, times alpha, plus the newest feature."""
        return {"stack": lambda i: (self.paper_sum(i),)}

    def compile(self) -> dict[str, Form]:
        """The sum over features as a list, which is fused into one kernel."""
        run = compiled(lambda features, w, b: wide_sum(features, w, b).to(features[0].dtype))
        return {"sum": lambda i: (run(i.features, self.w, self.b),)}

    @property
    def sums(self) -> dict[str, Callable[[Inputs], Tensor]]:
        """Eager ways to write the weighted sum."""
        return {"add_": self._add, "addcmul_": self._addcmul, "matmul": self._matmul, "einsum": self._einsum}

    def _add(self, i: Inputs) -> Tensor:
        out = i.features[0] * self.numbers[0]
        for feature, number in zip(i.features[1:], self.numbers[1:], strict=True):
            out.add_(feature, alpha=number)
        return out.add_(self.number)

    def _addcmul(self, i: Inputs) -> Tensor:
        out = torch.addcmul(self.b_low, i.features[0], self.w_low[0])
        for feature, w in zip(i.features[1:], self.w_low[1:], strict=True):
            out.addcmul_(feature, w)
        return out

    def _matmul(self, i: Inputs) -> Tensor:
        return (self.w_low @ i.history.view(self.k, -1)).view(i.target.shape).add_(self.b_low)

    def _einsum(self, i: Inputs) -> Tensor:
        return torch.einsum("k,kbnd->bnd", self.w_low, i.history).add_(self.b_low)

    @cached_property
    def _paper_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, W and b whose forecast is the row's: W = (w - newest) / alpha."""
        alpha = 1.5
        w = self.w.clone()
        w[-1] -= 1
        parts = torch.tensor(alpha, device=self.device), (w / alpha).unsqueeze(0), (self.b / alpha).reshape(1)
        low = [part.to(self.dtype) for part in parts]
        return low[0], low[1], low[2]

    def paper_sum(self, i: Inputs) -> Tensor:
        """See `paper`."""
        alpha, w, b = self._paper_row
        return i.features[-1] + alpha * F.linear(torch.stack(i.features, -1), w, b).squeeze(-1)


class ForecastAt(FeatureCase):
    """The forecast by a row of a table, the step on the device."""

    def fused(self, backend: str) -> Form:
        slots = self.slots.repeat(ROWS, 1)
        return lambda i: (ops.forecast_at(i.history, slots, self.weights, self.bias, self.step, backend),)


class Head(FeatureCase):
    """The forecast, a layer norm with modulation, and the projection."""

    @property
    def bytes(self) -> int:
        B, N, D, C = self.shape
        return (self.k * self.L + B * N * C + C * D + 2 * B * D + C) * self.dtype.itemsize

    def head(self, x: Tensor) -> Tensor:
        """From feature to what the denoiser returns, in the dtype of `x`."""
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
        scale, shift, proj, bias = (p.to(x.dtype) for p in (self.scale, self.shift, self.proj, self.proj_bias))
        return F.linear(torch.addcmul(shift.unsqueeze(1), normed, scale.unsqueeze(1)), proj, bias)

    def formula(self, i: Inputs, dtype: torch.dtype) -> Outputs:
        return (self.head(super().formula(i, dtype)[0]),)

    def fused(self, backend: str) -> Form:
        slots = self.slots.repeat(ROWS, 1)
        keep = torch.full((ROWS,), -1, dtype=torch.int32, device=self.device)
        row = (slots, self.weights, self.bias, keep, self.step, self.scale, self.shift, self.proj, self.proj_bias, EPS)
        return lambda i: (ops.forecast_head(i.history, *row, backend=backend),)

    def eager(self) -> dict[str, Form]:
        return {name: lambda i, form=form: (self.head(form(i)),) for name, form in self.sums.items()}

    def paper(self) -> dict[str, Form]:
        return {"stack": lambda i: (self.head(self.paper_sum(i)),)}

    def compile(self) -> dict[str, Form]:
        run = compiled(lambda features, w, b: self.head(wide_sum(features, w, b).to(features[0].dtype)))
        return {"sum": lambda i: (run(i.features, self.w, self.b),)}


def wide_sum(features: list[Tensor], w: Tensor, b: Tensor) -> Tensor:
    """sum_k w_k F_k + b, feature by feature, in the wide dtype, as a compiler fuses it best."""
    total = b
    for k, feature in enumerate(features):
        total = total + w[k] * feature.to(w.dtype)
    return total


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for this one shape, as well as torch can."""
    return torch.compile(function, mode=MODE, dynamic=False, fullgraph=True)
