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

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .clock import Call
from .inputs import Inputs

# How far steps may be off Euler's: relative to them, and in roundings of the sample.
_APART = 1e-3
_ROUNDINGS = 0.3
_SEEN = 2  # steps


class Past:
    """What a retrace needs of a request: inputs and outputs of its first steps, the times of all, and what all moved.

    Takes the memory of three samples, two outputs of each context, and one in float32.

    Args:
        sigmas: [T + 1] of the request.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.rates = [after - now for now, after in zip(sigmas, sigmas[1:], strict=False)]
        self.inputs: dict[str, Inputs] = {}
        self.samples: list[Tensor] = []
        self.outputs: list[dict[str, Tensor]] = [{} for _ in range(_SEEN)]
        self.times: list[object] = []
        self._called: list[set[str]] = []
        self._moves: dict[str, Tensor] = {}

    def note(self, call: Call) -> None:
        """A call begins."""
        if call.step == len(self.times):
            timestep = call.timestep
            self.times.append(timestep.clone() if isinstance(timestep, Tensor) else timestep)
            self._called.append(set())
            if call.step <= _SEEN:
                self.samples.append(call.sample.detach().clone())
        if call.step < len(self._called):
            self._called[call.step].add(call.context)
        if call.step == 0 and call.inputs is not None:
            self.inputs[call.context] = call.inputs

    def saw(self, call: Call, output: Tensor) -> None:
        """A call ended with what it gave the pipeline."""
        output = output.detach()
        if call.step < _SEEN:
            self.outputs[call.step][call.context] = output.clone()
        if call.step == 0:
            self._moves[call.context] = self.rates[0] * _wide(output)
        elif call.context in self._moves and self._moves[call.context].shape == output.shape:
            self._moves[call.context].add_(output, alpha=self.rates[call.step])

    def retrace(self, call: Call) -> Retrace | None:
        """The retrace of all steps before `call`, the first of its step; waits for the device.

        Returns:
            None where the request is not one of Euler steps along a flow with one and the same guidance, its calls are
            given more that changes than sample and timestep, or `call` is none of step 2 or later.
        """
        contexts, first = set(self.inputs), self.inputs.get(call.context)
        before = self._called[: call.step]
        if call.step < _SEEN or len(self.times) <= call.step or any(called != contexts for called in before):
            return None
        if first is None or call.inputs is None or call.inputs.differs(first, (first.sample_name, "timestep")):
            return None
        weights = self._guidance()
        if weights is None or self.rates[call.step] == 0 or not self._arrives(call, weights):
            return None
        return Retrace(self, call, weights)

    def _guidance(self) -> dict[str, float] | None:
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
            both = zip(self.rates, self.outputs, strict=False)
            return torch.cat([rate * _wide(outputs[context]).flatten() for rate, outputs in both])

        base = moved(last)
        rest, found = steps - base, np.zeros(0)
        if others:
            spans = torch.stack([moved(context) - base for context in others])
            products = (spans @ torch.stack([*spans, rest]).T).double().cpu().numpy()
            found = np.linalg.lstsq(products[:, :-1], products[:, -1], rcond=None)[0]
            rest = rest - torch.tensor(found).to(rest) @ spans
        if not _small(rest, steps, self.samples[1:]):
            return None
        weights = dict(zip(others, found.tolist(), strict=True))
        return {**weights, last: 1.0 - sum(weights.values())}

    def _arrives(self, call: Call, weights: dict[str, float]) -> bool:
        """Whether the outputs of all steps, so weighed, lead from the noise to where the pipeline is."""
        if any(moves.shape != call.sample.shape for moves in self._moves.values()):
            return False
        steps = _wide(call.sample) - _wide(self.samples[0])
        rest = steps - sum(weights[context] * moves for context, moves in self._moves.items())
        return _small(rest, steps, [call.sample] * call.step)


class Retrace:
    """Steps to be computed over again: run `next` and give `take` its output, until there is none.

    Args:
        past: of the request.
        call: up to which step, and the pipeline's sample there.
        weights: of each context in what the sampler is given.
    """

    def __init__(self, past: Past, call: Call, weights: dict[str, float]) -> None:
        self.step = call.step
        self._past, self._rates, self._weights = past, past.rates, weights
        self._dtype, self._name = call.sample.dtype, next(iter(past.inputs.values())).sample_name
        self._sample = self._moved(past.samples[0], past.rates[0], past.outputs[0])
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


def _small(rest: Tensor, steps: Tensor, samples: Sequence[Tensor]) -> bool:
    """Whether what is not explained of some steps may come of rounding their samples."""
    size = torch.stack([_wide(sample).norm() for sample in samples]).norm()
    return bool(rest.norm() <= _APART * steps.norm() + _ROUNDINGS * torch.finfo(samples[0].dtype).eps * size)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
