"""What all tests share."""

from __future__ import annotations

import os

import interpret  # noqa: F401 - first: triton must not be imported before it
import pytest
import torch

# The models are tiny: a second thread would cost more than it brings, above all beside other processes.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def seed() -> int:
    """The seed of a test's random numbers, printed; set LESA_TEST_SEED to try another."""
    value = int(os.environ.get("LESA_TEST_SEED", "0"))
    print(f"seed {value}")
    return value
