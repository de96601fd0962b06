"""Likeness: whether a request is like those that a plan was fitted to, told before anything is forecast.

Two things are compared: what the denoiser is told of the prompt, and its weights. Neither says how good forecasts will
be; a request unlike the fitted ones is only watched more closely (see `guard`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..planner.build import ENOUGH
from .inputs import Inputs

# As often the scatter of the fitted prompts may another be away from their mean: 164 captions of emoji-flux reach 2.4.
FAR = 2.5
# Relative change of a matrix; bfloat16 in the place of float32 makes 0.002.
ALTERED = 0.01
_SCATTERS = 0.01  # relative; rounding by another dtype makes 0.004
_MATRICES, _ENTRIES = 16, 16
_PROMPT = "encoder_hidden_states"


@dataclass(frozen=True)
class Prompts:
    """Where the embeddings of the fitted prompts lie, each the mean over its tokens.

    Args:
        center: [D], their mean.
        scatter: how far one lies from the mean of the others, on average; above 0.
    """

    center: tuple[float, ...]
    scatter: float

    @cached_property
    def middle(self) -> Tensor:
        """The center, [D] on the CPU."""
        return torch.tensor(self.center, device="cpu")


@dataclass(frozen=True)
class Likeness:
    """What a plan knows of the requests it was fitted to.

    Args:
        prompts: by context; nothing for one whose prompts are not given as embeddings of tokens, or are all the same.
        weights: entries of some of the denoiser's matrices [M, E]; None where they could not be read.
    """

    prompts: Mapping[str, Prompts] = field(default_factory=dict)
    weights: tuple[tuple[float, ...], ...] | None = None

    @cached_property
    def is_finite(self) -> bool:
        """Whether all its numbers are, and each scatter is above 0; many plans share one likeness."""
        known = [number for prompts in self.prompts.values() for number in (*prompts.center, prompts.scatter)]
        known += [number for matrix in self.weights or () for number in matrix]
        return all(map(math.isfinite, known)) and all(prompts.scatter > 0 for prompts in self.prompts.values())

    def distance(self, context: str, embedding: Tensor) -> float:
        """How many times the scatter the farthest of some embeddings [N, D] lies from the center; waits for the device.

        Returns:
            0 where nothing is known of the context; infinity for embeddings of another width.
        """
        known = self.prompts.get(context)
        if known is None:
            return 0.0
        if embedding.shape[1] != len(known.center):
            return math.inf
        return float((embedding.cpu() - known.middle).norm(dim=1).max()) / known.scatter

    def altered(self, weights: Tensor | None) -> bool:
        """Whether weights [M, E], see `Weights`, are others than in fitting; not where either is not known."""
        if self.weights is None or weights is None:
            return False
        before, allowed = self._before
        if torch.equal(before, weights):  # nearly always
            return False
        if before.shape != weights.shape:
            return True
        return bool(((weights - before).norm(dim=1) > allowed).any())

    @cached_property
    def _before(self) -> tuple[Tensor, Tensor]:
        """The fitted weights and by how much each row may differ: every request asks for them."""
        before = torch.tensor(self.weights, device="cpu")
        return before, ALTERED * before.norm(dim=-1)


def likeness_of(embeddings: Mapping[str, Tensor], denoiser: torch.nn.Module) -> Likeness:
    """What to remember of fitting requests.

    Args:
        embeddings: by context [P, D] of the prompts, see `embedding_of`.
        denoiser: as it ran them.
    """
    prompts = {}
    for context, own in embeddings.items():
        count, center = len(own), own.double().mean(0)
        if count < ENOUGH or not bool(own.isfinite().all()):
            continue
        apart = float((own.double() - center).norm(dim=1).mean()) * count / (count - 1)
        if apart > _SCATTERS * float(center.norm()):  # negative prompts may be all the same, which tells nothing
            prompts[context] = Prompts(tuple(center.float().tolist()), apart)
    weights = Weights(denoiser).read()
    return Likeness(prompts, None if weights is None else tuple(map(tuple, weights.tolist())))


def embedding_of(inputs: Inputs | None) -> Tensor | None:
    """The mean embedding [N, D] of the tokens of each prompt of a call, in float32; None where it has none."""
    embedded = None if inputs is None else inputs.get(_PROMPT)
    if not isinstance(embedded, Tensor) or embedded.dim() != 3 or not embedded.is_floating_point():
        return None
    return embedded.detach().float().mean(1)


class Weights:
    """Some entries of some of a denoiser's matrices; which ones is settled here, what they are at each reading.

    It depends on how many matrices there are: where an adapter brings its own, others are taken.
    """

    def __init__(self, denoiser: torch.nn.Module) -> None:
        # Where they are, not they themselves: offloading and quantising put others there.
        places = [
            (module, name)
            for module in denoiser.modules()
            for name, p in module.named_parameters(recurse=False)
            if p.dim() > 1 and p.is_floating_point()
        ]
        chosen = sorted(random.Random(0).sample(range(len(places)), min(_MATRICES, len(places))))
        self._places = [places[i] for i in chosen]
        self._of = _kind(denoiser)

    def serves(self, denoiser: torch.nn.Module) -> bool:
        """Whether it is this denoiser, with no more or fewer adapters."""
        return self._of == _kind(denoiser)

    def read(self) -> Tensor | None:
        """[M, E] in float32 on the CPU; waits for the device.

        Returns:
            None where there are none, or they are not at hand (offloaded, sharded, quantised).
        """
        taken: list[Any] = [getattr(module, name, None) for module, name in self._places]
        if not taken or not all(map(_is_whole, taken)):
            return None
        with torch.no_grad():
            entries = [_entries(p) for p in taken]
            if len({(e.dtype, e.device) for e in entries}) > 1:
                entries = [e.to(entries[0].device, torch.float32) for e in entries]
            return torch.stack(entries).cpu().float()  # one copy from the device


def _kind(denoiser: torch.nn.Module) -> tuple[int, bool]:
    # Cheaper than counting parameters at each request; diffusers says so where it puts adapters in.
    return id(denoiser), bool(getattr(denoiser, "_hf_peft_config_loaded", False))


def _is_whole(p: Any) -> bool:
    return (
        (type(p) is Tensor or issubclass(type(p), Parameter))
        and p.is_floating_point()
        and p.is_contiguous()
        and not p.is_meta
        and p.numel() > 0
    )


def _entries(matrix: Tensor) -> Tensor:
    """[E] of a contiguous matrix, spread over it; repeated where it has fewer."""
    size = matrix.numel()
    if size < _ENTRIES:
        return matrix.view(-1).repeat(_ENTRIES)[:_ENTRIES]
    return matrix.as_strided((_ENTRIES,), (size // _ENTRIES,))
