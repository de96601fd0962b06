"""Options of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from .measuring import Results


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, see the head of bench_ops.py."""
    group = parser.getgroup("lesa benchmarks")
    group.addoption("--results", type=Path, help="CSV file to append a row of every benchmark to")
    group.addoption("--commit", help="of the code that runs, for --results; git's if left out")
    group.addoption("--quick", action="store_true", help="tiny shapes and few rounds: does the code run?")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    """Takes the rows."""
    return Results(request.config.getoption("--results"), request.config.getoption("--commit"))
