"""The live predictor and its loss with gradients in a benchmark; see cases.py."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lesa import ops
from lesa.ops import reference
from lesa.ops._library import call

from .cases import FeatureCase, Form, Inputs, Outputs, Shape, compiled, wide_sum
from .cases_kan import GRID, KAN_BYTES, WIDTHS, kan_chain, kan_parameters, knots
from .measuring import Expected, expected


class Predict(FeatureCase):
    """Projection, KAN and residual update, forward; every round has its own KAN."""

    def __init__(self, shape: Shape, k: int, dtype: torch.dtype, device: str, cache: int) -> None:
        super().__init__(shape, k, dtype, device, cache)
        sigmas = torch.linspace(1, 0, WIDTHS[0], device=device)
        self.dt = sigmas[20] - sigmas
        self.knots = knots(torch.float32, self.dt.device)
        self.newest = torch.zeros_like(self.w)
        self.newest[-1] = 1

    def _inputs(self) -> Inputs:
        inputs = super()._inputs()
        inputs.layers = [[part[0] for part in layer] for layer in kan_parameters(self.device, 1)]
        return inputs

    @property
    def _read(self) -> int:
        return super()._read + KAN_BYTES

    @property
    def bytes(self) -> int:
        return super().bytes + KAN_BYTES + 4 * self.dt.numel()

    def formula(self, i: Inputs, dtype: torch.dtype) -> Outputs:
        wide = torch.promote_types(dtype, torch.float32)
        layers = [[part.to(wide) for part in layer] for layer in i.layers]
        alpha = kan_chain(self.dt.to(wide).unsqueeze(0), layers, knots(wide, self.dt.device)).reshape(())
        history = i.history.to(dtype)
        z = reference.forecast(history, self.w.to(dtype), self.b.to(dtype))
        return history[-1] + alpha.to(dtype) * z, alpha

    def expected(self) -> list[Expected]:
        """As in `Case`, but with the error of the alphas of all steps: one alone says little about plain KANs."""
        forecast, alpha = super().expected()
        sigmas = torch.linspace(1, 0, WIDTHS[0], device=self.device)
        rows, layers = sigmas[:-1, None] - sigmas, self.inputs[0].layers
        exact = kan_chain(rows.double(), [[p.double() for p in layer] for layer in layers], self.knots.double())
        allowed = expected([exact], [kan_chain(rows, layers, self.knots)])[0].allowed
        # An error of alpha moves the forecast by that error times z.
        carried = allowed * (forecast.exact.abs().max() / alpha.exact.abs()).item()
        return [forecast._replace(allowed=forecast.allowed + carried), alpha._replace(allowed=allowed)]

    def fused(self, backend: str) -> Form:
        row = (self.slots, self.w, self.b, self.dt)
        return lambda i: ops.predict(i.history, *row, i.layers, GRID, backend)

    def _alpha(self, i: Inputs) -> Tensor:
        return kan_chain(self.dt.unsqueeze(0), i.layers, self.knots).reshape(())

    def eager(self) -> dict[str, Form]:
        def folded(i: Inputs) -> Outputs:
            alpha = self._alpha(i)
            w = (self.newest + alpha * self.w).to(self.dtype)
            out = (w @ i.history.view(self.k, -1)).view(i.target.shape)
            return out.add_((alpha * self.b).to(self.dtype)), alpha

        def folded_chain(i: Inputs) -> Outputs:
            alpha = self._alpha(i)
            w = (self.newest + alpha * self.w).to(self.dtype)
            out = torch.addcmul((alpha * self.b).to(self.dtype), i.features[0], w[0])
            for feature, weight in zip(i.features[1:], w[1:], strict=True):
                out.addcmul_(feature, weight)
            return out, alpha

        def chain(i: Inputs) -> Outputs:
            alpha = self._alpha(i)
            return torch.addcmul(i.features[-1], self._add(i), alpha.to(self.dtype)), alpha

        return {"folded matmul": folded, "folded addcmul_": folded_chain, "add_": chain}

    def compile(self) -> dict[str, Form]:
        def formula(features: list[Tensor], w: Tensor, b: Tensor, dt: Tensor, layers: list[list[Tensor]]) -> Outputs:
            alpha = kan_chain(dt.unsqueeze(0), layers, self.knots).reshape(())
            return (features[-1].float() + alpha * wide_sum(features, w, b)).to(features[0].dtype), alpha

        run = compiled(formula)
        return {"sum": lambda i: run(i.features, self.w, self.b, self.dt, i.layers)}


class PredictLoss(FeatureCase):
    """L1 loss of the predictor, the forecast, dW, db and dalpha, all of which the operator gives by itself."""

    @property
    def bytes(self) -> int:
        return (self.k + 2) * self.L * self.dtype.itemsize

    def judged(self, outputs: Outputs) -> Outputs:
        """The gradients are judged together: one alone may be close to 0 by chance."""
        loss, forecast, *gradients = outputs
        return loss, forecast, torch.cat([part.reshape(-1) for part in gradients])

    @cached_property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """W, b and alpha, with gradients."""
        w, b, alpha = self.w.clone(), self.b.clone(), torch.tensor(0.7, device=self.device)
        return w.requires_grad_(), b.requires_grad_(), alpha.requires_grad_()

    def formula(self, i: Inputs, dtype: torch.dtype) -> Outputs:
        w, b, alpha = (leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves)
        history = i.history.to(dtype)
        forecast = history[-1] + alpha * reference.forecast(history, w, b)
        return _with_gradients((forecast - i.target).abs().mean(), forecast, (w, b, alpha))

    def fused(self, backend: str) -> Form:
        w, b, alpha = (leaf.detach() for leaf in self.leaves)

        def run(i: Inputs) -> Outputs:
            row = (i.history, self.slots, w, b, alpha, i.target, False, True)
            return call("predict_loss", backend, *row)

        return run

    def eager(self) -> dict[str, Form]:
        w, b, alpha = self.leaves

        def low(i: Inputs) -> Outputs:
            z = (w.to(self.dtype) @ i.history.view(self.k, -1)).view(i.target.shape) + b.to(self.dtype)
            forecast = torch.addcmul(i.features[-1], z, alpha.to(self.dtype))
            return _with_gradients((forecast - i.target).abs().mean(dtype=torch.float32), forecast, self.leaves)

        def wide(i: Inputs) -> Outputs:
            history = i.history.float()
            forecast = history[-1] + alpha * (torch.tensordot(w, history, dims=1) + b)
            return _with_gradients((forecast - i.target).abs().mean(), forecast.to(self.dtype), self.leaves)

        return {"matmul": low, "float32": wide}

    def compile(self) -> dict[str, Form]:
        def formula(
            row: tuple[Tensor, Tensor, Tensor], features: list[Tensor], target: Tensor
        ) -> tuple[Tensor, Tensor]:
            w, b, alpha = row
            forecast = features[-1].float() + alpha * wide_sum(features, w, b)
            return (forecast - target).abs().mean(), forecast.detach().to(target.dtype)

        two = compiled(formula)
        one = compiled(torch.func.grad_and_value(formula, has_aux=True))
        detached = tuple(leaf.detach() for leaf in self.leaves)

        def autograd(i: Inputs) -> Outputs:
            return _with_gradients(*two(self.leaves, i.features, i.target), self.leaves)

        def one_graph(i: Inputs) -> Outputs:
            gradients, (loss, forecast) = one(detached, i.features, i.target)
            return loss, forecast, *gradients

        return {"autograd": autograd, "one graph": one_graph}


class PredictLossBackward(PredictLoss):
    """The same through autograd: the operator in the forward, the scaling of its gradients in the backward."""

    def fused(self, backend: str) -> Form:
        w, b, alpha = self.leaves

        def run(i: Inputs) -> Outputs:
            loss, forecast = ops.predict_loss(i.history, self.slots, w, b, alpha, i.target, backend=backend)
            return _with_gradients(loss, forecast, self.leaves)

        return run


def _with_gradients(loss: Tensor, forecast: Tensor, leaves: tuple[Tensor, ...]) -> Outputs:
    return loss.detach(), forecast.detach(), *torch.autograd.grad(loss, leaves)
