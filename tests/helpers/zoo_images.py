"""Pipelines of pictures whose denoiser is a transformer: FLUX, Qwen-Image, Stable Diffusion 3 and many others."""

from __future__ import annotations

from typing import Any
from unittest import mock

import diffusers
import pipelines
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageControlNetModel,
    SanaTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from zoo import embeds, family, joined, mask, noise, photo, picture, subject
from zoo_unets import vae

_SIZE = {"height": 32, "width": 32}
_LATENT = {**_SIZE, "output_type": "latent"}
_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
_FLUX = {**_HEADS, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)}
_MASKS = {name: torch.ones(1, 6) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
_POOLED = {"pooled_prompt_embeds": noise(1, 16, seed=2), "negative_pooled_prompt_embeds": noise(1, 16, seed=3)}
_IMAGE, _HOLE = {"image": picture()}, {"image": picture(), "mask_image": mask()}


def _flux_transformer(channels: int = 16) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=channels, out_channels=16, num_layers=2, num_single_layers=2, pooled_projection_dim=16,
        guidance_embeds=True, **_FLUX,
    )  # fmt: skip


@family
def flux() -> dict[str, Any]:
    """FLUX.1-dev."""
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {**none, "scheduler": scheduler, "vae": vae(shift_factor=0.1), "transformer": _flux_transformer()}


def _flux_subjects() -> list[Any]:
    text = {"prompt_embeds": noise(1, 6, 16), "pooled_prompt_embeds": noise(1, 16, seed=2), **_LATENT}
    guided = {**text, **_POOLED, **embeds(16), "true_cfg_scale": 2.0}
    control = {"control_image": picture()}

    def wide(channels: int) -> Any:
        return joined(flux, "transformer", transformer=lambda: _flux_transformer(channels))

    controlled = joined(
        flux,
        controlnet=lambda: FluxControlNetModel(
            in_channels=16, num_layers=1, num_single_layers=1, pooled_projection_dim=16, guidance_embeds=True, **_FLUX
        ),
    )
    return [
        subject(diffusers.FluxPipeline, flux, **text),
        subject(diffusers.FluxPipeline, flux, "FluxPipeline, true guidance", **guided),
        subject(diffusers.FluxImg2ImgPipeline, flux, **text, **_IMAGE, strength=0.9),
        subject(diffusers.FluxInpaintPipeline, flux, **text, **_HOLE, strength=0.9),
        subject(diffusers.FluxFillPipeline, wide(48), **text, **_HOLE),
        subject(diffusers.FluxControlPipeline, wide(32), **text, **control),
        subject(diffusers.FluxControlImg2ImgPipeline, wide(32), **text, **_IMAGE, **control, strength=0.9),
        subject(diffusers.FluxControlInpaintPipeline, wide(32), **text, **_HOLE, **control, strength=0.9),
        subject(diffusers.FluxControlNetPipeline, controlled, **text, **control),
        subject(diffusers.FluxControlNetImg2ImgPipeline, controlled, **text, **_IMAGE, **control, strength=0.9),
        subject(diffusers.FluxControlNetInpaintPipeline, controlled, **text, **_HOLE, **control, strength=0.9),
        subject(diffusers.FluxKontextPipeline, flux, **text, **_IMAGE, max_area=1024, _auto_resize=False),
        subject(
            diffusers.FluxKontextInpaintPipeline, flux, **text, **_HOLE, max_area=1024, _auto_resize=False, strength=0.9
        ),
    ]


@family
def chroma() -> dict[str, Any]:
    """Chroma: FLUX without embedded guidance."""
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1, **_FLUX,
    )  # fmt: skip
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": vae(shift_factor=0.1),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer,
    }


@family
def qwen() -> dict[str, Any]:
    """Qwen-Image."""
    return {**pipelines.qwen_image().components, "text_encoder": None, "tokenizer": None}


def _qwen_subjects() -> list[Any]:
    masks = {name: torch.ones(1, 6).long() for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask")}
    text = {**embeds(16), **masks, "true_cfg_scale": 3.0, **_LATENT}
    controlnet = {"in_channels": 16, "out_channels": 4, "num_layers": 3, **_FLUX}
    controlled = joined(qwen, controlnet=lambda: QwenImageControlNetModel(**controlnet))
    masked = joined(qwen, controlnet=lambda: QwenImageControlNetModel(**controlnet, extra_condition_channels=4))
    edited = joined(qwen, processor=lambda: None)

    def small() -> Any:
        # The pipeline would enlarge the picture to a million pixels.
        place = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit.calculate_dimensions"
        return mock.patch(place, lambda *_: (32, 32, None))

    return [
        subject(diffusers.QwenImagePipeline, qwen, **text),
        subject(diffusers.QwenImageImg2ImgPipeline, qwen, **text, **_IMAGE, strength=0.9),
        subject(diffusers.QwenImageInpaintPipeline, qwen, **text, **_HOLE, strength=0.9),
        subject(diffusers.QwenImageEditPipeline, edited, **text, image=photo(), around=small),
        subject(diffusers.QwenImageControlNetPipeline, controlled, **text, control_image=picture()),
        subject(
            diffusers.QwenImageControlNetInpaintPipeline, masked, **text, control_image=picture(), control_mask=mask()
        ),
    ]


def _sd3_sizes(**more: Any) -> dict[str, Any]:
    sizes = {"sample_size": 16, "patch_size": 2, "in_channels": 16, "caption_projection_dim": 32, **_HEADS}
    return {**sizes, "joint_attention_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 16, **more}


@family
def sd3() -> dict[str, Any]:
    """Stable Diffusion 3."""
    none = dict.fromkeys(f"{name}{i}" for name in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    return {
        **none,
        "vae": vae(shift_factor=0.1, latent_channels=16),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": SD3Transformer2DModel(num_layers=2, out_channels=16, **_sd3_sizes()),
    }


def _sd3_subjects() -> list[Any]:
    text = {**embeds(16), **_POOLED, **_LATENT}
    controlled = joined(sd3, controlnet=lambda: SD3ControlNetModel(num_layers=1, out_channels=16, **_sd3_sizes()))
    masked = joined(
        sd3,
        controlnet=lambda: SD3ControlNetModel(
            num_layers=1, out_channels=16, extra_conditioning_channels=1, **_sd3_sizes()
        ),
    )
    pag = {**text, "pag_scale": 3.0}
    return [
        subject(diffusers.StableDiffusion3Pipeline, sd3, **text),
        subject(diffusers.StableDiffusion3Img2ImgPipeline, sd3, **text, **_IMAGE, strength=0.9),
        subject(diffusers.StableDiffusion3InpaintPipeline, sd3, **text, **_HOLE, strength=0.9),
        subject(diffusers.StableDiffusion3ControlNetPipeline, controlled, **text, control_image=picture()),
        subject(
            diffusers.StableDiffusion3ControlNetInpaintingPipeline,
            masked,
            **text,
            control_image=picture(),
            control_mask=mask(),
        ),
        subject(diffusers.StableDiffusion3PAGPipeline, sd3, **pag),
        subject(diffusers.StableDiffusion3PAGImg2ImgPipeline, sd3, **pag, **_IMAGE, strength=0.9),
    ]


@family
def pixart() -> dict[str, Any]:
    """PixArt."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, sample_size=16, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    return {
        "tokenizer": None,
        "text_encoder": None,
        "vae": vae(),
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(),
    }


@family
def sana() -> dict[str, Any]:
    """Sana."""
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=4,
    )  # fmt: skip
    return {
        "tokenizer": None,
        "text_encoder": None,
        "vae": None,
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }


def _flow(transformer: Any, **more: Any) -> Any:
    """The components of a pipeline with flow matching whose text is given as embeddings."""
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(shift_factor=0.1), **more}
    return family(lambda: {"scheduler": FlowMatchEulerDiscreteScheduler(), **parts, "transformer": transformer()})


def _other_subjects() -> list[Any]:
    text = {**embeds(16), **_LATENT}
    masked = {**text, **_MASKS, "negative_prompt": None}
    large = {**masked, "height": 128, "width": 128, "use_resolution_binning": False}
    flux2 = _flow(
        lambda: Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4), joint_attention_dim=16, **_HEADS,
        ),
        vae=AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32,
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, mid_block_add_attention=False,
        ),
    )  # fmt: skip
    encoders = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("_2", "_3", "_4")}
    hidream = _flow(
        lambda: HiDreamImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=4, caption_channels=[16, 16], text_emb_dim=16, num_routed_experts=2,
            num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
        ),
        **encoders,
    )  # fmt: skip
    sources = {**embeds(16, names=("prompt_embeds_t5", "negative_prompt_embeds_t5")), **_POOLED}
    sources["prompt_embeds_llama3"] = noise(2, 1, 6, 16)
    sources["negative_prompt_embeds_llama3"] = noise(2, 1, 6, 16, seed=1)
    return [
        subject(diffusers.ChromaPipeline, chroma, **masked),
        subject(diffusers.ChromaImg2ImgPipeline, chroma, **masked, **_IMAGE, strength=0.9),
        subject(diffusers.Flux2Pipeline, flux2, prompt_embeds=noise(1, 6, 16), **_LATENT),
        subject(diffusers.Flux2KleinPipeline, flux2, **text),
        subject(diffusers.PixArtAlphaPipeline, pixart, **masked, use_resolution_binning=False),
        subject(diffusers.PixArtSigmaPipeline, pixart, **masked, use_resolution_binning=False),
        subject(diffusers.PixArtSigmaPAGPipeline, pixart, **masked, use_resolution_binning=False),
        subject(diffusers.SanaPipeline, sana, **large),
        subject(diffusers.SanaPAGPipeline, sana, **large),
        subject(diffusers.DiTPipeline, lambda: dict(pipelines.dit().components), class_labels=[1], output_type="np"),
        subject(
            diffusers.AuraFlowPipeline,
            _flow(
                lambda: AuraFlowTransformer2DModel(
                    sample_size=16, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
                    caption_projection_dim=32, joint_attention_dim=16, pos_embed_max_size=64, **_HEADS,
                )
            ),
            **masked,
        ),
        subject(
            diffusers.CogView3PlusPipeline,
            _flow(
                lambda: CogView3PlusTransformer2DModel(
                    in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, out_channels=4,
                    text_embed_dim=16, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=16,
                ),
                scheduler=CogVideoXDDIMScheduler(),
            ),
            **text,
        ),
        subject(
            diffusers.CogView4Pipeline,
            _flow(
                lambda: CogView4Transformer2DModel(
                    in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, out_channels=4,
                    text_embed_dim=16, time_embed_dim=8, condition_dim=4,
                ),
            ),
            **text,
        ),
        subject(
            diffusers.Lumina2Pipeline,
            _flow(
                lambda: Lumina2Transformer2DModel(
                    sample_size=4, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
                    num_attention_heads=3, num_kv_heads=1, multiple_of=2, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
                    axes_lens=(128, 128, 128), cap_feat_dim=16,
                )
            ),
            **{**masked, **{name: value.bool() for name, value in _MASKS.items()}},
        ),
        subject(
            diffusers.ZImagePipeline,
            _flow(
                lambda: ZImageTransformer2DModel(
                    in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
                    axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
                )
            ),
            **_LATENT,
            prompt_embeds=[noise(6, 16)],
            negative_prompt_embeds=[noise(6, 16, seed=1)],
        ),
        subject(diffusers.HiDreamImagePipeline, hidream, settings={"default_sample_size": 16}, **sources, **_LATENT),
        subject(
            diffusers.BriaPipeline,
            _flow(
                lambda: BriaTransformer2DModel(
                    in_channels=16, num_layers=1, num_single_layers=1, axes_dims_rope=[4, 6, 6],
                    joint_attention_dim=16, **_HEADS,
                )
            ),
            **text,
        ),
    ]  # fmt: skip


SUBJECTS = [*_flux_subjects(), *_qwen_subjects(), *_sd3_subjects(), *_other_subjects()]
