"""Fitted plans on emoji-flux against every published rule and against fewer steps of four solvers.

    python -m benchmarks.fitted --work fitted --results fitted.csv --commit $(git rev-parse --short HEAD) --seconds 235
    python -m benchmarks.fitted --table --results benchmarks/results/fitted.csv

Mean PSNR and SSIM of 64 unseen captions against all 50 Euler steps from the same noise, without guidance and at
true_cfg_scale 3. Several processes share the device and write a row as soon as it is measured. Plans that took
long lie in the work folder; the same command goes on from there and from the rows (WORK/scratch need not be kept).
After --seconds nothing is begun, and 20 s later what still runs is ended. On one H100, without --seconds, about (s of
one process; four run): prepare 20, fewer 15, forecasters 90, lesa 180, fit 60 for quick and default, 360 for thorough.
The column "seconds" is of processes that share the device: for figures of their own, --phases fit --processes 1.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.multiprocessing as multiprocessing

import lesa
from benchmarks import fitted_methods as methods
from benchmarks import fitted_solvers as solvers
from benchmarks.fitted_table import Rows, margins, read, table
from benchmarks.measuring import hardware
from lesa import assets

PHASES = ("fewer", "forecasters", "fit", "lesa")
EFFORTS = ("quick", "default", "thorough")
GUIDANCE = (1, 3)
_GRACE = 20.0  # s after the deadline that what runs may take


class Task(NamedTuple):
    """One share of the work: of a phase, at a guidance scale; "" and 0 where all are meant."""

    phase: str
    guidance: int
    name: str = ""
    budget: int = 0


def tasks(settings: methods.Settings, phases: Iterable[str], efforts: Iterable[str]) -> Iterator[Task]:
    """All shares of the work, the cheap and the needed first."""
    for phase in phases:
        if phase == "fewer":
            yield from (Task(phase, guidance) for guidance in settings.recorded)
        elif phase == "forecasters":
            yield from (Task(phase, g, "", b) for g in settings.recorded for b in settings.budgets)
        elif phase == "lesa":
            yield from (Task(phase, g, "paper", b) for g in settings.recorded for b in settings.budgets)
            if 1 in settings.recorded:
                yield Task(phase, 1, "searched", settings.budgets[len(settings.budgets) // 3])
        else:
            yield from fits(settings, (effort for effort in efforts if effort != "thorough"))
    if "fit" in phases and "thorough" in efforts:
        yield from fits(settings, ("thorough",))


def fits(settings: methods.Settings, efforts: Iterable[str]) -> Iterator[Task]:
    """The shares of the phase "fit"."""
    yield from (Task("fit", g, e, b) for e in efforts for g in settings.recorded for b in settings.budgets)


def fewer(bench: methods.Bench, rows: Rows, task: Task) -> None:
    """Fewer steps of every solver, and what each converges to."""
    for budget in (*bench.settings.budgets, bench.settings.steps):
        for name, solver in solvers.solvers().items():
            steps, whole = solvers.steps_for(name, budget), budget == bench.settings.steps
            identity = (task.guidance, name, "converged" if whole else "fewer", "", "")
            identity += (solvers.calls(name, steps),)
            if (whole and name == "euler") or not rows.wanted(*identity):
                continue
            rows.add(identity, bench.figures(task.guidance, bench.images(task.guidance, None, solver, steps)))


def forecasters(bench: methods.Bench, rows: Rows, task: Task) -> None:
    """Every rule at the output site on the paper's, the searched and its own schedule; closed forms at hidden too."""
    cases = [(name, kind, "output") for kind in ("paper", "searched") for name in methods.RULES]
    cases += [(name, "paper", "hidden") for name in methods.CLOSED]
    for kind in (own for own in methods.OWN if bench.has(own, task.budget)):
        cases += [(name, kind, "output") for name in methods.OWN[kind] if name in methods.RULES]
    for name, kind, site in cases:
        identity = (task.guidance, name, kind, site, "", task.budget)
        if rows.wanted(*identity):
            plan = bench.forecaster(name, kind, site, task.guidance, task.budget)
            cost = (methods.FITTING,) if name not in methods.CLOSED or kind in ("searched", "dpcache") else ()
            rows.add(identity, bench.figures(task.guidance, bench.images(task.guidance, plan)), *cost)


def paper(bench: methods.Bench, rows: Rows, task: Task) -> None:
    """The paper's method on a schedule."""
    identity = (task.guidance, "lesa", task.name, "hidden", "", task.budget)
    if rows.wanted(*identity):
        plan = bench.lesa(task.name, task.guidance, task.budget)
        figures = bench.figures(task.guidance, bench.images(task.guidance, plan))
        rows.add(identity, figures, methods.trained_generations(plan))


def fit(bench: methods.Bench, rows: Rows, task: Task) -> None:
    """The plan that lesa.fit finds, with what it says it took."""
    identity = (task.guidance, "lesa.fit", "fitted", "output", task.name, task.budget)
    if not rows.wanted(*identity):
        return
    plan = lesa.fit(
        bench.pipe,
        assets.fitting_prompts()[: methods.FITTING],
        budget=task.budget,
        request=bench.request(task.guidance),
        seeds=range(methods.FITTING),
        effort=task.name,
        batch=bench.settings.fit_batch,
        folder=bench.settings.work / "fits" / f"{task.name}-{task.guidance}-{task.budget}",
    )
    figures = bench.figures(task.guidance, bench.images(task.guidance, plan))
    rows.add(identity, figures, plan.training["generations"], plan.training["seconds"])


_RUN = {"fewer": fewer, "forecasters": forecasters, "lesa": paper, "fit": fit}
_bench: methods.Bench


def start(settings: methods.Settings, threads: int) -> None:
    """Begin a process."""
    global _bench
    torch.set_num_threads(threads)
    _bench = methods.Bench(settings)


def prepare(guidance: int) -> None:
    """What all tasks at one guidance scale read: references, statistics, the recording to train on."""
    _bench.reference(guidance)
    _bench.statistics(guidance)
    if _bench.settings.recorded[guidance]:
        _bench.record(guidance)


def work(task: Task) -> str:
    """One task; returns what went wrong."""
    if time.time() > _bench.settings.deadline:
        return ""
    try:
        _RUN[task.phase](_bench, Rows(_bench.settings), task)
    except Exception:  # the other tasks are worth their time all the same
        return f"{task}: {traceback.format_exc()}"
    return ""


def run(settings: methods.Settings, chosen: list[Task], processes: int) -> list[str]:
    """Do the tasks; returns what went wrong."""
    Rows(settings)  # before the processes would all make the file
    guidances = list(dict.fromkeys(task.guidance for task in chosen))
    if processes == 0:
        start(settings, torch.get_num_threads())
        for guidance in guidances:
            prepare(guidance)
        return [error for error in map(work, chosen) if error]
    errors: list[str] = []
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with multiprocessing.get_context("spawn").Pool(processes, start, (settings, threads)) as pool:
        pool.map(prepare, guidances, chunksize=1)
        results = pool.imap_unordered(work, chosen, chunksize=1)
        try:
            for _ in chosen:
                errors.append(results.next(max(settings.deadline + _GRACE - time.time(), 0.1)))
        except multiprocessing.TimeoutError:
            errors.append("time ran out: what was running is lost")
    return [error for error in errors if error]


def _settings(options: argparse.Namespace) -> methods.Settings:
    return methods.Settings(
        device=options.device,
        work=options.work,
        captions=options.captions,
        steps=options.steps,
        batch=options.batch,
        fit_batch=options.fit_batch,
        budgets=tuple(options.budgets),
        recorded={g: _recorded(options, g) for g in options.guidance},
        results=options.results or options.work / "fitted.csv",
        head=(hardware(options.device), options.commit, datetime.date.today().isoformat(), "emoji-flux"),
        deadline=time.time() + options.seconds,
    )


def _recorded(options: argparse.Namespace, guidance: int) -> int:
    if "lesa" not in options.phases:
        return 0
    return options.recorded or (100 if guidance == 1 else 32)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line; measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of --results and measure nothing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=Path("fitted"))
    parser.add_argument("--results", type=Path, help="CSV file, default WORK/fitted.csv")
    parser.add_argument("--commit", default="")
    parser.add_argument("--seconds", type=float, default=86400.0, help="begin nothing later")
    parser.add_argument("--processes", type=int, default=4, help="0: all in this one")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=EFFORTS)
    parser.add_argument("--guidance", nargs="+", type=int, default=GUIDANCE, help="1: none")
    parser.add_argument("--recorded", type=int, help="prompts to train on; default 100 without guidance, 32 with it")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--fit-batch", type=int, default=8, help="prompts in one pipeline call of lesa.fit")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--budgets", nargs="+", type=int, default=(13, 10, 8, 6))
    options = parser.parse_args(arguments)
    errors = []
    results = options.results or options.work / "fitted.csv"
    if not options.table:
        os.environ.setdefault("TQDM_DISABLE", "1")
        settings = _settings(options)
        errors = run(settings, list(tasks(settings, options.phases, options.efforts)), options.processes)
    rows = read(results)
    print(table(rows))
    print(margins(rows))
    if errors:
        sys.exit("\n".join(errors))


if __name__ == "__main__":
    main()
