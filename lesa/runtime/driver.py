"""What decides, at each denoiser call, between computing and forecasting: the `Driver`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from .clock import Call, Request
from .history import Ring
from .retrace import Retrace
from .stats import Stats


class LesaWarning(UserWarning):
    """Something keeps lesa from its full speed or fidelity."""


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

    def forecast(self, call: Call) -> Forecast | Retrace | None:
        """The forecast of this step, or None to have it computed, or what must be computed over again before it is."""

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

    def forecast(self, call: Call) -> Forecast | Retrace | None:
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
