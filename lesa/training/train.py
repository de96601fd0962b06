"""lesa.train: record, train both stages, choose gains, and write one plan for each interval.

Gains are not part of the paper. Both training stages minimise the error of each feature. The picture depends on the sum
of all errors after the model's head, and the alphas that are best for features are too large at low noise. So each
stage's alpha is multiplied by a gain, chosen by running accelerated requests. The plan's rows contain it.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from ..models.pipeline import check_prompts, check_request, run
from ..plans import schedule
from ..plans.plan import Plan
from ..plans.rows import SITES, PlanError
from ..plans.schedule import Stage
from ..plans.storage import check_folder, replace_file
from ..runtime.runner import PlanRunner
from .predictor import Predictor
from .recording import Recording, digest, record, replay
from .stages import Losses, TrainingConfig, closed_loop, guided

_GAIN_STEP = 0.15
_MAX_GAIN = 2.0


class Trained(NamedTuple):
    """What `train` returns.

    Args:
        plans: the path of the plan for each interval.
        losses: for each stage of training, the loss of every optimiser step by context.
    """

    plans: dict[int, Path]
    losses: dict[str, Losses]


def train(
    pipe: Any,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    request: Mapping[str, Any],
    intervals: Sequence[int] = (5, 7, 10),
    site: str = "hidden",
    config: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    predictor: Mapping[str, Any] | None = None,
    calibration: int = 16,
) -> Trained:
    """Record a pipeline and train the paper's predictor for each interval; a run that was killed continues.

    Args:
        pipe: a diffusers pipeline that takes prompts.
        prompts: at least one, 5 to 100 are recommended; the paper takes 100 and finds 5 to 10 enough (Tab. 9).
        folder: of the recording, checkpoints, predictors, plans ("lesa-n5.safetensors" for interval 5) and losses.json.
        request: keyword arguments of the pipeline call.
        intervals: N of the paper's schedules, 1 to T each. Small ones are accurate, large ones fast.
        site: of the features that are forecast: "hidden" or "output".
        config: learning rate, epochs and the like.
        predictor: further arguments of `Predictor`, e.g. {"stages": ..., "alpha": "mlp"}.
        calibration: on how many of the prompts, at most, the gains are chosen, see `calibrate`; 0 chooses none, as in
            the paper.

    Returns:
        The plans, and the losses of their training.

    Raises:
        RecordingError: see `record`.
        ValueError: an argument is out of place, or `folder` holds another training.
    """
    _check(folder, prompts, request, intervals, site, calibration)
    folder = Path(folder)
    recording = record(pipe, prompts, folder / "recording", request=request, site=site, batch=config.batch)
    schedules = {interval: schedule.paper(recording.num_steps, interval) for interval in intervals}
    first = min(min(set(range(recording.num_steps)) - set(c), default=1) for c in schedules.values())
    options = {"seed": config.seed, **(predictor or {})}
    started = {c: Predictor(recording.num_steps, **options).to(pipe.device) for c in recording.contexts}
    losses = {"guided": guided(started, recording, first, config, folder / "guided.safetensors")}
    plans = {}
    for interval, computed in schedules.items():
        predictors = copy.deepcopy(started)
        name = f"closed loop, N = {interval}"
        losses[name] = closed_loop(
            predictors,
            recording,
            computed,
            lambda indices, driver: replay(pipe, recording, indices, driver),
            config,
            folder / f"closed-loop-n{interval}.safetensors",
        )
        for context, trained in predictors.items():
            trained.save(folder / f"predictor-n{interval}-{context}.safetensors")
        plans[interval] = folder / f"lesa-n{interval}.safetensors"
        figures = {
            "prompts": len(prompts),
            "recording": digest(recording),
            "calibration": min(calibration, len(prompts)),
            "config": asdict(config),
            "final_loss": final_losses(losses["guided"], losses[name]),
        }
        if _is_made(plans[interval], figures):
            continue
        gains = None
        if calibration:
            measure = FinalError(pipe, recording, calibration, config.batch)
            gains = calibrated_gains(predictors, recording, computed, measure)
        trained_plan(predictors, recording, computed, gains, training=figures).save(plans[interval])
    replace_file(folder / "losses.json", json.dumps(losses).encode())
    return Trained(plans, losses)


def _check(folder: Any, prompts: Any, request: Any, intervals: Any, site: Any, calibration: Any) -> None:
    """Check what is used only after recording, which takes long.

    Raises:
        ValueError: an argument is out of place.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"folder={folder!r}: expected a path")
    check_folder(Path(folder), "folder")
    check_prompts(prompts)
    check_request(request)
    if site not in SITES:
        raise ValueError(f"site={site!r}: expected one of {SITES}")
    if not isinstance(calibration, int) or calibration < 0:
        raise ValueError(f"calibration={calibration!r}: expected a number of prompts of at least 0")
    steps = request.get("num_inference_steps")
    most = steps if isinstance(steps, int) else math.inf
    listed = isinstance(intervals, Sequence) and len(intervals) > 0
    if not listed or not all(isinstance(one, Integral) and 1 <= int(one) <= most for one in intervals):
        raise ValueError(f"intervals={intervals!r}: expected a list of whole numbers from 1 to T, e.g. (5, 7, 10)")


def trained_plan(
    predictors: Mapping[str, Predictor],
    recording: Recording,
    computed: Sequence[int],
    gains: Sequence[float] | None = None,
    **provenance: Any,
) -> Plan:
    """The plan of trained predictors on one schedule.

    Args:
        predictors: one for each context of the recording.
        recording: whose noise levels, timesteps and model the plan is for.
        computed: the schedule.
        gains: factor on alpha for each stage, see `calibrate`.
        provenance: further fields of `Plan`.
    """
    plans = {
        context: predictor.to_plan(computed, recording.sigmas, gains, **recording.provenance, **provenance)
        for context, predictor in predictors.items()
    }
    return next(iter(plans.values())) if len(plans) == 1 else Plan.join(plans)


def _is_made(path: Path, figures: Mapping[str, Any]) -> bool:
    """Whether a plan with these figures lies at `path`; a damaged one is made again."""
    try:
        return path.is_file() and figures.items() <= Plan.load(path).training.items()
    except PlanError:
        return False


class FinalError:
    """Measures a plan by the final latents of recorded requests.

    Args:
        pipe: the recorded pipeline.
        recording: its requests.
        count: how many of them are run, at most all.
        batch: prompts in one pipeline call.
    """

    def __init__(self, pipe: Any, recording: Recording, count: int, batch: int = 1) -> None:
        self._pipe, self._recording = pipe, recording
        indices = range(min(count, len(recording.prompts)))
        self._batches = [indices[i : i + batch] for i in range(0, len(indices), batch)]
        self._full = [self._latents(part, None) for part in self._batches]

    def __call__(self, plan: Plan) -> float:
        """Mean over requests of the mean squared error of the final latents, in dB; lower is better."""
        decibels: list[float] = []
        for part, full in zip(self._batches, self._full, strict=True):
            squared = (self._latents(part, PlanRunner(plan)) - full).square().flatten(1).mean(1)
            decibels += (10 * squared.clamp_min(1e-20).log10()).tolist()
        return sum(decibels) / len(decibels)

    def _latents(self, indices: Sequence[int], driver: PlanRunner | None) -> torch.Tensor:
        recording = self._recording
        prompts, seeds = [recording.prompts[i] for i in indices], [recording.seeds[i] for i in indices]
        output = run(self._pipe, prompts, seeds, recording.request, driver, recording.site, return_dict=False)
        return output[0].double().cpu()


def calibrated_gains(
    predictors: Mapping[str, Predictor],
    recording: Recording,
    computed: Sequence[int],
    measure: Callable[[Plan], float],
) -> tuple[float, ...]:
    """The gains that `calibrate` finds for trained predictors on one schedule; `measure` is a `FinalError`."""
    stages = next(iter(predictors.values())).stages
    with tqdm(desc="calibrate", unit="plan") as bar:

        def error(gains: tuple[float, ...]) -> float:
            value = measure(trained_plan(predictors, recording, computed, gains))
            bar.update()
            bar.set_postfix_str(f"gains {gains}: error {value:.2f} dB")
            return value

        return calibrate(stages, error)


def calibrate(stages: Sequence[Stage], error: Callable[[tuple[float, ...]], float]) -> tuple[float, ...]:
    """Choose a gain on alpha for each stage by coordinate descent on a measured error. Not part of the paper.

    Both stages of training minimise the error of each feature. The picture depends on the sum of all errors after the
    model's head, and there alphas that are best for features overshoot at low noise. Gains correct that, and a plan
    carries them in its rows at no cost.

    The descent starts from gains of 1 and goes from the stage of lowest noise to the highest.

    Args:
        stages: of the predictor.
        error: runs requests with the given gain for each stage and returns the error of the results; lower is better.

    Returns:
        A gain in (0, 2] for each stage; never worse by `error` than gains of 1.

    Raises:
        ValueError: the error of gains of 1 is not finite.
    """
    gains = [1.0] * len(stages)
    best = error(tuple(gains))
    if not math.isfinite(best):
        raise ValueError(f"the trained plan's requests end in an error of {best}: its weights or the model overflow")
    for i in reversed(range(len(stages))):
        for direction in (-1, 1):
            improved = False
            while True:
                trial = list(gains)
                trial[i] = round(trial[i] + direction * _GAIN_STEP, 6)
                if not 0 < trial[i] <= _MAX_GAIN or not (now := error(tuple(trial))) < best:  # NaN is no improvement
                    break
                gains, best, improved = trial, now, True
            if improved:
                break
    return tuple(gains)


def final_losses(guided_losses: Losses, closed_losses: Losses) -> dict[str, dict[str, float]]:
    """Mean loss over the last tenth of each stage of training, by context."""

    def tail(values: Sequence[float]) -> float:
        last = values[-max(1, len(values) // 10) :]
        return sum(last) / len(last) if last else 0.0

    stages = {"guided": guided_losses, "closed_loop": closed_losses}
    return {stage: {context: tail(values) for context, values in by.items()} for stage, by in stages.items()}
