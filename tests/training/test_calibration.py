"""The climb over gains, on errors known in closed form."""

import pytest

from lesa.plans.schedule import ONE_STAGE, PAPER_STAGES
from lesa.training.train import calibrate


def valley(*lowest):
    """An error whose lowest point is known, and the gains it was asked for."""
    asked = []

    def error(gains):
        asked.append(gains)
        return sum((gain - low) ** 2 for gain, low in zip(gains, lowest, strict=True))

    return error, asked


@pytest.mark.parametrize("lowest", [(1.0, 1.0, 1.0), (1.0, 1.15, 0.7), (0.4, 1.6, 1.0)])
def test_finds_the_lowest_point(lowest):
    error, _ = valley(*lowest)
    assert calibrate(PAPER_STAGES, error) == pytest.approx(lowest)


def test_never_worse_than_no_gains_and_asks_for_none_twice():
    error, asked = valley(0.62)
    gains = calibrate(ONE_STAGE, error)
    assert error(gains) <= error((1.0,))
    assert len(set(asked[:-2])) == len(asked[:-2])


def test_stays_within_its_range():
    assert calibrate(ONE_STAGE, valley(9.0)[0]) == (1.9,)
    assert calibrate(ONE_STAGE, valley(-9.0)[0]) == (0.1,)


def test_nan_is_no_improvement():
    def error(gains):
        return 0.0 if gains == (1.0,) else float("nan")

    assert calibrate(ONE_STAGE, error) == (1.0,)
    with pytest.raises(ValueError, match="error of nan"):
        calibrate(ONE_STAGE, lambda _gains: float("nan"))


def test_low_noise_is_settled_first():
    error, asked = valley(0.7, 1.0, 0.7)
    calibrate(PAPER_STAGES, error)
    assert asked[1] == (1.0, 1.0, 0.85)
