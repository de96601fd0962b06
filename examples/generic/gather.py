"""Record the inner products of what the small models' schedulers are given, request by request.

    python gather.py --run build/generic            # writes build/generic/recorded.npz

Of each request are kept the products, averaged over elements, of the initial noise and of the 50 vectors the scheduler
is given: the network's outputs, or with guidance what the pipeline makes of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import split
from models import MODELS, load
from torch import Tensor

from lesa import assets

STEPS, RECORDED, JUDGED = 50, 64, 128


class Watch:
    """Takes what a scheduler is given while a request runs."""

    def __init__(self, scheduler: Any) -> None:
        self.first: Tensor | None = None
        self.outputs: list[Tensor] = []
        self._scheduler, self._step = scheduler, scheduler.step
        scheduler.step = self._watched

    def _watched(self, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.first is None:
            self.first = sample.detach().clone()
        self.outputs.append(output.detach().clone())
        return self._step(output, timestep, sample, *args, **kwargs)

    def close(self) -> np.ndarray:
        """[P, 1 + T, 1 + T]: inner products of each request's noise and outputs."""
        del self._scheduler.step
        assert self.first is not None
        every = torch.stack([self.first, *self.outputs], 1).flatten(2).double()
        return (every @ every.transpose(1, 2) / every.shape[2]).cpu().numpy()


def levels_of(scheduler: Any) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma of the T samples, x = alpha data + sigma noise."""
    timesteps = scheduler.timesteps.cpu()
    if hasattr(scheduler, "alphas_cumprod"):
        a = scheduler.alphas_cumprod[timesteps.long()].double().numpy()
        return np.sqrt(a), np.sqrt(1 - a)
    sigmas = scheduler.sigmas.double().cpu().numpy()[: len(timesteps)]
    return 1 - sigmas, sigmas


def record(pipe: Any, prompts: Sequence[str], request: Mapping[str, Any], batch: int) -> dict[str, np.ndarray]:
    """The inner products of the requests of some prompts, and their noise levels."""
    parts = []
    for begin in range(0, len(prompts), batch):
        some = list(prompts[begin : begin + batch])
        noise = [torch.Generator("cpu").manual_seed(begin + i) for i in range(len(some))]
        more = {"negative_prompt": [""] * len(some)} if "negative_prompt" in request else {}
        watch = Watch(pipe.scheduler)
        pipe(prompt=some, generator=noise, **{**request, **more, "num_inference_steps": STEPS, "output_type": "latent"})
        parts.append(watch.close())
    alpha, sigma = levels_of(pipe.scheduler)
    return {"grams": np.concatenate(parts), "alpha": alpha, "sigma": sigma}


def sources(run: Path, device: str) -> dict[str, tuple[Any, list[str], dict[str, Any], dict[str, Any]]]:
    """Pipelines by name, with prompts to record, the request and what guidance adds to it."""
    found = {}
    for name, model in MODELS.items():
        path = run / f"{name}.safetensors"
        if path.exists():
            pipe = load(name, path, device)
            # The words of the vocabulary do not tell the prompts; the data does, which need not be there any more.
            prompts = [line for line in (run / f"{name}.txt").read_text(encoding="utf-8").splitlines() if line]
            found[name] = pipe, split(prompts, JUDGED)[0], dict(model.request), dict(model.guided)
    found["emoji-flux"] = assets.load(device), assets.fitting_prompts(), dict(assets.REQUEST), dict(assets.GUIDANCE)
    return found


def main() -> None:
    """Record every model, without guidance and with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("build/generic"))
    parser.add_argument("--out", type=Path, help="default RUN/recorded.npz")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=RECORDED)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    arrays = {}
    for name, (pipe, prompts, request, guided) in sources(options.run, options.device).items():
        for label, more in (("plain", {}), ("guided", guided)):
            found = record(pipe, prompts[: options.count], {**request, **more}, options.batch)
            arrays |= {f"{name}.{label}.{key}": value for key, value in found.items()}
            print(name, label, found["grams"].shape, flush=True)
    np.savez_compressed(options.out or options.run / "recorded.npz", **arrays)


if __name__ == "__main__":
    main()
