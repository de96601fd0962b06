"""Retrace: the steps of a request so far are computed over again, from its noise, within the step that comes.

A request is found to be off its plan only when forecasts have led it astray. A pipeline cannot be sent back; but what
its sampler would have been given can be computed beside it, and the next output can carry the difference: with Euler
steps x_(t+1) = x_t + h_t v_t along a flow,

    x'_(t+1) = x'_t + h_t v(x'_t)   for t = 0 .. s - 1,      v_s := v(x'_s) + (x'_s - x_s) / h_s

takes the sample from x_s, where the pipeline has it, to where the full request would be after step s. Guidance weighs
its contexts with numbers that add up to one, so each context's output carries the same difference.

Whether a pipeline steps like this is not looked up but seen, in its first two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .clock import Call
from .inputs import Inputs

# How far the first two steps may be off Euler steps: relative to them, and in roundings of the sample.
_APART = 1e-3
_ROUNDINGS = 0.3
_SEEN = 2  # steps


@dataclass
class Past:
    """What a retrace needs of a request: inputs and outputs of its first steps, and the times of all.

    Takes the memory of three samples, and of two outputs of each context.
    """

    inputs: dict[str, Inputs] = field(default_factory=dict)
    samples: list[Tensor] = field(default_factory=list)
    outputs: list[dict[str, Tensor]] = field(default_factory=lambda: [{} for _ in range(_SEEN)])
    times: list[object] = field(default_factory=list)
    called: list[set[str]] = field(default_factory=list)

    def note(self, call: Call) -> None:
        """A call begins."""
        if call.step == len(self.times):
            timestep = call.timestep
            self.times.append(timestep.clone() if isinstance(timestep, Tensor) else timestep)
            self.called.append(set())
            if call.step <= _SEEN:
                self.samples.append(call.sample.detach().clone())
        if call.step < len(self.called):
            self.called[call.step].add(call.context)
        if call.step == 0 and call.inputs is not None:
            self.inputs[call.context] = call.inputs

    def saw(self, call: Call, output: Tensor) -> None:
        """A call ended with what it gave the pipeline."""
        if call.step < _SEEN:
            self.outputs[call.step][call.context] = output.detach().clone()

    def retrace(self, call: Call, sigmas: Sequence[float]) -> Retrace | None:
        """The retrace of all steps before `call`, the first of its step.

        Args:
            call: of step 2 or a later one.
            sigmas: [T + 1] of the request.

        Returns:
            None where the request is not one of Euler steps along a flow with one and the same guidance, or its calls
            are given more that changes than sample and timestep.
        """
        contexts = set(self.inputs)
        before = self.called[: call.step]
        if call.step < _SEEN or len(self.times) <= call.step or any(called != contexts for called in before):
            return None
        first = self.inputs.get(call.context)
        if first is None or call.inputs is None or call.inputs.differs(first, (first.sample_name, "timestep")):
            return None
        rates = [after - now for now, after in zip(sigmas, sigmas[1:], strict=False)]
        weights = self._guidance(rates)
        if weights is None or rates[call.step] == 0:
            return None
        return Retrace(self, call, rates, weights)

    def _guidance(self, rates: Sequence[float]) -> dict[str, float] | None:
        """The weight of each context in what the sampler was given; None where it made no Euler steps of it."""
        *others, last = self.inputs
        if any(set(outputs) != set(self.inputs) for outputs in self.outputs):
            return None
        shapes = {sample.shape for sample in self.samples} | {o.shape for own in self.outputs for o in own.values()}
        if len(shapes) != 1:
            return None
        pairs = zip(self.samples, self.samples[1:], strict=False)
        steps = torch.cat([(_wide(after) - _wide(now)).flatten() for now, after in pairs])

        def moved(context: str) -> Tensor:
            both = zip(rates, self.outputs, strict=False)
            return torch.cat([rate * _wide(outputs[context]).flatten() for rate, outputs in both])

        base = moved(last)
        rest, found = steps - base, np.zeros(0)
        if others:
            spans = torch.stack([moved(context) - base for context in others])
            products = (spans @ torch.stack([*spans, rest]).T).double().cpu().numpy()
            found = np.linalg.lstsq(products[:, :-1], products[:, -1], rcond=None)[0]
            rest = rest - torch.tensor(found).to(rest) @ spans
        size = torch.stack([_wide(sample).norm() for sample in self.samples[1:]]).norm()
        allowed = _APART * steps.norm() + _ROUNDINGS * torch.finfo(self.samples[0].dtype).eps * size
        if not bool(rest.norm() <= allowed):
            return None
        weights = dict(zip(others, found.tolist(), strict=True))
        return {**weights, last: 1.0 - sum(weights.values())}


class Retrace:
    """Steps to be computed over again: run `next` and give `take` its output, until there is none.

    Args:
        past: of the request.
        call: up to which step, and the pipeline's sample there.
        rates: [T], h_t.
        weights: of each context in what the sampler is given.
    """

    def __init__(self, past: Past, call: Call, rates: Sequence[float], weights: dict[str, float]) -> None:
        self.step = call.step
        self._past, self._rates, self._weights = past, rates, weights
        self._dtype, self._name = call.sample.dtype, next(iter(past.inputs.values())).sample_name
        self._sample = self._moved(past.samples[0], rates[0], past.outputs[0])
        self._todo = [(step, context) for step in range(1, call.step) for context in past.inputs]
        self.calls = len(self._todo)
        self._outputs: dict[str, Tensor] = {}
        self._behind = call.sample.detach().clone()

    @property
    def next(self) -> Inputs | None:
        """The call to be computed now; None at the end."""
        if not self._todo:
            return None
        step, context = self._todo[0]
        return self._past.inputs[context].given(**{self._name: self._sample, "timestep": self._past.times[step]})

    def take(self, output: Tensor) -> None:
        """What `next` gave."""
        (step, context), *self._todo = self._todo
        self._outputs[context] = output.detach()
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


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
