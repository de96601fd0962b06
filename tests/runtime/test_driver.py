"""Stats: counts, and the time saved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

import lesa
from lesa.runtime.driver import Stats

CPU = torch.device("cpu")


def run(stats: Stats, clock: Iterator[float], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stats.start(kind, CPU)()


def test_seconds_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    assert stats.seconds_saved == 0
    ticks = iter([0.0, 2.0, 10.0, 14.0, 20.0, 20.5, 30.0, 30.25])
    for kind in ("computed", "computed", "forecast", "forecast"):
        run(stats, ticks, kind, monkeypatch)
    # two calls at the median of 2 s and 4 s, less the 0.75 s they took
    assert stats.seconds_saved == 2 * 3.0 - 0.75


def test_a_call_that_compiles_does_not_count_as_a_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    ticks = iter([0.0, 40.0, 50.0, 52.0, 60.0, 62.0, 70.0, 70.5])
    for kind in ("computed", "computed", "computed", "forecast"):
        run(stats, ticks, kind, monkeypatch)
    # calls of 40 s, 2 s and 2 s: their mean would be 14.7 s
    assert stats.seconds_saved == 2.0 - 0.5


def test_compiling_a_forecast_counts_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    ticks = iter([0.0, 2.0, 10.0, 19.0, 20.0, 20.5, 30.0, 30.25])
    for kind in ("computed", "forecast", "forecast", "forecast"):
        run(stats, ticks, kind, monkeypatch)
    # forecasts of 9 s, 0.5 s and 0.25 s took longer than three computed calls; three at their median would not have
    assert stats.seconds_saved == 3 * 2.0 - 9.75
    assert "-3.750 s saved" in str(stats)


def test_the_latest_256_calls_count(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    for seconds, calls in ((8.0, 1000), (2.0, 256)):
        for _ in range(calls):
            run(stats, iter([0.0, seconds]), "computed", monkeypatch)
    run(stats, iter([0.0, 0.5]), "forecast", monkeypatch)
    assert stats.seconds_saved == 2.0 - 0.5
    timer = stats._timers["computed"]
    assert (timer.calls, len(timer._latest)) == (1256, 256)
    assert timer.seconds == 1000 * 8.0 + 256 * 2.0


def test_forecasts_alone_save_nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    run(stats, itertools.count(0.0), "forecast", monkeypatch)
    assert stats.seconds_saved == 0


def test_a_call_that_never_ends_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    ticks = iter([0.0, 2.0, 4.0, 4.5, 100.0, 200.0])
    run(stats, ticks, "computed", monkeypatch)
    run(stats, ticks, "forecast", monkeypatch)
    stats.start("computed", CPU)
    assert stats.seconds_saved == 2.0 - 0.5


def test_two_stats_share_nothing() -> None:
    first, second = Stats(), Stats()
    first.refused["reason"] += 1
    first.start("computed", CPU)()
    assert not second.refused
    assert second._timers["computed"].calls == 0


def test_in_words() -> None:
    stats = Stats(requests=2, computed=10, forecast=6)
    assert str(stats) == "requests 2, computed 10, forecast 6, refused none, 0.000 s saved, guard off"
    stats.refused["no row"] += 3
    assert "refused 3 (no row)," in str(stats)


@pytest.mark.gpu
def test_cuda_time_is_read_only_when_asked() -> None:
    stats, device = Stats(), torch.device("cuda")
    for _ in range(300):
        stop = stats.start("computed", device)
        torch.ones(10, device=device)
        stop()
    stats.start("forecast", device)()
    assert stats._timers["computed"].calls == 300
    assert 0 < stats._timers["computed"].median <= stats._timers["computed"].seconds < 60
    assert len(stats._timers["computed"]._latest) == 256


def test_stats_of_something_not_enabled() -> None:
    class Denoiser(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return hidden_states

    with pytest.raises(ValueError, match="not enabled on this Denoiser"):
        lesa.stats(Denoiser())
