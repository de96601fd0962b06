"""The demo end to end, on one interval and two captions."""

import json

import pytest

from lesa import assets
from lesa.cli.main import main
from lesa.evaluation import plots
from lesa.evaluation.plots import method_grid

KEYS = {"method", "interval", "computed", "flops_speedup", "speedup", "psnr", "ssim"}


def test_demo_writes_rows_and_pictures(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plots, "method_grid", lambda *given, **more: drawn.append(given) or method_grid(*given, **more))
    monkeypatch.setattr(assets, "INTERVALS", (10,))
    assert main(["demo", "--out", str(tmp_path), "--prompts", "2"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    names = ["full", "fewer steps", "reuse", "taylor-1", "taylor-2", "lesa", "lesa.fit"]
    assert [row["method"] for row in rows] == names
    assert all(set(row) == KEYS for row in rows)
    assert rows[0]["computed"] == 50 and all(row["computed"] == 8 for row in rows[1:])
    assert rows[0]["flops_speedup"] == pytest.approx(1.0) and rows[0]["psnr"] is None
    for row in rows[2:]:
        # 42 of 50 steps pass the blocks by; what is left of them is embedders and head.
        assert 5.5 < row["flops_speedup"] <= 6.25
        assert row["psnr"] > 15 and 0 < row["ssim"] <= 1
    for name in ("grid.png", "steps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    [(_, grid, captions)] = drawn
    assert [label.split("\n")[0] for label, _ in grid] == ["full", "fewer steps", "taylor-1", "lesa", "lesa.fit"]
    assert all(len(images) == len(captions) == 2 for _, images in grid)
    printed = capsys.readouterr().out
    assert "taylor-2" in printed
    assert f"lesa.fit, 8 of 50 steps computed: {rows[-1]['psnr']:.1f} dB" in printed
    assert rows[-1]["psnr"] > rows[-2]["psnr"] + 5  # the two captions are easy ones for both


def test_demo_refuses_too_few_prompts(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--prompts", "1"]) == 2
    assert "--prompts 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
