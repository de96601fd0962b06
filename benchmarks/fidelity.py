"""Fidelity on emoji-flux: LESA and its ablations against reuse and TaylorSeer on held-out captions.

    python -m benchmarks.fidelity --device cuda --out results --commit $(git rev-parse --short HEAD)

Trains every variant (stages on/off x KAN/MLP, 1 to 100 prompts) in both stages, measures each on 64 captions and noises
that no predictor was trained on, and writes fidelity.csv and the plans of the full method. Trained predictors and the
recording are kept in --work, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from lesa import assets, schedule
from lesa.comparison import Method, compare
from lesa.demo import methods
from lesa.fitting import plan_of
from lesa.predictor import Predictor
from lesa.recording import Recording, record, replay
from lesa.routing import ONE_STAGE, PAPER_STAGES
from lesa.training import TrainingConfig, closed_loop, guided

PROMPTS = (1, 5, 10, 50, 100)
COLUMNS = "hardware commit date pipeline site method alpha stages after prompts interval computed psnr psnr_sem ssim"


@dataclass(frozen=True)
class Variant:
    """One cell of the ablations."""

    alpha: str = "kan"
    staged: bool = True
    prompts: int = 100

    @property
    def name(self) -> str:
        """File name of its results."""
        return f"{self.alpha}-{'stages' if self.staged else 'one'}-{self.prompts}"

    def predictor(self, num_steps: int) -> Predictor:
        """A fresh predictor."""
        return Predictor(num_steps, PAPER_STAGES if self.staged else ONE_STAGE, self.alpha)


VARIANTS = [Variant(alpha, staged) for staged in (True, False) for alpha in ("kan", "mlp")]
VARIANTS += [Variant(prompts=count) for count in PROMPTS if count != 100]


class Some:
    """The first prompts of a recording."""

    def __init__(self, recording: Recording, count: int) -> None:
        self.prompts = recording.prompts[:count]
        self.contexts, self.sigmas, self.features = recording.contexts, recording.sigmas, recording.features


class Worker:
    """One process's pipeline, recording and folders."""

    def __init__(self, device: str, work: Path) -> None:
        torch.set_num_threads(2)
        self.pipe, self.work = assets.load(device), work
        self.recording = Recording.open(work / "recording")

    def guided(self, variant: Variant) -> None:
        """Train the first stage and keep the predictor."""
        path = self.work / f"{variant.name}-guided.safetensors"
        if path.is_file():
            return
        predictor = variant.predictor(self.recording.num_steps).to(self.pipe.device)
        first = min(set(range(50)) - set(schedule.paper(50, 5)))
        guided({"cond": predictor}, Some(self.recording, variant.prompts), first, TrainingConfig())
        predictor.save(path)

    def closed(self, variant: Variant, interval: int) -> None:
        """Train the second stage and keep the predictor."""
        path = self.work / f"{variant.name}-n{interval}.safetensors"
        if path.is_file():
            return
        predictor = Predictor.load(self.work / f"{variant.name}-guided.safetensors").to(self.pipe.device)
        closed_loop(
            {"cond": predictor},
            Some(self.recording, variant.prompts),
            schedule.paper(50, interval),
            lambda indices, driver: replay(self.pipe, self.recording, indices, driver),
            TrainingConfig(),
        )
        predictor.save(path)

    def plan(self, variant: Variant, interval: int, after: int) -> Any:
        """The plan after training stage 1 or 2."""
        suffix = "guided" if after == 1 else f"n{interval}"
        predictor = Predictor.load(self.work / f"{variant.name}-{suffix}.safetensors")
        figures = {"prompts": variant.prompts, "after_stage": after}
        return plan_of({"cond": predictor}, self.recording, schedule.paper(50, interval), training=figures)


_worker: Worker


def _start(device: str, work: Path) -> None:
    global _worker
    _worker = Worker(device, work)


def _guided(variant: Variant) -> None:
    _worker.guided(variant)


def _closed(task: tuple[Variant, int]) -> None:
    _worker.closed(*task)


def main() -> None:
    """Record, train in parallel processes, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=Path("fidelity-work"))
    parser.add_argument("--out", type=Path, default=Path("fidelity-out"))
    parser.add_argument("--commit", required=True, help="of the code that runs, for the results file")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=64, help="held-out captions to measure on")
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)

    pipe = assets.load(options.device)
    prompts = assets.fitting_prompts()
    recording = record(pipe, prompts, options.work / "recording", request=assets.REQUEST, batch=50)
    with multiprocessing.get_context("spawn").Pool(options.processes, _start, (options.device, options.work)) as pool:
        pool.map(_guided, sorted(VARIANTS, key=lambda v: -v.prompts), chunksize=1)
        tasks = [(v, n) for v in VARIANTS for n in assets.INTERVALS]
        pool.map(_closed, sorted(tasks, key=lambda task: -task[0].prompts), chunksize=1)

    worker = Worker(options.device, options.work)
    cells = [(v, n, after) for v in VARIANTS for n in assets.INTERVALS for after in (1, 2)]
    plans = {cell: worker.plan(*cell) for cell in cells}
    ours = [(n, plans[Variant(), n, 2]) for n in assets.INTERVALS]
    chosen = methods(ours) + [Method("lesa", plans[cell], 50, cell[1]) for cell in cells]
    count = options.prompts
    outcomes = compare(
        pipe,
        chosen,
        assets.held_out_prompts()[:count],
        assets.held_out_seeds()[:count],
        assets.REQUEST,
        batch=32,
    )
    hardware = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor()
    head = [hardware, options.commit, datetime.date.today().isoformat(), "emoji-flux", recording.site]
    baselines = len(chosen) - len(cells)
    described = [None] * baselines + cells
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "fidelity.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS.split())
        for outcome, cell in zip(outcomes[1:], described[1:], strict=True):
            if outcome.method.name == "lesa" and cell is None:
                continue  # measured again among the cells
            writer.writerow([*head, *_cells(outcome, cell)])
    for interval, plan in ours:
        plan.save(options.out / assets.plan_path(interval).name)
    print((options.out / "fidelity.csv").read_text())


def _cells(outcome: Any, cell: tuple[Variant, int, int] | None) -> list[Any]:
    method, psnr = outcome.method, outcome.psnr
    variant = ["", "", "", ""]
    if cell is not None:
        variant = [cell[0].alpha, 3 if cell[0].staged else 1, cell[2], cell[0].prompts]
    sem = psnr.std(ddof=1) / len(psnr) ** 0.5
    figures = [f"{psnr.mean():.3f}", f"{sem:.3f}", f"{outcome.ssim.mean():.5f}"]
    return [method.name, *variant, method.interval or "", method.computed, *figures]


if __name__ == "__main__":
    main()
