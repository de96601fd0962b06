"""Run several methods on the same prompts and noise, and measure them against the full request."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from .. import metrics
from ..models import hooks
from ..models.pipeline import run
from ..plans.plan import Plan
from ..runtime.runner import PlanRunner


@dataclass(frozen=True)
class Method:
    """One way to make the picture.

    Args:
        name: as shown, e.g. "full", "fewer steps", "taylor-1", "lesa".
        plan: run by lesa; None runs the pipeline as it is.
        num_steps: Euler steps of the request.
        interval: N of the paper's schedule, None where it has none.
    """

    name: str
    plan: Plan | None
    num_steps: int
    interval: int | None = None

    @property
    def computed(self) -> int:
        """Denoiser calls that are computed."""
        return self.num_steps if self.plan is None else self.plan.budget


@dataclass
class Outcome:
    """What one method did on all prompts.

    Args:
        method: which one.
        flops: of one request up to the final latents, counted by torch.
        seconds: wall clock of each timed request, decoding included.
        images: [P, H, W, 3] in [0, 1].
        step_errors: [T] relative L2 error of the latents after each step, mean over prompts; None where T differs.
        psnr: [P] dB against the full request from the same noise.
        ssim: [P].
    """

    method: Method
    flops: int = 0
    seconds: list[float] = field(default_factory=list)
    images: np.ndarray = field(default_factory=lambda: np.empty(0))
    step_errors: np.ndarray | None = None
    psnr: np.ndarray = field(default_factory=lambda: np.empty(0))
    ssim: np.ndarray = field(default_factory=lambda: np.empty(0))

    def row(self, full: Outcome) -> dict[str, Any]:
        """The figures of a results table; speed-ups are relative to `full`."""
        faster = statistics.median(full.seconds) / statistics.median(self.seconds) if self.seconds else None
        return {
            "method": self.method.name,
            "interval": self.method.interval,
            "computed": self.method.computed,
            "flops_speedup": full.flops / self.flops if self.flops else None,
            "speedup": faster,
            "psnr": float(self.psnr.mean()) if self is not full else None,
            "ssim": float(self.ssim.mean()) if self is not full else None,
        }


def compare(
    pipe: Any,
    methods: Sequence[Method],
    prompts: Sequence[str],
    seeds: Sequence[int],
    request: Mapping[str, Any],
    *,
    batch: int = 1,
    flops: bool = True,
    progress: bool = True,
) -> list[Outcome]:
    """Run every method on every prompt, interleaved, each from the prompt's own noise.

    The first batch warms up and counts FLOPs, so its times are left out; with a single batch there are none.

    Args:
        pipe: a diffusers pipeline.
        methods: the first is the full request, the reference of all figures.
        prompts: P prompts.
        seeds: P seeds of CPU generators.
        request: keyword arguments of the pipeline call.
        batch: prompts in one call.
        flops: count FLOPs, by running the first batch once more.
        progress: show a bar.

    Returns:
        One outcome a method, in order.

    Raises:
        ValueError: lesa is enabled on `pipe`, so its full request would not be full.
    """
    hooks.check_free(pipe)
    outcomes = [Outcome(method) for method in methods]
    images: list[list[np.ndarray]] = [[] for _ in methods]
    paths: list[list[torch.Tensor]] = [[] for _ in methods]
    begins = range(0, len(prompts), batch)
    with tqdm(total=len(begins) * len(methods), desc="compare", unit="request", disable=not progress) as bar:
        for begin in begins:
            part = slice(begin, begin + batch)
            for i, outcome in enumerate(outcomes):
                bar.set_postfix_str(f"{outcome.method.name}, {outcome.method.computed} computed")
                if begin == 0 and flops:
                    outcome.flops = _count_flops(pipe, outcome.method, prompts[part], seeds[part], request)
                seconds, picture, path = _timed(pipe, outcome.method, prompts[part], seeds[part], request)
                if begin > 0:
                    outcome.seconds.append(seconds)
                images[i].append(picture)
                paths[i].append(path)
                bar.update()
    for i, outcome in enumerate(outcomes):
        outcome.images = np.concatenate(images[i])
        outcome.psnr = metrics.psnr(outcome.images, outcomes[0].images)
        outcome.ssim = metrics.ssim(outcome.images, outcomes[0].images)
        if outcome.method.num_steps == methods[0].num_steps:
            outcome.step_errors = _step_errors(torch.cat(paths[i], 1), torch.cat(paths[0], 1))
    return outcomes


def _call(
    pipe: Any, method: Method, prompts: Sequence[str], seeds: Sequence[int], request: Mapping, **more: Any
) -> Any:
    driver = None if method.plan is None else PlanRunner(method.plan)
    site = "hidden" if method.plan is None else method.plan.site
    return run(pipe, prompts, seeds, {**request, "num_inference_steps": method.num_steps}, driver, site, **more)


def _count_flops(
    pipe: Any, method: Method, prompts: Sequence[str], seeds: Sequence[int], request: Mapping[str, Any]
) -> int:
    with FlopCounterMode(display=False) as counter:
        _call(pipe, method, prompts, seeds, request)
    return counter.get_total_flops()


def _timed(
    pipe: Any, method: Method, prompts: Sequence[str], seeds: Sequence[int], request: Mapping[str, Any]
) -> tuple[float, np.ndarray, torch.Tensor]:
    path: list[torch.Tensor] = []

    def remember(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        path.append(tensors["latents"])
        return {}

    _wait(pipe)
    begin = time.perf_counter()
    output = _call(pipe, method, prompts, seeds, request, output_type="np", callback_on_step_end=remember)
    _wait(pipe)
    seconds = time.perf_counter() - begin
    return seconds, np.asarray(output.images, np.float32), torch.stack(path).float().cpu()


def _wait(pipe: Any) -> None:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)


def _step_errors(path: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    difference, norm = (path - reference).flatten(2).norm(dim=2), reference.flatten(2).norm(dim=2)
    return (difference / norm).mean(1).numpy()
