"""`lesa demo`: the bundled pipeline in full, with fewer steps, and accelerated; a table and two pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import assets
from ..evaluation.comparison import Method, Outcome, compare
from ..evaluation.report import StepPanel, method_grid, step_errors
from ..forecasters import plan_of
from ..plans import schedule
from ..plans.files import replace_file
from ..plans.plan import Plan

FORECASTERS = ("reuse", "taylor-1", "taylor-2")
FITTED = "lesa.fit"


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
    outcomes = compare(pipe, methods(plans, fitted), captions[:prompts], seeds[:prompts], assets.REQUEST)
    rows = [outcome.row(outcomes[0]) for outcome in outcomes]
    folder = Path(folder)
    replace_file(folder / "results.json", json.dumps(rows, indent=1).encode())
    method_grid(folder / "grid.png", [(label(o, outcomes[0]), list(o.images)) for o in outcomes], captions[:prompts])
    step_errors(folder / "steps.png", panels(outcomes, plans, fitted), ylabel="relative error of the latents")
    return rows


def label(outcome: Outcome, full: Outcome) -> str:
    """Method, computed steps and figures of one row of the grid."""
    row = outcome.row(full)
    lines = [row["method"] if row["interval"] is None else f"{row['method']}, N = {row['interval']}"]
    lines.append(f"{row['computed']} computed")
    if outcome is not full:
        lines.append(f"{row['speedup']:.2f}x, {row['psnr']:.1f} dB")
    return "\n".join(lines)


def panels(
    outcomes: Sequence[Outcome], plans: Sequence[tuple[int, Plan]], fitted: Sequence[Plan] = ()
) -> list[StepPanel]:
    """One column of the steps picture for every interval, and the fitted plan with as many computed steps."""
    columns = []
    own = {plan.budget: plan for plan in fitted}
    for interval, plan in plans:
        of_interval = [
            o
            for o in outcomes
            if o.method.interval == interval or (o.method.name == FITTED and o.method.computed == plan.budget)
        ]
        alphas = plan.training["alphas"]["*"]
        columns.append(
            StepPanel(
                title=f"N = {interval}: {plan.budget} of {plan.num_steps} computed",
                sigmas=plan.sigmas,
                errors={o.method.name: list(o.step_errors) for o in of_interval if o.step_errors is not None},
                computed={"lesa": plan.computed} | ({FITTED: own[plan.budget].computed} if plan.budget in own else {}),
                alphas={"lesa": [(step, alpha) for step, alpha in enumerate(alphas) if alpha is not None]},
                stages=plan.stages,
            )
        )
    return columns


def headline(rows: Sequence[dict[str, Any]]) -> str:
    """What the fitted plans come to, in one sentence."""
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
