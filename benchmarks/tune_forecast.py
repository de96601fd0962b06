"""Time tilings of the forecast and the forecast head on a CUDA GPU, each checked against float64 first.

    python -m benchmarks.tune_forecast [--only forecast|head] [--write FILE.csv]

Every launch reads features that have left the L2 cache: launches go round several rings, inside a CUDA graph, and a
figure is the median over its replays. "% copy" compares bytes per second (each feature read once, each result written
once) with a device-to-device copy timed in the same run. All variants run at FLUX's size; then the fastest of them, and
what the launchers choose by themselves, at other sizes and windows.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor

from lesa.kernels.forecast import ForecastConfig, launch_forecast_fwd
from lesa.kernels.head import HeadConfig, launch_forecast_head_fwd

SIZES = {"flux": (1, 4096, 3072), "qwen": (1, 6889, 3072), "hunyuan": (1, 20400, 3072), "emoji": (1, 256, 256)}
PROJECTED = 64
EPS = 1e-6
COLUMNS = ("what", "variant", "size", "K", "us", "GB_per_s", "percent_of_copy", "error", "allowed")
CACHE = 50 * 2**20


@dataclass
class Case:
    """Rings of one size with rows for them, more bytes together than the cache holds.

    Args:
        size: B, N, D.
        window: K, the slots a row reads; each ring has one more.
    """

    size: tuple[int, int, int]
    window: int
    rings: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        H, (B, N, D) = self.window + 1, self.size
        count = max(2, math.ceil(4 * CACHE / (2 * H * B * N * D)))
        self.rings = [torch.randn(H, B, N, D, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        order = torch.randperm(H, device="cuda").int()
        self.slots = order[: self.window].repeat(4, 1)
        self.free = int(order[self.window])
        self.into = torch.full((4,), self.free, device="cuda", dtype=torch.int32)
        self.weights = torch.randn(4, self.window, device="cuda")
        self.bias = torch.randn(4, device="cuda")
        self.keep = torch.full((4,), -1, device="cuda", dtype=torch.int32)
        self.step = torch.tensor([2], device="cuda")
        self.scale = (1 + 0.3 * torch.randn(B, D, device="cuda")).bfloat16()
        self.shift = torch.randn(B, D, device="cuda").bfloat16()
        self.proj = (torch.randn(PROJECTED, D, device="cuda") / D**0.5).bfloat16()
        self.proj_bias = torch.randn(PROJECTED, device="cuda").bfloat16()

    def forecast(self, dtype: torch.dtype) -> Tensor:
        """The plain formula on the first ring, in `dtype`."""
        features = self.rings[0][self.slots[2].long()].to(dtype)
        return sum(w * f for w, f in zip(self.weights[2].to(dtype), features, strict=True)) + self.bias[2].to(dtype)

    def head(self, dtype: torch.dtype) -> Tensor:
        """The plain formula on the first ring, in `dtype`."""
        x = F.layer_norm(self.forecast(dtype), self.size[2:], eps=EPS)
        x = x * self.scale[:, None].to(dtype) + self.shift[:, None].to(dtype)
        return F.linear(x, self.proj.to(dtype), self.proj_bias.to(dtype))

    def bytes_of(self, what: str) -> int:
        """What must be moved: the features read, the result and the projection."""
        B, N, D = self.size
        if what == "forecast":
            return 2 * (self.window + 1) * B * N * D
        return 2 * (self.window * B * N * D + B * N * PROJECTED + PROJECTED * D + 2 * B * D)


@triton.jit
def _rows_kernel(
    p_out, p_history, p_slots, p_weights, p_bias, p_step, S, L, K: tl.constexpr, BLOCK: tl.constexpr, HINT: tl.constexpr
):
    # All features are rows of one tile, so one instruction group issues every load.
    o_start = tl.program_id(0).to(tl.int64) * BLOCK
    i_row = tl.load(p_step)
    o_k = tl.arange(0, K)
    o_tile = o_start + tl.arange(0, BLOCK)[None, :]
    i_slots = tl.load(p_slots + i_row * K + o_k).to(tl.int64)[:, None]
    b_weights = tl.load(p_weights + i_row * K + o_k)[:, None]
    m_tile = (i_slots >= 0) & (o_tile < L)
    b_features = tl.load(p_history + i_slots * S + o_tile, mask=m_tile, other=0.0, eviction_policy=HINT)
    b_sum = tl.sum(tl.where(i_slots >= 0, b_weights, 0.0) * b_features.to(tl.float32), 0)[None, :]
    b_sum += tl.load(p_bias + i_row)
    tl.store(p_out + o_tile, b_sum.to(p_out.dtype.element_ty), mask=o_tile < L)


@triton.jit
def _persistent_kernel(
    p_out,
    p_history,
    p_slots,
    p_weights,
    p_bias,
    p_step,
    S,
    L,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HINT: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The row is loaded once a program; the loop over blocks may be pipelined through shared memory.
    i_row = tl.load(p_step)
    bias = tl.load(p_bias + i_row)
    i_slots, weights = (), ()
    for k in tl.static_range(K):
        i_slot = tl.load(p_slots + i_row * K + k).to(tl.int64)
        weights += (tl.where(i_slot >= 0, tl.load(p_weights + i_row * K + k), 0.0),)
        i_slots += (i_slot,)
    for i_block in tl.range(tl.program_id(0), tl.cdiv(L, BLOCK), tl.num_programs(0), num_stages=STAGES):
        o_start = i_block * tl.full([], BLOCK, tl.int64)
        o_tile = tl.arange(0, BLOCK)
        left = tl.minimum(L - o_start, BLOCK).to(tl.int32)
        b_sum = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            m_tile = o_tile < tl.where(i_slots[k] >= 0, left, 0)
            p_feature = p_history + i_slots[k] * S + o_start
            b_feature = tl.load(p_feature + o_tile, mask=m_tile, other=0.0, eviction_policy=HINT)
            b_sum += weights[k] * b_feature.to(tl.float32)
        tl.store(p_out + o_start + o_tile, (b_sum + bias).to(p_out.dtype.element_ty), mask=o_tile < left)


Runner = Callable[[Case, Tensor], Tensor]


def _other(kernel: Callable[[Tensor, Case, Tensor], object]) -> Runner:
    def run(case: Case, ring: Tensor) -> Tensor:
        out = torch.empty_like(ring[0])
        kernel(out, case, ring)
        return out

    return run


def _rows(block: int, warps: int, hint: str) -> Runner:
    def run(out: Tensor, case: Case, ring: Tensor) -> None:
        rest = (case.slots, case.weights, case.bias, case.step, ring.stride(0), out.numel(), case.window)
        _rows_kernel[(triton.cdiv(out.numel(), block),)](out, ring, *rest, BLOCK=block, HINT=hint, num_warps=warps)

    return _other(run)


def _persistent(block: int, warps: int, hint: str, programs: int, stages: int) -> Runner:
    def run(out: Tensor, case: Case, ring: Tensor) -> None:
        rest = (case.slots, case.weights, case.bias, case.step, ring.stride(0), out.numel(), case.window)
        grid = (programs * torch.cuda.get_device_properties(0).multi_processor_count,)
        _persistent_kernel[grid](out, ring, *rest, BLOCK=block, HINT=hint, STAGES=stages, num_warps=warps)

    return _other(run)


def _forecast(config: ForecastConfig | None) -> Runner:
    extra = {} if config is None else {"config": config}

    def run(case: Case, ring: Tensor) -> Tensor:
        return launch_forecast_fwd(None, ring, case.slots, case.weights, case.bias, None, case.step, **extra)

    return run


def _into(case: Case, ring: Tensor) -> Tensor:
    launch_forecast_fwd(None, ring, case.slots, case.weights, case.bias, case.into, case.step)
    return ring[case.free]


def _head(config: HeadConfig | None) -> Runner:
    def run(case: Case, ring: Tensor) -> Tensor:
        row = (case.slots, case.weights, case.bias, case.keep, case.step)
        return launch_forecast_head_fwd(ring, *row, case.scale, case.shift, case.proj, case.proj_bias, EPS, config)

    return run


def forecast_variants() -> dict[str, Runner]:
    """Three designs: a program a block, a tile of rows, a persistent grid."""
    cuts = [(512, 2), (1024, 8), (1024, 4), (1024, 2), (2048, 8), (2048, 4), (4096, 8)]
    runners = {f"block {b}/{w} {h}": _forecast(ForecastConfig(b, w, h)) for b, w in cuts for h in ("", "evict_first")}
    runners |= {f"rows {b}/{w}": _rows(b, w, "evict_first") for b, w in [(512, 2), (1024, 4), (2048, 4)]}
    for block, warps, programs, stages in [(1024, 4, 4, 1), (1024, 4, 8, 1), (2048, 8, 4, 1), (1024, 4, 4, 3)]:
        name = f"persistent {block}/{warps} x{programs} stages {stages}"
        runners[name] = _persistent(block, warps, "evict_first", programs, stages)
    return runners


def head_variants() -> dict[str, Runner]:
    """Three designs: all channels in one program through registers, the same pipelined, split channels."""
    whole = [(16, 128, 1, 4, 1), (16, 128, 1, 8, 1), (16, 256, 1, 8, 1), (32, 64, 1, 8, 1), (32, 128, 1, 8, 1)]
    piped = [(16, 64, 1, 4, 3), (16, 128, 1, 4, 2), (16, 128, 1, 8, 3), (32, 64, 1, 8, 3), (32, 64, 1, 4, 3)]
    split = [(16, 64, 4, 4, 1), (16, 128, 2, 4, 1), (32, 64, 2, 4, 1), (32, 64, 4, 4, 1), (32, 64, 8, 4, 1)]
    split += [(32, 128, 4, 8, 1), (64, 64, 4, 8, 1), (64, 64, 8, 8, 1), (32, 64, 4, 4, 2), (32, 64, 4, 4, 3)]
    configs = [HeadConfig(*numbers) for numbers in whole + piped + split]
    return {"BM{} BD{} J{} w{} s{}".format(*config): _head(config) for config in configs}


def measured(runner: Runner, case: Case) -> float:
    """Microseconds a launch: the median over replays of a graph that goes round the rings."""
    rounds = max(1, 24 // len(case.rings))
    for ring in case.rings[:2]:
        runner(case, ring)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for ring in case.rings * rounds:
            runner(case, ring)
    times = []
    for _ in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (rounds * len(case.rings)))
    return statistics.median(times[2:])


def errors(runner: Runner, case: Case, what: str) -> tuple[float, float]:
    """The largest error against float64, and what the plain formula in bfloat16 allows."""
    exact = getattr(case, what)(torch.float64)
    plain = (getattr(case, what)(torch.bfloat16).double() - exact).abs().max()
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    got = runner(case, case.rings[0])
    torch.use_deterministic_algorithms(False)
    error = (got.double() - exact).abs().max()
    return error.item(), 2 * (plain + torch.finfo(torch.bfloat16).eps * exact.abs().max()).item()


def copy_rate() -> float:
    """Bytes a second, read and written, of a device-to-device copy."""
    case = Case((1, 4096, 3072), 8)
    targets = [torch.empty_like(ring) for ring in case.rings[:2]]
    pairs = itertools.cycle(targets)
    return 2e6 * targets[0].numel() * 2 / measured(lambda _, ring: next(pairs).copy_(ring), case)


def tune(what: str, variants: dict[str, Runner], copy: float) -> list[tuple[object, ...]]:
    """Check and time all variants at FLUX's size, then the best three and the launcher's choice elsewhere."""
    rows: list[tuple[object, ...]] = []

    def take(name: str, runner: Runner, size: str, case: Case) -> None:
        try:
            error, allowed = errors(runner, case, what)
            good = error <= allowed
            us = measured(runner, case) if good else math.nan
        except triton.runtime.errors.OutOfResources as refusal:
            print(f"{what} {name} {size}: {refusal}")
            return
        rate = case.bytes_of(what) / us / 1e-6
        rows.append(
            (what, name, size, case.window, f"{us:.1f}", f"{rate / 1e9:.0f}", f"{100 * rate / copy:.1f}")
            + (f"{error:.3g}", f"{allowed:.3g}" + ("" if good else " WRONG"))
        )

    defaults: dict[str, Runner] = {"default": _forecast(None), "into": _into}
    if what == "head":
        defaults = {"default": _head(None)}
    case = Case(SIZES["flux"], 8)
    for name, runner in (variants | defaults).items():
        take(name, runner, "flux", case)
    ranking = sorted((row for row in rows if row[1] in variants), key=lambda row: float(str(row[4])))
    best = {str(row[1]): variants[str(row[1])] for row in ranking[:3]}
    for size, window in itertools.product(SIZES, (2, 4, 8)):
        if (size, window) != ("flux", 8):
            case = Case(SIZES[size], window)
            for name, runner in (best | defaults).items():
                take(name, runner, size, case)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, print one table, write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("forecast", "head"))
    parser.add_argument("--write", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.manual_seed(0)
    copy = copy_rate()
    rows: list[tuple[object, ...]] = []
    for what, variants in (("forecast", forecast_variants()), ("head", head_variants())):
        if options.only in (None, what):
            rows += tune(what, variants, copy)
    rows.sort(key=lambda row: (row[0], row[2] != "flux", row[2], -int(str(row[3])), float(str(row[4]))))
    if options.write:
        with options.write.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copy {copy / 1e12:.3f} TB/s")
    for row in [COLUMNS, *rows]:
        print("{:9}{:36}{:9}{:>3}{:>9}{:>9}{:>17}{:>10}{:>10}".format(*map(str, row)))


if __name__ == "__main__":
    main()
