"""Gathering of statistics, against the features that a recorder hands on and what the scheduler is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.cache_utils import CacheMixin
from pipelines import CASES_BY_NAME, NEGATIVE, PROMPTS, SITES, Case
from torch import Tensor

import lesa
from lesa.forecasters import plan_of
from lesa.models import hooks, pipeline
from lesa.models.pipeline import FeatureRecorder, run
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
        assert ours.contexts == tuple(alone[0])
        np.testing.assert_allclose(ours.grams[site], (products(alone[0]) + products(alone[1])) / 2, rtol=1e-9)
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


def test_where_guidance_is_batched_both_halves_are_averaged() -> None:
    case = CASES_BY_NAME["sdxl"]
    pipe, request = case.make(), request_of(case)
    halves = recorded(pipe, request, "output")["default"]
    assert halves.shape[1] == 2
    ours = Statistics.gather(pipe, PROMPTS[:1], request=request)
    assert ours.contexts == ("default",) and ours.guidance == (1.0,)
    mean = (products({"a": halves[:, :1]}) + products({"b": halves[:, 1:]})) / 2
    np.testing.assert_allclose(ours.gram("output", GUIDED), mean, rtol=1e-9)


def test_functions_that_run_a_pipeline_and_a_variance_that_is_left_out() -> None:
    case = CASES_BY_NAME["dit"]
    pipe = case.make()
    outputs: list[Tensor] = []
    handle = case.denoiser(pipe).register_forward_hook(lambda _module, _args, output: outputs.append(output[0].clone()))
    functions = [lambda seed=seed: case.call(pipe, seed=seed, steps=STEPS) for seed in range(2)]
    ours = Statistics.gather(pipe, requests=functions)
    handle.remove()
    assert ours.requests == 2 and set(ours.grams) == set(SITES) and ours.guidance == (1.0,)
    means = torch.stack(outputs).unflatten(0, (2, STEPS))[:, :, :, :4].double().flatten(2).numpy()
    assert outputs[0].shape[1] == 8
    expected = sum(own @ own.T / own.shape[1] for own in means) / 2
    np.testing.assert_allclose(ours.gram("output", "default"), expected, rtol=1e-9)


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
    with pytest.raises(ValueError, match="give sigmas"):
        Statistics.gather(bare, requests=[own])
    assert Statistics.gather(bare, requests=[own], sigmas=(0.9, 0.5, 0.1, 0.0)).sigmas == (0.9, 0.5, 0.1, 0.0)
    with pytest.raises(StatisticsError, match="3 steps of 2"):
        Statistics.gather(bare, requests=[own], sigmas=(0.9, 0.5, 0.0))


def test_guidance_of_a_loop_of_ones_own_is_asked_for() -> None:
    torch.manual_seed(0)
    bare = Bare()
    own = loop(bare, np.array([1.0, 0.8, 0.5, 0.0]), 1.0, ("cond", "uncond"))
    with pytest.warns(LesaWarning, match="give guidance"):
        assert Statistics.gather(bare, requests=[own]).guidance == (1.0, 0.0)
    assert Statistics.gather(bare, requests=[own], guidance=(3, -2)).guidance == (3.0, -2.0)
    assert Statistics.gather(bare, requests=[own], request={"guidance_scale": 2.0}).guidance == (2.0, -1.0)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
    ],
)
def test_arguments_out_of_place_are_named(arguments: dict[str, Any], message: str) -> None:
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
