"""`Driver` decides at each call between computing and forecasting; `Stats` counts what happened."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .clock import Call, Request
from .history import Ring

_LATEST = 256  # number of call times kept


@dataclass(frozen=True)
class Check:
    """The error of a forecast of a computed step.

    Args:
        context, step: the feature's context and step.
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
        """error / expected."""
        return self.error / self.expected if self.expected else math.inf


@dataclass
class Stats:
    """Counts and times since `lesa.enable`.

    Args:
        requests: requests started.
        computed: denoiser calls the plan computed.
        forecast: denoiser calls the plan forecast.
        refused: calls that the plan forecasts but that were computed, by reason: a needed feature is missing, or the
            result is not finite.
        operators: forecasts by operator and backend, e.g. "forecast_head: triton".
        checks: the errors of the latest request, measured at computed steps.
        out_of_distribution: requests with an error far above the expected one.
        guard: "warn" if errors are measured, else "off".
        told: the topics of the warnings so far.
        learning: how far a plan is learned from the requests that run; empty where none is.
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
    learning: str = ""
    _timers: dict[str, _Timer] = field(default_factory=lambda: {"computed": _Timer(), "forecast": _Timer()}, repr=False)

    @property
    def seconds_saved(self) -> float:
        """The forecast calls' number times the median time of the latest computed calls, less the forecasts' time.

        The median, because one call in which torch compiles takes as long as thousands of others. The forecasts' time
        includes compiling, so a short first run may save less than nothing.
        """
        computed, forecast = self._timers["computed"], self._timers["forecast"]
        return computed.median * forecast.calls - forecast.seconds if computed.calls else 0.0

    def start(self, kind: str, device: torch.device) -> Callable[[], None]:
        """Begin timing one call of `kind` ("computed" or "forecast") without waiting for the device.

        Returns:
            The function to call at its end. A call that raises counts no time.
        """
        return self._timers[kind].start(device)

    def __str__(self) -> str:
        refused = ", ".join(f"{count} ({reason})" for reason, count in self.refused.items()) or "none"
        operators = ", ".join(self.operators)
        return (
            f"requests {self.requests}, computed {self.computed}, forecast {self.forecast}"
            f"{f' ({operators})' if operators else ''}, refused {refused}, "
            f"{self.seconds_saved:.3f} s saved, {self._checked()}{f', {self.learning}' if self.learning else ''}"
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
    """A forecast that the hook may evaluate.

    Args:
        feature: computes and returns the forecast; the next step may overwrite its memory.
        ring: the operands of the fused operator, which forecasts with the denoiser's head; None without a plan.
        accept: whether the denoiser's output is valid; if not, the step is computed. None accepts all.
    """

    feature: Callable[[], torch.Tensor]
    ring: Ring | None = None
    accept: Callable[[torch.Tensor], bool] | None = None


class Driver(Protocol):
    """Decides what each denoiser call does; the hook asks it and counts forecasts in `stats`."""

    stats: Stats

    def begin(self, request: Request) -> None:
        """A new request starts, before its first denoiser call."""

    def forecast(self, call: Call) -> Forecast | None:
        """The forecast of this step, or None to have it computed."""

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        """A step was computed; its feature is None after `lose`."""

    def refuse(self, call: Call, reason: str) -> None:
        """The forecast of this step could not be used; the step is computed instead."""

    def lose(self, reason: str) -> None:
        """Features are no longer available in this request."""

    def observe(self, call: Call, output: torch.Tensor) -> None:
        """A step ended with this output, computed or forecast; copy it to keep it."""


class Relay:
    """A driver that hands every call to another driver, and shares its stats; subclasses change some methods."""

    def __init__(self, runner: Driver) -> None:
        self._runner = runner
        self.stats = runner.stats

    def begin(self, request: Request) -> None:
        self._runner.begin(request)

    def forecast(self, call: Call) -> Forecast | None:
        return self._runner.forecast(call)

    def keep(self, call: Call, feature: torch.Tensor | None) -> None:
        self._runner.keep(call, feature)

    def refuse(self, call: Call, reason: str) -> None:
        self._runner.refuse(call, reason)

    def lose(self, reason: str) -> None:
        self._runner.lose(reason)

    def observe(self, call: Call, output: torch.Tensor) -> None:
        self._runner.observe(call, output)


class _Timer:
    """Adds up the time of calls and keeps the latest; on CUDA with events, read on demand."""

    def __init__(self) -> None:
        self.calls = 0
        self._seconds = 0.0
        self._latest: deque[float] = deque(maxlen=_LATEST)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __getstate__(self) -> dict[str, Any]:  # a copy does not wait for events
        return {**self.__dict__, "_events": []}

    @property
    def seconds(self) -> float:
        self._wait()
        return self._seconds

    @property
    def median(self) -> float:
        """The median of the latest calls; 0 without any."""
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
