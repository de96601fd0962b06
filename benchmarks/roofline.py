"""Draw the rows of benchmarks/results/ops.csv against the copy, and print them as a Markdown table.

    python -m benchmarks.roofline [--results FILE.csv] [--out FILE.png] [--hardware NAME]

Of every operator on a hardware the rows of its newest commit count, and of rows on the same thing the last. The
picture shows one hardware, the one measured last on a GPU if there is any, and of every operator and shape the widest
window.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lesa.evaluation.plots import DPI, FAINT, INK, MUTED, write_png

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
COPY = "copy"
# Okabe and Ito's colours, as in the other pictures; the orange is lesa's there too.
COLORS = {"triton": "#D55E00", "cpp": "#D55E00", "compile": "#009E73", "eager": "#0072B2", "paper": "#CC79A7"}
NAMES = {
    "triton": "lesa (Triton)",
    "cpp": "lesa (C++)",
    "compile": "torch.compile",
    "eager": "best eager torch",
    "paper": "released code's formula",
}
PANELS = (
    ("forecast",),
    ("forecast_head",),
    ("forecast_errors",),
    ("predict",),
    ("predict_loss",),
    ("kan", "kan_fwd_bwd"),
)
SHAPES = ("flux", "qwen", "hunyuan", "wan", "emoji")


@dataclass(frozen=True)
class Row:
    """The columns of one row of ops.csv that are shown."""

    hardware: str
    commit: str
    date: str
    op: str
    shape: str
    k: int
    dtype: str
    provider: str
    p50_us: float
    gbps: float

    @property
    def subject(self) -> tuple[str, str, int, str]:
        """What was run, by any provider."""
        return self.op, self.shape, self.k, self.dtype


def read(path: str | os.PathLike[str]) -> dict[str, list[Row]]:
    """The rows of every operator's newest commit, by hardware, the hardware measured last at the end.

    Args:
        path: a CSV that bench_ops.py has written.

    Raises:
        ValueError: it has no rows.
    """
    with open(path, newline="") as file:
        rows = [_row(cells) for cells in csv.DictReader(file)]
    if not rows:
        raise ValueError(f"{os.fspath(path)!r} has no rows: run pytest benchmarks/bench_ops.py --results {path}")
    # Rows are only ever appended: the last row of an operator names its newest commit.
    newest = {(row.hardware, row.op): row.commit for row in rows}
    kept: dict[str, list[Row]] = {}
    for hardware in reversed(dict.fromkeys(row.hardware for row in reversed(rows))):
        mine = (row for row in rows if row.hardware == hardware and row.commit == newest[hardware, row.op])
        kept[hardware] = list({(*row.subject, row.provider): row for row in mine}.values())
    return kept


def _row(cells: dict[str, str]) -> Row:
    texts = {name: cells[name] for name in ("hardware", "commit", "date", "op", "shape", "dtype", "provider")}
    return Row(**texts, k=int(cells["k"] or 0), p50_us=float(cells["p50_us"]), gbps=float(cells["gbps"]))


def markdown(rows: Sequence[Row]) -> str:
    """A table of one hardware's rows: median time and share of the copy's rate by provider."""
    present = {row.provider for row in rows}
    providers = [name for name in COLORS if name in present]
    lines = [["op", "shape", "K", "dtype", *providers, *([COPY] if COPY in present else [])]]
    lines.append(["---"] * 3 + ["---"] + ["---:"] * (len(lines[0]) - 4))
    for subject, group in _grouped(rows):
        op, shape, k, dtype = subject
        cells = [_time(group[name].p50_us) + _share(group, name) if name in group else "" for name in lines[0][4:]]
        lines.append([op, shape, str(k or ""), dtype, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _grouped(rows: Iterable[Row]) -> list[tuple[tuple[str, str, int, str], dict[str, Row]]]:
    groups: dict[tuple[str, str, int, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.subject, {})[row.provider] = row
    return list(groups.items())


def _share(group: dict[str, Row], provider: str) -> str:
    if provider == COPY or COPY not in group:
        return ""
    return f" ({100 * group[provider].gbps / group[COPY].gbps:.0f} %)"


def _time(us: float) -> str:
    return f"{us:.1f} µs" if us < 100 else f"{us:.0f} µs" if us < 10_000 else f"{us / 1000:.1f} ms"


def draw(path: str | os.PathLike[str], rows: Sequence[Row]) -> Path:
    """Draw the achieved bandwidth of every operator and shape by provider, the copy a dashed line.

    Args:
        path: the PNG to write.
        rows: of one hardware.

    Returns:
        `path`.

    Raises:
        ValueError: there is nothing to draw.
    """
    panels = [(ops, _widest(row for row in rows if row.op in ops)) for ops in PANELS]
    panels = [(ops, groups) for ops, groups in panels if groups]
    if not panels:
        raise ValueError(f"no rows of {list(itertools.chain(*PANELS))} with a copy: nothing to draw")
    lines = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    bars = [max(sum(len(_providers(group)) + 1 for _, group in groups) for _, groups in line) for line in lines]
    figure = Figure((9.2, 0.9 + sum(0.7 + 0.155 * count for count in bars)), dpi=DPI)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    grid = figure.subplots(len(lines), 2, squeeze=False, height_ratios=[4 + count for count in bars])
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (ops, groups) in zip(grid.flat, panels, strict=False):
        _panel(axes, ops, groups)
    present = {row.provider for _, groups in panels for _, group in groups for row in group.values()}
    handles: list[Artist] = [Patch(color=COLORS[name], label=NAMES[name]) for name in COLORS if name in present]
    handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=1.4, label="copy of as many bytes"))
    figure.suptitle(f"{rows[-1].hardware}: bandwidth reached and share of a copy's", color=INK, fontsize=12)
    if len(panels) % 2:
        grid.flat[-1].legend(handles=handles, loc="center", frameon=False, fontsize=10)
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return write_png(figure, path)


Group = tuple[tuple[str, str, int, str], dict[str, Row]]


def _widest(rows: Iterable[Row]) -> list[Group]:
    """Groups with a copy: of every operator, dtype and shape the widest window, shapes in the usual order."""
    best: dict[tuple[str, str, str], Group] = {}
    for subject, group in _grouped(rows):
        op, shape, k, dtype = subject
        if COPY in group and k >= best.get((op, dtype, shape), (subject, group))[0][2]:
            best[op, dtype, shape] = subject, group
    order = {name: i for i, name in enumerate(SHAPES)}
    return sorted(best.values(), key=lambda pair: (pair[0][0], pair[0][3], order.get(pair[0][1], len(order))))


def _providers(group: dict[str, Row]) -> list[str]:
    return [name for name in COLORS if name in group]


def _panel(axes: Axes, ops: Sequence[str], groups: Sequence[Group]) -> None:
    limit = 1.06 * max(row.gbps for _, group in groups for row in group.values())
    axes.set_xlim(0, limit)
    ticks, labels, place = [], [], 0.0
    for subject, group in groups:
        providers = _providers(group)
        for i, name in enumerate(providers):
            _bar(axes, place + i, group, name, limit)
        last = place + len(providers) - 1
        axes.vlines(group[COPY].gbps, place - 0.6, last + 0.6, color=INK, linestyle="--", linewidth=1.4, zorder=3)
        ticks.append((place + last) / 2)
        labels.append(_label(subject, ops, groups))
        place = last + 2.0
    axes.set_yticks(ticks, labels)
    axes.set_ylim(place - 1.2, -0.8)
    windows = {subject[2] for subject, _ in groups} - {0}
    axes.set_title(", ".join([ops[0], *(f"K = {k}" for k in sorted(windows))]), color=INK, fontsize=11, loc="left")
    axes.set_xlabel("GB/s", fontsize=9, color=MUTED)
    axes.grid(True, axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, left=False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def _bar(axes: Axes, place: float, group: dict[str, Row], name: str, limit: float) -> None:
    row = group[name]
    axes.barh(place, row.gbps, height=0.86, color=COLORS[name], linewidth=0)
    note = f"{100 * row.gbps / group[COPY].gbps:.0f} %  {_time(row.p50_us)}"
    # Inside a long bar, else behind it; neither on the copy's line.
    inside = row.gbps > 0.45 * limit
    beyond = group[COPY].gbps if group[COPY].gbps < 0.45 * limit else 0.0
    axes.annotate(
        note,
        (row.gbps if inside else max(row.gbps, beyond), place),
        (-4 if inside else 4, 0),
        textcoords="offset points",
        ha="right" if inside else "left",
        va="center_baseline",
        fontsize=7,
        color="white" if inside else INK,
    )


def _label(subject: tuple[str, str, int, str], ops: Sequence[str], groups: Sequence[Group]) -> str:
    """The shape, and what else tells this group from the others of its panel."""
    op, shape, _, dtype = subject
    parts = [op] if len(ops) > 1 else [shape]
    if len({other[3] for other, _ in groups}) > 1:
        parts.append(dtype)
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "ops.csv")
    parser.add_argument("--out", type=Path, default=IMAGES / "roofline.png")
    parser.add_argument("--hardware", help="what the picture shows")
    options = parser.parse_args(arguments)
    found = read(options.results)
    shown = options.hardware or next((name for name in reversed(found) if "CPU" not in name), list(found)[-1])
    if shown not in found:
        parser.error(f"--hardware {shown!r}: the rows have {list(found)}")
    draw(options.out, found[shown])
    for hardware, rows in found.items():
        runs = "; ".join(dict.fromkeys(f"{row.commit}, {row.date}" for row in rows))
        print(f"### {hardware}, {runs}\n\n{markdown(rows)}\n")


if __name__ == "__main__":
    main()
