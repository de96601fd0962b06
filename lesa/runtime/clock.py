"""The clock of a denoiser: which request, context and step a call belongs to.

Pipelines do not say. A pipeline's scheduler does: `set_timesteps` makes a new `timesteps` tensor for every
request, and `step_index` counts the updates made. A bare denoiser in a loop of your own has only its
timestep argument, which falls within a request and rises when the next one starts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..plans.rows import PlanError
from .scheduler import begin_index, sigmas_of

UNNAMED = "default"
# cond, uncond and two more guidance branches: no pipeline calls its denoiser more often for one step.
_MOST_CALLS_A_STEP = 4


@dataclass(frozen=True)
class Request:
    """One pipeline call, as far as it is known at its first denoiser call.

    Args:
        num_steps: denoiser calls to come in each context; None for a bare denoiser.
        sigmas: the noise levels with the final 0, `num_steps` + 1 of them; None for a bare denoiser.
        scheduler: the pipeline's, its timesteps set and no update made yet; None for a bare denoiser.
    """

    num_steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    scheduler: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Call:
    """One denoiser call.

    Args:
        context: cache context, e.g. "cond".
        step: index of the call in its request and context.
        timestep: the denoiser's timestep argument as given.
        sample: the denoiser's first tensor argument, the noisy sample.
        request: the request it belongs to.
        starts: whether it is the first call of that request.
    """

    context: str
    step: int
    timestep: Any
    sample: torch.Tensor
    request: Request
    starts: bool


class Clock:
    """Counts the steps of every context of one denoiser.

    Args:
        scheduler_of: returns the scheduler of the enabled pipeline, at each call anew since it may be
            swapped; None, or a function that returns None, for a bare denoiser.
    """

    def __init__(self, scheduler_of: Callable[[], Any] | None = None) -> None:
        self._scheduler_of = scheduler_of or (lambda: None)
        self.abort()

    def abort(self) -> None:
        """Forget the request under way: the next call starts a new one."""
        self._request: Request | None = None
        self._timesteps: Any = None
        self._begin = 0
        self._counts: dict[str, int] = defaultdict(int)
        self._last: dict[str, float] = {}

    def tick(self, context: str | None, timestep: Any, sample: torch.Tensor) -> Call:
        """Place one denoiser call.

        Raises:
            PlanError: the calls do not fit the scheduler's steps.
        """
        scheduler = self._scheduler_of()
        if scheduler is None:
            name, step, starts = self._tick_bare(context or UNNAMED, timestep)
        else:
            name, step, starts = self._tick_scheduler(context or UNNAMED, scheduler, timestep)
        assert self._request is not None
        return Call(name, step, timestep, sample, self._request, starts)

    def _tick_bare(self, context: str, timestep: Any) -> tuple[str, int, bool]:
        now = float(torch.as_tensor(timestep).max())
        starts = self._request is None or now >= self._last.get(context, float("inf"))
        if starts:
            if now == self._last.get(context) and self._counts[context] > 1:
                raise PlanError(
                    f"the denoiser was called twice at timestep {now:g} in context {context!r}: name the calls of "
                    "one step with `with denoiser.cache_context(name)`"
                )
            self.abort()
            self._request = Request()
        self._last[context] = now
        step = self._counts[context]
        self._counts[context] += 1
        return context, step, starts

    def _tick_scheduler(self, context: str, scheduler: Any, timestep: Any) -> tuple[str, int, bool]:
        starts = self._request is None or scheduler.timesteps is not self._timesteps
        if starts:
            self.abort()
            self._timesteps = scheduler.timesteps
            self._begin = begin_index(scheduler, timestep)
            sigmas = sigmas_of(scheduler)[self._begin :]
            self._request = Request(len(sigmas) - 1, sigmas, scheduler)
        assert self._request is not None and self._request.num_steps is not None
        if not hasattr(scheduler, "step_index"):
            step = self._counts[context]
            self._counts[context] += 1
            if step >= self._request.num_steps:
                raise PlanError(
                    f"the denoiser was called {step + 1} times in context {context!r} of a request of "
                    f"{self._request.num_steps} steps: name the calls of one step with "
                    "`with denoiser.cache_context(name)`"
                )
            return context, step, starts
        # None until the first update of the request.
        step = max((scheduler.step_index or self._begin) - self._begin, 0)
        return self._branch(context, step), step, starts

    def _branch(self, context: str, step: int) -> str:
        """The context of a call; calls of one step that carry one name are told apart by their order."""
        for i in range(_MOST_CALLS_A_STEP):
            name = context if i == 0 else f"{context}#{i + 1}"
            if self._counts[name] <= step:
                self._counts[name] = step + 1
                return name
        raise PlanError(
            f"the denoiser was called more than {_MOST_CALLS_A_STEP} times at step {step} of its pipeline's "
            "scheduler: it is used outside the pipeline it was enabled on; enable it on the one that runs"
        )
