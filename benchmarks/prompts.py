"""How many prompts a fit needs: fits on 1, 2, 4, 8 and 32 prompts, judged on held-out captions.

    python -m benchmarks.prompts --results FILE.csv [--captions 8] [--budget 10] [--effort quick default]
        [--guidance 1 3] [--seconds 300]

All captions go through one pipeline call, 64 of them on a GPU. A row is written as soon as it is measured, and what is
there of the same hardware, commit and captions is not measured again: the same command goes on.
"""

from __future__ import annotations

import argparse

import lesa
from lesa import assets, metrics
from lesa.runtime.runner import PlanRunner

from . import captions

IDENTITY = ("guidance", "effort", "computed", "prompts")
FIGURES = ("psnr", "psnr_sem", "generations")


def measure(options: argparse.Namespace) -> None:
    """Measure every number of prompts, a row as soon as it is there."""
    shown = options.captions or captions.count(options.device)
    sheet = captions.sheet(options, IDENTITY, FIGURES)
    pipe = captions.load(options.device)
    for guidance in options.guidance:
        request = captions.request(guidance)
        rows = [(guidance, effort, options.budget, n) for effort in options.effort for n in options.prompts]
        if not any(sheet.wants(*row) for row in rows):
            continue
        full = captions.images(pipe, shown, request)
        for row in rows:
            if not sheet.wants(*row):
                continue
            plan = lesa.fit(
                pipe,
                assets.fitting_prompts()[: row[-1]],
                budget=options.budget,
                request=request,
                effort=row[1],
                held_out=0,
                batch=8,
            )
            psnr = metrics.psnr(captions.images(pipe, shown, request, PlanRunner(plan), plan.site), full)
            sheet.add(row, [*captions.quality(psnr), f"{plan.training['generations']:.1f}"])


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and measure."""
    parser = captions.parser(__doc__)
    parser.add_argument("--budget", type=int, default=10)
    parser.add_argument("--effort", nargs="+", default=["quick"])
    parser.add_argument("--guidance", nargs="+", type=int, default=[1], help="1: none")
    parser.add_argument("--prompts", type=int, nargs="+", default=(1, 2, 4, 8, 32))
    measure(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
