"""History: it holds what a plan's slots say, in memory of its own, and forgets on request."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from lesa.ops import reference
from lesa.plans.plan import Plan
from lesa.plans.rows import Row
from lesa.runtime.history import History

# Steps 0, 1 and 3 are read later, 2 and 4 are not; 3 takes the slot of 0, which step 2 reads last.
ROWS = {2: Row((0, 1), (-1.0, 2.0), 0.5), 3: Row((1,), (1.0,)), 4: Row((1, 3), (0.5, 0.5)), 5: Row((3,), (1.0,))}
PLAN = Plan((0, 1), tuple(1 - i / 6 for i in range(7)), {"*": ROWS})


def feature(step: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (2, 3), generator=torch.Generator().manual_seed(step)).to(dtype)


def forecast(history: History, step: int) -> torch.Tensor:
    return history.select(step).fill(PLAN.slots[step])


def filled() -> History:
    history = History(PLAN, "*")
    history.store(0, feature(0))
    history.store(1, feature(1))
    return history


def test_the_plan_is_as_the_tests_take_it() -> None:
    assert PLAN.slots == (0, 1, -1, 0, -1, -1)


def test_forecast_from_stored_features() -> None:
    expected = reference.forecast(torch.stack((feature(0), feature(1))).double(), ROWS[2].weights, ROWS[2].bias)
    torch.testing.assert_close(forecast(filled(), 2).double(), expected, rtol=0, atol=1e-6)


def test_forecasts_that_nothing_reads_leave_the_ring_alone() -> None:
    history = filled()
    forecast(history, 2)
    assert history.ring is not None
    assert torch.equal(history.ring.history[0], feature(0))
    assert torch.equal(history.ring.history[1], feature(1))


def test_a_forecast_that_is_read_later_is_kept() -> None:
    history = filled()
    forecast(history, 2)
    assert torch.equal(forecast(history, 3), feature(1))
    assert history.holds(ROWS[4])
    torch.testing.assert_close(forecast(history, 4), feature(1))


def test_nothing_is_allocated_after_the_first_forecasts() -> None:
    history = filled()
    first = [forecast(history, step).data_ptr() for step in (2, 3, 4, 5)]
    history.clear()
    history.store(0, feature(0))
    history.store(1, feature(1))
    assert [forecast(history, step).data_ptr() for step in (2, 3, 4, 5)] == first


def test_holds_only_what_was_stored() -> None:
    history = History(PLAN, "*")
    assert not history.holds(ROWS[3])
    history.store(0, feature(0))
    assert not history.holds(ROWS[2])
    history.store(1, feature(1))
    assert history.holds(ROWS[2])


def test_a_slot_taken_again_gives_up_the_older_step() -> None:
    history = filled()
    history.store(3, feature(3))
    assert history.holds(ROWS[4])
    assert not history.holds(ROWS[2])
    assert torch.equal(forecast(history, 5), feature(3))
    torch.testing.assert_close(forecast(history, 4), (feature(1) + feature(3)) / 2)


def test_steps_without_a_slot_are_not_kept() -> None:
    history = filled()
    history.store(2, feature(9))
    assert history.holds(ROWS[2])
    assert torch.equal(forecast(history, 3), feature(1))
    computed = Plan((0, 1), (1.0, 0.5, 0.0))
    History(computed, "*").store(0, feature(0))


def test_clear_forgets_and_keeps_the_memory() -> None:
    history = filled()
    assert history.ring is not None
    before = history.ring.history.data_ptr()
    history.clear()
    assert not history.holds(ROWS[2])
    history.store(0, feature(5))
    assert history.ring.history.data_ptr() == before
    assert not history.holds(ROWS[2])


def test_features_are_copies() -> None:
    history = History(PLAN, "*")
    given = feature(1)
    history.store(1, given)
    given.zero_()
    assert torch.equal(forecast(history, 3), feature(1))


def test_no_graph_is_kept() -> None:
    history = History(PLAN, "*")
    history.store(1, feature(1).requires_grad_() * 2)
    assert not forecast(history, 3).requires_grad


@pytest.mark.parametrize(
    "changed",
    [feature(1, 3, 3), feature(1, 6), feature(1, dtype=torch.float64), feature(1, dtype=torch.bfloat16)],
    ids=["shape", "axes", "float64", "bfloat16"],
)
def test_another_kind_of_feature_starts_a_new_buffer(changed: torch.Tensor) -> None:
    history = filled()
    history.store(1, changed)
    assert not history.holds(ROWS[2])
    actual = forecast(history, 3)
    assert actual.dtype == changed.dtype
    assert torch.equal(actual, changed)


def test_features_of_any_layout() -> None:
    history = History(PLAN, "*")
    history.store(1, feature(0, 4, 6).t())
    assert torch.equal(forecast(history, 3), feature(0, 4, 6).t())
    history.store(1, feature(1, 6, 8)[:, ::2])
    assert torch.equal(forecast(history, 3), feature(1, 6, 8)[:, ::2])


# The check of step 4 reads steps 1 and 3, of which one gives its slot up to step 4.
CHECKED = replace(
    PLAN, computed=(0, 1, 4), rows={"*": {2: ROWS[2], 3: ROWS[3], 5: Row((4,), (1.0,))}}, checks={"*": {4: ROWS[4]}}
)


def test_a_check_is_asked_for_as_its_feature_is_stored() -> None:
    history, slot = History(CHECKED, "*"), CHECKED.slots[4]
    assert slot in (CHECKED.slots[1], CHECKED.slots[3])
    for again in range(3):
        history.clear()
        for step in (0, 1):
            history.store(step, feature(step))
        forecast(history, 3)
        truth = feature(4 + again).requires_grad_()
        miss = (feature(1) + feature(1)) / 2 - truth.detach()
        answer = history.compare(4, truth)
        assert answer is not None and answer.is_there()
        found = answer.read()
        torch.testing.assert_close(found, [float(x.double().square().sum()) for x in (miss, truth.detach())])
        assert history.ring is not None and torch.equal(history.ring.history[slot], truth)
        assert history.holds(CHECKED.rows["*"][5])


def test_a_copy_writes_to_its_own_memory() -> None:
    history = History(CHECKED, "*")
    for step in (0, 1):
        history.store(step, feature(step))
    forecast(history, 3)
    history.compare(4, feature(4))
    twin = copy.deepcopy(history)
    assert history.ring is not None and twin.ring is not None
    before = history.ring.history.clone()
    twin.ring.history.mul_(2.0)
    twin.select(3).fill(CHECKED.slots[3])
    assert torch.equal(twin.ring.history[CHECKED.slots[3]], 2 * feature(1))
    twin.compare(4, feature(5))
    assert torch.equal(history.ring.history, before)


def test_a_ring_that_moves_writes_to_where_it_is() -> None:
    history = filled()
    forecast(history, 3)
    assert history.ring is not None
    history.ring.double()  # as moving to another device does, it makes new buffers
    found = history.select(3).fill(PLAN.slots[3])
    assert (
        torch.equal(found, feature(1).double()) and found.data_ptr() == history.ring.history[PLAN.slots[3]].data_ptr()
    )


def test_a_check_of_what_is_not_held_is_not_made() -> None:
    history = History(CHECKED, "*")
    history.store(0, feature(0))
    assert history.compare(4, feature(4)) is None
    assert history.ring is not None and torch.equal(history.ring.history[CHECKED.slots[4]], feature(4))
