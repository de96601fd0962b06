"""The benchmark of plans without a fit: tiny runs of a flow and of a noise-predicting model, and its tables."""

import dataclasses
import sys

import numpy as np
import pipelines
import pytest
import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel
from pipelines import CASES_BY_NAME
from test_dropin import counted

import lesa
from benchmarks import fitted_methods, fitted_solvers, generic, generic_table
from benchmarks.deep_cache import deep_cache
from benchmarks.generic_table import Cell, lowest_tenth, margin_table, margins, quality_table, read
from lesa import assets
from lesa.forecasters import plan_of
from lesa.plans import schedule

sys.path.insert(0, str(generic.EXAMPLES))

import models

STEPS, BUDGET = 8, 4
HEAD = ("cpu", "c", "d")


@pytest.fixture
def tiny(monkeypatch):
    """A tiny random FLUX in the place of emoji-flux, two rules, and a fit of our own."""
    fits = []

    def fit(pipe, prompts, *, budget, request, effort, batch):
        fits.append((effort, len(prompts), budget, batch, request["num_inference_steps"]))
        sigmas = [*np.linspace(1, 1 / STEPS, STEPS), 0.0]
        return plan_of("reuse", range(budget), sigmas, "output", training={"generations": 9.4, "seconds": 1.25})

    monkeypatch.setattr(lesa, "fit", fit)
    monkeypatch.setattr(assets, "load", lambda device: pipelines.flux_schnell().to(device))
    monkeypatch.setattr(assets, "REQUEST", {"height": 32, "width": 32, "max_sequence_length": 12})
    monkeypatch.setattr(generic, "FITTED_BUDGETS", (BUDGET,))
    closed = {name: fitted_methods.CLOSED[name] for name in ("reuse", "taylor-1")}
    monkeypatch.setattr(fitted_methods, "CLOSED", closed)
    return fits


def arguments(folder, *more):
    sizes = f"--captions 2 --steps {STEPS} --budgets {BUDGET} {STEPS}".split()
    files = ["--run", str(folder), "--results", str(folder / "generic.csv"), "--commit", "abc1234"]
    return ["--device", "cpu", "--processes", "0", *files, *sizes, *more]


def found(rows, guidance):
    return {(row["method"], row["schedule"]) for row in rows if row["guidance"] == guidance}


def test_a_tiny_run_measures_every_kind_of_row_once(tiny, tmp_path, capsys):
    methods = ("generic", "rules", "fewer", "quick")
    generic.main(arguments(tmp_path, "--models", "emoji-flux", "--methods", *methods))
    path = tmp_path / "generic.csv"
    rows = read(path)
    rules = {(name, kind) for name in ("reuse", "taylor-1") for kind in ("paper", "even")}
    rules |= {("reuse", "fora"), ("taylor-1", "taylorseer")}
    wanted = {("generic", "searched"), ("fewer", "own"), ("dpm++", "fewer"), ("quick", "fitted")} | rules
    for guidance in ("plain", "guided"):
        assert found(rows, guidance) == wanted
    assert len(rows) == 2 * len(wanted)
    assert [row["method"] for row in rows[:: len(wanted)]] == ["generic", "generic"]
    for row in rows:
        figures = [float(row[f"psnr_{name}"]) for name in ("low", "median", "mean", "sem")]
        assert 5 < figures[0] <= figures[1] <= 100 and figures[2] == pytest.approx(figures[1], abs=2e-3)
        assert (row["commit"], row["captions"], row["steps"], row["computed"]) == ("abc1234", "2", "8", "4")
        assert row["generations"] == ("9.4" if row["method"] == "quick" else "0.0")
    # Reuse on an even schedule is fewer steps of Euler.
    psnr = {(row["guidance"], row["method"], row["schedule"]): row["psnr_mean"] for row in rows}
    assert psnr["plain", "reuse", "even"] == pytest.approx(psnr["plain", "fewer", "own"])
    assert tiny == [("quick", 8, BUDGET, 8, STEPS)] * 2

    # Again: nothing is left to measure, and the table can be had without measuring.
    before, printed = path.read_text(), capsys.readouterr().out
    generic.main(arguments(tmp_path, "--models", "emoji-flux", "--methods", *methods))
    assert path.read_text() == before and len(tiny) == 2
    capsys.readouterr()
    generic.main(["--table", "--results", str(path)])
    assert capsys.readouterr().out in printed


def test_a_model_of_the_folder_that_predicts_the_noise(tiny, tmp_path, monkeypatch):
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "cross_attention_dim": 8}
    more = {"in_channels": 3, "out_channels": 3, "caption_channels": models.TEXT, "use_additional_conditions": False}
    model = models.MODELS["pixart"]
    network = lambda: PixArtTransformer2DModel(sample_size=64, patch_size=16, **small, **more)  # noqa: E731
    monkeypatch.setitem(models.MODELS, "pixart", dataclasses.replace(model, denoiser=network))
    prompts = [f"picture {i}" for i in range(140)]
    models.save(tmp_path / "pixart.safetensors", network(), models.Words(["", "picture"]))
    (tmp_path / "pixart.txt").write_text("\n".join(prompts))
    left_out = []
    make = generic.generic_plan

    def watched(prediction, guided, budget, levels, response, without):
        left_out.append((prediction, guided, len(levels), without))
        return make(prediction, guided, budget, levels, response, without=without)

    monkeypatch.setattr(generic, "generic_plan", watched)
    generic.main(arguments(tmp_path, "--models", "pixart", "--methods", "generic", "fewer", "--guidance", "guided"))
    assert found(read(tmp_path / "generic.csv"), "guided") == {
        ("generic", "searched"),
        ("fewer", "own"),
        ("dpm++", "fewer"),
    }
    assert left_out == [("epsilon", True, STEPS + 1, ("pixart",))]


def test_first_block_cache_is_tuned_to_a_number_of_steps(tiny, tmp_path):
    settings = generic.Settings(tmp_path, "cpu", 1, STEPS, (BUDGET,), (), tmp_path / "rows.csv", HEAD, float("inf"))
    bench = generic.Bench(settings, "emoji-flux", True)
    images, threshold, computed = generic.tuned(bench.pipe.transformer, bench.images, STEPS, STEPS)
    assert computed <= STEPS and 0 < threshold < 4 and images.shape == bench.reference.shape
    images, _, few = generic.tuned(bench.pipe.transformer, bench.images, STEPS, 1)
    assert few == 1 and not np.array_equal(images, bench.reference)
    np.testing.assert_array_equal(bench.images(), bench.reference)  # nothing of it is left


def test_deep_cache_runs_the_first_level_at_every_step():
    case = CASES_BY_NAME["sdxl"]
    pipe = case.make()
    full = case.call(pipe)
    with counted([pipe.unet.down_blocks[0].resnets[0], pipe.unet.mid_block.resnets[0]]) as counts:
        with deep_cache(pipe.unet, range(case.steps), case.steps):
            assert torch.equal(case.call(pipe), full)
        with deep_cache(pipe.unet, (0, 3), case.steps):
            few = case.call(pipe)
            assert torch.equal(case.call(pipe), few) and not torch.equal(few, full)
    assert counts == [3 * case.steps, case.steps + 2 * 2]
    assert torch.equal(case.call(pipe), full)


def test_nothing_begins_after_the_deadline(tiny, tmp_path):
    generic.main(arguments(tmp_path, "--models", "emoji-flux", "--seconds", "0"))
    assert read(tmp_path / "generic.csv") == []


def test_a_wrong_number_of_computed_steps_is_an_error(tiny, tmp_path):
    settings = generic.Settings(tmp_path, "cpu", 1, STEPS, (BUDGET,), (), tmp_path / "rows.csv", HEAD, float("inf"))
    bench = generic.Bench(settings, "emoji-flux", False)
    plan = plan_of("reuse", range(BUDGET), bench.sigmas, "output")
    with lesa.enable(bench.pipe, plan, guard="off") as enabled, pytest.raises(RuntimeError, match="8 calls"):
        bench.watched(enabled, BUDGET + 1)


def test_noise_predicting_solver_meets_its_timesteps():
    own = DDIMScheduler(set_alpha_to_one=False, steps_offset=1)
    own.set_timesteps(50)
    chosen = [int(own.timesteps[i]) for i in schedule.spaced(50, 5)]
    solver = fitted_solvers.MultistepSubset.like(own, chosen)
    solver.set_timesteps(5)
    assert solver.timesteps.tolist() == chosen and chosen[0] == 981
    end = own.alphas_cumprod[0].item()
    assert solver.sigmas[-1].item() == pytest.approx(((1 - end) / end) ** 0.5, rel=1e-4)


def test_flow_solver_meets_given_levels():
    solver = fitted_solvers.DpmSolver.at([1.0, 0.8, 0.3])
    solver.set_timesteps(3, sigmas=[9.0])
    assert solver.sigmas.tolist() == pytest.approx([1 - 1e-5, 0.8, 0.3, 0.0])
    assert solver.timesteps.tolist() == pytest.approx([999.99, 800.0, 300.0])


def test_published_schedules_compute_the_budget_each_once():
    for budget in range(4, 26):
        made = list(generic.published(50, budget))
        assert len({(kind, name) for kind, name, _ in made}) == len(made)
        assert all(len(computed) == budget for _, _, computed in made)
    kinds = {kind for kind, _, _ in generic.published(40, 12)}
    assert "dpcache (published)" in kinds and "l2p" not in kinds


def test_lowest_tenth():
    assert lowest_tenth(np.arange(64.0)) == 3.0  # the mean of 0 ... 6
    assert lowest_tenth(np.array([5.0, 4.0])) == 4.0


def _row(model, guidance, computed, method, kind, mean, low, steps="50"):
    cells = ("gpu", "c", "d", model, guidance, steps, "64", computed, method, kind, mean, "0.5", mean, low, "0", "0")
    return dict(zip(generic_table.COLUMNS, cells, strict=True))


ROWS = [
    _row("unet", "plain", "10", "generic", "searched", "30.0", "20.0"),
    _row("unet", "plain", "10", "generic", "searched", "40.0", "29.0"),  # newer
    _row("unet", "plain", "10", "reuse", "paper", "35.0", "29.5"),
    _row("unet", "plain", "10", "taylor-1", "even", "36.0", "28.0"),
    _row("unet", "plain", "10", "dpm++", "fewer", "90.0", "90.0"),  # no rule
    _row("wan", "guided", "10", "generic", "searched", "36.0", "33.0"),
    _row("wan", "guided", "10", "reuse", "even", "30.0", "30.0"),
    _row("wan", "guided", "8", "reuse", "even", "29.0", "28.0"),
    _row("wan", "guided", "7", "generic", "searched", "35.0", "31.0", "20"),
]


def test_margins_are_over_the_best_rule_of_each_figure():
    assert list(margins(ROWS)) == [
        (Cell("unet", "plain", 50, 10), pytest.approx(4.0), pytest.approx(-0.5)),
        (Cell("wan", "guided", 50, 10), pytest.approx(6.0), pytest.approx(3.0)),
    ]
    assert margin_table(ROWS)[1] == [
        ["50", "10", "2", "+5.00", "+4.00 unet plain", "-0.50 unet plain", "unet plain +4.00 / -0.50"],
        ["50", "all", "2", "+5.00", "+4.00 unet plain", "-0.50 unet plain", "1 cells"],
    ]
    assert margin_table([])[1] == []


def test_quality_table_shows_what_was_measured():
    head, lines = quality_table(ROWS, 50)
    assert head[-2:] == ["10 computed", "8 computed"]
    assert lines == [
        ["unet", "plain", "50", "**no fit**", "40.0 / 29.0", ""],
        ["unet", "plain", "50", "best rule", "36.0 / 28.0 taylor-1, even", ""],
        ["unet", "plain", "50", "fewer DPM-Solver++ steps", "90.0 / 90.0", ""],
        ["wan", "guided", "50", "**no fit**", "36.0 / 33.0", ""],
        ["wan", "guided", "50", "best rule", "30.0 / 30.0 reuse, even", "29.0 / 28.0 reuse, even"],
    ]
    assert quality_table(ROWS)[1] == [["wan", "guided", "20", "**no fit**", "35.0 / 31.0"]]
