"""The bundled pipeline: complete, small, offline, and repeatable."""

import json
import socket
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

import lesa
from lesa import assets
from lesa.plans.plan import Plan

SHORT = {**assets.REQUEST, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def pipe():
    return assets.load()


def test_loads_with_plain_diffusers_and_no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pipe = FluxPipeline.from_pretrained(assets.PIPELINE)
    assert all(
        component is not None
        for name, component in pipe.components.items()
        if "image" not in name and name != "feature_extractor"
    )


def test_is_small_and_safetensors_only():
    files = [path for path in assets.PIPELINE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_draws_64_by_64_pictures_from_256_tokens(pipe):
    output = pipe("red apple", generator=torch.Generator().manual_seed(0), output_type="np", **SHORT)
    assert output.images.shape == (1, 64, 64, 3)
    latents = pipe("red apple", generator=torch.Generator().manual_seed(0), output_type="latent", **SHORT).images
    assert latents.shape == (1, 256, 48)


def test_a_negative_prompt_changes_the_picture(pipe):
    def draw(**more):
        return pipe("red apple", generator=torch.Generator().manual_seed(0), output_type="np", **SHORT, **more).images

    assert not (draw() == draw(negative_prompt="", true_cfg_scale=3.0)).all()


def test_evaluation_meets_its_mark():
    path = Path(__file__).parent.parent / "examples" / "emoji_flux" / "evaluation.json"
    result = json.loads(path.read_text())
    assert result["plain"]["captions"] == 200
    assert result["plain"]["top5"] >= 0.6


def test_prompts_for_fitting_and_judging_are_apart():
    fitting, held_out = assets.fitting_prompts(), assets.held_out_prompts()
    assert len(set(fitting)) == 100 and len(set(held_out)) == 64
    assert not set(fitting) & set(held_out)
    assert not set(range(len(fitting))) & set(assets.held_out_seeds())


@pytest.mark.parametrize("interval", assets.INTERVALS)
def test_bundled_plans_fit_the_bundled_pipeline(pipe, interval):
    plan = Plan.load(assets.plan_path(interval))
    assert plan.denoiser == "FluxTransformer2DModel" and plan.forecaster == "lesa" and plan.site == "hidden"
    lesa.enable(pipe, plan)
    try:
        pipe("red apple", output_type="latent", **assets.REQUEST)
        stats = lesa.stats(pipe)
    finally:
        lesa.disable(pipe)
    assert (stats.computed, stats.forecast, dict(stats.refused)) == (plan.budget, 50 - plan.budget, {})


@pytest.mark.parametrize("budget", assets.BUDGETS)
def test_bundled_fitted_plans(budget, pipe):
    plan = Plan.load(assets.fitted_path(budget))
    assert (plan.num_steps, plan.budget, plan.site, plan.forecaster) == (50, budget, "output", "fitted")
    assert plan.expected and plan.surrogate and plan.training["held_out_psnr"] > 40
    assert assets.fitted_path(budget).stat().st_size < 80_000
    lesa.enable(pipe, plan)
    lesa.disable(pipe)


def test_the_bundled_fitted_plan_of_guided_requests(pipe):
    plan = Plan.load(assets.guided_path())
    assert (plan.num_steps, plan.budget, plan.site, plan.forecaster) == (50, 8, "output", "fitted")
    assert plan.training["held_out_psnr"] > 40 and assets.guided_path().stat().st_size < 200_000
    with lesa.enable(pipe, plan) as run:
        pipe("red apple", output_type="latent", **assets.REQUEST, **assets.GUIDANCE)
    assert (run.stats.computed, run.stats.forecast, dict(run.stats.refused)) == (16, 84, {})


def test_plans_that_are_not_bundled():
    with pytest.raises(ValueError, match="interval=6"):
        assets.plan_path(6)
    with pytest.raises(ValueError, match="budget=9"):
        assets.fitted_path(9)
