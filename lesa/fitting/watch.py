"""The driver that runs a plan and compares what it does with the full request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..planner.statistics import Statistics
from ..planner.surrogate import Outcome
from ..plans.plan import Plan
from ..runtime.clock import Call
from ..runtime.driver import Relay
from ..runtime.guard import Guard
from ..runtime.runner import PlanRunner


class Watch(Relay):
    """A driver that runs a plan and compares what it does with the full request.

    Args:
        plan: of either site; its outputs are what is compared.
        statistics: contexts, guidance and impulse response.
        outputs: [C, T, B, L] of the full requests.
    """

    def __init__(self, plan: Plan, statistics: Statistics, outputs: Tensor) -> None:
        # Of the guard only what replaces forecasts that are not finite, and says so.
        super().__init__(PlanRunner(replace(plan, checks={}, expected={}), guard=Guard(float("inf"))))
        self._statistics, self._outputs = statistics, outputs
        self._wide = ops.wide_dtype(outputs)
        C, _, B, L = outputs.shape
        self._computed = {step: k for k, step in enumerate(plan.computed)}
        # The samples at the computed steps but the first, and the final one.
        targets = torch.tensor(statistics.impulse_response[[*plan.computed[1:], plan.num_steps]])
        self._targets = targets.to(outputs.device, self._wide)
        self._errors = torch.zeros(len(targets), B, L, dtype=self._wide, device=outputs.device)
        self._answers = torch.zeros(C, plan.budget, B, L, dtype=self._wide, device=outputs.device)
        self._error_gains = torch.zeros(C, plan.budget, B, dtype=self._wide, device=outputs.device)

    def observe(self, call: Call, output: Tensor) -> None:
        """Add the difference from the full request to the errors of all later targets."""
        super().observe(call, output)
        c = self._statistics.contexts.index(call.context)
        truth = self._outputs[c, call.step].to(self._wide)
        own = by_request(output, call, truth.shape[0]).to(truth)
        k = self._computed.get(call.step)
        if k is not None:
            self._answers[c, k] = own
            if k:
                off = self._errors[k - 1]
                self._error_gains[c, k] = ((own - truth) * off).sum(1) / off.square().sum(1)
        weights = self._targets[:, call.step] * self._statistics.guidance[c]
        for target in weights.nonzero().flatten().tolist():
            self._errors[target].add_(own - truth, alpha=float(weights[target]))

    def measured(self) -> tuple[Outcome, np.ndarray]:
        """Inner products of the errors, and the slopes."""
        basis = self._answers.flatten(0, 1).transpose(0, 1).double()  # [B, M, L]
        errors, length = self._errors.double(), self._errors.shape[2]
        outcome = Outcome(
            (basis @ basis.transpose(1, 2) / length).cpu().numpy(),
            (torch.einsum("bml,qbl->qbm", basis, errors) / length).cpu().numpy(),
            (errors.square().sum(2) / length).cpu().numpy(),
        )
        return outcome, self._error_gains.double().cpu().numpy()


def by_request(output: Tensor, call: Call, count: int) -> Tensor:
    """An output [m B, ...] as [B, L], without the variance that some denoisers append to their channels."""
    if call.sample.dim() > 3 and output.shape[1] == 2 * call.sample.shape[1]:
        output = output[:, : call.sample.shape[1]]
    return output.detach().unflatten(0, (-1, count)).transpose(0, 1).flatten(1)
