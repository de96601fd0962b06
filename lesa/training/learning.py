"""One optimiser step of a predictor: forecast, loss and gradients in one pass, then AdamW.

On a CUDA device the whole step, from the KAN to the optimiser, is captured in a CUDA graph for each expert: its many
small kernels take less time than launching them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .experts import Expert
from .predictor import Predictor

# Steps run one by one before one is captured: kernels are compiled and the optimiser makes its state meanwhile.
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
        batch: prompts a request; one optimiser step serves them all.
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
        # On the device once, not once a step: each copy waits for it.
        self._offsets = torch.stack([predictor.offsets(step, sigmas) for step in range(len(sigmas) - 1)])
        self._slots = {stage.window: self._windows(stage.window) for stage in predictor.stages}
        self._step = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._ring: Tensor | None = None
        self._target: Tensor | None = None
        self._captured = self.device.type == "cuda"
        self._graphs: dict[int, _Graph] = {}
        # A captured step reads its learning rate where it lies.
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
        """Go on after `steps` optimiser steps, the optimiser's state having been loaded."""
        self.steps = steps
        self._graphs.clear()
        self._set_rate()

    def _set_rate(self) -> None:
        """StepLR; a captured rate is changed in place."""
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
        """[T, K]: the slots each step reads, its oldest feature repeated where K are not there."""
        steps = torch.arange(len(self._offsets), device=self.device).unsqueeze(1)
        reads = (steps - window + torch.arange(window, device=self.device)).clamp(min=0)
        return (reads % self._window).to(torch.int32)


@dataclass
class _Graph:
    """The captured step of one expert."""

    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    outputs: tuple[Tensor, Tensor] | None = None
