"""Does one 50-step recording serve any request? Adapted plans against plans made in the request itself.

    python -m benchmarks.transfer --results FILE.csv [--device cuda] [--cases euler-20 heun ...] [--seconds 500]

The requests: Euler at 20, 28, 35, 50 and 100 steps, true_cfg_scale 3 at 28, Heun, DPM-Solver++ and UniPC in flow form
at 50 and 28, image-to-image of strength 0.6 at 50, from the picture of the same caption and from another caption's.
DDIM, EulerDiscrete and EulerAncestral do not apply to a flow model: what errors do under them is checked by number in
tests/test_response.py. For each request, a row for

- "statistics of 50 steps", gathered at 50 Euler steps at the same guidance, and "plan of 50 steps", which lesa.fit made
  there by its default effort: both enabled as they are, and adapted to the request;
- "native statistics", "native quick" and "native default": gathered, and fitted, in the request itself.

Eight fitting prompts each. PSNR is of the images of held-out captions, all in one pipeline call, against the full
request of the same kind from the same noise. Everything runs by lesa.enable, with guard="off": the guard would compute
more steps. `build_ms` is what the driver took to start the request, where its plan was adapted; `cold_ms` that
of the request before it, the first after lesa.enable, of one caption and one step more (only in the first such row of a
process are one-time costs in it).

Rows are written as they are measured; those of the same hardware, commit and captions are not measured again.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import lesa
from lesa import assets, metrics
from lesa.models import hooks
from lesa.planner.statistics import Statistics
from lesa.plans.plan import Plan
from lesa.plans.rows import PlanError
from lesa.runtime.clock import Request
from lesa.runtime.driver import Driver

from . import captions
from .transfer_cases import CASES, Case, Pipelines

IDENTITY = ("case", "steps", "computed", "plan")
FIGURES = ("psnr", "psnr_sem", "build_ms", "cold_ms")
KNOWN = 50  # steps of the one recording
STATISTICS, PLAN = f"statistics of {KNOWN} steps", f"plan of {KNOWN} steps"
NATIVE = ("native statistics", "native quick", "native default")
PLANS = (STATISTICS, PLAN, *NATIVE)
PAIRS = ((STATISTICS, NATIVE[0]), (PLAN, NATIVE[1]), (PLAN, NATIVE[2]))


class Bench:
    """One pipeline, what was recorded of it, and what its plans are worth.

    Args:
        device: of the pipeline.
        fitting: how many prompts are gathered and fitted, in one pipeline call.
        shown: how many held-out captions are measured.
    """

    def __init__(self, device: str, fitting: int, shown: int) -> None:
        self._pipelines, self._fitting, self._shown = Pipelines(device, fitting, shown), fitting, shown
        self._full: tuple[Case, np.ndarray] | None = None
        # One recording, one plan a budget: kept for all cases.
        self._known = functools.cache(self._gathered)
        self._known_plan = functools.cache(self._fitted)

    def source(self, name: str, case: Case, budget: int) -> Plan | Statistics:
        """What is enabled for one of `PLANS`."""
        known = Case("euler", KNOWN, guidance=case.guidance)
        if name == STATISTICS:
            return self._known(known)
        if name == PLAN:
            return self._known_plan(known, budget, "default")
        return self._gathered(case) if name == NATIVE[0] else self._fitted(case, budget, name.split()[1])

    def measure(self, case: Case, budget: int, source: Plan | Statistics, timed: bool) -> tuple[np.ndarray, list[str]]:
        """PSNR of each caption, and the cells of the times.

        Raises:
            PlanError: what is enabled does not serve the request.
        """
        full = self._reference(case)
        pipe = self._pipelines.of(case)
        lesa.enable(pipe, source, budget=budget if isinstance(source, Statistics) else None, guard="off")
        try:
            times = _watch(hooks.attached(pipe).driver)  # type: ignore[union-attr]
            if timed:
                captions.images(pipe, 1, case.request(1))
            before = _computed(pipe)
            made = captions.images(pipe, self._shown, case.request())
            computed = (_computed(pipe) - before) / (1 if case.guidance == 1 else 2)
        finally:
            lesa.disable(pipe)
        if computed != budget:
            raise PlanError(f"{computed:g} steps were computed, not {budget}")
        return metrics.psnr(made, full), [f"{times[1]:.1f}", f"{times[0]:.1f}"] if timed else ["", ""]

    def _reference(self, case: Case) -> np.ndarray:
        if self._full is None or self._full[0] != case:
            self._full = case, captions.images(self._pipelines.of(case), self._shown, case.request())
        return self._full[1]

    def _gathered(self, case: Case) -> Statistics:
        prompts = assets.fitting_prompts()[: self._fitting]
        return Statistics.gather(self._pipelines.of(case), prompts, request=case.request(), batch=self._fitting)

    def _fitted(self, case: Case, budget: int, effort: str) -> Plan:
        prompts = assets.fitting_prompts()[: self._fitting]
        pipe = self._pipelines.of(case)
        return lesa.fit(pipe, prompts, budget=budget, request=case.request(), effort=effort, batch=self._fitting)


def _watch(driver: Driver) -> list[float]:
    """The milliseconds of each start of a request, in which plans are adapted."""
    times: list[float] = []
    begin: Callable[[Request], None] = driver.begin

    def timed(request: Request) -> None:
        start = time.perf_counter()
        begin(request)
        times.append(1e3 * (time.perf_counter() - start))

    driver.begin = timed  # type: ignore[method-assign]
    return times


def _computed(pipe: Any) -> int:
    """Denoiser calls computed so far."""
    stats = lesa.stats(pipe)
    return stats.computed + sum(stats.refused.values())


def chosen(names: Iterable[str] | None) -> list[Case]:
    """The cases of these names or labels; all for None.

    Raises:
        ValueError: a name is of none.
    """
    if names is None:
        return list(CASES)
    wanted = list(names)
    known = {name for case in CASES for name in (case.name, case.label)}
    if not known.issuperset(wanted):
        raise ValueError(f"cases={wanted}: expected some of {sorted(known)}")
    return [case for case in CASES if {case.name, case.label} & set(wanted)]


def measure(options: argparse.Namespace, sheet: captions.Sheet) -> tuple[dict[tuple, np.ndarray], list[str]]:
    """Measure what is missing.

    Returns:
        PSNR of each caption by a row's identity, and what could not be measured.
    """
    shown = options.captions or captions.count(options.device)
    bench = Bench(options.device, options.fitting, shown)
    found: dict[tuple, np.ndarray] = {}
    failed = []
    for case in chosen(options.cases):
        for row in [(case.name, case.steps, budget, name) for budget in options.budgets for name in options.plans]:
            if not sheet.wants(*row):
                continue
            budget, name = row[2:]
            try:
                source = bench.source(name, case, budget)
                psnr, times = bench.measure(case, budget, source, name in (STATISTICS, PLAN))
            except PlanError as error:
                print(*row, f"skipped: {error}", sep=", ", flush=True)
            except Exception:  # the other rows are worth their time all the same
                failed.append(f"{row}: {traceback.format_exc()}")
                print(failed[-1], flush=True)
            else:
                found[tuple(map(str, row))] = psnr
                sheet.add(row, [*captions.quality(psnr), *times])
    return found, failed


def table(rows: Sequence[Mapping[str, str]], found: Mapping[tuple, np.ndarray]) -> str:
    """For every case the plans of 50 steps minus native ones, in dB.

    Args:
        rows: of the sheet.
        found: PSNR of each caption by a row's identity, where it is known: for the standard error of a difference.
    """
    by_case: dict[tuple[str, ...], dict[str, Mapping[str, str]]] = {}
    for row in rows:
        by_case.setdefault(tuple(row[name] for name in IDENTITY[:-1]), {})[row["plan"]] = row
    heads = [f"{mine} - {native}" for mine, native in PAIRS]
    lines = ["| case | steps | computed | " + " | ".join([*heads, "build ms"]) + " |", "|---" * (4 + len(PAIRS)) + "|"]
    for case, own in by_case.items():
        cells = []
        for mine, native in PAIRS:
            if mine not in own or native not in own:
                cells.append("")
                continue
            cell = f"{float(own[mine]['psnr']) - float(own[native]['psnr']):+.2f}"
            if {(*case, mine), (*case, native)} <= found.keys():
                error = captions.standard_error(found[(*case, mine)] - found[(*case, native)])
                cell += f" ± {error:.2f}"
            cells.append(f"{cell} ({float(own[mine]['psnr']):.2f} dB)")
        builds = ", ".join(own[name]["build_ms"] for name in (STATISTICS, PLAN) if name in own)
        lines.append("| " + " | ".join([*case, *cells, builds]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, and print the differences."""
    parser = captions.parser(__doc__)
    parser.add_argument("--fitting", type=int, default=8, help="prompts gathered and fitted, in one pipeline call")
    parser.add_argument("--budgets", type=int, nargs="+", default=[8])
    parser.add_argument("--cases", nargs="+", help="some of the names, with or without steps: euler, euler-20, ...")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=PLANS)
    options = parser.parse_args(arguments)
    sheet = captions.sheet(options, IDENTITY, FIGURES)
    found, failed = measure(options, sheet)
    print(table(sheet.rows, found))
    if failed:
        sys.exit(f"{len(failed)} rows failed, see above")


if __name__ == "__main__":
    main()
