"""Stand-ins that replace a denoiser's children during one call.

The denoiser's own forward runs at every step. At a computed step a wrapper around the norm of the head takes what the
head is given, the feature: all that the forward does between and after its blocks is in it. At a forecast step
stand-ins replace the blocks and the embedders, whose results nothing needs, and the norm is given the forecast; the
model's own head finishes the step, or, if a fused operator can, stand-ins of its norm and projection.

Between norm and projection the head modulates: m(x) = scale x + shift. The fused head learns both numbers from the
model itself: the norm's stand-in returns a row of zeros and a row of ones, and the projection's stand-in receives
m(0) and m(1), so shift = m(0) and scale = m(1) - m(0). We repeat no formula of a model.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import skip  # permanent; torch.compiler.disable acts per call

from .. import ops
from ..runtime.history import Ring
from .layouts import Layout

# Of a ControlNet, for the blocks; some forwards count them against the blocks that took one.
_RESIDUALS = ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")


class Exchange:
    """Replaces a denoiser's children by other modules and puts them back, any number of times.

    Args:
        denoiser: the module whose forward will run.
        places: the replacement at each dotted path.
    """

    def __init__(self, denoiser: nn.Module, places: dict[str, nn.Module]) -> None:
        self._places = [(*_place(denoiser, path), module) for path, module in places.items()]
        self._own = [parent._modules[name] for parent, name, _ in self._places]

    def enter(self) -> None:
        """Put the modules in."""
        for parent, name, module in self._places:
            parent._modules[name] = module

    def undo(self) -> None:
        """Put the children back."""
        for (parent, name, _), own in zip(self._places, self._own, strict=True):
            parent._modules[name] = own


class Tap(nn.Module):
    """The head's norm, which also keeps what it is given, the feature."""

    norm: nn.Module

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.__dict__["norm"] = norm
        self.dtype: torch.dtype | None = None
        self.feature: Tensor | None = None

    def forward(self, stream: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.feature = stream if self.dtype is None else stream.to(self.dtype)
        return self.norm(stream, *args, **kwargs)


class Feed(nn.Module):
    """The head's norm, which takes the forecast for what it is given."""

    norm: nn.Module

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.__dict__["norm"] = norm
        self.feature: Tensor | None = None
        self.reached = False

    def forward(self, stream: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.reached = True
        assert self.feature is not None
        return self.norm(self.feature.to(stream.dtype), *args, **kwargs)

    def stream(self, given: Tensor) -> Tensor:
        """Zeros like the forecast, one number in memory, for what the forward does between the blocks and the head.

        Args:
            given: what the blocks are given; where the forward reshapes it before the head, it is reshaped still.
        """
        assert self.feature is not None
        return _zeros(self.feature.new_zeros(1), self.feature.shape, given)


class Probe(Feed):
    """Replaces the head's norm: returns zeros and ones, in float32 so that the model does not round them.

    Args:
        norm: that it replaces.
        ring: the operands of the fused head.
        wide: whether the model casts the modulated probes to the dtype of its image stream.
    """

    rows: Tensor

    def __init__(self, norm: nn.LayerNorm, ring: Ring, wide: bool) -> None:
        super().__init__(norm)
        self.ring, self.wide = ring, wide
        zeros = torch.zeros(1, 1, norm.normalized_shape[-1], device=ring.history.device)
        self.register_buffer("rows", torch.cat([zeros, zeros + 1], 1), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.reached = True
        return self.rows

    def stream(self, given: Tensor) -> Tensor:
        """Zeros like a feature, one number in memory."""
        history = self.ring.history
        zero = history.new_zeros(1, dtype=torch.float32 if self.wide else history.dtype)
        return _zeros(zero, history.shape[1:], given)


class Pass(nn.Module):
    """Replaces a list of blocks and returns their inputs.

    Args:
        block: the first block. Its children and plain attributes stay reachable: DiT looks for its timestep embedder
            there, and SD3 for whether a block is the last one.
        returns: what a block returns, by the names of its arguments.
    """

    def __init__(self, block: nn.Module, returns: tuple[str, ...]) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(block).items() if type(value) in (bool, int, float, str)}
        self.__dict__ |= {**plain, "_modules": block._modules}
        self.names = tuple(list(inspect.signature(type(block).forward).parameters)[1:])
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        passed = self.passed(args, kwargs)
        return tuple(passed) if len(passed) > 1 else passed[0]

    def passed(self, args: tuple, kwargs: dict) -> list[Any]:
        """The inputs that a block would update and return."""
        return [kwargs[name] if name in kwargs else args[self.names.index(name)] for name in self.returns]


class Tail(Pass):
    """Replaces the last list of blocks and returns their inputs, with the image stream that the head's norm stands for.

    Nothing of its values is used: only what the forward does with its shape and dtype.
    """

    head: Feed

    def passed(self, args: tuple, kwargs: dict) -> list[Any]:
        """The inputs, with zeros as the image stream."""
        passed = super().passed(args, kwargs)
        stream = self.returns.index("hidden_states") if len(passed) > 1 else 0
        passed[stream] = self.head.stream(passed[stream])
        return passed


class Skip(nn.Module):
    """Replaces an embedder: returns one channel of its input, so that the model can still join and reshape it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = next(iter((*args, *kwargs.values())), None)
        # A copy: a forward may write into what an embedder returns.
        return given[..., :1].clone() if isinstance(given, Tensor) else given


class FusedHead(nn.Module):
    """Replaces the head's projection: forecast, norm, modulation and projection in one operator."""

    def __init__(self, ring: Ring, norm: nn.LayerNorm, proj: nn.Linear) -> None:
        super().__init__()
        self.ring, self.proj, self.eps = ring, proj, norm.eps

    def forward(self, probes: Tensor) -> Tensor:
        ring, weight, bias = self.ring, self.proj.weight.detach(), self.proj.bias
        shift, both = probes.float().expand(ring.history.shape[1], -1, -1).unbind(1)
        head = (both - shift, shift, weight, None if bias is None else bias.detach(), self.eps)
        row = (ring.history, ring.slots, ring.weights, ring.bias, ring.keep, ring.step)
        return ops.forecast_head(*row, *head, ring.backend)


class Stands:
    """Makes the stand-ins of one denoiser and keeps them while its modules stay.

    New stand-ins would make torch.compile compile again.
    """

    def __init__(self, denoiser: nn.Module, layout: Layout) -> None:
        self._denoiser, self._layout = denoiser, layout
        self._made: dict[Any, tuple[tuple[Any, ...], Any]] = {}

    def tap(self, dtype: torch.dtype) -> tuple[Exchange, Tap]:
        """Exchange the head's norm for a computed step.

        Args:
            dtype: of the image stream, which a wide head's norm is given in float32.
        """
        norm, _ = self._head()
        tap = self._keep("tap", (norm,), lambda: Tap(norm))
        tap.dtype = dtype if self._layout.wide_head else None
        return Exchange(self._denoiser, {self._layout.norm: tap}), tap

    def tail(self, forward: Callable[..., Any], feature: Tensor) -> tuple[Callable[..., Any], Exchange, Feed]:
        """What runs a forecast step that ends in the model's own head, its exchange and what stands for the norm."""
        norm, _ = self._head()
        feed = self._keep("feed", (norm,), lambda: Feed(norm))
        # A copy: a view of the ring, at another offset each step, makes torch.compile compile again.
        return self._finish(forward, {}, feed, feature.clone())

    def head(self, forward: Callable[..., Any], context: str, ring: Ring) -> tuple[Callable[..., Any], Exchange, Feed]:
        """As `tail`, for a forecast step with the fused head; needs `fuses(ring)`."""
        norm, proj = self._head()
        of = norm, proj, ring.history.device
        probe, fused = self._keep(
            ("fused", context), of, lambda: (Probe(norm, ring, self._layout.wide_head), FusedHead(ring, norm, proj))
        )
        if fused.ring is not ring:
            probe.ring = fused.ring = ring
        return self._finish(forward, {self._layout.proj: fused}, probe, None)

    def fuses(self, ring: Ring, timestep: Any) -> bool:
        """Whether the fused operator can replace the head: same device and dtype, and no wrapper."""
        if ring.history.dim() != 4 or getattr(timestep, "dim", lambda: 0)() > 1:
            return False  # one timestep per token: one modulation per token
        norm, proj = self._head()
        plain = type(proj) is nn.Linear and isinstance(norm, nn.LayerNorm) and norm.weight is None
        if not plain or _wrapped(norm) or _wrapped(proj) or type(proj.weight.data) is not Tensor:
            return False
        same = (proj.weight.dtype, proj.weight.device) == (ring.history.dtype, ring.history.device)
        return same and (ring.backend or ops.backend_of("forecast_head", ring.history)) == "triton"

    def _lists(self) -> list[str]:
        """The lists of blocks that are not empty."""
        return [name for name in self._layout.blocks if len(_blocks(self._denoiser, name))]

    def _head(self) -> tuple[Any, Any]:
        return self._denoiser.get_submodule(self._layout.norm), self._denoiser.get_submodule(self._layout.proj)

    def _finish(
        self, forward: Callable[..., Any], places: dict[str, nn.Module], head: Feed, feature: Tensor | None
    ) -> tuple[Callable[..., Any], Exchange, Feed]:
        run = functools.partial(_run, _finish_of(type(self._denoiser).__name__), forward, head, feature)
        return run, Exchange(self._denoiser, {**self._body(head), self._layout.norm: head, **places}), head

    def _body(self, head: Feed) -> dict[str, nn.Module]:
        embedders = [path for path in self._layout.embedders if _child(self._denoiser, path) is not None]
        places: dict[str, nn.Module] = {path: self._keep(path, (), Skip) for path in embedders}
        names = self._lists()
        for name in names:
            first = _blocks(self._denoiser, name)[0]
            kind = Tail if name == names[-1] else Pass
            stand = self._keep((name, "block"), (first,), functools.partial(kind, first, self._layout.returns_of(name)))
            places[name] = self._keep(name, (stand,), functools.partial(nn.ModuleList, [stand]))
        stand.__dict__["head"] = head  # its `_modules` are the block's own
        return places

    def _keep(self, key: Any, of: tuple[Any, ...], make: Any) -> Any:
        known = self._made.get(key)
        if known is None or known[0] != of:
            known = self._made[key] = (of, make())
        return known[1]


def _finish(forward: Callable[..., Any], head: Feed, feature: Tensor | None, args: tuple, kwargs: dict) -> Any:
    """Run a forward with stand-ins; the feature is an argument so that torch.compile takes its shape for a variable."""
    head.feature, head.reached = feature, False
    return forward(*args, **kwargs)


@functools.cache
def _finish_of(denoiser: str) -> Callable[..., Any]:
    """`_finish` with code of its own for a class: torch.compile limits the recompilations of each code object."""
    code = _finish.__code__.replace(co_name=f"_finish_{denoiser}")
    return types.FunctionType(code, _finish.__globals__)


@skip
def _run(
    finish: Callable[..., Any], forward: Any, head: Feed, feature: Tensor | None, *args: Any, **kwargs: Any
) -> Any:
    args, kwargs = _needed(args, kwargs)
    return finish(forward, head, feature, args, kwargs)


@torch.compiler.disable
def _needed(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments without a ControlNet's residuals, which only blocks need, and with copies of timesteps.

    A timestep's offset into all timesteps makes torch.compile compile again.
    """

    def own(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.dim() < 2 and value.storage_offset() else value

    needed = {name: None if name in _RESIDUALS else own(value) for name, value in kwargs.items()}
    return tuple(map(own, args)), needed


def _zeros(zero: Tensor, shape: torch.Size, given: Tensor) -> Tensor:
    """A zero as large as a feature; laid out as what the blocks are given, where that holds as many numbers."""
    laid_out = len(shape) != given.dim() and shape.numel() == given.numel()
    return zero.expand(given.shape if laid_out else shape)


def _place(denoiser: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return denoiser.get_submodule(parent), name


def _blocks(denoiser: nn.Module, name: str) -> nn.ModuleList:
    """A list of blocks; an empty one where the configuration has none."""
    blocks = _child(denoiser, name)
    if blocks is None:
        return nn.ModuleList()
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _child(denoiser: nn.Module, path: str) -> nn.Module | None:
    parent, name = _place(denoiser, path)
    return parent._modules.get(name)


def _wrapped(module: nn.Module) -> bool:
    """Whether a hook wraps a module (offloading, casts, adapters): then its forward must run."""
    return "forward" in module.__dict__ or bool(module._forward_hooks or module._forward_pre_hooks)
