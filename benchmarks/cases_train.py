"""One optimiser step of a stage expert: lesa's learner, and the plain torch learner that it replaced."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lesa.ops.reference import kan_layer
from lesa.plans.schedule import ONE_STAGE
from lesa.training.experts import Expert, Kan
from lesa.training.predictor import Predictor
from lesa.training.stages import Learner, TrainingConfig

from .cases import Shape
from .cases_kan import KAN_BYTES, knots

STEPS, WINDOW, RING = 50, 8, 24


class PlainLearner:
    """A predictor with its optimiser in plain torch, as `lesa.training` and `lesa.experts` had it at 74b48be.

    Args:
        predictor: trained in place.
        sigmas: the T + 1 noise levels.
        config: the recipe.
    """

    def __init__(self, predictor: Predictor, sigmas: tuple[float, ...], config: TrainingConfig) -> None:
        like = next(predictor.parameters())
        self.predictor, self.sigmas, self.clip = predictor, sigmas, config.clip
        self.losses: list[Tensor] = []
        self.knots = knots(like.dtype, like.device)
        self.optimizer = torch.optim.AdamW(
            predictor.parameters(), config.lr, weight_decay=config.weight_decay, fused=like.device.type == "cuda"
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, config.lr_step, config.lr_decay)

    def learn(self, history: Tensor, step: int, target: Tensor) -> Tensor:
        """One optimiser step on the L1 loss; the forecast made before it.

        Args:
            history: the features before `step`, oldest first.
            step: the step forecast.
            target: its true feature.
        """
        expert = self.predictor.expert(self.sigmas[step])
        recent = list(history[-expert.window :])
        forecast = self._forecast(expert, torch.stack(recent), self.predictor.offsets(step, self.sigmas))
        loss = (forecast - target).abs().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(expert.parameters(), self.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.detach())
        return forecast.detach()

    def _forecast(self, expert: Expert, history: Tensor, dt: Tensor) -> Tensor:
        weight, bias = expert.weights, expert.projection.bias[0]
        history = history.to(torch.promote_types(history.dtype, weight.dtype))
        z = torch.tensordot(weight.to(history.dtype), history, dims=1) + bias
        assert isinstance(expert.net, Kan)
        for layer in expert.net.layers:
            dt = kan_layer(dt, *layer.parts, self.knots, layer.order)
        return history[-1] + dt.squeeze(-1) * z


class TrainStep:
    """Features of a request, and learners that take their steps one after the other.

    Args:
        shape: of the features.
        dtype: of the features.
        device: "cuda" or "cpu".
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.device, self.dtype, self.size = device, dtype, shape.B * shape.N * shape.D
        # Neighbouring features are similar, so alpha's gradient is not only noise.
        common = torch.randn(shape[:3], device=device, dtype=dtype)
        noise = torch.randn(RING, *shape[:3], device=device, dtype=dtype)
        self.features = noise.mul_(0.3).add_(common)
        self.sigmas = tuple(torch.linspace(1, 0, STEPS + 1).tolist())

    @property
    def bytes(self) -> int:
        """The least that must be moved: window and target read, forecast written, parameters and moments updated."""
        return (WINDOW + 2) * self.size * self.dtype.itemsize + 6 * KAN_BYTES

    def formula(self, count: int, dtype: torch.dtype) -> Tensor:
        """The losses [count] of the plain learner's first steps, with parameters and features in `dtype`."""
        features = self.features[: WINDOW + count].to(torch.promote_types(dtype, self.dtype))
        learner = PlainLearner(self._predictor().to(dtype), self.sigmas, TrainingConfig())
        for step in range(WINDOW, WINDOW + count):
            learner.learn(features[:step], step, features[step])
        return torch.stack(learner.losses)

    def losses(self, provider: str, count: int) -> Tensor:
        """The losses [count] of a provider's first steps."""
        learner, take = self._learner(provider)
        for _ in range(count):
            take()
        return torch.stack(learner.losses)

    def steps(self, provider: str) -> Callable[[], Tensor]:
        """Takes one optimiser step a call."""
        return self._learner(provider)[1]

    def _learner(self, provider: str) -> tuple[Learner | PlainLearner, Callable[[], Tensor]]:
        turn = itertools.cycle(range(WINDOW, RING))
        if provider == "eager":
            plain = PlainLearner(self._predictor(), self.sigmas, TrainingConfig())
            return plain, lambda: plain.learn(self.features[: (t := next(turn))], t, self.features[t])
        learner = Learner(self._predictor(), self.sigmas, TrainingConfig())
        for step in range(WINDOW - 1):
            learner.remember(step, self.features[step])

        def take() -> Tensor:
            step = next(turn)
            learner.remember(step - 1, self.features[step - 1])
            return learner.learn(step, self.features[step])

        return learner, take

    def _predictor(self) -> Predictor:
        return Predictor(STEPS, ONE_STAGE).to(self.device)
