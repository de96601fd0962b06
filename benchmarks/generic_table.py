"""The rows of benchmarks.generic, and what plans without a fit gain over the best published rule."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks.fitted_table import Row, read

if TYPE_CHECKING:
    from benchmarks.generic import Settings

COLUMNS = (
    *("hardware", "commit", "date", "model", "guidance", "steps", "captions", "computed", "method", "schedule"),
    *("psnr_mean", "psnr_sem", "psnr_median", "psnr_low", "generations", "seconds"),
)
FITTED_BUDGETS = (17, 13, 10, 8, 6)
NO_RULES = ("generic", "fewer", "dpm++", "fbc", "deepcache", "learn", "quick", "default")
WORST, MEAN = -0.3, 4.0  # dB: what generic plans may lose anywhere, and must gain over all models
_KEY = ("hardware", "commit", "model", "guidance", "steps", "captions", "computed", "method", "schedule")


class Rows:
    """The rows of one model and guidance, in a file that several processes add to.

    Args:
        settings: of the run; rows of its file with the same hardware, commit and captions are done.
        name: of the model.
        guidance: "plain" or "guided".
    """

    def __init__(self, settings: Settings, name: str, guidance: str) -> None:
        self._settings = settings
        self._head = [*settings.head, name, guidance, str(settings.steps), str(settings.captions)]
        if not settings.results.is_file():
            settings.results.parent.mkdir(parents=True, exist_ok=True)
            settings.results.write_text(",".join(COLUMNS) + "\n")
        self._done = {tuple(row[column] for column in _KEY) for row in read(settings.results)}

    def wanted(self, computed: int, method: str, schedule: str) -> bool:
        """Whether a row is missing and there is time for it."""
        known = dict(zip(COLUMNS, [*self._head, str(computed), method, schedule], strict=False))
        return tuple(known[column] for column in _KEY) not in self._done and time.time() < self._settings.deadline

    def add(self, identity: tuple[int, str, str], psnr: np.ndarray, generations: float = 0, seconds: float = 0) -> None:
        """Write a row: PSNR of each prompt, and what the plan took in full requests and seconds."""
        error = psnr.std(ddof=1) / len(psnr) ** 0.5 if len(psnr) > 1 else math.nan
        figures = [f"{x:.3f}" for x in (psnr.mean(), error, np.median(psnr), lowest_tenth(psnr))]
        line = io.StringIO()
        cells = [*self._head, *identity, *figures, f"{generations:.1f}", f"{seconds:.3f}"]
        csv.writer(line, lineterminator="\n").writerow(cells)
        with self._settings.results.open("a") as file:  # one short write: lines of several processes do not mix
            file.write(line.getvalue())
        print(line.getvalue().strip(), flush=True)


def lowest_tenth(psnr: np.ndarray) -> float:
    """The mean of the lowest tenth, at least one."""
    return float(np.sort(psnr)[: math.ceil(len(psnr) / 10)].mean())


class Cell(NamedTuple):
    """A kind of request and a budget."""

    model: str
    guidance: str
    steps: int
    computed: int

    def __str__(self) -> str:
        return f"{self.model} {self.guidance}"


def cells(rows: Iterable[Row]) -> dict[Cell, dict[tuple[str, str], Row]]:
    """The newest row of each (method, schedule), by cell."""
    found: dict[Cell, dict[tuple[str, str], Row]] = {}
    for row in rows:
        cell = Cell(row["model"], row["guidance"], int(row["steps"]), int(row["computed"]))
        found.setdefault(cell, {})[row["method"], row["schedule"]] = row
    return found


def rules(by: Mapping[tuple[str, str], Row]) -> list[Row]:
    """The rows of published rules."""
    return [row for (method, _), row in by.items() if method not in NO_RULES]


class Margin(NamedTuple):
    """Generic minus the best rule of a cell, each figure's best on its own, dB."""

    cell: Cell
    mean: float
    low: float


def margins(rows: Iterable[Row]) -> Iterator[Margin]:
    """The margin of each cell that has both."""
    for cell, by in cells(rows).items():
        ours, others = by.get(("generic", "searched")), rules(by)
        if ours and others:
            gains = [float(ours[c]) - max(float(r[c]) for r in others) for c in ("psnr_mean", "psnr_low")]
            yield Margin(cell, *gains)


Table = tuple[list[str], list[list[str]]]


def margin_table(rows: Iterable[Row]) -> Table:
    """Head and lines: the margins at each step count and budget, and over all budgets."""
    found = sorted(margins(rows), key=lambda margin: (-margin.cell.steps, margin.cell.computed))
    lines = []
    for steps in dict.fromkeys(margin.cell.steps for margin in found):
        of_steps = [margin for margin in found if margin.cell.steps == steps]
        for computed in dict.fromkeys(margin.cell.computed for margin in of_steps):
            lines.append(_line(steps, str(computed), [m for m in of_steps if m.cell.computed == computed]))
        lines.append(_line(steps, "all", of_steps))
    return ["steps", "computed", "cells", "mean", "lowest mean", "lowest of lowest tenths", "below the limit"], lines


def _line(steps: int, computed: str, found: Sequence[Margin]) -> list[str]:
    mean = float(np.mean([margin.mean for margin in found]))
    lowest, low = min(found, key=lambda m: m.mean), min(found, key=lambda m: m.low)
    fails = [f"{m.cell} {m.mean:+.2f} / {m.low:+.2f}" for m in found if min(m.mean, m.low) < WORST]
    shown = f"{len(fails)} cells" if computed == "all" else ", ".join(fails)
    gain = f"{mean:+.2f}" + ("" if mean >= MEAN else f", below {MEAN:+g}")
    worst = [f"{lowest.mean:+.2f} {lowest.cell}", f"{low.low:+.2f} {low.cell}"]
    return [str(steps), computed, str(len(found)), gain, *worst, shown]


def quality_table(rows: Iterable[Row], steps: int | None = None) -> Table:
    """Head and lines: mean and lowest tenth by model, guidance and method, at the budgets of the tables.

    Args:
        rows: of the file.
        steps: of the requests; None takes all others than those of 50 steps, at all their budgets.
    """
    known = {cell: by for cell, by in cells(rows).items() if (cell.steps == steps if steps else cell.steps != 50)}
    budgets = sorted({cell.computed for cell in known if not steps or cell.computed in FITTED_BUDGETS}, reverse=True)
    lines = []
    for model, guidance, count in dict.fromkeys(cell[:3] for cell in known):
        columns = [known.get(Cell(model, guidance, count, budget), {}) for budget in budgets]
        for label, shown in _METHODS.items():
            texts = [_text(shown(by), label == _BEST) for by in columns]
            if any(texts):
                lines.append([model, guidance, str(count), label, *texts])
    return ["model", "requests", "steps", "method", *(f"{budget} computed" for budget in budgets)], lines


def _best(by: Mapping[tuple[str, str], Row]) -> Row | None:
    return max(rules(by), key=lambda row: float(row["psnr_mean"]), default=None)


def _text(row: Row | None, named: bool) -> str:
    if row is None:
        return ""
    figures = f"{float(row['psnr_mean']):.1f} / {float(row['psnr_low']):.1f}"
    return figures + (f" {row['method']}, {row['schedule']}" if named else "")


_BEST = "best rule"
_METHODS: Mapping[str, Callable[[Mapping[tuple[str, str], Row]], Row | None]] = {
    "**no fit**": lambda by: by.get(("generic", "searched")),
    _BEST: _best,
    "fewer steps": lambda by: by.get(("fewer", "own")),
    "fewer DPM-Solver++ steps": lambda by: by.get(("dpm++", "fewer")),
    "FirstBlockCache, tuned": lambda by: by.get(("fbc", "tuned")),
    "DeepCache": lambda by: by.get(("deepcache", "even")),
    "`learn=4`": lambda by: by.get(("learn", "learned")),
    "`lesa.fit`, quick": lambda by: by.get(("quick", "fitted")),
    "`lesa.fit`": lambda by: by.get(("default", "fitted")),
}
