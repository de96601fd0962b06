"""When: the published schedules, and lists given by hand."""

import numpy as np
import pytest

from lesa.plans.schedule import check, paper, uniform

PUBLISHED = {
    5: (0, 1, 2, 3, 7, 12, 17, 22, 27, 32, 37, 42, 47),
    7: (0, 1, 2, 3, 9, 16, 23, 30, 37, 44),
    10: (0, 1, 2, 3, 12, 22, 32, 42),
}


@pytest.mark.parametrize("interval", PUBLISHED)
def test_fifty_steps_are_the_published_tables(interval):
    assert paper(50, interval) == PUBLISHED[interval] == uniform(50, interval)


@pytest.mark.parametrize(("num_steps", "interval", "count"), [(4, 3, 2), (4, 4, 1), (8, 2, 5), (8, 3, 4), (8, 4, 2)])
def test_few_step_models_compute_as_many_as_published(num_steps, interval, count):
    computed = paper(num_steps, interval)
    assert len(computed) == count
    assert check(computed, num_steps) == computed


@pytest.mark.parametrize("num_steps", [*range(1, 30), 50, 100])
def test_paper_schedule_is_valid_at_every_length_and_interval(num_steps):
    assert paper(num_steps, 1) == tuple(range(num_steps))
    for interval in range(1, num_steps + 1):
        computed = check(paper(num_steps, interval), num_steps)
        gaps = np.diff((*computed, num_steps))
        assert gaps.max() <= interval + (2 if num_steps >= 16 else 1)


def test_uniform_counts_from_its_origin():
    assert uniform(10, 4, warmup=1, origin=0) == (0, 4, 8)
    assert uniform(10, 4, warmup=2, origin=1) == (0, 1, 5, 9)
    assert uniform(12, 4, warmup=2, origin=5) == (0, 1, 5, 9)
    assert uniform(6, 6, warmup=6, origin=2) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 1), "num_steps=0"),
        ((50, 0), "interval=0"),
        ((50, 51), "interval=51"),
        ((50, 2.5), "interval=2.5"),
        ((50, "5"), "interval='5'"),
        ((3, 2), "warmup=4"),
        ((50, 5, 0), "warmup=0"),
        ((50, 5, 4, 50), "origin=50"),
        ((50, 5, 4, -1), "origin=-1"),
    ],
)
def test_uniform_names_the_bad_argument(arguments, named):
    with pytest.raises(ValueError, match=named):
        uniform(*arguments)


@pytest.mark.parametrize(("num_steps", "interval"), [(0, 1), (50, 0), (50, 51), (4, 5), (8, 1.5)])
def test_paper_refuses_impossible_intervals(num_steps, interval):
    with pytest.raises(ValueError, match="expected a whole number"):
        paper(num_steps, interval)


def test_check_takes_any_iterable_of_whole_numbers():
    computed = check(np.array([0, 3, 7]), 8)
    assert computed == (0, 3, 7)
    assert all(type(step) is int for step in computed)
    assert check((step for step in (0,)), 1) == (0,)


@pytest.mark.parametrize(
    ("computed", "complaint"),
    [
        ((), "expected step 0 first"),
        ((1, 2), "expected step 0 first"),
        ((0, 2, 2), "step 2 follows step 2"),
        ((0, 5, 3), "step 3 follows step 5"),
        ((0, 8), "8: expected a whole number from 0 to 7"),
        ((0, -1), "-1: expected"),
        ((0, 1.0), "1.0: expected"),
    ],
)
def test_check_names_the_bad_step(computed, complaint):
    with pytest.raises(ValueError, match=complaint):
        check(computed, 8)
