"""Every pipeline class: right under all-computed plans, reuse and Taylor, against an oracle that skips no block.

The tiny pipelines of `zoo` run always. Those of diffusers' own tests run with `pytest -m every`, from the checkout of
diffusers that the environment variable DIFFUSERS names.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo_images
import zoo_unets
import zoo_videos
from diffusers import FlowMatchEulerDiscreteScheduler
from oracle import Run, Subject, apart, faults, plan_for
from torch import Tensor, nn

from lesa.plans.plan import Plan

CHECKOUT = os.environ.get("DIFFUSERS")
SUBJECTS = [*zoo_images.SUBJECTS, *zoo_videos.SUBJECTS, *zoo_unets.SUBJECTS]


def dummies_of(checkout: str | None) -> list[Subject]:
    """The subjects of diffusers' own tests."""
    if checkout is None:
        return []
    import dummies  # it needs the checkout

    return list(dummies.subjects(checkout).values())


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_pipeline(subject: Subject) -> None:
    assert faults(subject) == []


@pytest.mark.every
@pytest.mark.parametrize("subject", dummies_of(CHECKOUT), ids=lambda subject: subject.name)
def test_dummy_of_diffusers(subject: Subject) -> None:
    try:
        found = faults(subject)
    except Exception as error:  # lesa's own are among the faults: this dummy needs a package, a download or more steps
        pytest.skip(f"cannot be tried here: {type(error).__name__}: {error}")
    assert found == []


# The oracle itself


class Moving(nn.Module):
    """A denoiser that returns its sample, moved by one."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (hidden_states + 1,)


class Loop:
    """The smallest pipeline."""

    def __init__(self) -> None:
        self.transformer, self.scheduler = Moving(), FlowMatchEulerDiscreteScheduler()
        self.components = vars(self).copy()

    def __call__(self, sample: Tensor, branches: int = 1) -> SimpleNamespace:
        self.scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25])
        for timestep in self.scheduler.timesteps:
            for _ in range(branches):
                output = self.transformer(sample, timestep)[0]
            sample = self.scheduler.step(output, timestep, sample, return_dict=False)[0]
        return SimpleNamespace(images=sample)


def run_of(request: dict[str, Any], plan: Plan | None = None) -> Run:
    return Subject("loop", Loop, lambda: request).run(Loop(), plan)


def test_oracle_overwrites_forecast_steps() -> None:
    ones = {"sample": torch.ones(1, 2, 2)}
    untouched = run_of(ones)
    # 1 - 0.5 (1 + 1) = 0, 0 - 0.25 (0 + 1) = -0.25, -0.25 - 0.25 (-0.25 + 1) = -0.4375
    assert [float(sample.max()) for sample in untouched.samples] == [0.0, -0.25, -0.4375]
    plan = plan_for(untouched, "reuse", "output")
    assert (plan.computed, plan.sigmas) == ((0, 1), (1.0, 0.5, 0.25, 0.0))
    run = run_of(ones, plan)
    # The last output is that of step 1, which was 1: -0.25 - 0.25
    assert [float(sample.max()) for sample in run.samples] == [0.0, -0.25, -0.5]
    assert apart(run, untouched) > 0.0


def test_oracle_places_calls_by_the_steps_of_the_scheduler() -> None:
    run = run_of({"sample": torch.ones(1, 2, 2), "branches": 2})
    assert run.calls == [(0, step, f"default#{branch}") for step in range(3) for branch in (1, 2)]
    assert run.lengths() == [3]
