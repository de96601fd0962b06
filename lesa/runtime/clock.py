"""The clock of a denoiser: which request, context and step a call belongs to, and what the scheduler tells.

A pipeline's scheduler tells: `set_timesteps` makes a new `timesteps` tensor for every request, and `step_index` counts
the updates made. Where a request begins is the scheduler's `begin_index`, or the first call's timestep; how many steps
it has, the pipeline may say. A bare denoiser in a loop of your own has only its timestep argument, which falls within a
request, or rises, and turns back when the next one starts. Calls of one step have one timestep and one sample.

A scheduler also tells its noise levels, and its impulse response: how the sample at each step depends on what the
scheduler was given at every earlier one. Between the denoiser's outputs v_i and the samples x_t every sampler in use is
linear: x_t = (a part of the noise) + sum_i response[t, i] v_i. The numbers follow from the scheduler's own `step`, fed
one impulse for each step; no formula of a scheduler is repeated here.
"""

from __future__ import annotations

import copy
import inspect
import math
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
_TRAIN_STEPS = 1000.0  # what denoisers that are given t / 1000 divide by
BFLOAT16 = 2**-8  # relative: what timesteps may be rounded by
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
        sigmas: the noise levels before and after each step, `num_steps` + 1 of them; the last one is 0 where the
            request runs to its end. None for a bare denoiser.
        scheduler: the pipeline's, its timesteps set and no update made yet; None for a bare denoiser.
        begin: index of the first step among the scheduler's, not 0 in image-to-image.
    """

    num_steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    scheduler: Any = field(default=None, repr=False, compare=False)
    begin: int = 0


@dataclass(frozen=True)
class Loop:
    """What is known of the loop that calls the denoiser.

    Args:
        scheduler: the one that makes its steps.
        num_steps: how many steps it says it runs; None where it does not say.
        timestep: the scheduler's timestep at this call; None where it does not say.
    """

    scheduler: Any
    num_steps: int | None = None
    timestep: Any = None


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
        changed: what the earlier features of this context do not fit any more, as a reason; None where they do.
        switched: whether another denoiser made the context's last call.
        again: runs the denoiser on another sample, with all else as in this call; None where it cannot.
    """

    context: str
    step: int
    timestep: Any
    sample: torch.Tensor
    request: Request
    starts: bool
    changed: str | None = None
    switched: bool = False
    again: Callable[[Tensor], Tensor] | None = field(default=None, repr=False, compare=False)


class Clock:
    """Counts the steps of every context of one denoiser, or of several that take turns in a request.

    Args:
        loop_of: returns what is known of the loop, at each call anew since pipelines and schedulers may be swapped;
            None, or a function that returns None, for a bare denoiser.
    """

    def __init__(self, loop_of: Callable[[], Loop | None] | None = None) -> None:
        self.loop_of = loop_of or (lambda: None)
        self._direction = 0.0  # of a bare denoiser's timesteps within a request: they fall (-1) or rise (1)
        self.abort()

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        copied = memo[id(self)] = Clock(copy.deepcopy(self.loop_of, memo))
        return copied

    def abort(self) -> None:
        """Forget the request under way: the next call starts a new one."""
        self._request: Request | None = None
        self._timesteps: Any = None
        self._counts: dict[str, int] = defaultdict(int)
        self._last: dict[str, float] = {}
        self._sample: Tensor | None = None
        self._given: dict[str, _Given] = {}
        self._told: Any = None  # the timestep of the last call
        self._advances = False  # whether the scheduler was seen to count its updates
        self._looks_up = False  # whether another one makes the steps: then the timestep is looked up

    def tick(
        self,
        context: str | None,
        timestep: Any,
        sample: torch.Tensor,
        conditions: tuple[Tensor | str, ...] = (),
        step: int | None = None,
        denoiser: int = 0,
        again: Callable[[Tensor], Tensor] | None = None,
    ) -> Call:
        """Place one denoiser call.

        Args:
            context: its name, None where it has none.
            timestep: the denoiser's timestep argument, None where it has none.
            sample: the noisy sample.
            conditions: what else it was given that stays the same in a context, such as embedded prompts.
            step: its index, where the loop tells it.
            denoiser: which of the denoisers that take turns is called.
            again: of the `Call`.

        Raises:
            PlanError: the calls do not fit the scheduler's steps.
        """
        given, name = _Given.of(sample, conditions, denoiser), context or UNNAMED
        loop = self.loop_of()
        if loop is None:
            name, index, starts = self._tick_bare(name, timestep, sample, given)
        else:
            name, index, starts = self._tick_scheduler(name, loop, timestep, given, step)
        known, self._given[name] = self._given.get(name), given
        assert self._request is not None
        changed, switched = (None, False) if known is None else (given.apart(known), given.denoiser != known.denoiser)
        return Call(name, index, timestep, sample, self._request, starts, changed, switched, again)

    def _tick_bare(self, context: str, timestep: Any, sample: Tensor, given: _Given) -> tuple[str, int, bool]:
        if timestep is None:
            raise PlanError("nothing tells the step of this call: run the denoiser in a pipeline that has a scheduler")
        now, step = largest(timestep), self._counts[context] - 1
        if now == self._last.get(context):
            if self._is_another_branch(context, step, sample):
                return self._branch(context, step, given), step, False
            if step:  # after the first step it is the next request, if both have one step
                raise PlanError(
                    f"the denoiser was called twice at timestep {now:g} in context {context!r}: give the calls of one "
                    "step the same sample and no name, or name each with `with denoiser.cache_context(name)`"
                )
        last = self._last.get(context)
        if last is not None and not self._direction and (now < last or now >= 2.0 * last):
            # Those that rise begin near 0; another rise is that to the next request.
            self._direction = math.copysign(1.0, now - last)
        direction = self._direction or -1.0
        starts = self._request is None or (last is not None and (now - last) * direction <= 0)
        if starts:
            self.abort()
            self._request = Request()
        elif all((now - other) * direction >= 0 for other in self._last.values()):
            # Also a context that comes late, or comes back, is at the step of the newest.
            newest = max(self._last, key=lambda other: self._last[other] * direction)
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

    def _tick_scheduler(
        self, context: str, loop: Loop, timestep: Any, given: _Given, step: int | None
    ) -> tuple[str, int, bool]:
        scheduler = loop.scheduler
        told = timestep if loop.timestep is None else loop.timestep
        starts = self._request is None or scheduler.timesteps is not self._timesteps
        if not starts and self._looks_up:
            starts = self._looked_up(told) < max(self._counts.values()) - 1
        if starts:
            self._start(loop, told)
        request = self._request
        assert request is not None and request.num_steps is not None
        if step is None and not hasattr(scheduler, "step_index"):
            step = self._counted(context, scheduler, told)
        elif step is None:
            step = self._step_of(context, scheduler, told)
        self._told = told
        if step >= request.num_steps:
            raise PlanError(
                f"a call in context {context!r} after the {request.num_steps} steps of this "
                f"{type(scheduler).__name__}: it is no step, or another scheduler makes the steps (then call the "
                "denoiser from a pipeline that has it, or enable the bare denoiser with its sigmas)"
            )
        return self._branch(context, step, given), step, starts

    def _start(self, loop: Loop, told: Any) -> None:
        """Begin a request of a scheduler.

        Raises:
            PlanError: the scheduler's timesteps are not set.
        """
        self.abort()
        scheduler = loop.scheduler
        set_to = getattr(scheduler, "num_inference_steps", None)
        if set_to is None and len(scheduler.timesteps) == _train_timesteps(scheduler):
            raise PlanError(
                f"the timesteps of this {type(scheduler).__name__} are not set, so another scheduler makes the steps: "
                "call the denoiser from a pipeline that has the scheduler, or enable the bare denoiser with its sigmas"
            )
        self._timesteps = scheduler.timesteps
        begin = begin_index(scheduler, told)
        sigmas = sigmas_of(scheduler)[begin:]
        left = len(sigmas) - 1
        count = loop.num_steps if loop.num_steps is not None and 1 <= loop.num_steps <= left else left
        self._request = Request(count, sigmas[: count + 1], scheduler, begin)

    def _step_of(self, context: str, scheduler: Any, told: Any) -> int:
        """The step by the scheduler's updates, or by its timesteps if another one, such as a copy, makes the steps."""
        assert self._request is not None
        # None until the first update of the request.
        step = max((scheduler.step_index or self._request.begin) - self._request.begin, 0)
        self._advances |= step > 0
        if not (self._advances or self._looks_up) and self._counts.get(context, 0) > step:
            self._looks_up = not _equal(told, self._told)
        return self._looked_up(told) if self._looks_up else step

    def _looked_up(self, told: Any) -> int:
        assert self._request is not None
        return _index_of(self._request.scheduler, told, self._request.begin) - self._request.begin

    def _counted(self, context: str, scheduler: Any, told: Any) -> int:
        """The step by the calls so far, for a scheduler that does not count its updates."""
        request, step = self._request, self._counts.get(context, 0)
        assert request is not None and request.num_steps is not None
        newest = max(self._counts.values(), default=0) - 1
        if isinstance(told, Tensor) and told is self._told:
            return newest
        if newest >= 0 and (not step or step < newest):  # it comes late, or comes back
            step = max(step, _index_of(scheduler, told, request.begin) - request.begin)
        if step >= request.num_steps:
            raise PlanError(
                f"more calls in context {context!r} than the {request.num_steps} steps of the request: name the calls "
                "of one step with `with denoiser.cache_context(name)`"
            )
        return step

    def _branch(self, context: str, step: int, given: _Given) -> str:
        """The context of a call; calls of one step that carry one name are told apart by what they are given.

        Those that are given the same, or what was never given before, by their order.
        """
        names = [self._name(context, i) for i in range(1, _MOST_CALLS_A_STEP + 1)]
        free = [name for name in names if self._counts.get(name, 0) <= step]
        if not free:
            raise PlanError(
                f"the denoiser was called more than {_MOST_CALLS_A_STEP} times at step {step}: its frames are at steps "
                "of their own (asynchronous diffusion forcing), or it is used outside the pipeline or loop it was "
                "enabled for (enable it on the one that runs)"
            )
        same = (name for name in free if name in self._given and given.apart(self._given[name]) is None)
        name = next(same, free[0])
        self._counts[name] = step + 1
        return name

    @staticmethod
    def _name(context: str, call: int) -> str:
        return context if call == 1 else f"{context}#{call}"


@dataclass(frozen=True)
class _Given:
    """What stays the same at all calls of one context.

    Args:
        kind: shape, dtype and device of the sample.
        conditions: tensors, and how often each had been written to; and words.
        denoiser: which one was called.
    """

    kind: tuple
    conditions: tuple[tuple[Tensor | str, int], ...]
    denoiser: int

    @classmethod
    def of(cls, sample: Tensor, conditions: tuple[Tensor | str, ...], denoiser: int) -> _Given:
        versions = tuple((one, 0 if isinstance(one, str) or one.is_inference() else one._version) for one in conditions)
        return cls((sample.shape, sample.dtype, sample.device), versions, denoiser)

    def apart(self, other: _Given) -> str | None:
        """The reason why features of the other do not fit; waits for the device only for new tensors."""
        if self.kind != other.kind:
            return "the sample changed shape, dtype or device in the middle of a request"
        same = len(self.conditions) == len(other.conditions)
        if same and all(map(_is_same, self.conditions, other.conditions)):
            return None
        return "the conditions (prompt embeddings, or the mode of a key-value cache) changed in the middle of a request"


def _is_same(one: tuple[Tensor | str, int], other: tuple[Tensor | str, int]) -> bool:
    (a, version), (b, known) = one, other
    if a is b:
        return version == known
    if isinstance(a, str) or isinstance(b, str):
        return isinstance(a, str) and isinstance(b, str) and a == b
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    # The other one is still held, so equal addresses are the same memory.
    held = a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and version == known
    return held or torch.equal(a, b)


def largest(timestep: Any) -> float:
    """The timestep of a call; of one for each token or frame the largest. Waits for the device."""
    return float(torch.as_tensor(timestep).max())


def _equal(a: Any, b: Any) -> bool:
    return a is b or (a is not None and b is not None and largest(a) == largest(b))


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
    """The index of the request's first step: not 0 in image-to-image, which leaves out the noisiest steps.

    Args:
        scheduler: of the request; the index it was told is taken where there is one.
        timestep: of the first denoiser call.
    """
    told = getattr(scheduler, "begin_index", None)
    return _index_of(scheduler, timestep) if told is None else told


def _index_of(scheduler: Any, timestep: Any, begin: int = 0) -> int:
    """The index of a timestep among a scheduler's, from `begin` on.

    Along a flow denoisers may be given t / 1000 or 1 - t / 1000.

    Returns:
        The first of the nearest ones; `begin` where none is near.
    """
    if timestep is None:
        return begin
    now, known = largest(timestep), torch.as_tensor(scheduler.timesteps).double().cpu()[begin:]
    scaled = 0.0 <= now <= 1.0 and prediction_of(scheduler) == FLOW
    for one in (now * _TRAIN_STEPS, (1.0 - now) * _TRAIN_STEPS, now) if scaled else (now,):
        gaps = (known - one).abs()
        if float(gaps.min()) <= BFLOAT16 * max(abs(one), 1.0):
            return begin + int(gaps.argmin())
    return begin


def sigmas_of(scheduler: Any) -> tuple[float, ...]:
    """The noise levels of a scheduler's timesteps, from 1 (noise) to 0, with the final 0.

    A sample is alpha data + sigma noise, its level sigma / (alpha + sigma): the sigma of flow matching, which some
    schedulers (Mochi's) hold as 1 - sigma. The others hold sigma / alpha, or the squares of their alphas. Where a
    scheduler holds none of these, the share of the training timesteps, or of the first timestep, stands in.
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
    return (*(timesteps / (_train_timesteps(scheduler) or largest(timesteps))).tolist(), 0.0)


def _train_timesteps(scheduler: Any) -> int | None:
    """How many timesteps a scheduler's model was trained with; None where it does not say."""
    return getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)


def prediction_of(scheduler: Any) -> str:
    """What the denoiser predicts, one of `PREDICTIONS`; a scheduler that does not say goes by its sigmas."""
    config = getattr(scheduler, "config", {})
    told = config.get("prediction_type")
    if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas"):
        return FLOW
    sigmas = getattr(scheduler, "sigmas", None)
    by_sigmas = FLOW if sigmas is not None and float(torch.as_tensor(sigmas).max()) <= 1.0 else "epsilon"
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
