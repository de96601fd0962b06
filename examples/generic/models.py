"""The small models whose statistics lesa ships: denoisers, their text, and the diffusers pipelines that run them.

They work on pixels: what a pipeline calls latents are pictures in [-1, 1], or these with blocks of 2x2 pixels as
channels, so there is no autoencoder. Prompts are words with learned embeddings in place of text encoders.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from data import FRAMES, SIDE, VIDEO_SIDE, WORDS, Emoji, Photographs, Videos, ids_of
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

TEXT = 64  # width of the word embeddings


class Words(nn.Module):
    """Prompts to embeddings [B, WORDS, TEXT]."""

    def __init__(self, vocabulary: list[str]) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.known = {word: i for i, word in enumerate(vocabulary)}
        self.embedding = nn.Embedding(len(vocabulary), TEXT)
        self.places = nn.Parameter(0.1 * torch.randn(WORDS, TEXT))

    def forward(self, prompts: list[str]) -> Tensor:
        return self.embedding(ids_of(prompts, self.known).to(self.places.device)) + self.places

    def of(self, prompts: Any, count: int = 1) -> Tensor:
        """The embeddings of one prompt or a list; None is the empty prompt."""
        listed = [prompts] * count if isinstance(prompts, str) or prompts is None else list(prompts)
        return self([prompt or "" for prompt in listed])


def _pixels(base: type) -> Callable[..., Any]:
    """A `__call__` that makes arrays [B, ..., 3] in [0, 1] of what the base's returns as latents."""

    def call(self: Any, *args: Any, output_type: str = "np", **kwargs: Any) -> Any:
        with torch.no_grad():
            latents = base.__call__(self, *args, output_type="latent", **kwargs)
        latents = getattr(latents, "images", getattr(latents, "frames", latents))
        if output_type == "latent":
            return SimpleNamespace(images=latents)
        return SimpleNamespace(images=self.model.pictures(latents).float().clamp(-1, 1).cpu().numpy() / 2 + 0.5)

    call.__signature__ = inspect.signature(base.__call__)  # type: ignore[attr-defined]
    return call


class UNetPixels(StableDiffusionXLPipeline):
    """Stable Diffusion XL on words and pixels."""

    __call__ = _pixels(StableDiffusionXLPipeline)

    def encode_prompt(self, prompt: Any, *args: Any, negative_prompt: Any = None, **kwargs: Any) -> tuple:
        """Embeddings and pooled embeddings of prompts and of negative prompts."""
        positive = self.words.of(prompt)
        negative = self.words.of(negative_prompt, len(positive))
        return positive, negative, positive.mean(1), negative.mean(1)


class PixArtPixels(PixArtAlphaPipeline):
    """PixArt-alpha on words and pixels."""

    __call__ = _pixels(PixArtAlphaPipeline)

    def encode_prompt(self, prompt: Any, *args: Any, negative_prompt: Any = None, **kwargs: Any) -> tuple:
        """Embeddings and masks of prompts and of negative prompts."""
        positive = self.words.of(prompt)
        negative = self.words.of(negative_prompt, len(positive))
        mask = torch.ones(positive.shape[:2], device=positive.device)
        return positive, mask, negative, mask


class QwenPixels(QwenImagePipeline):
    """Qwen-Image on words and pixels."""

    __call__ = _pixels(QwenImagePipeline)

    def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> tuple:
        """Embeddings and no mask."""
        return self.words.of(prompt), None


class WanPixels(WanPipeline):
    """Wan on words and pixels."""

    __call__ = _pixels(WanPipeline)

    def encode_prompt(self, prompt: Any, negative_prompt: Any = None, *args: Any, **kwargs: Any) -> tuple:
        """Embeddings of prompts and of negative prompts."""
        positive = self.words.of(prompt)
        return positive, self.words.of(negative_prompt, len(positive))


def _unshuffled(pictures: Tensor) -> Tensor:
    """[B, 3, (F,) H, W] to [B, 12, (F,) H/2, W/2]."""
    if pictures.ndim == 4:
        return functional.pixel_unshuffle(pictures, 2)
    return functional.pixel_unshuffle(pictures.transpose(1, 2), 2).transpose(1, 2)


def _packed(pictures: Tensor) -> Tensor:
    """[B, 3, 64, 64] to Qwen-Image's tokens [B, 256, 48]."""
    return QwenImagePipeline._pack_latents(_unshuffled(pictures), len(pictures), 12, SIDE // 2, SIDE // 2)


def _unpacked(tokens: Tensor) -> Tensor:
    side = SIDE // 4
    blocks = tokens.unflatten(1, (side, side)).unflatten(3, (12, 2, 2))  # [B, y, x, C, 2, 2]
    return functional.pixel_shuffle(blocks.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3), 2).movedim(1, -1)


def _frames(latents: Tensor) -> Tensor:
    return functional.pixel_shuffle(latents.transpose(1, 2), 2).movedim(2, -1)


@dataclass(frozen=True)
class Model:
    """One small model.

    Args:
        prediction: what it returns: "flow" (noise - data) or "epsilon" (the noise).
        data: draws its pictures.
        denoiser: makes the network.
        encode: pictures to what the network is given.
        pictures: what a pipeline returns, to [B, ..., 3] in [-1, 1].
        call: runs the network on (network, sample, timestep in [0, 1000], words).
        pipeline: the diffusers pipeline.
        scheduler: of the pipeline.
        request: keyword arguments of a call without guidance.
        guided: further ones of a call with guidance.
    """

    prediction: str
    data: type[Emoji] | type[Photographs]
    denoiser: Callable[[], nn.Module]
    encode: Callable[[Tensor], Tensor]
    pictures: Callable[[Tensor], Tensor]
    call: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    pipeline: type
    scheduler: Callable[[], Any]
    request: Mapping[str, Any] = field(default_factory=dict)
    guided: Mapping[str, Any] = field(default_factory=dict)


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def _call_unet(network: nn.Module, sample: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
    size = torch.tensor([512.0, 512, 0, 0, 512, 512], device=sample.device).expand(len(sample), 6)
    more = {"text_embeds": words.mean(1), "time_ids": size}
    return network(sample, timestep, words, added_cond_kwargs=more, return_dict=False)[0]


def _call_pixart(network: nn.Module, sample: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
    more = {"resolution": None, "aspect_ratio": None}
    return network(sample, words, timestep, added_cond_kwargs=more, return_dict=False)[0]


def _call_qwen(network: nn.Module, sample: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
    shapes = [[(1, SIDE // 4, SIDE // 4)]] * len(sample)
    return network(sample, words, None, timestep / 1000, shapes, return_dict=False)[0]


def _call_wan(network: nn.Module, sample: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
    return network(sample, timestep, words, return_dict=False)[0]


def _same(pictures: Tensor) -> Tensor:
    return pictures


def _last(pictures: Tensor) -> Tensor:
    return pictures.movedim(1, -1)


MODELS = {
    "unet": Model(
        "epsilon",
        Emoji,
        lambda: UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=3,
            out_channels=3,
            block_out_channels=(48, 64, 112, 144),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT,
            attention_head_dim=4,
            norm_num_groups=16,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=6 * 32 + TEXT,
        ),  # fmt: skip
        _same,
        _last,
        _call_unet,
        UNetPixels,
        _ddim,
        {"height": 512, "width": 512, "guidance_scale": 1.0},
        {"guidance_scale": 3.0, "negative_prompt": ""},
    ),
    "pixart": Model(
        "epsilon",
        Photographs,
        lambda: PixArtTransformer2DModel(
            sample_size=SIDE,
            patch_size=4,
            in_channels=3,
            out_channels=3,
            num_layers=8,
            num_attention_heads=4,
            attention_head_dim=48,
            cross_attention_dim=192,
            caption_channels=TEXT,
            use_additional_conditions=False,
        ),  # fmt: skip
        _same,
        _last,
        _call_pixart,
        PixArtPixels,
        _ddim,
        {"height": 512, "width": 512, "guidance_scale": 1.0, "use_resolution_binning": False},
        {"guidance_scale": 3.0, "negative_prompt": ""},
    ),
    "qwen": Model(
        "flow",
        Photographs,
        lambda: QwenImageTransformer2DModel(
            in_channels=48,
            out_channels=12,
            num_layers=6,
            num_attention_heads=4,
            attention_head_dim=40,
            joint_attention_dim=TEXT,
            axes_dims_rope=(8, 16, 16),
        ),  # fmt: skip
        _packed,
        _unpacked,
        _call_qwen,
        QwenPixels,
        lambda: FlowMatchEulerDiscreteScheduler(shift=1.5),
        {"height": 256, "width": 256, "true_cfg_scale": 1.0},
        {"true_cfg_scale": 2.5, "negative_prompt": ""},
    ),
    "wan": Model(
        "flow",
        Videos,
        lambda: WanTransformer3DModel(
            in_channels=12,
            out_channels=12,
            num_layers=8,
            num_attention_heads=4,
            attention_head_dim=48,
            ffn_dim=768,
            text_dim=TEXT,
            freq_dim=128,
        ),  # fmt: skip
        _unshuffled,
        _frames,
        _call_wan,
        WanPixels,
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        {"height": 128, "width": 128, "num_frames": 4 * (FRAMES - 1) + 1, "guidance_scale": 1.0},
        {"guidance_scale": 3.0, "negative_prompt": ""},
    ),
}
assert VIDEO_SIDE == 32, "the request of wan asks for 32x32 pixels"


def save(path: Path, network: nn.Module, words: Words) -> None:
    """Write the weights as whole numbers of 8 bits, one scale a row: the model is what they stand for."""
    arrays: dict[str, Tensor] = {}
    for part, module in (("network", network), ("words", words)):
        for name, weight in module.state_dict().items():
            flat = weight.detach().float().cpu()
            if flat.ndim < 2:
                arrays[f"{part}.{name}"] = flat.contiguous()
                continue
            scale = flat.flatten(1).abs().amax(1).clamp_min(1e-8) / 127
            shaped = scale.view(-1, *[1] * (flat.ndim - 1))
            arrays[f"{part}.{name}"] = (flat / shaped).round().to(torch.int8).contiguous()
            arrays[f"{part}.{name}.scale"] = scale
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path, {"vocabulary": json.dumps(words.vocabulary)})


def load(name: str, path: Path, device: str = "cpu") -> Any:
    """The pipeline of a model that `save` wrote, in float32, without its progress bar."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        words = Words(json.loads(file.metadata()["vocabulary"]))
    arrays, model = load_file(path), MODELS[name]
    network = model.denoiser()
    for part, module in (("network", network), ("words", words)):
        state = {}
        for key in module.state_dict():
            weight = arrays[f"{part}.{key}"].float()
            scale = arrays.get(f"{part}.{key}.scale")
            state[key] = weight if scale is None else weight * scale.view(-1, *[1] * (weight.ndim - 1))
        module.load_state_dict(state)
        module.to(device).eval().requires_grad_(False)
    return assemble(name, network, words)


def assemble(name: str, network: nn.Module, words: Words) -> Any:
    """The pipeline of a network and its words."""
    model = MODELS[name]
    known = set(inspect.signature(model.pipeline.__init__).parameters) - {"self"}
    absent = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    parts: dict[str, Any] = {part: None for part in absent if part in known}
    parts["unet" if "unet" in known else "transformer"] = network
    if "add_watermarker" in known:
        parts["add_watermarker"] = False
    pipe = model.pipeline(scheduler=model.scheduler(), **parts)
    pipe.words, pipe.model = words, model
    pipe.set_progress_bar_config(disable=True)
    return pipe
