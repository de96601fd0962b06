"""Pictures of a comparison and of a training, drawn with matplotlib but without pyplot and its global state."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import IdentityTransform

from ..plans.schedule import Stage, stage_of

INK, MUTED, FAINT = "#222222", "#666666", "#DDDDDD"
DPI = 150
_CURVE, _SHADE, _FRAME = "#D55E00", "#F1F1F1", 0xDD


class MethodStyle(NamedTuple):
    """Colour and marker of a method, the same in every picture."""

    color: str
    marker: str


# Okabe and Ito's colours: apart for all common kinds of colour blindness, and the marker says it again.
_KNOWN = {
    "lesa-fit": MethodStyle("#E69F00", "P"),
    "lesa-no-fit": MethodStyle("#56B4E9", "p"),
    "full": MethodStyle("#444444", "s"),
    "fewer": MethodStyle("#999999", "x"),
    "reuse": MethodStyle("#0072B2", "v"),
    "taylor-1": MethodStyle("#009E73", "^"),
    "taylor-2": MethodStyle("#CC79A7", "D"),
    "lesa": MethodStyle("#D55E00", "o"),
}
_SPARE = tuple(map(MethodStyle, ("#882255", "#332288", "#117733"), "*hd"))


def method_styles(labels: Iterable[str]) -> dict[str, MethodStyle]:
    """A style for every label: that of the known method it starts with, else the next spare one.

    Args:
        labels: method names such as "Taylor-1" or "LESA"; case and punctuation do not matter, nor does what
            follows a comma, as in "lesa, N = 5".
    """
    labels = tuple(labels)
    styles: dict[str, MethodStyle] = {}
    spare = 0
    for method in dict.fromkeys(label.split(",")[0] for label in labels):
        name = re.sub(r"[^a-z0-9]+", "-", method.lower())
        style = next((style for key, style in _KNOWN.items() if name.startswith(key)), None)
        if style is None or style in styles.values():
            style = _SPARE[spare % len(_SPARE)]
            spare += 1
        styles[method] = style
    return {label: styles[label.split(",")[0]] for label in labels}


def constrained_figure(width: float, height: float) -> Figure:
    """A figure of so many inches whose axes, titles and legends make room for each other."""
    return Figure((width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def write_png(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Draw `figure` into a PNG, making its folder if there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    # no version of matplotlib in the file, so that equal pictures are equal files
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
    return path


def tidy(axes: Axes) -> None:
    """The look that all axes share: a faint grid behind, no frame above and at the right."""
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def method_grid(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    column_titles: Sequence[str] = (),
    *,
    amplify: float | None = None,
    cell: int = 192,
) -> Path:
    """Draw methods down and prompts across, pixels kept crisp, and under each method what differs from the first.

    Args:
        path: the PNG to write.
        rows: (label, images [H, W, 3] of floats in [0, 1]), the reference first. The label's first line names the
            method, further lines carry its figures.
        column_titles: the prompts.
        amplify: factor of the difference images |image - reference|, black where both are equal; None draws none.
        cell: about how many pixels of the picture an image is wide; images are scaled by whole factors.

    Returns:
        `path`.

    Raises:
        ValueError: there is no image, a row has more or fewer than the first, or their shapes differ.
    """
    shapes = [[np.shape(image) for image in images] for _, images in rows]
    if not shapes or not shapes[0] or any(row != [shapes[0][0]] * len(shapes[0]) for row in shapes):
        raise ValueError(f"rows hold images of shapes {shapes}: expected rows of as many images of one shape")
    blocks = []
    for i, (label, images) in enumerate(rows):
        name, _, note = label.partition("\n")
        lines = [_Line(name, note, [_fit(image, cell) for image in images])]
        if i and amplify is not None:
            pairs = zip(images, rows[0][1], strict=True)
            differences = [_fit(amplify * np.abs(np.subtract(*pair, dtype=np.float64)), cell) for pair in pairs]
            lines.append(_Line("", f"difference from {rows[0][0].partition(chr(10))[0]}\n×{amplify:g}", differences))
        blocks.append(lines)
    return write_png(_Grid(blocks, column_titles).figure, path)


class _Line(NamedTuple):
    name: str
    note: str
    images: Sequence[np.ndarray]


class _Grid:
    """A layout in whole pixels: resampled axes would blur small images. The lines of a block belong together."""

    gap, margin, between, indent = 6, 24, 16, 18

    def __init__(self, blocks: Sequence[Sequence[_Line]], column_titles: Sequence[str]) -> None:
        self.figure = Figure(dpi=DPI)
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        count, (height, width) = len(blocks[0][0].images), blocks[0][0].images[0].shape[:2]
        texts = [
            (
                self.text(line.name, 11, weight="bold"),
                self.text(line.note, 9, color=MUTED, linespacing=1.35),
            )
            for block in blocks
            for line in block
        ]
        # a letter is about 9 pixels wide at this size
        titles = [self.text(textwrap.fill(t, max(8, width // 9)), 8, color=MUTED) for t in column_titles[:count]]
        left = self.margin + self.indent + max(self.width(text) for pair in texts for text in pair) + self.margin
        top = self.margin + max((self.height(text) for text in titles), default=0) + self.gap
        heights = [len(block) * (height + self.gap) - self.gap for block in blocks]
        total = top + sum(heights) + (len(blocks) - 1) * self.between + self.margin
        self.figure.set_size_inches((left + count * (width + self.gap) + self.margin) / DPI, total / DPI, forward=False)
        for i, text in enumerate(titles):
            text.set(position=(left + i * (width + self.gap) + width / 2, total - top + self.gap), ha="center")
        styles = method_styles(block[0].name for block in blocks)
        labels = iter(texts)
        bottom = total - top
        for block, tall in zip(blocks, heights, strict=True):
            self.swatch(bottom - tall, tall, styles[block[0].name].color)
            for k, line in enumerate(block):
                low = bottom - height - k * (height + self.gap)
                self.label(low + height / 2, *next(labels))
                for i, image in enumerate(line.images):
                    self.figure.figimage(image, left + i * (width + self.gap), low, origin="upper")
            bottom -= tall + self.between

    def text(self, words: str, size: float, color: str = INK, **style: Any) -> Text:
        return self.figure.text(0, 0, words, size=size, color=color, transform=IdentityTransform(), **style)

    def width(self, text: Text) -> int:
        return math.ceil(text.get_window_extent(self.renderer).width) if text.get_text() else 0

    def height(self, text: Text) -> int:
        return math.ceil(text.get_window_extent(self.renderer).height) if text.get_text() else 0

    def label(self, middle: float, name: Text, note: Text) -> None:
        gap = self.gap + 2 if name.get_text() and note.get_text() else 0
        tall = self.height(name) + gap + self.height(note)
        name.set(position=(self.margin + self.indent, middle + tall / 2 - self.height(name)))
        note.set(position=(self.margin + self.indent, middle - tall / 2))

    def swatch(self, bottom: float, height: float, color: str) -> None:
        self.figure.add_artist(
            Rectangle((self.margin, bottom), 6, height, color=color, linewidth=0, transform=IdentityTransform())
        )


def _fit(image: np.ndarray, cell: int) -> np.ndarray:
    """Scale by a whole factor to about `cell` pixels of width and frame, as uint8."""
    image = np.asarray(image, np.float64)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an image has shape {image.shape}: expected [H, W, 3]")
    shrink = max(1, round(image.shape[1] / cell))
    height, width = (size // shrink for size in image.shape[:2])
    image = image[: height * shrink, : width * shrink].reshape(height, shrink, width, shrink, 3).mean((1, 3))
    grow = max(1, round(cell / width))
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8).repeat(grow, 0).repeat(grow, 1)
    # a frame, for pictures on white
    return np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=_FRAME)


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
    figure = constrained_figure(4.2 * columns, 0.3 + 2.7 * lines)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, (title, values) in zip(grid.flat, losses.items(), strict=False):
        _draw_losses(axes, title, np.asarray(values, np.float64))
    for axes in grid.flat[len(losses) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_ylabel(ylabel)
    return write_png(figure, path)


def _draw_losses(axes: Axes, title: str, values: np.ndarray) -> None:
    values = _positive(values)
    if not np.isfinite(values).any():
        raise ValueError(f"losses[{title!r}] has no positive finite value: expected one loss an optimiser step")
    steps = np.arange(1, len(values) + 1)
    # the median shrugs off the spikes of single prompts, which a mean would smear
    reach = max(1, len(values) // 30)
    median = np.array([_median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])
    axes.plot(steps, values, color=_CURVE, alpha=0.25, linewidth=0.7)
    axes.plot(steps, median, color=_CURVE, linewidth=1.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    note = f"median {median[0]:.3g} → {median[-1]:.3g}"
    axes.text(0.98, 0.95, note, transform=axes.transAxes, ha="right", va="top", fontsize=9, color=MUTED)
    axes.set_xlabel("optimiser step")
    axes.margins(x=0.02)
    tidy(axes)


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
    figure = constrained_figure(4.3 * len(panels), 1.5 + sum(heights))
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
    grid[1, 0].set_ylabel("computed", rotation=0, ha="right", va="center", fontsize=9, color=MUTED)
    if alphas:
        grid[2, 0].set_ylabel("alpha")
    lines = {str(line.get_label()): line for axes in grid.flat for line in axes.get_lines()}
    handles = [line for name, line in lines.items() if not name.startswith("_")]
    columns = min(len(handles), 3 * len(panels)) or 1
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    return write_png(figure, path)


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
    axes.set_title(panel.title, color=INK, fontsize=11, pad=30 if len(panel.stages) > 1 else 8)
    axes.set_xlim(-1, max((len(values) for values in panel.errors.values()), default=len(panel.sigmas)))
    tidy(axes)


def _draw_computed(axes: Axes, panel: StepPanel, styles: Mapping[str, MethodStyle]) -> None:
    for line, (name, steps) in enumerate(panel.computed.items()):
        axes.vlines(list(steps), line - 0.36, line + 0.36, color=styles[name].color, linewidth=2)
    axes.set_ylim(max(1, len(panel.computed)) - 0.4, -0.6)
    tidy(axes)
    axes.grid(False)
    axes.tick_params(left=False, labelleft=False, bottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_alphas(axes: Axes, panel: StepPanel, styles: Mapping[str, MethodStyle]) -> None:
    axes.axhline(0, color=MUTED, linewidth=0.8)
    for name, points in panel.alphas.items():
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, values, label=name, linewidth=1, markersize=3, **styles[name]._asdict())
    tidy(axes)


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
                color=MUTED,
            )


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else math.nan
