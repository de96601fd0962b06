"""What the guard costs a request that stays on its plan: of emoji-flux, and of FLUX.1's own width.

    python -m benchmarks.guard_cost --device cuda --results guard-cost.csv --commit $(git rev-parse --short HEAD)

Each request runs with and without the guard, one right after the other; who goes first takes turns. time_ratio is the
median of guarded times by those of the others; between says how far the same ratio of two settings without a guard is
from 1, that is, what the machine's own scatter makes. "flux-12" has 4 of FLUX.1-dev's 19 blocks and 8 of its 38, with
random weights, at 1024 x 1024; with all of them a computed step takes five times as long, and the guard's part is less.
Its loop has no scheduler, so that each of its steps waits for its timestep, with the guard and without.
"""

from __future__ import annotations

import argparse
import datetime
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from tqdm import tqdm

import lesa
from lesa import assets
from lesa.forecasters import check_rows, plan_of
from lesa.models.pipeline import run
from lesa.plans.plan import Expected, Plan
from lesa.runtime.likeness import likeness_of

from . import captions
from .guard import driver_of, root_of
from .measuring import append_row, hardware

COLUMNS = ["hardware", "commit", "date", "model", "batch", "requests", "off_ms", "on_ms", "time_ratio", "between"]
STEPS, COMPUTED = 50, (0, 4, 9, 15, 22, 29, 35, 41, 45, 48)
_WARM = 2


class Emoji:
    """Captions of emoji-flux, in batches."""

    def __init__(self, plan: Path, batch: int, device: str) -> None:
        self.host, self.plan, self.batch = captions.load(device), lesa.Plan.load(plan), batch
        self.name, self._captions = "emoji-flux", [*assets.held_out_prompts(), *assets.fitting_prompts()]

    def run(self, number: int) -> None:
        """One request."""
        first = number * self.batch
        prompts = [self._captions[(first + i) % len(self._captions)] for i in range(self.batch)]
        run(self.host, prompts, range(number, number + self.batch), assets.REQUEST, output_type="np")


class Flux:
    """A loop over twelve blocks of FLUX.1's width with random weights, on noise."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            model = FluxTransformer2DModel(num_layers=4, num_single_layers=8, guidance_embeds=True)
        self.host, self.batch, self.name = model.to(torch.bfloat16).requires_grad_(False).eval(), 1, "flux-12"
        self._like = {"device": device, "dtype": torch.bfloat16}
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(64.0), torch.arange(64.0))
        self._fixed = {
            "encoder_hidden_states": torch.randn(1, 512, 4096, **self._like),
            "pooled_projections": torch.randn(1, 768, **self._like),
            "guidance": torch.full((1,), 3.5, **self._like),
            "img_ids": ids.to(**self._like),
            "txt_ids": torch.zeros(512, 3, **self._like),
        }
        self._sigmas = torch.linspace(1, 0, STEPS + 1).tolist()
        self._timesteps = torch.tensor(self._sigmas[:-1]).to(**self._like)
        self.plan = self._watched()

    def run(self, number: int) -> None:
        """One request, to its end."""
        generator = torch.Generator(self._like["device"]).manual_seed(number)
        sample = torch.randn(1, 4096, 64, generator=generator, **self._like)
        with torch.no_grad():
            for step, (now, after) in enumerate(zip(self._sigmas, self._sigmas[1:], strict=False)):
                time_of = self._timesteps[step : step + 1]
                velocity = self.host(sample, timestep=time_of, return_dict=False, **self._fixed)[0]
                sample = sample + (after - now) * velocity
        torch.cuda.synchronize()

    def _watched(self) -> Plan:
        """A plan that knows the errors of one of its requests."""
        plan = plan_of("taylor-1", COMPUTED, tuple(self._sigmas), "output")
        checks = {s: row for s, row in check_rows("taylor-1", COMPUTED, STEPS).items() if s >= COMPUTED[2]}
        plan = replace(plan, checks={"*": checks}, likeness=likeness_of({}, self.host))
        lesa.enable(self.host, plan, guard=float("inf"))
        self.run(0)
        saw = lesa.stats(self.host).guard
        lesa.disable(self.host)
        assert saw is not None
        (errors,) = saw.errors.values()
        return replace(plan, expected={"*": {step: Expected(error, 1.0) for step, error in errors.items()}})


def measure(subject: Emoji | Flux, requests: int) -> list[str]:
    """Batch, requests, medians without and with the guard in ms, and both ratios."""
    ways = {"off": False, "on": True, "again": False}
    drivers = {name: driver_of(subject.host, subject.plan, guard) for name, guard in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in drivers}
    for number in tqdm(range(requests + _WARM), desc=f"{subject.name}, {subject.batch} a request"):
        for name in list(drivers)[:: (-1) ** number]:
            root_of(subject.host).driver = drivers[name]
            seconds[name].append(_timed(lambda number=number: subject.run(number)))
    saw = drivers["on"].stats.guard
    assert saw is not None and saw.checks > 0
    if saw.switches:
        raise RuntimeError(f"{saw.switches} requests of {subject.name} left their plan: nothing can be told of cost")
    lesa.disable(subject.host)
    off, on, again = (np.array(seconds[name][_WARM:]) for name in drivers)
    figures = [f"{np.median(times) * 1e3:.1f}" for times in (off, on)]
    figures += [f"{np.median(on / off):.4f}", f"{abs(np.median(again / off) - 1):.4f}"]
    return [subject.name, str(subject.batch), str(requests), *figures]


def _timed(request: Callable[[], Any]) -> float:
    start = time.perf_counter()
    request()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, and add the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=Path("lesa/assets/emoji-flux-fitted-10.safetensors"))
    parser.add_argument("--device", default="cuda", help="flux-12 runs on CUDA only")
    parser.add_argument("--batches", type=int, nargs="*", default=(1, 32), help="captions a request of emoji-flux")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of the code that runs")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", lesa.LesaWarning)
    head = [hardware(options.device), options.commit, datetime.date.today().isoformat()]
    subjects: list[Callable[[], Emoji | Flux]] = [
        lambda batch=batch: Emoji(options.plan, batch, options.device)  # type: ignore[misc]
        for batch in options.batches
    ]
    if options.device.startswith("cuda"):
        subjects.append(lambda: Flux(options.device))
    for subject in subjects:
        cells = measure(subject(), options.requests)
        append_row(options.results, COLUMNS, [*head, *cells])
        print(" ".join(cells), flush=True)


if __name__ == "__main__":
    main()
