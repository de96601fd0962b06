"""The expert of one stage, and the networks that compute its alpha: the paper's KAN and its MLP ablation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .. import ops
from ..plans.rows import MAX_READS

# Half width of the hidden spline coefficients at the start. The offsets of neighbouring steps differ by a few
# hundredths. With small coefficients their hidden values nearly coincide, and training at the paper's learning rate
# moves the alphas of all steps together. At 4, hidden values fill the default grid.
_HIDDEN_NOISE = 4.0
# AdamW moves a coefficient by about the learning rate in each step, whatever its gradient. This scale sets how far
# alpha moves with it.
_LAST_SCALE = 4.0
PROJECTIONS = ("difference", "span", "uniform")


class KanLayer(nn.Module):
    """A KAN layer (Eq. 9): the function of each edge is a SiLU times a weight plus a B-spline times a scale.

    An edge has a base weight, a scale and `grid + order` spline coefficients; there is no bias.

    Args:
        inputs, outputs: number of values in and out, I and Q.
        grid: intervals of the spline grid.
        order: degree of the spline pieces.
        grid_range: (low, high) of the grid. Outside it the spline falls to 0 within `order` intervals.
    """

    def __init__(self, inputs: int, outputs: int, grid: int, order: int, grid_range: tuple[float, float]) -> None:
        super().__init__()
        self.order = order
        self.grid_range = grid_range
        self.base_weight = nn.Parameter(torch.empty(outputs, inputs))
        self.spline_weight = nn.Parameter(torch.empty(outputs, inputs, grid + order))
        self.spline_scale = nn.Parameter(torch.empty(outputs, inputs))

    def reset(
        self, base: float, scale: float, noise: float, constant: float, generator: torch.Generator | None
    ) -> None:
        """Draw new parameters.

        Inside the grid the basis functions sum to one, so equal coefficients make a constant function. Each output
        starts as `constant` plus a random function.

        Args:
            base: half width of the base weights' uniform distribution.
            scale: the spline scale of every edge.
            noise: half width of the spline coefficients' uniform distribution around their mean.
            constant: the sum over the inputs of the splines' means.
            generator: CPU generator; None draws from torch's global one.
        """
        mean = constant / (scale * self.base_weight.shape[1])
        nn.init.uniform_(self.base_weight, -base, base, generator=generator)
        nn.init.constant_(self.spline_scale, scale)
        nn.init.uniform_(self.spline_weight, mean - noise, mean + noise, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        rows = x.reshape(-1, x.shape[-1])
        result = ops.kan(rows, *self.parts, self.grid_range, self.order)
        return result.reshape(*x.shape[:-1], -1)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Base weight [Q, I], spline weight [Q, I, M] and spline scale [Q, I], as the operators take them."""
        return self.base_weight, self.spline_weight, self.spline_scale


class Kan(nn.Module):
    """The Kolmogorov-Arnold network of Eq. 6, with one output.

    The paper's has widths [51, 256, 256] at T = 50: 78,848 edges of 10 parameters each.

    Args:
        widths: number of inputs, then of every hidden layer.
        grid: intervals of the spline grid, at least 1.
        order: degree of the spline pieces, at least 1; 3 is cubic.
        grid_range: (low, high) of the grid. Offsets of sigma lie in [-1, 1].
        constant: the value the output starts near, whatever the input.
        generator: CPU generator of the initial parameters; None draws from torch's global one.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grid: int = 5,
        order: int = 3,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        constant: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if grid < 1 or order < 1 or not grid_range[0] < grid_range[1]:
            raise ValueError(
                f"grid={grid}, order={order}, grid_range={grid_range}: expected grid and order of at least 1 "
                "and a range from low to high"
            )
        layers = [KanLayer(i, o, grid, order, grid_range) for i, o in pairwise([*widths, 1])]
        for layer, size in zip(layers[:-1], widths[:-1], strict=True):
            root = math.sqrt(size)
            layer.reset(1 / root, 1 / root, _HIDDEN_NOISE, 0.0, generator)
        root = math.sqrt(widths[-1])
        layers[-1].reset(1 / widths[-1], _LAST_SCALE / root, 0.1 / root, constant, generator)
        self.layers = nn.ModuleList(layers)
        self.order, self.grid_range = order, grid_range

    @property
    def fused(self) -> bool:
        """Whether it has the paper's shape, which `ops.predict` evaluates together with a forecast."""
        return self.order == 3 and len(self.layers) == ops.LAYERS

    @property
    def parts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The parameters of every layer, as the operators take them."""
        return [layer.parts for layer in self.layers if isinstance(layer, KanLayer)]

    def forward(self, x: Tensor) -> Tensor:
        """[..., widths[0]] -> [...]."""
        for layer in self.layers:
            x = layer(x)
        return x.squeeze(-1)


class Mlp(nn.Module):
    """The multilayer perceptron of the paper's ablation (Eq. 12): SiLU after every hidden layer, one output.

    Args:
        widths: number of inputs, then of every hidden layer.
        constant: the value the output starts near: the bias of the last layer.
        generator: CPU generator of the initial parameters; None draws from torch's global one.
    """

    def __init__(self, widths: Sequence[int], constant: float = 1.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        layers = [skip_init(nn.Linear, i, o) for i, o in pairwise([*widths, 1])]
        *hidden, last = layers
        for layer in hidden:
            _init_linear(layer, generator)
        nn.init.uniform_(last.weight, -1 / last.in_features, 1 / last.in_features, generator=generator)
        nn.init.constant_(last.bias, constant)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """[..., widths[0]] -> [...]."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.silu(layer(x))
        return last(x).squeeze(-1)


class Expert(nn.Module):
    """The forecaster of one stage.

    z = W [F_{t-K}, ..., F_{t-1}] + b  (Eq. 4),  alpha = net(dt)  (Eq. 5 and 6),  F^_t = F_{t-1} + alpha z  (Eq. 7)

    `projection` holds W in other coordinates: it reads the differences F_{t-1} - F_{t-K}, ..., F_{t-1} - F_{t-2} and
    F_{t-1} itself. That is the same linear map. But AdamW moves all coordinates equally fast, and the paper's learning
    rate moves them little: with weights of features it would mostly fit the level that all features share.

    Args:
        window: K, number of earlier features read.
        net: maps the offsets [T + 1] to the scalar alpha.
        projection_init: how W starts; b starts at 0. "difference": newest minus previous feature;
            "span": newest minus oldest of the window, divided by K - 1, the mean slope; both need K >= 2.
            "uniform": torch's default for Linear, b too.
        scale: divides "difference" and "span", so that alpha = scale extrapolates linearly.
        generator: CPU generator for "uniform"; None draws from torch's global one.
    """

    projection: nn.Linear

    def __init__(
        self,
        window: int,
        net: nn.Module,
        projection_init: str = "span",
        scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if projection_init not in PROJECTIONS:
            raise ValueError(f"projection_init={projection_init!r}: expected one of {PROJECTIONS}")
        least = 1 if projection_init == "uniform" else 2
        if not least <= window <= MAX_READS:
            raise ValueError(
                f"window={window}: expected {least} to {MAX_READS} features with projection_init={projection_init!r}"
            )
        self.window = window
        self.net = net
        self.projection = skip_init(nn.Linear, window, 1)
        _init_linear(self.projection, generator)
        with torch.no_grad():
            weights = self.projection.weight[0].clone()
            if projection_init != "uniform":
                oldest = 0 if projection_init == "span" else window - 2
                slope = 1 / (window - 1 - oldest) / scale
                weights = torch.zeros(window)
                weights[oldest], weights[-1] = -slope, slope
                self.projection.bias.zero_()
            self.projection.weight[0, :-1] = -weights[:-1]
            self.projection.weight[0, -1] = weights.sum()

    @property
    def weights(self) -> Tensor:
        """W of Eq. 4: [K], one weight for each feature of the window, oldest first."""
        stored = self.projection.weight[0]
        return torch.cat([-stored[:-1], stored.sum().unsqueeze(0)])

    def forward(self, history: Tensor, dt: Tensor) -> Tensor:
        """Forecast the next feature (Eq. 4 to 7).

        Args:
            history: [K, ...], any float dtype; features of the K steps before, oldest first.
            dt: [T + 1], sigma_t - sigma_i (Eq. 5).

        Returns:
            [...], in the wider of the dtypes of `history` and the parameters.
        """
        history = history.to(torch.promote_types(history.dtype, self.projection.weight.dtype))
        slots = torch.arange(self.window, dtype=torch.int32, device=history.device)
        wide = ops.wide_dtype(history)
        weights, bias = self.weights.to(wide), self.projection.bias.to(wide)
        net = self.net
        if isinstance(net, Kan) and net.fused:
            return ops.predict(history, slots, weights, bias, dt, net.parts, net.grid_range)[0]
        alpha = net(dt).to(wide)
        newest = torch.zeros_like(weights)
        newest[-1] = 1
        return ops.forecast(history, slots, newest + alpha * weights, alpha * bias)


def _init_linear(layer: nn.Linear, generator: torch.Generator | None) -> None:
    """torch's default for Linear from `generator`: weights and bias uniform within 1 / sqrt(inputs)."""
    bound = 1 / math.sqrt(layer.in_features)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
