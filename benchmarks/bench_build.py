"""Times adapting: how long the first request of a kind waits for its plan.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_build.py [-k "unipc and 100"] [--results benchmarks/results/build.csv]

A round is the start of a request that a fitted plan of 10 computed steps, of 50 Euler steps of emoji-flux, was not made
for: probing its scheduler, the schedule, the rows, and what the guard expects. Drivers and schedulers are new each
round, so nothing is found in a cache; imports are not timed. The plan made has to hold what was asked for. With
guidance it is of two contexts, fitted here by effort quick. `steps` counts denoiser calls, of which Heun makes one
fewer than its row is named for.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

import lesa
from lesa import assets
from lesa.runtime.clock import Request, sigmas_of
from lesa.runtime.runner import Adaptive

from . import captions
from .fitted_solvers import calls, levels, solvers
from .measuring import append_row, hardware, head_commit

BUDGET = 10
_LABELS = "hardware commit date threads guidance scheduler steps computed"
COLUMNS = [*_LABELS.split(), "p20_ms", "p50_ms", "p80_ms"]
ROUNDS = 12


class Build(NamedTuple):
    """A request that a plan is made for."""

    guidance: int
    scheduler: str
    steps: int

    def __str__(self) -> str:
        return f"cfg{self.guidance}-{self.scheduler}-{self.steps}"


BUILDS = [
    Build(guidance, scheduler, steps)
    for guidance, scheduler, steps in itertools.product((1, 3), solvers(), (20, 28, 50, 100))
    if (scheduler, steps) != ("euler", 50)  # its own
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a row."""
    chosen = [Build(1, "euler", 20)] if metafunc.config.getoption("--quick") else BUILDS
    metafunc.parametrize("build", [pytest.param(build, id=str(build)) for build in chosen])


@functools.cache
def plan_of(guidance: int) -> lesa.Plan:
    """The plan that is brought to other requests."""
    if guidance == 1:
        return lesa.Plan.load(assets.fitted_path(BUDGET))
    prompts = assets.fitting_prompts()[:8]
    return lesa.fit(assets.load(), prompts, budget=BUDGET, request=captions.request(guidance), effort="quick", batch=8)


def start(build: Build) -> tuple[tuple[Adaptive, Request], dict[str, Any]]:
    """A driver that has made no plan yet, and the request."""
    scheduler = solvers()[build.scheduler] or FlowMatchEulerDiscreteScheduler()
    # Heun's noise levels are met twice but for the ends, so about half as many are given.
    given = (build.steps + 1) // 2 if build.scheduler == "heun" else build.steps
    scheduler.set_timesteps(given, sigmas=levels(given).tolist())
    total = calls(build.scheduler, given)
    return (Adaptive(plan_of(build.guidance)), Request(total, sigmas_of(scheduler), scheduler)), {}


def test_build(build: Build, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """Check a plan, time its making, keep the row."""
    (driver, asked), _ = start(build)
    driver.begin(asked)
    assert (driver.plan.num_steps, driver.plan.budget) == (asked.num_steps, BUDGET)
    assert np.allclose(driver.plan.sigmas, asked.sigmas)
    results, quick, commit = (request.config.getoption(f"--{name}") for name in ("results", "quick", "commit"))
    rounds = 2 if quick else ROUNDS
    benchmark.pedantic(Adaptive.begin, setup=functools.partial(start, build), rounds=rounds, warmup_rounds=1)
    if benchmark.enabled and results is not None:
        times = [f"{1e3 * p:.1f}" for p in np.percentile(benchmark.stats.stats.data, [20, 50, 80])]
        threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
        head = [hardware("cpu"), commit or head_commit(), datetime.date.today().isoformat(), threads]
        append_row(results, COLUMNS, [*head, build.guidance, build.scheduler, asked.num_steps, BUDGET, *times])
