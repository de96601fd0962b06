"""Calibration: one gain on alpha for every stage, chosen by running accelerated requests. Not part of the paper.

Both training stages minimise the error of each feature. The picture cares about the sum of all errors after the model's
head: on emoji-flux the alphas that are best for features overshoot at low noise. The gains mend that, and a plan
carries them in its rows at no cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..plans.schedule import Stage

_RUNG = 0.15


def calibrate(stages: Sequence[Stage], error: Callable[[tuple[float, ...]], float]) -> tuple[float, ...]:
    """Climb from gains of one, stage by stage from low noise to high, as long as the measured error falls.

    Args:
        stages: of the predictor.
        error: runs requests with the given gain for each stage and returns the error of the results; lower is better.

    Returns:
        A gain for each stage; never worse by `error` than gains of one.

    Raises:
        ValueError: the error of gains of one is not finite.
    """
    gains = [1.0] * len(stages)
    best = error(tuple(gains))
    if not math.isfinite(best):
        raise ValueError(f"the trained plan's requests end in an error of {best}: its weights or the model overflow")
    for i in reversed(range(len(stages))):
        for direction in (-1, 1):
            climbed = False
            while True:
                trial = list(gains)
                trial[i] = round(trial[i] + direction * _RUNG, 6)
                if not 0 < trial[i] <= 2 or not (now := error(tuple(trial))) < best:  # NaN is no improvement
                    break
                gains, best, climbed = trial, now, True
            if climbed:
                break
    return tuple(gains)
