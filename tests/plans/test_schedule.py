"""Schedules: the published ones, lists given by hand, and the stage of a noise level."""

import numpy as np
import pytest

from lesa.plans.schedule import (
    DPCACHE_40,
    ONE_STAGE,
    PAPER_STAGES,
    Stage,
    check,
    check_stages,
    fora,
    noise_levels,
    paper,
    paper_stages,
    published,
    spaced,
    spectrum,
    stage_of,
    taylorseer,
    uniform,
)

PUBLISHED = {
    5: (0, 1, 2, 3, 7, 12, 17, 22, 27, 32, 37, 42, 47),
    7: (0, 1, 2, 3, 9, 16, 23, 30, 37, 44),
    10: (0, 1, 2, 3, 12, 22, 32, 42),
}


@pytest.mark.parametrize("interval", PUBLISHED)
def test_fifty_steps_are_the_published_tables(interval):
    assert paper(50, interval) == PUBLISHED[interval] == uniform(50, interval)


def test_few_step_models_compute_as_many_as_published():
    for num_steps, interval, count in [(4, 3, 2), (4, 4, 1), (8, 2, 5), (8, 3, 4), (8, 4, 2)]:
        computed = paper(num_steps, interval)
        assert len(computed) == count
        assert check(computed, num_steps) == computed


def test_paper_schedule_is_valid_at_every_length_and_interval():
    for num_steps in [*range(1, 30), 50, 100]:
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


def test_uniform_names_the_bad_argument():
    for arguments, named in [
        ((0, 1), "num_steps=0"),
        ((50, 0), "interval=0"),
        ((50, 51), "interval=51"),
        ((50, 2.5), "interval=2.5"),
        ((50, "5"), "interval='5'"),
        ((3, 2), "warmup=4"),
        ((50, 5, 0), "warmup=0"),
        ((50, 5, 4, 50), "origin=50"),
        ((50, 5, 4, -1), "origin=-1"),
    ]:
        with pytest.raises(ValueError, match=named):
            uniform(*arguments)


def test_paper_refuses_impossible_intervals():
    for num_steps, interval in [(0, 1), (50, 0), (50, 51), (4, 5), (8, 1.5)]:
        with pytest.raises(ValueError, match="expected a whole number"):
            paper(num_steps, interval)


def counted(num_steps, interval, warmup):
    """TaylorSeer's released counter: full at the first steps and after interval - 1 forecasts."""
    steps, counter = [], 0
    for t in range(num_steps):
        if t < warmup or counter == interval - 1:
            steps.append(t)
            counter = 0
        else:
            counter += 1
    return tuple(steps)


def windowed(num_steps, growth, window, warmup):
    """Spectrum's released counter: full where the steps since the last full one are a multiple of the window."""
    steps, cached = [], 0
    for t in range(num_steps):
        actual = t < warmup
        if not actual and (cached + 1) % int(window) == 0:
            actual, window = True, round(window + growth, 3)
        cached = 0 if actual else cached + 1
        steps += [t] * actual
    return tuple(steps)


@pytest.mark.parametrize("num_steps", [3, 20, 50])
def test_schedules_are_those_of_the_released_counters(num_steps):
    for interval in range(1, num_steps + 1):
        # FORA's steps count down: T - 1 and the multiples of N are computed.
        down = [t for t in range(num_steps) if t == 0 or (num_steps - 1 - t) % interval == 0]
        assert fora(num_steps, interval) == tuple(down)
        for warmup in (1, 2, 3):
            assert taylorseer(num_steps, interval, warmup) == counted(num_steps, interval, warmup)
    for growth in (0.0, 0.1, 0.75, 3.0):
        for window, warmup in ((1.0, 1), (2.0, 5), (2.5, 3)):
            assert spectrum(num_steps, growth, window, warmup) == windowed(num_steps, growth, window, warmup)


def test_published_counts_and_lists():
    assert taylorseer(50, 6) == (0, 1, 2, 8, 14, 20, 26, 32, 38, 44)
    assert fora(50, 6) == (0, 1, 7, 13, 19, 25, 31, 37, 43, 49)
    assert (len(spectrum(50)), len(spectrum(50, 3.0))) == (14, 10)
    assert spectrum(50, 3.0) == (0, 1, 2, 3, 4, 6, 11, 19, 30, 44)
    for budget, computed in DPCACHE_40.items():
        assert len(computed) == budget and check(computed, 40)[:3] == (0, 1, 2)
        assert np.diff((*computed, 40)).max() <= 8


def test_published_schedules_name_the_bad_argument():
    for call, named in [
        (lambda: fora(0, 1), "num_steps=0"),
        (lambda: fora(50, 51), "interval=51"),
        (lambda: taylorseer(50, 0), "interval=0"),
        (lambda: taylorseer(50, 5, 0), "warmup=0"),
        (lambda: taylorseer(2, 1), "warmup=3"),
        (lambda: spectrum(50, -1.0), "growth=-1.0"),
        (lambda: spectrum(50, window=0.5), "window=0.5"),
        (lambda: spectrum(50, warmup=0), "warmup=0"),
    ]:
        with pytest.raises(ValueError, match=named):
            call()


def test_spaced_and_published_schedules():
    assert spaced(50, 5) == (0, 10, 20, 30, 40)
    assert spaced(6, 6, 2.0) == (0, 1, 2, 3, 4, 5)
    assert published(50, 10)[0] == (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)
    assert published(50, 31) == [spaced(50, 31)]
    for budget in range(1, 51):
        for power in (1.0, 1.5):
            steps = spaced(50, budget, power)
            assert len(steps) == budget and check(steps, 50) == steps


def test_check_takes_any_iterable_of_whole_numbers():
    computed = check(np.array([0, 3, 7]), 8)
    assert computed == (0, 3, 7)
    assert all(type(step) is int for step in computed)
    assert check((step for step in (0,)), 1) == (0,)


def test_check_names_the_bad_step():
    for computed, complaint in [
        ((), "expected step 0 first"),
        ((1, 2), "expected step 0 first"),
        ((0, 2, 2), "step 2 follows step 2"),
        ((0, 5, 3), "step 3 follows step 5"),
        ((0, 8), "8: expected a whole number from 0 to 7"),
        ((0, -1), "-1: expected"),
        ((0, 1.0), "1.0: expected"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            check(computed, 8)


def test_paper_stages_are_the_papers():
    assert [(stage.name, stage.low, stage.window) for stage in PAPER_STAGES[:2]] == [
        ("high", 0.9, 4),
        ("middle", 0.5, 8),
    ]
    assert [stage.window for stage in PAPER_STAGES] == [4, 8, 8]
    assert [stage.window for stage in ONE_STAGE] == [8]


def test_bounds_belong_to_the_stage_below():
    for sigma, index in [(1.0, 0), (0.901, 0), (0.9, 1), (0.7, 1), (0.501, 1), (0.5, 2), (0.1, 2), (0.0, 2)]:
        assert stage_of(sigma, PAPER_STAGES) == index
        assert stage_of(sigma, ONE_STAGE) == 0


def test_cuts_can_be_moved():
    stages = paper_stages(0.8, 0.4)
    assert [stage_of(sigma, stages) for sigma in (0.85, 0.8, 0.45, 0.4)] == [0, 1, 1, 2]


def test_float32_levels_on_a_bound_stay_below_it():
    rounded = float(np.float32(0.4))
    assert rounded > 0.4
    assert stage_of(rounded, paper_stages(0.9, 0.4)) == 2


def test_last_stage_takes_every_other_level():
    assert stage_of(-0.1, PAPER_STAGES) == 2
    assert stage_of(0.01, (Stage("high", 0.5, 2), Stage("low", 0.3, 2))) == 1


def test_impossible_cuts_are_refused():
    for cuts in [(0.5, 0.9), (0.5, 0.5), (1.0, 0.5), (0.9, 0.0), (float("nan"), 0.5)]:
        with pytest.raises(ValueError, match="expected 0 < middle < high < 1"):
            paper_stages(*cuts)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="window=0"):
        Stage("high", 0.9, 0)
    with pytest.raises(ValueError, match="low=-inf"):
        Stage("low", float("-inf"), 8)
    with pytest.raises(ValueError, match="NaN"):
        stage_of(float("nan"), PAPER_STAGES)
    with pytest.raises(ValueError, match="stages is empty"):
        check_stages(())
    with pytest.raises(ValueError, match=r"\[0.5, 0.9\]: expected falling"):
        check_stages((Stage("a", 0.5, 4), Stage("b", 0.9, 4)))


def test_noise_levels_fall_to_zero():
    assert noise_levels(np.array([14.6, 2, 2, 0.5, 0])) == (14.6, 2.0, 2.0, 0.5, 0.0)  # Heun's method takes one twice
    assert noise_levels([1, 0.5, 0], 2) == (1.0, 0.5, 0.0)


def test_what_are_no_noise_levels():
    for sigmas in [
        (),
        (0.0,),
        (0.0, 0.0),
        (1.0, 0.5),
        (0.0, 0.5, 1.0),
        (1.0, float("nan"), 0.0),
        (float("inf"), 0.0),
        "ab",
        5,
    ]:
        with pytest.raises(ValueError, match="sigmas="):
            noise_levels(sigmas)


def test_noise_levels_of_another_number_of_steps():
    with pytest.raises(KeyError, match="sigmas"):
        noise_levels((1.0, 0.5, 0.0), 3, KeyError)
