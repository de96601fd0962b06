"""What a scheduler tells: its noise levels, where a request begins, and what it makes of an error.

The impulse response says how the sample at each step depends on what the scheduler was given at every earlier one.

Between the denoiser's outputs v_i and the samples x_t every sampler in use is linear: x_t = (a part of the noise) +
sum_i response[t, i] v_i. The numbers follow from the scheduler's own `step`, fed one impulse for each step; no formula
of a scheduler is repeated here.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..planner.statistics import flow_impulse_response
from ..plans.rows import LesaWarning

_TOLERANCE = 1e-3  # schedulers work in float32
_NONLINEAR = ("clip_sample", "thresholding")
# What schedulers remember of earlier steps of a request, as it is before the first.
_BEFORE = ("_step_index", "last_sample", "prev_derivative", "dt", "sample")
_BEFORE_LISTS = ("model_outputs", "timestep_list")
_BEFORE_EMPTY = ("ets", "derivatives")
_BEFORE_COUNTS = ("lower_order_nums", "counter")


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

    Flow-matching schedulers hold them as `sigmas`; for the others, whose sigmas may exceed 1, the share
    of the training timesteps stands in.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    timesteps = torch.as_tensor(scheduler.timesteps).double().cpu()
    if sigmas is not None:
        sigmas = torch.as_tensor(sigmas).double().cpu()
        if len(sigmas) == len(timesteps) + 1 and float(sigmas.max()) <= 1.0:
            return tuple(sigmas.tolist())
    return (*(timesteps / scheduler.config.num_train_timesteps).tolist(), 0.0)


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
