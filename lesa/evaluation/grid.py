"""The colours of methods, and a grid of images: methods down, prompts across."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform

INK, MUTED, FAINT = "#222222", "#666666", "#DDDDDD"
DPI = 150
_FRAME = 0xDD


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


def write_png(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Draw `figure` into a PNG, making its folder if there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    # no version of matplotlib in the file, so that equal pictures are equal files
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
    return path


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
    return write_png(_Grid(rows, images, column_titles).figure, path)


class _Grid:
    """A layout in whole pixels: resampled axes would blur small images."""

    gap, margin, heading, indent = 8, 24, 56, 18

    def __init__(
        self,
        rows: Sequence[tuple[str, Sequence[np.ndarray]]],
        images: Sequence[np.ndarray],
        column_titles: Sequence[str],
    ) -> None:
        self.figure = Figure(dpi=DPI)
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        count, height, width = images[0].shape[:3]
        labels = [label.split("\n") for label, _ in rows]
        names = [self.text(lines[0], 11, weight="bold") for lines in labels]
        notes = [self.text("\n".join(lines[1:]), 9, color=MUTED, linespacing=1.35) for lines in labels]
        # a letter is about 9 pixels wide at this size
        titles = [self.text(textwrap.fill(t, max(8, width // 9)), 8, color=MUTED) for t in column_titles[:count]]
        left = self.margin + self.indent + max(self.width(text) for text in (*names, *notes)) + self.margin
        top = self.margin + max((self.height(text) for text in titles), default=0) + self.gap
        total = top + sum(height + self.gap if len(row) else self.heading for _, row in rows) + self.margin
        self.figure.set_size_inches((left + count * (width + self.gap) + self.margin) / DPI, total / DPI, forward=False)
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

    def text(self, words: str, size: float, color: str = INK, **style: Any) -> Text:
        return self.figure.text(0, 0, words, size=size, color=color, transform=IdentityTransform(), **style)

    def width(self, text: Text) -> int:
        return math.ceil(text.get_window_extent(self.renderer).width) if text.get_text() else 0

    def height(self, text: Text) -> int:
        return math.ceil(text.get_window_extent(self.renderer).height) if text.get_text() else 0

    def label(self, middle: float, name: Text, note: Text) -> None:
        below = self.height(note) + self.gap if note.get_text() else 0
        name.set(position=(self.margin + self.indent, middle + (below - self.height(name)) / 2))
        note.set(position=(self.margin + self.indent, middle - (below + self.height(name)) / 2))

    def swatch(self, bottom: float, height: float, color: str) -> None:
        self.figure.add_artist(
            Rectangle((self.margin, bottom), 6, height, color=color, linewidth=0, transform=IdentityTransform())
        )


def tidy(axes: Axes) -> None:
    """The look that all axes share: a faint grid behind, no frame above and at the right."""
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


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
