"""Compiled denoisers: no graph break and no recompilation that the bare model does not have, the same results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pipelines import CASES, CASES_BY_NAME, Case
from test_dropin import enabled, plan_for
from torch._dynamo.utils import counters

import lesa
from lesa.models import standins
from lesa.models.layouts import layout_of
from lesa.plans.plan import Plan

FLUX, WAN = CASES_BY_NAME["flux_dev"], CASES_BY_NAME["wan"]
QWEN, HUNYUAN = CASES_BY_NAME["qwen_image"], CASES_BY_NAME["hunyuan_video"]
COMPILERS: dict[str, Callable[[Any, str], None]] = {
    "blocks": lambda pipe, by: pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=by),
    "whole": lambda pipe, by: setattr(pipe, "transformer", torch.compile(pipe.transformer, fullgraph=True, backend=by)),
    "in place": lambda pipe, by: pipe.transformer.compile(backend=by),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have forecast steps end in the fused operator, as on a GPU; here plain torch serves it."""
    monkeypatch.setattr(standins.ops, "backend_of", lambda name, tensor: "triton")


def compiled_frames() -> tuple[int, int]:
    """Graph breaks and graphs so far."""
    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


def made(case: Case, how: str) -> Any:
    """A pipeline; with one block of each kind where each is compiled."""
    pipe = case.make()
    for name in case.blocks if how != "blocks" else ():
        setattr(pipe.transformer, name, getattr(pipe.transformer, name)[:1])
    return pipe


@functools.cache
def bare_graph_breaks(case: Case, how: str) -> int:
    """Of the model without lesa; with fullgraph a graph break is an error."""
    if how != "in place":
        return 0
    pipe = made(case, how)
    COMPILERS[how](pipe, "eager")
    case.call(pipe)
    breaks, _ = compiled_frames()
    torch._dynamo.reset()
    counters.clear()
    return breaks


def check(case: Case, site: str, how: str, enabled_first: bool, by: str) -> None:
    breaks = bare_graph_breaks(case, how)
    plan = plan_for(case, "linear", site)
    uncompiled, pipe = made(case, how), made(case, how)
    lesa.enable(uncompiled, plan)
    if enabled_first:
        lesa.enable(pipe, plan)
        COMPILERS[how](pipe, by)
    else:
        COMPILERS[how](pipe, by)
        lesa.enable(pipe, plan)
    torch.testing.assert_close(case.call(pipe), case.call(uncompiled), rtol=1e-5, atol=1e-5)
    warm = compiled_frames()
    assert warm[0] == breaks
    # A recompilation in a warm request is an error, whatever the step.
    with torch.compiler.set_stance("fail_on_recompile"):
        output = case.call(pipe, seed=1)
    torch.testing.assert_close(output, case.call(uncompiled, seed=1), rtol=1e-5, atol=1e-5)
    assert compiled_frames() == warm
    stats = lesa.stats(pipe)
    assert stats.requests == 2
    assert stats.forecast > 0
    assert not stats.refused


@pytest.mark.parametrize(
    ("site", "how", "enabled_first", "by"),
    [
        ("hidden", "blocks", True, "eager"),
        ("hidden", "blocks", False, "aot_eager"),
        ("hidden", "whole", True, "aot_eager"),
        ("hidden", "whole", False, "eager"),
        ("hidden", "in place", True, "eager"),
        ("output", "blocks", False, "eager"),
        ("output", "whole", True, "eager"),
        ("output", "whole", False, "aot_eager"),
        ("output", "in place", False, "eager"),
    ],
)
def test_no_new_graph_break_and_no_recompilation(site: str, how: str, enabled_first: bool, by: str) -> None:
    check(FLUX, site, how, enabled_first, by)


@pytest.mark.parametrize(
    ("case", "how", "by"),
    [(FLUX, "whole", "aot_eager"), (QWEN, "whole", "eager"), (HUNYUAN, "blocks", "eager"), (WAN, "whole", "eager")],
    ids=lambda one: getattr(one, "name", one),
)
@pytest.mark.usefixtures("fused")
def test_with_the_fused_head(case: Case, how: str, by: str) -> None:
    check(case, "hidden", how, False, by)


def graphs_of_sizes(plan: Plan | None) -> int:
    """How many graphs requests of several sizes make."""
    pipe = WAN.make()
    pipe.transformer.blocks = pipe.transformer.blocks[:1]
    if plan is not None:
        lesa.enable(pipe, plan)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, dynamic=True, backend="eager")
    for size in ((32, 32), (48, 32), (64, 32)):
        WAN.call(pipe, size=size)
    assert plan is None or not lesa.stats(pipe).refused
    _, graphs = compiled_frames()
    torch._dynamo.reset()
    counters.clear()
    return graphs


def test_dynamic_shapes_make_at_most_twice_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, bare = plan_for(WAN, "linear", "hidden"), graphs_of_sizes(None)
    assert graphs_of_sizes(plan) <= 2 * bare
    monkeypatch.setattr(standins.ops, "backend_of", lambda name, tensor: "triton")  # the fused head
    assert graphs_of_sizes(plan) <= 2 * bare


def test_disable_leaves_the_compiled_denoiser_as_it_was() -> None:
    bare, pipe = made(FLUX, "whole"), made(FLUX, "whole")
    COMPILERS["whole"](pipe, "eager")
    lesa.enable(pipe, plan_for(FLUX, "linear", "hidden"))
    FLUX.call(pipe)
    lesa.disable(pipe)
    torch.testing.assert_close(FLUX.call(pipe), FLUX.call(bare), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


# What stands in for the embedders and the head


@pytest.mark.parametrize("case", [case for case in CASES if "hidden" in case.sites], ids=lambda case: case.name)
@pytest.mark.usefixtures("fused")
def test_the_fused_head_is_the_models_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale, shift and projection come from the model itself; its own head on the same forecast gives the same."""
    plan = plan_for(case, "linear", "hidden")
    pipe = enabled(case, plan)
    with_fused = case.call(pipe)
    assert set(lesa.stats(pipe).operators) == {"forecast_head: triton"}
    monkeypatch.undo()
    with_own = case.call(pipe)
    assert any(name.startswith("forecast_into_") for name in lesa.stats(pipe).operators)
    torch.testing.assert_close(with_fused, with_own, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fused")
def test_a_head_that_somebody_hooks_runs_itself() -> None:
    pipe = enabled(FLUX, plan_for(FLUX, "linear", "hidden"))
    calls = []
    handle = pipe.transformer.proj_out.register_forward_hook(lambda *args: calls.append(1))
    FLUX.call(pipe)
    assert len(calls) == FLUX.steps
    assert all(name.startswith("forecast_into_") for name in lesa.stats(pipe).operators)
    handle.remove()
    FLUX.call(pipe)
    assert "forecast_head: triton" in lesa.stats(pipe).operators


@pytest.mark.usefixtures("fused")
def test_a_projection_that_is_no_plain_linear_runs_itself() -> None:
    class Adapted(torch.nn.Linear):
        """As a LoRA layer in the place of a projection."""

    pipe = enabled(FLUX, plan_for(FLUX, "linear", "hidden"))
    own = pipe.transformer.proj_out
    adapted = Adapted(own.in_features, own.out_features)
    adapted.load_state_dict(own.state_dict())
    pipe.transformer.proj_out = adapted
    FLUX.call(pipe)
    assert all(name.startswith("forecast_into_") for name in lesa.stats(pipe).operators)


@pytest.mark.parametrize("case", [case for case in CASES if "hidden" in case.sites], ids=lambda case: case.name)
def test_forecast_steps_skip_the_embedders(case: Case) -> None:
    plan = plan_for(case, "linear", "hidden")
    pipe = enabled(case, plan)
    denoiser = case.denoiser(pipe)
    layout = layout_of(denoiser)
    counts: dict[str, int] = {}
    for path in layout.embedders:
        module = standins._child(denoiser, path)
        if module is not None:
            module.register_forward_hook(lambda *args, path=path: counts.update({path: counts.get(path, 0) + 1}))
    case.call(pipe)
    calls = lesa.stats(pipe).computed
    assert counts
    assert all(count == calls for count in counts.values()), counts
    assert lesa.stats(pipe).forecast > 0
