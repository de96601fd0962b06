"""The command line: `lesa demo`, `lesa fit`, `lesa train`, `lesa generate`, `lesa info`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from . import __version__, ops
from .describe import describe
from .plan import Plan

_BUNDLED = "emoji-flux"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can mend are printed in one line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.name is None:
        parser.print_help()
        return 0
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
    parser.add_argument("--version", action="version", version=f"lesa {__version__}")
    commands = parser.add_subparsers(dest="name", metavar="command")

    demo = commands.add_parser("demo", help="compare methods on the bundled pipeline; writes a table and pictures")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder of the files (default: %(default)s)")
    demo.add_argument("--prompts", type=int, default=5, help="held-out captions, 2 to 64 (default: %(default)s)")
    _add_device(demo)
    demo.set_defaults(command=_demo)

    fit = commands.add_parser("fit", help="search schedules and learn weights for a pipeline; writes a plan a budget")
    _add_pipeline(fit)
    fit.add_argument("--prompts", type=Path, required=True, help="text file with one prompt a line; 8 suffice")
    fit.add_argument(
        "--out", type=Path, required=True, help="folder of the statistics and plans; a rerun goes on there"
    )
    fit.add_argument("--steps", type=int, default=50, help="steps of a full request (default: %(default)s)")
    fit.add_argument("--budget", type=int, nargs="+", help="computed steps, one or more numbers of them")
    fit.add_argument("--speedup", type=float, help="instead of a budget: how many times fewer steps to compute")
    fit.add_argument("--target-psnr", type=float, help="instead of a budget: the smallest that reaches this many dB")
    fit.add_argument("--target-ssim", type=float, help="with --frontier: the smallest budget that reaches this")
    fit.add_argument("--frontier", action="store_true", help="fit budgets 4 to 25 or --budget; frontier.json and .png")
    fit.add_argument("--effort", choices=("quick", "default", "thorough"), default="default")
    fit.add_argument("--held-out", type=int, help="prompts, the last ones, that are only measured (default: an eighth)")
    fit.add_argument(
        "--candidate",
        action="append",
        metavar="PLAN",
        help="plan of your own (file, folder or hub repository), or a forecaster's name such as taylor-2 or lesa, the "
        "paper's, which is trained; it is run besides; the plan written is never worse on the prompts fitted to; "
        "repeat for several",
    )
    fit.add_argument("--batch", type=int, default=1, help="prompts in one request (default: %(default)s)")
    fit.add_argument("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    fit.set_defaults(command=_fit)

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
    generate.add_argument("--plan", help="plan file, folder with one, or hub repository; without, all is computed")
    generate.add_argument("--steps", type=int, help="default: the plan's, or 50")
    generate.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    generate.add_argument("--out", type=Path, default=Path("."), help="folder of the pictures")
    generate.set_defaults(command=_generate)

    info = commands.add_parser("info", help="say what a plan holds, or without one, which backends are here")
    info.add_argument("plan", nargs="?", help="plan file, folder with one, or hub repository owner/name")
    info.add_argument("--out", type=Path, help="also draw the plan into this .png file")
    info.set_defaults(command=_info)
    return parser


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pipeline",
        default=_BUNDLED,
        help="folder or hub name of a diffusers pipeline (default: the bundled %(default)s)",
    )
    _add_device(parser)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    for name, kind in (("height", int), ("width", int), ("guidance-scale", float), ("true-cfg-scale", float)):
        parser.add_argument(f"--{name}", type=kind, help=f"{name.replace('-', '_')} of the pipeline call")
    parser.add_argument("--negative-prompt", help="negative_prompt of the pipeline call")
    parser.add_argument("--max-sequence-length", type=int, help="max_sequence_length of the pipeline call")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda where torch finds it, else cpu)")


def _load(options: argparse.Namespace) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from . import assets

    device = _device(options.device)
    path = assets.PIPELINE if options.pipeline == _BUNDLED else options.pipeline
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
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    return name


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
    from .demo import demo, headline, table

    _check_out(options.out)
    rows = demo(options.out, options.prompts, _device(options.device))
    print(f"\n{table(rows)}\n\n{headline(rows)}\n\nresults.json, grid.png and steps.png are in {options.out}/")
    return 0


def _fit(options: argparse.Namespace) -> int:
    from . import candidates, frontier, tuning
    from .requests import read_prompts

    # What can be wrong with the options is found before a model is loaded and recorded.
    _check_out(options.out)
    prompts, request, goal = read_prompts(options.prompts), _request(options, options.steps), _goal(options)
    if options.batch < 1:
        raise ValueError(f"--batch {options.batch}: expected at least 1")
    if options.held_out is not None and not 0 <= options.held_out < len(prompts):
        raise ValueError(
            f"--held-out {options.held_out}: expected 0 to {len(prompts) - 1}, one of the prompts is fitted to"
        )
    candidates.read(options.candidate, options.effort, goal.get("budget"))
    names = ("effort", "held_out", "batch", "seed")
    more = {"request": request, "candidates": options.candidate, **{name: getattr(options, name) for name in names}}
    if not options.frontier:
        made = tuning.fit(_load(options), prompts, folder=options.out, **goal, **more)
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


def _goal(options: argparse.Namespace) -> dict[str, Any]:
    """What to fit, as `lesa.fit` takes it."""
    from .frontier import budgets_below

    for name, low in (("speedup", 1), ("target_psnr", 0), ("target_ssim", 0)):
        value = getattr(options, name)
        if value is not None and not low < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: expected a number above {low}")
    budgets = sorted(set(options.budget or ()))
    if budgets and budgets[0] < 1:
        raise ValueError(f"--budget {budgets[0]}: expected at least 1 computed step")
    if options.frontier:
        if options.speedup is not None:
            raise ValueError(f"--speedup {options.speedup:g} names one budget: leave out it or --frontier")
        return {"budget": budgets or budgets_below(options.steps)}
    if options.target_ssim is not None:
        raise ValueError(f"--target-ssim {options.target_ssim:g} is chosen on a frontier: add --frontier")
    goals = {"budget": budgets or None, "speedup": options.speedup, "target_psnr": options.target_psnr}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        raise ValueError("give one of --budget, --speedup and --target-psnr, or --frontier")
    return given


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

    plan = Plan.from_pretrained(options.plan) if options.plan else None
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
        frames = result if isinstance(result, list) else [result]
        path = _free(options.out, _name(prompt, seed, options.plan), "png" if len(frames) == 1 else "gif")
        frames[0].save(path, **({"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}))
        print(path)
    if plan:
        print(api.stats(pipe))
    return 0


def _name(prompt: str, seed: int, plan: str | None) -> str:
    """A picture's name: its prompt and seed, and the plan's file, folder or repository."""
    words = "".join(c if c.isalnum() else "-" for c in prompt)[:60]
    stem = "" if plan is None else f"-{Path(plan).resolve().name.removesuffix('.safetensors')}"
    return f"{words}-{seed}{stem}"


def _free(folder: Path, name: str, suffix: str) -> Path:
    """A path that is not taken: a number is put behind the name where it is."""
    paths = (folder / f"{name}{number}.{suffix}" for number in chain([""], (f"-{i}" for i in count(2))))
    return next(path for path in paths if not path.exists())


def _info(options: argparse.Namespace) -> int:
    if options.plan is None:
        if options.out is not None:
            raise ValueError(f"--out {str(options.out)!r}: name the plan to draw")
        print(f"lesa {__version__}")
        for name, state in ops.describe().items():
            print(f"{name:<8}{state}")
        return 0
    if options.out is not None and (options.out.suffix.lower() != ".png" or options.out.is_dir()):
        raise ValueError(f"--out {str(options.out)!r}: expected a file name that ends in .png")
    plan = Plan.from_pretrained(options.plan)
    print(describe(plan))
    if options.out is not None:
        from .planview import plan_picture

        print(f"picture      {plan_picture(options.out, plan)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
