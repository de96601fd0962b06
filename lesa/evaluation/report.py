"""Curves of a training and of a comparison, drawn with matplotlib but without pyplot and its global state."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..plans.schedule import Stage, stage_of
from .grid import DPI, INK, MUTED, MethodStyle, method_grid, method_styles, tidy, write_png

__all__ = ["StepPanel", "loss_curves", "method_grid", "step_errors"]

_CURVE, _SHADE = "#D55E00", "#F1F1F1"


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
    figure = _figure(4.2 * columns, 0.3 + 2.7 * lines)
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
    figure = _figure(4.3 * len(panels), 1.5 + sum(heights))
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


def _figure(width: float, height: float) -> Figure:
    return Figure((width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else math.nan
