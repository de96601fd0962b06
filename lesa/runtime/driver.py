"""What decides, at each denoiser call, between computing and forecasting, the `Driver`, and what it counts: `Stats`."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .clock import Call, Request
from .history import Ring

_LATEST = 256  # calls whose times are kept


@dataclass(frozen=True)
class Check:
    """A computed step's forecast, had one been made, against its true feature.

    Args:
        context, step: of the feature.
        error: ||F^ - F|| / ||F||.
        expected: the geometric mean of this error in the fitting requests.
        std: how many standard deviations the error's logarithm lies above the expected one.
    """

    context: str
    step: int
    error: float
    expected: float
    std: float

    @property
    def ratio(self) -> float:
        """How many times the expected error this one is."""
        return self.error / self.expected if self.expected else math.inf


@dataclass
class Stats:
    """Counts and times since `lesa.enable`.

    Args:
        requests: requests started.
        computed: denoiser calls the plan computed.
        forecast: denoiser calls the plan forecast.
        refused: calls that the plan forecasts but that had to be computed, by reason: what the forecast reads is not
            there, or its result is not finite.
        operators: forecasts by the operator and backend that made them, e.g. "forecast_head: triton".
        checks: of the latest request, how far the forecasts that would have been made of computed steps were off.
        out_of_distribution: requests in which such an error lay far above what fitting saw.
        guard: "warn" where errors are measured, "off" where not.
        told: what people were warned of, each once.
    """

    requests: int = 0
    computed: int = 0
    forecast: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    checks: list[Check] = field(default_factory=list)
    out_of_distribution: int = 0
    guard: str = "off"
    told: set[str] = field(default_factory=set, repr=False)
    _timers: dict[str, _Timer] = field(default_factory=lambda: {"computed": _Timer(), "forecast": _Timer()}, repr=False)

    @property
    def seconds_saved(self) -> float:
        """What the forecast calls would have taken at the median of the latest computed ones, less what they took.

        Calls that were never made can only be guessed: by the median, because a call in which torch compiles takes as
        long as thousands of others. What forecasts took is a fact and counts in full, compiling included, which without
        the plan nobody would have waited for: a short first run may save less than nothing.
        """
        computed, forecast = self._timers["computed"], self._timers["forecast"]
        if not computed.calls:
            return 0.0
        return computed.median * forecast.calls - forecast.seconds

    def start(self, kind: str, device: torch.device) -> Callable[[], None]:
        """Begin timing one call of `kind` ("computed" or "forecast") without waiting for the device.

        Returns:
            What to call at its end. A call that raises has no end, and no time of its own.
        """
        return self._timers[kind].start(device)

    def __str__(self) -> str:
        refused = ", ".join(f"{count} ({reason})" for reason, count in self.refused.items()) or "none"
        operators = ", ".join(self.operators)
        return (
            f"requests {self.requests}, computed {self.computed}, forecast {self.forecast}"
            f"{f' ({operators})' if operators else ''}, refused {refused}, "
            f"{self.seconds_saved:.3f} s saved, {self._checked()}"
        )

    def _checked(self) -> str:
        if self.guard == "off":
            return "guard off"
        told = f"{self.out_of_distribution} out of distribution"
        if not self.checks:
            return f"no errors measured, {told}"
        worst = max(self.checks, key=lambda check: check.ratio)
        return (
            f"{len(self.checks)} errors measured, the largest {worst.ratio:.2g} x the expected one "
            f"(step {worst.step}), {told}"
        )


@dataclass(frozen=True)
class Forecast:
    """A feature to come.

    Args:
        feature: writes it out and returns it; in memory that the next step may overwrite.
        ring: forecasts it too, together with the denoiser's head; None where the feature is not a plan's.
        accept: whether what the denoiser made of it may stand; where not, the step is computed. None: it may.
    """

    feature: Callable[[], torch.Tensor]
    ring: Ring | None = None
    accept: Callable[[torch.Tensor], bool] | None = None


class Driver(Protocol):
    """Decides what each denoiser call does; the hooks ask it, and count the forecasts they used in `stats`."""

    stats: Stats

    def begin(self, request: Request) -> None:
        """A new request starts, before its first denoiser call."""

    def forecast(self, call: Call) -> Forecast | None:
        """The forecast of this step, or None to have it computed."""

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        """A step was computed; its feature is None where `lose` was called for it."""

    def refuse(self, call: Call, reason: str) -> None:
        """The forecast of this step could not be used; the step is computed instead."""

    def lose(self, reason: str) -> None:
        """No feature can be taken or given any more in this request."""

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """A step ended: what the denoiser returned for it, computed or forecast; copy it to keep it."""


class Relay:
    """A driver that has another one run the requests; subclasses change what they must.

    Args:
        runner: the other one; its stats are the relay's.
    """

    def __init__(self, runner: Driver) -> None:
        self._runner = runner
        self.stats = runner.stats

    def begin(self, request: Request) -> None:
        """Handed to the runner."""
        self._runner.begin(request)

    def forecast(self, call: Call) -> Forecast | None:
        """What the runner says."""
        return self._runner.forecast(call)

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        """Handed to the runner."""
        self._runner.keep(call, feature)

    def refuse(self, call: Call, reason: str) -> None:
        """Handed to the runner."""
        self._runner.refuse(call, reason)

    def lose(self, reason: str) -> None:
        """Handed to the runner."""
        self._runner.lose(reason)

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """Handed to the runner."""
        self._runner.observe(call, output)


class _Timer:
    """Adds up the time of calls and keeps the latest; on a CUDA device by events, read only when somebody asks."""

    def __init__(self) -> None:
        self.calls = 0
        self._seconds = 0.0
        self._latest: deque[float] = deque(maxlen=_LATEST)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        self._wait()
        return self._seconds

    @property
    def median(self) -> float:
        """Of the latest calls; 0 without any."""
        self._wait()
        return statistics.median(self._latest) if self._latest else 0.0

    def start(self, device: torch.device) -> Callable[[], None]:
        if device.type != "cuda":
            begin = time.perf_counter()

            def stop() -> None:
                self.calls += 1
                self._add(time.perf_counter() - begin)

            return stop
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()

        def stop_event() -> None:
            self.calls += 1
            events[1].record()
            self._events.append(events)
            if len(self._events) > _LATEST:
                self._collect()

        return stop_event

    def _add(self, seconds: float) -> None:
        self._seconds += seconds
        self._latest.append(seconds)

    def _wait(self) -> None:
        for _, end in self._events:
            end.synchronize()
        self._collect()

    def _collect(self) -> None:
        done = [pair for pair in self._events if pair[1].query()]
        for begin, end in done:
            self._add(begin.elapsed_time(end) / 1000.0)
        self._events = [pair for pair in self._events if pair not in done]
