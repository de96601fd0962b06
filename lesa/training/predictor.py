"""The paper's forecaster: one expert for each stage, which becomes a plan on any schedule (Eq. 4 to 7)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..plans.plan import Plan
from ..plans.rows import ANY_CONTEXT, Row
from ..plans.schedule import PAPER_STAGES, Stage, check, check_stages, stage_of
from ..plans.storage import Kind, SafetensorsFile
from .experts import Expert, Kan, Mlp


class Predictor(nn.Module, SafetensorsFile):
    """The forecaster of a whole request: one `Expert` for each stage, chosen by the noise level.

    Args:
        num_steps: T. The alpha networks read all T + 1 noise levels, so a predictor serves one step count.
        stages: from high noise to low, see `lesa.schedule`.
        alpha: the network of Eq. 6, "kan", or its ablation, "mlp".
        width: hidden width of the alpha network, M in the paper.
        depth: number of its hidden layers.
        grid, order, grid_range: spline grid of the KAN, see `Kan`.
        projection_init: how W starts, see `Expert`.
        alpha_init: the value alpha starts near at every step. W starts at a slope divided by it, so an untrained
            predictor extrapolates linearly; 0 leaves the slope as it is and reuses the last feature. Training moves
            each parameter by 0.1 at most, and a change of W counts alpha times: a small alpha learns little.
        seed: of the initial parameters; torch's global generators stay as they are.

    Raises:
        ValueError: an argument is outside its range.
    """

    kind: ClassVar[Kind] = Kind(
        "predictor", "lesa-predictor-1", "predictor.safetensors", ValueError, "Predictor.save", framework="pt"
    )
    experts: nn.ModuleList

    def __init__(
        self,
        num_steps: int,
        stages: Sequence[Stage] = PAPER_STAGES,
        alpha: str = "kan",
        width: int = 256,
        depth: int = 2,
        grid: int = 5,
        order: int = 3,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        projection_init: str = "span",
        alpha_init: float = 8.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if alpha not in ("kan", "mlp"):
            raise ValueError(f"alpha={alpha!r}: expected 'kan' or 'mlp'")
        for name, size in (("num_steps", num_steps), ("width", width), ("depth", depth)):
            if size < 1:
                raise ValueError(f"{name}={size}: expected at least 1")
        if not math.isfinite(alpha_init):
            raise ValueError(f"alpha_init={alpha_init}: expected a finite number")
        self.num_steps = num_steps
        self.stages = check_stages(stages)
        self.config: dict[str, Any] = {
            "num_steps": num_steps,
            "stages": [asdict(stage) for stage in self.stages],
            "alpha": alpha,
            "width": width,
            "depth": depth,
            "grid": grid,
            "order": order,
            "grid_range": list(grid_range),
            "projection_init": projection_init,
            "alpha_init": alpha_init,
            "seed": seed,
        }
        generator = torch.Generator().manual_seed(seed)
        widths = [num_steps + 1] + [width] * depth
        self.experts = nn.ModuleList()
        for stage in self.stages:
            net: nn.Module
            if alpha == "kan":
                net = Kan(widths, grid, order, grid_range, alpha_init, generator)
            else:
                net = Mlp(widths, alpha_init, generator)
            self.experts.append(Expert(stage.window, net, projection_init, alpha_init or 1.0, generator))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Predictor:
        """A fresh predictor from a `config` dict.

        Raises:
            ValueError: a key is unknown or missing, or a value outside its range.
        """
        try:
            values = dict(config)
            values["stages"] = tuple(Stage(**stage) for stage in values["stages"])
            values["grid_range"] = tuple(values["grid_range"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"config={dict(config)!r} does not describe a Predictor ({error})") from error

    def expert(self, sigma: float) -> Expert:
        """The expert of the stage that noise level `sigma` belongs to."""
        expert = self.experts[stage_of(sigma, self.stages)]
        assert isinstance(expert, Expert)
        return expert

    def offsets(self, step: int, sigmas: Iterable[float]) -> Tensor:
        """Eq. 5: dt_i = sigma_step - sigma_i over the whole schedule, past and future.

        Args:
            step: t, 0 to T - 1.
            sigmas: T + 1 noise levels, the final 0 included.

        Returns:
            [T + 1], dtype and device of the parameters.

        Raises:
            ValueError: `step` or the number of sigmas does not fit this predictor.
        """
        levels = self._levels(step, sigmas)
        like = next(self.parameters())
        return torch.tensor([levels[step] - level for level in levels], dtype=like.dtype, device=like.device)

    def alphas(self, sigmas: Iterable[float]) -> Tensor:
        """Eq. 6: alpha at every step of a request.

        The KANs of all stages run together, with one launch for each layer.

        Args:
            sigmas: T + 1 noise levels, the final 0 included.

        Returns:
            [T], dtype and device of the parameters; each step's alpha comes from the expert of its stage.

        Raises:
            ValueError: the number of sigmas does not fit this predictor.
        """
        levels = self._levels(0, sigmas)
        x = torch.stack([self.offsets(step, levels) for step in range(self.num_steps)])
        nets = [expert.net for expert in self.experts if isinstance(expert, Expert)]
        kans = [net for net in nets if isinstance(net, Kan)]
        table = torch.stack([net(x) for net in nets]) if not kans else _kans(kans, x)
        stages = torch.tensor([stage_of(level, self.stages) for level in levels[:-1]], device=x.device)
        return table.gather(0, stages.unsqueeze(0)).squeeze(0)

    def forward(self, history: Sequence[Tensor] | Tensor, step: int, sigmas: Iterable[float]) -> Tensor:
        """Forecast the feature of `step` (Eq. 4 to 7).

        Args:
            history: features of the steps before, oldest first: a list of [...] or a tensor [k, ...] that ends with
                step - 1. The expert reads the last K. If the request has fewer than K earlier steps, the oldest
                feature is repeated.
            step: t, 1 to T - 1.
            sigmas: T + 1 noise levels, the final 0 included.

        Returns:
            [...], in the wider of the dtypes of the features and the parameters.

        Raises:
            ValueError: `history` lacks features that the window reads; or as `offsets`.
        """
        levels = self._levels(step, sigmas)
        expert = self.expert(levels[step])
        needed = max(1, min(expert.window, step))
        if len(history) < needed:
            raise ValueError(
                f"history holds {len(history)} features at step {step}: expected at least the last {needed} "
                f"(window {expert.window})"
            )
        recent = list(history[-expert.window :])
        recent = [recent[0]] * (expert.window - len(recent)) + recent
        return expert(torch.stack(recent), self.offsets(step, levels))

    @torch.no_grad()
    def to_plan(
        self,
        computed: Iterable[int],
        sigmas: Sequence[float],
        gains: Sequence[float] | None = None,
        **provenance: Any,
    ) -> Plan:
        """The plan of this predictor on one schedule, evaluated in float64.

        alpha reads the schedule alone. So at every forecast step Eq. 4 to 7 are a row of at most K weights and a bias,
        and the plan is exact.

        Args:
            computed: computed steps, ascending, 0 among them.
            sigmas: T + 1 noise levels, the final 0 included.
            gains: a factor on alpha for each stage, see `lesa.train`; None leaves alpha as it was learned.
            provenance: further fields of `Plan`, e.g. `site`, `denoiser`; entries of `training` are kept beside the
                alphas.

        Returns:
            A plan whose rows serve every context; `Plan.join` joins the plans of several.

        Raises:
            ValueError: schedule or sigmas do not fit this predictor.
        """
        exact = copy.deepcopy(self).to("cpu", torch.float64)
        levels = exact._levels(0, sigmas)
        steps = check(computed, self.num_steps)
        factors = tuple(gains) if gains is not None else (1.0,) * len(self.stages)
        if len(factors) != len(self.stages):
            raise ValueError(f"gains={factors}: expected {len(self.stages)}, one for each stage")
        rows: dict[int, Row] = {}
        table = exact.alphas(levels).tolist()
        alphas: list[float | None] = [None] * self.num_steps
        for step in sorted(set(range(self.num_steps)) - set(steps)):
            alpha = table[step] * factors[stage_of(levels[step], self.stages)]
            rows[step] = _row(exact.expert(levels[step]), alpha, step)
            alphas[step] = alpha
        training = {"alphas": {ANY_CONTEXT: alphas}, "gains": list(factors), **provenance.pop("training", {})}
        fields = {"forecaster": "lesa", "stages": self.stages, **provenance}
        return Plan(steps, tuple(levels), {ANY_CONTEXT: rows}, training=training, **fields)

    def to_arrays(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The parameters and the config, see `SafetensorsFile`."""
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        return state, {"config": self.config}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor], description: dict[str, Any]) -> Predictor:
        """The predictor of `to_arrays`, on the CPU, in the dtype it was saved in."""
        predictor = cls.from_config(description.get("config") or {})
        predictor.to(next(iter(arrays.values())).dtype).load_state_dict(arrays)
        return predictor

    def title(self) -> str:
        """One line: the alpha network, the number of stages and of steps."""
        return f"LESA predictor: {self.config['alpha']}, {len(self.stages)} stages, {self.num_steps} steps"

    def _levels(self, step: int, sigmas: Iterable[float]) -> list[float]:
        """The noise levels as floats, checked together with `step`."""
        levels = [float(sigma) for sigma in sigmas]
        if len(levels) != self.num_steps + 1:
            raise ValueError(
                f"sigmas has {len(levels)} entries: this predictor serves requests of {self.num_steps} steps; give "
                f"their {self.num_steps + 1} noise levels, the final 0 included"
            )
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step={step}: expected 0 to {self.num_steps - 1}")
        return levels


def _kans(nets: Sequence[Kan], x: Tensor) -> Tensor:
    """E networks of one shape on the same rows [T, I]: [E, T]."""
    x = x.expand(len(nets), -1, -1)
    for layers in zip(*(net.parts for net in nets), strict=True):
        base, spline, scale = (torch.stack(parts) for parts in zip(*layers, strict=True))
        x = ops.kan(x, base, spline, scale, nets[0].grid_range, nets[0].order)
    return x.squeeze(-1)


def _row(expert: Expert, alpha: float, step: int) -> Row:
    """Eq. 4 to 7 as one row. Reads before step 0 become reads of step 0, the oldest feature repeated."""
    weights: dict[int, float] = {}
    for k, weight in enumerate(expert.weights.tolist()):
        read = max(0, step - expert.window + k)
        weights[read] = weights.get(read, 0.0) + alpha * weight
    weights[step - 1] += 1.0
    return Row(tuple(weights), tuple(weights.values()), alpha * expert.projection.bias.item())
