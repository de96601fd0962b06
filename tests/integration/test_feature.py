"""What the feature holds: whatever a forward does before its head, between and after its blocks.

The oracle runs every block and overwrites what the head's norm is given at forecast steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageMultiControlNetModel,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from pipelines import CASES_BY_NAME, NEGATIVE, PROMPTS, Case, _picture, _quiet, _random
from test_dropin import assert_same, plan_for
from torch import Tensor, nn

import lesa
from lesa.models import standins
from lesa.models.layouts import layout_of
from lesa.plans.plan import Plan

pytestmark = pytest.mark.filterwarnings("error::lesa.LesaWarning")

FLUX, QWEN, WAN = (CASES_BY_NAME[name] for name in ("flux_dev", "qwen_image", "wan"))


def flux_controlnet(blocks: int, single_blocks: int, seed: int = 9) -> FluxControlNetModel:
    torch.manual_seed(seed)
    return _random(
        FluxControlNetModel(
            in_channels=16,
            num_layers=blocks,
            num_single_layers=single_blocks,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )


def qwen_controlnet(blocks: int) -> QwenImageControlNetModel:
    torch.manual_seed(9)
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16}
    return _random(
        QwenImageControlNetModel(in_channels=16, out_channels=4, num_layers=blocks, axes_dims_rope=(4, 6, 6), **sizes)
    )


@dataclass(frozen=True)
class Controlled:
    """A case with ControlNets.

    Args:
        case: whose components the pipeline has.
        pipeline: its class.
        controlnet: makes its `controlnet`.
        count: how many images they take; 0 stands for one image that is no list.
    """

    case: Case
    pipeline: type
    controlnet: Callable[[], Any]
    count: int = 0

    def make(self) -> Any:
        pipe = self.pipeline(**self.case.make().components, controlnet=self.controlnet())
        if self.case is QWEN:
            pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
        return _quiet(pipe)

    def call(self, pipe: Any, scale: float = 1.0, **more: Any) -> Tensor:
        picture = _picture(32, 32)
        several = {"control_image": [picture] * self.count, "controlnet_conditioning_scale": [scale] * self.count}
        one = {"control_image": picture, "controlnet_conditioning_scale": scale}
        request = {"prompt": PROMPTS[0], "num_inference_steps": 8, "height": 32, "width": 32, "return_dict": False}
        request |= {**self.case.request, **(several if self.count else one), **more}
        # What the pipeline of the case has by default.
        request |= {"negative_prompt": NEGATIVE} if self.case is QWEN else {"guidance_scale": 3.5}
        generator = torch.Generator("cpu").manual_seed(0)
        return pipe(generator=generator, **request)[0]


SUBJECTS = {
    "flux": Controlled(FLUX, FluxControlNetPipeline, lambda: flux_controlnet(2, 2)),
    "flux, fewer layers": Controlled(FLUX, FluxControlNetPipeline, lambda: flux_controlnet(1, 1)),
    "flux, none of the single blocks": Controlled(FLUX, FluxControlNetPipeline, lambda: flux_controlnet(2, 0)),
    "flux, two": Controlled(
        FLUX, FluxControlNetPipeline, lambda: [flux_controlnet(2, 2), flux_controlnet(2, 2, seed=10)], count=2
    ),
    "qwen": Controlled(QWEN, QwenImageControlNetPipeline, lambda: qwen_controlnet(3)),
    "qwen, fewer layers": Controlled(QWEN, QwenImageControlNetPipeline, lambda: qwen_controlnet(2)),
    "qwen, two images": Controlled(
        QWEN, QwenImageControlNetPipeline, lambda: QwenImageMultiControlNetModel([qwen_controlnet(3)]), count=2
    ),
}


@contextmanager
def oracle(denoiser: nn.Module, plan: Plan, contexts: tuple[str, ...]) -> Iterator[None]:
    """Overwrite what the head's norm is given at the plan's forecast steps."""
    features: dict[str, dict[int, Tensor]] = defaultdict(dict)
    calls = 0

    def overwrite(_: nn.Module, given: tuple[Any, ...]) -> Any:
        nonlocal calls
        context, step = contexts[calls % len(contexts)], calls // len(contexts)
        calls += 1
        kept = features[context]
        if step in plan.computed:
            kept[step] = given[0].clone()
            return given
        row = plan.rows_of(context)[step]
        kept[step] = sum((w * kept[s] for w, s in zip(row.weights, row.steps, strict=True)), torch.zeros(()))
        return kept[step], *given[1:]

    handle = denoiser.get_submodule(layout_of(denoiser).norm).register_forward_pre_hook(overwrite)
    try:
        yield
    finally:
        handle.remove()


# ControlNets: a forward adds what they return after its blocks, chosen by their index and number.


@pytest.mark.parametrize(
    ("name", "fused"), [*((name, False) for name in SUBJECTS), ("flux, fewer layers", True), ("qwen", True)]
)
def test_controlnets_match_the_oracle(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = SUBJECTS[name]
    plan, bare = plan_for(subject.case, "linear", "hidden"), subject.make()
    full = subject.call(bare)
    assert (full - subject.call(bare, scale=0.0)).norm() > 0.05 * full.norm()
    with oracle(bare.transformer, plan, subject.case.contexts):
        expected = subject.call(bare)
    if fused:
        monkeypatch.setattr(standins.ops, "backend_of", lambda name, tensor: "triton")
    pipe = subject.make()
    with lesa.enable(pipe, plan) as run:
        found = subject.call(pipe)
        stats = run.stats
        assert stats.forecast == len(subject.case.contexts) * (subject.case.steps - len(plan.computed))
        assert not stats.refused
    if fused:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert_same(found, expected)
    with lesa.enable(pipe, plan_for(subject.case, "all", "hidden")):
        assert_same(subject.call(pipe), full)
    assert_same(subject.call(pipe), full)


@pytest.mark.parametrize("name", ["flux, two", "qwen"])
def test_a_scale_of_zero_is_no_controlnet(name: str) -> None:
    subject = SUBJECTS[name]
    plan = plan_for(subject.case, "linear", "hidden")
    plain, pipe = subject.case.make(), subject.make()
    # The pipeline draws noise for the control image, too.
    latents = torch.randn(subject.case.call(plain).shape, generator=torch.Generator().manual_seed(1))
    with lesa.enable(plain, plan), lesa.enable(pipe, plan):
        assert_same(
            subject.call(pipe, scale=0.0, latents=latents),
            subject.case.call(plain, latents=latents),
        )


# Other work between the blocks and the head


class LeavesOutItsLast(nn.ModuleList):
    """Blocks of which somebody skips the last, as some guidance methods do."""

    def __iter__(self) -> Any:
        return iter([self[i] for i in range(len(self) - 1)])


def test_a_last_block_that_is_not_run() -> None:
    plan, bare, pipe = plan_for(FLUX, "linear", "hidden"), FLUX.make(), FLUX.make()
    for each in (bare, pipe):
        each.transformer.single_transformer_blocks = LeavesOutItsLast(each.transformer.single_transformer_blocks)
    with oracle(bare.transformer, plan, FLUX.contexts):
        expected = FLUX.call(bare)
    with lesa.enable(pipe, plan) as run:
        assert_same(FLUX.call(pipe), expected)
        assert run.stats.forecast == FLUX.steps - len(plan.computed)


# Wan with images: an embedder that joins the tokens of a first and a last one


def wan_image(joined: bool) -> Any:
    """Wan 2.1 I2V, and with `joined` FLF2V: its image embedder makes one row of tokens out of two images'."""
    parts = WAN.make().components
    torch.manual_seed(4)
    parts["transformer"] = _random(
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=10,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=3,
            image_dim=8,
            added_kv_proj_dim=32,
            pos_embed_seq_len=2 * 5 if joined else None,
        )
    )
    del parts["transformer_2"]
    pipe = _quiet(WanImageToVideoPipeline(**parts, image_processor=None, image_encoder=None))
    embeds = torch.randn(2 if joined else 1, 5, 8, generator=torch.Generator().manual_seed(3))
    pipe.encode_image = lambda image, device: embeds
    return pipe


def call_wan_image(pipe: Any, joined: bool) -> Tensor:
    # Of words the pipeline makes these only with the package ftfy.
    texts = [torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    return pipe(
        image=_picture(32, 32),
        last_image=_picture(32, 32) if joined else None,
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        num_inference_steps=8,
        height=32,
        width=32,
        num_frames=5,
        guidance_scale=3.0,
        output_type="latent",
        max_sequence_length=12,
        generator=torch.Generator("cpu").manual_seed(0),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("joined", [False, True], ids=["one image", "first and last"])
def test_wan_with_images_matches_the_oracle(joined: bool) -> None:
    plan, bare, pipe = plan_for(WAN, "linear", "hidden"), wan_image(joined), wan_image(joined)
    with oracle(bare.transformer, plan, WAN.contexts):
        expected = call_wan_image(bare, joined)
    with lesa.enable(pipe, plan) as run:
        assert_same(call_wan_image(pipe, joined), expected)
        assert run.stats.forecast == len(WAN.contexts) * (WAN.steps - len(plan.computed))
        assert not run.stats.refused
