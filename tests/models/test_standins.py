"""Stand-ins: in place for one call, and the denoiser's own children back whatever happens."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import pytest
import torch
from pipelines import CASES_BY_NAME, Case
from test_dropin import assert_same, enabled, plan_for, untouched
from torch import nn

import lesa
from lesa.models import hooks, standins
from lesa.models.standins import Feed, FusedHead, Pass, Skip, Tap

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
    for at in range(1, third_of_steps, 3):
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


def test_what_stands_for_an_embedder_is_no_view_of_the_sample() -> None:
    sample = torch.ones(1, 2, 3)
    Skip()(sample).zero_()
    assert torch.equal(sample, torch.ones(1, 2, 3))
