"""Every bad call is refused by one clear error that names the argument, and leaves the pipeline as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from pipelines import CASES_BY_NAME
from written import fitted, statistics

import lesa
from lesa import Plan, Statistics
from lesa.forecasters import plan_of
from lesa.models import hooks

FLUX = CASES_BY_NAME["flux_dev"]
NAN = float("nan")
STEPS = 4
SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)
REQUEST = {"num_inference_steps": STEPS, "height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["a", "b"]
PLAN = plan_of("reuse", (0, 2), SIGMAS, "output")

enable, load, save, save_pretrained = lesa.enable, Plan.load, PLAN.save, PLAN.save_pretrained
from_pretrained, push, adapt = Plan.from_pretrained, PLAN.push_to_hub, fitted().adapt


@dataclass
class World:
    """What the calls are about.

    Args:
        pipe: a tiny pipeline.
        full: what a plain call of it gives.
        unet: a pipeline whose hidden site is not known.
        folder: holds "file", "damaged.safetensors", "plan.safetensors" and "statistics.safetensors".
    """

    pipe: Any
    full: torch.Tensor
    unet: Any
    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def fit(self, prompts: Any = PROMPTS, target: Any = None, **more: Any) -> Any:
        options = {"budget": 2, "request": REQUEST, "effort": "quick", **more}
        return lesa.fit(target or self.pipe, prompts, **options)

    def candidates(self, *candidates: Any) -> Any:
        return self.fit(effort="default", candidates=list(candidates))

    def gather(self, prompts: Any = PROMPTS, target: Any = None, **more: Any) -> Any:
        return Statistics.gather(target or self.pipe, prompts, **{"request": REQUEST, **more})

    def train(self, prompts: Any = PROMPTS, target: Any = None, folder: Any = None, **more: Any) -> Any:
        options = {"request": REQUEST, "intervals": [2], **more}
        return lesa.train(target or self.pipe, prompts, folder or self / "train", **options)


@pytest.fixture(scope="module")
def w(tmp_path_factory: Any) -> World:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "file").write_text("kept")
    (folder / "damaged.safetensors").write_bytes(b"\xff" * 64)
    PLAN.save(folder / "plan.safetensors")
    statistics().save(folder / "statistics.safetensors")
    pipe = FLUX.make()
    return World(pipe, FLUX.call(pipe, steps=STEPS), CASES_BY_NAME["sdxl"].make(), folder)


def wrong_budgets(call: Callable[..., Any], *values: Any) -> list[tuple[str, Callable[[World], Any]]]:
    return [("budget=", functools.partial(call, budget=value)) for value in values]


CALLS: dict[str, list[tuple[str, Callable[[World], Any]]]] = {
    "enable": [
        ("no supported denoiser", lambda w: enable(None, PLAN)),
        ("AutoencoderKL is not a supported denoiser", lambda w: enable(w.pipe.vae, PLAN)),
        ("plan:.*budget=", lambda w: enable(w.pipe, 10)),
        *wrong_budgets(lambda w, budget: enable(w.pipe, budget=budget), 0, 0.0, 1.5, NAN, True, "5"),
        ("sigmas: a bare", lambda w: enable(w.pipe.transformer)),
        ("sigmas is for a bare denoiser", lambda w: enable(w.pipe, sigmas=SIGMAS)),
        *[
            ("sigmas=", functools.partial(lambda w, bad: enable(w.pipe.transformer, sigmas=bad), bad=bad))
            for bad in ((0.5, 1.0, 0.0), (1.0, NAN, 0.0), (1.0, 0.5), "x", 7)
        ],
        ("budget=5", lambda w: enable(w.pipe.transformer, budget=5, sigmas=SIGMAS)),
        *[
            (f"learn={value}", functools.partial(lambda w, value: enable(w.pipe, learn=value), value=value))
            for value in (0, -1, 1.5, True)
        ],
        ("learn=4 with a plan", lambda w: enable(w.pipe, PLAN, learn=4)),
        ("budget=0", lambda w: enable(w.pipe, budget=0, learn=4)),
        ("sigmas: a bare", lambda w: enable(w.pipe.transformer, learn=4)),
        ("has no scheduler", lambda w: enable(SimpleNamespace(transformer=w.pipe.transformer, scheduler=None))),
        ("the plan serves its own", lambda w: enable(w.pipe.transformer, PLAN, sigmas=SIGMAS)),
        ("plan 'missing'", lambda w: enable(w.pipe, "missing")),
        ("plan ''", lambda w: enable(w.pipe, "")),
        ("plan '.*damaged", lambda w: enable(w.pipe, w / "damaged.safetensors")),
        ("plan 'nobody/nothing'", lambda w: enable(w.pipe, "nobody/nothing")),
        ("guard='x'", lambda w: enable(w.pipe, PLAN, guard="x")),
        ("backend='cuda'", lambda w: enable(w.pipe, PLAN, backend="cuda")),
        ("budget=2", lambda w: enable(w.pipe, PLAN, budget=2)),
        ("budget=None", lambda w: enable(w.pipe, statistics())),
        ("budget=", lambda w: enable(w.pipe, w / "statistics.safetensors")),
        *wrong_budgets(lambda w, budget: enable(w.pipe, statistics(), budget=budget), 0, 0.0, 1.5, NAN, True, "5"),
        *wrong_budgets(lambda w, budget: enable(w.pipe, replace(fitted(), denoiser=None), budget=budget), 0),
        ("bare FluxTransformer2DModel", lambda w: enable(w.pipe.transformer, statistics(), budget=5)),
        ("made for WanTransformer3DModel", lambda w: enable(w.pipe, replace(PLAN, denoiser="WanTransformer3DModel"))),
        ("another configuration", lambda w: enable(w.pipe, replace(PLAN, config_hash="0" * 16))),
        ("another denoiser", lambda w: enable(w.pipe, replace(statistics(), denoiser="Wan"), budget=5)),
        ("site='hidden'", lambda w: enable(w.unet, replace(PLAN, site="hidden"))),
    ],
    "fit": [
        ("no supported denoiser", lambda w: w.fit(target="flux")),
        ("prompts, requests", lambda w: w.fit(None)),
        ("prompts, requests", lambda w: w.fit(requests=[print])),
        ("prompts='a'", lambda w: w.fit("a")),
        ("prompts is empty", lambda w: w.fit([])),
        (r"prompts\[1\]=5", lambda w: w.fit(["a", 5])),
        ("prompts are for a pipeline", lambda w: w.fit(target=w.pipe.transformer)),
        (r"requests\[0\]", lambda w: w.fit(None, requests=[5])),
        *wrong_budgets(lambda w, budget: w.fit(budget=budget), 0, 1.5, [], [2, 0], "5", STEPS + 1),
        ("effort='best'", lambda w: w.fit(effort="best")),
        ("held_out=2", lambda w: w.fit(held_out=2)),
        ("seeds=", lambda w: w.fit(seeds=[1])),
        ("seeds=", lambda w: w.fit(seeds=[0.5, 1.5])),
        ("seed=-1", lambda w: w.fit(seed=-1)),
        ("batch=0", lambda w: w.fit(batch=0)),
        ("sigmas", lambda w: w.fit(sigmas=[1, 0.5, 0])),
        ("scheduler", lambda w: w.fit(scheduler=w.pipe.scheduler)),
        ("sigmas=", lambda w: plan_of("reuse", (0,), [0, 0.5, 1])),
        ("sigmas=", lambda w: plan_of("reuse", (0,), [1, NAN, 0])),
        ("sigmas=", lambda w: plan_of("reuse", (0,), [1, 0.5])),
        ("sigmas=", lambda w: adapt([0.5, 1, 0])),
        ("sigmas=", lambda w: adapt([1, 0.75, 0.5])),
        ("sigmas=", lambda w: statistics().at([0, 0.5, 1])),
        ("guidance=", lambda w: w.fit(guidance=3.0)),
        ("guidance=", lambda w: w.fit(guidance=[1, 2])),
        ("strength", lambda w: w.fit(request={**REQUEST, "strength": 0.5})),
        ("request=", lambda w: w.fit(request=["a"])),
        ("request=.*JSON", lambda w: w.fit(request={**REQUEST, "latents": torch.ones(1)})),
        ("request holds prompt=", lambda w: w.fit(request={**REQUEST, "prompt": "a"})),
        ("num_inference_steps=0", lambda w: w.fit(request={**REQUEST, "num_inference_steps": 0})),
        ("folder '.*file' is a file", lambda w: w.fit(folder=w / "file")),
        ("folder=5", lambda w: w.fit(folder=5)),
        ("candidates is one Plan", lambda w: w.fit(candidates=PLAN)),
        (r"candidates\[0\]", lambda w: w.candidates(5)),
        ("plan 'missing'", lambda w: w.candidates("missing")),
        ("candidate 0 .*budget 3", lambda w: w.candidates(plan_of("reuse", (0, 1, 2), SIGMAS, "output"))),
        ("candidate 0 .*8 steps", lambda w: w.candidates(plan_of("reuse", (0, 4), (*range(8, -1, -1),), "output"))),
        ("candidate 0 .*made for Wan", lambda w: w.candidates(replace(PLAN, denoiser="Wan"))),
        ("candidates with effort=", lambda w: w.fit(candidates=[PLAN])),
    ],
    "gather": [
        ("prompts is empty", lambda w: w.gather([])),
        ("sites=", lambda w: w.gather(sites=["middle"])),
        ("seeds=", lambda w: w.gather(seeds=[1, 2, 3])),
        ("strength", lambda w: w.gather(request={**REQUEST, "strength": 1})),
        ("request 0 did not call", lambda w: w.gather(None, requests=[lambda: None])),
    ],
    "train": [
        ("no supported denoiser", lambda w: w.train(target="flux")),
        ("folder '.*file' is a file", lambda w: w.train(folder=w / "file")),
        (r"intervals=\[\]", lambda w: w.train(intervals=[])),
        ("intervals=", lambda w: w.train(intervals=[5])),
        ("site='middle'", lambda w: w.train(site="middle")),
        ("calibration=-1", lambda w: w.train(calibration=-1)),
    ],
    "files": [
        ("path='.*' is a folder", lambda w: save(w.folder)),
        ("path=5", lambda w: save(5)),
        ("path='.*file/x'", lambda w: save(w / "file" / "x")),
        ("plan 'missing'", lambda w: load("missing")),
        ("damaged", lambda w: load(w / "damaged.safetensors")),
        ("holds statistics", lambda w: load(w / "statistics.safetensors")),
        ("holds no statistics", lambda w: Statistics.load(w / "plan.safetensors")),
        ("folder='.*file'", lambda w: save_pretrained(w / "file")),
        ("filename='a.bin'", lambda w: save_pretrained(w / "new", "a.bin")),
        ("name_or_path=5", lambda w: from_pretrained(5)),
        ("filename=", lambda w: from_pretrained(w.folder, filename="none.safetensors")),
        (r"filename='\.\./x'", lambda w: from_pretrained("a/b", filename="../x")),
        ("repo_id=5", lambda w: push(5)),
        ("path_in_repo='x'", lambda w: push("a/b", path_in_repo="x")),
    ],
    "adapt": [
        ("2 steps|4 steps", lambda w: PLAN.adapt(budget=2)),
        *wrong_budgets(lambda w, budget: adapt(budget=budget), 0, 1.5),
        ("sigmas=", lambda w: adapt(sigmas=[])),
        ("sigmas=", lambda w: adapt(sigmas=[1.0, NAN, 0.0])),
        ("sigmas=", lambda w: adapt(sigmas=5)),
    ],
}


@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")
@pytest.mark.parametrize("function", CALLS)
def test_a_bad_call_is_one_error_and_changes_nothing(function: str, w: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = sorted(w.folder.rglob("*"))
    for match, call in CALLS[function]:
        with pytest.raises((ValueError, TypeError), match=match):
            call(w)
        assert hooks.attached(w.pipe) is hooks.attached(w.unet) is None, match
        assert sorted(w.folder.rglob("*")) == before and (w / "file").read_text() == "kept", match
    assert torch.equal(FLUX.call(w.pipe, steps=STEPS), w.full)


def test_a_bad_call_leaves_the_plan_that_is_on(w: World) -> None:
    with lesa.enable(w.pipe, PLAN) as run:
        for match, call in CALLS["enable"][:12]:
            with pytest.raises((ValueError, TypeError), match=match):
                call(w)
        for match, again in (("lesa is enabled", w.fit), ("lesa is enabled", w.gather), ("lesa is enabled", w.train)):
            with pytest.raises(ValueError, match=match):
                again()
        assert lesa.stats(w.pipe) is run.stats and run.stats.requests == 0
    assert torch.equal(FLUX.call(w.pipe, steps=STEPS), w.full)
