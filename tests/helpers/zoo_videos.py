"""Pipelines of videos and sounds: Wan, HunyuanVideo, LTX, CogVideoX and others."""

from __future__ import annotations

from typing import Any

import diffusers
import pipelines
import torch
from diffusers import (
    AllegroTransformer3DModel,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderOobleck,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LatteTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    SanaVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    StableAudioDiTModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from zoo import embeds, family, joined, noise, photo, picture, subject
from zoo_unets import vae

_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
_MASKS = {name: torch.ones(1, 6) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
_LATENT = {"height": 32, "width": 32, "output_type": "latent"}
_POOLED = {"pooled_prompt_embeds": noise(1, 16, seed=2), "negative_pooled_prompt_embeds": noise(1, 16, seed=3)}


def _frames(count: int, size: int = 32) -> Any:
    return [photo(size) for _ in range(count)]


def _wan_sizes(channels: int = 4, **more: Any) -> dict[str, Any]:
    sizes = {"patch_size": (1, 2, 2), "in_channels": channels, "out_channels": 4, "num_layers": 2, **_HEADS}
    return {**sizes, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, **more}


@family
def wan() -> dict[str, Any]:
    """Wan 2.1."""
    return {**pipelines.wan().components, "text_encoder": None, "tokenizer": None}


def _wan_subjects() -> list[Any]:
    text = {**embeds(16), "guidance_scale": 3.0, **_LATENT}
    clip = {"num_frames": 5, **text}
    experts = joined(
        wan, "transformer_2", transformer_2=lambda: WanTransformer3DModel(**_wan_sizes()), boundary_ratio=lambda: 0.85
    )
    pictured = joined(
        wan,
        "transformer",
        transformer=lambda: WanTransformer3DModel(**_wan_sizes(10)),
        image_processor=lambda: None,
        image_encoder=lambda: None,
    )
    vace = joined(
        wan,
        "transformer",
        transformer=lambda: WanVACETransformer3DModel(**_wan_sizes(), vace_layers=[0], vace_in_channels=12),
    )
    plain = joined(wan, "transformer_2")
    sky = joined(plain, "transformer", transformer=lambda: SkyReelsV2Transformer3DModel(**_wan_sizes()))
    video = {"video": _frames(5)}
    forcing = {"prompt": None, **text, "num_frames": 9, "base_num_frames": 9}
    return [
        subject(diffusers.WanPipeline, wan, **clip),
        subject(diffusers.WanPipeline, experts, "WanPipeline, two experts", **clip),
        subject(diffusers.WanImageToVideoPipeline, pictured, **clip, image=picture()),
        subject(diffusers.WanVideoToVideoPipeline, plain, **text, **video, strength=0.8, num_inference_steps=8),
        subject(diffusers.WanVACEPipeline, vace, **clip, **video),
        subject(diffusers.SkyReelsV2Pipeline, sky, **clip),
        subject(diffusers.SkyReelsV2DiffusionForcingPipeline, sky, **forcing),
    ]


@family
def hunyuan() -> dict[str, Any]:
    """HunyuanVideo."""
    return {**pipelines.hunyuan_video().components, **dict.fromkeys(("text_encoder", "text_encoder_2"))}


def _hunyuan_subjects() -> list[Any]:
    text = {"prompt_embeds": noise(1, 6, 16), "prompt_attention_mask": torch.ones(1, 6), "output_type": "latent"}
    text |= {"pooled_prompt_embeds": noise(1, 16, seed=2), "height": 64, "width": 64, "num_frames": 5}
    negative = {"negative_prompt_embeds": noise(1, 6, 16, seed=1), "negative_prompt_attention_mask": torch.ones(1, 6)}
    negative["negative_pooled_prompt_embeds"] = noise(1, 16, seed=3)
    wide = joined(hunyuan, "transformer", transformer=lambda: _hunyuan_transformer(8))
    return [
        subject(diffusers.HunyuanVideoPipeline, hunyuan, **text),
        subject(
            diffusers.HunyuanVideoPipeline,
            hunyuan,
            "HunyuanVideoPipeline, true guidance",
            **text,
            **negative,
            true_cfg_scale=3.0,
        ),
        subject(
            diffusers.HunyuanSkyreelsImageToVideoPipeline,
            wide,
            **text,
            **negative,
            image=picture(64, 64),
            true_cfg_scale=3.0,
        ),
    ]


def _hunyuan_transformer(channels: int, **more: Any) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=channels, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2,
        text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6), **_HEADS, **more,
    )  # fmt: skip


@family
def ltx() -> dict[str, Any]:
    """LTX-Video."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    autoencoder = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True), decoder_inject_noise=(False,) * 3,
        upsample_residual=(False,) * 2, upsample_factor=(1, 1), down_block_types=("LTXVideoDownBlock3D",) * 2,
        patch_size=1, patch_size_t=1,
    )  # fmt: skip
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": autoencoder,
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer,
    }


def _ltx_subjects() -> list[Any]:
    text = {**embeds(16), **_MASKS, "num_frames": 9, **_LATENT}
    half = {"denoise_strength": 0.5, "num_inference_steps": 12, "latents": None}
    both = {**text, "guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0}
    both |= {"audio_guidance_scale": 3.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
    return [
        subject(diffusers.LTX2Pipeline, ltx2, **both),
        subject(diffusers.LTXPipeline, ltx, **text),
        subject(diffusers.LTXImageToVideoPipeline, ltx, **text, image=picture()),
        subject(diffusers.LTXConditionPipeline, ltx, **text, image=picture()),
        subject(
            diffusers.LTXConditionPipeline,
            ltx,
            "LTXConditionPipeline, half the steps",
            **text,
            **half,
            video=_frames(9),
        ),
    ]


def _cogvideo_transformer(channels: int = 4) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        in_channels=channels, out_channels=4, time_embed_dim=4, text_embed_dim=16, num_layers=2, sample_width=16,
        sample_height=16, sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6, **_HEADS,
    )  # fmt: skip


@family
def cogvideo() -> dict[str, Any]:
    """CogVideoX."""
    autoencoder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    return {
        "tokenizer": None,
        "text_encoder": None,
        "vae": autoencoder,
        "transformer": _cogvideo_transformer(),
        "scheduler": CogVideoXDDIMScheduler(),
    }


def _cogvideo_subjects() -> list[Any]:
    text = {**embeds(16), **_LATENT}
    wide = joined(cogvideo, "transformer", transformer=lambda: _cogvideo_transformer(8))
    return [
        subject(diffusers.CogVideoXPipeline, cogvideo, **text, num_frames=9),
        subject(diffusers.CogVideoXImageToVideoPipeline, wide, **text, num_frames=9, image=picture()),
        subject(diffusers.CogVideoXVideoToVideoPipeline, cogvideo, **text, video=_frames(9), num_inference_steps=8),
        subject(diffusers.CogVideoXFunControlPipeline, wide, **text, control_video=_frames(9)),
    ]


def _without_encoders(transformer: Any, scheduler: Any, autoencoder: Any = lambda: None) -> Any:
    """The components of a pipeline whose text is given as embeddings."""
    return family(
        lambda: {
            "tokenizer": None,
            "text_encoder": None,
            "vae": autoencoder(),
            "transformer": transformer(),
            "scheduler": scheduler(),
        }
    )


@family
def sound() -> dict[str, Any]:
    """Stable Audio."""
    transformer = StableAudioDiTModel(
        sample_size=4, in_channels=3, num_layers=2, attention_head_dim=4, num_key_value_attention_heads=2,
        out_channels=3, cross_attention_dim=4, time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=4,
    )  # fmt: skip
    autoencoder = AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    encoder = pipelines.T5EncoderModel(pipelines.T5Config(**pipelines._T5))
    return {
        "vae": autoencoder,
        "text_encoder": encoder,
        "projection_model": StableAudioProjectionModel(16, 4, 0, 32),
        "tokenizer": pipelines.WordTokenizer(),
        "transformer": transformer,
        "scheduler": EDMDPMSolverMultistepScheduler(sigma_data=1.0),
    }


@family
def ltx2() -> dict[str, Any]:
    """LTX-2: video and sound in one call."""
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, rope_double_precision=False, rope_type="split", caption_channels=16,
    )  # fmt: skip
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=1, connector_rope_base_seq_len=32, rope_double_precision=False,
        causal_temporal_positioning=False, rope_type="split",
        **{f"{kind}_connector_{name}": size for kind in ("video", "audio") for name, size in sizes.items()},
    )  # fmt: skip
    autoencoder = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=1, patch_size_t=1,
    )  # fmt: skip
    sound = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8,
    )  # fmt: skip
    none = dict.fromkeys(("text_encoder", "tokenizer", "vocoder", "processor", "prompt_enhancer", "duration_head"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    parts = {"scheduler": scheduler, "vae": autoencoder, "audio_vae": sound, "connectors": connectors}
    return {**none, **parts, "transformer": transformer}


def _other_subjects() -> list[Any]:
    text = {**embeds(16), **_LATENT}
    masked = {**text, **_MASKS}
    mochi = _without_encoders(
        lambda: MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
            text_embed_dim=16, time_embed_dim=4, max_sequence_length=6,
        ),
        FlowMatchEulerDiscreteScheduler,
    )  # fmt: skip
    allegro = _without_encoders(
        lambda: AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
            cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=8, caption_channels=16,
        ),
        DDIMScheduler,
    )  # fmt: skip
    latte = _without_encoders(
        lambda: LatteTransformer3DModel(
            sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
            caption_channels=16, in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, video_length=2,
        ),
        DDIMScheduler,
        vae,
    )  # fmt: skip
    sana = _without_encoders(
        lambda: SanaVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
            sample_size=8, rope_max_seq_len=32,
        ),
        lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        lambda: pipelines.wan().vae,
    )  # fmt: skip
    kandinsky = _without_encoders(
        lambda: Kandinsky5Transformer3DModel(
            in_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, out_visual_dim=4, model_dim=16, ff_dim=32,
            num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
        ),
        FlowMatchEulerDiscreteScheduler,
        lambda: pipelines.hunyuan_video().vae,
    )  # fmt: skip
    kandinsky = joined(kandinsky, text_encoder_2=lambda: None, tokenizer_2=lambda: None)
    both = {"prompt_embeds_qwen": noise(1, 6, 16), "negative_prompt_embeds_qwen": noise(1, 6, 16, seed=1)}
    both |= {"prompt_embeds_clip": noise(1, 16, seed=2), "negative_prompt_embeds_clip": noise(1, 16, seed=3)}
    lengths = torch.tensor([0, 6], dtype=torch.int32)
    both |= {"prompt_cu_seqlens": lengths, "negative_prompt_cu_seqlens": lengths}

    return [
        subject(diffusers.Kandinsky5T2VPipeline, kandinsky, **both, **_LATENT, num_frames=5),
        subject(diffusers.MochiPipeline, mochi, **masked, num_frames=7),
        subject(diffusers.AllegroPipeline, allegro, **masked, negative_prompt=None, num_frames=4),
        subject(diffusers.LattePipeline, latte, **text, negative_prompt=None, video_length=2),
        subject(
            diffusers.SanaVideoPipeline, sana, **masked, negative_prompt=None, frames=5, use_resolution_binning=False
        ),
        subject(diffusers.StableAudioPipeline, sound, prompt="a bell", audio_end_in_s=2.0, output_type="latent"),
    ]


SUBJECTS = [*_wan_subjects(), *_hunyuan_subjects(), *_ltx_subjects(), *_cogvideo_subjects(), *_other_subjects()]
