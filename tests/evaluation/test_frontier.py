"""frontier: figures come from the plans, the choice is the smallest that reaches both, the picture shows them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lesa.evaluation.frontier import (
    BUDGETS,
    Entry,
    budgets_below,
    entries_of,
    frontier,
    frontier_figure,
    smallest,
    table,
    write,
)
from lesa.evaluation.grid import method_styles
from lesa.fitting import fit as fitting
from lesa.forecasters import plan_of
from lesa.plans.plan import Plan

STEPS = 20
SIGMAS = tuple(1 - t / STEPS for t in range(STEPS)) + (0.0,)
# not rising: at 6 the fit had bad luck with its held-out prompt
ENTRIES = [
    Entry(4, 0.2, 20.0, 21.0, 0.80, 0.82, "plan-4.safetensors", {"published schedule, taylor-1": 12.0}),
    Entry(5, 0.25, 26.0, 25.0, 0.88, 0.90, "plan-5.safetensors", {"published schedule, taylor-1": 15.0}),
    Entry(6, 0.3, 28.0, 23.0, 0.95, 0.86, "plan-6.safetensors", {"published schedule, taylor-1": 14.0}),
    Entry(9, 0.45, 33.0, 31.0, 0.97, 0.94, "plan-9.safetensors", {"published schedule, reuse": 11.0}),
]


def fitted(budget: int, **figures: Any) -> Plan:
    return plan_of("reuse", range(budget), SIGMAS, "output", training=figures)


def lines(figure: Figure) -> dict[str, Any]:
    """Label -> line of the axes of PSNR."""
    return {str(line.get_label()): line for line in figure.axes[0].get_lines()}


def points(line: Any) -> list[tuple[float, float]]:
    return [tuple(point) for point in np.asarray(line.get_xydata()).tolist()]


def test_entries_hold_what_fitting_measured() -> None:
    candidates = [["published schedule, taylor-1", 18.5], ["searched", 24.0], ["Paper, taylor-1", 17.0]]
    candidates += [["(0, 3, 7)", 23.0], ["Paper, taylor-1", 17.5], ["Paper, taylor-1", 16.0]]
    ten = fitted(10, fitting_psnr=25.5, held_out_psnr=24.5, fitting_ssim=0.9, held_out_ssim=0.8, candidates=candidates)
    first, second = entries_of({10: ten, 4: fitted(4, fitting_psnr=None, held_out_psnr=19.0)})
    assert first == Entry(4, 0.2, None, 19.0, None, None, "plan-4.safetensors")
    assert second == Entry(
        10, 0.5, 25.5, 24.5, 0.9, 0.8, "plan-10.safetensors",
        {"published schedule, taylor-1": 18.5, "Paper, taylor-1": 17.5},
    )  # fmt: skip
    assert (first.psnr, first.ssim) == (19.0, None)
    assert (second.psnr, second.ssim) == (24.5, 0.8)
    assert Entry(3, 0.5, fitting_psnr=2.0, held_out_psnr=3.0).psnr == 2.0


@pytest.mark.parametrize(
    ("wish", "budget"),
    [
        ({"psnr": 20.0}, 4),
        ({"psnr": 20.1}, 5),
        ({"psnr": 25.0}, 5),
        ({"psnr": 25.1}, 9),
        ({"psnr": 31.0}, 9),
        ({"ssim": 0.88}, 5),
        ({"ssim": 0.89}, 9),
        ({"psnr": 18.0, "ssim": 0.85}, 5),
        ({"psnr": 25.1, "ssim": 0.1}, 9),
    ],
)
def test_smallest(wish: dict[str, float], budget: int) -> None:
    assert smallest(ENTRIES, **wish) == budget
    assert smallest(ENTRIES[::-1], **wish) == budget, "the order of the entries is not to matter"


def test_smallest_goes_by_what_is_known() -> None:
    entries = [Entry(4, 0.2), Entry(5, 0.25, fitting_psnr=30.0), Entry(6, 0.3, held_out_psnr=40.0)]
    assert smallest(entries, psnr=29) == 5
    assert smallest(entries, psnr=31) == 6


@pytest.mark.parametrize(
    ("entries", "wish", "message"),
    [
        (ENTRIES, {}, r"psnr=None, ssim=None: give the PSNR or the SSIM"),
        (
            ENTRIES,
            {"psnr": 31.5},
            r"psnr=31.5: no budget reaches it; the best is 31 at 9 computed steps; wish for less",
        ),
        (ENTRIES[:3], {"ssim": 0.9}, r"ssim=0.9: no budget reaches it; the best is 0.88 at 5 computed steps"),
        (ENTRIES, {"psnr": float("nan")}, r"psnr=nan: no budget reaches it"),
        ([Entry(4, 0.2, 20.0)], {"psnr": 10.0, "ssim": 0.5}, r"ssim=0.5: the frontier has no SSIM"),
        ([], {"psnr": 10.0}, r"psnr=10: the frontier has no PSNR"),
        (
            [Entry(4, 0.2, 30.0, fitting_ssim=0.5), Entry(5, 0.25, 20.0, fitting_ssim=0.9)],
            {"psnr": 25.0, "ssim": 0.8},
            r"psnr=25, ssim=0.8: no budget reaches both",
        ),
    ],
    ids=["nothing", "psnr", "ssim", "nan", "no ssim", "empty", "both"],
)
def test_smallest_says_how_far_the_best_gets(entries: list[Entry], wish: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smallest(entries, **wish)


def test_budgets_below() -> None:
    assert budgets_below(50) == list(range(4, 26)) == list(BUDGETS)
    assert budgets_below(8) == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="num_steps=4: a frontier begins at 4 computed steps; name the budgets"):
        budgets_below(4)


def test_table(tmp_path: Path) -> None:
    heading, first, *_, last = table([*ENTRIES, Entry(10, 0.5, None, 32.0, plan="plan-10.safetensors")], "out").split(
        "\n"
    )
    assert heading.split() == ["computed", "share", "published", "fitting", "held", "out", "SSIM", "plan"]
    assert first.split() == ["4", "20%", "12.00", "20.00", "21.00", "0.8000", str(Path("out/plan-4.safetensors"))]
    assert last.split() == ["10", "50%", "-", "-", "32.00", "-", str(Path("out/plan-10.safetensors"))]
    assert heading.index("plan") == first.index("out/") == last.index("out/"), "columns are to be aligned"


def test_frontier_fits_and_writes(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[Any] = []
    real = inspect.signature(fitting.fit)

    def made(budget: int) -> Plan:
        return fitted(min(budget, STEPS), fitting_psnr=10.0 + budget, held_out_psnr=9.0 + budget)

    def fit(*arguments: Any, **options: Any) -> dict[int, Plan]:
        real.bind(*arguments, **options)
        asked.append((arguments, options))
        return {b: made(b) for b in options["budget"]}

    monkeypatch.setattr(fitting, "fit", fit)
    request = {"num_inference_steps": STEPS}
    out = tmp_path / "new" / "folder"
    entries = frontier("pipe", ["snow"], str(out), budgets=(8, 5), request=request, effort="quick")
    options = {"budget": [8, 5], "folder": out, "request": request, "effort": "quick"}
    assert asked == [(("pipe", ["snow"]), options)]
    assert [(e.computed, e.fitting_psnr, e.held_out_psnr) for e in entries] == [(5, 15.0, 14.0), (8, 18.0, 17.0)]
    assert sorted(path.name for path in out.iterdir()) == ["frontier.json", "frontier.png"]
    assert [Entry(**row) for row in json.loads((out / "frontier.json").read_text())] == entries

    frontier("pipe", None, out, requests=[print])
    assert asked[1] == (("pipe", None), {"budget": list(range(4, 26)), "folder": out, "requests": [print]})


def test_written_files(tmp_path: Path) -> None:
    write(tmp_path, ENTRIES)
    row = json.loads((tmp_path / "frontier.json").read_text())[1]
    assert row == {
        "computed": 5,
        "share": 0.25,
        "fitting_psnr": 26.0,
        "held_out_psnr": 25.0,
        "fitting_ssim": 0.88,
        "held_out_ssim": 0.90,
        "plan": "plan-5.safetensors",
        "baselines": {"published schedule, taylor-1": 15.0},
    }
    unmarked = (tmp_path / "frontier.png").read_bytes()
    write(tmp_path, ENTRIES)
    assert (tmp_path / "frontier.png").read_bytes() == unmarked, "equal pictures are to be equal files"
    write(tmp_path, ENTRIES, 5)
    assert (tmp_path / "frontier.png").read_bytes() != unmarked
    with Image.open(tmp_path / "frontier.png") as image:
        assert image.format == "PNG" and min(image.size) > 500


def test_the_picture_shows_the_figures() -> None:
    drawn = lines(frontier_figure(ENTRIES))
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
    drawn = lines(frontier_figure([Entry(4, 0.1, 30.0, 29.0, baselines={**baselines, "published, taylor-1": 9.0})]))
    names = [label.removesuffix(", fitting prompts") for label in drawn][2:]
    assert names == ["published, taylor-1", "paper, lesa", "paper, taylor-1", "paper, taylor-2"]
    assert len({line.get_color() for line in drawn.values()}) == 5, "the fitted plan's two lines share theirs"


def test_the_picture_marks_the_choice_and_shares() -> None:
    figure = frontier_figure(ENTRIES, 9)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["9 computed"]
    assert axes.texts[0].xy[0] == 9
    [above] = axes.child_axes
    assert above.get_xlabel() == "share of the 20 denoiser calls, %"
    FigureCanvasAgg(figure).draw()
    low, high = axes.get_xlim()
    assert above.get_xlim() == pytest.approx((5 * low, 5 * high))
    assert not frontier_figure(ENTRIES).axes[0].texts


def test_the_picture_leaves_out_what_is_unknown() -> None:
    drawn = lines(frontier_figure([Entry(4, 0.2, None, 21.0), Entry(5, 0.25), Entry(6, 0.3, None, 24.0)]))
    assert {label: points(line) for label, line in drawn.items()} == {"fitted, held-out prompts": [(4, 21), (6, 24)]}
    with pytest.raises(ValueError, match="entries is empty: give at least one budget"):
        frontier_figure([])


def test_drawing_touches_nothing_global(tmp_path: Path) -> None:
    script = (
        "import sys, matplotlib\n"
        # reading the backend would choose one, and load pyplot
        "style = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = style()\n"
        "from lesa.frontier import Entry, write\n"
        f"write({str(tmp_path)!r}, [Entry(4, 0.2, 20.0, 21.0)])\n"
        "assert style() == before\n"
        "assert not {'matplotlib.pyplot', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
