"""The rows of benchmarks.fitted, the README's tables of them, and what lesa's fitted plans gain over the others."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.fitted_methods import Settings

COLUMNS = (
    *("hardware", "commit", "date", "pipeline", "captions", "guidance", "method", "schedule", "site", "effort"),
    *("computed", "psnr", "psnr_sem", "ssim", "generations", "seconds"),
)
Row = Mapping[str, str]
_TITLES = {"1": "Without guidance", "3": "`true_cfg_scale` 3"}
_OURS = "lesa.fit"


class Rows:
    """The rows of one run, which several processes add to.

    Args:
        settings: of the run; rows of its file with the same commit and captions are done.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._head = [*settings.head, str(settings.captions)]
        if not settings.results.is_file():
            settings.results.parent.mkdir(parents=True, exist_ok=True)
            settings.results.write_text(",".join(COLUMNS) + "\n")
        self._done = {self._key(row) for row in read(settings.results)}

    def wanted(self, *identity: Any) -> bool:
        """Whether the row (guidance, method, schedule, site, effort, computed) is missing and there is time for it."""
        known = (*self._head[1:2], *self._head[3:5], *map(str, identity)) in self._done
        return not known and time.time() < self._settings.deadline

    def add(self, identity: Iterable[Any], figures: tuple[float, float, float], *cost: float) -> None:
        """Write a row; `cost` is what its plan took, in generations and seconds."""
        cells = [f"{figures[0]:.3f}", f"{figures[1]:.3f}", f"{figures[2]:.5f}", *(f"{value:.1f}" for value in cost)]
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([*self._head, *identity, *cells, *[""] * (2 - len(cost))])
        with self._settings.results.open("a") as file:  # one short write: lines of several processes do not mix
            file.write(line.getvalue())
        print(line.getvalue().strip(), flush=True)

    def _key(self, row: dict[str, str]) -> tuple[str, ...]:
        names = ("commit", "pipeline", "captions", "guidance", "method", "schedule", "site", "effort", "computed")
        return tuple(row[name] for name in names)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file; a line that was cut off is left out."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]


def table(rows: Sequence[Row]) -> str:
    """One markdown table for each guidance scale, under its title."""
    parts = []
    for guidance in dict.fromkeys(row["guidance"] for row in rows):
        title = f"{_TITLES.get(guidance, f'guidance {guidance}')}:"
        parts.append(title + "\n\n" + table_of([row for row in rows if row["guidance"] == guidance]))
    return "\n\n".join(parts)


def table_of(rows: Sequence[Row]) -> str:
    """A markdown table: PSNR ± standard error and SSIM, the best PSNR of a column in bold."""
    cells, budgets = _cells(rows)
    best = {b: max(float(by[b]["psnr"]) for by in cells.values() if b in by) for b in budgets}
    lines = ["| method | schedule | " + " | ".join(f"{budget} computed" for budget in budgets) + " |"]
    lines.append("|---" * (len(budgets) + 2) + "|")
    for (method, schedule), by in cells.items():
        texts = [_text(by[b], b, best[b]) if b in by else "" for b in budgets]
        lines.append(f"| {_label(method, by.values())} | {schedule} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def margins(rows: Sequence[Row]) -> str:
    """What lesa's fitted plans gain, in dB, over the paper's LESA and over the best of all other rows."""
    lines = []
    for guidance in dict.fromkeys(row["guidance"] for row in rows):
        cells, budgets = _cells(row for row in rows if row["guidance"] == guidance)
        others = {label: by for label, by in cells.items() if not label[0].startswith(_OURS)}
        paper = next((by for (method, kind), by in others.items() if method == "lesa" and kind == "paper"), {})
        for (method, _), by in cells.items():
            if not method.startswith(_OURS):
                continue
            for budget in (b for b in budgets if b in by):
                ours = float(by[budget]["psnr"])
                rivals = [(float(o[budget]["psnr"]), " ".join(label)) for label, o in others.items() if budget in o]
                found = f"guidance {guidance}, {budget} computed, {method}: {ours:.2f} dB"
                if budget in paper:
                    found += f", {ours - float(paper[budget]['psnr']):+.2f} over the paper's LESA"
                if rivals:
                    found += f", {ours - max(rivals)[0]:+.2f} over {max(rivals)[1]}"
                lines.append(found)
    return "\n".join(lines)


def _cells(rows: Iterable[Row]) -> tuple[dict[tuple[str, str], dict[int, Row]], list[int]]:
    """The rows by (method, schedule) and budget; several of one kind (another run): the newest."""
    rows = [row for row in rows if row["schedule"] != "converged"]
    budgets = sorted({int(row["computed"]) for row in rows if row["schedule"] != "fewer"}, reverse=True)
    budgets = budgets or sorted({int(row["computed"]) for row in rows if row["method"] == "euler"}, reverse=True)
    cells: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        calls = int(row["computed"])
        budget = calls if calls in budgets and row["method"] != "heun" else _column(calls, budgets)
        if budget is None:
            continue
        method = ", ".join(filter(None, (row["method"], row["effort"])))
        schedule = "fewer steps" if row["schedule"] == "fewer" else row["schedule"]
        if row["site"] == "hidden" and row["method"] != "lesa":
            schedule += ", hidden"
        cells.setdefault((method, schedule), {})[budget] = row
    return cells, budgets


def _column(calls: int, budgets: Iterable[int]) -> int | None:
    """The budget that an odd number of calls stands for: itself or one call less."""
    return next((budget for budget in budgets if budget in (calls, calls - 1)), None)


def _label(method: str, rows: Iterable[Row]) -> str:
    """The method, with what it took at most."""
    if not method.startswith(_OURS):
        return method
    generations = max(float(row["generations"] or 0) for row in rows)
    return f"**{method}**, {generations:.0f} generations"


def _text(row: Row, budget: int, best: float) -> str:
    psnr = f"{float(row['psnr']):.2f}"
    strong = f"**{psnr}**" if float(row["psnr"]) == best else psnr
    calls = "" if int(row["computed"]) == budget else f" ({row['computed']} calls)"
    return f"{strong} ± {float(row['psnr_sem']):.2f}, {float(row['ssim']):.4f}{calls}"
