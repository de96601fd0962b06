"""Situations of users and servers in which the calls of a denoiser are easily misread, on tiny real pipelines."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    StableDiffusionXLImg2ImgPipeline,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, PerturbedAttentionGuidance
from diffusers.hooks import FirstBlockCacheConfig, LayerSkipConfig, TaylorSeerCacheConfig, apply_first_block_cache
from diffusers.modular_pipelines import QwenImageAutoBlocks
from pipelines import Case
from test_dropin import FLUX, QWEN, SDXL, WAN, assert_same, enabled, expected, plan_for, stats_of, untouched
from torch import Tensor, nn

import lesa
from lesa.forecasters import plan_of
from lesa.plans.plan import Plan
from lesa.plans.rows import PlanError
from lesa.runtime.clock import sigmas_of

SITES = pytest.mark.parametrize("site", ["hidden", "output"])


# Whose scheduler


@SITES
@pytest.mark.parametrize("case", [FLUX, WAN], ids=lambda case: case.name)
@pytest.mark.parametrize("how", ["own scheduler", "copy.copy", "after the enabled one is gone"])
def test_pipelines_made_for_one_request(case: Case, site: str, how: str) -> None:
    """As servers make them: on the enabled denoiser, with a scheduler of their own."""
    pipe = enabled(case, plan_for(case, "linear", site))
    for _ in range(2):
        own = copy.copy(pipe)
        own.scheduler = copy.deepcopy(pipe.scheduler)
        if how != "copy.copy":
            own = type(pipe)(**{**pipe.components, "scheduler": own.scheduler})
            own.set_progress_bar_config(disable=True)
            for name in ("prompt_template_encode", "prompt_template_encode_start_idx"):
                if hasattr(pipe, name):
                    setattr(own, name, getattr(pipe, name))
        if how == "after the enabled one is gone":
            del pipe
            pipe = own
        assert_same(case.call(own), expected(case, "linear", site))


def test_two_pipelines_take_turns_on_one_denoiser() -> None:
    """SDXL's base model stops early; a second pipeline with its own scheduler goes on, and is not enabled itself."""
    first = SDXL.make()
    second = StableDiffusionXLImg2ImgPipeline(**first.components, add_watermarker=False)
    second.scheduler = EulerDiscreteScheduler.from_config(first.scheduler.config)
    second.set_progress_bar_config(disable=True)

    def refined(latents: Tensor) -> Tensor:
        return SDXL.call(second, image=latents, denoising_start=0.5, height=None, width=None)

    half = SDXL.call(first, denoising_end=0.5)
    full = refined(half)
    lesa.enable(first, plan_of("reuse", range(8), (*[1.0 - i / 8 for i in range(8)], 0.0), site="output"))
    with pytest.raises(PlanError, match="4 denoiser steps"):
        refined(half)
    lesa.enable(first, budget=1.0)
    with pytest.warns(lesa.LesaWarning, match="forecasts nothing"):
        assert_same(refined(SDXL.call(first, denoising_end=0.5)), full)
    run = lesa.enable(first, budget=2)
    refined(SDXL.call(first, denoising_end=0.5))
    assert run.stats.requests == 2 and (run.stats.computed, run.stats.forecast) == (4, 4) and not run.stats.refused
    assert run.plan.num_steps == 4


def test_a_loop_with_a_scheduler_nobody_can_find_is_computed_with_the_reason() -> None:
    """Nothing is planned for the 1000 steps of a scheduler that was never set."""
    pipe = FLUX.make()
    run = lesa.enable(pipe, budget=4)
    own = FlowMatchEulerDiscreteScheduler()
    own.set_timesteps(6)
    torch.manual_seed(0)
    x, text, pooled = torch.randn(1, 4, 16), torch.randn(1, 3, 16), torch.randn(1, 16)
    ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3), "guidance": torch.ones(1)}

    def loop() -> Tensor:
        own.set_timesteps(6)
        sample = x
        for t in own.timesteps:
            given = {"hidden_states": sample, "encoder_hidden_states": text, "pooled_projections": pooled, **ids}
            sample = own.step(pipe.transformer(**given, timestep=t[None] / 1000)[0], t, sample)[0]
        return sample

    with torch.no_grad(), pytest.warns(lesa.LesaWarning, match="not set"):
        output = loop()
    assert run.plan is None and sum(run.stats.refused.values()) == 6 and len(run.stats.refused) == 1
    lesa.disable(pipe)
    with torch.no_grad():
        assert_same(output, loop())


@SITES
def test_a_deep_copy_works_by_itself(site: str) -> None:
    pipe = enabled(QWEN, plan_for(QWEN, "linear", site))
    QWEN.call(pipe, steps=8)
    copied = copy.deepcopy(pipe)
    before = stats_of(pipe)
    assert_same(QWEN.call(copied), expected(QWEN, "linear", site))
    assert stats_of(pipe) == before and stats_of(copied)[0] == before[0] + 1
    lesa.disable(pipe)
    assert_same(QWEN.call(copied), expected(QWEN, "linear", site))
    lesa.disable(copied)
    for one in (pipe, copied):
        assert_same(QWEN.call(one), untouched(QWEN))


def test_pickling_says_why_not() -> None:
    pipe = enabled(FLUX, plan_for(FLUX, "reuse", "output"))
    for save in (pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
        with pytest.raises(pickle.PicklingError, match="lesa.disable"):
            save(pipe.transformer)
    assert_same(FLUX.call(pipe), expected(FLUX, "reuse", "output"))
    lesa.disable(pipe)
    assert pickle.dumps(pipe.transformer)


# Where a request begins and ends


@SITES
@pytest.mark.parametrize("strength", [0.7, 0.4])
def test_video_to_video_begins_where_it_slices_its_timesteps(site: str, strength: float) -> None:
    """Wan's video-to-video sets no begin_index."""

    def make() -> Any:
        pipe = WanVideoToVideoPipeline(**{k: v for k, v in WAN.make().components.items() if k in components})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(pipe: Any) -> Tensor:
        video = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))
        more = {"video": list(video), "strength": strength, "num_frames": None}
        return _call(pipe, {k: v for k, v in {**WAN.request, **more}.items() if k != "num_frames"}, steps=10)

    components = WanVideoToVideoPipeline._get_signature_keys(WanVideoToVideoPipeline)[0]
    pipe = make()
    full = call(pipe)
    steps = int(10 * strength)
    levels = sigmas_of(pipe.scheduler)[-steps - 1 :]
    for computed in (tuple(range(steps)), (0, 1, steps - 1)):
        plan = plan_of("reuse", computed, levels, site=site)
        pipe = make()
        lesa.enable(pipe, plan)
        output = call(pipe)
        assert stats_of(pipe) == (1, 2 * len(computed), 2 * (steps - len(computed)), 0)
        if len(computed) == steps:
            assert_same(output, full)
        else:
            module = pipe.transformer.blocks[-1] if site == "hidden" else pipe.transformer
            lesa.disable(pipe)
            assert_same(output, _by_oracle(lambda: call(pipe), [module], plan))  # noqa: B023


def _call(pipe: Any, request: dict[str, Any], steps: int) -> Tensor:
    kwargs = {"prompt": None, "height": 32, "width": 32, "num_inference_steps": steps, **request}
    for i, name in enumerate(("prompt_embeds", "negative_prompt_embeds")):
        kwargs[name] = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(i))
    return pipe(generator=torch.Generator().manual_seed(0), return_dict=False, **kwargs)[0]


def _by_oracle(run: Any, modules: list[nn.Module], plan: Plan, branches: int = 2) -> Tensor:
    """What a request gives whose feature is overwritten by the last computed one; every block runs."""
    kept: dict[int, Any] = {}
    calls = 0

    def overwrite(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal calls
        branch, step = calls % branches, calls // branches
        calls += 1
        if step in plan.computed:
            kept[branch] = output
        return kept[branch]

    handles = [module.register_forward_hook(overwrite) for module in modules]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


def test_diffusion_forcing_steps_copies_of_its_scheduler() -> None:
    def make() -> Any:
        base = WAN.make()
        torch.manual_seed(4)
        transformer = SkyReelsV2Transformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=32, ffn_dim=32, num_layers=3,
        )  # fmt: skip
        parts = (base.tokenizer, base.text_encoder, transformer.eval(), base.vae, base.scheduler)
        pipe = SkyReelsV2DiffusionForcingPipeline(*parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(pipe: Any, ar_step: int = 0) -> Tensor:
        more = {"num_frames": 9, "base_num_frames": 9, "ar_step": ar_step, "causal_block_size": 1 if ar_step else None}
        return _call(pipe, {**WAN.request, **more}, steps=8)

    pipe = make()
    full, levels = call(pipe), sigmas_of(pipe.scheduler)
    plan = plan_of("reuse", (0, 1, 4, 7), levels, site="output")
    run = lesa.enable(pipe, plan)
    output = call(pipe)
    assert stats_of(pipe) == (1, 8, 8, 0)
    fresh = make()
    assert_same(output, _by_oracle(lambda: call(fresh), [fresh.transformer], plan))
    # With a step of its own for each frame the calls of one step cannot be told: all are computed.
    with pytest.warns(lesa.LesaWarning, match="lesa computes steps in full"):
        assert_same(call(pipe, ar_step=2), call(make(), ar_step=2))
    run.disable()
    assert_same(call(pipe), full)


# What a call is given


@SITES
@pytest.mark.parametrize("which", ["prompt_embeds", "negative_prompt_embeds"])
def test_prompts_that_change_within_a_request(site: str, which: str) -> None:
    """Features of the earlier prompt forecast nothing more; those of the other context do."""

    def call(pipe: Any, swap: bool = True) -> Tensor:
        def edit(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            return {which: given[which].flip(-1)} if step == 3 and swap else {}

        return WAN.call(pipe, callback_on_step_end=edit, callback_on_step_end_tensor_inputs=[which])

    pipe = WAN.make()
    plan = plan_for(WAN, "reuse", site)  # computes 0, 1, 4, 7
    lesa.enable(pipe, plan)
    assert_same(call(pipe, swap=False), expected(WAN, "reuse", site))
    output = call(pipe)
    assert_same(output, by_oracle_of_swapped(call, site, plan))
    stats = lesa.stats(pipe)
    assert not stats.refused  # step 4 is computed anyway
    later = plan_of("reuse", (0, 1, 7), plan.sigmas, site=site)
    lesa.enable(pipe, later)
    with pytest.warns(lesa.LesaWarning, match="conditions"):
        call(pipe)
    stats = lesa.stats(pipe)
    # One context computes steps 4, 5 and 6: what they would be forecast from is of another prompt.
    assert sum(stats.refused.values()) == 3 and stats.forecast == 10 - 3


def by_oracle_of_swapped(call: Any, site: str, plan: Plan) -> Tensor:
    fresh = WAN.make()
    module = fresh.transformer.blocks[-1] if site == "hidden" else fresh.transformer
    return _by_oracle(lambda: call(fresh), [module], plan)


# Modular pipelines, whose guiders call the denoiser without names

GUIDERS: dict[str, Any] = {
    "classifier-free": lambda: ClassifierFreeGuidance(guidance_scale=3.0),
    "adaptive projected": lambda: AdaptiveProjectedGuidance(guidance_scale=3.0),
    "perturbed attention": lambda: PerturbedAttentionGuidance(
        guidance_scale=3.0,
        perturbed_guidance_scale=2.0,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=0.6,
        perturbed_guidance_config=LayerSkipConfig(
            indices=[1], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
        ),
    ),
}


@SITES
@pytest.mark.parametrize("guider", GUIDERS)
def test_guiders_of_modular_pipelines(guider: str, site: str) -> None:
    def make() -> Any:
        pipe = QwenImageAutoBlocks().init_pipeline()
        pipe.update_components(**QWEN.make().components, guider=GUIDERS[guider]())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(pipe: Any) -> Tensor:
        texts = (" ".join(f"{word}{i}" for i in range(40)) for word in ("word", "bad"))  # 34 tokens are a template's
        given = dict(zip(("prompt", "negative_prompt"), texts, strict=True))
        more = {"num_inference_steps": 8, "height": 32, "width": 32, "output_type": "pt"}
        return pipe(**given, **more, generator=torch.Generator().manual_seed(0)).get("images")

    pipe = make()
    full = call(pipe)
    plan = plan_of("reuse", (0, 1, 4, 7), sigmas_of(pipe.scheduler), site=site)
    run = lesa.enable(pipe, plan)
    output = call(pipe)
    assert run.stats.forecast and not run.stats.refused
    assert_same(output, _by_guider(make(), call, plan))
    assert not torch.equal(output, full)
    run.disable()
    assert_same(call(pipe), full)


def _by_guider(pipe: Any, call: Any, plan: Plan) -> Tensor:
    """What a request gives whose features are overwritten; a call is known by its text and its place in the step."""
    kept: dict[tuple[int, int], Any] = {}
    seen: list[int] = []
    scheduler, now = type(pipe.scheduler), {"step": 0}
    step, module = (
        scheduler.step,
        pipe.transformer if plan.site == "output" else pipe.transformer.transformer_blocks[-1],
    )

    def counted(*args: Any, **kwargs: Any) -> Any:
        now["step"] += 1
        seen.clear()
        return step(*args, **kwargs)

    def begins(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        seen.append(given["encoder_hidden_states"].data_ptr())

    def overwrite(_: nn.Module, __: Any, output: Any) -> Any:
        key = seen[-1], seen.count(seen[-1])
        if now["step"] in plan.computed:
            kept[key] = output
        return kept[key]

    pipe.transformer.register_forward_pre_hook(begins, with_kwargs=True)
    module.register_forward_hook(overwrite)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "step", counted)
        return call(pipe)


# Gradients


@SITES
def test_gradients_are_the_denoisers_own(site: str) -> None:
    def gradients(pipe: Any) -> list[Tensor]:
        torch.manual_seed(0)
        given = {
            "hidden_states": torch.randn(1, 4, 1, 4, 4),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 3, 16),
        }
        pipe.transformer.zero_grad()
        for _ in range(3):
            pipe.transformer(**given)[0].square().mean().backward()
        return [parameter.grad.clone() for parameter in pipe.transformer.parameters()]

    wanted = gradients(WAN.make())
    pipe = enabled(WAN, plan_for(WAN, "reuse", site))
    with pytest.warns(lesa.LesaWarning, match="gradients") as told:
        for _ in range(2):
            assert_same(WAN.call(pipe), expected(WAN, "reuse", site))  # a rollout, then a training step
            assert all(map(torch.equal, gradients(pipe), wanted))
    assert len(told) == 1 and list(lesa.stats(pipe).refused.values()) == [6]


# Several outputs, and several denoisers


class TwoStreams(nn.Module):
    """A denoiser of two tensors of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.ran = 0

    def forward(self, hidden_states: Tensor, audio: Tensor, timestep: Tensor, named: bool = False) -> Any:
        self.ran += 1
        outputs = self.first(hidden_states) * (1 + timestep), self.second(audio) + timestep
        return dict(zip(("sample", "audio"), outputs, strict=True)) if named else outputs


@pytest.mark.parametrize("named", [False, True])
def test_every_tensor_of_an_output_is_forecast(named: bool) -> None:
    levels = torch.linspace(1, 0, 9).tolist()
    plan = plan_of("taylor-1", (0, 1, 4, 7), levels, site="output", timesteps=levels[:-1])
    denoiser = TwoStreams()
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))

    def loop(denoiser: Any) -> list[Tensor]:
        x, y = noise, noise[:, :2]
        for a, b in zip(levels[:-1], levels[1:], strict=True):
            with torch.no_grad():
                u, v = (
                    (made := denoiser(x, y, torch.tensor(a), named)).values()
                    if named
                    else denoiser(x, y, torch.tensor(a))
                )
            x, y = x + (b - a) * u, y + (b - a) * v
        return [x, y]

    def oracle() -> list[Tensor]:
        kept: dict[int, list[Tensor]] = {}

        def forward(x: Tensor, y: Tensor, timestep: Tensor, named: bool) -> Any:
            step = len(kept)
            true = list(TwoStreams().forward(x, y, timestep))
            row = plan.rows_of("*").get(step)
            kept[step] = true if row is None else [
                sum(w * kept[s][i] for w, s in zip(row.weights, row.steps, strict=True)) for i in range(2)
            ]  # fmt: skip
            return dict(zip(("sample", "audio"), kept[step], strict=True)) if named else tuple(kept[step])

        with torch.no_grad():
            return loop(lambda x, y, t, named=named: forward(x, y, t, named))

    lesa.enable(denoiser, plan)
    for got, wanted in zip(loop(denoiser), oracle(), strict=True):
        torch.testing.assert_close(got, wanted)
    assert denoiser.ran == 4
    lesa.disable(denoiser)
    assert all(map(torch.equal, loop(denoiser), loop(TwoStreams())))


def test_ltx2_video_and_audio() -> None:
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2, qk_norm="rms_norm_across_heads",
        caption_channels=16, rope_double_precision=False, rope_type="split",
    ).eval()  # fmt: skip
    video, audio, text = torch.randn(1, 8, 4), torch.randn(1, 9, 4), torch.randn(1, 5, 16)
    given = {"hidden_states": video, "audio_hidden_states": audio, "encoder_hidden_states": text}
    more = {"audio_encoder_hidden_states": text, "num_frames": 2, "height": 2, "width": 2, "audio_num_frames": 9}
    levels = torch.linspace(1, 0, 5).tolist()
    lesa.enable(model, plan_of("reuse", (0, 2), levels, site="output", timesteps=[1000 * t for t in levels[:-1]]))
    for return_dict in (False, True):
        seen = []
        for level in levels[:-1]:
            with torch.no_grad():
                made = model(**given, **more, fps=24.0, timestep=torch.tensor([1000 * level]), return_dict=return_dict)
            seen.append((made.sample, made.audio_sample) if return_dict else made)
        for step in (1, 3):
            assert all(map(torch.equal, seen[step], seen[step - 1]))
        assert not any(map(torch.equal, seen[1], seen[2]))


@SITES
def test_two_experts_take_turns(site: str) -> None:
    """Wan 2.2: the second denoiser runs below a noise level."""

    def make() -> Any:
        parts = WAN.make().components
        torch.manual_seed(9)
        second = copy.deepcopy(parts["transformer"])
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        pipe = WanPipeline(**{**parts, "transformer_2": second}, boundary_ratio=0.875)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    full = WAN.call(make())
    pipe = make()
    run = lesa.enable(pipe, plan_for(WAN, "all", site))
    assert_same(WAN.call(pipe), full)
    run.disable()
    assert_same(WAN.call(pipe), full)
    levels = sigmas_of(pipe.scheduler)
    first = sum(float(t) >= 875 for t in pipe.scheduler.timesteps)
    assert 2 < first < 7
    plan = plan_of("reuse", (0, 1, 7), levels, site=site)
    run = lesa.enable(pipe, plan)
    if site == "output":
        output = WAN.call(pipe)
        fresh = make()
        both = [fresh.transformer, fresh.transformer_2]
        assert_same(output, _by_oracle(lambda: WAN.call(fresh), both, plan))
        assert stats_of(pipe) == (1, 6, 10, 0)
    else:
        with pytest.warns(lesa.LesaWarning, match="another denoiser"):
            WAN.call(pipe)
        assert run.stats.forecast == 2 * (first - 2)  # hidden features of one are none of the other
    run.disable()
    run = lesa.enable(pipe, budget=4)
    WAN.call(pipe)
    assert run.stats.computed + run.stats.forecast == 16 and run.stats.forecast >= 6 and not run.stats.refused
    run.disable()
    assert_same(WAN.call(pipe), full)
    with lesa.enable(pipe.transformer_2, plan):  # one of them alone, as a bare denoiser
        pass
    assert_same(WAN.call(pipe), full)


# Another cache


CACHES = {
    "FirstBlockCache": FirstBlockCacheConfig(threshold=0.5),
    "TaylorSeerCache": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1),
}


def apply_to_blocks(transformer: Any) -> None:
    """As `enable_cache` does, but nothing tells it."""
    apply_first_block_cache(transformer, CACHES["FirstBlockCache"])


def remove_from_blocks(transformer: Any) -> None:
    for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
        for block in blocks:
            registry = getattr(block, "_diffusers_hook", None)
            for hook in list(registry.hooks) if registry is not None else ():
                registry.remove_hook(hook)


def test_a_cache_put_on_directly_is_refused_in_either_order() -> None:
    alone = FLUX.make()
    apply_to_blocks(alone.transformer)
    with pytest.raises(ValueError, match="FBC"):
        lesa.enable(alone, plan_for(FLUX, "reuse", "output"))
    wanted = FLUX.call(alone)
    plan = plan_for(FLUX, "reuse", "hidden")
    pipe = enabled(FLUX, plan)
    apply_to_blocks(pipe.transformer)
    with pytest.warns(lesa.LesaWarning, match="FBC"):
        assert_same(FLUX.call(pipe), wanted)
    assert stats_of(pipe) == (1, plan.budget, 0, FLUX.steps - plan.budget)
    remove_from_blocks(pipe.transformer)
    assert_same(FLUX.call(pipe), expected(FLUX, "reuse", "hidden"))


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_diffusers_is_refused_in_either_order(name: str) -> None:
    alone = FLUX.make()
    alone.transformer.enable_cache(CACHES[name])
    with pytest.raises(ValueError, match=name):
        lesa.enable(alone, plan_for(FLUX, "reuse", "output"))
    wanted = FLUX.call(alone)
    alone.transformer.disable_cache()
    assert_same(FLUX.call(alone), untouched(FLUX))
    for site in ("hidden", "output"):
        plan = plan_for(FLUX, "reuse", site)
        pipe = enabled(FLUX, plan)
        pipe.transformer.enable_cache(CACHES[name])
        with pytest.warns(lesa.LesaWarning, match=name):
            assert_same(FLUX.call(pipe), wanted)
        assert stats_of(pipe) == (1, plan.budget, 0, FLUX.steps - plan.budget)
        pipe.transformer.disable_cache()
        assert_same(FLUX.call(pipe), expected(FLUX, "reuse", site))
