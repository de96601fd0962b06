"""The paper's forecaster within a fit: its experts, trained on the fitting requests for any schedule of theirs."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..models.denoisers import LAYOUTS, denoiser_of
from ..plans.files import replace_file
from ..plans.plan import Plan, PlanError
from ..plans.routing import paper_stages
from ..training.fitting import final_losses, plan_of
from ..training.learning import Learner
from ..training.predictor import Predictor
from ..training.recorded import Recording
from ..training.recording import record, replay
from ..training.training import Losses, TrainingConfig, closed_loop, digest, guided
from .trials import Trials

_CUTS = {"QwenImageTransformer2DModel": (0.9, 0.4)}  # sigmas between the stages, where the paper has others
_TIMED = 10  # training steps by which their time is estimated
_TIMES = "times.json"
_KEPT = ("lesa-*.safetensors", _TIMES)


class Trainer:
    """Trains the paper's predictor as the paper does, both stages and no calibration.

    One recording serves all schedules, and one guided stage all that forecast from the same step on.

    Args:
        pipe: a pipeline that takes prompts.
        prompts: the fitting requests', none held out.
        seeds: of their noise.
        request: keyword arguments of the pipeline call.
        identity: tells recordings apart, see `Trials.identity`.
        seed: of the parameters and the order of the prompts.
        folder: where an interrupted training goes on and trained plans stay; a temporary one by default.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
        request: Mapping[str, Any],
        identity: str,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        denoiser = type(denoiser_of(pipe)).__name__
        self.config = TrainingConfig(seed=seed)
        self.site = "hidden" if denoiser in LAYOUTS else "output"
        self._pipe, self._prompts = pipe, list(prompts)
        self._seeds, self._request = [int(n) for n in seeds], dict(request)
        self._stages = paper_stages(*_CUTS.get(denoiser, ()))
        told = [identity, self._prompts, self._seeds, self._request, self.site, asdict(self.config)]
        self._key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        self._keeper, self._temporary = folder, _Temporary()
        self._recording: Recording | None = None
        self._guided: dict[int, tuple[dict[str, Predictor], Losses]] = {}
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._times = {} if folder is None else _read_times(self._folder / _TIMES)
        self.begin()

    def begin(self) -> None:
        """From now on count what is used of earlier work."""
        self._before, self._used = dict(self._times), set[str]()

    @property
    def earlier(self) -> float:
        """Seconds that work took which was used since `begin` but done before."""
        return sum(self._before.get(part, 0.0) for part in self._used)

    def price(self, trials: Trials, budget: int) -> float:
        """What training for one schedule will take, in time of full requests, by the time of some training steps.

        At least `nominal`; what recording takes above a plain request is not in it. A folder keeps the time of a
        training step, so that a fit that goes on there decides as before.
        """
        T, P, C = trials.statistics.num_steps, trials.count, len(trials.statistics.contexts)
        closed = self.config.closed_loop_epochs
        steps = P * (self.config.guided_epochs * T + closed * (T - budget))
        calls = P * (1 + closed * budget / T)
        if "a step" not in self._times:
            self._keep("a step", self._seconds_a_step(trials) / trials.seconds_a_request)
        return max(calls + C * steps * self._times["a step"], self.nominal(trials))

    def nominal(self, trials: Trials) -> float:
        """What training would take if each of its steps took as long as a computed one, in time of full requests."""
        return float(trials.count * (1 + self.config.guided_epochs + self.config.closed_loop_epochs))

    def plan(self, computed: Sequence[int]) -> Plan:
        """The plan of experts trained for a schedule, which must leave steps to forecast.

        Raises:
            RecordingError: the requests cannot be recorded, e.g. since the disk is full.
            ValueError: a loss is not finite, or what lies in the folder cannot be used.
        """
        computed = tuple(computed)
        name = hashlib.sha256(json.dumps(computed).encode()).hexdigest()[:16]
        first = min(set(range(computed[-1] + 2)) - set(computed))
        self._used |= {"recording", f"guided-{first}", f"closed-loop-{name}"}
        if computed not in self._plans:
            path = self._folder / f"lesa-{name}.safetensors"
            made = _made(path)
            if made is None:
                made = self._train(computed, first, name)
                made.save(path)
            self._plans[computed] = made
        return self._plans[computed]

    def close(self, done: bool) -> None:
        """Remove recordings and checkpoints.

        Args:
            done: whether nothing is to go on; if not, those in a folder of the user's stay.
        """
        self._temporary.remove()
        if done and self._keeper is not None:
            for path in sorted(self._keeper.glob("*/*")):
                if not any(path.match(kept) for kept in _KEPT):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @property
    def _folder(self) -> Path:
        return (self._keeper or self._temporary.path()) / self._key

    def _train(self, computed: tuple[int, ...], first: int, name: str) -> Plan:
        """Both stages, from wherever an earlier run stopped."""
        with self._timed("recording"):
            recording = self._recorded()
        with self._timed(f"guided-{first}"):
            started, guided_losses = self._started(recording, first)
        predictors = copy.deepcopy(started)
        with self._timed(f"closed-loop-{name}"):
            losses = closed_loop(
                predictors,
                recording,
                computed,
                lambda indices, driver: replay(self._pipe, recording, indices, driver),
                self.config,
                self._checkpoint(f"closed-loop-{name}"),
            )
        figures = {
            "recording": digest(recording),
            "calibration": 0,
            "config": asdict(self.config),
            "final_loss": final_losses(guided_losses, losses),
        }
        return plan_of(predictors, recording, computed, training=figures)

    def _recorded(self) -> Recording:
        if self._recording is None:
            self._recording = record(
                self._pipe,
                self._prompts,
                self._folder / "recording",
                request=self._request,
                site=self.site,
                seeds=self._seeds,
            )
        return self._recording

    def _started(self, recording: Recording, first: int) -> tuple[dict[str, Predictor], Losses]:
        """The predictors after the guided stage."""
        if first not in self._guided:
            predictors = {context: self._fresh(recording.num_steps) for context in recording.contexts}
            losses = guided(predictors, recording, first, self.config, self._checkpoint(f"guided-{first}"))
            self._guided[first] = predictors, losses
        return self._guided[first]

    def _fresh(self, num_steps: int) -> Predictor:
        return Predictor(num_steps, self._stages, seed=self.config.seed).to(self._pipe.device)

    def _checkpoint(self, name: str) -> Path | None:
        """None in a temporary folder: nothing goes on there."""
        return self._folder / f"{name}.safetensors" if self._keeper is not None else None

    def _seconds_a_step(self, trials: Trials) -> float:
        """Of one context, on an output: the feature matters little beside the experts and their optimiser."""
        learner = Learner(self._fresh(trials.statistics.num_steps), trials.statistics.sigmas, self.config)
        feature = trials.references[0].outputs[0, 0, :1].to(learner.device)
        steps = range(1, trials.statistics.num_steps)

        def learn(some: Sequence[int]) -> float:
            begin = time.perf_counter()
            for step in some:
                learner.remember(step - 1, feature)
                learner.learn(step, feature)
            float(learner.losses[-1])  # waits for the device
            return time.perf_counter() - begin

        learn(steps)  # compiles kernels, and captures every expert's graph
        timed = steps[-_TIMED:]
        return learn(timed) / len(timed)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the time of a part to what it took before, and keep that."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._keep(part, self._times.get(part, 0.0) + time.perf_counter() - begin)

    def _keep(self, name: str, figure: float) -> None:
        self._times[name] = figure
        if self._keeper is not None:
            replace_file(self._folder / _TIMES, json.dumps(self._times).encode())


class _Temporary:
    """A temporary folder that is there from its first use on."""

    def __init__(self) -> None:
        self._made: tempfile.TemporaryDirectory[str] | None = None

    def path(self) -> Path:
        """The folder."""
        if self._made is None:
            self._made = tempfile.TemporaryDirectory(prefix="lesa-", ignore_cleanup_errors=True)
        return Path(self._made.name)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        if self._made is not None:
            self._made.cleanup()
            self._made = None


def _made(path: Path) -> Plan | None:
    try:
        return Plan.load(path)
    except PlanError:  # none, or damaged
        return None


def _read_times(path: Path) -> dict[str, float]:
    """What earlier runs took; nothing where that is not known any more."""
    try:
        return {str(name): float(figure) for name, figure in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
