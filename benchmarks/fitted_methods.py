"""What benchmarks.fitted compares beside other solvers: closed forms, learned rows, the paper's trained predictor."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import full_float32
from lesa import assets, metrics
from lesa.forecasters import LEARNED
from lesa.forecasters import plan_of as forecaster_plan
from lesa.models.pipeline import run
from lesa.planner.search import dpcache, search
from lesa.planner.statistics import GUIDED, Statistics
from lesa.plans import schedule
from lesa.plans.plan import Plan
from lesa.plans.rows import Row
from lesa.plans.schedule import stage_of
from lesa.plans.storage import replace_file
from lesa.runtime.runner import PlanRunner
from lesa.training.predictor import Predictor
from lesa.training.recording import record, replay
from lesa.training.stages import TrainingConfig, closed_loop, guided
from lesa.training.train import trained_plan

INTERVALS = (5, 7, 10, 17)  # N of the paper's schedules with 13, 10, 8 and, in its manner, 6 of 50 computed
# The steps that L2P's released code computes of 50 (its N = 6, 8 and 16); it has none of 13.
L2P_SCHEDULES = {10: (0, 1, 2, 4, 7, 14, 23, 31, 38, 45), 8: (0, 1, 2, 4, 10, 20, 31, 41), 6: (0, 1, 2, 4, 16, 32)}
CLOSED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "reuse": ("reuse", {}),
    "taylor-1": ("taylor-1", {}),
    "taylor-2": ("taylor-2", {}),
    "hermite-2": ("hermite-2", {}),
    "chebyshev-4": ("chebyshev-4", {}),
    "chebyshev-4 (blend 0.5)": ("chebyshev-4", {"blend": 0.5}),
    "rational-1": ("rational-1", {}),
    "foca": ("foca", {}),
}
# The schedules that rules were published with, each with its rules. DMD and FoCa have none of their own: cache-dit
# decides while it runs.
OWN = {
    "l2p": ("l2p", "l2p-released"),
    "fora": ("reuse",),
    "taylorseer": ("taylor-1", "taylor-2", "rational-1"),
    "spectrum": ("chebyshev-4", "chebyshev-4 (blend 0.5)"),
    "dpcache": ("taylor-1",),
    "dpcache (published)": ("taylor-1",),
}
_GROWTHS = (0.75, 3.0, *(i / 4 for i in range(1, 41)))  # of Spectrum's windows, the published first
RULES = {**CLOSED, **{name: (name, {}) for name in LEARNED}}
FITTING = 8


@dataclass(frozen=True)
class Settings:
    """What a process of the benchmark needs to know.

    Args:
        device: of the pipeline.
        work: folder of what is kept.
        captions: held-out captions, at most 64.
        steps: T of the full request.
        batch: captions in one pipeline call.
        fit_batch: fitting prompts in one pipeline call of lesa.fit.
        budgets: numbers of computed steps.
        recorded: prompts the paper's predictor is trained on, for each guidance scale; the keys are the guidance
            scales measured, 1 for none.
        results: CSV file the rows go to.
        head: first cells of every row: hardware, commit, date, pipeline.
        deadline: time after which nothing is begun.
    """

    device: str
    work: Path
    captions: int
    steps: int
    batch: int
    fit_batch: int
    budgets: tuple[int, ...]
    recorded: Mapping[int, int]
    results: Path
    head: tuple[str, ...]
    deadline: float


class Bench:
    """One process's pipeline; everything is looked up or made, by guidance scale.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        full_float32()
        self.settings, self.pipe = settings, assets.load(settings.device)
        self.captions = assets.held_out_prompts()[: settings.captions]
        self.seeds = assets.held_out_seeds()[: settings.captions]
        self._references: dict[int, np.ndarray] = {}
        self._statistics: dict[int, Statistics] = {}

    def request(self, guidance: int) -> dict[str, Any]:
        """Keyword arguments of the full request."""
        request = {**assets.REQUEST, "num_inference_steps": self.settings.steps}
        return request if guidance == 1 else {**request, "true_cfg_scale": float(guidance), "negative_prompt": ""}

    @cached_property
    def scratch(self) -> Path:
        """Folder of what is quickly made again."""
        folder = self.settings.work / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def reference(self, guidance: int) -> np.ndarray:
        """The images of the full request, [P, H, W, 3]."""
        path = self.scratch / f"reference-{guidance}-{self.settings.captions}-{self.settings.steps}.npy"
        if guidance not in self._references:
            if not path.is_file():
                file = io.BytesIO()
                np.save(file, self.images(guidance))
                replace_file(path, file.getvalue())
            self._references[guidance] = np.load(path)
        return self._references[guidance]

    def statistics(self, guidance: int) -> Statistics:
        """Statistics of 8 fitting prompts."""
        path = self.scratch / f"statistics-{guidance}-{self.settings.steps}.safetensors"
        if guidance not in self._statistics:
            if not path.is_file():
                prompts = assets.fitting_prompts()[:FITTING]
                found = Statistics.gather(self.pipe, prompts, request=self.request(guidance), batch=FITTING)
                found.save(path)
            self._statistics[guidance] = Statistics.load(path)
        return self._statistics[guidance]

    def images(self, guidance: int, plan: Plan | None = None, solver: Any = None, steps: int | None = None) -> Any:
        """The images of all captions: in full, by a plan, or by another scheduler and step count."""
        request = self.request(guidance) | ({} if steps is None else {"num_inference_steps": steps})
        site = "hidden" if plan is None else plan.site
        usual, made = self.pipe.scheduler, []
        self.pipe.scheduler = usual if solver is None else solver
        try:
            for begin in range(0, len(self.captions), self.settings.batch):
                part = slice(begin, begin + self.settings.batch)
                driver = None if plan is None else PlanRunner(plan)
                output = run(self.pipe, self.captions[part], self.seeds[part], request, driver, site, output_type="np")
                made.append(np.asarray(output.images, np.float32))
        finally:
            self.pipe.scheduler = usual
        return np.concatenate(made)

    def figures(self, guidance: int, images: np.ndarray) -> tuple[float, float, float]:
        """Mean PSNR, its standard error, mean SSIM."""
        psnr = metrics.psnr(images, self.reference(guidance))
        similar = metrics.ssim(images, self.reference(guidance))
        return float(psnr.mean()), float(psnr.std(ddof=1) / len(psnr) ** 0.5), float(similar.mean())

    def schedule(self, name: str, guidance: int, budget: int) -> tuple[int, ...]:
        """The computed steps of the paper, of one of `OWN`, or searched."""
        steps = self.settings.steps
        if name == "paper":
            found = (schedule.paper(steps, interval) for interval in _intervals(steps))
            return next(computed for computed in found if len(computed) == budget)
        if name in OWN and name != "dpcache":
            return own_schedules(name, steps)[budget]
        known = self.statistics(guidance)
        gram = known.gram("output", GUIDED)
        return dpcache(gram, budget) if name == "dpcache" else search(gram, known.impulse_response[-1], budget)

    def has(self, name: str, budget: int) -> bool:
        """Whether one of `OWN` has a schedule of this budget; DPCache's reaches over gaps of at most 8."""
        if name == "dpcache":
            return budget >= 3 and 2 + 8 * (budget - 2) >= self.settings.steps
        return budget in own_schedules(name, self.settings.steps)

    def forecaster(self, name: str, schedule_name: str, site: str, guidance: int, budget: int) -> Plan:
        """The plan of one of `RULES`."""
        known = self.statistics(guidance)
        rule, options = RULES[name]
        grams = {context: known.gram(site, context) for context in known.contexts}
        computed = self.schedule(schedule_name, guidance, budget)
        return forecaster_plan(rule, computed, known.sigmas, site, grams, options=options)

    def lesa(self, schedule_name: str, guidance: int, budget: int) -> Plan:
        """The paper's method: three KAN experts, both stages, no gains. Bundled where it is, else trained here."""
        computed = self.schedule(schedule_name, guidance, budget)
        if guidance == 1 and schedule_name == "paper" and self.settings.steps == 50:
            for interval in assets.INTERVALS:
                bundled = Plan.load(assets.plan_path(interval))
                if bundled.computed == computed:
                    return without_gains(bundled)
        path = self.settings.work / "plans" / f"lesa-{guidance}-{schedule_name}-{budget}.safetensors"
        if not path.is_file():
            self._train(guidance, computed).save(path)
        return Plan.load(path)

    def _train(self, guidance: int, computed: Sequence[int]) -> Plan:
        prompts = assets.fitting_prompts()[: self.settings.recorded[guidance]]
        recording = self.record(guidance)
        predictors = {c: Predictor(recording.num_steps).to(self.pipe.device) for c in recording.contexts}
        first = min(set(range(recording.num_steps)) - set(computed))
        guided(predictors, recording, first)
        closed_loop(
            predictors, recording, computed, lambda indices, driver: replay(self.pipe, recording, indices, driver)
        )
        return trained_plan(predictors, recording, computed, training={"prompts": len(prompts)})

    def record(self, guidance: int) -> Any:
        """The recording that predictors are trained on."""
        prompts = assets.fitting_prompts()[: self.settings.recorded[guidance]]
        folder = self.scratch / f"recording-{guidance}-{len(prompts)}-{self.settings.steps}"
        return record(self.pipe, prompts, folder, request=self.request(guidance), batch=25)


def own_schedules(name: str, steps: int) -> Mapping[int, tuple[int, ...]]:
    """The published schedules of one of `OWN` that needs no statistics, by budget; of several of a budget the first."""
    if name == "l2p":
        return L2P_SCHEDULES if steps == 50 else {}
    if name == "dpcache (published)":
        return schedule.DPCACHE_40 if steps == 40 else {}
    made: Mapping[str, tuple[Callable[..., tuple[int, ...]], Iterable[float]]] = {
        "fora": (schedule.fora, range(1, steps + 1)),
        "taylorseer": (schedule.taylorseer, range(1, steps + 1)),
        "spectrum": (schedule.spectrum, _GROWTHS),
    }
    make, values = made[name]
    found: dict[int, tuple[int, ...]] = {}
    for computed in (make(steps, value) for value in values):
        found.setdefault(len(computed), computed)
    return found


def trained_generations(plan: Plan) -> float:
    """What the paper's training ran, in full generations: the recording, and two epochs in the accelerated sampler."""
    prompts = plan.training["prompts"]
    return prompts * (1 + TrainingConfig().closed_loop_epochs * plan.budget / plan.num_steps)


def without_gains(plan: Plan) -> Plan:
    """The plan of the same predictor before its calibration: alpha divided by the gain of its stage."""

    def row(step: int, calibrated: Row) -> Row:
        gain = plan.training["gains"][stage_of(plan.sigmas[step], plan.stages)]
        last = [float(read == step - 1) for read in calibrated.steps]
        weights = tuple((w - one) / gain + one for w, one in zip(calibrated.weights, last, strict=True))
        return Row(calibrated.steps, weights, calibrated.bias / gain)

    rows = {context: {step: row(step, r) for step, r in by.items()} for context, by in plan.rows.items()}
    return replace(plan, rows=rows, training={**plan.training, "gains": [1.0] * len(plan.stages)})


def _intervals(steps: int) -> list[int]:
    return [n for n in INTERVALS if n <= steps] + list(range(1, steps + 1))
