"""The benchmarks of adapted plans and of how many prompts a fit needs: tiny runs end to end, and their sheet."""

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pipelines
import pytest
import torch
from diffusers import FluxImg2ImgPipeline

sys.path.insert(0, str(Path(__file__).parents[2]))

import lesa
from benchmarks import captions, prompts, transfer, transfer_cases
from benchmarks.transfer_cases import Case
from lesa import assets
from lesa.fitting import fit as fitting
from lesa.planner.build import plan_for
from lesa.plans.rows import PlanError

BUDGET, STEPS, KNOWN = 3, 6, 9
KINDS = (
    Case("euler", STEPS),
    Case("euler", KNOWN),
    Case("cfg3", STEPS, guidance=3),
    Case("heun", STEPS, "heun"),
    Case("img2img0.6", 10, strength=0.6, picture=1),
)
CALLS = {"euler-6": 6, "euler-9": 9, "cfg3-6": 6, "heun-6": 11, "img2img0.6-10": 6}


@pytest.fixture
def fits(monkeypatch):
    """A tiny random FLUX in the place of emoji-flux, tiny cases, and a fit that only searches; its calls."""
    calls = []

    def fit(pipe, prompts, *, budget, request, effort, batch, held_out=None):
        calls.append((effort, len(prompts), request, batch))
        plan = plan_for(lesa.Statistics.gather(pipe, prompts, request=request, batch=batch), budget)
        plan.training["generations"] = 9.44
        return plan

    monkeypatch.setattr(lesa, "fit", fit, raising=False)
    monkeypatch.setattr(assets, "load", lambda device: pipelines.flux_schnell().to(device))
    monkeypatch.setattr(assets, "REQUEST", {"num_inference_steps": KNOWN, "height": 32, "width": 32})
    monkeypatch.setitem(assets.REQUEST, "max_sequence_length", 12)
    monkeypatch.setattr(transfer, "CASES", KINDS)
    monkeypatch.setattr(transfer, "KNOWN", KNOWN)
    return calls


def arguments(path, *more):
    return ["--results", str(path), "--captions", "2", "--fitting", "2", "--budgets", str(BUDGET), *more]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_tiny_run_measures_every_row_once_and_prints_the_differences(fits, tmp_path, capsys):
    path = tmp_path / "new" / "transfer.csv"
    transfer.main(arguments(path, "--commit", "abc1234"))
    printed, rows = capsys.readouterr().out, read(path)
    labels = "hardware commit date pipeline captions case steps computed plan psnr psnr_sem build_ms cold_ms"
    assert list(rows[0]) == labels.split()
    found = [(row["case"], row["steps"], row["plan"]) for row in rows]
    # The plans of this fit serve their own requests only, and that is told.
    plans = [name for name in transfer.PLANS if name != transfer.PLAN]
    assert found == [(case.name, str(case.steps), name) for case in KINDS for name in plans]
    for case in KINDS:
        assert f"{case.name}, {case.steps}, {BUDGET}, {transfer.PLAN}, skipped: " in printed
    by_plan = {}
    for row in rows:
        assert (row["commit"], row["captions"], row["computed"]) == ("abc1234", "2", str(BUDGET))
        assert 5 < float(row["psnr"]) < 120 and float(row["psnr_sem"]) >= 0
        brought = row["plan"] == transfer.STATISTICS
        assert all((float(row[name]) > 0) if brought else row[name] == "" for name in ("build_ms", "cold_ms"))
        by_plan.setdefault(row["plan"], {})[f"{row['case']}-{row['steps']}"] = row["psnr"]
    # At home nothing is interpolated; elsewhere something is.
    home, away = f"euler-{KNOWN}", f"euler-{STEPS}"
    assert by_plan[transfer.STATISTICS][home] == by_plan["native statistics"][home]
    assert by_plan[transfer.STATISTICS][away] != by_plan["native statistics"][away]
    assert by_plan["native quick"] == by_plan["native default"]
    last = printed.strip().splitlines()[-len(KINDS) :]
    assert f"| euler | {KNOWN} | {BUDGET} | +0.00 ± 0.00 (" in last[1] and last[-1].startswith("| img2img0.6 | 10 |")
    # One fit at 9 steps for each guidance scale, the others where they are judged.
    asked = [(effort, request["num_inference_steps"], request.get("true_cfg_scale")) for effort, _, request, _ in fits]
    native = [
        (effort, case.steps, 3.0 if case.guidance == 3 else None) for case in KINDS for effort in ("quick", "default")
    ]
    assert sorted(map(str, asked)) == sorted(map(str, [*native, ("default", KNOWN, None), ("default", KNOWN, 3.0)]))
    assert all((count, batch) == (2, 2) for _, count, _, batch in fits)


def test_a_second_call_goes_on(fits, tmp_path, capsys):
    path = tmp_path / "transfer.csv"
    names = "native statistics", "native quick"
    transfer.main(arguments(path, "--seconds", "0"))
    assert not path.exists() and not fits
    transfer.main(arguments(path, "--cases", "heun", "euler-6", "--plans", names[0]))
    assert [(row["case"], row["steps"]) for row in read(path)] == [("euler", "6"), ("heun", "6")]
    before = path.read_text()
    transfer.main(arguments(path, "--cases", "heun", "euler-6", "--plans", *names))
    assert path.read_text().startswith(before) and len(fits) == 2
    assert [row["plan"] for row in read(path)] == [names[0]] * 2 + [names[1]] * 2
    transfer.main(arguments(path, "--cases", "euler-6", "--plans", names[0], "--commit", "def5678"))
    assert len(read(path)) == 5
    with pytest.raises(ValueError, match=r"cases=\['ddim'\]: expected some of \["):
        transfer.main(arguments(path, "--cases", "ddim"))


def test_fitted_plans_are_adapted_to_other_requests(fits, tmp_path, monkeypatch):
    monkeypatch.setattr(lesa, "fit", lambda *args, effort, **more: fitting.fit(*args, effort="quick", **more))
    path = tmp_path / "transfer.csv"
    transfer.main(arguments(path, "--plans", transfer.PLAN, "native quick"))
    rows = {(row["case"], row["steps"], row["plan"]): row for row in read(path)}
    assert len(rows) == 2 * len(KINDS)
    for case in KINDS:
        brought, native = (rows[case.name, str(case.steps), name] for name in (transfer.PLAN, "native quick"))
        assert float(brought["build_ms"]) > 0 and native["build_ms"] == ""
        at_home = case.label == f"euler-{KNOWN}"
        assert (brought["psnr"] == native["psnr"]) == at_home


def test_one_failure_is_told_and_the_rest_is_measured(fits, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(lesa, "fit", broken)
    path = tmp_path / "transfer.csv"
    with pytest.raises(SystemExit, match="3 rows failed"):
        transfer.main(arguments(path, "--cases", "euler-6"))
    assert "no such luck" in capsys.readouterr().out
    assert [row["plan"] for row in read(path)] == [transfer.STATISTICS, "native statistics"]


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.label)
def test_the_reference_is_the_full_request_of_the_case(fits, case):
    bench = transfer.Bench("cpu", 1, 2)
    known = bench.source("native statistics", case, 0)
    assert known.num_steps == CALLS[case.label] and len(known.contexts) == (2 if case.guidance == 3 else 1)
    whole, times = bench.measure(case, CALLS[case.label], known, timed=False)
    assert (whole == math.inf).all() and times == ["", ""]
    part, times = bench.measure(case, 2, known, timed=True)
    assert (part < 100).all() and all(float(time) > 0 for time in times)
    with pytest.raises(PlanError, match="2 steps were computed, not 3"):
        bench.measure(case, 3, plan_for(known, 2), timed=False)
    bench.measure(case, 2, known, timed=False)  # nothing is left enabled


def test_image_to_image_starts_from_pictures_of_the_prompts(fits):
    made = transfer_cases.Pipelines("cpu", 2, 2)
    pipe = made.of(KINDS[-1])
    text = made.of(KINDS[0])
    full = captions.images(text, 2, captions.request())
    first, second = assets.held_out_prompts()[:2]
    assert torch.allclose(pipe.pictures[first], torch.from_numpy(full[1]).permute(2, 0, 1), rtol=0, atol=1e-6)
    own = made.of(Case("img2img0.6", 10, strength=0.6)).pictures
    assert torch.equal(own[second], made.of(KINDS[-1]).pictures[first]) and not torch.equal(own[first], own[second])
    assert set(pipe.pictures) == {first, second, *assets.fitting_prompts()[:2]}
    request = captions.request(num_inference_steps=10, strength=0.6)
    plain = FluxImg2ImgPipeline(**text.components)
    plain.set_progress_bar_config(disable=True)
    starts = torch.from_numpy(full[::-1].copy()).permute(0, 3, 1, 2)
    generator = [torch.Generator().manual_seed(seed) for seed in assets.held_out_seeds()[:2]]
    expected = plain(prompt=[first, second], image=starts, generator=generator, output_type="np", **request).images
    assert np.allclose(captions.images(pipe, 2, request), expected, rtol=0, atol=1e-5)


def test_differences_are_of_the_rows_and_their_errors_of_the_captions():
    def row(plan, psnr, build=""):
        cells = {"case": "euler", "steps": "20", "computed": "8", "plan": plan, "psnr": psnr, "build_ms": build}
        return cells

    rows = [row(transfer.STATISTICS, "50.000", "12.5"), row("native statistics", "51.500"), row("native quick", "52.0")]
    found = {
        ("euler", "20", "8", transfer.STATISTICS): np.array([49.0, 51.0]),
        ("euler", "20", "8", "native statistics"): np.array([50.0, 53.0]),
    }
    # differences of -1 and -2: deviation sqrt(1/2), of the mean 1/2
    assert transfer.table(rows, found).splitlines()[-1] == "| euler | 20 | 8 | -1.50 ± 0.50 (50.00 dB) |  |  | 12.5 |"
    assert "| -1.50 (50.00 dB) |" in transfer.table(rows, {})


def test_a_sheet_knows_its_rows(tmp_path):
    path = tmp_path / "rows.csv"
    options = {"device": "cpu", "commit": "a", "captions": 4, "seconds": math.inf}
    sheet = captions.Sheet(path, ("kind", "steps"), ("psnr",), **options)
    sheet.add(("x", 3), captions.quality(np.array([1.0, 3.0]))[:1])
    with path.open("a") as file:
        file.write("cut,off")
    again = captions.Sheet(path, ("kind", "steps"), ("psnr",), **options)
    assert [row["psnr"] for row in again.rows] == ["2.000"]
    assert not again.wants("x", 3) and not again.wants("x", "3") and again.wants("x", 4)
    assert captions.Sheet(path, ("kind", "steps"), ("psnr",), **{**options, "captions": 5}).wants("x", 3)
    late = captions.Sheet(path, ("kind", "steps"), ("psnr",), **{**options, "seconds": 0})
    assert not late.wants("x", 4)
    with pytest.raises(ValueError, match="has the columns .* expected .*: give another file"):
        captions.Sheet(path, ("kind",), ("psnr",), **options)


def test_prompts_are_counted_at_every_effort_and_guidance(fits, tmp_path):
    path = tmp_path / "prompts.csv"
    rows = ["--captions", "2", "--budget", "3", "--effort", "quick", "default", "--guidance", "1", "3"]
    rows += ["--prompts", "1", "2"]
    prompts.main(["--results", str(path), *rows])
    found = [(row["guidance"], row["effort"], row["prompts"]) for row in read(path)]
    assert found == [(g, e, n) for g in "13" for e in ("quick", "default") for n in "12"]
    assert all(5 < float(row["psnr"]) < 120 and row["generations"] == "9.4" for row in read(path))
    asked = [(request.get("true_cfg_scale"), effort, count) for effort, count, request, _ in fits]
    assert asked == [({"1": None, "3": 3.0}[g], effort, int(n)) for g, effort, n in found]
    prompts.main(["--results", str(path), *rows])
    assert len(read(path)) == len(found) == len(fits)
