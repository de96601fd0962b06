"""The frontier: how near the pictures come to the full request's at each budget, and the smallest that will do."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from ..plans.files import replace_file
from ..plans.plan import Plan
from .grid import DPI, INK, MUTED, method_styles, tidy, write_png

BUDGETS = range(4, 26)
_PUBLISHED = re.compile("published|paper", re.IGNORECASE)
_CURVES = 4


@dataclass(frozen=True)
class Entry:
    """What a fit reached at one budget.

    Args:
        computed: steps that the plan computes.
        share: of the denoiser calls of a full request.
        fitting_psnr: dB, mean over the prompts that were fitted to; None where the plan was not run on them.
        held_out_psnr: dB, mean over the prompts that were held out; None where there are none.
        fitting_ssim, held_out_ssim: likewise; None also where no pictures are made.
        plan: the plan's file, relative to the folder of frontier.json.
        baselines: PSNR on the fitting prompts of what is published, by name, where it was run.
    """

    computed: int
    share: float
    fitting_psnr: float | None = None
    held_out_psnr: float | None = None
    fitting_ssim: float | None = None
    held_out_ssim: float | None = None
    plan: str = ""
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def psnr(self) -> float | None:
        """The lower of both: fitting flatters, and the held-out prompts are few."""
        return min(_known(self.fitting_psnr, self.held_out_psnr), default=None)

    @property
    def ssim(self) -> float | None:
        """The lower of both, as `psnr`."""
        return min(_known(self.fitting_ssim, self.held_out_ssim), default=None)


def frontier(
    target: Any,
    prompts: Sequence[str] | None,
    folder: str | os.PathLike[str],
    *,
    budgets: Sequence[int] = BUDGETS,
    **options: Any,
) -> list[Entry]:
    """Fit a plan for every budget, and write frontier.json and frontier.png beside the plans.

    Args:
        target: a diffusers pipeline, or a bare denoiser in a loop of your own.
        prompts: to fit to; None where `requests` are given.
        folder: of the statistics, the plans and the frontier; plans that lie there already are not fitted again.
        budgets: numbers of computed steps.
        options: further arguments of `lesa.fit`, e.g. request={"num_inference_steps": 50}, effort="quick".

    Returns:
        An entry for each budget, the smallest first.
    """
    # not at the top: reading, drawing and choosing need no pipeline
    from ..fitting import fit as fitting

    plans = fitting.fit(target, prompts, budget=list(budgets), folder=Path(folder), **options)
    entries = entries_of(plans)
    write(folder, entries)
    return entries


def budgets_below(num_steps: int) -> list[int]:
    """The budgets of a frontier, 4 to 25, for a request of `num_steps`: those that leave something to forecast."""
    budgets = [budget for budget in BUDGETS if budget < num_steps]
    if not budgets:
        raise ValueError(f"num_steps={num_steps}: a frontier begins at {BUDGETS[0]} computed steps; name the budgets")
    return budgets


def entries_of(plans: Mapping[int, Plan]) -> list[Entry]:
    """The entries of fitted plans by budget, the smallest first; figures are those that fitting measured."""
    names = ("fitting_psnr", "held_out_psnr", "fitting_ssim", "held_out_ssim")
    entries = []
    for budget, plan in sorted(plans.items()):
        baselines: dict[str, float] = {}
        for name, psnr in plan.training.get("candidates", ()):
            if _PUBLISHED.search(name):
                baselines[name] = max(psnr, baselines.get(name, -math.inf))
        figures = {name: plan.training.get(name) for name in names}
        # the name under which `lesa.fit` keeps it
        file = f"plan-{budget}.safetensors"
        entries.append(Entry(plan.budget, plan.budget / plan.num_steps, **figures, plan=file, baselines=baselines))
    return entries


def smallest(entries: Iterable[Entry], psnr: float | None = None, ssim: float | None = None) -> int:
    """The smallest budget that reaches what is wished, on fitting and on held-out prompts.

    Args:
        entries: of a frontier.
        psnr: in dB.
        ssim: with `psnr` too, both are to be reached.

    Raises:
        ValueError: nothing is wished, or no budget reaches it; the message says how far the best gets.
    """
    entries = sorted(entries, key=lambda entry: entry.computed)
    wishes = {name: wish for name, wish in (("psnr", psnr), ("ssim", ssim)) if wish is not None}
    if not wishes:
        raise ValueError("psnr=None, ssim=None: give the PSNR or the SSIM that is wished")
    reaching = entries
    for name, wish in wishes.items():
        known = [(getattr(entry, name), entry) for entry in entries if getattr(entry, name) is not None]
        if not known:
            raise ValueError(f"{name}={wish:g}: the frontier has no {name.upper()}; wish for another figure")
        figure, best = max(known, key=lambda pair: pair[0])
        if not figure >= wish:
            raise ValueError(
                f"{name}={wish:g}: no budget reaches it; the best is {figure:.4g} at {best.computed} computed steps; "
                "wish for less, or fit larger budgets or with more effort"
            )
        reaching = [entry for figure, entry in known if figure >= wish and entry in reaching]
    if not reaching:
        raise ValueError(f"psnr={psnr:g}, ssim={ssim:g}: no budget reaches both; wish for less, or fit larger budgets")
    return reaching[0].computed


def table(entries: Iterable[Entry], folder: str | os.PathLike[str] = ".") -> str:
    """The entries as text: PSNR of the best published baseline (on the fitting prompts) and of the plan, its SSIM."""
    lines = [f"{'computed':>8} {'share':>6} {'published':>10} {'fitting':>8} {'held out':>9} {'SSIM':>7}  plan"]
    for entry in entries:
        best = max(entry.baselines.values(), default=None)
        decibels = f"{_shown(best):>10} {_shown(entry.fitting_psnr):>8} {_shown(entry.held_out_psnr):>9}"
        start = f"{entry.computed:>8} {entry.share:>6.0%} {decibels} {_shown(entry.ssim, '.4f'):>7}"
        lines.append(f"{start}  {Path(folder) / entry.plan}")
    return "\n".join(lines)


def write(folder: str | os.PathLike[str], entries: Sequence[Entry], chosen: int | None = None) -> None:
    """Write frontier.json, a list of `Entry` as objects, and frontier.png, which marks `chosen`, into `folder`."""
    replace_file(Path(folder) / "frontier.json", json.dumps([asdict(entry) for entry in entries], indent=1).encode())
    write_png(frontier_figure(entries, chosen), Path(folder) / "frontier.png")


def frontier_figure(entries: Sequence[Entry], chosen: int | None = None) -> Figure:
    """PSNR against computed steps: the fitted plans on both kinds of prompts, and the best published baselines.

    Args:
        entries: at least one.
        chosen: number of computed steps to mark.

    Raises:
        ValueError: `entries` is empty.
    """
    if not entries:
        raise ValueError("entries is empty: give at least one budget")
    figure = Figure((7.5, 4.6), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    axes = figure.subplots()
    names = _drawn(entries)
    # the last word of a name, the forecaster, is what has a colour of its own
    keys = {name: re.sub(r"[, ]+", " ", f"{re.split('[^a-z0-9-]+', name.lower())[-1]} {name}") for name in names}
    styles = method_styles(["lesa", *keys.values()])
    ours = {**styles["lesa"]._asdict(), "markersize": 4.5}
    hollow = {"linestyle": "--", "markerfacecolor": "white", "linewidth": 1.2}
    _draw(axes, [(e.computed, e.held_out_psnr) for e in entries], "fitted, held-out prompts", linewidth=2, **ours)
    _draw(axes, [(e.computed, e.fitting_psnr) for e in entries], "fitted, fitting prompts", **ours, **hollow)
    for name in names:
        points = [(e.computed, e.baselines.get(name)) for e in entries]
        _draw(axes, points, f"{name}, fitting prompts", linewidth=1.2, markersize=4, **styles[keys[name]]._asdict())
    _finish(axes, entries)
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


def _draw(axes: Axes, points: Sequence[tuple[int, float | None]], label: str, **style: Any) -> None:
    known = [(computed, psnr) for computed, psnr in points if psnr is not None]
    if known:
        axes.plot(*zip(*known, strict=True), label=label, **style)


def _finish(axes: Axes, entries: Sequence[Entry]) -> None:
    total = entries[0].computed / entries[0].share
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


def _drawn(entries: Iterable[Entry]) -> list[str]:
    """The few best baselines by mean PSNR."""
    figures: dict[str, list[float]] = {}
    for entry in entries:
        for name, psnr in entry.baselines.items():
            figures.setdefault(name, []).append(psnr)
    return sorted(figures, key=lambda name: -sum(figures[name]) / len(figures[name]))[:_CURVES]


def _known(*figures: float | None) -> list[float]:
    return [figure for figure in figures if figure is not None]


def _shown(figure: float | None, form: str = ".2f") -> str:
    return "-" if figure is None else f"{figure:{form}}"
