"""Stand-ins that replace a denoiser's children during one call.

The denoiser's own forward runs at every step. At a computed step a wrapper around the last block takes the feature. At
a forecast step stand-ins replace the blocks and the embedders, whose results nothing needs; the model's own head
finishes the step, or, if a fused operator can, stand-ins of its norm and projection.

Between norm and projection the head modulates: m(x) = scale x + shift. The fused head learns both numbers from the
model itself: the norm's stand-in returns a row of zeros and a row of ones, and the projection's stand-in receives
m(0) and m(1), so shift = m(0) and scale = m(1) - m(0). We repeat no formula of a model.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..runtime.history import Ring
from .layouts import Layout


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
    """A block that also keeps its image stream, the feature."""

    block: nn.Module

    def __init__(self, block: nn.Module, layout: Layout) -> None:
        super().__init__()
        # DiT needs the timestep embedder in its first block, which may also be the last one.
        self.__dict__ |= {"_modules": block._modules, "block": block}
        self.position = layout.returns.index("hidden_states") if len(layout.returns) > 1 else None
        self.feature: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        self.feature = output if self.position is None else output[self.position]
        return output


class Pass(nn.Module):
    """Replaces a list of blocks and returns their inputs.

    Args:
        block: the first block. Its children stay reachable: DiT looks for its timestep embedder there.
        layout: the layout of the denoiser.
    """

    def __init__(self, block: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.__dict__["_modules"] = block._modules
        self.names = tuple(list(inspect.signature(type(block).forward).parameters)[1:])
        self.returns = layout.returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        passed = self.passed(args, kwargs)
        return tuple(passed) if len(passed) > 1 else passed[0]

    def passed(self, args: tuple, kwargs: dict) -> list[Any]:
        """The inputs that a block would update and return."""
        return [kwargs[name] if name in kwargs else args[self.names.index(name)] for name in self.returns]


class Tail(Pass):
    """Replaces the last list of blocks and returns their inputs, with the forecast as the image stream.

    With the fused head only the stream's dtype is used: some models cast the modulated probes to it.
    """

    def __init__(self, block: nn.Module, layout: Layout) -> None:
        super().__init__(block, layout)
        self.feature: Tensor | None = None
        self.reached = False
        self.wide_head = layout.wide_head

    def passed(self, args: tuple, kwargs: dict) -> list[Any]:
        """The inputs, with the forecast as the image stream."""
        passed = super().passed(args, kwargs)
        stream = self.returns.index("hidden_states")
        if self.feature is not None:
            passed[stream] = self.feature
        elif self.wide_head:
            passed[stream] = passed[stream].float()
        self.reached = True
        return passed


class Skip(nn.Module):
    """Replaces an embedder: returns one channel of its input, so that the model can still join and reshape it."""

    def forward(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        return given[..., :1] if isinstance(given, Tensor) else given


class Probe(nn.Module):
    """Replaces the head's norm: returns zeros and ones, in float32 so that the model does not round them."""

    rows: Tensor

    def __init__(self, norm: nn.LayerNorm, device: torch.device) -> None:
        super().__init__()
        zeros = torch.zeros(1, 1, norm.normalized_shape[-1], device=device)
        self.register_buffer("rows", torch.cat([zeros, zeros + 1], 1), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.rows


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

    def tap(self) -> tuple[Exchange, Tap]:
        """Exchange the last block for a computed step."""
        name = self._lists()[-1]
        last = len(_blocks(self._denoiser, name)) - 1
        block = _blocks(self._denoiser, name)[last]
        tap = self._keep("tap", (block,), lambda: Tap(block, self._layout))
        return Exchange(self._denoiser, {f"{name}.{last}": tap}), tap

    def tail(self, feature: Tensor | None) -> tuple[Exchange, Tail]:
        """Exchange embedders and blocks for a forecast step that ends in the model's own head."""
        places, tail = self._body()
        tail.feature = feature
        return Exchange(self._denoiser, places), tail

    def head(self, context: str, ring: Ring) -> tuple[Exchange, Tail]:
        """Exchange all but the timestep's path for a forecast step with the fused head; needs `fuses(ring)`."""
        places, tail = self._body()
        tail.feature = None
        norm, proj = self._head()
        device = ring.history.device
        places[self._layout.norm] = self._keep("norm", (norm, device), lambda: Probe(norm, device))
        head = self._keep(("proj", context), (norm, proj), lambda: FusedHead(ring, norm, proj))
        if head.ring is not ring:
            head.ring = ring
        places[self._layout.proj] = head
        return Exchange(self._denoiser, places), tail

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

    def _body(self) -> tuple[dict[str, nn.Module], Tail]:
        embedders = [path for path in self._layout.embedders if _child(self._denoiser, path) is not None]
        places: dict[str, nn.Module] = {path: self._keep(path, (), Skip) for path in embedders}
        names = self._lists()
        for name in names:
            first = _blocks(self._denoiser, name)[0]
            kind = Tail if name == names[-1] else Pass
            stand = self._keep((name, "block"), (first,), functools.partial(kind, first, self._layout))
            places[name] = self._keep(name, (stand,), functools.partial(nn.ModuleList, [stand]))
        return places, stand

    def _keep(self, key: Any, of: tuple[Any, ...], make: Any) -> Any:
        known = self._made.get(key)
        if known is None or known[0] != of:
            known = self._made[key] = (of, make())
        return known[1]


def _place(denoiser: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return denoiser.get_submodule(parent), name


def _blocks(denoiser: nn.Module, name: str) -> nn.ModuleList:
    blocks = denoiser.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _child(denoiser: nn.Module, path: str) -> nn.Module | None:
    parent, name = _place(denoiser, path)
    return parent._modules.get(name)


def _wrapped(module: nn.Module) -> bool:
    """Whether a hook wraps a module (offloading, casts, adapters): then its forward must run."""
    return "forward" in module.__dict__ or bool(module._forward_hooks or module._forward_pre_hooks)
