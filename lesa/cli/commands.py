"""What the commands do; `lesa.cli.main` has their options."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, assets
from ..plans.plan import Plan
from ..plans.rows import ANY_CONTEXT
from ..plans.storage import check_folder, replace_file

if TYPE_CHECKING:
    from ..evaluation.compare import BudgetResult


def _load(options: argparse.Namespace) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    device = _device(options.device)
    path = assets.PIPELINE if options.pipeline == assets.PIPELINE.name else options.pipeline
    try:
        pipe = DiffusionPipeline.from_pretrained(path, **{_dtype_name(): getattr(torch, options.dtype)}).to(device)
    except (OSError, ValueError) as error:
        raise ValueError(f"--pipeline {options.pipeline}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _dtype_name() -> str:
    """The name of the dtype argument of `DiffusionPipeline.from_pretrained`, which its signature does not tell."""
    import diffusers

    major, minor = (int(number) for number in diffusers.__version__.split(".")[:2])
    # 0.40 renamed it and warns of the old name; earlier versions ignore the new one
    return "dtype" if (major, minor) >= (0, 40) else "torch_dtype"


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: expected cpu, cuda or e.g. cuda:1") from error
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    return name


def _request(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    if steps < 1:
        raise ValueError(f"--steps {steps}: expected at least 1")
    names = ("height", "width", "guidance_scale", "true_cfg_scale", "negative_prompt", "max_sequence_length")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{_option(name)} {value}: expected a finite number")
    defaults = assets.REQUEST if options.pipeline == assets.PIPELINE.name else {}
    return {**defaults, **given, "num_inference_steps": steps}


def demo(options: argparse.Namespace) -> int:
    """Compare methods on the bundled pipeline, without and with guidance: results.json, grid.png and steps.png."""
    from ..evaluation import compare, plots

    captions, seeds = assets.held_out_prompts(), assets.held_out_seeds()
    if not 2 <= options.prompts <= len(captions):
        raise ValueError(f"--prompts {options.prompts}: expected 2 to {len(captions)}; the first one only warms up")
    check_folder(options.out, "--out")
    captions, seeds = captions[: options.prompts], seeds[: options.prompts]
    plans = [(interval, Plan.load(assets.plan_path(interval))) for interval in assets.INTERVALS]
    fitted = [Plan.load(assets.fitted_path(plan.budget)) for _, plan in plans]
    guided_fit = [Plan.load(assets.guided_path())]
    pipe = assets.load(_device(options.device))
    methods, guided_methods = compare.demo_methods(plans, fitted), compare.demo_methods(plans[-1:], guided_fit, True)
    plain = compare.compare(pipe, methods, captions, seeds, assets.REQUEST)
    guided = compare.compare(pipe, guided_methods, captions, seeds, {**assets.REQUEST, **assets.GUIDANCE})
    parts = {"without guidance": plain, "with true_cfg_scale=3": guided}
    rows = [{"requests": name, **result.row(part[0])} for name, part in parts.items() for result in part]
    replace_file(options.out / "results.json", json.dumps(rows, indent=1).encode())
    grid, shown = compare.demo_grid_rows(guided), captions[: compare.DEMO_COLUMNS]
    plots.method_grid(options.out / "grid.png", grid, shown, amplify=compare.DEMO_AMPLIFY)
    panels = compare.demo_panels(plain, plans)
    plots.step_errors(options.out / "steps.png", panels, ylabel="relative error of the latents")
    for name in parts:
        part = [row for row in rows if row["requests"] == name]
        print(f"\nRequests {name}:\n{compare.demo_table(part)}\n\n{compare.demo_headline(part)}")
    print(f"\nresults.json, grid.png (with guidance) and steps.png (without) are in {options.out}/")
    return 0


def fit(options: argparse.Namespace) -> int:
    """Fit plans to a pipeline."""
    from ..evaluation.compare import budget_results, frontier_table, smallest_budget
    from ..fitting import arguments
    from ..fitting import fit as fitting
    from ..models.pipeline import read_prompts

    # all options are checked before a model is loaded
    check_folder(options.out, "--out")
    prompts, request, budgets = read_prompts(options.prompts), _request(options, options.steps), _budgets(options)
    if options.batch < 1:
        raise ValueError(f"--batch {options.batch}: expected at least 1")
    if options.held_out is not None and not 0 <= options.held_out < len(prompts):
        raise ValueError(
            f"--held-out {options.held_out}: expected 0 to {len(prompts) - 1}, one of the prompts is fitted to"
        )
    candidates = options.candidate or ()
    arguments.check_budgets(arguments.read_candidates(candidates, options.effort), budgets)
    more = {name: getattr(options, name) for name in ("effort", "held_out", "batch", "seed")}
    plans = fitting.fit(
        _load(options), prompts, budget=budgets, request=request, candidates=candidates, folder=options.out, **more
    )
    results = budget_results(plans)
    if options.frontier:
        _write_frontier(options.out, results)
    print(frontier_table(results, options.out))
    if options.frontier:
        print(f"\nfrontier.json and frontier.png are in {options.out}/")
    if options.target_psnr is not None or options.target_ssim is not None:
        try:
            chosen = smallest_budget(results, options.target_psnr, options.target_ssim)
        except ValueError as error:  # not of bad input: the plans are there
            print(f"lesa fit: {error}", file=sys.stderr)
            return 1
        _write_frontier(options.out, results, chosen)
        print(f"smallest budget that reaches the target: {chosen}")
    return 0


def _write_frontier(folder: Path, results: Sequence[BudgetResult], chosen: int | None = None) -> None:
    """Write frontier.json, a list of `BudgetResult` as objects, and frontier.png, which marks `chosen`."""
    from ..evaluation.plan_plots import frontier_figure
    from ..evaluation.plots import write_png

    replace_file(folder / "frontier.json", json.dumps([asdict(result) for result in results], indent=1).encode())
    write_png(frontier_figure(results, chosen), folder / "frontier.png")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _budgets(options: argparse.Namespace) -> list[int]:
    """The budgets to fit, the smallest first, once the targets are checked."""
    from ..evaluation.compare import budgets_below

    for name in ("target_psnr", "target_ssim"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{_option(name)} {value:g}: expected a number above 0")
        if value is not None and not options.frontier:
            raise ValueError(f"{_option(name)} {value:g} picks a budget of a frontier: add --frontier")
    if options.target_ssim is not None and options.target_ssim > 1:
        raise ValueError(f"--target-ssim {options.target_ssim:g}: expected at most 1, the SSIM of equal pictures")
    budgets = sorted(set(options.budget or ()))
    _check_budgets(budgets)
    if not budgets and not options.frontier:
        raise ValueError("--budget is missing: give the number of computed steps, or --frontier for many of them")
    return budgets or budgets_below(options.steps)


def train(options: argparse.Namespace) -> int:
    """Train the paper's predictors on a pipeline."""
    from ..models.pipeline import read_prompts
    from ..plans import schedule
    from ..plans.schedule import paper_stages
    from ..training.stages import TrainingConfig
    from ..training.train import train as run_training

    # all options are checked before a model is loaded
    check_folder(options.out, "--out")
    prompts = read_prompts(options.prompts)
    config = TrainingConfig(batch=options.batch, seed=options.seed)
    request, stages = _request(options, options.steps), paper_stages(*options.cuts)
    for interval in options.intervals:
        schedule.paper(options.steps, interval)
    plans, losses = run_training(
        _load(options),
        prompts,
        options.out,
        request=request,
        intervals=options.intervals,
        site=options.site,
        config=config,
        predictor={"stages": stages},
        calibration=0 if options.no_calibration else 16,
    )
    for interval, path in plans.items():
        print(f"N = {interval}: {path}")
    print(f"loss curves: {_draw_losses(options.out, losses)}")
    return 0


def _draw_losses(folder: Path, losses: Mapping[str, Mapping[str, Sequence[float]]]) -> Path:
    """Draw {training stage: {context: losses}} into losses.png."""
    from ..evaluation.plots import loss_curves

    curves = {
        stage if context == ANY_CONTEXT else f"{stage}, {context}": values
        for stage, by_context in losses.items()
        for context, values in by_context.items()
        if values
    }
    return loss_curves(folder / "losses.png", curves, columns=2 if len(curves) == 4 else 3)


def _check_budgets(budgets: Sequence[int]) -> None:
    if budgets and min(budgets) < 1:
        raise ValueError(f"--budget {min(budgets)}: expected at least 1 computed step")


def generate(options: argparse.Namespace) -> int:
    """Make pictures."""
    from .. import api
    from ..models.pipeline import run

    if options.plan is None and (options.budget is not None or options.guard is not None):
        raise ValueError("--budget and --guard need a plan: name one with --plan")
    _check_budgets([] if options.budget is None else [options.budget])
    plan = api.source_of(options.plan, options.budget) if options.plan else None
    if plan:
        api.check_adaptable(plan, options.budget)
    steps = options.steps if options.steps is not None else plan.num_steps if plan else 50
    request = _request(options, steps)
    check_folder(options.out, "--out")
    pipe = _load(options)
    if plan:
        api.enable(pipe, plan, budget=options.budget, guard=options.guard or "warn")
    pipe.set_progress_bar_config(disable=False)
    seeds = range(options.seed, options.seed + len(options.prompt))
    results = run(pipe, options.prompt, list(seeds), request, output_type="pil", return_dict=False)[0]
    options.out.mkdir(parents=True, exist_ok=True)
    for prompt, seed, result in zip(options.prompt, seeds, results, strict=True):
        frames = result if isinstance(result, list) else [result]
        path = _free(
            options.out, _name(prompt, seed, options.plan, options.budget), "png" if len(frames) == 1 else "gif"
        )
        frames[0].save(path, **({"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}))
        print(path)
    if plan:
        print(api.stats(pipe))
    return 0


def _name(prompt: str, seed: int, plan: str | None, budget: int | None) -> str:
    """A picture's name: its prompt and seed, the plan's file, folder or repository, and the budget."""
    words = "".join(c if c.isalnum() else "-" for c in prompt)[:60]
    stem = "" if plan is None else f"-{Path(plan).resolve().name.removesuffix('.safetensors')}"
    return f"{words}-{seed}{stem}{'' if budget is None else f'-budget-{budget}'}"


def _free(folder: Path, name: str, suffix: str) -> Path:
    """The first path that does not exist yet: the name alone, or with a number behind it."""
    paths = (folder / f"{name}{number}.{suffix}" for number in chain([""], (f"-{i}" for i in count(2))))
    return next(path for path in paths if not path.exists())


def info(options: argparse.Namespace) -> int:
    """Describe a plan, or the backends of this machine."""
    if options.plan is None:
        if options.out is not None:
            raise ValueError(f"--out {str(options.out)!r}: name the plan to draw")
        from .. import ops

        print(f"lesa {__version__}")
        for name, state in ops.describe().items():
            print(f"{name:<8}{state}")
        return 0
    if options.out is not None:
        if options.out.suffix.lower() != ".png" or options.out.is_dir():
            raise ValueError(f"--out {str(options.out)!r}: expected a file name that ends in .png")
        check_folder(options.out.parent, "--out")
    plan = Plan.from_pretrained(options.plan)
    print(plan.summary())
    if options.out is not None:
        print(f"picture      {plan.plot(options.out)}")
    return 0
