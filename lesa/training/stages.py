"""Training of a `Predictor` in the paper's two stages: guided by true features, then closed-loop in the sampler.

An optimiser step is a forecast, its loss and gradients in one pass, then AdamW. On a CUDA device the whole step, from
the KAN to the optimiser, is captured in a CUDA graph for each expert: launching its many small kernels one by one takes
longer than running them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save as serialize
from torch import Tensor
from tqdm.auto import tqdm

from .. import ops
from ..plans import storage
from ..runtime.clock import Call, Request
from ..runtime.driver import Forecast, Stats
from .experts import Expert
from .predictor import Predictor

_KIND = storage.Kind(
    "checkpoint", "lesa-training-3", "checkpoint.safetensors", ValueError, "an earlier run", framework="pt"
)
Losses = dict[str, list[float]]
# Steps that run before one is captured: they compile the kernels and make the optimiser's state.
_WARM_UP = 2


@dataclass(frozen=True)
class TrainingConfig:
    """The paper's recipe (its supplement, 7.2).

    Args:
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        lr_step: optimiser steps after which the learning rate is multiplied by `lr_decay`.
        lr_decay: see `lr_step`.
        clip: maximum norm of the gradient.
        guided_epochs: passes over the prompts with true features.
        closed_loop_epochs: passes over the prompts in the accelerated sampler.
        batch: prompts in one request; one optimiser step learns from all of them.
        seed: of the order of the prompts.
        checkpoint_every: batches between two checkpoints.
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


class Features(Protocol):
    """What training reads of a recording."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """One a request."""

    @property
    def contexts(self) -> tuple[str, ...]:
        """Cache contexts of the features."""

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The T + 1 noise levels."""

    def features(self, index: int, context: str) -> Tensor:
        """The features [T, B, ...] of prompt `index`."""


def guided(
    predictors: Mapping[str, Predictor],
    recording: Features,
    first_step: int,
    config: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    checkpoint: str | os.PathLike[str] | None = None,
) -> Losses:
    """First stage: forecast each step from the true features before it (Eq. 4 to 7), one optimiser step each, L1 loss.

    Args:
        predictors: one for every context of the recording; trained in place, on the device they are on.
        recording: full requests.
        first_step: first step that is forecast; earlier ones are always computed.
        config: the recipe.
        checkpoint: file from which a killed run continues, with the same result.

    Returns:
        The loss of every optimiser step, by context.
    """
    if first_step < 1:
        raise ValueError(f"first_step={first_step}: expected at least 1, a forecast needs an earlier feature")
    phase = _Phase("guided", predictors, recording, config, checkpoint, first_step=first_step)

    def train_batch(indices: Sequence[int]) -> None:
        for context, learner in phase.learners.items():
            features = _batch(recording, indices, context, learner.device)
            for step in range(len(features)):
                if step >= first_step:
                    learner.learn(step, features[step])
                learner.remember(step, features[step])

    return phase.run(config.guided_epochs, train_batch)


def closed_loop(
    predictors: Mapping[str, Predictor],
    recording: Features,
    computed: Sequence[int],
    replay: Callable[[Sequence[int], ClosedLoop], Any],
    config: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    checkpoint: str | os.PathLike[str] | None = None,
) -> Losses:
    """Second stage: run the accelerated sampler; the history holds forecasts, the target stays the true feature.

    Args:
        predictors: one for every context of the recording; trained in place.
        recording: full requests.
        computed: the schedule.
        replay: runs the prompts of the given indices again from their noise under the given driver.
        config: the recipe.
        checkpoint: file from which a killed run continues, with the same result.

    Returns:
        The loss of every optimiser step, by context.
    """
    phase = _Phase("closed-loop", predictors, recording, config, checkpoint, computed=list(computed))

    def train_batch(indices: Sequence[int]) -> None:
        targets = {c: _batch(recording, indices, c, learner.device) for c, learner in phase.learners.items()}
        replay(indices, ClosedLoop(phase.learners, computed, targets))

    return phase.run(config.closed_loop_epochs, train_batch)


class ClosedLoop:
    """A driver that forecasts with predictors and trains them while the request runs.

    Args:
        learners: one for every context.
        computed: the schedule.
        targets: for every context the true features [T, B, ...].
    """

    def __init__(self, learners: Mapping[str, Learner], computed: Sequence[int], targets: Mapping[str, Tensor]) -> None:
        self.stats = Stats()
        self._learners = learners
        self._computed = frozenset(computed)
        self._targets = targets

    def begin(self, request: Request) -> None:
        """Nothing to reset: what a learner remembers is overwritten before it is read."""

    def forecast(self, call: Call) -> Forecast | None:
        """Forecast and learn from a step outside the schedule."""
        if call.step in self._computed:
            return None
        learner = self._learners[call.context]
        forecast = learner.learn(call.step, self._targets[call.context][call.step])
        learner.remember(call.step, forecast)
        return Forecast(lambda: forecast)

    def keep(self, call: Call, feature: Tensor | None) -> None:
        """Take a computed feature into the history."""
        assert feature is not None  # `lose` raises
        self._learners[call.context].remember(call.step, feature.detach())

    def refuse(self, call: Call, reason: str) -> None:
        """Stop: a forecast was not used, so the closed loop is no longer the one that is trained for.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"training stopped at step {call.step}: {reason}")

    def lose(self, reason: str) -> None:
        """Stop: features are lost.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"training stopped: {reason}")

    def observe(self, call: Call, output: Tensor) -> None:
        """Nothing to do: training reads features, not outputs."""


class _Phase:
    """One stage of training: its learners, its place in the data, its checkpoint."""

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
                f"{sorted(recording.contexts)}: give one predictor a context"
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
        self._done: Losses = {context: [] for context in predictors}

    def run(self, epochs: int, train_batch: Callable[[Sequence[int]], None]) -> Losses:
        batches = [batch for epoch in range(epochs) for batch in self._batches(epoch)]
        position = self._restore()
        with tqdm(total=len(batches), initial=position, desc=self._name, unit="request") as bar:
            for i in range(position, len(batches)):
                train_batch(batches[i])
                self._collect()
                bar.update()
                bar.set_postfix({c: f"{losses[-1]:.4f}" for c, losses in self._done.items() if losses})
                if (i + 1) % self._config.checkpoint_every == 0 or i + 1 == len(batches):
                    self._save(i + 1)
        return self._done

    def _batches(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._config.seed + epoch)
        order = torch.randperm(self._count, generator=generator).tolist()
        size = self._config.batch
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _collect(self) -> None:
        """Read the losses once a request, not once a step: each read waits for the device."""
        for context, learner in self.learners.items():
            if learner.losses:
                losses = torch.stack(learner.losses).tolist()
                if not all(map(math.isfinite, losses)):
                    raise ValueError(
                        f"a loss of context {context!r} in the {self._name} stage is not finite: the features hold NaN "
                        "or infinity, or lr is too high; the last checkpoint is kept"
                    )
                self._done[context] += losses
                learner.losses.clear()

    def _save(self, position: int) -> None:
        if self._checkpoint is None:
            return
        tensors, steps = {}, {}
        for context, learner in self.learners.items():
            for name, tensor in learner.predictor.state_dict().items():
                tensors[f"{context}/predictor/{name}"] = tensor
            for i, state in learner.optimizer.state_dict()["state"].items():
                for name, tensor in state.items():
                    tensors[f"{context}/optimizer/{i}/{name}"] = tensor
            steps[context] = learner.steps
        description = {
            "format": _KIND.format,
            "identity": self._identity,
            "position": position,
            "losses": self._done,
            "steps": steps,
        }
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        storage.replace_file(self._checkpoint, serialize(tensors, storage.metadata(description)))

    def _restore(self) -> int:
        """Load the checkpoint if there is one; returns how many batches are done."""
        path = self._checkpoint
        if path is None or not path.is_file():
            return 0
        try:
            description, tensors = storage.read(path, _KIND)
        except ValueError as error:
            raise ValueError(f"{error}; or delete it to start again") from error
        if description.get("identity") != self._identity:
            raise ValueError(
                f"checkpoint {str(path)!r} belongs to another training (other phase, prompts, predictors or "
                "settings): delete it or give another path"
            )
        try:
            for context, learner in self.learners.items():
                _load(learner, context, tensors, description["steps"][context])
            self._done = description["losses"]
            return description["position"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"checkpoint {str(path)!r} is incomplete: delete it to start again") from error


def _load(learner: Learner, context: str, tensors: Mapping[str, Tensor], steps: int) -> None:
    prefix = f"{context}/predictor/"
    learner.predictor.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{context}/optimizer/"):
            *_, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = tensor
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
    learner.resume(steps)


def digest(recording: Features) -> str:
    """A hash of what a recording holds: prompts, contexts, noise levels and, where it names them, model and site."""
    parts = [recording.prompts, recording.contexts, recording.sigmas, getattr(recording, "provenance", None)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _batch(recording: Features, indices: Sequence[int], context: str, device: torch.device) -> Tensor:
    """The features [T, B, ...] of several prompts, in the layout of one request for all of them."""
    parts = [recording.features(index, context).to(device) for index in indices]
    # A prompt's part is [T, m, ...], m calls' worth of batched guidance; a request orders them call first.
    return torch.stack(parts, 2).flatten(1, 2)


class Learner:
    """A predictor with its optimiser, and the features that its windows read.

    Args:
        predictor: trained in place.
        sigmas: the T + 1 noise levels.
        config: the recipe.
    """

    def __init__(self, predictor: Predictor, sigmas: Sequence[float], config: TrainingConfig) -> None:
        self.predictor = predictor
        self.device = next(predictor.parameters()).device
        self.steps = 0
        self.losses: list[Tensor] = []
        self._config = config
        self._window = max(stage.window for stage in predictor.stages)
        self._experts = [predictor.expert(sigma) for sigma in sigmas[:-1]]
        # Copied once, not once a step: each copy waits for the device.
        self._offsets = torch.stack([predictor.offsets(step, sigmas) for step in range(len(sigmas) - 1)])
        self._slots = {stage.window: self._windows(stage.window) for stage in predictor.stages}
        self._step = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._ring: Tensor | None = None
        self._target: Tensor | None = None
        self._captured = self.device.type == "cuda"
        self._graphs: dict[int, _Graph] = {}
        # A captured step reads its learning rate from this tensor.
        rate = torch.tensor(config.lr, device=self.device) if self._captured else config.lr
        self.optimizer = torch.optim.AdamW(
            predictor.parameters(),
            rate,
            weight_decay=config.weight_decay,
            fused=self._captured,
            capturable=self._captured,
        )

    def remember(self, step: int, feature: Tensor) -> None:
        """Keep the feature [...] of a step for the windows of later steps."""
        ring = self._ring
        if ring is None or (ring.shape[1:], ring.dtype) != (feature.shape, feature.dtype):
            self._graphs.clear()
            self._target = None
            with torch.inference_mode(False):
                ring = self._ring = feature.new_empty((self._window, *feature.shape))
        ring[step % self._window].copy_(feature)

    def learn(self, step: int, target: Tensor) -> Tensor:
        """One optimiser step on the L1 loss; the steps that the window reads must be remembered.

        Args:
            step: the step forecast.
            target: its true feature [...].

        Returns:
            The forecast made before the parameters moved, detached; the next call may overwrite it.
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

    def resume(self, steps: int) -> None:
        """Continue after `steps` optimiser steps, once the optimiser's state is loaded."""
        self.steps = steps
        self._graphs.clear()
        self._set_rate()

    def _set_rate(self) -> None:
        """Multiply the learning rate by `lr_decay` every `lr_step` steps; a captured rate is changed in place."""
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
        """Forecast, loss, gradients, clipping and AdamW for the step `self._step` names."""
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
        """Slots [T, K] int32 that each step reads; where there are fewer than K features, the oldest is repeated."""
        steps = torch.arange(len(self._offsets), device=self.device).unsqueeze(1)
        reads = (steps - window + torch.arange(window, device=self.device)).clamp(min=0)
        return (reads % self._window).to(torch.int32)


@dataclass
class _Graph:
    """The captured step of one expert."""

    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    outputs: tuple[Tensor, Tensor] | None = None
