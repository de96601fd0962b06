"""Stats: what an enabled denoiser did."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

_LATEST = 256  # calls whose times are kept


@dataclass
class GuardStats:
    """What the guard saw and did.

    Args:
        checks: forecasts compared with the truth.
        switches: requests that left their plan; the rest of them was computed.
        last: of the last of them, the step that was checked and how many times its expected error the forecast had.
        retraced: denoiser calls of steps that had run, computed over again for requests that left.
        alert: whether the next request is watched more closely, because one left its plan.
        strange: requests watched more closely because their prompt or the weights are unlike those of fitting.
        replaced: forecasts that were not finite; a computed step took their place.
        dropped: computed features that were found not to be finite; no forecast reads them (on a GPU after the next
            computed step, and of those that are checked).
        errors: the largest finite relative error of each check, for each context.

    Of a request that stops before its last step a GPU's last checks are not counted.
    """

    checks: int = 0
    switches: int = 0
    last: tuple[int, float] | None = None
    retraced: int = 0
    alert: bool = False
    strange: int = 0
    replaced: int = 0
    dropped: int = 0
    errors: dict[str, dict[int, float]] = field(default_factory=dict)

    def note(self, context: str, step: int, error: float) -> None:
        """Count a check."""
        self.checks += 1
        known = self.errors.setdefault(context, {})
        if math.isfinite(error):
            known[step] = max(known.get(step, 0.0), error)

    def __str__(self) -> str:
        where = f" (last at step {self.last[0]}, {self.last[1]:.2g} x the expected error)" if self.last else ""
        return (
            f"guard: checks {self.checks}, switches {self.switches}{where}, retraced {self.retraced} calls, "
            f"requests unlike the fitted {self.strange}, not finite: forecasts {self.replaced}, features {self.dropped}"
        )


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
        guard: what the guard saw and did; None where it is off.
    """

    requests: int = 0
    computed: int = 0
    forecast: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    guard: GuardStats | None = None
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
        again = 0 if self.guard is None else self.guard.retraced  # calls that a full request would not have made
        return computed.median * (forecast.calls - again) - forecast.seconds

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
            f"{self.seconds_saved:.3f} s saved, {'guard: off' if self.guard is None else self.guard}"
        )


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
