"""What a denoiser call is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LARGE = 1 << 16  # elements


@dataclass(frozen=True)
class Inputs:
    """The arguments of one denoiser call.

    Args:
        names: of the parameters of the denoiser's forward, in order.
        args, kwargs: as the call was made.
    """

    names: Sequence[str]
    args: tuple
    kwargs: dict[str, Any]

    @property
    def sample_name(self) -> str:
        """What the denoiser calls its noisy sample."""
        return "sample" if "sample" in self.names else "hidden_states"

    @property
    def sample(self) -> Any:
        """The noisy sample."""
        return self.get(self.sample_name)

    def get(self, name: str) -> Any:
        """The argument `name`; None where it is not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        place = self.names.index(name) if name in self.names else len(self.args)
        return self.args[place] if place < len(self.args) else None

    def given(self, **changes: Any) -> Inputs:
        """The same with other values of arguments that the call was made with."""
        args = [changes.pop(name, value) for name, value in zip(self.names, self.args, strict=False)]
        return Inputs(self.names, (*args, *self.args[len(self.names) :]), {**self.kwargs, **changes})

    def differs(self, other: Inputs, besides: Sequence[str]) -> bool:
        """Whether any argument but some differs, tensors by value; waits for the device where they are others."""
        return self._any(other, besides, lambda one, another: not _same(one, another))

    def renews(self, other: Inputs, besides: Sequence[str]) -> bool:
        """Whether any argument but some is a large tensor that the other does not have; never waits."""
        return self._any(other, besides, _renewed)

    def versions(self) -> list[int]:
        """How often each tensor among the arguments was written to; those of inference mode do not say."""
        return [t._version for t in _tensors([*self.args, *self.kwargs.values()]) if not t.is_inference()]

    def _any(self, other: Inputs, besides: Sequence[str], wrong: Callable[[Any, Any], bool]) -> bool:
        names, others = ({*each.names[: len(each.args)], *each.kwargs} for each in (self, other))
        if names != others or len(self.args) > len(self.names):
            return True
        return any(wrong(self.get(name), other.get(name)) for name in names if name not in besides)


def _renewed(one: Any, other: Any) -> bool:
    if one is other:
        return False
    known = {id(tensor) for tensor in _tensors([other])}
    return any(t.numel() > _LARGE and id(t) not in known for t in _tensors([one]))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among some arguments, and in lists and dictionaries of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return alike and bool(torch.equal(one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, (bool, int, float, str)) and one == other
