"""Who: which stage of the noise schedule a step belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Schedulers keep noise levels in float32, where a level meant to sit on a bound may lie just above it.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Stage:
    """A range of noise levels with one expert.

    Args:
        name: for reports and plots.
        low: exclusive lower bound of sigma; the upper bound is the `low` of the stage before. The
            last stage takes whatever is left, so its bound is never read.
        window: K, how many earlier features its expert reads, at least 1.
    """

    name: str
    low: float
    window: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.low):
            raise ValueError(f"stage {self.name!r}: low={self.low} must be a finite noise level")
        if self.window < 1:
            raise ValueError(f"stage {self.name!r}: window={self.window}; expected at least 1 feature")


def paper_stages(high: float = 0.9, middle: float = 0.5) -> tuple[Stage, ...]:
    """The paper's three stages, cut at the given noise levels.

    Args:
        high: sigma above which the high-noise expert (K = 4) serves.
        middle: sigma above which the middle expert (K = 8) serves; the paper takes 0.4 for Qwen-Image.

    Raises:
        ValueError: not 0 < middle < high < 1.
    """
    if not 0 < middle < high < 1:
        raise ValueError(f"high={high}, middle={middle}: expected 0 < middle < high < 1")
    return Stage("high", high, 4), Stage("middle", middle, 8), Stage("low", 0.0, 8)


PAPER_STAGES = paper_stages()
ONE_STAGE = (Stage("all", 0.0, 8),)


def stage_of(sigma: float, stages: Sequence[Stage]) -> int:
    """The index of the stage that serves noise level `sigma`.

    Args:
        sigma: noise level; levels within 1e-6 of a bound count as on it, hence below.
        stages: from high noise to low, as `check_stages` wants them.

    Raises:
        ValueError: `sigma` is NaN.
    """
    if math.isnan(sigma):
        raise ValueError("sigma is NaN: expected a noise level")
    above = (i for i, stage in enumerate(stages[:-1]) if sigma > stage.low + _ROUNDING)
    return next(above, len(stages) - 1)


def check_stages(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Validate a list of stages.

    Raises:
        ValueError: the list is empty or the bounds do not fall from stage to stage.
    """
    if not stages:
        raise ValueError("stages is empty: give at least one, e.g. lesa.routing.ONE_STAGE")
    bounds = [stage.low for stage in stages]
    if any(later >= earlier for earlier, later in pairwise(bounds)):
        raise ValueError(f"stages have lower bounds {bounds}: expected falling noise levels, highest first")
    return tuple(stages)
