"""Pictures of plans: the schedule, weights and expected errors of one, and the fidelity of several over budgets."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..plans.plan import Plan
from ..plans.rows import ANY_CONTEXT, Expected, Row
from .plots import FAINT, INK, MUTED, constrained_figure, method_styles, tidy, write_png

if TYPE_CHECKING:
    from .compare import BudgetResult

_SHADE, _UNREAD = "#F1F1F1", "#E2E2E2"
_FIXED = "\u00a0"  # a space at which no line breaks
_UNTOLD = {"generations", "evaluations", "found", "schedule", "held_out", "seed"}  # of fitting: `lesa info` says it
_COLORS, _LINEAR = "RdBu_r", 0.05
_STRIP, _SQUARE, _ERRORS, _HEAD = 0.95, 4.2, 1.5, 0.9  # inches
_CURVES = 4  # baselines that a frontier shows


def plan_picture(path: str | os.PathLike[str], plan: Plan) -> Path:
    """Draw a plan into the PNG `path`, and return it; `plan_figure` says what it shows."""
    return write_png(plan_figure(plan), path)


def plan_figure(plan: Plan) -> Figure:
    """A plan: computed steps on the sigma axis, weights by context, expected errors where it carries them.

    Weights are coloured linearly up to about 0.05 and logarithmically beyond; grey cells are not read.
    """
    contexts = _contexts(plan)
    expected = {context: plan.expected_of(context) for context in contexts if plan.expected_of(context)}
    heights = [_STRIP, *([_SQUARE] if plan.rows else []), *([_ERRORS] if expected else [])]
    columns = max(1, len(contexts))
    figure = constrained_figure(max(7.0, 0.9 + 5.2 * columns), _HEAD + sum(heights) + 0.55 * len(heights))
    figure.suptitle(_title(plan), x=0.01, ha="left", fontsize=11, color=INK)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    _draw_schedule(figure.add_subplot(grid[0, :]), plan, figure.get_figwidth() - 1.4)
    if plan.rows:
        maps = [figure.add_subplot(grid[1, i]) for i in range(columns)]
        _draw_weights(figure, maps, plan, contexts)
    if expected:
        shared = None
        for i, context in enumerate(contexts):
            shared = figure.add_subplot(grid[len(heights) - 1, i], sharey=shared)
            _draw_errors(shared, plan, expected.get(context, {}), first=i == 0)
    return figure


def _contexts(plan: Plan) -> list[str]:
    contexts = list(dict.fromkeys([*plan.rows, *plan.expected]))
    named = [context for context in contexts if context != ANY_CONTEXT]
    # "*" beside named contexts has rows of its own to show only where some context has its own rows
    return contexts if not named or (ANY_CONTEXT in plan.rows and len(plan.rows) > 1) else named


def _title(plan: Plan) -> str:
    schedule = f"{plan.budget} of {plan.num_steps} steps computed"
    return f"{plan.forecaster} plan for {plan.denoiser or 'any denoiser'}: {schedule}"


def _draw_schedule(axes: Axes, plan: Plan, width: float) -> None:
    """Marks on the sigma axis, `width` inches long, with the numbers of the computed steps over them."""
    sigmas = np.asarray(plan.sigmas[:-1])
    computed = np.isin(np.arange(plan.num_steps), plan.computed)
    size = min(4.0, 0.6 * 72 * width / plan.num_steps)
    told = replace(plan, training={name: value for name, value in plan.training.items() if name not in _UNTOLD})
    facts = [f"site {plan.site}", *(f"{name} {value}" for name, value in told.figures())]
    # a letter is about 0.075 inches wide at this size; lines break between facts only
    words = textwrap.fill(f"{_FIXED}· ".join(fact.replace(" ", _FIXED) for fact in facts), int(width / 0.075))
    words = words.replace(f"{_FIXED}·\n", "\n").replace(_FIXED, " ")
    axes.set_title(words, loc="left", fontsize=9, color=MUTED, linespacing=1.4)
    _sigma_axis(axes, plan.sigmas)
    axes.plot(sigmas[~computed], np.zeros((~computed).sum()), "o", color="white", mec=MUTED, mew=size / 4, ms=size)
    axes.vlines(sigmas[computed], -0.5, 0.5, color=INK, linewidth=size / 2)
    for i in _apart(axes, sigmas[computed], [0.06 * len(str(step)) + 0.045 for step in plan.computed], width):
        axes.text(sigmas[computed][i], 0.95, str(plan.computed[i]), ha="center", va="center", fontsize=7.5, color=INK)
    axes.set_ylim(-1.4 if len(plan.stages) > 1 else -0.9, 1.4)
    axes.set_yticks([0.95, 0], ["step", "❙ computed\n○ forecast"], fontsize=9)
    axes.set_xlabel("sigma")
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.tick_params(axis="y", left=False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)
    _shade_stages(axes, plan)


def _sigma_axis(axes: Axes, sigmas: Sequence[float]) -> None:
    positive = [sigma for sigma in sigmas if sigma > 0]
    low, high = min(sigmas), max(sigmas)
    reach = 0.015 * (high - low) or 0.5
    axes.set_xlim(high + reach, low - reach)
    if positive and high > 2 and low >= 0:
        # variance-exploding sigmas span decades; the last one, 0, has no logarithm
        axes.set_xscale("symlog", linthresh=min(positive))
        axes.set_xlim(1.2 * high, low - 0.1 * min(positive))
        axes.set_xticks([tick for tick in axes.get_xticks() if tick >= 0])


def _apart(axes: Axes, places: np.ndarray, widths: Sequence[float], length: float) -> list[int]:
    """Which labels, `widths` inches wide, have room at their places on an axis of `length` inches, from the left."""
    scale = axes.get_xaxis().get_transform()
    start, end = scale.transform(np.asarray(axes.get_xlim(), np.float64))
    centers = (scale.transform(places.astype(np.float64)) - start) / (end - start) * length
    kept: list[int] = []
    for i, center in enumerate(centers):
        if not kept or abs(center - centers[kept[-1]]) >= (widths[i] + widths[kept[-1]]) / 2:
            kept.append(i)
    return kept


def _shade_stages(axes: Axes, plan: Plan) -> None:
    if len(plan.stages) < 2:
        return
    above = max(axes.get_xlim())
    for i, stage in enumerate(plan.stages):
        below = stage.low if i < len(plan.stages) - 1 else min(axes.get_xlim())
        if i % 2 == 0:
            axes.axvspan(above, below, color=_SHADE, linewidth=0, zorder=0)
        axes.text((above + below) / 2, -1.0, stage.name, ha="center", va="center", fontsize=8, color=MUTED)
        above = below


def _draw_weights(figure: Figure, maps: Sequence[Axes], plan: Plan, contexts: Sequence[str]) -> None:
    tables = [_weights(plan.rows_of(context), plan.num_steps) for context in contexts]
    reach = max((float(np.nanmax(np.abs(table))) for table in tables if np.isfinite(table).any()), default=0) or 1.0
    # linear near 0 only: the small weights that LESA gives to all but the last step are to be seen
    norm = AsinhNorm(linear_width=_LINEAR, vmin=-reach, vmax=reach)
    image: AxesImage | None = None
    for axes, table, context in zip(maps, tables, contexts, strict=True):
        image = axes.imshow(table, cmap=_COLORS, norm=norm, origin="lower", aspect="auto", interpolation="nearest")
        axes.set_facecolor(_UNREAD)
        size = min(3.5, 0.5 * 72 * _SQUARE / plan.num_steps)
        axes.plot(plan.computed, plan.computed, "s", color=INK, markersize=size, markeredgewidth=0)
        axes.set_xlabel("forecast step  (■ computed, grey: not read)")
        axes.set_title("all contexts" if context == ANY_CONTEXT else context, fontsize=10, color=INK)
        _step_axis(axes, plan)
        axes.yaxis.set_major_locator(_whole_numbers())
    maps[0].set_ylabel("step that is read")
    if image is not None:
        bar = figure.colorbar(image, ax=list(maps), label="weight", pad=0.02, aspect=30, ticks=_ticks(reach))
        bar.outline.set_visible(False)
        bar.ax.minorticks_off()
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda weight, _: f"{weight:g}"))
        bar.ax.tick_params(colors=MUTED, labelsize=9)


def _ticks(reach: float) -> list[float]:
    sizes = [size for size in (0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if size <= reach]
    return [*(-size for size in reversed(sizes)), 0, *sizes]


def _weights(rows: Mapping[int, Row], total: int) -> np.ndarray:
    """[step read, forecast step] of weights, NaN where nothing is read."""
    table = np.full((total, total), np.nan)
    for step, row in rows.items():
        for read, weight in zip(row.steps, row.weights, strict=True):
            # a row may name a step twice
            table[read, step] = weight + np.nan_to_num(table[read, step])
    return table


def _draw_errors(axes: Axes, plan: Plan, errors: Mapping[int, Expected], *, first: bool) -> None:
    steps = [step for step, expected in errors.items() if expected.error > 0]
    middle = np.array([errors[step].error for step in steps])
    times = np.exp([errors[step].std for step in steps])
    axes.fill_between(steps, middle / times, middle * times, color=FAINT)
    axes.plot(steps, middle, "o-", color=INK, markersize=4, linewidth=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{error:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("computed step")
    if first:
        axes.set_ylabel("expected relative\nerror, ± 1 std")
    axes.tick_params(labelleft=first)
    _step_axis(axes, plan)


def _step_axis(axes: Axes, plan: Plan) -> None:
    axes.set_xlim(-0.5, plan.num_steps - 0.5)
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.tick_params(colors=MUTED, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def frontier_figure(results: Sequence[BudgetResult], chosen: int | None = None) -> Figure:
    """PSNR against computed steps: the fitted plans on both kinds of prompts, and the best published baselines.

    Args:
        results: at least one.
        chosen: number of computed steps to mark.

    Raises:
        ValueError: `results` is empty.
    """
    if not results:
        raise ValueError("results is empty: give at least one budget")
    figure = constrained_figure(7.5, 4.6)
    axes = figure.subplots()
    names = _best_baselines(results)
    # the last word of a name, the forecaster, is what has a colour of its own
    keys = {name: re.sub(r"[, ]+", " ", f"{re.split('[^a-z0-9-]+', name.lower())[-1]} {name}") for name in names}
    styles = method_styles(["lesa", *keys.values()])
    ours = {**styles["lesa"]._asdict(), "markersize": 4.5}
    hollow = {"linestyle": "--", "markerfacecolor": "white", "linewidth": 1.2}
    _draw_curve(axes, [(r.computed, r.held_out_psnr) for r in results], "fitted, held-out prompts", linewidth=2, **ours)
    _draw_curve(axes, [(r.computed, r.fitting_psnr) for r in results], "fitted, fitting prompts", **ours, **hollow)
    for name in names:
        points = [(r.computed, r.baselines.get(name)) for r in results]
        _draw_curve(
            axes, points, f"{name}, fitting prompts", linewidth=1.2, markersize=4, **styles[keys[name]]._asdict()
        )
    _label_axes(axes, results)
    if chosen is not None:
        axes.axvline(chosen, color=INK, linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(
            f"{chosen} computed",
            (chosen, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=9,
            color=INK,
        )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _draw_curve(axes: Axes, points: Sequence[tuple[int, float | None]], label: str, **style: Any) -> None:
    known = [(computed, psnr) for computed, psnr in points if psnr is not None]
    if known:
        axes.plot(*zip(*known, strict=True), label=label, **style)


def _label_axes(axes: Axes, results: Sequence[BudgetResult]) -> None:
    total = results[0].computed / results[0].share
    axes.set_title("Fidelity of fitted plans by computed steps", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("computed steps")
    axes.set_ylabel("PSNR, dB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    above = axes.secondary_xaxis(
        "top", functions=(lambda x: np.multiply(x, 100 / total), lambda x: np.multiply(x, total / 100))
    )
    above.set_xlabel(f"share of the {total:.0f} denoiser calls, %", fontsize=9, color=MUTED)
    above.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    above.tick_params(colors=MUTED, labelsize=9)
    above.spines["top"].set_color(MUTED)
    tidy(axes)


def _best_baselines(results: Iterable[BudgetResult]) -> list[str]:
    """The few best baselines by mean PSNR."""
    figures: dict[str, list[float]] = {}
    for result in results:
        for name, psnr in result.baselines.items():
            figures.setdefault(name, []).append(psnr)
    return sorted(figures, key=lambda name: -sum(figures[name]) / len(figures[name]))[:_CURVES]
