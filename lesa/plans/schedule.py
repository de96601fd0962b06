"""When: which steps of a request are computed, and to which stage of the noise levels a step belongs."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, SupportsIndex

# Schedulers keep noise levels in float32, where a level meant to sit on a bound may lie just above it.
_ROUNDING = 1e-6
_SHORT = 16  # requests below this many steps are the distilled, few-step models'

# DPCache's schedules of 40 steps by their budget, as SGLang found them for Qwen-Image-2.1 (in the repository
# fractalyze/frontier-benchmark). Their rule is "taylor-1": order 1, from the last two computed steps.
# `lesa.planner.search.dpcache` finds such schedules for other models.
DPCACHE_40 = {
    12: (0, 1, 2, 4, 6, 9, 13, 18, 23, 29, 34, 38),
    20: (0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 17, 20, 23, 27, 31, 34, 36, 38, 39),
}


def uniform(num_steps: int, interval: int, warmup: int = 4, origin: int = 2) -> tuple[int, ...]:
    """Compute the first steps, then every `interval`-th, counted from `origin`.

    Args:
        num_steps: T, steps of a request, at least 1.
        interval: distance between computed steps, 1 (all steps) to `num_steps`.
        warmup: how many steps at the start are all computed, 1 to `num_steps`.
        origin: the step the count starts at, itself computed, 0 to `num_steps - 1`.

    Returns:
        The computed steps, ascending, step 0 among them.

    Raises:
        ValueError: an argument is no whole number or outside its range.
    """
    num_steps = whole("num_steps", num_steps, 1)
    interval = whole("interval", interval, 1, num_steps)
    warmup = whole("warmup", warmup, 1, num_steps)
    origin = whole("origin", origin, 0, num_steps - 1)
    return tuple(sorted({*range(warmup), *range(origin, num_steps, interval)}))


def paper(num_steps: int, interval: int) -> tuple[int, ...]:
    """The paper's schedule for a request of `num_steps` at interval N.

    From 16 steps on: steps 0 to 3, then every N-th counted from step 2, as in the released code
    (T = 50: 13, 10 and 8 computed steps at N = 5, 7 and 10). Of the few-step models only the counts
    are published (FLUX.1-schnell, T = 4: 2 and 1 at N = 3 and 4; Qwen-Image-Lightning, T = 8: 5, 4
    and 2 at N = 2, 3 and 4); the positions here are our reading of them: steps 0 and 1, then every
    N-th counted from step 1, or, where N is at least half of T, every N-th counted from step 0.

    Args:
        num_steps: T, steps of a request, at least 1.
        interval: N, distance between computed steps, 1 (all steps) to `num_steps`.

    Returns:
        The computed steps, ascending, step 0 among them.

    Raises:
        ValueError: an argument is no whole number or outside its range.
    """
    num_steps = whole("num_steps", num_steps, 1)
    interval = whole("interval", interval, 1, num_steps)
    if num_steps >= _SHORT:
        return uniform(num_steps, interval, warmup=4, origin=2)
    if 2 * interval >= num_steps:
        return uniform(num_steps, interval, warmup=1, origin=0)
    return uniform(num_steps, interval, warmup=2, origin=1)


def fora(num_steps: int, interval: int) -> tuple[int, ...]:
    """FORA's schedule (arXiv 2407.01425): step 0, and every N-th counted back from the last step.

    As in its code for DiT, where steps count down to 0. Others' versions count from step 0 instead, which is
    `uniform(num_steps, interval, warmup=1, origin=0)`. It goes with "reuse"; published N: 3.

    Args:
        num_steps, interval: see `paper`.

    Returns:
        The computed steps, ascending, step 0 and the last step among them.

    Raises:
        ValueError: an argument is no whole number or outside its range.
    """
    num_steps = whole("num_steps", num_steps, 1)
    interval = whole("interval", interval, 1, num_steps)
    return tuple(sorted({0, *range(num_steps - 1, -1, -interval)}))


def taylorseer(num_steps: int, interval: int, warmup: int = 3) -> tuple[int, ...]:
    """TaylorSeer's schedule (arXiv 2503.06923): the first steps, then every N-th counted from the last of them.

    As in its code: warmup 3 for FLUX (N = 6, order 1), 2 for DiT (N = 4, order 4), 1 for HunyuanVideo and HiDream.
    ResilPhase's code for FLUX has the same schedule as TaylorSeer's.

    Args:
        num_steps, interval: see `paper`.
        warmup: how many steps at the start are all computed, 1 to `num_steps`.

    Returns:
        The computed steps, ascending, step 0 among them.

    Raises:
        ValueError: an argument is no whole number or outside its range.
    """
    return uniform(num_steps, interval, warmup, whole("warmup", warmup, 1) - 1)


def spectrum(num_steps: int, growth: float = 0.75, window: float = 2.0, warmup: int = 5) -> tuple[int, ...]:
    """Spectrum's schedule (arXiv 2603.01623): the first steps, then at distances that grow.

    The next computed step is floor(window) later, after which the window grows. As in its code, where a growth of 0.75
    and 3 gives 14 and 10 computed of 50. It goes with "chebyshev-4".

    Args:
        num_steps: T, steps of a request, at least 1.
        growth: of the window at each step computed after the first ones, at least 0.
        window: the first distance, at least 1.
        warmup: how many steps at the start are all computed, at least 1.

    Returns:
        The computed steps, ascending, step 0 among them.

    Raises:
        ValueError: an argument is outside its range.
    """
    num_steps = whole("num_steps", num_steps, 1)
    if not 0 <= growth < math.inf:
        raise ValueError(f"growth={growth}: expected a finite number of at least 0; published 0.75 and 3")
    if not 1 <= window < math.inf:
        raise ValueError(f"window={window}: expected a finite number of at least 1; published 2")
    steps = list(range(min(whole("warmup", warmup, 1), num_steps)))
    while steps[-1] + math.floor(window) < num_steps:
        steps.append(steps[-1] + math.floor(window))
        window = round(window + growth, 3)
    return tuple(steps)


def noise_levels(sigmas: Any, num_steps: int | None = None, error: type[Exception] = ValueError) -> tuple[float, ...]:
    """The noise levels of a request, as a user gives them.

    A level may come twice, as in Heun's method, and may exceed 1, as sqrt((1 - alpha_bar) / alpha_bar) does.

    Args:
        sigmas: the T + 1 levels, the final 0 included.
        num_steps: T, where it is known.
        error: what is raised.

    Raises:
        ValueError, or the `error` given: they are not finite numbers, rise, do not end at 0, or are not T + 1.
    """
    try:
        levels = tuple(float(sigma) for sigma in sigmas)
    except (TypeError, ValueError):
        levels = ()
    expected = "the T + 1" if num_steps is None else f"the {num_steps + 1}"
    falling = all(before >= after for before, after in pairwise(levels))  # NaN is not
    if len(levels) < 2 or not falling or not math.isfinite(levels[0]) or levels[-1] != 0.0 or levels[0] == 0.0:
        what = "finite noise levels of a request, from the noisiest down to the final 0"
        raise error(f"sigmas={sigmas!r:.200}: expected {expected} {what}")
    if num_steps is not None and len(levels) != num_steps + 1:
        raise error(
            f"sigmas holds {len(levels)} noise levels: requests of {num_steps} steps have {num_steps + 1}, the "
            "final 0 included"
        )
    return levels


def spaced(num_steps: int, budget: int, power: float = 1.0) -> tuple[int, ...]:
    """`budget` computed steps at T * (i / budget) ** power: even for power 1, denser at the start above.

    Args:
        num_steps: T, steps of a request.
        budget: how many are computed, 1 to `num_steps`.
        power: at least 1.
    """
    steps: list[int] = []
    for i in range(budget):
        low = steps[-1] + 1 if steps else 0
        steps.append(min(max(round(num_steps * (i / budget) ** power), low), num_steps - budget + i))
    return tuple(steps)


def published(num_steps: int, budget: int) -> list[tuple[int, ...]]:
    """The paper's schedule of this budget, where there is one, and the evenest schedule."""
    paper_schedules = (paper(num_steps, interval) for interval in range(1, num_steps + 1))
    found = next((computed for computed in paper_schedules if len(computed) == budget), None)
    even = spaced(num_steps, budget)
    return [even] if found is None else [found, even]


def check(computed: Iterable[int], num_steps: int) -> tuple[int, ...]:
    """Validate an explicit list of computed steps.

    Args:
        computed: step indices, ascending, each once, 0 among them.
        num_steps: T, steps of a request, at least 1.

    Returns:
        The same steps as a tuple of ints.

    Raises:
        ValueError: the list is empty, out of order, repeats a step, lacks step 0, or leaves the request.
    """
    num_steps = whole("num_steps", num_steps, 1)
    steps = tuple(whole("a computed step", step, 0, num_steps - 1) for step in computed)
    if not steps or steps[0] != 0:
        raise ValueError(f"computed={steps}: expected step 0 first; before it there is nothing to forecast from")
    for earlier, later in pairwise(steps):
        if later <= earlier:
            raise ValueError(
                f"computed={steps}: step {later} follows step {earlier}; expected ascending steps, each once"
            )
    return steps


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
        raise ValueError("stages is empty: give at least one, e.g. lesa.schedule.ONE_STAGE")
    bounds = [stage.low for stage in stages]
    if any(later >= earlier for earlier, later in pairwise(bounds)):
        raise ValueError(f"stages have lower bounds {bounds}: expected falling noise levels, highest first")
    return tuple(stages)


def whole(name: str, value: SupportsIndex, low: int, high: int | None = None) -> int:
    """`value` as an int.

    Raises:
        ValueError: it is no whole number in [low, high]; the message names it.
    """
    expected = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: expected {expected}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}={number}: expected {expected}")
    return number
