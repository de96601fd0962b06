"""`lesa demo`: the bundled pipeline in full, with fewer steps, and accelerated; a table and two pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import assets
from ..evaluation.compare import Method, MethodResult, compare
from ..evaluation.plots import StepPanel, method_grid, step_errors
from ..forecasters import plan_of
from ..plans import schedule
from ..plans.plan import Plan
from ..plans.storage import replace_file

FORECASTERS = ("reuse", "taylor-1", "taylor-2")
FITTED = "lesa.fit"
# What the grid shows at the smallest budget, each with a word of explanation.
_EXPLAINED = {
    "fewer steps": "the sampler with {computed} steps",
    "taylor-1": "linear extrapolation",
    "lesa": "the paper's predictor",
    FITTED: "fitted schedule and weights",
}
_COLUMNS, _AMPLIFY = 8, 20


def methods(lesa_plans: Sequence[tuple[int, Plan]], fitted: Sequence[Plan] = (), site: str = "hidden") -> list[Method]:
    """The full request, fewer Euler steps, every forecaster on the paper's schedule of each interval, fitted plans.

    Args:
        lesa_plans: (interval, LESA plan) pairs.
        fitted: plans of `lesa.fit`.
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
    return chosen + [Method(FITTED, plan, total) for plan in fitted]


def demo(folder: str | Path, prompts: int = 5, device: str = "cpu") -> list[dict[str, Any]]:
    """Run the demo and write results.json, grid.png and steps.png.

    Args:
        folder: where the files go.
        prompts: held-out captions, 2 to 64; the first one warms up and is not timed.
        device: "cpu" or a CUDA device.

    Returns:
        The rows of the table.
    """
    captions, seeds = assets.held_out_prompts(), assets.held_out_seeds()
    if not 2 <= prompts <= len(captions):
        raise ValueError(f"prompts={prompts}: expected 2 to {len(captions)}")
    plans = [(interval, Plan.load(assets.plan_path(interval))) for interval in assets.INTERVALS]
    fitted = [Plan.load(assets.fitted_path(plan.budget)) for _, plan in plans]
    pipe = assets.load(device)
    results = compare(pipe, methods(plans, fitted), captions[:prompts], seeds[:prompts], assets.REQUEST)
    rows = [result.row(results[0]) for result in results]
    folder = Path(folder)
    replace_file(folder / "results.json", json.dumps(rows, indent=1).encode())
    method_grid(folder / "grid.png", grid_rows(results), captions[: min(prompts, _COLUMNS)], amplify=_AMPLIFY)
    step_errors(folder / "steps.png", panels(results, plans, fitted), ylabel="relative error of the latents")
    return rows


def grid_rows(results: Sequence[MethodResult]) -> list[tuple[str, list[np.ndarray]]]:
    """The full request, and at the smallest budget what tells most: fewer steps, taylor-1, lesa, lesa.fit."""
    full = results[0]
    smallest = min(result.method.computed for result in results)
    at_smallest = [r for r in results if r.method.computed == smallest and r.method.name in _EXPLAINED]
    return [(label(result, full), list(result.images[:_COLUMNS])) for result in (full, *at_smallest)]


def label(result: MethodResult, full: MethodResult) -> str:
    """Name, computed steps and figures of one row of the grid."""
    row, total = result.row(full), full.method.num_steps
    if result is full:
        return f"{row['method']}\nall {total} steps computed"
    lines = [row["method"], _EXPLAINED[row["method"]].format(**row)]
    if result.method.plan is not None:
        lines.append(f"{row['computed']} of {total} steps computed")
    return "\n".join([*lines, f"{row['speedup']:.2f}× faster, {row['psnr']:.1f} dB PSNR"])


def panels(
    results: Sequence[MethodResult], plans: Sequence[tuple[int, Plan]], fitted: Sequence[Plan] = ()
) -> list[StepPanel]:
    """One column of the steps picture for every interval, and the fitted plan with as many computed steps."""
    columns = []
    own = {plan.budget: plan for plan in fitted}
    for interval, plan in plans:
        of_interval = [
            r
            for r in results
            if r.method.interval == interval or (r.method.name == FITTED and r.method.computed == plan.budget)
        ]
        alphas = plan.training["alphas"]["*"]
        columns.append(
            StepPanel(
                title=f"N = {interval}: {plan.budget} of {plan.num_steps} computed",
                sigmas=plan.sigmas,
                errors={r.method.name: list(r.step_errors) for r in of_interval if r.step_errors is not None},
                computed={"lesa": plan.computed} | ({FITTED: own[plan.budget].computed} if plan.budget in own else {}),
                alphas={"lesa": [(step, alpha) for step, alpha in enumerate(alphas) if alpha is not None]},
                stages=plan.stages,
            )
        )
    return columns


def headline(rows: Sequence[dict[str, Any]]) -> str:
    """The fitted plan of the fewest computed steps beside the paper's of the most, in one sentence."""
    fitted = min((row for row in rows if row["method"] == FITTED), key=lambda row: row["computed"])
    paper = max((row for row in rows if row["method"] == "lesa"), key=lambda row: row["computed"])
    return (
        f"lesa.fit, {fitted['computed']} of 50 steps computed: {fitted['psnr']:.1f} dB at {fitted['speedup']:.1f}x; "
        f"the paper's schedule with {paper['computed']}: {paper['psnr']:.1f} dB at {paper['speedup']:.1f}x"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'method':<12} {'N':>3} {'computed':>8} {'FLOPs':>7} {'speed':>7} {'PSNR':>7} {'SSIM':>6}"]
    for row in rows:
        interval = "" if row["interval"] is None else row["interval"]
        speed = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        quality = ("", "") if row["psnr"] is None else (f"{row['psnr']:.2f}", f"{row['ssim']:.4f}")
        flops = f"{row['flops_speedup']:.2f}x"
        start = f"{row['method']:<12} {interval:>3} {row['computed']:>8} {flops:>7} {speed:>7}"
        lines.append(f"{start} {quality[0]:>7} {quality[1]:>6}")
    return "\n".join(lines)
