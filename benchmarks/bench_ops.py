"""Time every operator against plain torch, the released code's formula, torch.compile and a copy of as many bytes.

    pytest benchmarks/bench_ops.py [-k "forecast and flux"] [--results benchmarks/results/ops.csv] [--quick]

It runs on the CUDA device if there is one, in bfloat16, else on the CPU. Each provider's result is checked against
float64 before it is timed. A round is one call on inputs that are in no cache. On the GPU it is timed by two CUDA
events, with its launches queued in advance; on the CPU by wall clock. `train_step` is the exception: wall clock of a
block of optimiser steps until the device is idle, because launches are most of its cost. Where a provider has
several ways to do it, the fastest is reported.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lesa import ops

from .cases import FUSED, SHAPES, FeatureCase, ForecastAt, Head
from .cases_errors import Errors
from .cases_kan import Copy, Kan, KanBackward
from .cases_predict import Predict, PredictLoss, PredictLossBackward
from .cases_train import TrainStep
from .measuring import (
    DEVICE,
    DeviceTimer,
    Expected,
    Results,
    Spec,
    assert_close,
    cache_of,
    expected,
    pilot,
    rotating,
    timer_of,
    wall_clock,
)

TIMER = timer_of(DEVICE)
FEATURE_CASES = {
    "forecast": FeatureCase,
    "forecast_at": ForecastAt,
    "forecast_head": Head,
    "forecast_errors": Errors,
    "predict": Predict,
    "predict_loss": PredictLoss,
    "predict_loss_fwd_bwd": PredictLossBackward,
}
KAN_CASES = {"kan": Kan, "kan_fwd_bwd": KanBackward}
PEERS = {
    "forecast": ("eager", "paper", "compile", "copy"),
    "forecast_at": ("copy",),
    "forecast_head": ("eager", "paper", "compile", "copy"),
    "forecast_errors": ("eager", "compile", "copy"),
    "predict": ("eager", "compile", "copy"),
    "predict_loss": ("eager", "compile", "copy"),
    "predict_loss_fwd_bwd": ("eager", "compile", "copy"),
}
WINDOWS = (2, 4, 8)
COMPILED = ("flux", "emoji")
MOST_ROUNDS, LEAST_ROUNDS, SECONDS = 40, 5, 2.0
# Optimiser steps in a block of train_step.
BLOCK = 20 if DEVICE == "cuda" else 2


def specs(quick: bool) -> Iterator[Spec]:
    """All rows of this device; rows on the same inputs are neighbours."""
    fused = "triton" if DEVICE == "cuda" else "cpp"
    shapes = ["tiny"] if quick else [name for name in SHAPES if name != "tiny"]
    if DEVICE == "cpu" and not quick:
        shapes = ["flux", "emoji"]
    dtypes = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.bfloat16]
    for op, shape, k, dtype in itertools.product(FEATURE_CASES, shapes, WINDOWS, dtypes):
        # On the CPU the denoiser's own head follows the forecast: there is no fused one.
        if op == "forecast_head" and DEVICE == "cpu" and not quick:
            continue
        for provider in (fused, *PEERS[op]):
            if provider == "compile" and not _compiles(op, shape, k):
                continue
            if op != "forecast_head" or provider != "cpp":
                yield Spec(op, shape, k, dtype, provider)
    for op, provider in itertools.product(KAN_CASES, (fused, "eager", "compile", "copy")):
        yield Spec(op, "tiny" if quick else "t50x3", None, torch.float32, provider)
    for provider in (fused, "eager"):
        yield Spec("train_step", "tiny" if quick else "flux", 8, torch.bfloat16, provider)


def _compiles(op: str, shape: str, k: int) -> bool:
    """Whether torch.compile gets a row; not always, because it takes long."""
    if k == max(WINDOWS):
        return shape in (*COMPILED, "tiny")
    return op == "forecast" and shape == "flux"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a row."""
    params = []
    for spec in specs(metafunc.config.getoption("--quick")):
        if (spec.op == "train_step") != (metafunc.function is test_train_step):
            continue
        timer = wall_clock if spec.op == "train_step" else TIMER
        group = str(spec).removesuffix(f"-{spec.provider}")
        params.append(pytest.param(spec, id=str(spec), marks=pytest.mark.benchmark(timer=timer, group=group)))
    metafunc.parametrize("spec", params)


@functools.lru_cache(maxsize=1)
def case_of(op: str, shape: str, k: int | None, dtype: torch.dtype, cache: int) -> tuple[Any, list[Expected]]:
    """The case of neighbouring rows, and the expected results on its first inputs."""
    torch.manual_seed(0)
    case: Any
    if k is None:
        case = KAN_CASES[op](DEVICE, cache)
    else:
        case = FEATURE_CASES[op](SHAPES[shape], k, dtype, DEVICE, cache)
    return case, case.expected()


def skip_unserved(provider: str, op: str) -> None:
    """Skip a fused provider that this machine lacks."""
    like = torch.empty(0, dtype=torch.float32, device=DEVICE)
    if provider in FUSED and ops.backend_of(op, like) != provider:
        pytest.skip(f"{provider}: {ops.describe()[provider]}")


def rounds_of(seconds: float, quick: bool) -> int:
    """As many rounds as the time allows, within bounds."""
    return 3 if quick else max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / max(seconds, 1e-6))))


def test_op(spec: Spec, benchmark: Any, results: Results, request: pytest.FixtureRequest) -> None:
    """Check, choose the fastest form, time it, keep the row."""
    skip_unserved(spec.provider, "kan" if spec.k is None else spec.op.removesuffix("_fwd_bwd"))
    quick = request.config.getoption("--quick")
    cache = 0 if quick else cache_of(DEVICE)
    case, wanted = case_of(*spec[:4], cache)
    size, inputs = case.bytes, case.inputs
    if spec.provider == "copy":
        copy = Copy(size, DEVICE, cache)
        inputs, calls = copy.inputs, {"copy_": rotating(copy.run, copy.inputs)}
        assert torch.equal(copy.run(inputs[0]), inputs[0][0])
    else:
        forms = case.forms(spec.provider)
        # lesa's rule is for one operator. Others need only compute the same function, and a KAN is three operators.
        slack = 1 if spec.provider in FUSED and spec.k is not None else case.slack
        for name, form in forms.items():
            assert_close(lambda form=form: case.judged(form(inputs[0])), wanted, name, slack)
        calls = {name: rotating(form, inputs) for name, form in forms.items()}
    times = {name: pilot(call, TIMER) for name, call in calls.items()}
    best = min(times, key=times.__getitem__)
    if isinstance(TIMER, DeviceTimer):
        TIMER.adapt(calls[best])
    rounds = rounds_of(times[best], quick)
    benchmark.pedantic(calls[best], rounds=rounds, warmup_rounds=2)
    benchmark.extra_info |= {"form": best, "us": {name: 1e6 * seconds for name, seconds in times.items()}}
    if isinstance(TIMER, DeviceTimer):
        benchmark.extra_info["exposed"] = TIMER.exposed
        if TIMER.exposed > rounds // 10:
            benchmark._warner(pytest.PytestWarning(f"{TIMER.exposed} rounds waited for launches"))
    if benchmark.enabled:
        results.add(spec, benchmark.stats.stats.data, size)


def test_train_step(spec: Spec, benchmark: Any, results: Results, request: pytest.FixtureRequest) -> None:
    """Check the losses of the first steps, then time blocks of steps."""
    skip_unserved(spec.provider, "predict_loss")
    torch.manual_seed(0)
    train = TrainStep(SHAPES[spec.shape], spec.dtype, DEVICE)
    wanted = expected([train.formula(3, torch.float64)], [train.formula(3, torch.float32)])
    # Millions of elements are summed in another order than torch's; one step moves the loss a thousand times as far.
    assert_close(lambda: [train.losses(spec.provider, 3)], wanted, spec.provider, slack=4)
    take = train.steps(spec.provider)
    quick = request.config.getoption("--quick")
    block = 2 if quick else BLOCK
    rounds = rounds_of(block * pilot(take, wall_clock), quick)
    benchmark.pedantic(take, rounds=rounds, iterations=block, warmup_rounds=1)
    if benchmark.enabled:
        results.add(spec, benchmark.stats.stats.data, train.bytes)
