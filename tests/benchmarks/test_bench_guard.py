"""The benchmark of the guard: a tiny run end to end, and what it does to the weights."""

import csv
import math
import sys
from pathlib import Path

import pipelines
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import lesa
from benchmarks import guard, guard_cost
from lesa import assets

STEPS, REQUESTS = 9, 10


@pytest.fixture
def plan(monkeypatch, tmp_path):
    """A tiny random FLUX in the place of emoji-flux, and the file of a plan quickly fitted to it."""
    request = {"num_inference_steps": STEPS, "height": 32, "width": 32, "max_sequence_length": 12}
    monkeypatch.setattr(assets, "load", lambda device: pipelines.flux_schnell().to(device))
    monkeypatch.setattr(assets, "REQUEST", request)
    fitted = lesa.fit(assets.load("cpu"), assets.fitting_prompts()[:5], budget=4, request=request, effort="quick")
    return fitted.save(tmp_path / "plan.safetensors")


def test_a_run(plan, tmp_path):
    results = tmp_path / "guard.csv"
    chosen = ["captions", "weights altered by 1.0", "sentences"]
    count = ["--requests", str(REQUESTS), "--far", "2", "--batch", "4"]
    guard.main(["--plan", str(plan), "--results", str(results), *count, "--cases", *chosen])
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["guard"]) for row in rows] == [(case, way) for case in chosen for way in ("off", "on")]
    for row in rows:
        assert int(row["requests"]) == (REQUESTS if row["case"] == "captions" else 2)
        assert math.isfinite(float(row["psnr"])) and float(row["psnr_lowest"]) <= float(row["psnr"])
        assert (row["time_ratio"] == "") == (row["case"] != "captions" or row["guard"] == "off")
        assert (row["false_switches"] == "") == (row["case"] != "captions")
        if row["guard"] == "off":
            assert (float(row["computed_mean"]), row["switches"]) == (4.0, "0")
        else:
            assert float(row["computed_mean"]) > 4 or row["switches"] == "0"


def test_a_run_of_the_cost(plan, tmp_path):
    results = tmp_path / "cost.csv"
    guard_cost.main(
        ["--plan", str(plan), "--results", str(results), "--requests", "2", "--batches", "1", "3", "--device", "cpu"]
    )
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["batch"], row["requests"]) for row in rows] == [("emoji-flux", b, "2") for b in "13"]
    assert all(float(row[name]) > 0 for row in rows for name in ("off_ms", "on_ms", "time_ratio"))


def test_weights_are_altered_by_as_much_as_said_and_restored():
    denoiser = pipelines.flux_schnell().transformer
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    with guard.altered(denoiser, 0.3):
        moved = {name for name, tensor in denoiser.state_dict().items() if not torch.equal(tensor, before[name])}
        for name in moved:
            update = denoiser.state_dict()[name] - before[name]
            assert float(update.norm() / before[name].norm()) == pytest.approx(0.3, rel=1e-4)
    assert any("attn" in name for name in moved) and not any("proj_out.bias" in name for name in moved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.state_dict().items())
