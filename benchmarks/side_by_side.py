"""Two checkouts of lesa in turn on one device: kernels, a request without checks, and fits.

    python -m benchmarks.side_by_side --other ../before --results benchmarks/results/side-by-side.csv --rounds 5

A row has the medians of both and their ratio (of fits, the difference). Kernels: each round runs a process for each
checkout. Requests: two processes take turns, request by request, 20 per round, and the ratio is the median of those of
neighbours, since hosts drift by more than what is to be seen. Fits run once in each. Of the other checkout only lesa/
is used. On an H200 it takes about 8 minutes; --only chooses "ops", "request" or "fit".
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
COLUMNS = ("measure", "unit", "before", "now", "ratio", "rounds", "hardware", "commit", "date")
KINDS = ("ops", "request", "fit")
BUDGET, CAPTIONS = 10, 16


def measure_ops() -> dict[str, float]:
    """Microseconds of the operators at FLUX's size, K = 8, bfloat16; medians of single calls on cold inputs."""
    import torch

    from benchmarks.measuring import DEVICE, timer_of
    from lesa import ops

    torch.manual_seed(0)
    B, N, D, K = 1, 4096, 3072, 8
    like = {"device": DEVICE, "dtype": torch.bfloat16}
    features = [torch.randn(K, B, N, D, **like) for _ in range(3)]
    slots = torch.arange(K, device=DEVICE, dtype=torch.int32)
    weights = torch.randn(K, device=DEVICE)
    bias = torch.zeros((), device=DEVICE)
    truth = [torch.randn(B, N, D, **like) for _ in range(3)]
    scale, shift = (torch.randn(B, D, **like) for _ in range(2))
    weight, lift = torch.randn(64, D, **like), torch.randn(64, **like)
    table, row = weights.view(1, K), slots.view(1, K)
    step, keep = torch.zeros(1, device=DEVICE, dtype=torch.int64), torch.full((1,), -1, device=DEVICE).int()
    calls = {
        "forecast": lambda i: ops.forecast(features[i], slots, weights, bias),
        "forecast_errors": lambda i: ops.forecast_errors(features[i], slots, weights, bias, truth[i]),
        "forecast_head": lambda i: ops.forecast_head(
            features[i], row, table, bias.view(1), keep, step, scale, shift, weight, lift, 1e-6
        ),
    }
    x = torch.randn(3, 50, 51, device=DEVICE)
    net = [torch.randn(3, 256, 51, *more, device=DEVICE) for more in ((), (8,), ())]
    alpha = torch.tensor(0.7, device=DEVICE)
    calls |= {
        "predict_loss": lambda i: ops.predict_loss(features[i], slots, weights, bias, alpha, truth[i]),
        "kan": lambda i: ops.kan(x, *net, (-3.0, 3.0)),
    }
    found, timer = {}, timer_of(DEVICE)
    for name, call in calls.items():
        for i in range(3):
            call(i)
        times = []
        for i in range(60):
            begin = timer()
            call(i % 3)
            times.append(timer() - begin)
        found[name] = 1e6 * statistics.median(times)
    return found


def serve_requests() -> None:
    """Run requests of emoji-flux without checks: for each line of input, a site, print the milliseconds of one."""
    import torch

    import lesa
    from lesa import assets

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = assets.load(device).to(torch.bfloat16)
    option = inspect.signature(lesa.enable).parameters["guard"].default
    plans = {"output": assets.fitted_path(10), "hidden": assets.plan_path(7)}
    enabled = ""
    for line in sys.stdin:
        if line.strip() != enabled:
            enabled = line.strip()
            lesa.enable(pipe, plans[enabled], guard="off" if option == "warn" else False)
        begin = time.perf_counter()
        noise = torch.Generator().manual_seed(0)
        pipe("red apple", generator=noise, output_type="latent", **assets.REQUEST)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"\n{1e3 * (time.perf_counter() - begin)}", flush=True)


def paired_requests(checkouts: dict[str, Path], rounds: int) -> Iterator[tuple[str, float, float, float]]:
    """Site, medians of both checkouts in ms, and the median ratio of neighbouring requests of the two in turn."""
    servers = {
        name: subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--measure", "request"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(checkout),
        )
        for name, checkout in checkouts.items()
    }

    def one(name: str, site: str) -> float:
        server = servers[name]
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(f"{site}\n")
        server.stdin.flush()
        while True:  # libraries print, too
            line = server.stdout.readline().strip()
            if line.replace(".", "", 1).isdigit():
                return float(line)
            if server.poll() is not None:
                raise RuntimeError(f"the requests of {name} ended")

    for site in ("output", "hidden"):
        times: dict[str, list[float]] = {name: [] for name in servers}
        for i in range(rounds + 5):
            for name in sorted(servers, reverse=bool(i % 2)):
                times[name].append(one(name, site))
        before, now = (np.array(times[name][5:]) for name in ("before", "now"))
        yield site, float(np.median(before)), float(np.median(now)), float(np.median(now / before))
    for server in servers.values():
        server.kill()


def measure_fit() -> dict[str, float]:
    """PSNR of fits at 10 of 50 on held-out captions, without and with guidance."""
    import torch

    import lesa
    from lesa import assets, metrics

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = assets.load(device)
    option = inspect.signature(lesa.enable).parameters["guard"].default
    prompts, seeds = assets.held_out_prompts()[:CAPTIONS], assets.held_out_seeds()[:CAPTIONS]
    found = {}
    for guidance in (1, 3):
        request: dict[str, Any] = dict(assets.REQUEST)
        if guidance > 1:
            request |= {"true_cfg_scale": float(guidance), "negative_prompt": ""}

        def pictures(request: dict[str, Any] = request) -> np.ndarray:
            noise = [torch.Generator().manual_seed(seed) for seed in seeds]
            more = {"negative_prompt": [""] * CAPTIONS} if "negative_prompt" in request else {}
            return pipe(prompts, generator=noise, output_type="np", **{**request, **more}).images

        full = pictures()
        for effort in ("quick", "default"):
            plan = lesa.fit(
                pipe,
                assets.fitting_prompts()[:8],
                budget=BUDGET,
                request=request,
                seeds=range(8),
                effort=effort,
                batch=8,
            )
            lesa.enable(pipe, plan, guard="off" if option == "warn" else False)
            psnr = [metrics.psnr(a, b) for a, b in zip(pictures(), full, strict=True)]
            lesa.disable(pipe)
            found[f"fit {effort}, guidance {guidance}"] = float(np.mean(psnr))
    return found


MEASURES = {"ops": measure_ops, "fit": measure_fit}
UNITS = {"ops": "us", "request": "ms", "fit": "dB"}


def environment(checkout: Path) -> dict[str, str]:
    """Of a process that imports the lesa of a checkout."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), str(ROOT), os.environ.get("PYTHONPATH", "")])}


def ran(kind: str, checkout: Path) -> dict[str, float]:
    """What a process with the lesa of a checkout measures."""
    command = [sys.executable, str(Path(__file__)), "--measure", kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(checkout), check=False)
    if done.returncode:
        raise RuntimeError(f"{kind} in {checkout}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="checkout to compare with")
    parser.add_argument("--results", type=Path, help="CSV that rows are added to")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--commit", default="")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure == "request":
        serve_requests()
        return
    if options.measure:
        print(json.dumps(MEASURES[options.measure]()))
        return
    from benchmarks.measuring import append_row, hardware

    def add(kind: str, measure: str, before: float, now: float, ratio: float, rounds: int) -> None:
        print(f"{measure:<28}{before:10.3f}{now:10.3f} {UNITS[kind]}  {ratio:8.4f}", flush=True)
        if options.results:
            cells = [measure, UNITS[kind], f"{before:.4f}", f"{now:.4f}", f"{ratio:.4f}", rounds]
            append_row(options.results, COLUMNS, [*cells, hardware("cuda"), options.commit, time.strftime("%F")])

    checkouts = {"before": options.other.resolve(), "now": ROOT}
    for kind in options.only:
        if kind == "request":
            for site, *figures in paired_requests(checkouts, 20 * options.rounds):
                add(kind, f"request, {site} site", *figures, 20 * options.rounds)
            continue
        rounds = 1 if kind == "fit" else options.rounds
        sides: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
        for i in range(rounds):
            for name in sorted(sides, reverse=bool(i % 2)):
                sides[name].append(ran(kind, checkouts[name]))
        for measure in sides["now"][0]:
            before, now = (statistics.median(one[measure] for one in sides[name]) for name in ("before", "now"))
            add(kind, measure, before, now, now - before if kind == "fit" else now / before, rounds)


if __name__ == "__main__":
    main()
