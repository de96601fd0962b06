"""Gathering of statistics, against the features that a recorder hands on and what the scheduler is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.cache_utils import CacheMixin
from pipelines import CASES_BY_NAME, NEGATIVE, PROMPTS, SITES, Case
from torch import Tensor

import lesa
from lesa.fitting.arguments import levels_of_loop
from lesa.fitting.trials import run_in_full
from lesa.forecasters import plan_of
from lesa.models import hooks, pipeline
from lesa.models.pipeline import FeatureRecorder, calls_of, run
from lesa.planner.statistics import GUIDED, Statistics, StatisticsError, flow_impulse_response
from lesa.plans.rows import LesaWarning
from lesa.runtime.clock import Call, impulse_response_of, sigmas_of
from lesa.runtime.runner import PlanRunner

STEPS = 5
FLUX, QWEN, WAN = (CASES_BY_NAME[name] for name in ("flux_dev", "qwen_image", "wan"))


def request_of(case: Case, **more: Any) -> dict[str, Any]:
    sizes = dict(zip(("height", "width"), case.size, strict=True)) if case.size else {}
    guided = {"negative_prompt": NEGATIVE} if case is QWEN else {}
    return {**case.request, "num_inference_steps": STEPS, **sizes, **guided, **more}


def recorded(pipe: Any, request: dict[str, Any], site: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The features [T, m, ...] of each context of one request, in float64."""
    features: dict[str, list[Tensor]] = {}
    recorder = FeatureRecorder(
        PROMPTS[seed : seed + 1],
        sink=lambda call, feature: features.setdefault(call.context, []).append(feature.double()),
    )
    run(pipe, PROMPTS[seed : seed + 1], [seed], request, recorder, site)
    return {context: torch.stack(own).numpy() for context, own in features.items()}


def products(features: dict[str, np.ndarray]) -> np.ndarray:
    flat = np.concatenate([own.reshape(len(own), -1) for own in features.values()])
    return flat @ flat.T / flat.shape[1]


@contextmanager
def given_to(scheduler: Any) -> Iterator[list[Tensor]]:
    """Collects what a scheduler is given at each step."""
    outputs: list[Tensor] = []
    step = scheduler.step

    def collect(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs.append(model_output.clone())
        return step(model_output, *args, **kwargs)

    scheduler.step = collect
    try:
        yield outputs
    finally:
        del scheduler.step


class Observer(PlanRunner):
    """Runs a plan and keeps what it observes."""

    def __init__(self, plan: lesa.Plan) -> None:
        super().__init__(plan)
        self.observed: list[tuple[str, int, Tensor]] = []

    def observe(self, call: Call, output: Tensor) -> None:
        self.observed.append((call.context, call.step, output.clone()))


@pytest.mark.parametrize(("name", "site"), [("qwen_image", "hidden"), ("qwen_image", "output"), ("sdxl", "output")])
def test_a_driver_observes_every_output(name: str, site: str) -> None:
    case = CASES_BY_NAME[name]
    pipe, request = case.make(), request_of(case)
    run(pipe, PROMPTS[:1], [0], request)
    driver = Observer(plan_of("taylor-1", (0, 1, 3), sigmas_of(pipe.scheduler), site))
    returned: list[Tensor] = []
    handle = case.denoiser(pipe).register_forward_hook(
        lambda _module, _args, output: returned.append(output[0].clone())
    )
    run(pipe, PROMPTS[:1], [0], request, driver, site)
    handle.remove()
    contexts = case.contexts or ("default",)
    assert [(context, step) for context, step, _ in driver.observed] == [(c, t) for t in range(STEPS) for c in contexts]
    assert driver.stats.forecast == 2 * len(contexts)
    for (_, _, observed), output in zip(driver.observed, returned, strict=True):
        assert torch.equal(observed, output)


@pytest.mark.parametrize("case", [FLUX, QWEN, CASES_BY_NAME["sdxl"]], ids=lambda case: case.name)
def test_grams_are_the_products_of_the_recorded_features(case: Case) -> None:
    pipe, request = case.make(), request_of(case)
    ours = Statistics.gather(pipe, PROMPTS[:2], request=request)
    assert set(ours.grams) == set(case.sites)
    for site in case.sites:
        alone = [recorded(pipe, request, site, seed) for seed in range(2)]
        if case.name == "sdxl":  # one call for both halves
            scale = request["guidance_scale"]
            alone = [
                {"default": (1 - scale) * own[:, :1] + scale * own[:, 1:]} for (own,) in (a.values() for a in alone)
            ]
        assert ours.contexts == tuple(alone[0])
        np.testing.assert_allclose(ours.grams[site], (products(alone[0]) + products(alone[1])) / 2, rtol=1e-6)
    assert ours.requests == 2 and ours.request == request
    np.testing.assert_allclose(ours.sigmas, sigmas_of(pipe.scheduler))
    np.testing.assert_array_equal(ours.impulse_response, impulse_response_of(pipe.scheduler))
    assert ours.scheduler == type(pipe.scheduler).__name__ and ours.denoiser == type(case.denoiser(pipe)).__name__
    assert ours.config_hash is not None and hooks.attached(pipe) is None


def test_several_prompts_in_one_call_are_as_many_requests() -> None:
    pipe, request = QWEN.make(), request_of(QWEN)
    one, three = (Statistics.gather(pipe, PROMPTS[:3], request=request, batch=batch) for batch in (1, 2))
    assert one.requests == three.requests == 3
    for site in SITES:
        np.testing.assert_allclose(three.grams[site], one.grams[site], rtol=1e-4)


def test_offloaded_and_in_small_pieces_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, request = FLUX.make(), request_of(FLUX)
    whole = Statistics.gather(pipe, PROMPTS[:1], request=request)
    monkeypatch.setattr(pipeline, "_CHUNK", 8 * STEPS * 7)  # seven elements a piece
    pieces = Statistics.gather(pipe, PROMPTS[:1], request=request, offload=True)
    for site in SITES:
        np.testing.assert_allclose(pieces.grams[site], whole.grams[site], rtol=1e-12)


def test_one_request_s_features_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    keepers: list[Any] = []
    begin = pipeline.FeatureRecorder.begin

    def counting(self: Any, request: Any) -> None:
        keepers.append(self)
        alive.append(sum(len(own) for k in keepers for site in k._features.values() for own in site.values()))
        begin(self, request)

    monkeypatch.setattr(pipeline.FeatureRecorder, "begin", counting)
    Statistics.gather(FLUX.make(), PROMPTS[:3], request=request_of(FLUX))
    assert alive == [0, 0, 0]
    assert not any(site for keeper in keepers for site in keeper._features.values())


@pytest.mark.parametrize(
    ("case", "more", "guidance"),
    [
        (FLUX, {}, (1.0,)),
        (FLUX, {"true_cfg_scale": 2.5, "negative_prompt": "dark", "guidance_scale": 7.0}, (2.5, -1.5)),
        (WAN, {"guidance_scale": 4.0}, (4.0, -3.0)),
    ],
    ids=["one context", "true cfg", "cfg"],
)
def test_guided_is_what_the_scheduler_is_given(case: Case, more: dict[str, Any], guidance: tuple[float, ...]) -> None:
    pipe = case.make()
    with given_to(pipe.scheduler) as outputs:
        ours = Statistics.gather(pipe, PROMPTS[:1], request=request_of(case, **more), sites=["output"])
    assert ours.guidance == guidance and set(ours.grams) == {"output"}
    given = torch.stack(outputs).double().flatten(1).numpy()
    expected = given @ given.T / given.shape[1]
    np.testing.assert_allclose(ours.gram("output", GUIDED), expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_the_default_scale_of_the_pipeline_counts() -> None:
    request = request_of(QWEN)
    del request["true_cfg_scale"]
    assert Statistics.gather(QWEN.make(), PROMPTS[:1], request=request).guidance == (4.0, -3.0)


@pytest.mark.parametrize("name", ["sdxl", "dit"])
def test_of_batched_guidance_the_sum_is_taken(name: str) -> None:
    """DiT's conditional half comes first, SDXL's comes second; DiT also returns a variance."""
    case = CASES_BY_NAME[name]
    pipe = case.make()
    with given_to(pipe.scheduler) as outputs:
        ours = Statistics.gather(pipe, requests=[lambda: case.call(pipe, steps=STEPS)])
    given = torch.stack(outputs)[:, :1, :4].double().flatten(1).numpy()
    assert ours.contexts == ("default",) and ours.guidance == (1.0,)
    np.testing.assert_allclose(ours.gram("output", GUIDED), given @ given.T / given.shape[1], rtol=1e-4, atol=1e-5)


def test_functions_that_run_a_pipeline() -> None:
    case = CASES_BY_NAME["dit"]
    pipe = case.make()
    functions = [lambda seed=seed: case.call(pipe, seed=seed, steps=STEPS) for seed in range(2)]
    ours = Statistics.gather(pipe, requests=functions)
    assert ours.requests == 2 and set(ours.grams) == set(SITES) and ours.guidance == (1.0,)
    alone = [Statistics.gather(pipe, requests=[function]) for function in functions]
    for site in SITES:
        np.testing.assert_allclose(ours.grams[site], (alone[0].grams[site] + alone[1].grams[site]) / 2, rtol=1e-5)


def test_image_to_image_is_a_request_of_fewer_steps() -> None:
    case = CASES_BY_NAME["flux_img2img"]
    pipe = case.make()
    ours = Statistics.gather(pipe, requests=[lambda: case.call(pipe)])
    assert ours.num_steps == case.steps == 6
    np.testing.assert_allclose(ours.sigmas, sigmas_of(pipe.scheduler)[2:])
    np.testing.assert_allclose(ours.impulse_response, flow_impulse_response(ours.sigmas), atol=1e-6)


def loop(denoiser: Any, sigmas: np.ndarray, scale: float, contexts: tuple[str, ...] = ()) -> Callable[[], None]:
    """A sampler of one's own: one request of a U-Net or transformer that takes (sample, timestep)."""

    def own() -> None:
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        for now, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            for context in contexts or (None,):
                v = denoiser.call(x, scale * now, context)
            x = x + (following - now) * v

    return own


class Bare(torch.nn.Module, CacheMixin):
    """A denoiser in a loop of one's own, whose outputs can be worked out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.seen: dict[str, list[Tensor]] = {}

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(hidden_states) * (1 + timestep / (1000 if timestep > 1 else 1))

    @torch.no_grad()
    def call(self, x: Tensor, timestep: float, context: str | None = None) -> Tensor:
        if context is not None:
            with self.cache_context(context):
                output = self(x, torch.tensor(timestep))
        else:
            output = self(x, torch.tensor(timestep))
        self.seen.setdefault(context or "default", []).append(output)
        return output


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_bare_denoiser_tells_its_sigmas(scale: float) -> None:
    torch.manual_seed(0)
    bare, sigmas = Bare(), np.array([1.0, 0.8, 0.5, 0.2, 0.0])
    ours = Statistics.gather(bare, requests=[loop(bare, sigmas, scale)])
    np.testing.assert_allclose(ours.sigmas, sigmas, rtol=1e-6)
    np.testing.assert_allclose(ours.timesteps, scale * sigmas[:-1], rtol=1e-6)
    np.testing.assert_allclose(ours.impulse_response, flow_impulse_response(ours.sigmas))
    np.testing.assert_allclose(ours.grams["output"], products({"default": torch.stack(bare.seen["default"]).double()}))
    assert ours.scheduler is None and ours.denoiser == "Bare" and ours.guidance == (1.0,)


def test_sigmas_may_be_given() -> None:
    torch.manual_seed(0)
    bare = Bare()
    own = loop(bare, np.array([3.0, 2.0, 1.0, 0.0]), 1000.0)
    with pytest.raises(ValueError, match="sigmas="):
        Statistics.gather(bare, requests=[own])
    assert Statistics.gather(bare, requests=[own], sigmas=(0.9, 0.5, 0.1, 0.0)).sigmas == (0.9, 0.5, 0.1, 0.0)
    with pytest.raises(ValueError, match="^sigmas"):
        Statistics.gather(bare, requests=[own], sigmas=(0.9, 0.5, 0.0))


def test_guidance_is_asked_for_where_the_sampler_does_not_tell_it() -> None:
    torch.manual_seed(0)
    bare = Bare()
    own = loop(bare, np.array([1.0, 0.8, 0.5, 0.0]), 1.0, ("cond", "uncond"))  # whose outputs are equal
    with pytest.warns(LesaWarning, match="give guidance"):
        assert Statistics.gather(bare, requests=[own]).guidance == (1.0, 0.0)
    assert Statistics.gather(bare, requests=[own], guidance=(3, -2)).guidance == (3.0, -2.0)
    assert Statistics.gather(bare, requests=[own], request={"guidance_scale": 2.0}).guidance == (2.0, -1.0)
    with pytest.raises(ValueError, match="guidance="):
        Statistics.gather(bare, requests=[own], guidance=(1.0,))


class Guided(torch.nn.Module, CacheMixin):
    """A denoiser with a condition, as U-Nets have it: one number a sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.shift = torch.nn.Parameter(torch.randn(4, 8, 8) + 0.2 * torch.randn(2, 4, 8, 8))

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return torch.tanh(self.inner(sample)) + self.shift[condition] * (0.5 + timestep / 1000)

    def halves(self, x: Tensor, timestep: Tensor, how: str) -> tuple[Tensor, Tensor]:
        """What it returns without and with the condition."""
        if how == "batched":
            without, wanted = self(torch.cat([x, x]), timestep, torch.tensor([0, 1])).chunk(2)
            return without, wanted
        outputs = []
        for i, name in enumerate(("uncond", "cond")):
            with self.cache_context(name) if how == "named" else nullcontext():
                outputs.append(self(x, timestep, torch.tensor([i])))
        return outputs[0], outputs[1]


SAMPLERS: dict[str, Callable[[], Any]] = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=2.0),
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "euler": EulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "ancestral": EulerAncestralDiscreteScheduler,
}


def guided(denoiser: Guided, scheduler: Any, how: str, rescaled: bool = False) -> Callable[[], Tensor]:
    """A request of a loop of one's own, by a scheduler."""

    @torch.no_grad()
    def request() -> Tensor:
        torch.default_generator.manual_seed(0)  # ancestral samplers draw more noise
        scheduler.set_timesteps(8)
        x = torch.randn(1, 4, 8, 8) * getattr(scheduler, "init_noise_sigma", 1.0)
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            without, wanted = denoiser.halves(scaled, timestep, how)
            v = without + 4.0 * (wanted - without)
            if rescaled:
                v = v * (wanted.norm(dim=(2, 3), keepdim=True) / v.norm(dim=(2, 3), keepdim=True))
            x = scheduler.step(v, timestep, x, return_dict=False)[0]
        return x

    return request


HOW = {"named": ("uncond", "cond"), "unnamed": ("default", "default#2"), "batched": ("default",)}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_is_found_by_what_the_sampler_does(name: str, how: str) -> None:
    denoiser, scheduler = Guided(), SAMPLERS[name]()
    with given_to(scheduler) as outputs:
        calls = calls_of(denoiser, None, [guided(denoiser, scheduler, how)], {}, None, 1)
        trials = run_in_full(denoiser, calls, {}, scheduler=scheduler)
    ours = trials.statistics
    tolerance = 0.3 if name == "ancestral" else 1e-3
    assert trials.weights == pytest.approx((-3.0, 4.0), abs=tolerance)
    assert ours.contexts == HOW[how]
    given = torch.stack(outputs).double().flatten(1).numpy()
    expected = given @ given.T / given.shape[1]
    np.testing.assert_allclose(ours.gram("output", GUIDED), expected, atol=tolerance * expected.max())
    assert ours.scheduler == type(scheduler).__name__ and ours.sigmas == sigmas_of(scheduler)
    np.testing.assert_array_equal(ours.impulse_response, impulse_response_of(scheduler))


@pytest.mark.parametrize("name", ["flow", "ddim"])
def test_plans_of_separate_and_batched_guidance_do_the_same(name: str) -> None:
    denoiser, errors = Guided(), {}
    for how in HOW:
        scheduler = SAMPLERS[name]()
        own = guided(denoiser, scheduler, how)
        full = own()
        plan = lesa.fit(denoiser, requests=[own] * 2, budget=4, effort="quick", held_out=0, scheduler=scheduler)
        with lesa.enable(denoiser, plan) as run:
            errors[how] = float((own() - full).square().mean().sqrt() / full.std())
        calls = 1 if how == "batched" else 2
        assert run.stats.computed == run.stats.forecast == 4 * calls and not run.stats.refused
    assert errors["named"] == errors["unnamed"] < 0.01
    assert errors["batched"] == pytest.approx(errors["named"], rel=0.3)


def test_rescaled_guidance_is_nearly_found() -> None:
    denoiser, scheduler = Guided(), SAMPLERS["flow"]()
    requests = [guided(denoiser, scheduler, "named", rescaled=True)]
    assert Statistics.gather(denoiser, requests=requests).guidance == pytest.approx((-3.0, 4.0), rel=0.1)


def test_a_loop_that_does_more_than_to_sum_is_told() -> None:
    denoiser, scheduler = Guided(), SAMPLERS["ancestral"]()
    denoiser.shift.data *= 0.02  # so that the noise that is added is most of what changes
    with pytest.warns(LesaWarning, match="give guidance"):
        Statistics.gather(denoiser, requests=[guided(denoiser, scheduler, "named")], scheduler=scheduler)


@pytest.mark.parametrize("name", ["ddim", "euler", "unipc"])
def test_timesteps_that_are_no_noise_levels_of_a_flow_are_refused(name: str) -> None:
    denoiser, scheduler = Guided(), SAMPLERS[name]()
    requests = [guided(denoiser, scheduler, "named")]
    with pytest.raises(ValueError, match="scheduler="):
        Statistics.gather(denoiser, requests=requests)
    levels = sorted(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()[::125].tolist(), reverse=True)
    ours = Statistics.gather(denoiser, requests=requests, sigmas=[*levels, 0.0])
    assert ours.sigmas == (*levels, 0.0) and ours.sigmas[0] > 1


def test_a_pipeline_s_denoiser_alone_with_its_scheduler_is_the_same() -> None:
    case = CASES_BY_NAME["sdxl"]
    pipe = case.make()
    requests = [lambda: case.call(pipe, steps=STEPS)]
    whole = Statistics.gather(pipe, requests=requests)
    alone = Statistics.gather(pipe.unet, requests=requests, scheduler=pipe.scheduler)
    np.testing.assert_allclose(alone.grams["output"], whole.grams["output"], rtol=1e-5)
    np.testing.assert_array_equal(alone.impulse_response, whole.impulse_response)
    assert alone.sigmas == whole.sigmas and alone.contexts == whole.contexts


def test_a_scheduler_s_timesteps_may_be_scaled_and_rounded() -> None:
    scheduler = SAMPLERS["flow"]()
    scheduler.set_timesteps(50)
    for timesteps in (scheduler.timesteps, scheduler.timesteps / 1000, (scheduler.timesteps / 1000).bfloat16()):
        assert levels_of_loop(timesteps.tolist(), None, scheduler) == sigmas_of(scheduler)
        assert levels_of_loop(timesteps[20:].tolist(), None, scheduler) == sigmas_of(scheduler)[20:]


def test_timesteps_of_a_flow_need_no_scheduler() -> None:
    denoiser, scheduler = Guided(), SAMPLERS["flow"]()
    requests = [guided(denoiser, scheduler, "named")]
    bare, told = (Statistics.gather(denoiser, requests=requests, **more) for more in ({}, {"scheduler": scheduler}))
    np.testing.assert_allclose(bare.sigmas, told.sigmas, atol=1e-6)
    np.testing.assert_allclose(bare.impulse_response, told.impulse_response, atol=1e-6)


def test_what_cannot_be_of_a_loop_is_refused() -> None:
    for more, name in [
        ({"sigmas": (0.0, 0.3, 0.7, 1.0)}, "sigmas="),
        ({"sigmas": (1.0, float("nan"), 0.4, 0.0)}, "sigmas="),
        ({"sigmas": (1.0, 0.7, 0.3)}, "sigmas="),
        ({"sigmas": 5}, "sigmas="),
        ({"scheduler": 5}, "scheduler"),
        ({"scheduler": DDIMScheduler()}, "scheduler="),  # its timesteps are not set
        ({"scheduler": DDIMScheduler(), "sigmas": (1.0, 0.0)}, "sigmas, scheduler"),
    ]:
        torch.manual_seed(0)
        bare = Bare()
        own = loop(bare, np.array([1.0, 0.8, 0.5, 0.0]), 1000.0)
        for call in (Statistics.gather, functools.partial(lesa.fit, budget=2, held_out=0, effort="quick")):
            with pytest.raises(ValueError, match=name):
                call(bare, requests=[own], **more)
            assert hooks.attached(bare) is None


@pytest.mark.parametrize("site", SITES)
def test_features_that_are_not_finite_are_named(site: str) -> None:
    pipe, calls = QWEN.make(), [0]

    def poison(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        calls[0] += 1
        if calls[0] == 2 * 2 + 2:  # two calls a step: the second of step 2
            kwargs = {**kwargs, "hidden_states": kwargs["hidden_states"].clone()}
            kwargs["hidden_states"][1] = float("nan")
        return args, kwargs

    handle = pipe.transformer.register_forward_pre_hook(poison, with_kwargs=True)
    message = rf"site '{site}', step 2, context 'uncond', prompt 1 \('{PROMPTS[1]}'\)"
    with pytest.raises(StatisticsError, match=message):
        Statistics.gather(pipe, PROMPTS[:2], request=request_of(QWEN), batch=2, sites=[site])
    handle.remove()
    assert hooks.attached(pipe) is None
    Statistics.gather(pipe, PROMPTS[:1], request=request_of(QWEN))


def test_requests_must_be_of_one_kind() -> None:
    torch.manual_seed(0)
    bare = Bare()
    usual = loop(bare, np.array([1.0, 0.8, 0.5, 0.0]), 1.0)
    others = [
        (loop(bare, np.array([1.0, 0.7, 0.5, 0.0]), 1.0), "request 1 is not of one kind"),
        (loop(bare, np.array([1.0, 0.5, 0.0]), 1.0), "request 1 is not of one kind"),
        (lambda: (usual(), usual()), "more than one request"),
        (lambda: None, "request 1 did not call the denoiser"),
    ]
    for other, message in others:
        with pytest.raises(StatisticsError, match=message):
            Statistics.gather(bare, requests=[usual, other])
        assert hooks.attached(bare) is None


def test_arguments_out_of_place_are_named() -> None:
    for arguments, message in [
        ({}, "prompts, requests: neither is given"),
        ({"prompts": PROMPTS, "requests": [print]}, "prompts, requests: both are given"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "a red apple"}, "prompts='a red apple'"),
        ({"prompts": PROMPTS, "seeds": [1]}, "1 seeds for 4 prompts"),
        ({"prompts": PROMPTS, "batch": 0, "seeds": [1]}, "^batch=0"),
        ({"prompts": PROMPTS, "batch": 1.5}, r"batch=1\.5"),
        ({"prompts": PROMPTS, "sites": ["blocks"]}, "sites"),
        ({"prompts": PROMPTS, "sites": []}, "sites"),
        ({"prompts": PROMPTS, "request": {"generator": torch.Generator()}}, "JSON"),
        ({"prompts": PROMPTS, "sigmas": (1.0, 0.0)}, "scheduler has them"),
        ({"requests": []}, "requests is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            Statistics.gather(PIPE, **arguments)


PIPE = FLUX.make()


def test_targets_that_cannot_serve_are_named() -> None:
    with pytest.raises(ValueError, match="bare denoiser"):
        Statistics.gather(PIPE.transformer, PROMPTS)
    sdxl = CASES_BY_NAME["sdxl"].make()
    with pytest.raises(ValueError, match="hidden"):
        Statistics.gather(sdxl, PROMPTS, request=request_of(CASES_BY_NAME["sdxl"]), sites=["hidden"])
    run(PIPE, PROMPTS[:1], [0], request_of(FLUX))
    lesa.enable(PIPE, plan_of("reuse", (0, 2), sigmas_of(PIPE.scheduler), "hidden"))
    for arguments in ({"prompts": PROMPTS}, {"requests": [print]}):
        with pytest.raises(ValueError, match="lesa is enabled"):
            Statistics.gather(PIPE, request=request_of(FLUX), **arguments)
    assert hooks.attached(PIPE) is not None
    lesa.disable(PIPE)
