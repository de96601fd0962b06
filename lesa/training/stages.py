"""The two training stages of the paper: guided by true features, then closed-loop in the accelerated sampler.

Every optimiser step forecasts one feature and minimises the L1 distance to the true one. On a CUDA device the whole
optimiser step, from the KAN to AdamW, is captured in a CUDA graph for each expert: launching its many small kernels
would take longer than running them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import ops
from ..plans.storage import Kind, SafetensorsFile
from ..runtime.clock import Call, Request
from ..runtime.driver import Forecast, Stats
from .predictor import Expert, Predictor
from .recording import Features, digest

# Steps launched one by one before one is captured: meanwhile kernels are compiled and AdamW makes its state.
_WARM_UP = 2
Losses = dict[str, list[float]]


@dataclass(frozen=True)
class TrainingConfig:
    """The paper's training settings (its supplement, 7.2).

    Args:
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        lr_step: optimiser steps after which the learning rate is multiplied by `lr_decay`.
        lr_decay: see `lr_step`.
        clip: maximum norm of the gradient.
        guided_epochs: passes over the prompts with true features.
        closed_loop_epochs: passes over the prompts in the accelerated sampler.
        batch: prompts in one request, which share each optimiser step.
        seed: of the initial parameters and the order of the prompts.
        checkpoint_every: batches between two checkpoints.

    Raises:
        ValueError: a value that must be positive is not.
    """

    lr: float = 1e-4
    weight_decay: float = 1e-4
    lr_step: int = 500
    lr_decay: float = 0.5
    clip: float = 1.0
    guided_epochs: int = 1
    closed_loop_epochs: int = 2
    batch: int = 1
    seed: int = 0
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        for name in ("lr", "lr_step", "lr_decay", "clip", "batch", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number")


def guided(
    predictors: Mapping[str, Predictor],
    recording: Features,
    first_step: int,
    config: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    checkpoint: str | os.PathLike[str] | None = None,
) -> Losses:
    """First stage: forecast each step from the true features before it.

    Args:
        predictors: one for each context of the recording; trained in place, on the device they are on.
        recording: full requests.
        first_step: the first step that is trained; earlier ones are always computed.
        config: settings.
        checkpoint: file from which an interrupted run continues, with the same result.

    Returns:
        The loss of every optimiser step, by context.

    Raises:
        ValueError: `first_step` is below 1, contexts differ, a loss is not finite, or `checkpoint` cannot be used.
    """
    if first_step < 1:
        raise ValueError(f"first_step={first_step}: expected at least 1, a forecast needs an earlier feature")
    stage = _Stage("guided", predictors, recording, config, checkpoint, first_step=first_step)

    def train_batch(indices: Sequence[int]) -> None:
        for context, learner in stage.learners.items():
            features = _batch(recording, indices, context, learner.device)
            for step in range(len(features)):
                if step >= first_step:
                    learner.learn(step, features[step])
                learner.remember(step, features[step])

    return stage.run(config.guided_epochs, train_batch)


def closed_loop(
    predictors: Mapping[str, Predictor],
    recording: Features,
    computed: Sequence[int],
    replay: Callable[[Sequence[int], ClosedLoop], Any],
    config: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    checkpoint: str | os.PathLike[str] | None = None,
) -> Losses:
    """Second stage: run the accelerated sampler. The history holds forecasts; the target stays the true feature.

    Args:
        predictors: one for each context of the recording; trained in place.
        recording: full requests.
        computed: the schedule.
        replay: runs the prompts of the given indices again, from their noise, under the given driver.
        config: settings.
        checkpoint: file from which an interrupted run continues, with the same result.

    Returns:
        The loss of every optimiser step, by context.

    Raises:
        ValueError: contexts differ, a loss is not finite, or `checkpoint` cannot be used.
    """
    stage = _Stage("closed-loop", predictors, recording, config, checkpoint, computed=list(computed))

    def train_batch(indices: Sequence[int]) -> None:
        targets = {c: _batch(recording, indices, c, learner.device) for c, learner in stage.learners.items()}
        replay(indices, ClosedLoop(stage.learners, computed, targets))

    return stage.run(config.closed_loop_epochs, train_batch)


def _batch(recording: Features, indices: Sequence[int], context: str, device: torch.device) -> Tensor:
    """The features [T, B, ...] of several prompts, as one request for all of them orders them."""
    parts = [recording.features(index, context).to(device) for index in indices]
    # One prompt has [T, m, ...] where guidance is batched in m calls; a request of several orders them call first.
    return torch.stack(parts, 2).flatten(1, 2)


class ClosedLoop:
    """A driver that forecasts with the predictors and trains them at every forecast step.

    Args:
        learners: one for each context.
        computed: the schedule.
        targets: for each context the true features [T, B, ...].
    """

    def __init__(self, learners: Mapping[str, Learner], computed: Sequence[int], targets: Mapping[str, Tensor]) -> None:
        self.stats = Stats()
        self._learners = learners
        self._computed = frozenset(computed)
        self._targets = targets

    def begin(self, request: Request) -> None:
        """Nothing to forget: a learner overwrites what it remembers before it reads it."""

    def forecast(self, call: Call) -> Forecast | None:
        """Forecast a step outside the schedule, and learn from it."""
        if call.step in self._computed:
            return None
        learner = self._learners[call.context]
        forecast = learner.learn(call.step, self._targets[call.context][call.step])
        learner.remember(call.step, forecast)
        return Forecast(lambda: forecast)

    def keep(self, call: Call, feature: Tensor | None) -> None:
        """Put a computed feature into the history."""
        assert feature is not None  # `lose` raises
        self._learners[call.context].remember(call.step, feature.detach())

    def refuse(self, call: Call, reason: str) -> None:
        """A forecast was not used.

        Raises:
            RuntimeError: always; the loop would train on something else.
        """
        raise RuntimeError(f"training stopped at step {call.step}: {reason}")

    def lose(self, reason: str) -> None:
        """Features are lost.

        Raises:
            RuntimeError: always, as `refuse`.
        """
        raise RuntimeError(f"training stopped: {reason}")

    def observe(self, call: Call, output: Tensor) -> None:
        """Training reads features, not outputs."""


class Learner:
    """A predictor with its optimiser, and the features that its windows read.

    Args:
        predictor: trained in place.
        sigmas: the T + 1 noise levels.
        config: settings.
    """

    def __init__(self, predictor: Predictor, sigmas: Sequence[float], config: TrainingConfig) -> None:
        self.predictor = predictor
        self.device = next(predictor.parameters()).device
        self.steps = 0
        self.losses: list[Tensor] = []
        self._config = config
        self._window = max(stage.window for stage in predictor.stages)
        self._experts = [predictor.expert(sigma) for sigma in sigmas[:-1]]
        # On the device once, not in every step: each copy waits for it.
        self._offsets = torch.stack([predictor.offsets(step, sigmas) for step in range(len(sigmas) - 1)])
        self._slots = {stage.window: self._windows(stage.window) for stage in predictor.stages}
        self._step = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._ring: Tensor | None = None
        self._target: Tensor | None = None
        self._captured = self.device.type == "cuda"
        self._graphs: dict[int, _Graph] = {}
        # A captured step reads its learning rate from the device.
        rate = torch.tensor(config.lr, device=self.device) if self._captured else config.lr
        self.optimizer = torch.optim.AdamW(
            predictor.parameters(),
            rate,
            weight_decay=config.weight_decay,
            fused=self._captured,
            capturable=self._captured,
        )

    def remember(self, step: int, feature: Tensor) -> None:
        """Keep the feature [...] of a step for the windows of later ones."""
        ring = self._ring
        if ring is None or (ring.shape[1:], ring.dtype) != (feature.shape, feature.dtype):
            self._graphs.clear()
            self._target = None
            with torch.inference_mode(False):
                ring = self._ring = feature.new_empty((self._window, *feature.shape))
        ring[step % self._window].copy_(feature)

    def learn(self, step: int, target: Tensor) -> Tensor:
        """One optimiser step on the L1 loss. The features that the window reads must be remembered.

        Args:
            step: t, the step to forecast.
            target: its true feature [...].

        Returns:
            The forecast [...] made before the parameters moved, detached; the next call may overwrite it.
        """
        self._step.fill_(step)
        expert = self._experts[step]
        if self._captured:
            loss, forecast = self._replay(expert, target)
        else:
            self._target = target
            loss, forecast = self._update(expert)
        self.losses.append(loss.clone())
        self.steps += 1
        if self.steps % self._config.lr_step == 0:
            self._set_rate()
        return forecast

    def state(self) -> dict[str, Tensor]:
        """The parameters and the optimiser's state, by name."""
        tensors = {f"predictor/{name}": tensor for name, tensor in self.predictor.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{name}": tensor for name, tensor in values.items()}
        return tensors

    def resume(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Continue after `steps` optimiser steps from what `state` returned then."""
        state: dict[int, dict[str, Tensor]] = {}
        parameters = {}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            if part == "predictor":
                parameters[name] = tensor
            else:
                index, name = name.split("/")
                state.setdefault(int(index), {})[name] = tensor
        self.predictor.load_state_dict(parameters)
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.steps = steps
        self._graphs.clear()
        self._set_rate()

    def _set_rate(self) -> None:
        """Set the learning rate for the steps done; in place where it was captured."""
        rate = self._config.lr * self._config.lr_decay ** (self.steps // self._config.lr_step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _replay(self, expert: Expert, target: Tensor) -> tuple[Tensor, Tensor]:
        if self._target is None:
            self._target = torch.empty_like(target)
        self._target.copy_(target)
        graph = self._graphs.setdefault(id(expert), _Graph())
        if graph.runs < _WARM_UP:
            graph.runs += 1
            return self._update(expert)
        if graph.graph is None:
            self.optimizer.zero_grad()
            graph.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph.graph):
                graph.outputs = self._update(expert)
        graph.graph.replay()
        assert graph.outputs is not None
        return graph.outputs

    def _update(self, expert: Expert) -> tuple[Tensor, Tensor]:
        """Forecast, loss, gradients, clipping and AdamW for the step in `self._step`."""
        assert self._ring is not None and self._target is not None
        wide = ops.wide_dtype(self._ring)
        slots = self._slots[expert.window].index_select(0, self._step).squeeze(0)
        with torch.enable_grad():
            alpha = expert.net(self._offsets.index_select(0, self._step)).reshape(())
            row = (expert.weights.to(wide), expert.projection.bias.to(wide), alpha.to(wide))
            loss, forecast = ops.predict_loss(self._ring, slots, *row, self._target)
            self.optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(expert.parameters(), self._config.clip)
        self.optimizer.step()
        return loss.detach(), forecast

    def _windows(self, window: int) -> Tensor:
        """[T, K] int32: the slots that each step reads; its oldest feature is repeated where there are fewer than K."""
        steps = torch.arange(len(self._offsets), device=self.device).unsqueeze(1)
        reads = (steps - window + torch.arange(window, device=self.device)).clamp(min=0)
        return (reads % self._window).to(torch.int32)


@dataclass
class _Graph:
    """The captured optimiser step of one expert."""

    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    outputs: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class _Checkpoint(SafetensorsFile):
    """A stage in progress: the learners' state, and which stage this is, how far it got, and its losses so far."""

    kind: ClassVar[Kind] = Kind(
        "checkpoint", "lesa-training-3", "checkpoint.safetensors", ValueError, "lesa.train", framework="pt"
    )
    tensors: dict[str, Tensor]
    progress: dict[str, Any]

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.tensors, self.progress

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any], description: dict[str, Any]) -> _Checkpoint:
        return cls(arrays, description)


class _Stage:
    """One training stage: its learners, the order of its batches, its checkpoint."""

    def __init__(
        self,
        name: str,
        predictors: Mapping[str, Predictor],
        recording: Features,
        config: TrainingConfig,
        checkpoint: str | os.PathLike[str] | None,
        **identity: Any,
    ) -> None:
        if set(predictors) != set(recording.contexts):
            raise ValueError(
                f"predictors are given for contexts {sorted(predictors)} but the recording has "
                f"{sorted(recording.contexts)}: give one predictor for each context"
            )
        self.learners = {c: Learner(p, recording.sigmas, config) for c, p in predictors.items()}
        self._name, self._config = name, config
        self._count = len(recording.prompts)
        self._checkpoint = Path(checkpoint) if checkpoint is not None else None
        self._identity = {
            "phase": name,
            "recording": digest(recording),
            "config": asdict(config),
            "predictors": {context: predictor.config for context, predictor in predictors.items()},
            **identity,
        }
        self._losses: Losses = {context: [] for context in predictors}

    def run(self, epochs: int, train_batch: Callable[[Sequence[int]], None]) -> Losses:
        """Train on every batch that no checkpoint has done; returns all losses."""
        batches = [batch for epoch in range(epochs) for batch in self._batches(epoch)]
        position = self._restore()
        with tqdm(total=len(batches), initial=position, desc=self._name, unit="request") as bar:
            for i in range(position, len(batches)):
                train_batch(batches[i])
                self._collect()
                bar.update()
                bar.set_postfix({c: f"{losses[-1]:.4f}" for c, losses in self._losses.items() if losses})
                if (i + 1) % self._config.checkpoint_every == 0 or i + 1 == len(batches):
                    self._save(i + 1)
        return self._losses

    def _batches(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._config.seed + epoch)
        order = torch.randperm(self._count, generator=generator).tolist()
        size = self._config.batch
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _collect(self) -> None:
        """Read the losses back once for each request, not for each step: every read waits for the device."""
        for context, learner in self.learners.items():
            if learner.losses:
                losses = torch.stack(learner.losses).tolist()
                if not all(map(math.isfinite, losses)):
                    raise ValueError(
                        f"a loss of context {context!r} in the {self._name} stage is not finite: the features hold NaN "
                        "or infinity, or lr is too high; the last checkpoint is kept"
                    )
                self._losses[context] += losses
                learner.losses.clear()

    def _save(self, position: int) -> None:
        if self._checkpoint is None:
            return
        states = {context: learner.state() for context, learner in self.learners.items()}
        tensors = {f"{c}/{name}": t.contiguous().cpu() for c, state in states.items() for name, t in state.items()}
        steps = {context: learner.steps for context, learner in self.learners.items()}
        progress = {"identity": self._identity, "position": position, "losses": self._losses, "steps": steps}
        _Checkpoint(tensors, progress).save(self._checkpoint)

    def _restore(self) -> int:
        """Load the checkpoint if there is one; returns how many batches are done."""
        path = self._checkpoint
        if path is None or not path.is_file():
            return 0
        try:
            found = _Checkpoint.load(path)
        except ValueError as error:
            raise ValueError(f"{error}, or delete it to start again") from error
        if found.progress.get("identity") != self._identity:
            raise ValueError(
                f"checkpoint {str(path)!r} belongs to another training (other stage, prompts, predictors or "
                "settings): delete it to start again, or give another path"
            )
        try:
            for context, learner in self.learners.items():
                start = f"{context}/"
                own = {k.removeprefix(start): t for k, t in found.tensors.items() if k.startswith(start)}
                learner.resume(own, found.progress["steps"][context])
            self._losses = found.progress["losses"]
            return found.progress["position"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"checkpoint {str(path)!r} is incomplete: delete it to start again") from error
