"""Trials: what is measured of a plan, at either site, against the samples and outputs of the requests themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pipelines import flux_dev
from torch import Tensor

from lesa.fitting.tuning import Session
from lesa.forecasters import plan_of
from lesa.models.requests import run
from lesa.models.works import works_of
from lesa.plans.plan import Plan
from lesa.runtime.runner import PlanRunner

REQUEST = {"num_inference_steps": 8, "height": 32, "width": 32, "max_sequence_length": 8}
GUIDED = {**REQUEST, "true_cfg_scale": 2.0, "negative_prompt": ""}
PROMPTS = ["a red apple", "snow"]
COMPUTED = (0, 2, 4, 6)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flux_dev()


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


@pytest.mark.parametrize(("site", "request_"), [("hidden", REQUEST), ("output", REQUEST), ("hidden", GUIDED)])
def test_measured_is_what_the_requests_do(pipe: Any, site: str, request_: dict[str, Any]) -> None:
    works = works_of(pipe, PROMPTS, None, request_, None, 1, output_type="np")
    options: dict[str, Any] = {"sigmas": None, "guidance": None, "effort": "quick", "seed": 0, "folder": None}
    trials = Session(pipe, works, [], request_, **options).trials
    C = len(trials.statistics.contexts)
    assert len(trials.statistics.contexts) == (1 if request_ is REQUEST else 2)
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


def test_identity_is_of_what_was_asked_and_what_came(pipe: Any) -> None:
    def trials(prompts: list[str], seeds: list[int], request: dict[str, Any]) -> Any:
        works = works_of(pipe, prompts, None, request, seeds, 1, output_type="np")
        options: dict[str, Any] = {"sigmas": None, "guidance": None, "effort": "quick", "seed": 0, "folder": None}
        return Session(pipe, works, [], request, **options).trials

    short = {**REQUEST, "num_inference_steps": 4}
    first = trials(["snow"], [0], short).identity
    assert first == trials(["snow"], [0], short).identity
    others = [trials(["snow"], [1], short), trials(["a"], [0], short), trials(["snow"], [0], {**short, "height": 48})]
    assert len({first, *(other.identity for other in others)}) == 4


def test_ssim_is_taken_of_pictures_only(pipe: Any) -> None:
    works = works_of(pipe, ["snow"], None, REQUEST, None, 1, output_type="np")
    options: dict[str, Any] = {"sigmas": None, "guidance": None, "effort": "quick", "seed": 0, "folder": None}
    trials = Session(pipe, works, [], REQUEST, **options).trials
    measured = trials.run(plan_of("reuse", COMPUTED, trials.statistics.sigmas, "output"))
    assert trials.compares_pictures and measured.ssim is None
    trials.judge(measured)
    assert measured.ssim is not None and 0 < measured.ssim[0] < 1
    trials.references[0].final = trials.references[0].final[:, :5]  # too small
    assert not trials.compares_pictures
