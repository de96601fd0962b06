"""`lesa.fit` on a tiny pipeline and a bare denoiser: what it says is what runs, and never worse than the floor."""

import math
import warnings

import numpy as np
import pytest
import torch
from pipelines import flux_dev

import lesa
from lesa import metrics
from lesa.fitting import refining, session, tuning
from lesa.fitting.trials import final_of
from lesa.forecasters import plan_of
from lesa.models.requests import run
from lesa.planner import statistics
from lesa.planner.build import surrogate_of
from lesa.plans.plan import Plan
from lesa.runtime.runner import PlanRunner

REQUEST = {"num_inference_steps": 12, "height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def pipe():
    return flux_dev()


@pytest.fixture(scope="module")
def plan(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    return lesa.fit(pipe, PROMPTS, budget=5, request=REQUEST, effort="default", folder=folder), folder


def psnr(pipe, plan, prompts, seeds):
    images = [
        run(pipe, [p], [s], REQUEST, driver, "output", output_type="np", return_dict=False)[0]
        for p, s in zip(prompts, seeds, strict=True)
        for driver in (PlanRunner(plan), None)
    ]
    return np.mean([metrics.psnr(a, b)[0] for a, b in zip(images[::2], images[1::2], strict=True)])


def test_plan_says_what_it_measured(pipe, plan):
    plan, _ = plan
    assert plan.budget == 5 and plan.num_steps == 12 and plan.site == "output"
    assert plan.training["fitting_psnr"] == pytest.approx(psnr(pipe, plan, PROMPTS[:4], range(4)), abs=0.05)
    assert plan.training["held_out_psnr"] == pytest.approx(psnr(pipe, plan, PROMPTS[4:], [4]), abs=0.05)
    assert plan.training["held_out"] == 1 and len(plan.training["prompts"]) == 4


def test_never_worse_than_the_published_schedule_with_taylor(pipe, plan):
    plan, _ = plan
    floor = refining.published(12, 5)[0]
    taylor = plan_of("taylor-1", floor, plan.sigmas, "output")
    measured = psnr(pipe, taylor, PROMPTS[:4], range(4))
    assert dict(map(tuple, plan.training["candidates"]))["published schedule, taylor-1"] == pytest.approx(
        measured, abs=0.05
    )
    best = max(score for _, score in plan.training["candidates"])
    assert plan.training["fitting_psnr"] == best >= measured


def test_plan_runs_and_guard_stays_quiet(pipe, plan):
    plan, _ = plan
    lesa.enable(pipe, plan)
    try:
        run_again = pipe("a", generator=torch.Generator().manual_seed(0), output_type="np", **REQUEST).images
        stats = lesa.stats(pipe)
    finally:
        lesa.disable(pipe)
    assert run_again.shape[-1] == 3 and stats.computed == 5 and stats.forecast == 7
    assert stats.guard.checks > 0 and stats.guard.switches == 0


def test_fit_while_enabled_is_one_error(pipe, plan):
    lesa.enable(pipe, plan[0])
    try:
        with warnings.catch_warnings(), pytest.raises(ValueError, match=r"lesa is enabled .* lesa\.disable\(pipe\)"):
            warnings.simplefilter("error", lesa.LesaWarning)
            lesa.fit(pipe, PROMPTS[:2], budget=4, request=REQUEST, effort="quick")
        assert lesa.stats(pipe).requests == 0
    finally:
        lesa.disable(pipe)


def test_folder_keeps_plan_and_statistics(pipe, plan, monkeypatch):
    plan, folder = plan
    assert lesa.Statistics.load(folder / "statistics.safetensors").requests == 4
    assert Plan.load(folder / "plan-5.safetensors").computed == plan.computed
    monkeypatch.setattr(session, "Refiner", None)  # nothing may be fitted again
    again = lesa.fit(pipe, PROMPTS, budget=[5], request=REQUEST, folder=folder)
    assert again[5].computed == plan.computed


def test_folder_of_other_requests_is_refused_before_anything_runs(pipe, plan, monkeypatch):
    _, folder = plan
    before = (folder / "plan-5.safetensors").read_bytes()
    again = lesa.fit(pipe, PROMPTS, budget=5, request=REQUEST, folder=folder, effort="quick")  # the same requests
    assert again.num_steps == 12
    (folder / "plan-5.safetensors").write_bytes(before)
    monkeypatch.setattr(tuning, "Session", None)
    for prompts, options, what in (
        (PROMPTS, {"request": {**REQUEST, "num_inference_steps": 9}}, "request"),
        (["other", *PROMPTS[1:]], {}, "prompts"),
        (PROMPTS, {"seeds": [7, 1, 2, 3, 4]}, "seeds"),
    ):
        with pytest.raises(ValueError, match=rf"folder='.*' holds plan-5.safetensors, .* \(another {what}\): name"):
            lesa.fit(pipe, prompts, budget=5, folder=folder, **{"request": REQUEST, **options})
    assert (folder / "plan-5.safetensors").read_bytes() == before


def test_folder_of_other_functions_is_refused(pipe, tmp_path):
    def fit(steps):
        run = lambda: pipe("a", **{**REQUEST, "num_inference_steps": steps})  # noqa: E731
        return lesa.fit(pipe.transformer, requests=[run], budget=3, effort="quick", folder=tmp_path)

    fit(6)
    before = (tmp_path / "plan-3.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds plan-3.safetensors of other requests \(.*6 steps, they have 8\)"):
        fit(8)
    assert (tmp_path / "plan-3.safetensors").read_bytes() == before


def test_folder_that_cannot_be_made(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "Session", None)
    (tmp_path / "file").write_text("")
    for folder, message in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "x", "cannot be made")):
        with pytest.raises(ValueError, match=f"folder '.*' {message}.*: give"):
            lesa.fit(pipe, PROMPTS, budget=5, request=REQUEST, folder=folder)
    with pytest.raises(TypeError):  # as far as the session
        lesa.fit(pipe, PROMPTS, budget=5, request=REQUEST, folder=tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("goal", [{"budget": 13}, {"speedup": 12.5}])
def test_a_goal_beyond_the_steps_is_refused_after_one_request(pipe, goal):
    ran = []

    def run():
        ran.append(None)
        pipe("a", **REQUEST)

    with pytest.raises(ValueError, match=r"budget=13: expected 1 to 12|speedup=12\.5: a request has 12 steps"):
        lesa.fit(pipe.transformer, requests=[run] * 5, **goal)
    assert len(ran) == 1


@pytest.mark.parametrize(("count", "effort", "few"), [(3, "default", True), (4, "default", False), (4, "quick", True)])
def test_where_there_will_be_no_guard_it_is_said(pipe, count, effort, few, recwarn):
    """Quick fits learn what to expect without the request that is held out."""
    plan = lesa.fit(pipe, PROMPTS[:count], budget=4, request=REQUEST, effort=effort)
    said = [str(w.message) for w in recwarn if issubclass(w.category, lesa.LesaWarning)]
    assert bool(any(plan.expected.values())) != few
    others = " besides 1 held out" if effort == "quick" else ";"
    assert [f"here are 3{others}" in message and "no guard" in message for message in said] == [True] * few


@pytest.mark.parametrize(("fitted", "held"), [(12, 6), (6, 12)])
def test_held_out_requests_are_of_the_same_kind(pipe, fitted, held):
    runs = [lambda steps=steps: pipe("a", **{**REQUEST, "num_inference_steps": steps}) for steps in (fitted, held)]
    with pytest.raises(statistics.StatisticsError, match=f"not of one kind .* {held} steps .* not {fitted}"):
        lesa.fit(pipe.transformer, requests=runs, budget=3, effort="quick")


def test_same_seed_same_plan(pipe):
    first, second = (lesa.fit(pipe, PROMPTS, budget=4, request=REQUEST, effort="quick", seed=3) for _ in range(2))
    assert first.computed == second.computed and first.rows == second.rows
    assert first.training["evaluations"] == 0 and first.training["fitting_psnr"] is None
    error_gains = surrogate_of(first).error_gains  # those of the request that was probed, for all
    assert (
        np.array_equal(error_gains, surrogate_of(second).error_gains)
        and error_gains.std(1).min() > 0
        and error_gains.std(2).max() == 0
    )
    # As the full requests have it; the first check says nothing.
    assert first.expected["*"].keys() == set(first.computed[2:]) and first.checks["*"].keys() == set(first.computed[1:])


def test_guidance_has_rows_for_each_context(pipe):
    request = {**REQUEST, "true_cfg_scale": 2.0, "negative_prompt": ""}
    plan = lesa.fit(pipe, PROMPTS, budget=5, request=request, effort="quick")
    assert set(plan.rows) == {"*", "cond", "uncond"} and plan.rows["*"] == plan.rows["cond"]
    assert plan.rows["cond"] != plan.rows["uncond"]


def test_bare_denoiser_in_a_loop(pipe):
    denoiser, sigmas = pipe.transformer, torch.linspace(1, 0, 9)
    config = denoiser.config

    def loop(seed):
        def request():
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(1, 16, config.in_channels, generator=generator)
            text = torch.randn(1, 4, config.joint_attention_dim, generator=generator)
            pooled = torch.randn(1, config.pooled_projection_dim, generator=generator)
            more = {"txt_ids": torch.zeros(4, 3), "img_ids": torch.zeros(16, 3), "return_dict": False}
            if config.guidance_embeds:
                more["guidance"] = torch.ones(1)
            with torch.no_grad():
                for i in range(8):
                    v = denoiser(
                        hidden_states=x,
                        timestep=sigmas[i : i + 1],
                        encoder_hidden_states=text,
                        pooled_projections=pooled,
                        **more,
                    )[0]
                    x = x + (sigmas[i + 1] - sigmas[i]) * v
            return x

        return request

    plan = lesa.fit(denoiser, requests=[loop(0), loop(1)], budget=4, effort="default", held_out=0)
    assert plan.budget == 4 and plan.num_steps == 8 and plan.training["held_out_psnr"] is None
    full = loop(0)()
    lesa.enable(denoiser, plan)
    try:
        fast = loop(0)()
        assert lesa.stats(denoiser).forecast == 4
    finally:
        lesa.disable(denoiser)
    assert torch.equal(loop(0)(), full)
    assert 0 < (fast - full).abs().mean() < 0.2 * full.abs().mean()


def test_smallest_budget_for_a_wished_psnr(pipe):
    request = {**REQUEST, "num_inference_steps": 6}
    all_plans = lesa.fit(pipe, PROMPTS[:1], budget=[1, 2, 3], request=request)
    reached = {budget: plan.training["fitting_psnr"] for budget, plan in all_plans.items()}
    plan = lesa.fit(pipe, PROMPTS[:1], target_psnr=reached[2] - 0.1, request=request)
    assert plan.budget == min(budget for budget, psnr in reached.items() if psnr >= reached[2] - 0.1)
    with pytest.raises(ValueError, match=r"target_psnr=200"):
        lesa.fit(pipe, PROMPTS[:1], target_psnr=200.0, request=request)


def test_speedup_is_a_budget(pipe):
    assert lesa.fit(pipe, PROMPTS[:1], speedup=4.0, request=REQUEST, effort="quick").budget == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of budget, target_psnr and speedup$"),
        ({"target_psnr": 30.0, "candidates": ["reuse", "plan"]}, "candidates with target_psnr: .* give a budget"),
        ({"budget": 4, "speedup": 2.0}, r"give one of .*, not budget=4 and speedup=2\.0$"),
        ({"budget": 0}, "budget=0: expected 1 or more"),
        ({"budget": 0.5}, r"budget=0\.5: expected 1 or more"),
        ({"budget": 4, "seed": "x"}, "seed='x': expected a whole number of at least 0"),
        ({"budget": 4, "seed": -1}, "seed=-1: expected a whole number of at least 0"),
        ({"budget": 4, "folder": 5}, "folder=5: expected a path"),
        ({"budget": "6"}, "budget='6': expected 1 or more"),
        ({"budget": [4, 2.5]}, r"budget=\[4, 2.5\]: expected 1 or more"),
        ({"budget": []}, r"budget=\[\]: expected"),
        ({"budget": 4, "request": {"prompt": "a"}}, "request holds prompt='a': give prompts="),
        ({"budget": 13}, r"budget=13: expected 1 to 12"),
        ({"budget": 4, "effort": "lazy"}, r"effort='lazy': expected one of"),
        ({"budget": True}, "budget=True: expected 1 or more"),
        ({"speedup": 0.5}, r"speedup=0\.5: expected a number above 1"),
        ({"speedup": 1}, "speedup=1: expected a number above 1"),
        ({"speedup": math.inf}, "speedup=inf: expected a number above 1"),
        ({"speedup": "5"}, "speedup='5': expected a number above 1"),
        ({"target_psnr": math.nan}, "target_psnr=nan: expected a number of dB above 0"),
        ({"target_psnr": "40"}, "target_psnr='40': expected a number of dB above 0"),
        ({"target_psnr": -3}, "target_psnr=-3: expected a number of dB above 0"),
        ({"budget": 4, "request": ["x"]}, r"request=\['x'\]: expected keyword arguments"),
        ({"budget": 4, "held_out": "x"}, "held_out='x' of 5 requests"),
        ({"budget": 4, "held_out": 5}, r"held_out=5 of 5 requests"),
    ],
)
def test_bad_arguments(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        lesa.fit(pipe, PROMPTS, **{"request": REQUEST, **options})


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (print, "requests is not a list: give functions"),
        (["red apple"], r"requests\[0\] is a str: expected a function"),
        ([], "requests is empty"),
        ([lambda: None], "request 0 did not call the denoiser: each must run one request"),
    ],
)
def test_bad_requests(pipe, requests, message):
    with pytest.raises(ValueError, match=message):
        lesa.fit(pipe.transformer, requests=requests, budget=2, held_out=0)


@pytest.mark.parametrize("bare", [False, True])
def test_noise_levels_that_are_not_finite(pipe, bare):
    levels = [1.0, 0.8, math.nan, 0.4]
    request = {**{name: REQUEST[name] for name in ("height", "width", "max_sequence_length")}, "sigmas": levels}
    request["num_inference_steps"] = len(levels)
    with pytest.raises(statistics.StatisticsError, match=r"0.* ran step 2 at sigma nan: give finite"):
        if bare:
            lesa.fit(pipe.transformer, requests=[lambda: pipe("a", **request)] * 2, budget=2, effort="quick")
        else:
            lesa.fit(pipe, PROMPTS[:2], budget=2, effort="quick", request=request)


def test_a_generator_is_no_list_of_prompts(pipe):
    with pytest.raises(ValueError, match=r"prompts is a generator: give a list, e.g. list\(prompts\)"):
        lesa.fit(pipe, (prompt for prompt in PROMPTS), budget=2, request=REQUEST)


def test_one_string_is_no_list_of_prompts(pipe):
    with pytest.raises(ValueError, match="prompts='red apple' is one string"):
        lesa.fit(pipe, "red apple", budget=2, request=REQUEST)


def test_spaced_and_published_schedules():
    assert refining.spaced(50, 5, 1.0) == (0, 10, 20, 30, 40)
    assert refining.spaced(6, 6, 2.0) == (0, 1, 2, 3, 4, 5)
    assert refining.published(50, 10)[0] == (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)
    assert refining.published(50, 31) == [refining.spaced(50, 31, 1.0)]
    for budget in range(1, 51):
        for power in (1.0, 1.5):
            steps = refining.spaced(50, budget, power)
            assert len(set(steps)) == budget and steps[0] == 0 and list(steps) == sorted(steps) and steps[-1] < 50


def test_final_of_what_loops_return():
    assert final_of(torch.zeros(2, 3), 2).shape == (2, 3)
    assert final_of((np.zeros((1, 4, 4, 3)),), 1).shape == (1, 4, 4, 3)
    assert final_of(None, 1) is None and final_of("done", 1) is None
    assert final_of(torch.zeros(3, 3), 2) is None
