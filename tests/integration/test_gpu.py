"""The hot path on a GPU: fused, without waiting, without allocating, in CUDA graphs and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lesa
from lesa import assets, ops
from lesa.models.standins import Stands
from lesa.plans.rows import Expected
from lesa.training import stages
from lesa.training.predictor import Predictor
from lesa.training.stages import Learner, TrainingConfig

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
K, STEPS, SHAPE, OUT = 8, 5, (1, 300, 256), 64


def table(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """A ring, the rows of five steps, and the step they are read at."""
    history = torch.randn(K + 1, *SHAPE, device=DEVICE).to(dtype)
    slots = torch.stack([torch.randperm(K + 1)[:K] for _ in range(STEPS)]).to(DEVICE, torch.int32)
    weights, bias = torch.randn(STEPS, K, device=DEVICE), torch.randn(STEPS, device=DEVICE)
    return history, slots, weights, bias, torch.zeros(1, dtype=torch.int64, device=DEVICE)


def head() -> tuple[Tensor, ...]:
    scale, shift = 1 + 0.1 * torch.randn(1, SHAPE[-1], device=DEVICE), torch.randn(1, SHAPE[-1], device=DEVICE)
    weight = torch.randn(OUT, SHAPE[-1], device=DEVICE) / 16
    return scale, shift, weight.bfloat16(), torch.randn(OUT, device=DEVICE).bfloat16()


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


def test_one_cuda_graph_serves_every_step() -> None:
    history, slots, weights, bias, step = table()
    parts = head()
    keep = torch.full((STEPS,), -1, dtype=torch.int32, device=DEVICE)
    forecast, written = captured(lambda: ops.forecast_at(history, slots, weights, bias, step))
    fused, projected = captured(lambda: ops.forecast_head(history, slots, weights, bias, keep, step, *parts, 1e-6))
    for i in range(STEPS):
        step.fill_(i)
        forecast.replay()
        fused.replay()
        assert torch.equal(written, ops.forecast(history, slots[i], weights[i], bias[i]))
        assert torch.equal(projected, ops.forecast_head(history, slots, weights, bias, keep, step, *parts, 1e-6))


def test_two_runs_are_bit_equal() -> None:
    history, slots, weights, bias, _ = table()
    target, alpha = torch.randn(SHAPE, device=DEVICE).bfloat16(), torch.tensor(0.7, device=DEVICE)
    row = (history, slots[0], weights[0], bias[0], alpha, target, False, True)
    runs = [torch.ops.lesa.predict_loss(*row) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    grad = torch.randn(SHAPE, device=DEVICE).bfloat16()
    assert torch.equal(*(ops.feature_sums(grad, history, slots[0]) for _ in range(2)))


def test_float64_is_served_by_plain_torch() -> None:
    history, slots, weights, bias, _ = table(torch.float64)
    assert ops.backend_of("forecast", history) == "torch"
    with pytest.raises(RuntimeError, match="the kernels take"):
        ops.forecast(history, slots[0], weights[0].double(), bias[0].double(), backend="triton")


# The bundled pipeline


def load(dtype: torch.dtype) -> Any:
    pipe = assets.load().to(DEVICE, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> Iterator[Any]:
    pipe = load(torch.bfloat16)
    yield pipe
    lesa.disable(pipe)


def run(pipe: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    output = pipe("red apple", generator=generator, output_type="latent", return_dict=False, **assets.REQUEST)[0]
    return output.float()


def plan(interval: int = 7) -> lesa.Plan:
    return lesa.Plan.load(assets.plan_path(interval))


def offload_by_layers(pipe: Any) -> None:
    pytest.importorskip("accelerate")
    pipe.to("cpu")
    pipe.enable_sequential_cpu_offload()


def offload_by_groups(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(DEVICE, offload_type="leaf_level", use_stream=True)


@pytest.mark.parametrize("offload", [offload_by_layers, offload_by_groups])
def test_offloaded_weights_give_the_same_bits(pipe: Any, offload: Callable[[Any], None]) -> None:
    """With streams, which a CPU has not; the other kinds are in test_combinations."""
    lesa.enable(pipe, replace(plan(), site="output"))
    wanted = run(pipe)
    offload(pipe)
    for _ in range(2):
        assert torch.equal(run(pipe), wanted)
    assert lesa.stats(pipe).forecast == 3 * 40


def test_forecasts_end_in_the_fused_head(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(torch.float32)  # in bf16 the rounding of fifty steps hides what is compared
    lesa.enable(pipe, plan())
    fused = run(pipe)
    assert dict(lesa.stats(pipe).operators) == {"forecast_head: triton": 40}
    monkeypatch.setattr(Stands, "fuses", lambda *args: False)
    own = run(pipe)
    assert lesa.stats(pipe).operators["forecast_into_: triton"] == 40
    lesa.enable(pipe, plan(), backend="torch")
    plain = run(pipe)
    lesa.disable(pipe)
    full = run(pipe)
    away = (own - full).square().mean()
    assert (fused - own).square().mean() < 1e-4 * away
    assert (plain - own).square().mean() < 1e-4 * away


@contextmanager
def no_waiting(pipe: Any) -> Iterator[list[int]]:
    """No denoiser call but the first may wait for the stream; an event may be waited for. Gives the calls made."""
    forward, steps = pipe.transformer.forward, []

    def strict(*args: Any, **kwargs: Any) -> Any:
        steps.append(len(steps))
        if len(steps) > 1:  # before its first step a request's noise levels, prompt and weights are looked at
            torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pipe.transformer.forward = strict
    try:
        yield steps
    finally:
        pipe.transformer.forward = forward


@pytest.mark.parametrize("fused", [True, False])
def test_no_step_waits_for_the_device(pipe: Any, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lesa.enable(pipe, plan())
    if not fused:
        monkeypatch.setattr(Stands, "fuses", lambda *args: False)
    run(pipe)
    with no_waiting(pipe):
        run(pipe, 1)
    assert lesa.stats(pipe).requests == 2


def test_a_guarded_request_waits_for_answers_only() -> None:
    pipe, plan = load(torch.float32), lesa.Plan.load(assets.fitted_path(10))
    lesa.enable(pipe, plan, guard="warn")
    run(pipe)
    with no_waiting(pipe) as steps:
        run(pipe, 1)
    lesa.disable(pipe)
    assert len(steps) == plan.num_steps


def test_errors_measured_on_a_gpu_are_told_once_and_the_plan_goes_on() -> None:
    pipe, plan = load(torch.float32), lesa.Plan.load(assets.fitted_path(10))
    lesa.enable(pipe, plan, guard="off")
    expected = run(pipe)
    first = min(plan.expected["*"])
    off = replace(plan, expected={"*": {**plan.expected["*"], first: Expected(1e-9, 0.1)}})
    with lesa.enable(pipe, off) as handle:
        with pytest.warns(lesa.LesaWarning, match=f"step {first}"):
            found = run(pipe)
        stats = handle.stats
    lesa.disable(pipe)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [check.step for check in stats.checks] == sorted(plan.expected["*"])
    assert (stats.computed, stats.out_of_distribution) == (plan.budget, 1)


@pytest.mark.parametrize("fused", [True, False])
def test_a_forecast_step_allocates_no_feature(pipe: Any, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated is the output and small vectors; where the model's own head runs, what that takes."""
    lesa.enable(pipe, plan())
    if not fused:
        monkeypatch.setattr(Stands, "fuses", lambda *args: False)
    run(pipe)
    root = pipe.transformer.forward
    grown: dict[bool, list[int]] = {True: [], False: []}

    def measured(*args: Any, **kwargs: Any) -> Any:
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        done = lesa.stats(pipe).forecast
        output = root(*args, **kwargs)
        grown[lesa.stats(pipe).forecast > done].append(
            torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
        )
        return output

    pipe.transformer.forward = measured
    try:
        run(pipe, 1)
    finally:
        pipe.transformer.forward = root
    assert len(grown[True]) == 40
    feature = 256 * 256 * 2
    if fused:
        assert max(grown[True]) < feature
    assert max(grown[True]) < min(grown[False]) / 4
    assert len(set(grown[True])) == 1


@pytest.mark.parametrize("how", ["blocks", "whole", "cuda graphs"])
def test_compiled_with_inductor(how: str) -> None:
    torch._dynamo.reset()
    pipe = load(torch.float32)
    lesa.enable(pipe, plan())
    expected = [run(pipe, seed) for seed in range(3)]
    lesa.disable(pipe)
    full = run(pipe)
    if how == "blocks":
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    elif how == "whole":
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True)
    else:
        pipe.transformer = torch.compile(pipe.transformer, mode="reduce-overhead", fullgraph=True)
    lesa.enable(pipe, plan())
    away = (expected[0] - full).square().mean()
    counters.clear()
    assert (run(pipe, 0) - expected[0]).square().mean() < 1e-3 * away
    warm = dict(counters["stats"])
    assert not counters["graph_break"]
    for seed in (1, 2):
        with torch.compiler.set_stance("fail_on_recompile"):
            output = run(pipe, seed)
        assert (output - expected[seed]).square().mean() < 1e-3 * away
    assert dict(counters["stats"]) == warm
    assert dict(lesa.stats(pipe).operators) == {"forecast_head: triton": 120}


def test_captured_training_is_the_launched_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas = tuple(torch.linspace(1, 0, 21).tolist())
    features = torch.randn(20, *SHAPE, device=DEVICE).bfloat16()

    def train() -> tuple[list[float], list[Tensor], Tensor]:
        config = TrainingConfig(lr_step=10)
        learner = Learner(Predictor(20).to(DEVICE), sigmas, config)
        forecast = torch.empty(0)
        for _ in range(3):
            for step in range(20):
                if step >= 4:
                    forecast = learner.learn(step, features[step])
                learner.remember(step, features[step])
        return torch.stack(learner.losses).tolist(), list(learner.predictor.parameters()), forecast.clone()

    captured = train()
    monkeypatch.setattr(stages, "_WARM_UP", 1000)
    launched = train()
    assert captured[0] == launched[0]
    assert all(torch.equal(*pair) for pair in zip(captured[1], launched[1], strict=True))
    assert torch.equal(captured[2], launched[2])
