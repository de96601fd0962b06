"""Tiny pipelines of real diffusers classes, built from configs with random weights; a few ms a step.

`CASES` lists one `Case` a pipeline; `CASES_BY_NAME["flux_dev"]` finds one. The text encoders are real and
tiny, so prompts are strings; only the tokenizer is a stand-in.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

VOCABULARY = 128
PROMPTS = ("a red apple", "two blue birds on a wire", "snow", "an old green door")
NEGATIVE = "blurry dark"
SITES = ("hidden", "output")


class WordTokenizer:
    """Stand-in tokenizer: one token a word, the id a hash of it; 0 pads, the last id ends."""

    model_max_length = 16
    added_tokens_encoder: dict[str, int] = {}

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [" ".join(str(i) for i in row) for row in ids.tolist()]

    def __call__(
        self, text: str | list[str], padding: str | bool = True, max_length: int | None = None, **_: Any
    ) -> BatchEncoding:
        texts = [text] if isinstance(text, str) else text
        limit = max_length or self.model_max_length
        rows = [[1 + zlib.crc32(w.encode()) % (VOCABULARY - 2) for w in t.split()][: limit - 1] for t in texts]
        rows = [[*row, VOCABULARY - 1] for row in rows]
        width = limit if padding == "max_length" else max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


@dataclass(frozen=True, eq=False)  # hashed by identity, so that results can be cached by case
class Case:
    """One pipeline and how tests call it.

    Args:
        name: the builder's name.
        make: builds the pipeline with the same weights at every call.
        request: default keyword arguments of the pipeline call.
        denoiser_name: the pipeline's attribute that lesa accelerates.
        sites: the sites that denoiser supports.
        contexts: cache contexts of a default request; empty where the pipeline names none.
        blocks: attributes of the denoiser that list its blocks, in the order they run.
        probe: a module inside a block that runs once each time the block is really computed.
        feature: position of the image stream in what a block returns, where that is a tuple.
        steps: denoiser calls a context sees in a default request.
        size: default height and width in pixels; None where the pipeline takes no size.
        other_size: another valid (height, width).
        several: the keyword for several images per prompt.
        negative: the keyword of the guidance scale that `call(guidance=...)` switches on and off.
        callbacks: whether the pipeline takes `callback_on_step_end`.
    """

    name: str
    make: Callable[[], Any]
    request: dict[str, Any]
    denoiser_name: str = "transformer"
    sites: tuple[str, ...] = SITES
    contexts: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ("transformer_blocks",)
    probe: str = "attn"
    feature: int = 1
    steps: int = 8
    size: tuple[int, int] | None = (32, 32)
    other_size: tuple[int, int] | None = (48, 32)
    several: str | None = "num_images_per_prompt"
    negative: str | None = None
    callbacks: bool = True

    def denoiser(self, pipe: Any) -> nn.Module:
        """The module that lesa accelerates."""
        return getattr(pipe, self.denoiser_name)

    def probes(self, pipe: Any) -> list[nn.Module]:
        """One module inside each block; count their calls to learn which blocks were computed."""
        blocks = [block for name in self.blocks for block in getattr(self.denoiser(pipe), name)]
        return [block.get_submodule(self.probe) for block in blocks]

    def call(
        self,
        pipe: Any,
        seed: int = 0,
        batch: int = 1,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
        prompt: int = 0,
        images: int = 1,
        guidance: bool | None = None,
        **more: Any,
    ) -> Tensor:
        """Run one request and return its final latents, or images where the pipeline always decodes.

        Args:
            seed: of the CPU generator that draws the noise.
            batch: prompts in the request.
            steps: number of inference steps asked of the pipeline; `self.steps` by default.
            size: height and width in pixels.
            prompt: index into `PROMPTS` of the first prompt.
            images: images per prompt.
            guidance: switch classifier-free guidance on or off; None leaves the default.
            more: further keyword arguments of the pipeline call, replacing the defaults.
        """
        kwargs = dict(self.request)
        kwargs["num_inference_steps"] = steps or kwargs.get("num_inference_steps", self.steps)
        if size or self.size:
            kwargs["height"], kwargs["width"] = size or self.size
        if images != 1:
            kwargs[self.several] = images
        if guidance is not None:
            kwargs[self.negative] = 3.0 if guidance else 1.0
        indices = [(prompt + i) % len(PROMPTS) for i in range(batch)]
        if isinstance(pipe, DiTPipeline):
            kwargs["class_labels"] = [5 + index for index in indices]
        else:
            kwargs["prompt"] = [PROMPTS[index] for index in indices]
            if "negative_prompt" in kwargs:
                kwargs["negative_prompt"] = [NEGATIVE] * batch
        if isinstance(pipe, FluxImg2ImgPipeline):
            kwargs["image"] = _picture(*(size or self.size)).expand(batch, -1, -1, -1)
        kwargs.update(more)
        output = pipe(generator=torch.Generator("cpu").manual_seed(seed), return_dict=False, **kwargs)[0]
        return output if isinstance(output, Tensor) else torch.from_numpy(output)


def flux_dev() -> FluxPipeline:
    """FLUX.1-dev: embedded guidance, dynamic shifting, 2 double and 2 single blocks."""
    return _flux(guidance_embeds=True, shift=3.0, use_dynamic_shifting=True)


def flux_schnell() -> FluxPipeline:
    """FLUX.1-schnell: no guidance, a fixed shift of 1."""
    return _flux(guidance_embeds=False, shift=1.0, use_dynamic_shifting=False)


def flux_img2img() -> FluxImg2ImgPipeline:
    """FLUX.1-dev's components in the image-to-image pipeline."""
    return _quiet(FluxImg2ImgPipeline(**flux_dev().components))


def qwen_image() -> QwenImagePipeline:
    """Qwen-Image: true CFG in two denoiser calls a step."""
    torch.manual_seed(2)
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": VOCABULARY,
                "bos_token_id": 0,
                "eos_token_id": VOCABULARY - 1,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
            },
        )
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    pipe = QwenImagePipeline(scheduler, vae, _random(encoder), WordTokenizer(), _random(transformer))
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return _quiet(pipe)


def hunyuan_video() -> HunyuanVideoPipeline:
    """HunyuanVideo: embedded guidance, 2 double and 2 single blocks, 2 latent frames."""
    torch.manual_seed(3)
    llama = LlamaModel(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            vocab_size=VOCABULARY,
            pad_token_id=0,
        )
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        mid_block_add_attention=False,
    )
    return _quiet(
        HunyuanVideoPipeline(
            text_encoder=_random(llama),
            tokenizer=WordTokenizer(),
            transformer=_random(transformer),
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=_random(CLIPTextModel(_clip(positions=77))),
            tokenizer_2=WordTokenizer(),
        )
    )


def wan() -> WanPipeline:
    """Wan 2.1: CFG in two denoiser calls a step, UniPC, which keeps earlier outputs of its own."""
    torch.manual_seed(4)
    encoder = UMT5EncoderModel(UMT5Config(**_T5))
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
    )
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=2, scale_factor_temporal=2,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return _quiet(WanPipeline(WordTokenizer(), _random(encoder), vae, scheduler, _random(transformer)))


def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: a U-Net, both halves of the CFG in one batch."""
    torch.manual_seed(5)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 16,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    pipe = StableDiffusionXLPipeline(
        vae=_image_vae(),
        text_encoder=_random(CLIPTextModel(_clip())),
        text_encoder_2=_random(CLIPTextModelWithProjection(_clip())),
        tokenizer=WordTokenizer(),
        tokenizer_2=WordTokenizer(),
        unet=_random(unet),
        scheduler=scheduler,
        add_watermarker=False,
    )
    return _quiet(pipe)


def dit() -> DiTPipeline:
    """DiT: class labels, DDIM, both halves of the CFG in one batch; always decodes into images."""
    torch.manual_seed(6)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        norm_num_groups=8,
        num_embeds_ada_norm=1000,
    )
    vae = _image_vae()
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.1)  # keep images inside (0, 1): a clamped pixel would hide differences
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, num_train_timesteps=1000)
    return _quiet(DiTPipeline(_random(transformer), vae, scheduler))


def _flux(guidance_embeds: bool, **scheduler: Any) -> FluxPipeline:
    torch.manual_seed(1)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=_image_vae(),
            text_encoder=_random(CLIPTextModel(_clip())),
            tokenizer=WordTokenizer(),
            text_encoder_2=_random(T5EncoderModel(T5Config(**_T5))),
            tokenizer_2=WordTokenizer(),
            transformer=_random(transformer),
        )
    )


_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}


def _clip(positions: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=positions,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=VOCABULARY - 1,
    )


def _image_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.1,
        mid_block_add_attention=False,
        force_upcast=False,
    )


@torch.no_grad()
def _random(model: nn.Module) -> nn.Module:
    """Redraw every matrix and convolution, so that no part is left at a zero initialisation; eval mode."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model.eval()


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.eval()
    return pipe


@functools.lru_cache
def _picture(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(7))


_LATENT = {"output_type": "latent"}
_TEXT = {**_LATENT, "max_sequence_length": 12}
_NO_TRUE_CFG = {"negative_prompt": None, "true_cfg_scale": 1.0}
_DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")

CASES = (
    Case(
        "flux_dev",
        flux_dev,
        {**_TEXT, **_NO_TRUE_CFG},
        contexts=("cond",),
        blocks=_DOUBLE_SINGLE,
        negative="true_cfg_scale",
    ),
    Case("flux_schnell", flux_schnell, _TEXT, contexts=("cond",), blocks=_DOUBLE_SINGLE, steps=4),
    Case(
        "flux_img2img",
        flux_img2img,
        {**_TEXT, "strength": 0.75, "num_inference_steps": 8},
        blocks=_DOUBLE_SINGLE,
        steps=6,
    ),
    Case(
        "qwen_image",
        qwen_image,
        {**_TEXT, "negative_prompt": None, "true_cfg_scale": 3.0},
        contexts=("cond", "uncond"),
        negative="true_cfg_scale",
    ),
    Case(
        "hunyuan_video",
        hunyuan_video,
        {**_TEXT, **_NO_TRUE_CFG, "num_frames": 5, "prompt_template": {"template": "{}", "crop_start": 0}},
        contexts=("cond",),
        blocks=_DOUBLE_SINGLE,
        feature=0,
        size=(64, 64),
        other_size=(96, 64),
        negative="true_cfg_scale",
        several="num_videos_per_prompt",
    ),
    Case(
        "wan",
        wan,
        {**_TEXT, "negative_prompt": None, "num_frames": 3, "guidance_scale": 3.0},
        contexts=("cond", "uncond"),
        blocks=("blocks",),
        probe="attn1",
        several="num_videos_per_prompt",
        negative="guidance_scale",
    ),
    Case(
        "sdxl",
        sdxl,
        {**_LATENT, "negative_prompt": None, "guidance_scale": 3.0},
        denoiser_name="unet",
        sites=("output",),
        blocks=("down_blocks", "up_blocks"),
        probe="resnets.0",
        negative="guidance_scale",
    ),
    Case(
        "dit",
        dit,
        {"output_type": "np", "guidance_scale": 3.0},
        probe="attn1",
        size=None,
        other_size=None,
        several=None,
        negative="guidance_scale",
        callbacks=False,
    ),
)
CASES_BY_NAME = {case.name: case for case in CASES}
