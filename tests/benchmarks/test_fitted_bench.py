"""The benchmark of fitted plans: a tiny run end to end, its tables, its solvers and the paper's plans without gains."""

import csv
import sys
from pathlib import Path

import numpy as np
import pipelines
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

sys.path.insert(0, str(Path(__file__).parents[2]))

import lesa
from benchmarks import fitted, fitted_methods, fitted_solvers
from benchmarks.fitted_table import COLUMNS, margins, read, table
from lesa import assets
from lesa.forecasters import plan_of
from lesa.plans import schedule
from lesa.plans.plan import Plan
from lesa.training.predictor import Predictor

STEPS, BUDGET = 16, 6
KINDS = (("paper", "output"), ("searched", "output"), ("paper", "hidden"))
OWN = {("reuse", "fora", "output"), ("chebyshev-4 (blend 0.5)", "spectrum", "output")}
SOLVERS = {"euler": "6", "heun": "7", "dpm++": "6", "unipc": "6"}  # and their denoiser calls


@pytest.fixture
def tiny(monkeypatch):
    """A tiny random FLUX in the place of emoji-flux, two rules, and a fit of our own."""
    fits = []

    def fit(target, prompts, *, budget, request, seeds, effort, batch, folder):
        fits.append((effort, len(prompts), list(seeds), request, folder.name))
        assert request["num_inference_steps"] == STEPS and batch == 8
        sigmas = [*np.linspace(1, 1 / STEPS, STEPS), 0.0]
        plan = plan_of("taylor-1", range(budget), sigmas, "output", training={"generations": 9.4, "seconds": 1.25})
        return plan

    monkeypatch.setattr(lesa, "fit", fit, raising=False)
    monkeypatch.setattr(assets, "load", lambda device: pipelines.flux_schnell().to(device))
    monkeypatch.setattr(assets, "REQUEST", {"height": 32, "width": 32, "max_sequence_length": 12})
    monkeypatch.setattr(fitted_methods, "FITTING", 2)
    closed = {name: fitted_methods.CLOSED[name] for name in ("reuse", "chebyshev-4 (blend 0.5)")}
    monkeypatch.setattr(fitted_methods, "CLOSED", closed)
    monkeypatch.setattr(fitted_methods, "RULES", {**closed, "regression": ("regression", {})})
    return fits


def arguments(folder, *more):
    sizes = f"--captions 2 --batch 2 --steps {STEPS} --budgets {BUDGET} --recorded 1".split()
    return ["--device", "cpu", "--work", str(folder), "--commit", "abc1234", "--processes", "0", *sizes, *more]


def test_a_tiny_run_measures_every_kind_of_row_once(tiny, tmp_path, capsys):
    fitted.main(arguments(tmp_path, "--efforts", "quick"))
    path = tmp_path / "fitted.csv"
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    rows = read(path)
    found = {tuple(row[n] for n in ("guidance", "method", "schedule", "site", "effort", "computed")) for row in rows}
    assert len(found) == len(rows)
    closed = [(name, *kind) for name in fitted_methods.CLOSED for kind in KINDS]
    wanted = {(g, *row, "", "6") for g in "13" for row in [*closed, *(("regression", *kind) for kind in KINDS[:2])]}
    wanted |= {(g, *row, "", "6") for g in "13" for row in OWN}
    wanted |= {(g, "lesa", "paper", "hidden", "", "6") for g in "13"} | {("1", "lesa", "searched", "hidden", "", "6")}
    wanted |= {(g, "lesa.fit", "fitted", "output", "quick", "6") for g in "13"}
    for g in "13":
        wanted |= {(g, name, "fewer", "", "", calls) for name, calls in SOLVERS.items()}
        wanted |= {(g, n, "converged", "", "", c) for n, c in (("heun", "17"), ("dpm++", "16"), ("unipc", "16"))}
    assert found == wanted
    for row in rows:
        assert 5 < float(row["psnr"]) < 120 and float(row["psnr_sem"]) >= 0 and -1 <= float(row["ssim"]) <= 1
        assert (row["commit"], row["captions"]) == ("abc1234", "2")
        if row["method"] == "lesa.fit":
            assert (row["generations"], row["seconds"]) == ("9.4", "1.2")
        if row["method"] == "lesa":
            # one recorded, and twice the one at 6 of 16 steps
            assert row["generations"] == "1.8"
    assert tiny[0] == ("quick", 2, [0, 1], {**assets.REQUEST, "num_inference_steps": STEPS}, "quick-1-6")
    assert tiny[1][3]["true_cfg_scale"] == 3.0 and tiny[1][3]["negative_prompt"] == ""

    # Again: nothing is left to measure, and the tables can be had without measuring.
    before, printed = path.read_text(), capsys.readouterr().out
    fitted.main(arguments(tmp_path, "--efforts", "quick"))
    assert path.read_text() == before and len(tiny) == 2
    capsys.readouterr()
    fitted.main(["--table", "--results", str(path)])
    assert capsys.readouterr().out in printed


def test_the_reference_is_the_full_request(tiny, tmp_path):
    settings = fitted_methods.Settings(
        "cpu", tmp_path, 2, STEPS, 1, 8, (BUDGET,), {3: 0}, tmp_path / "rows.csv", (), float("inf")
    )
    bench = fitted_methods.Bench(settings)
    whole, _, similar = bench.figures(3, bench.images(3))
    near, far = (
        bench.figures(3, bench.images(3, plan_of("reuse", range(count), bench.statistics(3).sigmas, "output")))[0]
        for count in (STEPS - 1, 2)
    )
    assert whole == float("inf") and similar == 1.0
    assert near > far + 10
    # guidance does something, and is in the statistics
    assert bench.figures(3, bench.images(1))[0] < near
    assert bench.statistics(3).guidance == (3.0, -2.0)


def test_rules_have_the_schedules_they_were_published_with(tiny, tmp_path):
    def bench(steps):
        return fitted_methods.Bench(
            fitted_methods.Settings("cpu", tmp_path, 2, steps, 2, 8, (), {1: 0}, tmp_path / "rows.csv", (), 0.0)
        )

    own, whole = fitted_methods.own_schedules, bench(50)
    kinds = ("l2p", "fora", "taylorseer", "spectrum", "dpcache", "dpcache (published)")
    assert tuple(fitted_methods.OWN) == kinds
    for budget, has in {13: "00011", 10: "11111", 8: "11111", 6: "11100"}.items():
        assert [str(int(whole.has(kind, budget))) for kind in kinds[:-1]] == list(has)
    assert own("taylorseer", 50)[10] == schedule.taylorseer(50, 6) and own("fora", 50)[10] == schedule.fora(50, 6)
    assert own("spectrum", 50)[10] == schedule.spectrum(50, 3.0) and own("spectrum", 50)[14] == schedule.spectrum(50)
    assert not whole.has("dpcache (published)", 12) and not own("l2p", 40)
    assert bench(40).schedule("dpcache (published)", 1, 12) == schedule.DPCACHE_40[12]
    computed = bench(STEPS).schedule("dpcache", 1, BUDGET)
    assert len(computed) == BUDGET and computed[:3] == (0, 1, 2) and np.diff((*computed, STEPS)).max() <= 8


def test_one_failure_is_told_and_the_rest_is_measured(tiny, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(lesa, "fit", broken)
    with pytest.raises(SystemExit, match="no such luck"):
        fitted.main(arguments(tmp_path, "--guidance", "1", "--phases", "fit", "fewer", "--efforts", "quick"))
    assert {row["method"] for row in read(tmp_path / "fitted.csv")} == set(SOLVERS)


def test_nothing_is_begun_after_the_deadline(tiny, tmp_path):
    fitted.main(arguments(tmp_path, "--seconds", "0", "--guidance", "1", "--phases", "fewer", "fit"))
    assert read(tmp_path / "fitted.csv") == [] and tiny == []


@pytest.mark.parametrize("name", ["euler", "heun", "dpm++", "unipc"])
def test_solvers_converge_at_exact_timesteps(name):
    # Pictures of mean 0 and deviation s: x_sigma = x_1 sqrt((1 - sigma)^2 s^2 + sigma^2) solves the flow.
    std = 0.5
    errors = []
    for steps in (80, 160):
        scheduler = fitted_solvers.solvers()[name] or FlowMatchEulerDiscreteScheduler()
        levels = fitted_solvers.levels(steps)
        given = {"sigmas": levels} if name in ("euler", "heun") else {"num_inference_steps": steps}
        scheduler.set_timesteps(device="cpu", mu=0.5, **given)
        scheduler.set_begin_index(0)
        x = torch.ones(1, 1, 1, 1)
        assert len(scheduler.timesteps) == fitted_solvers.calls(name, steps)
        assert torch.allclose(scheduler.timesteps, 1000 * scheduler.sigmas[:-1], rtol=0, atol=1e-4)
        assert np.allclose(sorted(set(scheduler.sigmas.tolist()))[1:], levels[::-1], rtol=0, atol=1e-4)
        for timestep in scheduler.timesteps:
            sigma = float(timestep) / 1000
            velocity = x * (sigma - (1 - sigma) * std**2) / ((1 - sigma) ** 2 * std**2 + sigma**2)
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        errors.append(abs(float(x) - std))
    print(name, errors)
    # first order and second
    assert errors[1] < errors[0] / (1.9 if name == "euler" else 3)
    assert errors[1] < (5e-3 if name == "euler" else 3e-4)


def test_solver_calls_reach_the_budget():
    for budget in (13, 10, 8, 6):
        for name in ("euler", "heun", "dpm++", "unipc"):
            assert fitted_solvers.calls(name, fitted_solvers.steps_for(name, budget)) - budget in (
                (0, 1) if name == "heun" else (0,)
            )


def test_gains_are_taken_out_exactly():
    predictor = Predictor(50, width=8)
    sigmas = [*np.linspace(1, 1 / 50, 50).tolist(), 0.0]
    computed = schedule.paper(50, 10)
    plain = predictor.to_plan(computed, sigmas)
    found = fitted_methods.without_gains(predictor.to_plan(computed, sigmas, (0.7, 1.15, 0.4)))
    for step, row in plain.rows["*"].items():
        assert found.rows["*"][step].steps == row.steps
        assert np.allclose(found.rows["*"][step].weights, row.weights, rtol=0, atol=1e-12)
        assert found.rows["*"][step].bias == pytest.approx(row.bias, abs=1e-12)
    bundled = Plan.load(assets.plan_path(7))
    assert bundled.training["gains"] != [1.0] * 3
    assert fitted_methods.without_gains(bundled).rows != bundled.rows


def test_tables_and_margins(tmp_path):
    path = tmp_path / "rows.csv"
    lines = [
        "gpu,c,d,emoji-flux,64,1,euler,fewer,,,10,40.000,0.900,0.99000,,",
        "gpu,c,d,emoji-flux,64,1,heun,fewer,,,11,41.500,0.900,0.99100,,",
        "gpu,c,d,emoji-flux,64,1,heun,converged,,,51,70.000,0.900,0.99900,,",
        "gpu,c,d,emoji-flux,64,1,reuse,paper,output,,10,30.000,0.500,0.90000,,",
        "gpu,c,d,emoji-flux,64,1,reuse,paper,hidden,,10,31.000,0.500,0.90000,,",
        "gpu,c,d,emoji-flux,64,1,lesa,paper,hidden,,10,45.780,0.470,0.99720,140.0,",
        "gpu,c,d,emoji-flux,64,1,lesa.fit,fitted,output,quick,10,55.250,0.400,0.99990,9.6,4.0",
        "gpu,c,d,emoji-flux,64,1,cut off",
    ]
    path.write_text("\n".join([",".join(COLUMNS), *lines]))
    rows = read(path)
    assert len(rows) == 7
    assert table(rows).splitlines() == [
        "Without guidance:",
        "",
        "| method | schedule | 10 computed |",
        "|---|---|---|",
        "| euler | fewer steps | 40.00 ± 0.90, 0.9900 |",
        "| heun | fewer steps | 41.50 ± 0.90, 0.9910 (11 calls) |",
        "| reuse | paper | 30.00 ± 0.50, 0.9000 |",
        "| reuse | paper, hidden | 31.00 ± 0.50, 0.9000 |",
        "| lesa | paper | 45.78 ± 0.47, 0.9972 |",
        "| **lesa.fit, quick**, 10 generations | fitted | **55.25** ± 0.40, 0.9999 |",
    ]
    expected = "guidance 1, 10 computed, lesa.fit, quick: 55.25 dB, +9.47 over the paper's LESA, +9.47 over lesa paper"
    assert margins(rows) == expected
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == list(COLUMNS)
