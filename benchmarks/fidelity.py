"""Fidelity on emoji-flux: LESA and its ablations against reuse and TaylorSeer on held-out captions.

    python -m benchmarks.fidelity train --device cuda --work fidelity
    python -m benchmarks.fidelity measure --device cuda --work fidelity --commit $(git rev-parse --short HEAD)

`train` records 100 captions, trains every variant (stages on/off x KAN/MLP, 1 to 100 prompts) in both stages and
calibrates it, the full method first; what it has made is kept in the work folder, so a run that was stopped (or ran out
of --seconds) goes on. `measure` runs every plan found there on 64 captions and noises that nothing was fitted to, and
writes fidelity.csv; its column "after" says what the plan has behind it: stage 1, stage 2, or calibration (3).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from lesa import assets
from lesa.evaluation.compare import FORECASTERS, Method, MethodResult, compare
from lesa.forecasters import plan_of as closed_form_plan
from lesa.plans import schedule
from lesa.plans.plan import Plan
from lesa.plans.schedule import ONE_STAGE, PAPER_STAGES
from lesa.training.predictor import Predictor
from lesa.training.recording import Recording, record, replay
from lesa.training.stages import TrainingConfig, closed_loop, guided
from lesa.training.train import FinalError, calibrated_gains, trained_plan

from .measuring import hardware

PROMPTS = (1, 5, 10, 50)
CALIBRATION = 16
STEPS = assets.REQUEST["num_inference_steps"]
COLUMNS = (
    "hardware commit date pipeline captions site method alpha stages after prompts interval computed psnr psnr_sem ssim"
)


@dataclass(frozen=True)
class Variant:
    """One way to train a predictor.

    Args:
        alpha: "kan" or "mlp".
        stages: 3, the paper's, or 1.
        prompts: how many of the 100 it is trained on.
    """

    alpha: str = "kan"
    stages: int = 3
    prompts: int = 100

    @property
    def name(self) -> str:
        """Start of the names of its files."""
        return f"{self.alpha}-{self.stages}-{self.prompts}"


VARIANTS = [Variant(), Variant("mlp"), Variant(stages=1), Variant("mlp", stages=1)]
VARIANTS += [Variant(prompts=count) for count in PROMPTS]


class First:
    """The first prompts of a recording."""

    def __init__(self, recording: Recording, count: int) -> None:
        self.prompts = recording.prompts[:count]
        self.contexts, self.sigmas, self.features = recording.contexts, recording.sigmas, recording.features


class Trainer:
    """One process's pipeline and recording.

    Args:
        device: of the pipeline.
        work: folder of the recording, predictors and plans.
        deadline: time after which no training is started.
    """

    def __init__(self, device: str, work: Path, deadline: float) -> None:
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.pipe, self.work, self.deadline = assets.load(device), work, deadline
        self.recording = Recording.open(work / "recording")

    def guided(self, variant: Variant) -> None:
        """Train the first stage; keep the predictor and its plans."""
        path = self.work / f"{variant.name}.safetensors"
        if path.is_file() or time.time() > self.deadline:
            return
        stages = PAPER_STAGES if variant.stages == 3 else ONE_STAGE
        predictor = Predictor(STEPS, stages, variant.alpha).to(self.pipe.device)
        first = min(set(range(STEPS)) - set(schedule.paper(STEPS, min(assets.INTERVALS))))
        guided({"cond": predictor}, First(self.recording, variant.prompts), first, TrainingConfig())
        for interval in assets.INTERVALS:
            self._save(predictor, variant, interval, after=1)
        predictor.save(path)

    def closed(self, variant: Variant, interval: int) -> None:
        """Train the second stage and calibrate; keep both plans."""
        start = self.work / f"{variant.name}.safetensors"
        if plan_path(self.work, variant, interval, 3).is_file() or not start.is_file() or time.time() > self.deadline:
            return
        predictor = Predictor.load(start).to(self.pipe.device)
        closed_loop(
            {"cond": predictor},
            First(self.recording, variant.prompts),
            schedule.paper(STEPS, interval),
            lambda indices, driver: replay(self.pipe, self.recording, indices, driver),
            TrainingConfig(),
        )
        self._save(predictor, variant, interval, after=2)
        computed = schedule.paper(STEPS, interval)
        gains = calibrated_gains({"cond": predictor}, self.recording, computed, self.final_error)
        self._save(predictor, variant, interval, after=3, gains=gains)

    @cached_property
    def final_error(self) -> FinalError:
        """Measures a plan on 16 of the fitting prompts."""
        return FinalError(self.pipe, self.recording, CALIBRATION, batch=CALIBRATION)

    def _save(
        self, predictor: Predictor, variant: Variant, interval: int, after: int, gains: Sequence[float] | None = None
    ) -> None:
        figures = {**asdict(variant), "after": after, "interval": interval}
        computed = schedule.paper(STEPS, interval)
        plan = trained_plan({"cond": predictor}, self.recording, computed, gains, training=figures)
        plan.save(plan_path(self.work, variant, interval, after))


def plan_path(work: Path, variant: Variant, interval: int, after: int) -> Path:
    """Where the plan of a variant is kept: after stage 1, after stage 2, or calibrated (3)."""
    return work / "plans" / f"{variant.name}-n{interval}-after{after}.safetensors"


_trainer: Trainer


def _start(*arguments: Any) -> None:
    global _trainer
    torch.set_num_threads(1)
    _trainer = Trainer(*arguments)


def _guided(variant: Variant) -> None:
    _trainer.guided(variant)


def _closed(task: tuple[Variant, int]) -> None:
    _trainer.closed(*task)


def train(options: argparse.Namespace) -> None:
    """Record once, then train the variants in parallel processes."""
    deadline = time.time() + options.seconds
    pipe = assets.load(options.device)
    record(pipe, assets.fitting_prompts(), options.work / "recording", request=assets.REQUEST, batch=options.batch)
    del pipe
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, _start, (options.device, options.work, deadline)) as pool:
        pool.map(_guided, VARIANTS, chunksize=1)
        pool.map(_closed, [(v, n) for v in VARIANTS for n in assets.INTERVALS], chunksize=1)


def measure(options: argparse.Namespace) -> None:
    """Measure every plan in the work folder, and the closed forms on the same schedules."""
    plans = [Plan.load(path) for path in sorted((options.work / "plans").glob("*.safetensors"))]
    sigmas = plans[0].sigmas
    methods = [Method("full", None, STEPS)]
    for interval in () if options.ablation else assets.INTERVALS:
        computed = schedule.paper(STEPS, interval)
        methods.append(Method("fewer steps", None, len(computed)))
        methods += [Method(n, closed_form_plan(n, computed, sigmas), STEPS, interval) for n in FORECASTERS]
    methods += [Method("lesa", plan, STEPS, plan.training["interval"]) for plan in plans]
    captions, seeds = assets.held_out_prompts()[: options.prompts], assets.held_out_seeds()[: options.prompts]
    pipe = assets.load(options.device)
    outcomes = compare(pipe, methods, captions, seeds, assets.REQUEST, batch=options.batch, flops=False)
    head = [hardware(options.device), options.commit, datetime.date.today().isoformat(), "emoji-flux"]
    head += [len(captions), plans[0].site]
    with open(options.work / "fidelity.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS.split())
        writer.writerows([*head, *_cells(outcome)] for outcome in outcomes[1:])
    print((options.work / "fidelity.csv").read_text())


def _cells(outcome: MethodResult) -> list[Any]:
    method, psnr = outcome.method, outcome.psnr
    training = method.plan.training if method.plan is not None else {}
    variant = [training.get(name, "") for name in ("alpha", "stages", "after", "prompts")]
    sem = psnr.std(ddof=1) / len(psnr) ** 0.5
    figures = [f"{psnr.mean():.3f}", f"{sem:.3f}", f"{outcome.ssim.mean():.5f}"]
    return [method.name, *variant, method.interval or "", method.computed, *figures]


def main() -> None:
    """Parse the command line and run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "measure"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=Path("fidelity"))
    parser.add_argument("--batch", type=int, default=32, help="captions in one request, except in training")
    parser.add_argument("--processes", type=int, default=8, help="of train")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of train: start no training later")
    parser.add_argument("--prompts", type=int, default=64, help="of measure: held-out captions")
    parser.add_argument("--ablation", action="store_true", help="of measure: leave out the closed forms")
    parser.add_argument("--commit", default="", help="of measure: of the code that runs")
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)
    (train if options.command == "train" else measure)(options)


if __name__ == "__main__":
    main()
