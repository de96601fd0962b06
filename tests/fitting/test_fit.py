"""`lesa.fit` on a tiny pipeline and a bare denoiser: what it says is what runs, and never worse than the floor."""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import flux_dev

import lesa
from lesa import metrics
from lesa.fitting import arguments
from lesa.fitting import fit as fitting
from lesa.fitting.arguments import Given, budgets_of, check_budget, misfit, read_candidates
from lesa.fitting.fit import EFFORTS
from lesa.forecasters import plan_of
from lesa.models.pipeline import run
from lesa.planner.build import surrogate_of
from lesa.planner.statistics import Statistics, StatisticsError, flow_impulse_response
from lesa.plans import schedule
from lesa.plans.plan import Plan
from lesa.plans.rows import PlanError, Row
from lesa.runtime.runner import PlanRunner

REQUEST = {"num_inference_steps": 8, "height": 32, "width": 32, "max_sequence_length": 8}
GUIDED = {**REQUEST, "true_cfg_scale": 2.0, "negative_prompt": ""}
PROMPTS = ["a", "b", "c", "d", "e"]
SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flux_dev()


@pytest.fixture(scope="module")
def fitted(pipe: Any, tmp_path_factory: Any) -> tuple[Plan, Path]:
    folder = tmp_path_factory.mktemp("fit")
    return lesa.fit(pipe, PROMPTS, budget=4, request=REQUEST, folder=folder), folder


@pytest.fixture
def short(monkeypatch: Any) -> None:
    """No more runs than are promised."""
    monkeypatch.setitem(EFFORTS, "default", replace(EFFORTS["default"], generations=3, run_share=0.65))


def fit(pipe: Any, given: Any = (), **more: Any) -> Plan:
    return lesa.fit(pipe, PROMPTS[:2], **{"budget": 4, "request": REQUEST, "held_out": 0, "candidates": given, **more})


def scores(plan: Plan) -> dict[str, float]:
    """By name, the best of each."""
    return dict(sorted(map(tuple, plan.training["candidates"]), key=lambda pair: pair[1]))


def psnr(pipe: Any, plan: Plan, prompts: list[str], seeds: Any) -> float:
    images = [
        run(pipe, [p], [s], REQUEST, driver, "output", output_type="np", return_dict=False)[0]
        for p, s in zip(prompts, seeds, strict=True)
        for driver in (PlanRunner(plan), None)
    ]
    return float(np.mean([metrics.psnr(a, b)[0] for a, b in zip(images[::2], images[1::2], strict=True)]))


def test_plan_says_what_it_measured(pipe: Any, fitted: tuple[Plan, Path]) -> None:
    plan, _ = fitted
    assert plan.budget == 4 and plan.num_steps == 8 and plan.site == "output"
    assert plan.training["fitting_psnr"] == pytest.approx(psnr(pipe, plan, PROMPTS[:4], range(4)), abs=0.05)
    assert plan.training["held_out_psnr"] == pytest.approx(psnr(pipe, plan, PROMPTS[4:], [4]), abs=0.05)
    assert plan.training["held_out"] == 1 and len(plan.training["prompts"]) == 4
    assert 0 < plan.training["fitting_ssim"] < 1 and 0 < plan.training["held_out_ssim"] < 1


def test_never_worse_than_the_published_schedule_with_taylor(pipe: Any, fitted: tuple[Plan, Path]) -> None:
    plan, _ = fitted
    taylor = plan_of("taylor-1", schedule.published(8, 4)[0], plan.sigmas, "output")
    measured = psnr(pipe, taylor, PROMPTS[:4], range(4))
    assert scores(plan)["published schedule, taylor-1"] == pytest.approx(measured, abs=0.05)
    assert plan.training["fitting_psnr"] == max(scores(plan).values()) >= measured


def test_plan_runs(pipe: Any, fitted: tuple[Plan, Path]) -> None:
    lesa.enable(pipe, fitted[0])
    try:
        again = pipe("a", generator=torch.Generator().manual_seed(0), output_type="np", **REQUEST).images
        stats = lesa.stats(pipe)
    finally:
        lesa.disable(pipe)
    assert again.shape[-1] == 3 and stats.computed == 4 and stats.forecast == 4


def test_fit_while_enabled_is_one_error(pipe: Any, fitted: tuple[Plan, Path]) -> None:
    lesa.enable(pipe, fitted[0])
    try:
        with warnings.catch_warnings(), pytest.raises(ValueError, match=r"lesa\.disable"):
            warnings.simplefilter("error", lesa.LesaWarning)
            lesa.fit(pipe, PROMPTS[:2], budget=4, request=REQUEST, effort="quick")
        assert lesa.stats(pipe).requests == 0
    finally:
        lesa.disable(pipe)


# The folder


def test_folder_keeps_plan_and_statistics(pipe: Any, fitted: tuple[Plan, Path], monkeypatch: Any) -> None:
    plan, folder = fitted
    assert sorted(path.name for path in folder.iterdir()) == ["plan-4.safetensors", "statistics.safetensors"]
    assert lesa.Statistics.load(folder / "statistics.safetensors").requests == 4
    assert Plan.load(folder / "plan-4.safetensors").computed == plan.computed
    monkeypatch.setattr(fitting, "Refiner", None)  # nothing may be fitted again
    again = lesa.fit(pipe, PROMPTS, budget=[0.5], request=REQUEST, folder=folder)
    assert again.keys() == {4} and again[4].computed == plan.computed


def test_another_candidate_is_another_fit(pipe: Any, fitted: tuple[Plan, Path], short: None, tmp_path: Path) -> None:
    one, other = (plan_of(rule, (0, 2, 4, 6), fitted[0].sigmas, "output") for rule in ("reuse", "taylor-1"))
    path = tmp_path / "plan-4.safetensors"
    fit(pipe, [one], folder=tmp_path)
    kept = path.read_bytes()
    fit(pipe, [one], folder=tmp_path)
    assert path.read_bytes() == kept
    fit(pipe, [other], folder=tmp_path)
    assert path.read_bytes() != kept


def test_folder_of_other_requests_is_refused_before_anything_runs(pipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def fit(prompts: list[str] = PROMPTS[:2], **options: Any) -> Plan:
        given = {"budget": 4, "folder": tmp_path, "effort": "quick", "request": REQUEST, **options}
        return lesa.fit(pipe, prompts, **given)

    path = tmp_path / "plan-4.safetensors"
    fit()
    before = path.read_bytes()
    monkeypatch.setattr(fitting, "run_in_full", None)
    for what, prompts, options in (
        ("request", PROMPTS[:2], {"request": {**REQUEST, "num_inference_steps": 9}}),
        ("prompts", ["other", "b"], {}),
        ("seeds", PROMPTS[:2], {"seeds": [7, 1]}),
        ("seeds", PROMPTS[:2], {"seeds": [7, 1], "budget": [2, 0.9]}),  # a share may be any number
    ):
        with pytest.raises(ValueError, match=rf"folder='.*plan-4\.safetensors.*another {what}"):
            fit(prompts, **options)
    assert path.read_bytes() == before


def test_folder_of_other_functions_is_refused(pipe: Any, tmp_path: Path) -> None:
    def fit(steps: int) -> Plan:
        def one() -> Any:
            seeded = torch.Generator().manual_seed(0)
            return pipe("a", generator=seeded, **{**REQUEST, "num_inference_steps": steps})

        return lesa.fit(pipe.transformer, requests=[one], budget=3, effort="quick", folder=tmp_path)

    fit(6)
    before = (tmp_path / "plan-3.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"folder=.*plan-3.safetensors .* other requests \(.*6 steps, they have 8\)"):
        fit(8)
    assert (tmp_path / "plan-3.safetensors").read_bytes() == before


def test_folder_that_cannot_be_made(pipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fitting, "run_in_full", None)
    (tmp_path / "file").write_text("")
    for folder, message in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "x", "cannot be made")):
        with pytest.raises(ValueError, match=f"folder '.*' {message}"):
            lesa.fit(pipe, PROMPTS, budget=5, request=REQUEST, folder=folder)
    with pytest.raises(TypeError):  # as far as the first run
        lesa.fit(pipe, PROMPTS, budget=5, request=REQUEST, folder=tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


# Efforts and requests


@pytest.mark.parametrize(("count", "effort", "few"), [(3, "default", True), (4, "default", False), (4, "quick", True)])
def test_where_errors_will_not_be_expected_it_is_said(
    pipe: Any, short: None, count: int, effort: str, few: bool, recwarn: Any
) -> None:
    """Quick fits learn what to expect without the request that is held out."""
    plan = lesa.fit(pipe, PROMPTS[:count], budget=4, request=REQUEST, effort=effort)
    said = [str(w.message) for w in recwarn if issubclass(w.category, lesa.LesaWarning)]
    said = [message for message in said if "expected errors" in message]  # so short a fit may lose to a plain rule, too
    assert bool(any(plan.expected.values())) != few
    others = " besides 1 held out" if effort == "quick" else ";"
    assert [f"here are 3{others}" in message for message in said] == [True] * few


@pytest.mark.parametrize(("fitted_steps", "held"), [(8, 6), (6, 8)])
def test_held_out_requests_are_of_the_same_kind(pipe: Any, fitted_steps: int, held: int) -> None:
    runs = [lambda n=n: pipe("a", **{**REQUEST, "num_inference_steps": n}) for n in (fitted_steps, held)]
    with pytest.raises(StatisticsError, match=f"not of one kind .* {held} steps .* not {fitted_steps}"):
        lesa.fit(pipe.transformer, requests=runs, budget=3, effort="quick")


def test_same_seed_same_plan(pipe: Any) -> None:
    first, second = (lesa.fit(pipe, PROMPTS, budget=4, request=REQUEST, effort="quick", seed=3) for _ in range(2))
    assert first.computed == second.computed and first.rows == second.rows
    assert first.training["evaluations"] == 0 and first.training["fitting_psnr"] is None
    gains = surrogate_of(first).error_gains  # those of the request that was probed, for all
    assert (
        np.array_equal(gains, surrogate_of(second).error_gains) and gains.std(1).min() > 0 and gains.std(2).max() == 0
    )
    # As the full requests have it; the first check says nothing.
    assert first.expected["*"].keys() == set(first.computed[2:]) and first.checks["*"].keys() == set(first.computed[1:])


def test_a_thorough_fit(pipe: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(EFFORTS, "thorough", replace(EFFORTS["thorough"], generations=8, run_share=0.75))
    plan = fit(pipe, budget=3, effort="thorough")
    assert len(plan.training["candidates"]) == plan.training["evaluations"] == int(6 * 0.75 / (2 * 3 / 8))
    assert plan.training["fitting_psnr"] == max(scores(plan).values())


def test_what_is_promised_is_run_however_many_prompts(pipe: Any, monkeypatch: Any) -> None:
    """Recording alone takes more than the effort here."""
    monkeypatch.setitem(EFFORTS, "default", replace(EFFORTS["default"], generations=1))
    names = [name for name, _ in fit(pipe, budget=3).training["candidates"]]
    assert names == ["published schedule, taylor-1", "searched"]


def test_guidance_has_rows_for_each_context(pipe: Any) -> None:
    plan = lesa.fit(pipe, PROMPTS[:2], budget=5, request=GUIDED, effort="quick")
    assert set(plan.rows) == {"*", "cond", "uncond"} and plan.rows["*"] == plan.rows["cond"]
    assert plan.rows["cond"] != plan.rows["uncond"]


def test_other_seeds_are_another_fit(pipe: Any) -> None:
    first, other = (fit(pipe, seeds=seeds, effort="quick") for seeds in ([5, 6], [5, 7]))
    assert first.rows != other.rows


def test_bare_denoiser_in_a_loop(pipe: Any, short: None) -> None:
    denoiser, sigmas = pipe.transformer, torch.linspace(1, 0, 9)
    config = denoiser.config

    def loop(seed: int) -> Any:
        def request() -> torch.Tensor:
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

    plan = lesa.fit(denoiser, requests=[loop(0), loop(1)], budget=0.5, effort="default", held_out=0)
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


# Candidates


def test_a_candidate_that_wins_is_returned_itself(
    pipe: Any, fitted: tuple[Plan, Path], short: None, tmp_path: Path
) -> None:
    mine = replace(fitted[0], forecaster="mine", expected={}, training={"note": 7, "seconds": -1.0})
    path = mine.save(tmp_path / "mine.safetensors")
    weak = plan_of("taylor-1", (0, 1, 2, 3), mine.sigmas, "hidden")
    best = fit(pipe, [weak, path])
    names = ["published schedule, taylor-1", "candidate 0 (taylor-1, hidden site)", "candidate 1 (mine.safetensors)"]
    assert [name for name, _ in best.training["candidates"]] == [*names, "searched"]
    assert best.training["schedule"] == names[2]
    assert (best.computed, best.rows, best.checks, best.forecaster) == (mine.computed, mine.rows, mine.checks, "mine")
    assert best.training["note"] == 7 and best.training["seconds"] > 0 and best.training["evaluations"] == 4
    assert best.training["fitting_psnr"] == max(scores(best).values())


@pytest.mark.parametrize(("effort", "everywhere"), [("quick", True), ("default", True), ("quick", False)])
def test_a_fit_that_loses_to_a_plain_rule_returns_it(
    pipe: Any, short: None, monkeypatch: Any, effort: str, everywhere: bool
) -> None:
    """Where the rule leads on the held-out requests alone, all of them decide."""
    measure, even = fitting.Trials.run, schedule.spaced(8, 3)
    reuse = plan_of("reuse", even, np.linspace(1, 0, 9), "output")

    def flattering(self: Any, plan: Plan, calls: slice = slice(None)) -> Any:
        measured = measure(self, plan, calls)
        flattered = plan.computed == even and plan.rows["*"][1].weights[0] == 1.0 == reuse.rows["*"][1].weights[0]
        flattered = flattered and all(row.weights[-1] == 1.0 for row in plan.rows["*"].values())
        more = 50.0 if everywhere or self.count == 1 else -50.0
        return replace(measured, psnr=measured.psnr + more) if flattered else measured

    monkeypatch.setattr(fitting.Trials, "run", flattering)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plan = lesa.fit(pipe, PROMPTS[:3], budget=3, request=REQUEST, effort=effort)
    lost = [str(one.message) for one in told if "the plan fitted for budget 3" in str(one.message)]
    is_rule = plan.computed == even and all(row.weights[-1] == 1.0 for row in plan.rows["*"].values())
    assert len(lost) == is_rule == everywhere
    assert plan.training["schedule"].startswith("reuse") == everywhere
    if everywhere:
        assert plan.training["held_out_psnr"] > 50 and plan.training["fitting_psnr"] > 50
        assert plan.surrogate is not None


@pytest.mark.parametrize("request_", [REQUEST, GUIDED])
def test_the_hidden_site_can_win(
    pipe: Any, fitted: tuple[Plan, Path], short: None, monkeypatch: Any, request_: dict[str, Any]
) -> None:
    hidden = plan_of("taylor-1", fitted[0].computed, fitted[0].sigmas, "hidden", denoiser="FluxTransformer2DModel")
    measure = fitting.Trials.run

    def flattering(self: Any, plan: Plan, calls: slice = slice(None)) -> Any:
        measured = measure(self, plan, calls)
        return replace(measured, psnr=measured.psnr + 50) if plan.site == "hidden" else measured

    monkeypatch.setattr(fitting.Trials, "run", flattering)
    best = fit(pipe, [hidden], request=request_)
    assert (best.site, best.rows["*"], best.forecaster) == ("hidden", hidden.rows["*"], "taylor-1")
    assert best.surrogate is None
    lesa.enable(pipe, best)
    try:
        pipe("a", output_type="latent", **request_)
        assert lesa.stats(pipe).computed == 4 * (1 if request_ is REQUEST else 2)
    finally:
        lesa.disable(pipe)


def test_expected_errors_are_those_of_the_requests(pipe: Any, fitted: tuple[Plan, Path], short: None) -> None:
    """Mean and standard deviation of the logarithms of the errors that requests have one by one."""
    first, second, third, fourth = fitted[0].computed
    reads = ((second, first, 1.0), (third, second, 1.0), (fourth, first, -1.0))
    checks = {"*": {step: Row((read,), (weight,)) for step, read, weight in reads}}
    mine = replace(fitted[0], checks=checks, expected={}, surrogate=None)
    prompts = PROMPTS[:4]
    best = lesa.fit(pipe, prompts, budget=4, request=GUIDED, held_out=0, candidates=[mine])
    assert best.training["schedule"].startswith("candidate 0"), "or this tests nothing"
    found: dict[int, list[float]] = {third: [], fourth: []}  # of the first check nothing is expected
    for number, prompt in enumerate(prompts):
        with lesa.enable(pipe, best) as handle:
            generator = torch.Generator("cpu").manual_seed(number)
            pipe([prompt], generator=[generator], output_type="latent", **{**GUIDED, "negative_prompt": [""]})
            for check in handle.stats.checks:
                if check.context == "cond":
                    found[check.step].append(math.log(check.error))
    assert set(best.expected) == {"*", "cond", "uncond"} and best.expected["*"].keys() == found.keys()
    assert best.rows == dict.fromkeys(best.expected, mine.rows["*"])
    for step, logs in found.items():
        expected = best.expected["cond"][step]
        assert len(logs) == 4
        assert expected.error == pytest.approx(math.exp(statistics.mean(logs)), rel=1e-3)
        assert expected.std == pytest.approx(max(statistics.stdev(logs) * math.sqrt(5 / 4), 0.2), rel=1e-2)


def test_only_candidates_of_the_budget_are_run(pipe: Any, fitted: tuple[Plan, Path], short: None) -> None:
    given = [plan_of("reuse", range(n), fitted[0].sigmas, "output") for n in (3, 4)]
    plans = fit(pipe, given, budget=[3, 0.5])
    for i, budget in enumerate((3, 4)):
        assert [name for name in scores(plans[budget]) if "candidate" in name] == [
            f"candidate {i} (reuse, output site)"
        ]


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({}, {"budget": 3}, r"candidate 0 \(reuse, output site\) computes 4 steps, .* asked for \(3\)"),
        ({}, {"effort": "quick"}, "candidates with effort='quick'"),
        ({"config_hash": "x"}, {}, r"candidate 0 .* cannot be run: the plan was made for a Flux.* of another"),
        ({"denoiser": "Other"}, {}, r"candidate 0 .* cannot be run: the plan was made for Other"),
    ],
)
def test_a_wrong_candidate_is_found_before_anything_runs(
    pipe: Any, fitted: tuple[Plan, Path], change: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    mine = replace(plan_of("reuse", (0, 1, 2, 3), fitted[0].sigmas, "output"), **change)
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the denoiser was run"))
    try:
        with pytest.raises(ValueError, match=message):
            fit(pipe, [mine], **more)
    finally:
        handle.remove()


def test_candidates_of_other_requests(pipe: Any, fitted: tuple[Plan, Path]) -> None:
    other = plan_of("reuse", (0, 1, 2, 3), tuple(1 - t / 9 for t in range(9)) + (0.0,), "output")
    with pytest.raises(ValueError, match=r"candidate 0 .* it was made for 9 steps, they have 8"):
        fit(pipe, [other])
    with pytest.raises(ValueError, match=r"candidate 0 .* computes 4 steps, .* asked for \(8\)"):
        fit(pipe, [plan_of("reuse", (0, 1, 2, 3), fitted[0].sigmas)], budget=1.0)


def test_what_is_read(tmp_path: Path) -> None:
    one = plan_of("reuse", (0, 2), SIGMAS)
    path = one.save(tmp_path / "mine.safetensors")
    first, second = read_candidates([one, path], "default")
    assert (first.name, first.plan) == ("candidate 0 (reuse, hidden site)", one)
    assert (second.name, second.plan.rows) == ("candidate 1 (mine.safetensors)", one.rows)
    assert read_candidates([], "quick") == []
    for wrong in (one, str(path), path):
        with pytest.raises(ValueError, match=r"candidates is one \w+: give a list"):
            read_candidates(wrong, "default")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"candidates\[1\] is a int"):
        read_candidates([one, 3], "default")  # type: ignore[list-item]
    with pytest.raises(PlanError, match=r"missing\.safetensors"):
        read_candidates([tmp_path / "missing.safetensors"], "default")


def test_misfits() -> None:
    grams, response = {"output": np.eye(8)}, flow_impulse_response(SIGMAS)
    contexts = ("cond", "uncond")
    known = Statistics(SIGMAS, (4, 3, 2, 1), contexts, (2.0, -1.0), grams, response, 1, config_hash="abc")
    one = plan_of("reuse", (0, 2), SIGMAS)
    assert misfit(one, known) is None and misfit(replace(one, config_hash="abc"), known) is None
    assert misfit(plan_of("reuse", (0, 2), SIGMAS[1:]), known) == "it was made for 3 steps, they have 4"
    shifted = plan_of("reuse", (0, 2), (1.0, 0.8, 0.5, 0.25, 0.0))
    assert misfit(shifted, known) == "its sigmas differ from theirs by up to 0.05"
    assert misfit(replace(one, config_hash="x"), known) == "its denoiser has configuration x, theirs abc"
    partial = replace(one, rows={"cond": one.rows["*"]})
    with pytest.raises(ValueError, match="mine does not fit the requests: it has no rows for context 'uncond'"):
        arguments.check_requests([Given("mine", partial)], known)


# Arguments


def test_budgets_are_numbers_or_shares() -> None:
    assert budgets_of(check_budget(4), 50) == [4]
    assert budgets_of(check_budget([4, 0.2, 0.08, np.float32(0.5), np.int64(10), 1.0]), 50) == [4, 10, 25, 50]
    assert budgets_of(check_budget(0.001), 50) == [1], "one has to be computed"
    assert budgets_of(check_budget(1), 50) == [1] and budgets_of(check_budget(1.0), 50) == [50]


def test_a_budget_beyond_the_steps_is_refused_after_one_request(pipe: Any) -> None:
    ran = []

    def one() -> None:
        ran.append(None)
        pipe("a", **REQUEST)

    with pytest.raises(ValueError, match="budget=9: expected 1 to 8"):
        lesa.fit(pipe.transformer, requests=[one] * 5, budget=[2, 9])
    assert len(ran) == 1


def test_bad_budgets(pipe: Any) -> None:
    for budget in [0, -1, 0.0, 1.5, math.nan, "6", [4, 2.5], [], True, None]:
        with pytest.raises(ValueError, match="budget="):
            lesa.fit(pipe, PROMPTS, budget=budget, request=REQUEST)


def test_bad_arguments(pipe: Any) -> None:
    for options, message in [
        ({"seed": "x"}, "seed='x'"),
        ({"seed": -1}, "seed=-1"),
        ({"folder": 5}, "folder=5"),
        ({"effort": "lazy"}, "effort='lazy'"),
        ({"request": {"prompt": "a"}}, "request holds prompt='a'"),
        ({"request": ["x"]}, r"request=\['x'\]"),
        ({"held_out": "x"}, "held_out='x'"),
        ({"held_out": 5}, "held_out=5"),
        ({"seeds": [1]}, "1 seeds for 5 requests"),
        ({"requests": [print]}, "requests: both"),
    ]:
        with pytest.raises(ValueError, match=message):
            lesa.fit(pipe, PROMPTS, **{"request": REQUEST, "budget": 4, **options})


def test_bad_prompts(pipe: Any) -> None:
    for wrong, message in (("red apple", "prompts='red apple'"), ((p for p in PROMPTS), "prompts is a generator")):
        with pytest.raises(ValueError, match=message):
            lesa.fit(pipe, wrong, budget=2, request=REQUEST)


def test_bad_requests(pipe: Any) -> None:
    for requests, message in [
        (print, "requests is not a list"),
        (["red apple"], r"requests\[0\] is a str"),
        ([], "requests is empty"),
        ([lambda: None], "request 0 did not call the denoiser"),
    ]:
        with pytest.raises(ValueError, match=message):
            lesa.fit(pipe.transformer, requests=requests, budget=2, held_out=0)


@pytest.mark.parametrize("bare", [False, True])
def test_noise_levels_that_are_not_finite(pipe: Any, bare: bool) -> None:
    levels = [1.0, 0.8, math.nan, 0.4]
    request = {**{name: REQUEST[name] for name in ("height", "width", "max_sequence_length")}, "sigmas": levels}
    request["num_inference_steps"] = len(levels)
    with pytest.raises(StatisticsError, match=r"0.* ran step 2 at sigma nan"):
        if bare:
            lesa.fit(pipe.transformer, requests=[lambda: pipe("a", **request)] * 2, budget=2, effort="quick")
        else:
            lesa.fit(pipe, PROMPTS[:2], budget=2, effort="quick", request=request)
