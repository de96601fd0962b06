"""History: it holds what a plan's slots say, in memory of its own, and forgets on request."""

from __future__ import annotations

import pytest
import torch

from lesa import reference
from lesa.history import History
from lesa.plan import Row

SLOTS = (0, 1, -1, 0)


def feature(step: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (2, 3), generator=torch.Generator().manual_seed(step)).to(dtype)


def filled() -> History:
    history = History(SLOTS, 2)
    history.store(0, feature(0))
    history.store(1, feature(1))
    return history


def test_forecast_from_stored_features() -> None:
    row = Row((0, 1), (-1.0, 2.0), 0.5)
    expected = reference.forecast(torch.stack((feature(0), feature(1))).double(), row.weights, row.bias)
    torch.testing.assert_close(filled().forecast(row).double(), expected, rtol=0, atol=1e-6)


def test_holds_only_what_was_stored() -> None:
    history = History(SLOTS, 2)
    assert not history.holds(Row((0,), (1.0,)))
    history.store(0, feature(0))
    assert history.holds(Row((0,), (1.0,)))
    assert not history.holds(Row((0, 1), (1.0, 1.0)))
    history.store(1, feature(1))
    assert history.holds(Row((0, 1), (1.0, 1.0)))


def test_a_slot_taken_again_gives_up_the_older_step() -> None:
    history = filled()
    history.store(3, feature(3))
    assert history.holds(Row((1, 3), (1.0, 1.0)))
    assert not history.holds(Row((0,), (1.0,)))
    assert torch.equal(history.forecast(Row((3,), (1.0,))), feature(3))
    assert torch.equal(history.forecast(Row((1,), (1.0,))), feature(1))


def test_steps_without_a_slot_are_not_kept() -> None:
    history = filled()
    history.store(2, feature(2))
    assert torch.equal(history.forecast(Row((0,), (1.0,))), feature(0))
    assert torch.equal(history.forecast(Row((1,), (1.0,))), feature(1))
    History((-1, -1), 0).store(0, feature(0))


def test_clear_forgets_and_keeps_the_memory() -> None:
    history = filled()
    assert history._buffer is not None
    before = history._buffer.data_ptr()
    history.clear()
    assert not history.holds(Row((0,), (1.0,)))
    assert not history.holds(Row((1,), (1.0,)))
    history.store(0, feature(5))
    assert history._buffer.data_ptr() == before
    assert not history.holds(Row((1,), (1.0,)))


def test_features_are_copies() -> None:
    history = History(SLOTS, 2)
    given = feature(0)
    history.store(0, given)
    given.zero_()
    result = history.forecast(Row((0,), (1.0,)))
    assert torch.equal(result, feature(0))
    result.zero_()
    assert torch.equal(history.forecast(Row((0,), (1.0,))), feature(0))


def test_no_graph_is_kept() -> None:
    history = History(SLOTS, 2)
    history.store(0, feature(0).requires_grad_() * 2)
    assert not history.forecast(Row((0,), (1.0,))).requires_grad


@pytest.mark.parametrize(
    "changed",
    [feature(1, 3, 3), feature(1, 6), feature(1, dtype=torch.float64), feature(1, dtype=torch.bfloat16)],
    ids=["shape", "axes", "float64", "bfloat16"],
)
def test_another_kind_of_feature_starts_a_new_buffer(changed: torch.Tensor) -> None:
    history = filled()
    history.store(1, changed)
    assert not history.holds(Row((0,), (1.0,)))
    actual = history.forecast(Row((1,), (1.0,)))
    assert actual.dtype == changed.dtype
    assert torch.equal(actual, changed)


def test_features_of_any_layout() -> None:
    history = History(SLOTS, 2)
    history.store(0, feature(0, 4, 6).t())
    assert torch.equal(history.forecast(Row((0,), (1.0,))), feature(0, 4, 6).t())
    history.store(1, feature(1, 6, 8)[:, ::2])
    assert torch.equal(history.forecast(Row((1,), (1.0,))), feature(1, 6, 8)[:, ::2])
