"""Measure: several methods on the same prompts and noise, and what fitted plans reach budget by budget."""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from .. import metrics
from ..forecasters import plan_of
from ..models import hooks
from ..models.pipeline import run
from ..planner.generic import FLOW, generic_plan
from ..plans import schedule
from ..plans.plan import Plan
from ..runtime.runner import PlanRunner

if TYPE_CHECKING:
    from .plots import StepPanel

FORECASTERS = ("reuse", "taylor-1", "taylor-2")
FITTED, GENERIC = "lesa.fit", "lesa (no fit)"
# What the grid shows at the smallest budget, each with a word of explanation.
_EXPLAINED = {
    "fewer steps": "the sampler with {computed} steps",
    "taylor-1": "linear extrapolation",
    "lesa": "the paper's predictor",
    GENERIC: "statistics of other models",
    FITTED: "fitted schedule and weights",
}
DEMO_COLUMNS, DEMO_AMPLIFY = 8, 20
BUDGETS = range(4, 26)
_PUBLISHED = re.compile("published|paper", re.IGNORECASE)


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
class MethodResult:
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

    def row(self, full: MethodResult) -> dict[str, Any]:
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
) -> list[MethodResult]:
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
        One result for each method, in order.

    Raises:
        ValueError: lesa is enabled on `pipe`, so its full request would not be full.
    """
    hooks.check_free(pipe)
    results = [MethodResult(method) for method in methods]
    images: list[list[np.ndarray]] = [[] for _ in methods]
    paths: list[list[torch.Tensor]] = [[] for _ in methods]
    begins = range(0, len(prompts), batch)
    with tqdm(total=len(begins) * len(methods), desc="compare", unit="request", disable=not progress) as bar:
        for begin in begins:
            part = slice(begin, begin + batch)
            for i, result in enumerate(results):
                bar.set_postfix_str(f"{result.method.name}, {result.method.computed} computed")
                if begin == 0 and flops:
                    result.flops = _count_flops(pipe, result.method, prompts[part], seeds[part], request)
                seconds, picture, path = _timed(pipe, result.method, prompts[part], seeds[part], request)
                if begin > 0:
                    result.seconds.append(seconds)
                images[i].append(picture)
                paths[i].append(path)
                bar.update()
    for i, result in enumerate(results):
        result.images = np.concatenate(images[i])
        result.psnr = metrics.psnr(result.images, results[0].images)
        result.ssim = metrics.ssim(result.images, results[0].images)
        if result.method.num_steps == methods[0].num_steps:
            result.step_errors = _step_errors(torch.cat(paths[i], 1), torch.cat(paths[0], 1))
    return results


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


@dataclass(frozen=True)
class BudgetResult:
    """What a fit reached at one budget: a point of the frontier of fidelity over computed steps.

    Args:
        computed: steps that the plan computes.
        share: of the denoiser calls of a full request.
        fitting_psnr: dB, mean over the prompts that were fitted to; None where the plan was not run on them.
        held_out_psnr: dB, mean over the prompts that were held out; None where there are none.
        fitting_ssim, held_out_ssim: likewise; None also where no pictures are made.
        plan: the plan's file, relative to the folder of frontier.json.
        baselines: PSNR, dB, of published schedules and forecasts on the fitting prompts, by name, where they were run.
    """

    computed: int
    share: float
    fitting_psnr: float | None = None
    held_out_psnr: float | None = None
    fitting_ssim: float | None = None
    held_out_ssim: float | None = None
    plan: str = ""
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def psnr(self) -> float | None:
        """The lower of both, dB: fitting flatters, and the held-out prompts are few."""
        return min(_known(self.fitting_psnr, self.held_out_psnr), default=None)

    @property
    def ssim(self) -> float | None:
        """The lower of both, as `psnr`."""
        return min(_known(self.fitting_ssim, self.held_out_ssim), default=None)


def budgets_below(num_steps: int) -> list[int]:
    """The budgets of a frontier, 4 to 25, that are smaller than `num_steps`.

    Raises:
        ValueError: there are none.
    """
    budgets = [budget for budget in BUDGETS if budget < num_steps]
    if not budgets:
        raise ValueError(f"num_steps={num_steps}: a frontier begins at {BUDGETS[0]} computed steps; name the budgets")
    return budgets


def budget_results(plans: Mapping[int, Plan]) -> list[BudgetResult]:
    """The results of fitted plans by budget, the smallest first; the figures are those that `lesa.fit` measured."""
    names = ("fitting_psnr", "held_out_psnr", "fitting_ssim", "held_out_ssim")
    results = []
    for budget, plan in sorted(plans.items()):
        baselines: dict[str, float] = {}
        for name, psnr in plan.training.get("candidates", ()):
            if _PUBLISHED.search(name):
                baselines[name] = max(psnr, baselines.get(name, -math.inf))
        figures = {name: plan.training.get(name) for name in names}
        # the name under which `lesa.fit` keeps it
        file = f"plan-{budget}.safetensors"
        results.append(
            BudgetResult(plan.budget, plan.budget / plan.num_steps, **figures, plan=file, baselines=baselines)
        )
    return results


def smallest_budget(results: Iterable[BudgetResult], psnr: float | None = None, ssim: float | None = None) -> int:
    """The smallest budget that reaches a target, on fitting and on held-out prompts.

    Args:
        results: of a frontier.
        psnr: the target in dB.
        ssim: with `psnr` too, both are to be reached.

    Raises:
        ValueError: there is no target, or no budget reaches it; the message says how far the best gets.
    """
    results = sorted(results, key=lambda result: result.computed)
    targets = {name: target for name, target in (("psnr", psnr), ("ssim", ssim)) if target is not None}
    if not targets:
        raise ValueError("psnr=None, ssim=None: give a target for one of them")
    reaching = results
    for name, target in targets.items():
        known = [(getattr(result, name), result) for result in results if getattr(result, name) is not None]
        if not known:
            raise ValueError(f"{name}={target:g}: the plans were not measured in {name.upper()}; give another target")
        figure, best = max(known, key=lambda pair: pair[0])
        if not figure >= target:
            raise ValueError(
                f"{name}={target:g}: no budget reaches it; the best is {figure:.4g} at {best.computed} computed steps; "
                "give a lower target, or fit larger budgets or with more effort"
            )
        reaching = [result for figure, result in known if figure >= target and result in reaching]
    if not reaching:
        raise ValueError(f"psnr={psnr:g}, ssim={ssim:g}: no budget reaches both; lower one, or fit larger budgets")
    return reaching[0].computed


def frontier_table(results: Iterable[BudgetResult], folder: str | os.PathLike[str] = ".") -> str:
    """The results as text: PSNR of the best published baseline (on the fitting prompts) and of the plan, its SSIM."""
    lines = [f"{'computed':>8} {'share':>6} {'published':>10} {'fitting':>8} {'held out':>9} {'SSIM':>7}  plan"]
    for result in results:
        best = max(result.baselines.values(), default=None)
        decibels = f"{_shown(best):>10} {_shown(result.fitting_psnr):>8} {_shown(result.held_out_psnr):>9}"
        start = f"{result.computed:>8} {result.share:>6.0%} {decibels} {_shown(result.ssim, '.4f'):>7}"
        lines.append(f"{start}  {Path(folder) / result.plan}")
    return "\n".join(lines)


def demo_methods(
    lesa_plans: Sequence[tuple[int, Plan]], fitted: Sequence[Plan] = (), guided: bool = False, site: str = "hidden"
) -> list[Method]:
    """Full, fewer Euler steps, every forecaster on the paper's schedule of each interval, plans without and with a fit.

    Plans without a fit do without the statistics of emoji-flux, as for a model that nobody recorded.

    Args:
        lesa_plans: (interval, LESA plan) pairs.
        fitted: plans of `lesa.fit`.
        guided: whether the requests have guidance.
        site: of the closed-form forecasters.
    """
    total = lesa_plans[0][1].num_steps
    chosen = [Method("full", None, total)]
    chosen += [Method("fewer steps", None, len(schedule.paper(total, interval))) for interval, _ in lesa_plans]
    for interval, plan in lesa_plans:
        computed = schedule.paper(total, interval)
        for name in FORECASTERS:
            chosen.append(Method(name, plan_of(name, computed, plan.sigmas, site), total, interval))
        chosen.append(Method("lesa", plan, total, interval))
    for _, plan in lesa_plans:
        made = generic_plan(FLOW, guided, plan.budget, plan.sigmas, without=("emoji-flux",))
        chosen.append(Method(GENERIC, made, total))
    return chosen + [Method(FITTED, plan, total) for plan in fitted]


def demo_headline(rows: Sequence[dict[str, Any]]) -> str:
    """The fitted plan of the fewest computed steps beside the paper's of the most, in one sentence."""
    fitted = min((row for row in rows if row["method"] == FITTED), key=lambda row: row["computed"])
    paper = max((row for row in rows if row["method"] == "lesa"), key=lambda row: row["computed"])
    return (
        f"lesa.fit, {fitted['computed']} of 50 steps computed: {fitted['psnr']:.1f} dB at {fitted['speedup']:.1f}x; "
        f"the paper's schedule with {paper['computed']}: {paper['psnr']:.1f} dB at {paper['speedup']:.1f}x"
    )


def demo_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'method':<14} {'N':>3} {'computed':>8} {'FLOPs':>7} {'speed':>7} {'PSNR':>7} {'SSIM':>6}"]
    for row in rows:
        interval = "" if row["interval"] is None else row["interval"]
        speed = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        quality = ("", "") if row["psnr"] is None else (f"{row['psnr']:.2f}", f"{row['ssim']:.4f}")
        flops = f"{row['flops_speedup']:.2f}x"
        start = f"{row['method']:<14} {interval:>3} {row['computed']:>8} {flops:>7} {speed:>7}"
        lines.append(f"{start} {quality[0]:>7} {quality[1]:>6}")
    return "\n".join(lines)


def demo_grid_rows(results: Sequence[MethodResult]) -> list[tuple[str, list[np.ndarray]]]:
    """The full request, and at the smallest budget what tells most."""
    full = results[0]
    smallest = min(result.method.computed for result in results)
    at_smallest = [r for r in results if r.method.computed == smallest and r.method.name in _EXPLAINED]
    return [(_grid_label(result, full), list(result.images[:DEMO_COLUMNS])) for result in (full, *at_smallest)]


def _grid_label(result: MethodResult, full: MethodResult) -> str:
    """Name, computed steps and figures of one row of the grid."""
    row, total = result.row(full), full.method.num_steps
    if result is full:
        return f"{row['method']}\nall {total} steps computed"
    lines = [row["method"], _EXPLAINED[row["method"]].format(**row)]
    if result.method.plan is not None:
        lines.append(f"{row['computed']} of {total} steps computed")
    return "\n".join([*lines, f"{row['speedup']:.2f}× faster, {row['psnr']:.1f} dB PSNR"])


def demo_panels(results: Sequence[MethodResult], plans: Sequence[tuple[int, Plan]]) -> list[StepPanel]:
    """One column of the steps picture for every interval, with the plans of no interval that compute as many steps."""
    from .plots import StepPanel  # matplotlib

    columns = []
    for interval, plan in plans:
        others = [r for r in results if r.method.name in (GENERIC, FITTED) and r.method.computed == plan.budget]
        shown = [r for r in results if r.method.interval == interval] + others
        alphas = plan.training["alphas"]["*"]
        columns.append(
            StepPanel(
                title=f"N = {interval}: {plan.budget} of {plan.num_steps} computed",
                sigmas=plan.sigmas,
                errors={r.method.name: list(r.step_errors) for r in shown if r.step_errors is not None},
                computed={"lesa": plan.computed}
                | {r.method.name: r.method.plan.computed for r in others if r.method.plan},
                alphas={"lesa": [(step, alpha) for step, alpha in enumerate(alphas) if alpha is not None]},
                stages=plan.stages,
            )
        )
    return columns


def _known(*figures: float | None) -> list[float]:
    return [figure for figure in figures if figure is not None]


def _shown(figure: float | None, form: str = ".2f") -> str:
    return "-" if figure is None else f"{figure:{form}}"
