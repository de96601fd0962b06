"""Shared by all benchmarks of operators: timers, rotation of inputs, the tolerance rule, the rows of results."""

from __future__ import annotations

import csv
import datetime
import itertools
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LABELS = "hardware commit date op shape k dtype provider"
COLUMNS = [*_LABELS.split(), "p20_us", "p50_us", "p80_us", "bytes", "gbps"]
# Assumed for CPUs; larger than the last level of usual ones.
_CPU_CACHE = 64 * 2**20
_CYCLES_PER_SECOND = 2e9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def full_float32() -> None:
    """Turn TF32 off, and cuDNN's attention: PSNR beyond 50 dB is made of small differences."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


class Spec(NamedTuple):
    """One row to measure: operator, features and provider."""

    op: str
    shape: str
    k: int | None
    dtype: torch.dtype
    provider: str

    @property
    def type_name(self) -> str:
        """The dtype as rows and test ids say it."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        window = [] if self.k is None else [f"k{self.k}"]
        return "-".join([self.op, self.shape, *window, self.type_name, self.provider])


class DeviceTimer:
    """A timer for pytest-benchmark whose rounds are measured by CUDA events.

    It is called before and after each round. The call before overwrites `others`, so that no round finds in the cache
    what the one before it left there and all find the same: lines that others wrote. It then fills the queue with a
    kernel that waits, and records an event behind it: the round's launches are queued before the first of them starts,
    and their time on the host is hidden. What it returns is the sum of all rounds so far.

    Args:
        others: a tensor on the device, larger than its cache.
    """

    def __init__(self, others: Tensor) -> None:
        self._others = others
        self.elapsed = 0.0
        self.delay = 1e-3
        self.exposed = 0
        self._start: torch.cuda.Event | None = None

    def __call__(self) -> float:
        """Begin or end a round; seconds on the device in all rounds."""
        if self._start is None:
            self._others.zero_()
            torch.cuda._sleep(int(self.delay * _CYCLES_PER_SECOND))
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
            return self.elapsed
        stop = torch.cuda.Event(enable_timing=True)
        stop.record()
        # True if the wait is already over: then the device may have idled between launches.
        self.exposed += self._start.query()
        stop.synchronize()
        self.elapsed += self._start.elapsed_time(stop) * 1e-3
        self._start = None
        return self.elapsed

    def adapt(self, call: Callable[[], Any]) -> None:
        """Make the wait twice as long as the launches of `call` take, and forget the exposed rounds."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        self.delay = 2 * (time.perf_counter() - begin) + 2e-4
        torch.cuda.synchronize()
        self.exposed = 0


def wall_clock() -> float:
    """Seconds, once the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timer_of(device: str) -> Callable[[], float]:
    """The timer of rounds on `device`."""
    if device != "cuda":
        return time.perf_counter
    return DeviceTimer(torch.empty(4 * cache_of(device), dtype=torch.int8, device=device))


def pilot(call: Callable[[], Any], timer: Callable[[], float], rounds: int = 3) -> float:
    """Warm `call` up; seconds of its median round."""
    for _ in range(2):
        call()
    if isinstance(timer, DeviceTimer):
        timer.adapt(call)
    times = []
    for _ in range(rounds):
        begin = timer()
        call()
        times.append(timer() - begin)
    return statistics.median(times)


def rotating(form: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """`form` on the next of `inputs` at every call."""
    turn = itertools.cycle(inputs)
    return lambda: form(next(turn))


def cache_of(device: str) -> int:
    """Bytes of the last level of the device's cache."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else _CPU_CACHE


def copies_beyond(cache: int, size: int) -> int:
    """How many inputs of `size` bytes are together four times `cache`; 2 or more."""
    return max(2, math.ceil(4 * cache / size))


class Expected(NamedTuple):
    """A float64 result and how far a result in another dtype may be from it."""

    exact: Tensor
    allowed: float


def expected(exact: Sequence[Tensor], plain: Sequence[Tensor]) -> list[Expected]:
    """The tolerance rule: twice the error of the plain formula plus eps times the largest value.

    Args:
        exact: results of the plain formula in float64.
        plain: the same in the dtypes that are measured.
    """
    rows = []
    for reference, got in zip(exact, plain, strict=True):
        error = (got.double() - reference).abs().max().item()
        largest = reference.abs().max().item()
        rows.append(Expected(reference, 2 * (error + torch.finfo(got.dtype).eps * largest)))
    return rows


def assert_close(
    form: Callable[[], Sequence[Tensor]], wanted: Sequence[Expected], name: str, slack: float = 1.0
) -> None:
    """Assert that every result of `form` is within `slack` times its tolerance.

    Memory of the results' sizes is filled with NaN first, so that a result that is not written cannot pass for the one
    another provider has left there.
    """
    for dtype in (torch.float32, torch.bfloat16):
        poison = [torch.full_like(row.exact, math.nan, dtype=dtype) for row in wanted]
        del poison
    for i, (got, row) in enumerate(zip(form(), wanted, strict=True)):
        assert got.shape == row.exact.shape, f"{name}: result {i} has shape {tuple(got.shape)}"
        error = (got.double() - row.exact).abs().max().item()
        allowed = slack * row.allowed
        assert error <= allowed, f"{name}: result {i} is off by {error:.3g}, allowed are {allowed:.3g}"


class Results:
    """The CSV file rows are appended to.

    Args:
        path: the file; None keeps nothing.
        commit: of the code that runs; None asks git.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path | None, commit: str | None) -> None:
        self.path = path
        self._head = [hardware(DEVICE), head_commit() if commit is None else commit, datetime.date.today().isoformat()]
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or not path.stat().st_size:
            self._write(COLUMNS)
        with path.open(newline="") as file:
            found = next(csv.reader(file))
        if found != COLUMNS:
            raise ValueError(f"{path} has the columns {found}, expected {COLUMNS}: give another file")

    def add(self, spec: Spec, seconds: Sequence[float], size: int) -> None:
        """Append a row.

        Args:
            spec: what was run.
            seconds: of every round.
            size: bytes that had to be moved.
        """
        if self.path is None:
            return
        p20, p50, p80 = (_percentile(seconds, share) for share in (0.2, 0.5, 0.8))
        window = "" if spec.k is None else spec.k
        times = [f"{1e6 * p:.2f}" for p in (p20, p50, p80)]
        cells = [spec.op, spec.shape, window, spec.type_name, spec.provider, *times, size, f"{size / p50 / 1e9:.1f}"]
        self._write([*self._head, *cells])

    def _write(self, cells: Sequence[Any]) -> None:
        assert self.path is not None
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(cells)


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def append_row(path: Path, columns: Sequence[str], cells: Sequence[Any]) -> None:
    """Append a row to a CSV file, which starts with its columns.

    Raises:
        ValueError: the file has other columns.
    """
    head = [] if path.is_file() else [columns]
    if not head:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != list(columns):
            raise ValueError(f"{path} has the columns {found}, expected {list(columns)}: give another file")
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([*head, cells])


def hardware(device: str) -> str:
    """The name of the machine of `device` in the rows."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def head_commit() -> str:
    """The commit that git has checked out; empty without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
