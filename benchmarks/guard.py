"""The guard on emoji-flux: what it costs on captions like the fitted ones, and what it keeps far from them.

    python -m benchmarks.guard --plan plan-10.safetensors --results guard.csv --commit $(git rev-parse --short HEAD)

Each request runs alone, by one setting of the guard, then by the other; and as a user's would: after one that left its
plan the next of its kind is watched more closely. PSNR, at most 100 dB, is against the full request of the same altered
model, run in batches; computed are also the steps that a retrace runs over again. A switch is false where the request
would have kept the mean PSNR of all captions, less 1 dB, without it. What the guard costs is told on captions: the
median of guarded requests' time by that of the others, of the process on a CPU, of the wall clock on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import random
import string
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lesa
from lesa import assets
from lesa.fitting.trials import decibels
from lesa.models import hooks
from lesa.models.denoisers import layout_of
from lesa.models.pipeline import run
from lesa.runtime.driver import Driver
from lesa.runtime.stats import GuardStats, Stats

from . import captions
from .measuring import append_row, hardware

_LABELS = "hardware commit date pipeline fitted_guidance computed case guard requests"
COLUMNS = f"{_LABELS} computed_mean switches false_switches psnr psnr_sem psnr_lowest time_ratio".split()
RANK = 4
NEAR = "captions"
SENTENCES = Path(__file__).parent / "sentences.txt"


@dataclass(frozen=True)
class Run:
    """One request: image, seconds, computed steps, and whether it left its plan."""

    image: np.ndarray
    seconds: float
    computed: float
    switched: bool


@dataclass
class Case:
    """Requests of one kind and their runs; `altered` is the norm of the update of a weight by that of the weight."""

    name: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    request: Mapping[str, Any]
    altered: float = 0.0
    off: list[Run] = field(default_factory=list)
    on: list[Run] = field(default_factory=list)


class Bench:
    """Runs requests by a plan, with the guard and without."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.pipe, self.plan = captions.load(options.device), lesa.Plan.load(options.plan)
        self._batch = options.batch
        self._now = time.perf_counter if options.device.startswith("cuda") else time.process_time

    def full(self, case: Case) -> np.ndarray:
        """The images [P, ...] of all requests in full."""
        with altered(self.pipe.transformer, case.altered):
            parts = [self._images(case, slice(i, i + self._batch)) for i in range(0, len(case.prompts), self._batch)]
        return np.concatenate(parts)

    def run(self, case: Case) -> None:
        """Each request without and with the guard, one after the other; who goes first takes turns."""
        ways = {guard: driver_of(self.pipe, self.plan, guard) for guard in (False, True)}
        runs = {False: case.off, True: case.on}
        with altered(self.pipe.transformer, case.altered):
            for i in range(len(case.prompts)):
                for guard in (False, True)[:: (-1) ** i]:
                    runs[guard].append(self._run(case, i, ways[guard]))
        lesa.disable(self.pipe)

    def _run(self, case: Case, i: int, driver: Driver) -> Run:
        root_of(self.pipe).driver = driver
        before, start = _counts(driver.stats), self._now()
        image = self._images(case, slice(i, i + 1))
        seconds = self._now() - start
        after = _counts(driver.stats)
        computed, forecast, switches, again = (new - old for old, new in zip(before, after, strict=True))
        steps = self.plan.num_steps * (computed + again) / (computed + forecast)
        return Run(image, seconds, steps, switches > 0)

    def _images(self, case: Case, part: slice) -> np.ndarray:
        more = {**case.request, "output_type": "np"}
        return run(self.pipe, list(case.prompts[part]), list(case.seeds[part]), assets.REQUEST, **more).images


def driver_of(target: Any, plan: lesa.Plan, guard: bool) -> Driver:
    """What runs requests by a plan; it lives on while another one takes its place."""
    lesa.enable(target, plan, guard=guard)
    return root_of(target).driver


def root_of(target: Any) -> hooks.RootHook:
    """The hook that asks a driver, which may be changed between requests."""
    root = hooks.attached(target)
    assert root is not None
    return root


def _counts(stats: Stats) -> tuple[int, int, int, int]:
    """Computed and forecast calls, requests that left their plan, and calls computed over again."""
    saw = stats.guard or GuardStats()
    return stats.computed + sum(stats.refused.values()), stats.forecast, saw.switches, saw.retraced


@contextlib.contextmanager
def altered(denoiser: torch.nn.Module, norm: float) -> Iterator[None]:
    """Add to every Linear of the blocks a random update of low rank, `norm` times as large; afterwards restore it."""
    blocks = [getattr(denoiser, name) for name in layout_of(denoiser).blocks]
    weights = [m.weight.data for b in blocks for m in b.modules() if isinstance(m, torch.nn.Linear)] if norm else []
    kept, generator = [weight.clone() for weight in weights], torch.Generator("cpu").manual_seed(0)
    for weight in weights:
        left, right = (torch.randn(size, RANK, generator=generator) for size in weight.shape)
        update = (left @ right.T).to(weight)
        weight += update * (norm * weight.norm() / update.norm())
    yield
    for weight, before in zip(weights, kept, strict=True):
        weight.copy_(before)


def cases(near: int, far: int, scale: int) -> list[Case]:
    """The case near the fitted, then those far from it; `scale` is the guidance of the fitted requests."""
    prompts, seeds = assets.held_out_prompts(), assets.held_out_seeds()
    others = assets.fitting_prompts() * (1 + near // 100)
    fitted = captions.request(scale)
    nearby = Case(NEAR, [*prompts, *others][:near], [*seeds, *range(2000, 2000 + near)][:near], fitted)
    scales = (1.5, 3.0, 6.0) if scale == 1 else (scale / 2, 2.0 * scale)
    guided = [Case(f"true_cfg_scale {s:g}", prompts[:far], seeds[:far], captions.request(s)) for s in scales]
    tuned = [Case(f"weights altered by {n}", prompts[:far], seeds[:far], fitted, n) for n in (0.1, 0.3, 1.0)]
    letters = random.Random(0)
    words = ["".join(letters.choices(string.ascii_letters, k=24)) for _ in range(far)]
    sentences = SENTENCES.read_text().splitlines()[:far]
    foreign = [Case("sentences", sentences, seeds[:far], fitted), Case("random letters", words, seeds[:far], fitted)]
    return [nearby, *guided, *tuned, *foreign]


def rows(case: Case, full: np.ndarray) -> Iterator[list[str]]:
    """What the table says of a case without and with the guard."""
    alone, guarded = (decibels(np.concatenate([run.image for run in runs]), full) for runs in (case.off, case.on))
    for label, runs, psnr in (("off", case.off, alone), ("on", case.on, guarded)):
        false = sum(run.switched and one >= alone.mean() - 1 for run, one in zip(runs, alone, strict=True))
        near = case.name == NEAR
        counts = [f"{np.mean([run.computed for run in runs]):.2f}", str(sum(run.switched for run in runs))]
        quality = [*captions.quality(psnr), f"{psnr.min():.3f}"]
        cost = f"{time_ratio(case):.4f}" if near and label == "on" else ""
        yield [case.name, label, str(len(runs)), *counts, str(false) if near else "", *quality, cost]


def time_ratio(case: Case) -> float:
    """What a request that stays on its plan takes with the guard, by what it takes without."""
    pairs = [on.seconds / off.seconds for on, off in zip(case.on, case.off, strict=True) if not on.switched]
    return float(np.median(pairs)) if pairs else math.nan


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, and add the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="a plan that knows its expected errors")
    parser.add_argument("--guidance", type=int, default=1, help="of the requests that it was fitted to; 1: none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200, help="on captions")
    parser.add_argument("--far", type=int, default=32, help="of each case far from the fitted, up to 32")
    parser.add_argument("--cases", nargs="+", help=f"some of the names, e.g. {NEAR!r} or 'sentences'; all by default")
    parser.add_argument("--batch", type=int, default=32, help="of full requests")
    parser.add_argument("--commit", default="", help="of the code that runs")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", lesa.LesaWarning)  # each setting has one
    bench = Bench(options)
    head = [hardware(options.device), options.commit, datetime.date.today().isoformat(), "emoji-flux"]
    head += [str(options.guidance), str(bench.plan.budget)]
    near, *far = cases(options.requests, options.far, options.guidance)
    bench.run(Case("warm up", near.prompts[:1], near.seeds[:1], near.request))
    for case in (near, *far):
        if options.cases and case.name not in options.cases:
            continue
        full = bench.full(case)
        bench.run(case)
        for cells in rows(case, full):
            append_row(options.results, COLUMNS, [*head, *cells])
            print(*cells, flush=True)


if __name__ == "__main__":
    main()
