"""plan_plots: what the pictures show is what the plans hold."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import lesa
from lesa import assets
from lesa.evaluation.compare import BudgetResult
from lesa.evaluation.plan_plots import frontier_figure, plan_figure, plan_picture
from lesa.evaluation.plots import method_styles
from lesa.plans.plan import Plan
from lesa.plans.rows import Expected, Row
from lesa.plans.schedule import PAPER_STAGES

SIGMAS = (1.0, 0.9, 0.7, 0.4, 0.1, 0.0)
ROWS = {2: Row((0, 1), (-1.0, 2.0)), 4: Row((0, 2, 3, 3), (0.25, -0.5, 1.0, 0.5))}
PLAN = Plan((0, 1, 3), SIGMAS, {"*": ROWS})
# [step read, forecast step], by hand; step 4 reads step 3 twice
TABLE = np.full((5, 5), np.nan)
TABLE[[0, 1, 0, 2, 3], [2, 2, 4, 4, 4]] = -1.0, 2.0, 0.25, -0.5, 1.5
GUIDED = replace(
    PLAN,
    rows={"cond": ROWS, "uncond": {2: Row((1,), (1.0,)), 4: Row((3,), (4.0,))}},
    checks={"*": {3: Row((1,), (1.0,))}},
    expected={"*": {3: Expected(0.125, 0.5)}},
)


def spread(steps: int, sigmas: Any, every: int = 1) -> Plan:
    """A plan that computes the first four steps and every `every`-th, and reuses the last computed one."""
    computed = [step for step in range(steps) if step < 4 or step % every == 0]
    rows = {t: Row((max(s for s in computed if s < t),), (1.0,)) for t in range(steps) if t not in computed}
    return Plan(tuple(computed), (*sigmas, 0.0), {"*": rows} if rows else {})


def schedule_of(figure: Figure) -> Axes:
    return figure.axes[0]


def heat_maps(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.images]


def drawn(figure: Figure) -> Any:
    """Lay the figure out, and return what measures texts in it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def test_computed_steps_are_marked_at_their_sigmas() -> None:
    axes = schedule_of(plan_figure(PLAN))
    [marks] = axes.collections
    assert [segment[0][0] for segment in marks.get_segments()] == [1.0, 0.9, 0.4]
    [forecast] = axes.lines
    assert list(forecast.get_xdata()) == [0.7, 0.1]
    assert {text.get_text(): text.get_position()[0] for text in axes.texts} == {"0": 1.0, "1": 0.9, "3": 0.4}
    high, low = axes.get_xlim()
    assert high > 1 and low < 0, "noise is to fall from left to right"


def test_weights_are_where_they_are_read_and_zero_is_the_middle() -> None:
    [axes] = heat_maps(plan_figure(PLAN))
    [image] = axes.images
    assert np.array_equal(image.get_array().filled(np.nan), TABLE, equal_nan=True)
    assert image.norm(0.0) == 0.5
    assert (image.norm(2.0), image.norm(-2.0)) == (1.0, 0.0)
    red, _, blue, _ = image.cmap(image.norm(1.5))
    assert red > blue, "positive weights are to be red"
    assert axes.get_title() == "all contexts"
    [diagonal] = axes.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1, 3]


def test_each_context_has_its_panel_on_one_scale() -> None:
    figure = plan_figure(GUIDED)
    cond, uncond = heat_maps(figure)
    assert [cond.get_title(), uncond.get_title()] == ["cond", "uncond"]
    assert cond.images[0].norm(4.0) == uncond.images[0].norm(4.0) == 1.0
    assert uncond.images[0].get_array()[3, 4] == 4.0
    errors = [axes for axes in figure.axes if axes.get_yscale() == "log"]
    assert len(errors) == 2
    for axes in errors:
        assert axes.lines[0].get_xydata().tolist() == [[3, 0.125]]


@pytest.mark.parametrize(
    ("rows", "expected", "titles"),
    [
        ({"*"}, (), ["all contexts"]),
        ({"*"}, ("cond", "uncond"), ["cond", "uncond"]),
        (("cond", "*"), ("cond",), ["cond", "all contexts"]),
        (("cond", "uncond"), ("*",), ["cond", "uncond"]),
    ],
)
def test_panels_are_the_contexts_that_differ(rows: Any, expected: Any, titles: list[str]) -> None:
    plan = replace(
        PLAN,
        rows=dict.fromkeys(rows, ROWS),
        checks={"*": {3: Row((1,), (1.0,))}},
        expected=dict.fromkeys(expected, {3: Expected(0.1, 0.5)}),
    )
    assert [axes.get_title() for axes in heat_maps(plan_figure(plan))] == titles


def test_what_a_plan_does_not_carry_is_not_drawn() -> None:
    assert len(plan_figure(PLAN).axes) == 3  # schedule, weights, colour bar
    assert len(plan_figure(Plan((0, 1, 2, 3, 4), SIGMAS)).axes) == 1
    nothing = replace(PLAN, rows={"*": dict.fromkeys((2, 4), Row((0,), (0.0,)))})
    [axes] = heat_maps(plan_figure(nothing))
    assert axes.images[0].norm(0.0) == 0.5


def test_the_figure_tells_name_and_figures() -> None:
    plan = replace(PLAN, denoiser="Tiny", forecaster="regression", training={"effort": "quick", "held_out_psnr": 31.0})
    figure = plan_figure(plan)
    assert figure.get_suptitle() == "regression plan for Tiny: 3 of 5 steps computed"
    assert schedule_of(figure).get_title(loc="left") == "site hidden · effort quick · held out 31.00 dB PSNR"


LINEAR = np.linspace(1, 1 / 50, 50)


@pytest.mark.parametrize(
    "plan",
    [
        spread(50, LINEAR, 5),
        spread(50, 3 * LINEAR / (1 + 2 * LINEAR), 5),
        spread(200, np.linspace(1, 1 / 200, 200), 3),
        spread(30, np.geomspace(14.6, 0.03, 30), 4),
        spread(50, LINEAR),
        spread(4, (1.0, 0.75, 0.5, 0.25)),
    ],
    ids=["flux", "shifted", "200", "exploding", "full", "schnell"],
)
def test_numbers_of_steps_do_not_overlap(plan: Plan) -> None:
    figure = plan_figure(plan)
    renderer = drawn(figure)
    axes = schedule_of(figure)
    texts = [text for text in axes.texts if text.get_text().isdigit()]
    assert len(texts) >= min(4, plan.budget)
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert not [1 for a, b in combinations(boxes, 2) if a.overlaps(b)]
    frame = axes.get_window_extent(renderer)
    marks = axes.collections[0].get_segments()
    assert all(frame.x0 <= axes.transData.transform(mark[0])[0] <= frame.x1 for mark in marks)
    ticks = [label.get_window_extent(renderer) for label in axes.get_xticklabels() if label.get_text()]
    assert all(tick >= 0 for tick in axes.get_xticks() if axes.get_xscale() == "symlog")
    assert not [1 for a, b in combinations(ticks, 2) if a.overlaps(b)]


def test_stages_are_named_between_their_sigmas() -> None:
    axes = schedule_of(plan_figure(replace(PLAN, stages=PAPER_STAGES)))
    places = {text.get_text(): text.get_position()[0] for text in axes.texts}
    assert 0.9 < places["high"] < 1.1 and 0.5 < places["middle"] < 0.9 and 0 < places["low"] < 0.5


def test_a_bundled_plan_is_drawn(tmp_path: Path) -> None:
    path = plan_picture(tmp_path / "new" / "plan.png", Plan.load(assets.plan_path(7)))
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red = (pixels[..., 0] > pixels[..., 2] + 60).mean()
    blue = (pixels[..., 2] > pixels[..., 0] + 30).mean()
    assert min(red, blue) > 0.005, "the weights are not to be seen"


def test_equal_plans_are_equal_files_and_pyplot_is_left_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    plan = assets.plan_path(5)
    script = (
        "import sys, warnings\n"
        "from lesa.plans.plan import Plan\nfrom lesa.evaluation.plan_plots import plan_picture\n"
        "warnings.simplefilter('error')\n"
        f"plan_picture({str(first)!r}, Plan.load({str(plan)!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=Path(lesa.__file__).parents[1])
    plan_picture(second, Plan.load(plan))
    assert first.read_bytes() == second.read_bytes()


# Several plans

# not rising: at 6 the fit had bad luck with its held-out prompt
RESULTS = [
    BudgetResult(4, 0.2, 20.0, 21.0, 0.80, 0.82, "plan-4.safetensors", {"published schedule, taylor-1": 12.0}),
    BudgetResult(5, 0.25, 26.0, 25.0, 0.88, 0.90, "plan-5.safetensors", {"published schedule, taylor-1": 15.0}),
    BudgetResult(6, 0.3, 28.0, 23.0, 0.95, 0.86, "plan-6.safetensors", {"published schedule, taylor-1": 14.0}),
    BudgetResult(9, 0.45, 33.0, 31.0, 0.97, 0.94, "plan-9.safetensors", {"published schedule, reuse": 11.0}),
]


def lines(figure: Figure) -> dict[str, Any]:
    """Label -> line of the axes of PSNR."""
    return {str(line.get_label()): line for line in figure.axes[0].get_lines()}


def points(line: Any) -> list[tuple[float, float]]:
    return [tuple(point) for point in np.asarray(line.get_xydata()).tolist()]


def test_the_picture_shows_the_figures() -> None:
    drawn = lines(frontier_figure(RESULTS))
    assert {label: points(line) for label, line in drawn.items()} == {
        "fitted, held-out prompts": [(4, 21), (5, 25), (6, 23), (9, 31)],
        "fitted, fitting prompts": [(4, 20), (5, 26), (6, 28), (9, 33)],
        "published schedule, taylor-1, fitting prompts": [(4, 12), (5, 15), (6, 14)],
        "published schedule, reuse, fitting prompts": [(9, 11)],
    }
    colors = {label.rpartition(", ")[0]: line.get_color() for label, line in drawn.items()}
    assert colors["fitted"] == method_styles(["lesa"])["lesa"].color
    for name in ("taylor-1", "reuse"):
        assert colors[f"published schedule, {name}"] == method_styles([name])[name].color


def test_baselines_have_colours_of_their_own_and_only_the_best_are_drawn() -> None:
    baselines = {f"paper, {name}": float(i) for i, name in enumerate(("reuse", "taylor-2", "taylor-1", "lesa"))}
    drawn = lines(
        frontier_figure([BudgetResult(4, 0.1, 30.0, 29.0, baselines={**baselines, "published, taylor-1": 9.0})])
    )
    names = [label.removesuffix(", fitting prompts") for label in drawn][2:]
    assert names == ["published, taylor-1", "paper, lesa", "paper, taylor-1", "paper, taylor-2"]
    assert len({line.get_color() for line in drawn.values()}) == 5, "the fitted plan's two lines share theirs"


def test_the_picture_marks_the_choice_and_shares() -> None:
    figure = frontier_figure(RESULTS, 9)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["9 computed"]
    assert axes.texts[0].xy[0] == 9
    [above] = axes.child_axes
    assert above.get_xlabel() == "share of the 20 denoiser calls, %"
    FigureCanvasAgg(figure).draw()
    low, high = axes.get_xlim()
    assert above.get_xlim() == pytest.approx((5 * low, 5 * high))
    assert not frontier_figure(RESULTS).axes[0].texts


def test_the_picture_leaves_out_what_is_unknown() -> None:
    drawn = lines(
        frontier_figure([BudgetResult(4, 0.2, None, 21.0), BudgetResult(5, 0.25), BudgetResult(6, 0.3, None, 24.0)])
    )
    assert {label: points(line) for label, line in drawn.items()} == {"fitted, held-out prompts": [(4, 21), (6, 24)]}
    with pytest.raises(ValueError, match="results"):
        frontier_figure([])
