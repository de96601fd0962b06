"""Stand-ins: in place for one call, and the denoiser's own children back whatever happens."""

from __future__ import annotations

import functools
import sys
import threading
from types import FrameType
from typing import Any

import diffusers
import pytest
import torch
from pipelines import CASES_BY_NAME, Case
from test_dropin import assert_same, enabled, plan_for, untouched
from torch import nn

import lesa
from lesa.models import hooks, standins
from lesa.models.layouts import Layout
from lesa.models.standins import Feed, FusedHead, Pass, Skip, Stands, Tap

FLUX, DIT, WAN = (CASES_BY_NAME[name] for name in ("flux_dev", "dit", "wan"))
FILES = {hooks.__file__, standins.__file__}


def stand_ins(denoiser: nn.Module) -> list[str]:
    kinds = (Tap, Pass, Skip, Feed, FusedHead)
    return [name for name, module in denoiser.named_modules() if isinstance(module, kinds)]


@pytest.fixture(params=[False, True], ids=["own head", "fused head"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setattr(standins.ops, "backend_of", lambda name, tensor: "triton")
    return request.param


def interrupted(pipe: Any, at: int) -> int:
    """Run a request with KeyboardInterrupt raised at line number `at` that lesa's hook runs; how many it ran."""
    lines = 0

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename in FILES else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        FLUX.call(pipe)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return lines


def test_interrupted_anywhere(fused: bool) -> None:
    """Ctrl-C between any two lines of the hook: the next request is right, and disable gives the model back."""
    plan = plan_for(FLUX, "linear", "hidden")
    pipe = enabled(FLUX, plan)
    expected = FLUX.call(pipe)
    third_of_steps = interrupted(pipe, 10**9) // FLUX.steps * 3
    for at in range(1, third_of_steps, 5):
        lesa.enable(pipe, plan)
        interrupted(pipe, at)
        if at % 2:
            torch.testing.assert_close(FLUX.call(pipe), expected, rtol=1e-5, atol=1e-5)
            assert not stand_ins(pipe.transformer), at
    lesa.disable(pipe)
    assert not stand_ins(pipe.transformer)
    assert_same(FLUX.call(pipe), untouched(FLUX))


def test_one_thread_at_a_time() -> None:
    pipe = enabled(FLUX, plan_for(FLUX, "linear", "hidden"))
    block = pipe.transformer.transformer_blocks[0]
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    handle = block.register_forward_pre_hook(wait)
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(FLUX.call(pipe)))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(RuntimeError, match="another thread is running this denoiser"):
        FLUX.call(pipe)
    handle.remove()
    go_on.set()
    thread.join(60)
    assert len(outputs) == 1
    assert not stand_ins(pipe.transformer)
    lesa.disable(pipe)
    assert_same(FLUX.call(pipe), untouched(FLUX))


def shortened(case: Case, name: str, size: int) -> Any:
    pipe = case.make()
    setattr(pipe.transformer, name, getattr(pipe.transformer, name)[:size])
    return pipe


@pytest.mark.parametrize(
    ("case", "name", "size"),
    [(DIT, "transformer_blocks", 1), (FLUX, "single_transformer_blocks", 0)],
    ids=["one", "an empty list"],
)
def test_denoisers_of_few_blocks(case: Case, name: str, size: int, fused: bool) -> None:
    pipe, bare = shortened(case, name, size), shortened(case, name, size)
    lesa.enable(pipe, plan_for(case, "all", "hidden"))
    assert_same(case.call(pipe), case.call(bare))
    lesa.enable(pipe, plan_for(case, "linear", "hidden"))
    assert case.call(pipe).isfinite().all()
    assert lesa.stats(pipe).forecast > 0
    lesa.disable(pipe)
    assert_same(case.call(pipe), case.call(bare))


def test_the_modulation_of_wan_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan computes it in float32 and casts what it modulates to the dtype of the image stream."""
    monkeypatch.setattr(standins.ops, "backend_of", lambda name, tensor: "triton")
    pipe = WAN.make()
    pipe.transformer.to(torch.bfloat16)
    seen: list[torch.dtype] = []
    forward = FusedHead.forward

    def spy(self: FusedHead, probes: torch.Tensor) -> torch.Tensor:
        seen.append(probes.dtype)
        return forward(self, probes)

    monkeypatch.setattr(FusedHead, "forward", spy)
    lesa.enable(pipe, plan_for(WAN, "linear", "hidden"))
    WAN.call(pipe)
    assert seen
    assert set(seen) == {torch.float32}


def test_a_forward_that_cannot_run_without_its_blocks_is_computed(fused: bool) -> None:
    """Here somebody writes into what the blocks returned, and stand-ins' zeros have no memory for it."""

    def write(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return given[0].mul_(1.5), *given[1:]

    plan, bare, pipe = plan_for(FLUX, "linear", "hidden"), FLUX.make(), FLUX.make()
    for each in (bare, pipe):
        each.transformer.norm_out.register_forward_pre_hook(write)
    with lesa.enable(pipe, plan) as run, pytest.warns(lesa.LesaWarning, match="without its blocks") as warned:
        for seed in (0, 1):
            assert_same(FLUX.call(pipe, seed=seed), FLUX.call(bare, seed=seed))
        assert len(warned) == 1
        assert run.stats.computed == 2 * len(plan.computed)
        assert run.stats.forecast == 0
        assert sum(run.stats.refused.values()) == 2 * (FLUX.steps - len(plan.computed))


def test_a_denoiser_of_several_outputs_is_computed() -> None:
    """One head's feature would leave the others to the stand-ins."""

    class FluxTransformer2DModel(diffusers.FluxTransformer2DModel):
        @functools.wraps(diffusers.FluxTransformer2DModel.forward)
        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            (output,) = super().forward(*args, **kwargs)
            return output, 2 * output

    pipe = FLUX.make()
    pipe.transformer.__class__ = FluxTransformer2DModel
    plan = plan_for(FLUX, "linear", "hidden")
    with lesa.enable(pipe, plan) as run, pytest.warns(lesa.LesaWarning, match="several"):
        assert_same(FLUX.call(pipe), untouched(FLUX))
        assert run.stats.forecast == 0


class Adder(nn.Module):
    """A block that also reads a second stream, and adds to both."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, hidden_states: torch.Tensor, hints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states + self.linear(hints), hints + self.linear(hidden_states)


class Busy(nn.Module):
    """A denoiser whose forward works between its blocks, by their index, number and attributes, and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.sides = nn.ModuleList(Adder(8) for _ in range(2))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        for block in self.blocks:
            block.is_last = block is self.blocks[-1]
        self.between = nn.LayerNorm(8)
        self.norm_out = nn.LayerNorm(8, elementwise_affine=False)
        self.proj_out = nn.Linear(8, 3)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, residuals: list[torch.Tensor]) -> Any:
        hidden_states = self.embed(hidden_states)
        hints = []
        for side in self.sides:
            hint, hidden_states = side(hidden_states, hints=hidden_states)
            hints.append(hint)
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states)
            if not block.is_last:
                hidden_states = hidden_states + residuals[index * len(residuals) // len(self.blocks)]
                hidden_states = hidden_states + hints.pop(0)
        hidden_states = torch.cat([residuals[-1], self.between(hidden_states)], 1)[:, residuals[-1].shape[1] :]
        return self.proj_out(self.norm_out(hidden_states) * timestep + 1)


BUSY = Layout(("sides", "blocks"), ("hidden_states", "hints"), "norm_out", "proj_out", ("embed",), last=("input",))


@torch.no_grad()
def test_whatever_a_forward_does_before_its_head_is_in_the_feature(seed: int) -> None:
    torch.manual_seed(seed)
    denoiser, feature = Busy(), torch.randn(2, 5, 8)
    sample, timestep = torch.randn(2, 5, 3), torch.tensor(0.7)
    arguments = sample, timestep, [torch.randn(2, 5, 8) for _ in range(2)]
    given: list[torch.Tensor] = []
    handle = denoiser.norm_out.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    bare = denoiser(*arguments)
    handle.remove()
    stands = Stands(denoiser, BUSY)
    exchange, tap = stands.tap(torch.float32)
    exchange.enter()
    assert_same(denoiser(*arguments), bare)
    exchange.undo()
    assert_same(tap.feature, given[0])
    run, exchange, feed = stands.tail(denoiser.forward, feature)
    exchange.enter()
    found = run(*arguments)
    exchange.undo()
    assert feed.reached
    assert_same(found, denoiser.proj_out(denoiser.norm_out(feature) * timestep + 1))
    assert_same(denoiser(*arguments), bare)


def test_what_stands_for_blocks_has_their_attributes_and_not_their_wrappers() -> None:
    block = Adder(8)
    block.is_last = True
    block.forward = functools.partial(pytest.fail, "the block runs")
    block.compile(backend="eager")
    stand = Pass(block, ("hints", "hidden_states"))
    assert stand.is_last and stand.linear is block.linear
    assert stand(1, hints=2) == (2, 1)


def test_what_stands_for_an_embedder_is_no_view_of_the_sample() -> None:
    sample = torch.ones(1, 2, 3)
    Skip()(sample).zero_()
    assert torch.equal(sample, torch.ones(1, 2, 3))
