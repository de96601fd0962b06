"""diffusers' solvers at a request's own noise levels, every denoiser call at its exact timestep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler

_HIGHEST = 1 - 1e-5  # instead of 1, where these solvers would take the logarithm of no signal


def levels(steps: int) -> np.ndarray:
    """The noise levels of FLUX's pipeline, without the final 0: evenly from 1 to 1 / steps."""
    return np.linspace(1.0, 1.0 / steps, steps)


def solvers() -> dict[str, Any]:
    """Schedulers that take FLUX's noise levels and hand the denoiser 1000 * sigma, unrounded; None is Euler's."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0, "solver_order": 2}
    return {"euler": None, "heun": Heun(), "dpm++": DpmSolver(**flow), "unipc": UniPc(**flow)}


def steps_for(name: str, budget: int) -> int:
    """Steps for `budget` denoiser calls; Heun's 2 n - 1 are one more where that is even."""
    return (budget + 2) // 2 if name == "heun" else budget


def calls(name: str, steps: int) -> int:
    """Denoiser calls of so many steps."""
    return 2 * steps - 1 if name == "heun" else steps


class Heun(FlowMatchHeunDiscreteScheduler):
    """diffusers' Heun at given noise levels, which it does not take itself."""

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        """Set the noise levels: each but the first and the last is met twice."""
        super().set_timesteps(len(sigmas), device)
        once = torch.as_tensor(sigmas, dtype=torch.float32, device=device)
        met = torch.cat([once[:1], once[1:].repeat_interleave(2)])
        self.timesteps = met * self.config.num_train_timesteps
        self.sigmas = torch.cat([met, met.new_zeros(1)])


class _Exact:
    """diffusers rounds these schedulers' timesteps down to whole numbers; here they stay 1000 * sigma."""

    given: Sequence[float] | None = None  # noise levels, in the place of FLUX's

    @classmethod
    def at(cls, given: Sequence[float]) -> Any:
        """The solver at given noise levels, the final 0 left out."""
        made = cls(use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2)  # type: ignore[call-arg]
        made.given = given
        return made

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        """Set the given noise levels, or FLUX's of `num_inference_steps`."""
        chosen = levels(num_inference_steps) if self.given is None else np.asarray(self.given)
        super().set_timesteps(len(chosen), device)  # type: ignore[misc]
        met = torch.from_numpy(np.append(np.minimum(chosen, _HIGHEST), 0.0)).float()
        self.sigmas = met
        self.timesteps = (met[:-1] * 1000).to(device)


class DpmSolver(_Exact, DPMSolverMultistepScheduler):
    """DPM-Solver++ of order 2 in flow form."""


class UniPc(_Exact, UniPCMultistepScheduler):
    """UniPC of order 2 in flow form."""


class MultistepSubset(DPMSolverMultistepScheduler):
    """DPM-Solver++ of order 2 at given timesteps of a model that predicts the noise."""

    @classmethod
    def like(cls, scheduler: Any, chosen: Sequence[int]) -> MultistepSubset:
        """The solver at some timesteps of a DDIM scheduler, which ends where that ends."""
        made = cls.from_config(scheduler.config, solver_order=2, final_sigmas_type="sigma_min")
        made.chosen = list(chosen)
        return made

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None) -> None:
        """Set the given timesteps, however many are asked for."""
        super().set_timesteps(device=device, timesteps=self.chosen)
