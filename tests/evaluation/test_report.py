"""report: every picture is drawn, its pixels are where they belong, and nothing global is touched."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lesa.evaluation.grid import method_styles
from lesa.evaluation.report import StepPanel, loss_curves, method_grid, step_errors
from lesa.plans.schedule import ONE_STAGE, PAPER_STAGES

STEPS = 20
COMPUTED = (0, 1, 2, 3, 7, 12, 17)
INK = 100


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels.min(-1) < INK).sum() > 100, "the picture is blank"
    return pixels


def panel(**changes) -> StepPanel:
    random = np.random.default_rng(3)
    errors = {name: 0.01 + random.random(STEPS) for name in ("reuse", "taylor-1", "lesa")}
    return StepPanel(
        **{
            "title": "N = 5",
            "sigmas": np.linspace(1, 0, STEPS + 1),
            "errors": errors,
            "computed": dict.fromkeys(errors, COMPUTED),
            "alphas": {"lesa": [(t, 0.1) for t in range(STEPS) if t not in COMPUTED]},
            "stages": PAPER_STAGES,
        }
        | changes
    )


def images(count: int, size: int = 8, seed: int = 5) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).random((count, size, size, 3)))


def color(name: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(method_styles([name])[name].color[1:]))


def holds(pixels: np.ndarray, name: str) -> bool:
    return bool((pixels == color(name)).all(-1).any())


def test_loss_curves_one_row_and_wrapped(tmp_path):
    losses = {f"stage {i}": np.exp(-np.arange(60) / 20) for i in range(4)}
    flat = read(loss_curves(tmp_path / "new" / "flat.png", losses, columns=4))
    wrapped = read(loss_curves(tmp_path / "wrapped.png", losses, columns=2))
    assert flat.shape[1] == 2 * wrapped.shape[1] > flat.shape[0]
    assert wrapped.shape[0] > 1.5 * flat.shape[0]


@pytest.mark.parametrize("losses", [[0.5], [0.3, 0.0, float("nan"), 0.1], [0.031, 0.032, 0.033]])
def test_loss_curves_of_few_zero_or_flat_losses(tmp_path, losses):
    read(loss_curves(tmp_path / "loss.png", {"guided": losses}))


@pytest.mark.parametrize(
    "losses, message", [({}, "losses is empty"), ({"guided": []}, "'guided'.*no positive"), ({"g": [0.0]}, "'g'")]
)
def test_loss_curves_refuses_what_it_cannot_draw(tmp_path, losses, message):
    with pytest.raises(ValueError, match=message):
        loss_curves(tmp_path / "loss.png", losses)


def test_step_errors_of_three_intervals(tmp_path):
    one = read(step_errors(tmp_path / "one.png", [panel()]))
    three = read(step_errors(tmp_path / "three.png", [panel(), panel(title="N = 7"), panel(title="N = 10")]))
    assert three.shape[1] == pytest.approx(3 * one.shape[1], abs=3)
    assert all(holds(three, name) for name in ("reuse", "taylor-1", "lesa"))


@pytest.mark.parametrize("changes", [{"alphas": {}}, {"computed": {}}, {"stages": ONE_STAGE}, {"stages": ()}])
def test_step_errors_without_some_of_it(tmp_path, changes):
    read(step_errors(tmp_path / "steps.png", [panel(**changes)]))


def test_step_errors_has_no_alpha_axes_without_alphas(tmp_path):
    with_alphas = read(step_errors(tmp_path / "with.png", [panel()]))
    without = read(step_errors(tmp_path / "without.png", [panel(alphas={})]))
    assert without.shape[0] < 0.85 * with_alphas.shape[0]


def test_step_errors_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match="panels is empty"):
        step_errors(tmp_path / "steps.png", [])
    with pytest.raises(ValueError, match=r"errors\['reuse'\] has 3 entries for 21 sigmas"):
        panel(errors={"reuse": [0.1, 0.1, 0.1]})


def test_method_grid_shows_the_very_pixels(tmp_path):
    image = images(1)[0]
    pixels = read(method_grid(tmp_path / "grid.png", [("full\n50 computed", [image])], ["red apple"], cell=32))
    block = np.round(image * 255).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, block.shape)
    assert (windows == block).all((-1, -2, -3)).sum() == 1


def test_method_grid_names_every_method_by_its_color(tmp_path):
    rows = [("full", images(2)), ("N = 5", []), ("lesa, N = 5\n13 computed", images(2)), ("reuse", images(2))]
    pixels = read(method_grid(tmp_path / "grid.png", rows, ["apple", "a long prompt that has to be wrapped"], cell=64))
    assert all(holds(pixels[:, :40], name) for name in ("full", "lesa", "reuse"))
    assert not holds(pixels[:, :40], "taylor-1")


def test_method_grid_grows_by_rows_and_columns(tmp_path):
    small = read(method_grid(tmp_path / "small.png", [("full", images(2))], cell=64))
    tall = read(method_grid(tmp_path / "tall.png", [("full", images(2)), ("lesa", images(2))], cell=64))
    wide = read(method_grid(tmp_path / "wide.png", [("full", images(3))], cell=64))
    assert tall.shape[0] - small.shape[0] == wide.shape[1] - small.shape[1] > 64


def test_method_grid_shrinks_large_images(tmp_path):
    assert max(read(method_grid(tmp_path / "grid.png", [("full", images(1, size=512))], cell=64)).shape) < 250


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [("heading", [])],
        [("full", images(2)), ("lesa", images(1))],
        [("full", images(2)), ("lesa", images(2, size=9))],
        [("full", [np.zeros((3, 8, 8))])],
    ],
)
def test_method_grid_refuses_what_it_cannot_draw(tmp_path, rows):
    with pytest.raises(ValueError, match="expected"):
        method_grid(tmp_path / "grid.png", rows)


def test_a_method_keeps_its_color_whoever_stands_beside_it():
    alone = method_styles(["LESA"])["LESA"]
    styles = method_styles(["full", "reuse, N = 5", "reuse, N = 7", "Taylor-1", "taylor-2", "spectrum", "lesa, N = 5"])
    assert styles["lesa, N = 5"] == alone
    assert styles["reuse, N = 5"] == styles["reuse, N = 7"]
    assert len({style.color for style in styles.values()}) == 6


def test_unlike_methods_of_one_family_differ():
    styles = method_styles(["lesa", "lesa mlp"])
    assert styles["lesa"] != styles["lesa mlp"]


def test_equal_pictures_are_equal_files(tmp_path):
    first, second = (step_errors(tmp_path / name, [panel()]) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()


def test_drawing_leaves_matplotlibs_global_state_alone(tmp_path):
    script = (
        "import sys, matplotlib\n"
        # reading the backend would choose one, and load pyplot
        "style = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = style()\n"
        "from lesa.report import loss_curves\n"
        f"loss_curves({str(tmp_path / 'loss.png')!r}, {{'guided': [0.2, 0.1]}})\n"
        "assert style() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
