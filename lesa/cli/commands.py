"""What the commands of the command line do; see `lesa.cli` for their options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from .. import __version__, assets, ops
from ..plans.files import check_folder
from ..plans.plan import Plan


def _load(options: argparse.Namespace) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    device = _device(options.device)
    path = assets.PIPELINE if options.pipeline == assets.PIPELINE.name else options.pipeline
    pipe = DiffusionPipeline.from_pretrained(path, **{_dtype_name(): getattr(torch, options.dtype)}).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _dtype_name() -> str:
    """What `DiffusionPipeline.from_pretrained` calls the dtype, which its signature does not tell."""
    import diffusers

    major, minor = (int(number) for number in diffusers.__version__.split(".")[:2])
    # 0.40 renamed it and warns of the old name; earlier versions pass over the new one
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
    """Compare methods on the bundled pipeline."""
    from . import demo as comparison

    check_folder(options.out, "--out")
    rows = comparison.demo(options.out, options.prompts, _device(options.device))
    print(f"\n{comparison.table(rows)}\n\n{comparison.headline(rows)}\n")
    print(f"results.json, grid.png and steps.png are in {options.out}/")
    return 0


def fit(options: argparse.Namespace) -> int:
    """Fit plans to a pipeline."""
    from ..evaluation import frontier
    from ..fitting import arguments
    from ..fitting import fit as fitting
    from ..models.pipeline import read_prompts

    # What can be wrong with the options is found before a model is loaded and recorded.
    check_folder(options.out, "--out")
    prompts, request, goal = read_prompts(options.prompts), _request(options, options.steps), _goal(options)
    if options.batch < 1:
        raise ValueError(f"--batch {options.batch}: expected at least 1")
    if options.held_out is not None and not 0 <= options.held_out < len(prompts):
        raise ValueError(
            f"--held-out {options.held_out}: expected 0 to {len(prompts) - 1}, one of the prompts is fitted to"
        )
    arguments.check_budgets(arguments.read_candidates(options.candidate or (), options.effort), goal["budget"])
    names = ("effort", "held_out", "batch", "seed")
    more = {
        "request": request,
        "candidates": options.candidate or (),
        **{name: getattr(options, name) for name in names},
    }
    if not options.frontier:
        made = fitting.fit(_load(options), prompts, folder=options.out, **goal, **more)
        plans = made if isinstance(made, dict) else {made.budget: made}
        print(frontier.table(frontier.entries_of(plans), options.out))
        return 0
    entries = frontier.frontier(_load(options), prompts, options.out, budgets=goal["budget"], **more)
    print(f"{frontier.table(entries, options.out)}\n\nfrontier.json and frontier.png are in {options.out}/")
    if options.target_psnr is not None or options.target_ssim is not None:
        chosen = frontier.smallest(entries, options.target_psnr, options.target_ssim)
        frontier.write(options.out, entries, chosen)
        print(f"smallest budget for what is wished: {chosen}")
    return 0


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _goal(options: argparse.Namespace) -> dict[str, Any]:
    """What to fit, as `lesa.fit` takes it."""
    from ..evaluation.frontier import budgets_below

    for name, low in (("target_psnr", 0), ("target_ssim", 0)):
        value = getattr(options, name)
        if value is not None and not low < value < math.inf:
            raise ValueError(f"{_option(name)} {value:g}: expected a number above {low}")
    if options.target_ssim is not None and options.target_ssim > 1:
        raise ValueError(f"--target-ssim {options.target_ssim:g}: expected at most 1, that of the same picture")
    budgets = sorted(set(options.budget or ()))
    _check_budgets(budgets)
    if options.frontier:
        return {"budget": budgets or budgets_below(options.steps)}
    for name in ("target_psnr", "target_ssim"):
        if getattr(options, name) is not None:
            raise ValueError(f"{_option(name)} {getattr(options, name):g} is chosen on a frontier: add --frontier")
    if not budgets:
        raise ValueError("give --budget or --frontier")
    return {"budget": budgets}


def train(options: argparse.Namespace) -> int:
    """Train the paper's predictors on a pipeline."""
    from ..models.pipeline import read_prompts
    from ..plans import schedule
    from ..plans.schedule import paper_stages
    from ..training import fitting
    from ..training.training import TrainingConfig

    # What can be wrong with the options is found before a model is loaded and recorded.
    check_folder(options.out, "--out")
    prompts = read_prompts(options.prompts)
    config = TrainingConfig(batch=options.batch, seed=options.seed)
    request, stages = _request(options, options.steps), paper_stages(*options.cuts)
    for interval in options.intervals:
        schedule.paper(options.steps, interval)
    plans = fitting.train(
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
    print(f"loss curves: {options.out / 'losses.png'}")
    return 0


def _check_budgets(budgets: Sequence[int]) -> None:
    if budgets and min(budgets) < 1:
        raise ValueError(f"--budget {min(budgets)}: expected at least 1 computed step")


def generate(options: argparse.Namespace) -> int:
    """Make pictures."""
    from .. import api
    from ..models.pipeline import run

    if options.plan is None and (options.budget is not None or options.guard is not None):
        raise ValueError("--budget and --guard are of a plan: name one with --plan")
    _check_budgets([] if options.budget is None else [options.budget])
    plan = api.source_of(options.plan, options.budget) if options.plan else None
    if plan:
        api.check_budget(plan, options.budget)
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
    """A path that is not taken: a number is put behind the name where it is."""
    paths = (folder / f"{name}{number}.{suffix}" for number in chain([""], (f"-{i}" for i in count(2))))
    return next(path for path in paths if not path.exists())


def info(options: argparse.Namespace) -> int:
    """Say what a plan holds, or which backends are here."""
    if options.plan is None:
        if options.out is not None:
            raise ValueError(f"--out {str(options.out)!r}: name the plan to draw")
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
        from ..evaluation.planview import plan_picture

        print(f"picture      {plan_picture(options.out, plan)}")
    return 0
