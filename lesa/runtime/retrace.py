"""Retrace: the steps of a request so far are computed over again, from its noise, within the step that comes.

A request is found to be off its plan only when forecasts have led it astray. A pipeline cannot be sent back; but what
its sampler would have been given can be computed beside it, and the next output can carry the difference: with Euler
steps x_(t+1) = x_t + h_t v_t along a flow,

    x'_(t+1) = x'_t + h_t v(x'_t)   for t = 0 .. s - 1,      v_s := v(x'_s) + (x'_s - x_s) / h_s

takes the sample from x_s, where the pipeline has it, to where the full request would be after step s. Guidance weighs
its contexts with numbers that add up to one, so each context's output carries the same difference.

Whether a pipeline steps like this is not looked up but seen: in its first two steps, and in the sum of all, which also
tells whether somebody else moved the sample.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .clock import Call
from .inputs import Inputs

# How far steps may be off Euler's: relative to them, and in roundings of the sample.
_APART = 1e-3
_ROUNDINGS = 0.3
_SEEN = 2  # steps


class Past:
    """What a retrace needs of a request: inputs and outputs of its first steps, the times of all, and what all moved.

    Takes the memory of three samples, two outputs of each context and, while they are added up, one in float32, and
    keeps the arguments of the first step. A request whose arguments change is given up, and all of it forgotten.

    Args:
        sigmas: [T + 1] of the request.
        adds: whether each output is added up as it comes; else what they come to is told once, by `catch_up`.
    """

    def __init__(self, sigmas: Sequence[float], adds: bool = True) -> None:
        self.rates = [after - now for now, after in zip(sigmas, sigmas[1:], strict=False)]
        self._adds = adds
        self._forget(False)

    def note(self, call: Call) -> None:
        """A call begins."""
        if self._given_up:
            return
        if call.inputs is None or (call.step <= _SEEN and not self._takes(call, call.inputs)):
            self._forget(True)
            return
        self._calls.append((call.step, call.context, call.timestep))
        self._latest[call.context] = call.inputs

    def saw(self, call: Call, output: Tensor) -> None:
        """A call ended with what it gave the pipeline."""
        if not self._given_up and (self._adds or call.step < _SEEN):
            output = output.detach()
            if call.step < _SEEN:
                self.outputs[call.step][call.context] = output.clone()
            if self._adds:
                self._add(call, output)

    def catch_up(self, under_way: str | None, moved: Callable[[str, Sequence[float]], Tensor | None]) -> None:
        """Add up each output from here on.

        Args:
            under_way: the context of a call that has begun and not ended.
            moved: what the first outputs of a context, each times its rate, come to, in float32 or wider; None, with
                which the request is given up, where that is not known any more.
        """
        if self._given_up or self._adds:
            return
        self._adds = True
        ran = Counter(context for _, context, _ in self._calls)
        ran.subtract([] if under_way is None else [under_way])
        for context, steps in (+ran).items():  # without those that have not run a step
            known = moved(context, self.rates[:steps])
            if known is None:
                self._forget(True)
                return
            self._moves[context] = known

    def _add(self, call: Call, output: Tensor) -> None:
        moves = self._moves.get(call.context)
        if moves is None:
            self._moves[call.context] = self.rates[call.step] * _wide(output)
        elif moves.shape == output.shape:
            moves.add_(output, alpha=self.rates[call.step])
        else:
            self._forget(True)

    def retrace(self, call: Call) -> Retrace | None:
        """The retrace of all steps before `call`, the first of its step; waits for the device.

        Returns:
            None where the request is not one of Euler steps along a flow with one and the same guidance, its calls are
            given more that changes than sample and timestep, its sample has a gradient or changed its shape, or `call`
            is none of step 2 or later.
        """
        sample, times = call.sample, self._times_of(call.step)
        if self._given_up or call.step < _SEEN or times is None:
            return None
        if any((x.shape, x.device) != (sample.shape, sample.device) for x in (*self.samples, *self._moves.values())):
            return None
        if sample.dtype != self.samples[0].dtype or (sample.requires_grad and torch.is_grad_enabled()):
            return None
        for context, first in self.inputs.items():
            if first.versions() != self._versions[context] or self._latest[context].differs(first, _anew(first)):
                return None
        weights = self._guidance(call)
        return None if weights is None or self.rates[call.step] == 0 else Retrace(self, call, weights, times)

    def _guidance(self, call: Call) -> dict[str, float] | None:
        """The weight of each context in what the sampler was given; None where it made no Euler steps of it.

        They are told by the way from the noise to where the pipeline is, and must explain each of the first steps too.
        """
        *others, last = self.inputs
        samples = [_wide(sample) for sample in (*self.samples, call.sample)]
        ways = [samples[1] - samples[0], samples[2] - samples[1], samples[-1] - samples[0]]
        moves = [
            {context: rate * _wide(output) for context, output in outputs.items()}
            for rate, outputs in zip(self.rates, self.outputs, strict=False)
        ]
        moves.append(self._moves)
        rests = [(way - own[last]).flatten() for way, own in zip(ways, moves, strict=True)]
        found = np.zeros(0)
        if others:
            spans = [torch.stack([own[context] - own[last] for context in others]).flatten(1) for own in moves]
            whole, rest = torch.cat(spans, 1), torch.cat(rests)
            products, along = ((whole @ other).cpu().double().numpy() for other in (whole.T, rest))
            found = np.linalg.lstsq(products, along, rcond=None)[0]
            weights = torch.tensor(found).to(whole)
            rests = [rest - weights @ span for rest, span in zip(rests, spans, strict=True)]
        roundings = (1, 1, call.step)
        if not all(_small(*each, call.sample) for each in zip(rests, ways, roundings, strict=True)):
            return None
        known = dict(zip(others, found.tolist(), strict=True))
        return {**known, last: 1.0 - sum(known.values())}

    def _takes(self, call: Call, inputs: Inputs) -> bool:
        """Keep what is needed of one of the first calls; whether its request may be retraced."""
        step, context = call.step, call.context
        if step > len(self.samples):
            return False
        if step == 0:
            self.inputs[context], self._versions[context] = inputs, inputs.versions()
        elif context not in self.inputs:
            return False
        elif step == 1 and inputs.renews(self.inputs[context], _anew(inputs)):
            return False  # so that nothing large is kept; at the end all is compared
        if step == len(self.samples):
            self.samples.append(call.sample.detach().clone())
        return True

    def _times_of(self, steps: int) -> list[object] | None:
        """The times of the steps so far; None where one is not known any more or so many did not run all contexts."""
        contexts = set(self.inputs)
        times: list[object] = []
        called: list[set[str]] = []
        for step, context, time in self._calls:
            if step == len(called):
                if times and isinstance(time, Tensor) and time is times[-1]:
                    return None  # its memory is used again
                times.append(time)
                called.append(set())
            if step >= len(called):
                return None
            called[step].add(context)
        together = called[:steps] == [contexts] * steps and set().union(*called[steps:]) <= contexts
        return times if together else None

    def _forget(self, given_up: bool) -> None:
        self._given_up = given_up
        self.inputs: dict[str, Inputs] = {}
        self.samples: list[Tensor] = []
        self.outputs: list[dict[str, Tensor]] = [{} for _ in range(_SEEN)]
        self._versions: dict[str, list[int]] = {}
        self._latest: dict[str, Inputs] = {}
        self._calls: list[tuple[int, str, object]] = []
        self._moves: dict[str, Tensor] = {}


class Retrace:
    """Steps to be computed over again: run `next` and give `take` its output, until there is none.

    Args:
        past: of the request.
        call: up to which step, and the pipeline's sample there.
        weights: of each context in what the sampler is given.
        times: of the steps so far.
    """

    def __init__(self, past: Past, call: Call, weights: dict[str, float], times: Sequence[object]) -> None:
        self.step, self._times = call.step, times
        self._past, self._rates, self._weights = past, past.rates, weights
        self._dtype, self._name = call.sample.dtype, next(iter(past.inputs.values())).sample_name
        self._sample = self._moved(past.samples[0], past.rates[0], past.outputs[0])
        self._todo = [(step, context) for step in range(1, call.step) for context in past.inputs]
        self.last = list(past.inputs)[-1]  # context of a step
        self.ran = 0  # calls
        self._outputs: dict[str, Tensor] = {}
        self._behind = call.sample.detach().clone()

    @property
    def next(self) -> Inputs | None:
        """The call to be computed now; None at the end."""
        if not self._todo:
            return None
        step, context = self._todo[0]
        return self._past.inputs[context].given(**{self._name: self._sample, "timestep": self._times[step]})

    def take(self, output: Tensor) -> None:
        """What `next` gave."""
        (step, context), *self._todo = self._todo
        self._outputs[context] = output.detach().clone()  # its memory may be the denoiser's own
        self.ran += 1
        if len(self._outputs) == len(self._weights):
            self._sample = self._moved(self._sample, self._rates[step], self._outputs)
            self._outputs = {}

    def given(self, inputs: Inputs) -> Inputs:
        """What a call of the step that comes is given instead of `inputs`."""
        return inputs.given(**{self._name: self._sample})

    def repaid(self, output: Tensor) -> Tensor:
        """What the pipeline is given instead of the output of such a call."""
        owed = (_wide(self._sample) - _wide(self._behind)) / self._rates[self.step]
        return (_wide(output) + owed).to(output.dtype)

    def _moved(self, sample: Tensor, rate: float, outputs: dict[str, Tensor]) -> Tensor:
        # Rounded at each step, as schedulers do.
        guided = sum(self._weights[context] * _wide(output) for context, output in outputs.items())
        return (_wide(sample) + rate * guided).to(self._dtype)


def _anew(inputs: Inputs) -> tuple[str, str]:
    """The arguments that every step is given anew."""
    return inputs.sample_name, "timestep"


def _small(rest: Tensor, way: Tensor, roundings: int, sample: Tensor) -> bool:
    """Whether what is not explained of a way may come of rounding the sample so many times."""
    rounding = _ROUNDINGS * torch.finfo(sample.dtype).eps * math.sqrt(roundings) * _wide(sample).norm()
    return bool(rest.norm() <= _APART * way.norm() + rounding)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(ops.wide_dtype(tensor))
