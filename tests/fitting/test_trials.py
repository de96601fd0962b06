"""Trials: what is measured of a plan, at either site, against the samples and outputs of the requests themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import flux_dev
from torch import Tensor

from lesa.fitting.trials import Trials, decibels, final_of, run_in_full
from lesa.forecasters import plan_of
from lesa.models.pipeline import calls_of, run
from lesa.planner.statistics import flow_impulse_response
from lesa.plans.plan import Plan
from lesa.runtime.runner import PlanRunner

REQUEST = {"num_inference_steps": 8, "height": 32, "width": 32, "max_sequence_length": 8}
GUIDED = {**REQUEST, "true_cfg_scale": 2.0, "negative_prompt": ""}
PROMPTS = ["a red apple", "snow"]
COMPUTED = (0, 2, 4, 6)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flux_dev()


def trials_of(pipe: Any, prompts: list[str], request: dict[str, Any]) -> Trials:
    return run_in_full(pipe, calls_of(pipe, prompts, None, request, None, 1, output_type="np"), request)


def seen(pipe: Any, request: dict[str, Any], seed: int, plan: Plan | None, contexts: int) -> tuple[Tensor, Tensor, Any]:
    """The samples [T + 1, L] and the outputs [C, T, L] of one request, and its picture."""
    samples, outputs = [], []

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        samples.append(kwargs["hidden_states"].double().flatten())
        outputs.append(output[0].double().flatten())

    driver = None if plan is None else PlanRunner(plan)
    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        site = "output" if plan is None else plan.site
        picture = run(pipe, [PROMPTS[seed]], [seed], request, driver, site, output_type="np")[0][0]
        final = run(pipe, [PROMPTS[seed]], [seed], request, driver, site)[0].double().flatten()
    finally:
        handle.remove()
    half = len(samples) // 2  # both runs were seen
    return (
        torch.stack([*samples[:half:contexts], final]),
        torch.stack(outputs[:half]).unflatten(0, (-1, contexts)).transpose(0, 1),
        picture,
    )


@pytest.mark.parametrize(("site", "request_"), [("output", REQUEST), ("hidden", GUIDED)])
def test_measured_is_what_the_requests_do(pipe: Any, site: str, request_: dict[str, Any]) -> None:
    trials = trials_of(pipe, PROMPTS, request_)
    C = len(trials.statistics.contexts)
    assert trials.statistics.contexts == (("cond",) if request_ is REQUEST else ("cond", "uncond"))
    plan = plan_of("taylor-1", COMPUTED, trials.statistics.sigmas, site)
    measured = trials.run(plan)
    assert not measured.refused and measured.error_gains.shape == (C, 4, 2)
    for p in range(2):
        full, truth, picture = seen(pipe, request_, p, None, C)
        fast, answers, other = seen(pipe, request_, p, plan, C)
        off = [fast[step] - full[step] for step in (*COMPUTED, -1)]
        errors = torch.stack(off[1:]).square().mean(1).numpy()
        np.testing.assert_allclose(measured.outcome.error[:, p], errors, rtol=1e-3)
        own = answers[:, COMPUTED]
        basis = own.flatten(0, 1)
        np.testing.assert_allclose(measured.outcome.basis[p], basis @ basis.T / basis.shape[1], rtol=1e-4, atol=1e-6)
        along = torch.stack(off[1:]) @ basis.T / basis.shape[1]
        np.testing.assert_allclose(measured.outcome.along[:, p], along, rtol=1e-2, atol=1e-5)
        for c in range(C):
            for k in range(1, 4):
                answer = (own[c, k] - truth[c, COMPUTED[k]]) @ off[k] / off[k].square().sum()
                assert measured.error_gains[c, k, p] == pytest.approx(float(answer), rel=1e-2, abs=1e-3)
        squared = np.square(np.float64(picture) - other).mean()
        assert measured.psnr[p] == pytest.approx(-10 * np.log10(squared), abs=1e-3)


def test_only_the_first_calls_are_run_where_asked(pipe: Any) -> None:
    trials = trials_of(pipe, PROMPTS, REQUEST)
    plan = plan_of("taylor-1", COMPUTED, trials.statistics.sigmas, "output")
    first, whole = trials.run(plan, slice(1)), trials.run(plan)
    assert first.psnr.shape == (1,) and first.psnr[0] == pytest.approx(whole.psnr[0])
    assert trials.count == 2 and trials.labels[1] == "prompt 1 ('snow')"


def test_what_is_assumed_of_a_denoiser_is_that_errors_heal_or_last(pipe: Any) -> None:
    """Along a flow an error heals at 1 / sigma, and lasts at about -1 / alpha: exact for a variance of 16."""
    trials = trials_of(pipe, PROMPTS, REQUEST)
    assert trials.prediction == "flow_prediction"
    sigma = np.array(trials.statistics.sigmas[:-1])
    alpha = 1 - sigma
    lasting = (sigma - 16 * alpha) / (16 * alpha**2 + sigma**2)
    expected = np.stack([np.minimum(1 / sigma, 2.0)] * 2 + [lasting] * 2, 1)
    np.testing.assert_allclose(trials.assumed_gains, expected[None], rtol=1e-5)
    model = trials.surrogate(trials.assumed_gains)
    np.testing.assert_array_equal(model.grams, np.concatenate([trials.grams] * 2))


def test_a_loop_with_levels_above_one_predicts_the_noise(pipe: Any) -> None:
    trials = trials_of(pipe, ["snow"], REQUEST)
    sigmas = np.array([8.0, 4, 3, 2, 1, 0.5, 0.2, 0.1, 0])
    known = replace(trials.statistics, sigmas=tuple(sigmas), impulse_response=flow_impulse_response(sigmas))
    other = replace(trials, statistics=known)
    s = sigmas[:-1]
    np.testing.assert_allclose(other.assumed_gains[0, :, 1], s / (16 + s**2), rtol=1e-5)


def test_ssim_is_taken_of_pictures_only(pipe: Any) -> None:
    trials = trials_of(pipe, ["snow"], REQUEST)
    measured = trials.run(plan_of("reuse", COMPUTED, trials.statistics.sigmas, "output"))
    assert trials.compares_pictures and measured.ssim is None
    trials.judge(measured)
    assert measured.ssim is not None and 0 < measured.ssim[0] < 1
    final = trials.references[0].final
    assert final is not None
    trials.references[0].final = final[:, :5]  # too small
    assert not trials.compares_pictures


def test_the_number_of_steps_is_checked_after_one_call(pipe: Any) -> None:
    told: list[int] = []
    calls = calls_of(pipe, PROMPTS, None, REQUEST, None, 1)
    run_in_full(pipe, calls, REQUEST, check=told.append)
    assert told == [8]


def test_decibels() -> None:
    black = np.zeros((2, 4, 4, 3))
    np.testing.assert_allclose(decibels(black + 0.1, black), [20.0, 20.0])
    np.testing.assert_allclose(decibels(black, black), [100.0, 100.0])
    samples = np.array([[-3.0, 1.0]])  # not in [0, 1]: over their range
    np.testing.assert_allclose(decibels(samples + 0.4, samples), [20.0])


def test_final_of_what_loops_return() -> None:
    assert final_of(torch.zeros(2, 3), 2).shape == (2, 3)
    assert final_of((np.zeros((1, 4, 4, 3)),), 1).shape == (1, 4, 4, 3)
    assert final_of(None, 1) is None and final_of("done", 1) is None
    assert final_of(torch.zeros(3, 3), 2) is None


def test_pictures_of_bytes_are_judged_as_pictures() -> None:
    levels = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(8, 8, 3)
    pictures = [Image.fromarray(levels), Image.fromarray(levels[::-1].copy())]
    np.testing.assert_array_equal(final_of(pictures, 2), np.stack([levels, levels[::-1]]) / np.float32(255))
    for alone in (pictures[0], pictures[:1], levels, torch.from_numpy(levels)):
        np.testing.assert_array_equal(final_of(alone, 1), levels[None] / np.float32(255))


def test_requests_that_draw_new_noise_each_time_are_refused(pipe: Any) -> None:
    def own() -> Any:
        return pipe("snow", output_type="np", **REQUEST).images

    calls = calls_of(pipe, None, [own], {}, None, 1)
    trials = run_in_full(pipe, calls, {})
    with pytest.raises(ValueError, match="request 0 starts from another sample"):
        trials.run(plan_of("reuse", COMPUTED, trials.statistics.sigmas, "output"))
