"""plots: every picture is drawn, its pixels are where they belong, and nothing global is touched."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lesa.evaluation.plots import StepPanel, loss_curves, method_grid, method_styles, step_errors
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


def holds(pixels: np.ndarray, name: str) -> bool:
    color = tuple(bytes.fromhex(method_styles([name])[name].color[1:]))
    return bool((pixels == color).all(-1).any())


def places(pixels: np.ndarray, image: np.ndarray, grow: int = 4) -> list[tuple[int, int]]:
    """(top, left) of every place where `image` in [0, 1], scaled by a whole factor, is in the picture."""
    block = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8).repeat(grow, 0).repeat(grow, 1)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, block.shape)[:, :, 0]
    return [tuple(place) for place in np.argwhere((windows == block).all((-1, -2, -3))).tolist()]


def test_loss_curves_one_row_and_wrapped(tmp_path):
    losses = {f"stage {i}": np.exp(-np.arange(60) / 20) for i in range(4)}
    flat = read(loss_curves(tmp_path / "new" / "flat.png", losses, columns=4))
    wrapped = read(loss_curves(tmp_path / "wrapped.png", losses, columns=2))
    assert flat.shape[1] == 2 * wrapped.shape[1] > flat.shape[0]
    assert wrapped.shape[0] > 1.5 * flat.shape[0]


def test_loss_curves_of_few_zero_or_flat_losses(tmp_path):
    for losses in ([0.5], [0.3, 0.0, float("nan"), 0.1], [0.031, 0.032, 0.033]):
        read(loss_curves(tmp_path / "loss.png", {"guided": losses}))


@pytest.mark.parametrize("losses, name", [({}, "losses"), ({"guided": []}, "guided"), ({"g": [0.0]}, "'g'")])
def test_loss_curves_refuses_what_it_cannot_draw(tmp_path, losses, name):
    with pytest.raises(ValueError, match=name):
        loss_curves(tmp_path / "loss.png", losses)


def test_step_errors_of_three_intervals(tmp_path):
    one = read(step_errors(tmp_path / "one.png", [panel()]))
    three = read(step_errors(tmp_path / "three.png", [panel(), panel(title="N = 7"), panel(title="N = 10")]))
    assert three.shape[1] == pytest.approx(3 * one.shape[1], abs=3)
    assert all(holds(three, name) for name in ("reuse", "taylor-1", "lesa"))


def test_step_errors_without_some_of_it(tmp_path):
    whole = read(step_errors(tmp_path / "whole.png", [panel()]))
    for changes in ({"computed": {}}, {"stages": ONE_STAGE}, {"stages": ()}):
        read(step_errors(tmp_path / "steps.png", [panel(**changes)]))
    without = read(step_errors(tmp_path / "without.png", [panel(alphas={})]))
    assert without.shape[0] < 0.85 * whole.shape[0], "without alphas there are no axes of alpha"


def test_step_errors_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match="panels"):
        step_errors(tmp_path / "steps.png", [])
    with pytest.raises(ValueError, match=r"errors\['reuse'\] has 3"):
        panel(errors={"reuse": [0.1, 0.1, 0.1]})


def test_method_grid_shows_the_very_pixels(tmp_path):
    image = images(1)[0]
    pixels = read(method_grid(tmp_path / "grid.png", [("full\n50 computed", [image])], ["red apple"], cell=32))
    assert len(places(pixels, image)) == 1


def test_method_grid_shows_amplified_differences_below_their_images(tmp_path):
    full = [0.5 * image for image in images(2)]
    other = [image + 0.05 * noise for image, noise in zip(full, images(2, seed=6), strict=True)]
    rows = [("full", full), ("lesa\n8 computed", other), ("reuse", full)]
    pixels = read(method_grid(tmp_path / "grid.png", rows, cell=32, amplify=10))
    left = None
    for image, changed in zip(full, other, strict=True):
        [(top, column)] = places(pixels, changed)
        [(below, under)] = places(pixels, 10 * np.abs(changed - image))
        assert column == under and 32 < below - top < 48
        assert len(places(pixels, image)) == 2, "once as the reference, once as the method that equals it"
        assert left is None or column > left
        left = column
    assert len(places(pixels, np.zeros((8, 8, 3)))) == 2, "no difference is black"
    plain = read(method_grid(tmp_path / "plain.png", rows, cell=32))
    assert pixels.shape[0] > plain.shape[0] + 2 * 32


def test_method_grid_names_every_method_by_its_color(tmp_path):
    rows = [("full", images(2)), ("lesa, N = 5\n13 computed", images(2)), ("reuse", images(2))]
    pixels = read(method_grid(tmp_path / "grid.png", rows, ["apple", "a long prompt that has to be wrapped"], cell=64))
    assert all(holds(pixels[:, :40], name) for name in ("full", "lesa", "reuse"))
    assert not holds(pixels[:, :40], "taylor-1")


def test_method_grid_grows_by_rows_and_columns(tmp_path):
    small = read(method_grid(tmp_path / "small.png", [("full", images(2))], cell=64))
    tall = read(method_grid(tmp_path / "tall.png", [("full", images(2)), ("lesa", images(2))], cell=64))
    wide = read(method_grid(tmp_path / "wide.png", [("full", images(3))], cell=64))
    assert tall.shape[0] > small.shape[0] + 64
    assert wide.shape[1] > small.shape[1] + 64 and wide.shape[0] == small.shape[0]


def test_method_grid_shrinks_large_images(tmp_path):
    assert max(read(method_grid(tmp_path / "grid.png", [("full", images(1, size=512))], cell=64)).shape) < 250


def test_method_grid_refuses_what_it_cannot_draw(tmp_path):
    grids = [
        [],
        [("heading", [])],
        [("full", images(2)), ("lesa", images(1))],
        [("full", images(2)), ("lesa", images(2, size=9))],
        [("full", [np.zeros((3, 8, 8))])],
    ]
    for rows in grids:
        with pytest.raises(ValueError, match="expected"):
            method_grid(tmp_path / "grid.png", rows)
    assert not list(tmp_path.iterdir())


def test_a_method_keeps_its_color_whoever_stands_beside_it():
    alone = {name: method_styles([name])[name] for name in ("LESA", "lesa.fit")}
    names = ["full", "reuse, N = 5", "reuse, N = 7", "Taylor-1", "taylor-2", "spectrum", "lesa, N = 5", "lesa.fit"]
    styles = method_styles(names)
    assert (styles["lesa, N = 5"], styles["lesa.fit"]) == (alone["LESA"], alone["lesa.fit"])
    assert styles["reuse, N = 5"] == styles["reuse, N = 7"]
    assert len({style.color for style in styles.values()}) == 7
    both = method_styles(["lesa", "lesa mlp"])
    assert both["lesa"] != both["lesa mlp"], "unlike methods of one family differ"


def test_equal_pictures_are_equal_files_and_nothing_global_is_touched(tmp_path):
    first, second = (step_errors(tmp_path / name, [panel()]) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()
    script = (
        "import sys, matplotlib\n"
        # reading the backend would choose one, and load pyplot
        "style = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = style()\n"
        "from lesa.evaluation.plots import loss_curves\n"
        f"loss_curves({str(tmp_path / 'loss.png')!r}, {{'guided': [0.2, 0.1]}})\n"
        "assert style() == before\n"
        "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
