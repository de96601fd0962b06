"""Tiny pipelines of many classes, a family a builder: what they share, and the list of all.

The families are in `zoo_images`, `zoo_videos` and `zoo_unets`. The components of a family are built once and shared by
its pipelines. Text is given as embeddings where the pipeline takes them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from oracle import Subject
from PIL import Image
from torch import Tensor, nn

STEPS = 6
Parts = Callable[[], dict[str, Any]]


def subject(
    pipeline: type,
    parts: Parts,
    name: str = "",
    around: Callable[[], Any] = nullcontext,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **request: Any,
) -> Subject:
    """A subject whose pipeline is built of `parts`, its scheduler copied.

    Args:
        pipeline: its class.
        parts: makes its components.
        name: of the subject; the class by default.
        around: makes a context in which the call runs.
        settings: attributes of the pipeline.
        request: keyword arguments of a call.
    """

    def make() -> Any:
        own = {key: copy.deepcopy(part) if "scheduler" in key else part for key, part in parts().items()}
        pipe = pipeline(**own)
        pipe.set_progress_bar_config(disable=True)
        for key, value in settings.items():
            setattr(pipe, key, value)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval()
        return pipe

    def call() -> dict[str, Any]:
        given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in request.items()}
        return {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), **given}

    return Subject(name or pipeline.__name__, make, call, around)


def family(build: Parts) -> Parts:
    """A builder of components that builds them once."""

    @functools.cache
    def parts() -> dict[str, Any]:
        torch.manual_seed(1)
        return {name: random(part) if isinstance(part, nn.Module) else part for name, part in build().items()}

    return parts


def joined(parts: Parts, *dropped: str, **more: Callable[[], Any]) -> Parts:
    """The components of a family without some, and with others, which are built once."""
    extra = family(lambda: {name: make() for name, make in more.items()})
    return lambda: {**{name: part for name, part in parts().items() if name not in dropped}, **extra()}


@torch.no_grad()
def random(model: nn.Module) -> nn.Module:
    """Redraw every matrix and convolution, so that no part is left at a zero initialisation."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model.eval()


@functools.cache
def noise(*shape: int, seed: int = 0) -> Tensor:
    """Embeddings or latents of normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def picture(height: int = 32, width: int = 32, channels: int = 3) -> Tensor:
    """A picture [1, channels, height, width] of numbers in 0 ... 1."""
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(7))


def photo(size: int = 32) -> Image.Image:
    """The same picture as a file would give it."""
    return Image.fromarray((picture(size, size)[0].permute(1, 2, 0) * 255).byte().numpy())


@functools.cache
def mask(height: int = 32, width: int = 32) -> Tensor:
    """A mask [1, 1, height, width] of the left half."""
    half = torch.zeros(1, 1, height, width)
    half[..., : width // 2] = 1
    return half


def embeds(width: int, length: int = 6, names: Sequence[str] = ("prompt_embeds", "negative_prompt_embeds")) -> Any:
    """Embeddings of a prompt and of a negative one."""
    return {name: noise(1, length, width, seed=seed) for seed, name in enumerate(names)}
