"""The denoisers lesa knows: where their blocks are, what a block returns, and how arguments are called."""

from __future__ import annotations

import functools
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
        blocks: attributes that hold its blocks, in the order they run; a configuration may lack some.
        returns: what a block returns, in order, by the names of its arguments; one name means a bare tensor.
        norm: the layer norm of the head, or the head itself where it has none; the feature is what it is given. What
            the denoiser does between a layer norm and `proj` must be x * scale + shift, with one scale and shift for
            each sample and channel.
        proj: the Linear that projects to the output's channels.
        embedders: modules whose outputs only the blocks read; the rest of the forward must work with one
            channel of their inputs in place of their outputs.
        wide_head: whether norm and modulation are computed in float32 and cast to the dtype of the image stream.
        last: what a block of the last list returns, where that differs.
    """

    blocks: tuple[str, ...]
    returns: tuple[str, ...]
    norm: str
    proj: str
    embedders: tuple[str, ...] = ()
    wide_head: bool = False
    last: tuple[str, ...] = ()

    def returns_of(self, name: str) -> tuple[str, ...]:
        """What a block of a list returns."""
        return self.last if self.last and name == self.blocks[-1] else self.returns


_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
_IMAGE_FIRST = ("hidden_states", "encoder_hidden_states")
_IMAGE_ONLY = ("hidden_states",)

_BLOCKS = ("transformer_blocks",)
_DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")
_ADA_HEAD = ("norm_out.norm", "proj_out")  # the norm stands in a module that modulates
_HEAD = ("norm_out", "proj_out")
_FLUX_EMBEDDERS = ("x_embedder", "context_embedder", "pos_embed")

# Embedders are named where they take long; the others run at forecast steps too.
LAYOUTS = {
    "AllegroTransformer3DModel": Layout(_BLOCKS, _IMAGE_ONLY, *_HEAD),
    "AuraFlowTransformer2DModel": Layout(
        ("joint_transformer_blocks", "single_transformer_blocks"), _TEXT_FIRST, *_HEAD, last=_IMAGE_ONLY
    ),
    "BriaFiboTransformer2DModel": Layout(_DOUBLE_SINGLE, _TEXT_FIRST, *_ADA_HEAD, last=_IMAGE_ONLY),
    "BriaTransformer2DModel": Layout(_DOUBLE_SINGLE, _TEXT_FIRST, *_ADA_HEAD, _FLUX_EMBEDDERS),
    "ChromaTransformer2DModel": Layout(_DOUBLE_SINGLE, _TEXT_FIRST, *_ADA_HEAD, _FLUX_EMBEDDERS, last=_IMAGE_ONLY),
    "ChronoEditTransformer3DModel": Layout(
        ("blocks",), _IMAGE_ONLY, *_HEAD, ("patch_embedding", "rope"), wide_head=True
    ),
    "CogVideoXTransformer3DModel": Layout(_BLOCKS, _IMAGE_FIRST, *_ADA_HEAD),
    "CogView3PlusTransformer2DModel": Layout(_BLOCKS, _IMAGE_FIRST, *_ADA_HEAD),
    "CogView4Transformer2DModel": Layout(_BLOCKS, _IMAGE_FIRST, *_ADA_HEAD),
    "ConsisIDTransformer3DModel": Layout(
        ("perceiver_cross_attention", "transformer_blocks"),
        _IMAGE_ONLY,
        *_ADA_HEAD,
        ("local_facial_extractor",),
        last=_IMAGE_FIRST,
    ),
    "CosmosTransformer3DModel": Layout(_BLOCKS, _IMAGE_ONLY, *_ADA_HEAD),
    "DiTTransformer2DModel": Layout(_BLOCKS, _IMAGE_ONLY, "norm_out", "proj_out_2", ("pos_embed",)),
    "EasyAnimateTransformer3DModel": Layout(_BLOCKS, _IMAGE_FIRST, *_ADA_HEAD),
    "Flux2Transformer2DModel": Layout(_DOUBLE_SINGLE, _TEXT_FIRST, *_ADA_HEAD, _FLUX_EMBEDDERS, last=_IMAGE_ONLY),
    "FluxTransformer2DModel": Layout(_DOUBLE_SINGLE, _TEXT_FIRST, *_ADA_HEAD, _FLUX_EMBEDDERS),
    "GlmImageTransformer2DModel": Layout(_BLOCKS, _IMAGE_FIRST, *_ADA_HEAD),
    "HiDreamImageTransformer2DModel": Layout(
        ("double_stream_blocks", "single_stream_blocks"),
        _IMAGE_FIRST,
        "final_layer.norm_final",
        "final_layer.linear",
        last=_IMAGE_ONLY,
    ),
    "HunyuanDiT2DModel": Layout(("blocks",), _IMAGE_ONLY, *_ADA_HEAD),
    "HunyuanImageTransformer2DModel": Layout(
        _DOUBLE_SINGLE, _IMAGE_FIRST, *_ADA_HEAD, ("x_embedder", "context_embedder", "context_embedder_2", "rope")
    ),
    "HunyuanVideo15Transformer3DModel": Layout(
        _BLOCKS, _IMAGE_FIRST, *_ADA_HEAD, ("x_embedder", "context_embedder", "rope")
    ),
    "HunyuanVideoFramepackTransformer3DModel": Layout(
        _DOUBLE_SINGLE, _IMAGE_FIRST, *_ADA_HEAD, ("context_embedder", "image_projection")
    ),
    "HunyuanVideoTransformer3DModel": Layout(
        _DOUBLE_SINGLE, _IMAGE_FIRST, *_ADA_HEAD, ("x_embedder", "context_embedder", "rope")
    ),
    "Kandinsky5Transformer3DModel": Layout(
        ("text_transformer_blocks", "visual_transformer_blocks"),
        ("x",),
        "out_layer",
        "out_layer.out_layer",
        last=("visual_embed",),
    ),
    "Krea2Transformer2DModel": Layout(
        ("text_fusion.layerwise_blocks", "text_fusion.refiner_blocks", "transformer_blocks"),
        _IMAGE_ONLY,
        "final_layer",
        "final_layer",
    ),
    "LTXVideoTransformer3DModel": Layout(_BLOCKS, _IMAGE_ONLY, *_HEAD, ("rope",)),
    "LatteTransformer3DModel": Layout(("transformer_blocks", "temporal_transformer_blocks"), _IMAGE_ONLY, *_HEAD),
    "LongCatImageTransformer2DModel": Layout(_DOUBLE_SINGLE, _TEXT_FIRST, *_ADA_HEAD, _FLUX_EMBEDDERS),
    "Lumina2Transformer2DModel": Layout(
        ("context_refiner", "noise_refiner", "layers"), _IMAGE_ONLY, "norm_out.norm", "norm_out.linear_2"
    ),
    "LuminaNextDiT2DModel": Layout(("layers",), _IMAGE_ONLY, "norm_out.norm", "norm_out.linear_2"),
    "MochiTransformer3DModel": Layout(_BLOCKS, _IMAGE_FIRST, *_ADA_HEAD),
    "OmniGenTransformer2DModel": Layout(("layers",), _IMAGE_ONLY, *_ADA_HEAD),
    "OvisImageTransformer2DModel": Layout(_DOUBLE_SINGLE, _TEXT_FIRST, *_ADA_HEAD, _FLUX_EMBEDDERS),
    "PRXTransformer2DModel": Layout(("blocks",), _IMAGE_ONLY, "final_layer.norm_final", "final_layer.linear"),
    "PixArtTransformer2DModel": Layout(_BLOCKS, _IMAGE_ONLY, *_HEAD, ("pos_embed",)),
    "QwenImageTransformer2DModel": Layout(
        _BLOCKS, _TEXT_FIRST, *_ADA_HEAD, ("img_in", "txt_norm", "txt_in", "pos_embed")
    ),
    # Its head scales text and image tokens apart.
    "QwenImage21Transformer2DModel": Layout(_BLOCKS, _IMAGE_ONLY, *_HEAD),
    "SD3Transformer2DModel": Layout(_BLOCKS, _TEXT_FIRST, *_ADA_HEAD, ("pos_embed", "context_embedder")),
    "SanaTransformer2DModel": Layout(_BLOCKS, _IMAGE_ONLY, *_ADA_HEAD),
    "SanaVideoTransformer3DModel": Layout(_BLOCKS, _IMAGE_ONLY, *_ADA_HEAD),
    "SkyReelsV2Transformer3DModel": Layout(("blocks",), _IMAGE_ONLY, *_HEAD, wide_head=True),
    "StableAudioDiTModel": Layout(_BLOCKS, _IMAGE_ONLY, "proj_out", "proj_out"),  # it has no norm
    "WanAnimateTransformer3DModel": Layout(
        ("face_adapter", "blocks"), _IMAGE_ONLY, *_HEAD, ("motion_encoder", "face_encoder", "rope"), wide_head=True
    ),
    # The conditioner's embedders are small, and one joins the tokens of two images.
    "WanTransformer3DModel": Layout(("blocks",), _IMAGE_ONLY, *_HEAD, ("patch_embedding", "rope"), wide_head=True),
    "WanVACETransformer3DModel": Layout(
        ("vace_blocks", "blocks"), ("control_hidden_states",) * 2, *_HEAD, wide_head=True, last=_IMAGE_ONLY
    ),
    "ZImageTransformer2DModel": Layout(
        ("noise_refiner", "context_refiner", "layers"),
        ("x",),
        "all_final_layer.2-1.norm_final",
        "all_final_layer.2-1.linear",
    ),
}

_DENOISER_ATTRIBUTES = ("transformer", "unet", "decoder", "prior")  # the last two are Stable Cascade's
_SECOND = "transformer_2"  # takes over within a request, as Wan 2.2's expert for low noise does
_SAMPLE_NAMES = ("sample", "hidden_states", "x")
_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "timestep_ratio")
# Arguments that are the same at all steps of a context, unless somebody changes them: parts of their names.
_CONDITIONS = (
    "encoder_hidden_states",
    "pooled",
    "prompt",
    "text",
    "embeds",
    "cap_feats",
    "class_labels",
    "clip",
    "cond",
    "kv_cache_mode",  # of the first call and of later ones, which return other tokens
)
_NO_CONDITIONS = ("control", "residual", "timestep", "time_cond")  # these follow the sample and the step


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
                "and no scheduler tells its steps; give the pipeline, or one of its denoisers"
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


def tensor_of(sample: Any) -> torch.Tensor:
    """The noisy sample; some denoisers take a list of them."""
    if isinstance(sample, (list, tuple)):
        return torch.stack(list(sample)) if len({one.shape for one in sample}) == 1 else sample[0]
    return sample


def conditions_of(given: Any, name: str = "") -> tuple[torch.Tensor | str, ...]:
    """The tensors and words among a call's arguments that stay the same in a context."""
    if isinstance(given, (torch.Tensor, str)):
        return (given,) if _is_condition(name) else ()
    if isinstance(given, dict):
        return tuple(one for key, value in given.items() for one in conditions_of(value, f"{name} {key}"))
    if isinstance(given, (list, tuple)):
        return tuple(one for value in given for one in conditions_of(value, name))
    return ()


@functools.cache
def _is_condition(name: str) -> bool:
    return any(part in name for part in _CONDITIONS) and not any(part in name for part in _NO_CONDITIONS)


def layout_of(denoiser: torch.nn.Module) -> Layout:
    """Where the hidden site of a denoiser is.

    Raises:
        ValueError: the hidden site of this class is not known.
    """
    layout = LAYOUTS.get(type(denoiser).__name__)
    if layout is None:
        raise ValueError(
            f"site='hidden' is not known for {type(denoiser).__name__}: use a plan for site='output', which any "
            "denoiser has; docs/models.md lists the classes with a hidden site"
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
