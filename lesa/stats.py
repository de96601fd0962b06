"""Stats: what an enabled denoiser did."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Stats:
    """Counts and times since `lesa.enable`.

    Args:
        requests: requests started.
        computed: denoiser calls the plan computed.
        forecast: denoiser calls the plan forecast.
        refused: calls that should have been forecast but were computed, by reason.
        operators: forecasts by the operator and backend that made them, e.g. "forecast_head: triton".
    """

    requests: int = 0
    computed: int = 0
    forecast: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    _timers: dict[str, _Timer] = field(default_factory=lambda: {"computed": _Timer(), "forecast": _Timer()}, repr=False)

    @property
    def seconds_saved(self) -> float:
        """What the forecast calls would have taken at the mean of the computed ones, less what they took."""
        computed, forecast = self._timers["computed"], self._timers["forecast"]
        if not computed.calls:
            return 0.0
        return computed.seconds / computed.calls * forecast.calls - forecast.seconds

    def start(self, kind: str, device: torch.device) -> Callable[[], None]:
        """Begin timing one call of `kind` ("computed" or "forecast") without waiting for the device.

        Returns:
            What to call at its end. A call that raises has no end, and no time of its own.
        """
        return self._timers[kind].start(device)

    def __str__(self) -> str:
        refused = ", ".join(f"{count} {reason}" for reason, count in self.refused.items()) or "none"
        operators = ", ".join(self.operators)
        return (
            f"requests {self.requests}, computed {self.computed}, forecast {self.forecast}"
            f"{f' ({operators})' if operators else ''}, refused {refused}, "
            f"{self.seconds_saved:.3f} s saved"
        )


class _Timer:
    """Adds up the time of calls; on a CUDA device by events that are read only when somebody asks."""

    def __init__(self) -> None:
        self.calls = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        for _, end in self._events:
            end.synchronize()
        self._collect()
        return self._seconds

    def start(self, device: torch.device) -> Callable[[], None]:
        if device.type != "cuda":
            begin = time.perf_counter()

            def stop() -> None:
                self.calls += 1
                self._seconds += time.perf_counter() - begin

            return stop
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()

        def stop_event() -> None:
            self.calls += 1
            events[1].record()
            self._events.append(events)
            if len(self._events) > 256:
                self._collect()

        return stop_event

    def _collect(self) -> None:
        done = [pair for pair in self._events if pair[1].query()]
        self._seconds += sum(begin.elapsed_time(end) for begin, end in done) / 1000.0
        self._events = [pair for pair in self._events if pair not in done]
