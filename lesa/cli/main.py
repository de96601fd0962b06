"""The command line: `lesa demo`, `lesa fit`, `lesa train`, `lesa generate`, `lesa info`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__, assets
from ..plans.rows import LesaWarning
from . import commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; an error is one line.

    Args:
        arguments: of the command line; by default those of this process.

    Returns:
        The exit code: 0, 2 for bad input, 1 for other failures, 130 where the user interrupts.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.name is None:
        parser.print_help()
        return 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _shown(warnings.showwarning)
            status = options.command(options)
            sys.stdout.flush()  # here, where a closed pipe is handled
            return status
    except (
        BrokenPipeError
    ):  # as in `lesa info | head -1`: without a new stdout, Python reports the error again as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:
        print(f"lesa {options.name}: {error}; pip install 'lesa[demo]' brings what this command needs", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        if options.debug:
            raise
        print(f"lesa {options.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        kept = "; run it again with the same --out to continue" if options.name in ("fit", "train") else ""
        print(f"lesa {options.name}: interrupted{kept}", file=sys.stderr)
        return 130


def _shown(usual: Callable[..., None]) -> Callable[..., None]:
    """Shows warnings of lesa without the lines of code they come from."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, LesaWarning):
            bars = sys.modules.get("tqdm")  # its `write` keeps the line off a progress bar
            (bars.tqdm.write if bars else print)(f"lesa: {message}", file=sys.stderr)
        else:
            usual(message, category, *where, **more)

    return show


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lesa", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"lesa {__version__}")
    known = parser.add_subparsers(dest="name", metavar="command")
    demo = known.add_parser("demo", help="compare methods on the bundled pipeline; writes tables and two pictures")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder of the files (default: %(default)s)")
    demo.add_argument("--prompts", type=int, default=5, help="held-out captions, 2 to 64 (default: %(default)s)")
    _add_device(demo)
    demo.set_defaults(command=commands.demo)
    _add_fit(known.add_parser("fit", help="fit plans to a pipeline: a schedule and weights for each budget"))
    _add_train(known.add_parser("train", help="record a pipeline and train the paper's predictors; writes plans"))
    _add_generate(known.add_parser("generate", help="make pictures, with or without a plan"))
    info = known.add_parser("info", help="describe a plan, or without one the backends of this machine")
    info.add_argument("plan", nargs="?", help="plan: a file, a folder or a hub repository owner/name")
    info.add_argument("--out", type=Path, help="also draw the plan into this .png file")
    info.set_defaults(command=commands.info)
    return parser


def _add_fit(fit: argparse.ArgumentParser) -> None:
    _add_pipeline(fit)
    fit.add_argument("--prompts", type=Path, required=True, help="text file with one prompt a line; 8 are enough")
    fit.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the statistics and plans; a budget whose plan is there already is not fitted again",
    )
    fit.add_argument("--steps", type=int, default=50, help="steps of a full request (default: %(default)s)")
    fit.add_argument("--budget", type=int, nargs="+", help="computed steps, one or more numbers")
    fit.add_argument(
        "--frontier",
        action="store_true",
        help="fit budgets 4 to 25, or those of --budget, and draw PSNR against computed steps",
    )
    fit.add_argument(
        "--target-psnr",
        type=float,
        metavar="DB",
        help="with --frontier: pick the smallest budget that reaches it on fitting and on held-out prompts",
    )
    fit.add_argument("--target-ssim", type=float, metavar="SSIM", help="with --frontier: likewise for SSIM")
    fit.add_argument(
        "--effort",
        choices=("quick", "default", "thorough"),
        default="default",
        help="at most the time of about 10, 40 or 300 full requests for each budget (default: %(default)s)",
    )
    fit.add_argument("--held-out", type=int, help="how many prompts, the last ones, are only measured (an eighth)")
    fit.add_argument(
        "--candidate",
        action="append",
        metavar="PLAN",
        help="plan of your own (file, folder or hub repository) to compare: the plan written is never worse on the "
        "fitting prompts; repeat for several",
    )
    fit.add_argument("--batch", type=int, default=1, help="prompts in one request (default: %(default)s)")
    fit.add_argument("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    fit.set_defaults(command=commands.fit)


def _add_train(train: argparse.ArgumentParser) -> None:
    _add_pipeline(train)
    train.add_argument("--prompts", type=Path, required=True, help="text file with one prompt a line")
    train.add_argument("--out", type=Path, required=True, help="folder of the recording, predictors and plans")
    train.add_argument("--steps", type=int, default=50, help="steps of a full request (default: %(default)s)")
    train.add_argument("--intervals", type=int, nargs="+", default=[5, 7, 10], help="N of the schedules (5 7 10)")
    train.add_argument(
        "--site", choices=("hidden", "output"), default="hidden", help="feature that is forecast (default: %(default)s)"
    )
    train.add_argument("--cuts", type=float, nargs=2, default=[0.9, 0.5], help="sigmas between stages (0.9 0.5)")
    train.add_argument("--batch", type=int, default=1, help="prompts in one request (default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    train.add_argument("--no-calibration", action="store_true", help="stop after the paper's two training stages")
    train.set_defaults(command=commands.train)


def _add_generate(generate: argparse.ArgumentParser) -> None:
    _add_pipeline(generate)
    generate.add_argument("prompt", nargs="+", help="one or more prompts")
    generate.add_argument(
        "--plan",
        help="plan (file, folder or hub repository), or statistics with --budget; without it all steps are computed",
    )
    generate.add_argument("--steps", type=int, help="of the request (the plan's, or 50); a fitted plan serves any")
    generate.add_argument("--budget", type=int, help="computed steps, for statistics or to change a fitted plan's own")
    generate.add_argument(
        "--guard",
        choices=("warn", "off"),
        help="warn where forecasts err far more than in fitting (default), or measure nothing",
    )
    generate.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    generate.add_argument("--out", type=Path, default=Path("."), help="folder of the pictures (default: this one)")
    generate.set_defaults(command=commands.generate)


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pipeline",
        default=assets.PIPELINE.name,
        help="folder or hub name of a diffusers pipeline (default: the bundled %(default)s)",
    )
    _add_device(parser)
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="default: %(default)s"
    )
    for name, kind in (("height", int), ("width", int), ("guidance-scale", float), ("true-cfg-scale", float)):
        parser.add_argument(f"--{name}", type=kind, help=f"{name.replace('-', '_')} of the pipeline call")
    parser.add_argument("--negative-prompt", help="negative_prompt of the pipeline call")
    parser.add_argument("--max-sequence-length", type=int, help="max_sequence_length of the pipeline call")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda where torch finds it, else cpu)")


if __name__ == "__main__":
    sys.exit(main())
