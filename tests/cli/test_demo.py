"""The demo end to end, on one interval and two captions, with two of the pipeline's ten blocks and small pictures."""

import functools
import json

import pytest

from lesa import assets
from lesa.cli.main import main
from lesa.evaluation import plots
from lesa.evaluation.plots import method_grid

KEYS = {"requests", "method", "interval", "computed", "flops_speedup", "speedup", "psnr", "ssim"}


def small(load, *given):
    pipe = load(*given)
    for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
        del blocks[1:]
    return pipe


def test_demo_writes_rows_and_pictures(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plots, "method_grid", lambda *given, **more: drawn.append(given) or method_grid(*given, **more))
    monkeypatch.setattr(assets, "INTERVALS", (10,))
    monkeypatch.setattr(assets, "load", functools.partial(small, assets.load))
    for name in ("height", "width"):
        monkeypatch.setitem(assets.REQUEST, name, 32)
    assert main(["demo", "--out", str(tmp_path), "--prompts", "2"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    names = ["full", "fewer steps", "reuse", "taylor-1", "taylor-2", "lesa", "lesa (no fit)", "lesa.fit"]
    plain, guided = rows[:8], rows[8:]
    assert {row["requests"] for row in plain} == {"without guidance"}
    assert {row["requests"] for row in guided} == {"with true_cfg_scale=3"}
    assert all(set(row) == KEYS for row in rows)
    for part in (plain, guided):
        assert [row["method"] for row in part] == names
        assert part[0]["computed"] == 50 and all(row["computed"] == 8 for row in part[1:])
        assert part[0]["flops_speedup"] == pytest.approx(1.0) and part[0]["psnr"] is None
        for row in part[2:]:
            # 42 of 50 steps pass the blocks by; what is left of them is embedders and head.
            assert 5.5 < row["flops_speedup"] <= 6.25
            assert row["psnr"] > 10 and 0 < row["ssim"] <= 1
    for name in ("grid.png", "steps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    [(_, grid, captions)] = drawn
    shown = ["full", "fewer steps", "taylor-1", "lesa", "lesa (no fit)", "lesa.fit"]
    assert [label.split("\n")[0] for label, _ in grid] == shown
    assert all(len(images) == len(captions) == 2 for _, images in grid)
    printed = capsys.readouterr().out
    assert "taylor-2" in printed
    for part in (plain, guided):
        assert f"lesa.fit, 8 of 50 steps computed: {part[-1]['psnr']:.1f} dB" in printed
        assert part[-1]["psnr"] > part[-3]["psnr"] + 5  # the two captions are easy ones for both


def test_demo_refuses_too_few_prompts(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--prompts", "1"]) == 2
    assert "--prompts 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
