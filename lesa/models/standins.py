"""What takes the place of a denoiser's children for the time of one call.

The denoiser's own forward runs at every step. At a computed step its last block is wrapped, to take the feature. At a
forecast step stand-ins are in place of the blocks and the embedders, whose work nothing needs then; the model's own
head finishes the step, or, where a fused operator can do its work, stand-ins of its norm and projection.

The fused head asks the model itself what its head does between norm and projection: the stand-in of the norm answers
with two probes, a row of zeros and a row of ones, and from what becomes of them, shift and scale + shift, the stand-in
of the projection knows the modulation. No formula of a model is repeated here.
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
    """Puts modules in the place of a denoiser's children, and the children back, as often as asked.

    Args:
        denoiser: whose forward will run.
        places: for each dotted path the module to stand there.
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
    """A block that also shows its image stream, the feature.

    Args:
        block: does the work.
        layout: of its denoiser.
    """

    block: nn.Module

    def __init__(self, block: nn.Module, layout: Layout) -> None:
        super().__init__()
        # DiT looks for its timestep embedder among the first block's children, and the first may be the last.
        self.__dict__ |= {"_modules": block._modules, "block": block}
        self.position = layout.returns.index("hidden_states") if len(layout.returns) > 1 else None
        self.feature: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        self.feature = output if self.position is None else output[self.position]
        return output


class Pass(nn.Module):
    """In the place of a list's blocks: hands their inputs on.

    Args:
        block: the first of them. Its children can be reached here too: DiT looks for its timestep embedder there.
        layout: of its denoiser.
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
        """What a block would return, as it came in."""
        return [kwargs[name] if name in kwargs else args[self.names.index(name)] for name in self.returns]


class Tail(Pass):
    """In the place of the last list's blocks: hands their inputs on with the forecast as the image stream.

    Where the fused head makes the forecast, only the dtype of the stream matters: that of the probes' way back.
    """

    def __init__(self, block: nn.Module, layout: Layout) -> None:
        super().__init__(block, layout)
        self.feature: Tensor | None = None
        self.reached = False
        self.wide_head = layout.wide_head

    def passed(self, args: tuple, kwargs: dict) -> list[Any]:
        """What the last block would return, the image stream replaced."""
        passed = super().passed(args, kwargs)
        stream = self.returns.index("hidden_states")
        if self.feature is not None:
            passed[stream] = self.feature
        elif self.wide_head:
            passed[stream] = passed[stream].float()
        self.reached = True
        return passed


class Skip(nn.Module):
    """In the place of an embedder: one channel of its input, so that what the model joins or reshapes still fits."""

    def forward(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        return given[..., :1] if isinstance(given, Tensor) else given


class Probe(nn.Module):
    """In the place of the head's norm: zeros and ones, in float32 so that the model rounds neither."""

    rows: Tensor

    def __init__(self, norm: nn.LayerNorm, device: torch.device) -> None:
        super().__init__()
        zeros = torch.zeros(1, 1, norm.normalized_shape[-1], device=device)
        self.register_buffer("rows", torch.cat([zeros, zeros + 1], 1), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.rows


class FusedHead(nn.Module):
    """In the place of the head's projection: forecast, norm, modulation and projection in one operator.

    Args:
        ring: forecasts.
        norm: the head's norm, for its eps.
        proj: the head's projection.
    """

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
    """Makes the stand-ins of one denoiser and keeps them as long as the modules they stand for stay.

    A compiled forward would be compiled again for new ones.

    Args:
        denoiser: whose children they stand for.
        layout: of it.
    """

    def __init__(self, denoiser: nn.Module, layout: Layout) -> None:
        self._denoiser, self._layout = denoiser, layout
        self._made: dict[Any, tuple[tuple[Any, ...], Any]] = {}

    def tap(self) -> tuple[Exchange, Tap]:
        """Exchange the last block for a computed step."""
        name = self._lists()[-1]
        last = len(_blocks(self._denoiser, name)) - 1
        path, block = f"{name}.{last}", _blocks(self._denoiser, name)[last]
        tap = self._keep("tap", (block,), lambda: Tap(block, self._layout))
        return Exchange(self._denoiser, {path: tap}), tap

    def tail(self, feature: Tensor | None) -> tuple[Exchange, Tail]:
        """Exchange embedders and blocks for a forecast step that ends in the model's own head."""
        places, tail = self._body()
        tail.feature = feature
        return Exchange(self._denoiser, places), tail

    def head(self, context: str, ring: Ring) -> tuple[Exchange, Tail]:
        """Exchange all but the timestep's way for a forecast step with the fused head; `fuses(ring)` must hold."""
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
        """Whether the fused operator can do the head's work: on its device, in its dtypes, and nothing wraps it."""
        if ring.history.dim() != 4 or getattr(timestep, "dim", lambda: 0)() > 1:
            return False  # a timestep for every token modulates every token
        norm, proj = self._head()
        plain = type(proj) is nn.Linear and isinstance(norm, nn.LayerNorm) and norm.weight is None
        if not plain or _wrapped(norm) or _wrapped(proj) or type(proj.weight.data) is not Tensor:
            return False
        same = (proj.weight.dtype, proj.weight.device) == (ring.history.dtype, ring.history.device)
        return same and (ring.backend or ops.backend_of("forecast_head", ring.history)) == "triton"

    def _lists(self) -> list[str]:
        """The lists of blocks that hold any."""
        return [name for name in self._layout.blocks if len(_blocks(self._denoiser, name))]

    def _head(self) -> tuple[Any, Any]:
        return self._denoiser.get_submodule(self._layout.norm), self._denoiser.get_submodule(self._layout.proj)

    def _body(self) -> tuple[dict[str, nn.Module], Tail]:
        places: dict[str, nn.Module] = {}
        for path in self._layout.embedders:
            if _child(self._denoiser, path) is not None:
                places[path] = self._keep(path, (), Skip)
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
    """Whether something hooks a module: offloading, casts, adapters. Its forward must run then."""
    return "forward" in module.__dict__ or bool(module._forward_hooks or module._forward_pre_hooks)
