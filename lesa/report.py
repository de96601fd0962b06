"""Pictures of a training and of a comparison, drawn with matplotlib but without pyplot and its global state."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform

from .routing import Stage, stage_of

_INK, _MUTED, _FAINT, _SHADE = "#222222", "#666666", "#DDDDDD", "#F1F1F1"
_DPI = 150


class MethodStyle(NamedTuple):
    """Colour and marker of a method, the same in every picture."""

    color: str
    marker: str


# Okabe and Ito's colours: apart for all common kinds of colour blindness, and the marker says it again.
_KNOWN = {
    "full": MethodStyle("#444444", "s"),
    "fewer": MethodStyle("#999999", "x"),
    "reuse": MethodStyle("#0072B2", "v"),
    "taylor-1": MethodStyle("#009E73", "^"),
    "taylor-2": MethodStyle("#CC79A7", "D"),
    "lesa": MethodStyle("#D55E00", "o"),
}
_SPARE = tuple(map(MethodStyle, ("#E69F00", "#56B4E9", "#882255", "#332288", "#117733"), "Pp*hd"))


def method_styles(labels: Iterable[str]) -> dict[str, MethodStyle]:
    """A style for every label: that of the known method it starts with, else the next spare one.

    Args:
        labels: method names such as "Taylor-1" or "LESA"; case and punctuation do not matter.
    """
    styles: dict[str, MethodStyle] = {}
    spare = 0
    for label in dict.fromkeys(labels):
        name = re.sub(r"[^a-z0-9]+", "-", label.lower())
        style = next((style for key, style in _KNOWN.items() if name.startswith(key)), None)
        if style is None or style in styles.values():
            style = _SPARE[spare % len(_SPARE)]
            spare += 1
        styles[label] = style
    return styles


def loss_curves(
    path: str | os.PathLike[str],
    losses: Mapping[str, Sequence[float]],
    *,
    columns: int = 3,
    ylabel: str = "L1 loss",
) -> Path:
    """Draw the loss of every optimiser step, faint, under its running median; one panel a training stage.

    Args:
        path: the PNG to write.
        losses: title of a panel -> one loss an optimiser step.
        columns: panels side by side before the next row starts.
        ylabel: what the losses are.

    Returns:
        `path`.

    Raises:
        ValueError: `losses` is empty, or a panel has no positive finite loss.
    """
    if not losses:
        raise ValueError("losses is empty: give the losses of at least one training stage")
    columns = min(columns, len(losses))
    lines = math.ceil(len(losses) / columns)
    figure = Figure((4.2 * columns, 0.3 + 2.7 * lines), dpi=_DPI, layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, (title, values) in zip(grid.flat, losses.items(), strict=False):
        _draw_losses(axes, title, np.asarray(values, np.float64))
    for axes in grid.flat[len(losses) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_ylabel(ylabel)
    return _write(figure, path)


def _draw_losses(axes: Axes, title: str, values: np.ndarray) -> None:
    values = _positive(values)
    if not np.isfinite(values).any():
        raise ValueError(f"losses[{title!r}] has no positive finite value: expected one loss an optimiser step")
    steps = np.arange(1, len(values) + 1)
    # the median shrugs off the spikes of single prompts, which a mean would smear
    reach = max(1, len(values) // 30)
    median = np.array([_median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])
    color = _KNOWN["lesa"].color
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
    axes.plot(steps, median, color=color, linewidth=1.8)
    axes.set_yscale("log")
    axes.set_title(title, color=_INK, fontsize=11, loc="left")
    axes.set_title(f"median {median[0]:.3g} → {median[-1]:.3g}", color=_MUTED, fontsize=9, loc="right")
    axes.set_xlabel("optimiser step")
    axes.margins(x=0.02)
    _tidy(axes)


@dataclass(frozen=True)
class StepPanel:
    """What one column of `step_errors` shows: all methods at one budget.

    Args:
        title: e.g. "N = 5: 13 of 50 computed".
        sigmas: noise levels, T or, with the final 0, T + 1 of them.
        errors: method -> relative error of the feature at each of the T steps; zero and NaN leave a gap.
        computed: method -> computed steps.
        alphas: method, or expert, -> (step, alpha) of its forecast steps.
        stages: shaded and named where there is more than one.
    """

    title: str
    sigmas: Sequence[float]
    errors: Mapping[str, Sequence[float]]
    computed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    alphas: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    stages: Sequence[Stage] = ()

    def __post_init__(self) -> None:
        for name, values in self.errors.items():
            if not len(self.sigmas) - 1 <= len(values) <= len(self.sigmas):
                raise ValueError(
                    f"errors[{name!r}] has {len(values)} entries for {len(self.sigmas)} sigmas: expected one a step"
                )


def step_errors(
    path: str | os.PathLike[str], panels: Sequence[StepPanel], *, ylabel: str = "relative feature error"
) -> Path:
    """Draw the error of every step by method, the computed steps under it, and alpha where there is any.

    Args:
        path: the PNG to write.
        panels: one column each.
        ylabel: what the errors are.

    Returns:
        `path`.

    Raises:
        ValueError: `panels` is empty.
    """
    if not panels:
        raise ValueError("panels is empty: give at least one StepPanel")
    methods = method_styles(name for panel in panels for name in (*panel.errors, *panel.computed))
    alphas = {name for panel in panels for name in panel.alphas}
    styles = method_styles([*methods, *sorted(alphas - set(methods))])
    ticks = 0.16 * max(1, max(len(panel.computed) for panel in panels))
    heights = [2.7, ticks, 1.3] if alphas else [2.7, ticks]
    figure = Figure((4.3 * len(panels), 1.5 + sum(heights)), dpi=_DPI, layout="constrained")
    grid = figure.subplots(len(heights), len(panels), sharex="col", sharey="row", squeeze=False, height_ratios=heights)
    for column, panel in zip(grid.T, panels, strict=True):
        _draw_errors(column[0], panel, styles)
        _draw_computed(column[1], panel, styles)
        if alphas:
            _draw_alphas(column[2], panel, styles)
        for axes in column:
            _shade_stages(axes, panel)
        column[-1].set_xlabel("step")
    grid[0, 0].set_ylabel(ylabel)
    grid[1, 0].set_ylabel("computed", rotation=0, ha="right", va="center", fontsize=9, color=_MUTED)
    if alphas:
        grid[2, 0].set_ylabel("alpha")
    handles = [line for line in grid[0, 0].get_lines() if not line.get_label().startswith("_")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    return _write(figure, path)


def _draw_errors(axes: Axes, panel: StepPanel, styles: Mapping[str, MethodStyle]) -> None:
    for name, values in panel.errors.items():
        axes.plot(
            _positive(np.asarray(values, np.float64)),
            label=name,
            linewidth=1.4,
            markersize=3,
            **styles[name]._asdict(),
        )
    axes.set_yscale("log")
    axes.set_title(panel.title, color=_INK, fontsize=11, pad=30 if len(panel.stages) > 1 else 8)
    axes.set_xlim(-1, max((len(values) for values in panel.errors.values()), default=len(panel.sigmas)))
    _tidy(axes)


def _draw_computed(axes: Axes, panel: StepPanel, styles: Mapping[str, MethodStyle]) -> None:
    for line, (name, steps) in enumerate(panel.computed.items()):
        axes.vlines(list(steps), line - 0.36, line + 0.36, color=styles[name].color, linewidth=2)
    axes.set_ylim(max(1, len(panel.computed)) - 0.4, -0.6)
    _tidy(axes)
    axes.grid(False)
    axes.tick_params(left=False, labelleft=False, bottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_alphas(axes: Axes, panel: StepPanel, styles: Mapping[str, MethodStyle]) -> None:
    axes.axhline(0, color=_MUTED, linewidth=0.8)
    for name, points in panel.alphas.items():
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, values, label=name, linewidth=1, markersize=3, **styles[name]._asdict())
    _tidy(axes)


def _shade_stages(axes: Axes, panel: StepPanel) -> None:
    if len(panel.stages) < 2:
        return
    steps = max((len(values) for values in panel.errors.values()), default=len(panel.sigmas))
    served = [stage_of(sigma, panel.stages) for sigma in panel.sigmas[:steps]]
    for i, stage in enumerate(panel.stages):
        if i not in served:
            continue
        first, last = served.index(i), steps - 1 - served[::-1].index(i)
        if i % 2 == 0:
            axes.axvspan(first - 0.5, last + 0.5, color=_SHADE, linewidth=0, zorder=0)
        if axes.get_title():
            bound = f"σ > {stage.low:g}" if i < len(panel.stages) - 1 else f"σ ≤ {panel.stages[i - 1].low:g}"
            axes.annotate(
                f"{stage.name}\n{bound}",
                ((first + last) / 2, 1.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8,
                color=_MUTED,
            )


def method_grid(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    column_titles: Sequence[str] = (),
    *,
    cell: int = 192,
) -> Path:
    """Draw methods down and prompts across, pixels kept crisp.

    Args:
        path: the PNG to write.
        rows: (label, images [H, W, 3] of floats in [0, 1]), the full model first. The label's first line
            names the method, further lines carry its figures. A row without images is a heading.
        column_titles: the prompts.
        cell: about how many pixels of the picture an image is wide; images are scaled by whole factors.

    Returns:
        `path`.

    Raises:
        ValueError: there is no image, a row has more or fewer than the first, or their shapes differ.
    """
    images = [np.stack([_fit(image, cell) for image in row]) for _, row in rows if len(row)]
    if not images or any(row.shape != images[0].shape for row in images):
        raise ValueError(
            f"rows hold images of shapes {[row.shape for row in images]}: expected rows of as many images of one shape"
        )
    return _write(_Grid(rows, images, column_titles).figure, path)


class _Grid:
    """A layout in whole pixels: resampled axes would blur small images."""

    gap, margin, heading = 8, 24, 56

    def __init__(
        self,
        rows: Sequence[tuple[str, Sequence[np.ndarray]]],
        images: Sequence[np.ndarray],
        column_titles: Sequence[str],
    ) -> None:
        self.figure = Figure(dpi=_DPI)
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        count, height, width = images[0].shape[:3]
        labels = [label.split("\n") for label, _ in rows]
        names = [self.text(lines[0], 11, weight="bold") for lines in labels]
        notes = [self.text("\n".join(lines[1:]), 9, color=_MUTED, linespacing=1.35) for lines in labels]
        # a prompt may use the full width of its column: about 16 pixels a letter pair at this size
        titles = [self.text(textwrap.fill(t, max(8, width // 9)), 8, color=_MUTED) for t in column_titles[:count]]
        left = self.margin + 18 + max(self.width(text) for text in (*names, *notes)) + self.margin
        top = self.margin + max((self.height(text) for text in titles), default=0) + self.gap
        total = top + sum(height + self.gap if len(row) else self.heading for _, row in rows) + self.margin
        self.figure.set_size_inches(
            (left + count * (width + self.gap) + self.margin) / _DPI, total / _DPI, forward=False
        )
        for i, text in enumerate(titles):
            text.set(position=(left + i * (width + self.gap) + width / 2, total - top + self.gap), ha="center")
        styles = method_styles(lines[0] for lines, (_, row) in zip(labels, rows, strict=True) if len(row))
        remaining = iter(images)
        for lines, (_, row), name, note in zip(labels, rows, names, notes, strict=True):
            if not len(row):
                name.set(position=(self.margin, total - top - self.heading + 12))
                note.set(position=(self.margin + self.width(name) + 16, total - top - self.heading + 12))
                top += self.heading
                continue
            self.swatch(total - top - height, height, styles[lines[0]].color)
            self.label(total - top - height / 2, name, note)
            for i, image in enumerate(next(remaining)):
                self.figure.figimage(image, left + i * (width + self.gap), total - top - height, origin="upper")
            top += height + self.gap

    def text(self, words: str, size: float, color: str = _INK, **style: float | str) -> Text:
        return self.figure.text(0, 0, words, size=size, color=color, transform=IdentityTransform(), **style)

    def width(self, text: Text) -> int:
        return math.ceil(text.get_window_extent(self.renderer).width) if text.get_text() else 0

    def height(self, text: Text) -> int:
        return math.ceil(text.get_window_extent(self.renderer).height) if text.get_text() else 0

    def label(self, middle: float, name: Text, note: Text) -> None:
        below = self.height(note) + self.gap if note.get_text() else 0
        name.set(position=(self.margin + 18, middle + (below - self.height(name)) / 2))
        note.set(position=(self.margin + 18, middle - (below + self.height(name)) / 2))

    def swatch(self, bottom: float, height: float, color: str) -> None:
        self.figure.add_artist(
            Rectangle((self.margin, bottom), 6, height, color=color, linewidth=0, transform=IdentityTransform())
        )


def _fit(image: np.ndarray, cell: int) -> np.ndarray:
    """Scale by a whole factor to about `cell` pixels of width, as uint8."""
    image = np.asarray(image, np.float64)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an image has shape {image.shape}: expected [H, W, 3]")
    shrink = max(1, round(image.shape[1] / cell))
    height, width = (size // shrink for size in image.shape[:2])
    image = image[: height * shrink, : width * shrink].reshape(height, shrink, width, shrink, 3).mean((1, 3))
    grow = max(1, round(cell / width))
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8).repeat(grow, 0).repeat(grow, 1)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else math.nan


def _tidy(axes: Axes) -> None:
    axes.grid(True, color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_MUTED)


def _write(figure: Figure, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    # no version of matplotlib in the file, so that equal pictures are equal files
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})
    return path
