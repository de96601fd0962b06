"""The denoisers lesa knows: where their blocks are and what a block returns. Data, and the look-up."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import Any

import torch

from ..plans.plan import Plan
from ..plans.rows import PlanError


@dataclass(frozen=True)
class Layout:
    """Where the hidden site of a denoiser class is.

    Args:
        blocks: attributes that hold its blocks, in the order they run.
        returns: what a block returns, in order, by the names of its arguments; one name means a bare tensor.
        norm: the layer norm of the head; the feature is what it is given. What the denoiser does between it and
            `proj` must be x * scale + shift, with one scale and shift for each sample and channel.
        proj: the Linear that projects to the output's channels.
        embedders: modules whose outputs only the blocks read; the rest of the forward must work with one
            channel of their inputs in place of their outputs.
        wide_head: whether norm and modulation are computed in float32 and cast to the dtype of the image stream.
    """

    blocks: tuple[str, ...]
    returns: tuple[str, ...]
    norm: str
    proj: str
    embedders: tuple[str, ...]
    wide_head: bool = False


_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
_IMAGE_FIRST = ("hidden_states", "encoder_hidden_states")
_IMAGE_ONLY = ("hidden_states",)

LAYOUTS = {
    "FluxTransformer2DModel": Layout(
        ("transformer_blocks", "single_transformer_blocks"),
        _TEXT_FIRST,
        "norm_out.norm",
        "proj_out",
        ("x_embedder", "context_embedder", "pos_embed"),
    ),
    "QwenImageTransformer2DModel": Layout(
        ("transformer_blocks",), _TEXT_FIRST, "norm_out.norm", "proj_out", ("img_in", "txt_norm", "txt_in", "pos_embed")
    ),
    "HunyuanVideoTransformer3DModel": Layout(
        ("transformer_blocks", "single_transformer_blocks"),
        _IMAGE_FIRST,
        "norm_out.norm",
        "proj_out",
        ("x_embedder", "context_embedder", "rope"),
    ),
    "WanTransformer3DModel": Layout(
        ("blocks",),
        _IMAGE_ONLY,
        "norm_out",
        "proj_out",
        ("patch_embedding", "rope"),  # the others are small, and one joins two images' tokens
        wide_head=True,
    ),
    "DiTTransformer2DModel": Layout(("transformer_blocks",), _IMAGE_ONLY, "norm_out", "proj_out_2", ("pos_embed",)),
}

_DENOISER_ATTRIBUTES = ("transformer", "unet", "decoder", "prior")  # the last two are Stable Cascade's
_SECOND = "transformer_2"  # takes over within a request, as Wan 2.2's expert for low noise does
_SAMPLE_NAMES = ("sample", "hidden_states", "x")
_TIMESTEP_NAMES = ("timestep", "timesteps", "t")


def denoisers_of(target: Any) -> tuple[torch.nn.Module, ...]:
    """The denoiser of a pipeline, or the bare denoiser itself; two where these take turns in a request.

    Raises:
        ValueError: there is none that lesa can run.
    """
    if isinstance(target, torch.nn.Module):
        module = getattr(target, "_orig_mod", target)
        if timestep_name(module) is None:
            raise ValueError(
                f"{type(module).__name__} is not a supported denoiser: its forward has no argument {_TIMESTEP_NAMES}, "
                f"and no scheduler tells its steps; give the pipeline, or one of its denoisers, e.g. "
                f"{', '.join(LAYOUTS)} or a U-Net"
            )
        return (module,)
    parts = [getattr(target, name, None) for name in _DENOISER_ATTRIBUTES]
    found = [part for part in parts if isinstance(part, torch.nn.Module)][:1]
    second = getattr(target, _SECOND, None)
    if isinstance(second, torch.nn.Module):
        found.append(second)
    if not found:
        raise ValueError(
            f"{type(target).__name__} has no supported denoiser: expected a diffusers pipeline with a "
            f"{', '.join(_DENOISER_ATTRIBUTES)}, or a denoiser module"
        )
    return tuple(getattr(module, "_orig_mod", module) for module in found)


def denoiser_of(target: Any) -> torch.nn.Module:
    """The first of `denoisers_of`."""
    return denoisers_of(target)[0]


def sample_name(denoiser: torch.nn.Module) -> str:
    """The argument of a denoiser's forward that is the noisy sample: the first one if none has a usual name."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    return next((name for name in _SAMPLE_NAMES if name in names), names[0] if names else "")


def timestep_name(denoiser: torch.nn.Module) -> str | None:
    """The argument of a denoiser's forward that is the timestep; None if it has none."""
    names = inspect.signature(type(denoiser).forward).parameters
    return next((name for name in _TIMESTEP_NAMES if name in names), None)


def layout_of(denoiser: torch.nn.Module) -> Layout:
    """Where the hidden site of a denoiser is.

    Raises:
        ValueError: the hidden site of this class is not known.
    """
    layout = LAYOUTS.get(type(denoiser).__name__)
    if layout is None:
        raise ValueError(
            f"site='hidden' is not known for {type(denoiser).__name__}: use a plan for site='output', which any "
            f"denoiser has, or one of {', '.join(LAYOUTS)}"
        )
    return layout


def config_hash(denoiser: torch.nn.Module) -> str | None:
    """A hash of a denoiser's configuration; None if it has none."""
    config = getattr(denoiser, "config", None)
    if config is None:
        return None
    public = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_fit(plan: Plan, denoiser: torch.nn.Module) -> None:
    """Check that `plan` was made for `denoiser`.

    Raises:
        PlanError: it was made for another class or configuration, or for a site that is not known here.
    """
    name, digest = type(denoiser).__name__, config_hash(denoiser)
    if plan.denoiser is not None and plan.denoiser != name:
        raise PlanError(
            f"the plan was made for {plan.denoiser} but this denoiser is a {name}: use a plan made for {name}"
        )
    if plan.config_hash is not None and plan.config_hash != digest:
        raise PlanError(
            f"the plan was made for a {name} of another configuration (hash {plan.config_hash}, this one has "
            f"{digest}): use a plan made for this model"
        )
    if plan.site == "hidden":
        try:
            layout_of(denoiser)
        except ValueError as error:
            raise PlanError(str(error)) from None
