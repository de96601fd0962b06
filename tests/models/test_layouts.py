"""The table of hidden sites: one tiny denoiser of each class that no pipeline of `zoo` has, in a loop of one's own.

The oracle runs every block and overwrites what the head's norm is given at forecast steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from zoo import noise, random

import lesa
from lesa.models.layouts import LAYOUTS
from lesa.plans.plan import Plan
from lesa.plans.rows import Row

pytestmark = pytest.mark.filterwarnings("error::lesa.LesaWarning")

STEPS, COMPUTED = 6, (0, 1, 4)
LEVELS = torch.linspace(1, 0, STEPS + 1)
REUSED = {step: Row((max(s for s in COMPUTED if s < step),), (1.0,)) for step in range(STEPS) if step not in COMPUTED}

_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
_SIZES = {"in_channels": 4, "out_channels": 4, "num_layers": 2, **_HEADS}
_TEXT = {"encoder_hidden_states": noise(1, 6, 16)}
_IDS = {"txt_ids": torch.zeros(6, 3), "img_ids": noise(16, 3, seed=3)}
_MASK = {"encoder_attention_mask": torch.ones(1, 6)}
_FACES = {
    "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 4, "cross_attn_num_heads": 2,
    "LFE_id_dim": 4, "LFE_vit_dim": 4, "LFE_depth": 2, "LFE_dim_head": 4, "LFE_num_heads": 2, "LFE_num_id_token": 1,
    "LFE_num_querie": 2, "LFE_output_dim": 21, "LFE_ff_mult": 1, "LFE_num_scale": 2,
}  # fmt: skip
_CONSISID = {
    **_SIZES, "time_embed_dim": 4, "text_embed_dim": 16, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 6,
}  # fmt: skip
_COSMOS = {
    **_SIZES, "mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 16, 16),
    "concat_padding_mask": False,
}  # fmt: skip
_EASYANIMATE = {**_SIZES, "mmdit_layers": 1, "patch_size": 2, "text_embed_dim": 16, "time_embed_dim": 8}
_FRAMEPACK = {
    **_SIZES, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6),
    "text_embed_dim": 16, "pooled_projection_dim": 8, "has_image_proj": True, "image_proj_dim": 16,
    "has_clean_x_embedder": True,
}  # fmt: skip
_WAN = {**_SIZES, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}

_HUNYUAN_DIT: tuple[Any, ...] = (
    {
        **_HEADS,
        "in_channels": 4,
        "sample_size": 8,
        "patch_size": 2,
        "num_layers": 4,
        "hidden_size": 32,
        "cross_attention_dim": 16,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 8,
        "text_len": 6,
        "text_len_t5": 5,
        "activation_fn": "gelu-approximate",
    },
    (1, 4, 8, 8),
    {
        **_TEXT,
        "text_embedding_mask": torch.ones(1, 6),
        "encoder_hidden_states_t5": noise(1, 5, 16, seed=2),
        "text_embedding_mask_t5": torch.ones(1, 5),
        "image_meta_size": torch.full((1, 6), 8.0),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": [torch.ones(16, 16), torch.zeros(16, 16)],
    },
)
# For each class, after a comma what its case is: its configuration, the shape of its sample and its other inputs.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "BriaFiboTransformer2DModel": (
        {
            **_HEADS, "in_channels": 4, "patch_size": 1, "num_layers": 2, "num_single_layers": 1,
            "joint_attention_dim": 16, "text_encoder_dim": 16, "pooled_projection_dim": None,
            "axes_dims_rope": (4, 6, 6),
        },
        (1, 16, 4),
        {**_TEXT, **_IDS, "text_encoder_layers": [noise(1, 6, 16, seed=seed) for seed in range(3)]},
    ),
    "ChronoEditTransformer3DModel": (_WAN, (1, 4, 3, 8, 8), _TEXT),
    "ConsisIDTransformer3DModel": (_CONSISID, (2, 3, 4, 8, 8), {"encoder_hidden_states": noise(2, 6, 16)}),
    "ConsisIDTransformer3DModel, with faces": (
        {**_CONSISID, **_FACES},
        (2, 3, 4, 8, 8),
        {
            "encoder_hidden_states": noise(2, 6, 16),
            "id_cond": noise(2, 4),
            "id_vit_hidden": [noise(2, 3, 4, seed=seed) for seed in range(2)],
        },
    ),
    "CosmosTransformer3DModel": (_COSMOS, (1, 4, 3, 8, 8), {**_TEXT, "fps": 16}),
    "CosmosTransformer3DModel, from a video": (
        {**_COSMOS, "in_channels": 5, "controlnet_block_every_n": 1, "extra_pos_embed_type": None},
        (1, 4, 3, 8, 8),
        {
            **_TEXT,
            "condition_mask": torch.ones(1, 1, 3, 8, 8),
            "block_controlnet_hidden_states": [noise(1, 48, 32, seed=seed) for seed in range(2)],
        },
    ),
    "EasyAnimateTransformer3DModel": (
        {**_EASYANIMATE, "text_embed_dim_t5": 16},
        (1, 4, 3, 8, 8),
        {**_TEXT, "encoder_hidden_states_t5": noise(1, 5, 16, seed=2)},
    ),
    "EasyAnimateTransformer3DModel, inpainting": (
        {**_EASYANIMATE, "in_channels": 13},
        (1, 4, 3, 8, 8),
        {**_TEXT, "inpaint_latents": noise(1, 5, 3, 8, 8), "control_latents": noise(1, 4, 3, 8, 8, seed=2)},
    ),
    "GlmImageTransformer2DModel": (
        {
            **_SIZES, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 8,
        },
        (1, 4, 8, 8),
        {
            **_TEXT,
            "prior_token_id": torch.arange(16)[None] % 8,
            "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
            "target_size": torch.full((1, 2), 8.0),
            "crop_coords": torch.zeros(1, 2),
        },
    ),
    "HunyuanDiT2DModel": _HUNYUAN_DIT,
    "HunyuanDiT2DModel, ControlNet": (
        *_HUNYUAN_DIT[:2],
        {**_HUNYUAN_DIT[2], "controlnet_block_samples": [noise(1, 16, 32, seed=5)]},
    ),
    "HunyuanImageTransformer2DModel": (
        {
            **_SIZES, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": (1, 1),
            "guidance_embeds": True, "text_embed_dim": 16, "text_embed_2_dim": 16, "rope_axes_dim": (8, 8),
        },
        (1, 4, 4, 4),
        {
            **_TEXT,
            **_MASK,
            "encoder_hidden_states_2": noise(1, 5, 16, seed=2),
            "encoder_attention_mask_2": torch.ones(1, 5),
            "guidance": torch.tensor([3.5]),
        },
    ),
    "HunyuanVideo15Transformer3DModel": (
        {
            **_SIZES, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1, "patch_size_t": 1,
            "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 12, "rope_axes_dim": (4, 6, 6),
            "target_size": 16,
        },
        (1, 4, 3, 4, 4),
        {
            **_TEXT,
            **_MASK,
            "encoder_hidden_states_2": noise(1, 5, 8, seed=2),
            "encoder_attention_mask_2": torch.ones(1, 5),
            "image_embeds": noise(1, 3, 12, seed=3),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        _FRAMEPACK,
        (1, 4, 3, 4, 4),
        {
            **_TEXT,
            **_MASK,
            "pooled_projections": noise(1, 8, seed=2),
            "guidance": torch.tensor([3.5]),
            "image_embeds": noise(1, 6, 16, seed=3),
            "indices_latents": torch.arange(3),
            "latents_clean": noise(1, 4, 2, 4, 4, seed=4),
            "indices_latents_clean": torch.arange(2),
            "latents_history_2x": noise(1, 4, 2, 4, 4, seed=5),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": noise(1, 4, 8, 4, 4, seed=6),
            "indices_latents_history_4x": torch.arange(8),
        },
    ),
    "Krea2Transformer2DModel": (
        {
            **_HEADS, "in_channels": 4, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 32,
            "timestep_embed_dim": 8, "text_hidden_dim": 16, "num_text_layers": 3, "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1, "text_intermediate_size": 16, "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6),
        },
        (1, 16, 4),
        {
            "encoder_hidden_states": noise(1, 6, 3, 16),
            "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
            "position_ids": torch.arange(66).view(22, 3) % 5,
        },
    ),
    "LongCatImageTransformer2DModel": (
        {
            **_HEADS, "in_channels": 4, "patch_size": 1, "num_layers": 1, "num_single_layers": 2,
            "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": [4, 6, 6],
        },
        (1, 16, 4),
        {**_TEXT, **_IDS, "guidance": torch.tensor([3.5])},
    ),
    "LuminaNextDiT2DModel": (
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
            "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "learn_sigma": False,
            "cross_attention_dim": 16,
        },
        (1, 4, 8, 8),
        {
            **_TEXT,
            "encoder_mask": torch.ones(1, 6),
            "image_rotary_emb": torch.polar(torch.ones(384, 384, 8), noise(384, 384, 8)),
            "cross_attention_kwargs": {},
        },
    ),
    "OmniGenTransformer2DModel": (
        {
            "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_layers": 2,
            "intermediate_size": 32, "pad_token_id": 0, "vocab_size": 20, "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        (1, 4, 8, 8),
        {
            "input_ids": torch.arange(24)[None] % 20,
            "input_img_latents": [noise(1, 4, 8, 8, seed=2)],
            "input_image_sizes": {0: [[0, 16]]},
            "attention_mask": torch.ones(1, 41, 41),
            "position_ids": torch.arange(41)[None],
        },
    ),
    "OvisImageTransformer2DModel": (
        {
            **_SIZES, "patch_size": 1, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        (1, 16, 4),
        {**_TEXT, **_IDS},
    ),
    "PRXTransformer2DModel": (
        {
            "in_channels": 4, "patch_size": 2, "context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 2.0,
            "num_heads": 2, "depth": 2, "axes_dim": [8, 8],
        },
        (1, 4, 8, 8),
        {**_TEXT, "attention_mask": torch.ones(1, 6)},
    ),
    "QwenImage21Transformer2DModel": (
        {**_SIZES, "context_in_dim": 16, "mlp_ratio": 2, "axes_dims_rope": (4, 6, 6)},
        (1, 16, 4),
        {**_TEXT, "img_shapes": [[(1, 4, 4)]], "img_mask": torch.arange(10)[None] >= 6},
    ),
    "WanAnimateTransformer3DModel": (
        {
            **_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4}, "motion_encoder_size": 16, "motion_style_dim": 8,
            "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        (1, 12, 3, 8, 8),
        {
            **_TEXT,
            "encoder_hidden_states_image": noise(1, 5, 16, seed=2),
            "pose_hidden_states": noise(1, 4, 2, 8, 8, seed=3),
            "face_pixel_values": noise(1, 3, 5, 16, 16, seed=4),
        },
    ),
}  # fmt: skip


def made(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return random(getattr(diffusers, name.partition(",")[0])(**CASES[name][0])).to(dtype)


def in_dtype(given: Any, dtype: torch.dtype) -> Any:
    if isinstance(given, list):
        return [in_dtype(one, dtype) for one in given]
    return given.to(dtype) if isinstance(given, Tensor) and given.is_floating_point() else given


@torch.no_grad()
def run(denoiser: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """Euler steps from level 1 to 0, of the channels or tokens that the denoiser returns."""
    _, shape, inputs = CASES[name]
    sample = noise(*shape, seed=9).to(dtype)
    for level, following in zip(LEVELS[:-1], LEVELS[1:], strict=True):
        given = {key: in_dtype(value, dtype) for key, value in inputs.items()}  # anew: forwards take from lists
        velocity = denoiser(hidden_states=sample, timestep=level[None].to(dtype), return_dict=False, **given)[0]
        both = min(velocity.shape[1], sample.shape[1])  # beside may stand a variance, a mask or text
        step = (following - level).to(dtype) * velocity[:, :both]
        sample = torch.cat([sample[:, :both] + step, sample[:, both:]], 1)
    return sample


@contextmanager
def oracle(denoiser: nn.Module, norm: str) -> Iterator[None]:
    """Give the head's norm at forecast steps what it was given at the last computed one."""
    step, kept = 0, torch.zeros(())

    def overwrite(_: nn.Module, given: tuple[Any, ...]) -> Any:
        nonlocal step, kept
        if step in COMPUTED:
            kept = given[0].clone()
        step += 1
        return kept, *given[1:]

    handle = denoiser.get_submodule(norm).register_forward_pre_hook(overwrite)
    yield
    handle.remove()


@contextmanager
def counted(denoiser: nn.Module) -> Iterator[Counter[str]]:
    """Count the calls of every module with attention in it, blocks and refiners, but for what modulates the head."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *_: counts.update([name])

    handles = [
        module.register_forward_pre_hook(count(name))
        for name, module in denoiser.named_modules()
        if ("Attention" in type(module).__name__ or "Block" in type(module).__name__) and "time" not in name
    ]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_the_hidden_site_of(name: str, dtype: torch.dtype) -> None:
    denoiser = made(name, dtype)
    bare = run(denoiser, name, dtype)
    with oracle(denoiser, LAYOUTS[type(denoiser).__name__].norm):
        reused = run(denoiser, name, dtype)
    assert bare.isfinite().all()
    assert not torch.equal(reused, bare)
    sigmas = tuple(LEVELS.tolist())
    with lesa.enable(denoiser, Plan(tuple(range(STEPS)), sigmas)):
        assert torch.equal(run(denoiser, name, dtype), bare)
    with lesa.enable(denoiser, Plan(COMPUTED, sigmas, {"*": REUSED})), counted(denoiser) as calls:
        assert torch.equal(run(denoiser, name, dtype), reused)
        stats = lesa.stats(denoiser)
    assert (stats.computed, stats.forecast, stats.refused) == (len(COMPUTED), len(REUSED), {})
    assert set(calls.values()) == {len(COMPUTED)}, calls
    lesa.disable(denoiser)
    assert torch.equal(run(denoiser, name, dtype), bare)


def test_the_page_of_models_names_each_class() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert [name for name in LAYOUTS if name not in page] == []
