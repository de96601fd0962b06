"""What a fit runs whatever it takes: the forecasters asked for by name, and with all effort the paper's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..plans.plan import Plan
from .candidates import TRAINED
from .trainer import Trainer
from .trials import Trials

SCHEDULES = ("published", "searched")
_MOST = 0.5  # of the generations left after recording, for training that nobody asked for
_FAILURES = (ValueError, RuntimeError, OSError)  # of training: losses, memory, disk


@dataclass(frozen=True)
class Promise:
    """A forecaster to be run.

    Args:
        schedule: one of `SCHEDULES`.
        forecaster: its name.
    """

    schedule: str
    forecaster: str

    def __str__(self) -> str:
        return f"{self.schedule} schedule, {self.forecaster}"


@dataclass(frozen=True)
class Promises:
    """The forecasters that are run for one budget.

    Args:
        runs: each of them on its schedule.
        cost: generations set aside for training.
        skipped: what is left out, and why.
        trainer: makes the plans of the trained forecaster; None where nothing can be trained.
        asked: whether training was asked for, so that its errors are the user's to see.
    """

    runs: tuple[Promise, ...] = ()
    cost: float = 0.0
    skipped: tuple[tuple[str, str], ...] = ()
    trainer: Trainer | None = None
    asked: bool = False

    def train(self, computed: tuple[int, ...]) -> Plan | str:
        """The plan of the trained forecaster for a schedule, or why there is none.

        Raises:
            ValueError, RuntimeError, OSError: training was asked for and failed.
        """
        assert self.trainer is not None
        try:
            return self.trainer.plan(computed)
        except _FAILURES as error:
            if self.asked:
                raise
            return f"its training failed: {error}"


def promises_of(
    names: Sequence[str], experts: bool, trainer: Trainer | None, trials: Trials, budget: int, left: float
) -> Promises:
    """What to run for a budget.

    Args:
        names: of the forecasters asked for, each of which is run on both schedules.
        experts: whether the trained one is to be run on the published schedule too, if it fits.
        trainer: makes its plans; None where nothing can be trained.
        trials: the fitting requests.
        budget: computed steps.
        left: generations that the effort leaves after recording.
    """
    runs = tuple(Promise(schedule, name) for schedule in SCHEDULES for name in names)
    own, asked = Promise(SCHEDULES[0], TRAINED), TRAINED in names
    if not experts or asked or budget == trials.statistics.num_steps:
        return Promises(runs, trainer=trainer, asked=asked)
    reason = _why_not(trainer, trials, budget, left * _MOST)
    if trainer is None or reason is not None:
        return Promises(runs, skipped=((str(own), str(reason)),))
    # Not the price itself, which was timed: one seed must give one number of runs.
    return Promises((*runs, own), trainer.nominal(trials), trainer=trainer)


def _why_not(trainer: Trainer | None, trials: Trials, budget: int, most: float) -> str | None:
    """Why nothing is trained, if it is not asked for; None where it fits into `most` generations."""
    if trainer is None:
        return "training needs prompts for a pipeline: train it apart and give its plan as a candidate"
    try:
        price = trainer.price(trials, budget)
    except _FAILURES as error:
        return f"its training failed: {error}"
    if price <= most:
        return None
    return (
        f"training would take the time of about {price:.0f} full requests, more than the {most:.0f} that this effort "
        f"has for it; candidates=[{TRAINED!r}] trains it all the same"
    )
