"""The errors of a forecast in a benchmark; see cases.py."""

from __future__ import annotations

import torch
from torch import Tensor

from lesa import ops
from lesa.ops import reference

from .cases import FeatureCase, Form, Inputs, Outputs, compiled, wide_sum


class Errors(FeatureCase):
    """The squared error of the forecast and the square of the truth.

    No provider rounds the forecast to the dtype of the features, since the operator does not: there is no form that
    multiplies in that dtype.
    """

    # On the CPU torch.compile adds millions of terms lane by lane: its error is 14 tolerances, 6e-6 of the sum.
    slack = 32.0

    @property
    def _read(self) -> int:
        return self.bytes

    @property
    def bytes(self) -> int:
        """The least that must be moved: the window and the truth read, two sums written."""
        return (self.k + 1) * self.L * self.dtype.itemsize + 2 * 4

    def formula(self, i: Inputs, dtype: torch.dtype) -> Outputs:
        wide = torch.promote_types(dtype, torch.float32)
        return (squares(reference.forecast(i.history.to(wide), self.w.to(wide), self.b.to(wide)), i.target.to(wide)),)

    def judged(self, outputs: Outputs) -> Outputs:
        """Each sum alone: of the two, one may be much larger."""
        return outputs[0].unbind()

    def fused(self, backend: str) -> Form:
        row = (self.slots, self.w, self.b)
        return lambda i: (ops.forecast_errors(i.history, *row, i.target, backend),)

    def eager(self) -> dict[str, Form]:
        return {
            "add_": lambda i: (squares(self._sum(i), i.target.float()),),
            "tensordot": lambda i: self.formula(i, torch.float32),
        }

    def _sum(self, i: Inputs) -> Tensor:
        """The forecast in float32; the features are read as they are."""
        # A vector of one, because a scalar would leave the product in the dtype of the feature.
        out = i.features[0] * self.w[:1]
        for feature, number in zip(i.features[1:], self.numbers[1:], strict=True):
            out.add_(feature, alpha=number)
        return out.add_(self.number)

    def compile(self) -> dict[str, Form]:
        run = compiled(lambda features, w, b, target: squares(wide_sum(features, w, b), target.to(w.dtype)))
        return {"sum": lambda i: (run(i.features, self.w, self.b, i.target),)}


def squares(forecast: Tensor, truth: Tensor) -> Tensor:
    """[2], the sums of (forecast - truth)^2 and of truth^2."""
    return torch.stack([(forecast - truth).square().sum(), truth.square().sum()])
