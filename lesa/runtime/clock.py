"""The clock of a denoiser: which request, context and step a call belongs to, and what the scheduler tells.

Pipelines do not say. A pipeline's scheduler does: `set_timesteps` makes a new `timesteps` tensor for every request, and
`step_index` counts the updates made. A bare denoiser in a loop of your own has only its timestep argument, which falls
within a request and rises when the next one starts. Calls of one step have one timestep and one sample.

A scheduler also tells its noise levels, and its impulse response: how the sample at each step depends on what the
scheduler was given at every earlier one. Between the denoiser's outputs v_i and the samples x_t every sampler in use is
linear: x_t = (a part of the noise) + sum_i response[t, i] v_i. The numbers follow from the scheduler's own `step`, fed
one impulse for each step; no formula of a scheduler is repeated here.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..planner.generic import FLOW, PREDICTIONS
from ..planner.statistics import flow_impulse_response
from ..plans.rows import LesaWarning, PlanError

UNNAMED = "default"
# cond, uncond and two more guidance branches: no pipeline calls its denoiser more often for one step.
_MOST_CALLS_A_STEP = 4
_TOLERANCE = 1e-3  # schedulers work in float32
_NONLINEAR = ("clip_sample", "thresholding")
# What schedulers remember of earlier steps of a request, as it is before the first.
_BEFORE = ("_step_index", "last_sample", "prev_derivative", "dt", "sample")
_BEFORE_LISTS = ("model_outputs", "timestep_list")
_BEFORE_EMPTY = ("ets", "derivatives")
_BEFORE_COUNTS = ("lower_order_nums", "counter")


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
        self._sample: Tensor | None = None

    def tick(self, context: str | None, timestep: Any, sample: torch.Tensor) -> Call:
        """Place one denoiser call.

        Raises:
            PlanError: the calls do not fit the scheduler's steps.
        """
        scheduler = self._scheduler_of()
        if scheduler is None:
            name, step, starts = self._tick_bare(context or UNNAMED, timestep, sample)
        else:
            name, step, starts = self._tick_scheduler(context or UNNAMED, scheduler, timestep)
        assert self._request is not None
        return Call(name, step, timestep, sample, self._request, starts)

    def _tick_bare(self, context: str, timestep: Any, sample: torch.Tensor) -> tuple[str, int, bool]:
        now, step = float(torch.as_tensor(timestep).max()), self._counts[context] - 1
        if now == self._last.get(context):
            if self._is_another_branch(context, step, sample):
                return self._branch(context, step), step, False
            if step:  # after the first step it is the next request, if both have one step
                raise PlanError(
                    f"the denoiser was called twice at timestep {now:g} in context {context!r}: give the calls of one "
                    "step the same sample and no name, or name each with `with denoiser.cache_context(name)`"
                )
        starts = self._request is None or now >= self._last.get(context, float("inf"))
        if starts:
            self.abort()
            self._request = Request()
        elif now <= min(self._last.values()):  # also a context that comes late, or comes back, is at this step
            newest = min(self._last, key=self._last.__getitem__)
            self._counts[context] = self._counts[newest] - (now == self._last[newest])
        self._last[context] = now
        if context == UNNAMED:
            self._sample = sample.clone()  # a loop may go on in the same memory
        self._counts[context] += 1
        return context, self._counts[context] - 1, starts

    def _is_another_branch(self, context: str, step: int, sample: torch.Tensor) -> bool:
        """Whether a call at the timestep of the last one belongs to its step: it has no name, but the same sample."""
        known = self._sample
        if context != UNNAMED or known is None:
            return False
        if (sample.shape, sample.dtype, sample.device) != (known.shape, known.dtype, known.device):
            return False
        # As many calls as a step can have: the next one is the first of another request.
        full = step == 0 and self._name(context, _MOST_CALLS_A_STEP) in self._counts
        return not full and torch.equal(sample, known)

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
            if not starts and (context not in self._counts or self._counts[context] + 1 < max(self._counts.values())):
                # It comes late, or comes back.
                self._counts[context] = max(self._counts[context], begin_index(scheduler, timestep) - self._begin)
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
        for i in range(1, _MOST_CALLS_A_STEP + 1):
            name = self._name(context, i)
            if self._counts[name] <= step:
                self._counts[name] = step + 1
                return name
        raise PlanError(
            f"the denoiser was called more than {_MOST_CALLS_A_STEP} times at step {step}: it is used outside the "
            "pipeline or loop it was enabled for; enable it on the one that runs"
        )

    @staticmethod
    def _name(context: str, call: int) -> str:
        return context if call == 1 else f"{context}#{call}"


def impulse_response_of(scheduler: Any, begin: int | None = None) -> np.ndarray:
    """How each sample of a request depends on what the scheduler is given at each step.

    The scheduler is left as it is: a copy of it runs, without clipping and thresholding, which are not linear. Noise
    that it adds is the same in all runs and drops out.

    Args:
        scheduler: a diffusers scheduler, or what works like one, after `set_timesteps`.
        begin: index of the request's first timestep, not 0 in image-to-image; the scheduler's own by default.

    Returns:
        [T + 1, T] float64 for the T steps from `begin` on: x_t = ... + sum_i response[t, i] v_i, 0 for i >= t. Where
        the scheduler cannot be probed or is not linear: `flow_impulse_response` of its noise levels, and a LesaWarning.
    """
    if begin is None:
        begin = getattr(scheduler, "begin_index", None) or 0
    try:
        response, error = _probe(scheduler, begin)
        reason = None if error <= _TOLERANCE else f"its update is not linear (relative error {error:.1g})"
    except Exception as failure:  # anything may come from a scheduler we do not know
        reason = f"a copy of it could not be run ({type(failure).__name__}: {failure})"
    if reason is None:
        return response
    warnings.warn(
        f"the effect of errors under {type(scheduler).__name__} is not known, {reason}: it is taken to be that of "
        "Euler steps along a flow, so schedules may not be the best ones",
        LesaWarning,
        stacklevel=2,
    )
    return flow_impulse_response(sigmas_of(scheduler)[begin:])


def begin_index(scheduler: Any, timestep: Any) -> int:
    """The index of the request's first step: not 0 in image-to-image, which leaves out the noisiest steps."""
    if hasattr(scheduler, "begin_index"):
        return scheduler.begin_index or 0
    now = float(torch.as_tensor(timestep).max())
    found = (torch.as_tensor(scheduler.timesteps).double().cpu() == now).nonzero().flatten()
    return int(found[0]) if len(found) else 0


def sigmas_of(scheduler: Any) -> tuple[float, ...]:
    """The noise levels of a scheduler's timesteps, from 1 (noise) to 0, with the final 0.

    A sample is alpha data + sigma noise, its level sigma / (alpha + sigma): the sigma of flow matching, which some
    schedulers (Mochi's) hold as 1 - sigma. The others hold sigma / alpha, or the squares of their alphas. Where a
    scheduler holds none of these, the share of the training timesteps stands in.
    """
    timesteps = torch.as_tensor(scheduler.timesteps).double().cpu()
    sigmas, alphas = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        sigmas = torch.as_tensor(sigmas).double().cpu()[:-1]
        if prediction_of(scheduler) != FLOW:
            return (*(sigmas / (1.0 + sigmas)).tolist(), 0.0)
        rising = len(sigmas) > 1 and float(sigmas[0]) < float(sigmas[-1])
        return (*(1.0 - sigmas if rising else sigmas).tolist(), 0.0)
    if alphas is not None and float(timesteps.max()) < len(alphas):
        squared = torch.as_tensor(alphas).double().cpu()[timesteps.long()]
        alpha, sigma = squared.sqrt(), (1.0 - squared).sqrt()
        return (*(sigma / (alpha + sigma)).tolist(), 0.0)
    return (*(timesteps / scheduler.config.num_train_timesteps).tolist(), 0.0)


def prediction_of(scheduler: Any) -> str:
    """What the denoiser predicts, one of `PREDICTIONS`; a scheduler that does not say goes by its sigmas."""
    config = getattr(scheduler, "config", {})
    told = config.get("prediction_type")
    if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas"):
        return FLOW
    sigmas = getattr(scheduler, "sigmas", None)
    by_sigmas = FLOW if sigmas is None or float(torch.as_tensor(sigmas).max()) <= 1.0 else "epsilon"
    return told if told in PREDICTIONS else by_sigmas


def _probe(scheduler: Any, begin: int) -> tuple[np.ndarray, float]:
    """The response, and how far from linear it is: its error on random outputs, relative to them."""
    total = len(scheduler.timesteps) - begin
    # One column for each impulse, one of random outputs, and one of none.
    random = torch.randn(total, 1, generator=torch.Generator().manual_seed(0))
    outputs = torch.cat([torch.eye(total), random, torch.zeros(total, 1)], 1)
    samples = _run(scheduler, begin, outputs)
    if samples[:, -1].any():  # something comes of nothing, such as noise, which is another one in each column
        samples -= _run(scheduler, begin, torch.zeros_like(outputs))
    response = samples[:, :total].numpy()
    expected = response @ random[:, 0].double().numpy()
    wrong = np.abs(samples[:, total].numpy() - expected).max()
    return response, float(wrong / max(np.abs(expected).max(), np.finfo(np.float64).tiny))


def _run(scheduler: Any, begin: int, outputs: Tensor) -> Tensor:
    """The samples [T + 1, N] of a scheduler that starts from zeros and is given outputs [T, N]."""
    scheduler = _fresh(scheduler, begin)
    names = set(inspect.signature(scheduler.step).parameters)
    more: dict[str, Any] = {"return_dict": False} if "return_dict" in names else {}
    if "generator" in names:
        more["generator"] = torch.Generator().manual_seed(0)
    sample = torch.zeros(outputs.shape[1], 1, 1, 1)
    samples = [sample]
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        # Not every scheduler takes its noise from the generator. torch.manual_seed would seed the user's devices too.
        torch.default_generator.manual_seed(0)
        for timestep, output in zip(scheduler.timesteps[begin:], outputs, strict=True):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, timestep)  # some insist on it
            result = scheduler.step(output.view(sample.shape), timestep, sample, **more)
            sample = result[0] if isinstance(result, tuple) else result.prev_sample
            samples.append(sample)
    return torch.stack(samples).flatten(1).double()


def _fresh(scheduler: Any, begin: int) -> Any:
    """A copy on the CPU, before its first step, with nothing in it that bends."""
    scheduler = copy.deepcopy(scheduler)
    for name in ("step", "scale_model_input"):
        vars(scheduler).pop(name, None)  # what somebody put around the original's would run the original
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor):
            setattr(scheduler, name, value.cpu())
        elif name in _BEFORE_LISTS and isinstance(value, list):
            setattr(scheduler, name, [None] * len(value))
        elif name in _BEFORE_EMPTY:
            setattr(scheduler, name, [])
        elif name in _BEFORE_COUNTS:
            setattr(scheduler, name, 0)
    for name in vars(scheduler).keys() & set(_BEFORE):
        setattr(scheduler, name, None)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    bends = [name for name in _NONLINEAR if getattr(getattr(scheduler, "config", None), name, False)]
    if bends:
        scheduler.register_to_config(**dict.fromkeys(bends, False))
    return scheduler
