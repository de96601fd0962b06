"""Pipelines whose denoiser is a U-Net: Stable Diffusion 1.5 and XL, their relatives, and the unconditional ones."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    MotionAdapter,
    PNDMScheduler,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.models.unets import StableCascadeUNet
from pipelines import WordTokenizer, _clip
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection
from zoo import embeds, family, joined, mask, noise, picture, subject

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim() -> DDIMScheduler:
    """The scheduler of most of them."""
    return DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def vae(**more: Any) -> AutoencoderKL:
    """An autoencoder that halves a picture."""
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 32}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**{**blocks, **sizes, "mid_block_add_attention": False, "force_upcast": False, **more})


def unet(channels: int = 4, **more: Any) -> UNet2DConditionModel:
    """A U-Net with attention in its lower half."""
    return UNet2DConditionModel(
        **{
            "sample_size": 16,
            "in_channels": channels,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
            "norm_num_groups": 4,
            **more,
        }
    )


def controlnet(kind: type = ControlNetModel, **more: Any) -> Any:
    """A ControlNet for `unet()`."""
    same = ("layers_per_block", "down_block_types", "attention_head_dim", "cross_attention_dim", "norm_num_groups")
    config = {name: unet().config[name] for name in same}
    return kind(**{"block_out_channels": (8, 16), "conditioning_embedding_out_channels": (4, 8), **config, **more})


@family
def sd() -> dict[str, Any]:
    """Stable Diffusion 1.5."""
    return {
        "vae": vae(),
        "text_encoder": CLIPTextModel(_clip()),
        "tokenizer": WordTokenizer(),
        "unet": unet(),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


_SIZE = {"height": 32, "width": 32}
_TEXT = {"prompt": "a red apple", "output_type": "latent"}
_XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
    "use_linear_projection": True,
}


@family
def sdxl() -> dict[str, Any]:
    """Stable Diffusion XL."""
    return {
        "vae": vae(),
        "text_encoder": None,
        "text_encoder_2": None,
        "tokenizer": None,
        "tokenizer_2": None,
        "unet": unet(**_XL),
        "scheduler": EulerDiscreteScheduler(**_BETAS, steps_offset=1, timestep_spacing="leading"),
        "add_watermarker": False,
    }


_UNION = {"num_control_type": 2, "num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}
# An adapter adds its features where attention is.
_ATTENTION_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_POOLED = {"pooled_prompt_embeds": noise(1, 16, seed=2), "negative_pooled_prompt_embeds": noise(1, 16, seed=3)}
_XL_TEXT = {**embeds(16), **_POOLED, "output_type": "latent"}


def _sd_subjects() -> list[Any]:
    controlled = joined(sd, controlnet=controlnet)
    lcm = joined(sd, "unet", "scheduler", unet=lambda: unet(time_cond_proj_dim=8), scheduler=LCMScheduler)
    inpaint = joined(sd, "unet", unet=lambda: unet(9))
    image, hole = {"image": picture()}, {"image": picture(), "mask_image": mask()}
    depth = joined(
        sd, "unet", "safety_checker", "requires_safety_checker", unet=lambda: unet(5), depth_estimator=lambda: None
    )
    adapted = joined(sd, "unet", unet=lambda: unet(**_ATTENTION_FIRST), adapter=_adapter)
    upscale = joined(
        sd, "unet", "requires_safety_checker",
        unet=lambda: unet(7, num_class_embeds=1000), low_res_scheduler=DDPMScheduler,
    )  # fmt: skip
    pag = {**_TEXT, "pag_scale": 3.0}
    return [
        subject(diffusers.StableDiffusionPipeline, sd, **_TEXT, **_SIZE),
        subject(
            diffusers.StableDiffusionPipeline,
            joined(sd, "scheduler", scheduler=lambda: PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1)),
            "StableDiffusionPipeline, PNDM",
            **_TEXT,
            **_SIZE,
        ),
        subject(diffusers.StableDiffusionImg2ImgPipeline, sd, **_TEXT, **image, strength=0.8),
        subject(diffusers.StableDiffusionInpaintPipeline, inpaint, **_TEXT, **hole, **_SIZE),
        subject(
            diffusers.StableDiffusionInstructPix2PixPipeline,
            joined(sd, "unet", unet=lambda: unet(8)),
            **_TEXT,
            **image,
        ),
        subject(
            diffusers.StableDiffusionDepth2ImgPipeline,
            depth,
            **_TEXT,
            **image,
            depth_map=noise(1, 32, 32),
            strength=0.8,
        ),
        subject(
            diffusers.StableDiffusionImageVariationPipeline,
            joined(sd, "text_encoder", "tokenizer", image_encoder=_vision),
            image=picture(),
            output_type="latent",
            **_SIZE,
        ),
        subject(diffusers.StableDiffusionUpscalePipeline, upscale, **_TEXT, image=picture(16, 16)),
        subject(diffusers.StableDiffusionControlNetPipeline, controlled, **_TEXT, **_SIZE, **image),
        subject(
            diffusers.StableDiffusionControlNetImg2ImgPipeline, controlled, **_TEXT, **image, control_image=picture()
        ),
        subject(
            diffusers.StableDiffusionControlNetInpaintPipeline, controlled, **_TEXT, **hole, control_image=picture()
        ),
        subject(diffusers.StableDiffusionPAGPipeline, sd, **pag, **_SIZE),
        subject(diffusers.StableDiffusionPAGImg2ImgPipeline, sd, **pag, **image),
        subject(diffusers.StableDiffusionPAGInpaintPipeline, inpaint, **pag, **hole, **_SIZE),
        subject(diffusers.StableDiffusionControlNetPAGPipeline, controlled, **pag, **_SIZE, **image),
        subject(
            diffusers.StableDiffusionControlNetPAGInpaintPipeline, controlled, **pag, **hole, control_image=picture()
        ),
        subject(diffusers.StableDiffusionAdapterPipeline, adapted, **_TEXT, **_SIZE, **image),
        subject(diffusers.LatentConsistencyModelPipeline, lcm, **_TEXT, **_SIZE),
        subject(diffusers.LatentConsistencyModelImg2ImgPipeline, lcm, **_TEXT, **image),
    ]


def _sdxl_subjects() -> list[Any]:
    controlled = joined(sdxl, controlnet=lambda: controlnet(**_XL))
    union = joined(sdxl, controlnet=lambda: controlnet(ControlNetUnionModel, **_XL, **_UNION))
    adapted = joined(sdxl, "unet", "add_watermarker", unet=lambda: unet(**_XL, **_ATTENTION_FIRST), adapter=_adapter)
    image, hole = {"image": picture()}, {"image": picture(), "mask_image": mask()}
    pag = {**_XL_TEXT, "pag_scale": 3.0}
    return [
        subject(diffusers.StableDiffusionXLPipeline, sdxl, **_XL_TEXT, **_SIZE),
        subject(
            diffusers.StableDiffusionXLPipeline,
            sdxl,
            "StableDiffusionXLPipeline, denoising_end",
            **_XL_TEXT,
            **_SIZE,
            denoising_end=0.6,
            num_inference_steps=10,
        ),
        subject(diffusers.StableDiffusionXLImg2ImgPipeline, sdxl, **_XL_TEXT, **image, strength=0.8),
        subject(diffusers.StableDiffusionXLInpaintPipeline, sdxl, **_XL_TEXT, **hole, **_SIZE),
        subject(
            diffusers.StableDiffusionXLInstructPix2PixPipeline,
            joined(sdxl, "unet", unet=lambda: unet(8, **_XL)),
            **_XL_TEXT,
            **image,
            **_SIZE,
        ),
        subject(diffusers.StableDiffusionXLControlNetPipeline, controlled, **_XL_TEXT, **image, **_SIZE),
        subject(
            diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
            controlled,
            **_XL_TEXT,
            **image,
            control_image=picture(),
        ),
        subject(
            diffusers.StableDiffusionXLControlNetInpaintPipeline,
            controlled,
            **_XL_TEXT,
            **hole,
            control_image=picture(),
        ),
        subject(
            diffusers.StableDiffusionXLControlNetUnionPipeline,
            union,
            **_XL_TEXT,
            **_SIZE,
            control_image=[picture()],
            control_mode=[1],
        ),
        subject(diffusers.StableDiffusionXLPAGPipeline, sdxl, **pag, **_SIZE),
        subject(diffusers.StableDiffusionXLPAGImg2ImgPipeline, sdxl, **pag, **image, strength=0.8),
        subject(diffusers.StableDiffusionXLPAGInpaintPipeline, sdxl, **pag, **hole, **_SIZE),
        subject(diffusers.StableDiffusionXLControlNetPAGPipeline, controlled, **pag, **image, **_SIZE),
        subject(
            diffusers.StableDiffusionXLControlNetPAGImg2ImgPipeline,
            controlled,
            **pag,
            **image,
            control_image=picture(),
        ),
        subject(diffusers.StableDiffusionXLAdapterPipeline, adapted, **_XL_TEXT, **image, **_SIZE),
    ]


def _adapter() -> T2IAdapter:
    return T2IAdapter(3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")


def _vision() -> CLIPVisionModelWithProjection:
    sizes = {"hidden_size": 16, "projection_dim": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=8))


@family
def animated() -> dict[str, Any]:
    """AnimateDiff: Stable Diffusion 1.5 with a motion module."""
    parts = {name: sd()[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    motion = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    return {**parts, "unet": unet(), "motion_adapter": motion}


@family
def kandinsky() -> dict[str, Any]:
    """Kandinsky 2.2's decoder."""
    denoiser = UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=4,
        cross_attention_dim=16,
        norm_num_groups=4,
        addition_embed_type="image",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return {"unet": denoiser, "movq": movq, "scheduler": ddim()}


@family
def cascade() -> dict[str, Any]:
    """Stable Cascade's prior."""
    denoiser = StableCascadeUNet(
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        switch_level=(False,),
        clip_image_in_channels=16,
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        dropout=(0.0, 0.0),
    )
    none = dict.fromkeys(("feature_extractor", "image_encoder"))
    text = {"tokenizer": WordTokenizer(), "text_encoder": CLIPTextModelWithProjection(_clip())}
    return {**none, **text, "prior": denoiser, "scheduler": DDPMWuerstchenScheduler()}


@functools.cache
def _unconditional() -> dict[str, Any]:
    torch.manual_seed(1)
    denoiser = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return {"unet": denoiser}


def _other_subjects() -> list[Any]:
    image_embeds = {"image_embeds": noise(1, 16, seed=4), "negative_image_embeds": noise(1, 16, seed=5)}
    image_embeds |= {**_SIZE, "output_type": "latent"}
    frames = {"num_frames": 2, "decode_chunk_size": 2}
    ddpm = joined(_unconditional, scheduler=DDPMScheduler)
    return [
        subject(diffusers.StableCascadePriorPipeline, cascade, prompt="a red apple", height=128, width=128),
        subject(diffusers.AnimateDiffPipeline, animated, **_TEXT, **_SIZE, **frames),
        subject(diffusers.KandinskyV22Pipeline, kandinsky, **image_embeds),
        subject(diffusers.DDPMPipeline, ddpm, output_type="np"),
        subject(diffusers.DDIMPipeline, joined(_unconditional, scheduler=DDIMScheduler), output_type="np"),
    ]


SUBJECTS = [*_sd_subjects(), *_sdxl_subjects(), *_other_subjects()]
