"""The command line: `lesa demo`, `lesa train`, `lesa generate`, `lesa info`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__, ops
from .plan import Plan

_BUNDLED = "emoji-flux"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can mend are printed in one line."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except ImportError as error:
        print(f"lesa {options.name}: {error}; pip install 'lesa[demo]' brings what this command needs", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        if options.debug:
            raise
        print(f"lesa {options.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"lesa {options.name}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lesa", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="name", required=True)

    demo = commands.add_parser("demo", help="compare methods on the bundled pipeline; writes a table and pictures")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder of the files (default: %(default)s)")
    demo.add_argument("--prompts", type=int, default=5, help="held-out captions, 2 to 64 (default: %(default)s)")
    demo.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    demo.set_defaults(command=_demo)

    train = commands.add_parser("train", help="record a pipeline, train predictors in both stages, write plans")
    _add_pipeline(train)
    train.add_argument("--prompts", type=Path, required=True, help="text file with one prompt a line")
    train.add_argument("--out", type=Path, required=True, help="folder of the recording, predictors and plans")
    train.add_argument("--steps", type=int, default=50, help="steps of a full request (default: %(default)s)")
    train.add_argument("--intervals", type=int, nargs="+", default=[5, 7, 10], help="N of the paper's schedules")
    train.add_argument("--site", choices=("hidden", "output"), default="hidden", help="default: %(default)s")
    train.add_argument("--cuts", type=float, nargs=2, default=[0.9, 0.5], help="sigmas between the stages")
    train.add_argument("--batch", type=int, default=1, help="prompts in one request (default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    train.add_argument("--no-calibration", action="store_true", help="stop after the paper's two stages")
    train.set_defaults(command=_train)

    generate = commands.add_parser("generate", help="make pictures, with or without a plan")
    _add_pipeline(generate)
    generate.add_argument("prompt", nargs="+", help="one or more prompts")
    generate.add_argument("--plan", type=Path, help="plan file; without one every step is computed")
    generate.add_argument("--steps", type=int, help="default: the plan's, or 50")
    generate.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    generate.add_argument("--out", type=Path, default=Path("."), help="folder of the pictures")
    generate.set_defaults(command=_generate)

    info = commands.add_parser("info", help="say what a plan holds, or without one, which backends are here")
    info.add_argument("plan", type=Path, nargs="?")
    info.set_defaults(command=_info)
    return parser


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pipeline",
        default=_BUNDLED,
        help="folder or hub name of a diffusers pipeline (default: the bundled %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    for name, kind in (("height", int), ("width", int), ("guidance-scale", float), ("true-cfg-scale", float)):
        parser.add_argument(f"--{name}", type=kind, help=f"{name.replace('-', '_')} of the pipeline call")
    parser.add_argument("--negative-prompt", help="negative_prompt of the pipeline call")
    parser.add_argument("--max-sequence-length", type=int, help="max_sequence_length of the pipeline call")


def _load(options: argparse.Namespace) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from . import assets

    _check_device(options.device)
    path = assets.PIPELINE if options.pipeline == _BUNDLED else options.pipeline
    pipe = DiffusionPipeline.from_pretrained(path, torch_dtype=getattr(torch, options.dtype)).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_device(device: str) -> None:
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch {torch.__version__} finds no CUDA device; use --device cpu")


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file: give a folder")


def _request(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    from . import assets

    if steps < 1:
        raise ValueError(f"--steps {steps}: expected at least 1")
    names = ("height", "width", "guidance_scale", "true_cfg_scale", "negative_prompt", "max_sequence_length")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    defaults = assets.REQUEST if options.pipeline == _BUNDLED else {}
    return {**defaults, **given, "num_inference_steps": steps}


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo, table

    _check_out(options.out)
    _check_device(options.device)
    rows = demo(options.out, options.prompts, options.device)
    print(f"\n{table(rows)}\n\nresults.json, grid.png and steps.png are in {options.out}/")
    return 0


def _train(options: argparse.Namespace) -> int:
    from . import schedule
    from .fitting import train
    from .requests import read_prompts
    from .routing import paper_stages
    from .training import TrainingConfig

    # What can be wrong with the options is found before a model is loaded and recorded.
    _check_out(options.out)
    prompts = read_prompts(options.prompts)
    config = TrainingConfig(batch=options.batch, seed=options.seed)
    request, stages = _request(options, options.steps), paper_stages(*options.cuts)
    for interval in options.intervals:
        schedule.paper(options.steps, interval)
    plans = train(
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


def _generate(options: argparse.Namespace) -> int:
    from . import api
    from .requests import run

    plan = Plan.load(options.plan) if options.plan else None
    steps = options.steps if options.steps is not None else plan.num_steps if plan else 50
    request = _request(options, steps)
    _check_out(options.out)
    pipe = _load(options)
    if plan:
        api.enable(pipe, plan)
    pipe.set_progress_bar_config(disable=False)
    seeds = range(options.seed, options.seed + len(options.prompt))
    results = run(pipe, options.prompt, list(seeds), request, output_type="pil", return_dict=False)[0]
    options.out.mkdir(parents=True, exist_ok=True)
    for prompt, seed, result in zip(options.prompt, seeds, results, strict=True):
        name = "".join(c if c.isalnum() else "-" for c in prompt)[:60]
        frames = result if isinstance(result, list) else [result]
        path = options.out / f"{name}-{seed}.{'png' if len(frames) == 1 else 'gif'}"
        frames[0].save(path, **({"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}))
        print(path)
    if plan:
        print(api.stats(pipe))
    return 0


def _info(options: argparse.Namespace) -> int:
    if options.plan is not None:
        print(describe(Plan.load(options.plan)))
        return 0
    print(f"lesa {__version__}")
    for name, state in ops.describe().items():
        print(f"{name:<8}{state}")
    return 0


def describe(plan: Plan) -> str:
    """A plan in words, for a terminal."""
    lines = [
        f"forecaster   {plan.forecaster}, site {plan.site}, contexts {', '.join(plan.rows) or 'none'}",
        f"schedule     {plan.budget} of {plan.num_steps} steps computed: {' '.join(map(str, plan.computed))}",
        f"sigmas       {plan.sigmas[0]:.4g} to {plan.sigmas[-1]:.4g}",
        f"denoiser     {plan.denoiser or 'any'}, configuration {plan.config_hash or 'any'}",
        f"history      {plan.capacity} features a context",
    ]
    if plan.stages:
        stages = ", ".join(f"{s.name} (window {s.window}, sigma > {s.low:g})" for s in plan.stages)
        lines.append(f"stages       {stages}")
    figures = {name: value for name, value in plan.training.items() if name != "alphas"}
    if figures:
        lines.append(f"training     {figures}")
    lines.append(f"written by   lesa {plan.library_version or '(not saved yet)'}")
    return "\n".join(lines)
