"""The README is true: its snippets run, and its figures are rows of benchmarks/results."""

import csv
import json
import math
import re
import shlex
from pathlib import Path
from statistics import median

import pytest

import lesa
from lesa.cli.main import _parser, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = [line.strip() for line in README.splitlines() if re.match(r" {4}lesa ", line)]


def table_after(heading):
    """The cells of the first table after a line that starts with `heading`, without its two header lines."""
    lines = README[README.index(heading) :].splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
    return rows


def fidelity(name):
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# A line of each snippet, and what the snippet prints.
PRINTED = {
    "\nplan = lesa.fit(": "requests 1, computed 10, forecast 40",
    "guided = lesa.fit(": "requests 1, computed 20, forecast 80",
    "lesa.enable(pipe, assets.plan_path(7))": "requests 1, computed 10, forecast 40",
    "ops.forecast(history": "torch.Size([1, 256, 128])\n",
    "pipe.scheduler.sigmas.tolist()": "requests 1, computed 10, forecast 40",
    "class Denoiser": "requests 1, computed 10, forecast 40",
}


def test_no_snippet_is_left_out():
    assert [sum(line in snippet for line in PRINTED) for snippet in SNIPPETS] == [1] * len(PRINTED)


@pytest.mark.parametrize("line", PRINTED)
def test_snippets_run(line, capsys, recwarn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = (snippet for snippet in SNIPPETS if line in snippet)
    exec(compile(snippet, "README.md", "exec"), {})
    assert PRINTED[line] in capsys.readouterr().out
    assert not [w for w in recwarn if issubclass(w.category, lesa.LesaWarning)]


def test_commands_are_understood():
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        _parser().parse_args(shlex.split(command)[1:])


def test_generate_and_info_run_on_the_bundled_plan(tmp_path, capsys):
    plan = str(ROOT / "lesa" / "assets" / "emoji-flux-lesa-n10.safetensors")
    assert main(["info", plan]) == 0
    assert "8 of 50 steps computed: 0 1 2 3 12 22 32 42" in capsys.readouterr().out
    assert main(["generate", "red apple", "--plan", plan, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "red-apple-0-emoji-flux-lesa-n10.png").read_bytes().startswith(b"\x89PNG")


def test_demo_table_is_the_measured_one():
    rows = json.loads((RESULTS / "demo.json").read_text())
    shown = table_after("## What it does")
    assert len(shown) == len(rows)
    for cells, row in zip(shown, rows, strict=True):
        interval = "" if row["interval"] is None else str(row["interval"])
        assert cells[:3] == [row["method"], interval, str(row["computed"])]
        assert cells[3:5] == [f"{row['flops_speedup']:.2f}x", f"{row['speedup']:.2f}x"]
        if row["psnr"] is not None:
            assert cells[5:] == [f"{row['psnr']:.2f}", f"{row['ssim']:.4f}"]


def test_held_out_table_is_the_measured_one():
    rows = {(r["method"], r["after"], r["computed"]): r for r in fidelity("fidelity.csv")}
    named = {"lesa": ("lesa", "3"), "lesa, without gains": ("lesa", "2")}
    shown = table_after("On 64 captions")
    assert len(shown) == 6
    for method, *cells in shown:
        for computed, cell in zip(("13", "10", "8"), cells, strict=True):
            row = rows[(*named.get(method, (method, "")), computed)]
            assert row["captions"] == "64"
            assert cell == f"{float(row['psnr']):.2f} ± {float(row['psnr_sem']):.2f}, {float(row['ssim']):.4f}"


FITTED = {
    "fewer Euler steps": ("euler", "fewer", "", ""),
    "fewer UniPC steps": ("unipc", "fewer", "", ""),
    "fewer DPM-Solver++ steps": ("dpm++", "fewer", "", ""),
    "reuse, paper's schedule": ("reuse", "paper", "output", ""),
    "taylor-1, paper's schedule": ("taylor-1", "paper", "output", ""),
    "the paper's lesa": ("lesa", "paper", "hidden", ""),
    "reuse, searched": ("reuse", "searched", "output", ""),
    "taylor-2, searched": ("taylor-2", "searched", "output", ""),
    "hermite-2, searched": ("hermite-2", "searched", "output", ""),
    "regression, searched": ("regression", "searched", "output", ""),
    "lesa.fit, quick": ("lesa.fit", "fitted", "output", "quick"),
    "lesa.fit": ("lesa.fit", "fitted", "output", "default"),
    "lesa.fit, thorough": ("lesa.fit", "fitted", "output", "thorough"),
}


def measured_fits():
    """PSNR by guidance, what was run, and computed steps."""
    names = ("guidance", "method", "schedule", "site", "effort", "computed")
    return {tuple(row[name] for name in names): float(row["psnr"]) for row in fidelity("fitted.csv")}


def test_table_of_fits_is_the_measured_one():
    rows, shown = (
        measured_fits(),
        table_after("Mean PSNR in dB on 64 captions and noises that nothing was fitted to, at"),
    )
    assert [cells[0] for cells in shown] == list(FITTED)
    for name, *cells in shown:
        keys = [(guidance, *FITTED[name], budget) for guidance in "13" for budget in ("13", "10", "8", "6")]
        assert [cell.strip("*") for cell in cells] == [f"{rows[key]:.2f}" for key in keys]
    ours = rows[("1", *FITTED["lesa.fit"], "8")]
    more, same = (rows[("1", *FITTED["the paper's lesa"], budget)] for budget in ("13", "8"))
    assert f"{ours:.1f} against {more:.1f} dB, and {same:.1f} dB is what" in " ".join(README.split())


def test_what_fits_cost_and_what_more_effort_gains_is_as_measured():
    fits = [row for row in fidelity("fitted.csv") if row["method"] == "lesa.fit"]
    costs = [float(row["generations"]) for row in fits if row["effort"] == "default"]
    quick = [row for row in fits if (row["effort"], row["commit"]) == ("quick", "c8d1a56")]
    alone = [float(row["generations"]) for row in quick if "CPU" in row["hardware"]]
    compiling = [float(row["generations"]) for row in quick if "H100" in row["hardware"]]
    text = " ".join(README.split())
    assert f"the time of {min(costs):.0f} to {max(costs):.0f} full requests" in text and max(costs) <= 40
    assert len(alone) == len(compiling) == 8 and f"{min(alone):.0f}" == f"{max(alone):.0f}" and max(alone) <= 10
    assert f"a quick one of {max(alone):.0f} (on a GPU" in text
    assert f"when first needed, of {min(compiling):.0f} to {max(compiling):.0f}), a thorough" in text
    thorough = [row for row in fits if row["effort"] == "thorough"]
    costs = [float(row["generations"]) for row in thorough if "CPU" in row["hardware"]]
    assert f"a thorough one at most {max(costs):.0f}." in text and max(costs) <= 300
    rows = measured_fits()
    gains = {
        (guidance, budget): rows[(guidance, *FITTED["lesa.fit, thorough"], budget)]
        - rows[(guidance, *FITTED["lesa.fit"], budget)]
        for guidance, budget in {(row["guidance"], row["computed"]) for row in thorough}
    }
    guided = [f"{gains['3', budget]:.1f}" for budget in ("13", "10", "8", "6")]
    assert f"with it {', '.join(guided[:3])} and {guided[3]} dB at 13, 10, 8 and 6" in text
    assert all(abs(gain) < 0.15 for (guidance, _), gain in gains.items() if guidance == "1")
    assert len(gains) == 8 and min(gains.values()) > -0.15


def test_fits_are_ahead_by_what_was_asked_and_of_every_other_row():
    rows = measured_fits()
    asked = {("1", "13"): 9, ("1", "10"): 9, ("1", "8"): 7, ("1", "6"): 0}
    asked |= {("3", "13"): 4, ("3", "10"): 4, ("3", "8"): 2, ("3", "6"): 0}
    for (guidance, budget), margin in asked.items():
        ours = rows[(guidance, *FITTED["lesa.fit"], budget)]
        assert ours >= rows[(guidance, *FITTED["the paper's lesa"], budget)] + margin
        others = [v for k, v in rows.items() if k[0] == guidance and k[-1] == budget and k[1] != "lesa.fit"]
        quick = rows[(guidance, *FITTED["lesa.fit, quick"], budget)]
        assert len(others) > 25 and min(ours, quick) > max(others)


REQUESTS = {
    "20 steps": ("euler", "20"),
    "28 steps": ("euler", "28"),
    "35 steps": ("euler", "35"),
    "100 steps": ("euler", "100"),
    "28 steps, `true_cfg_scale=3`": ("cfg3", "28"),
    "28 steps of Heun": ("heun", "28"),
    "28 steps of DPM-Solver++": ("dpm++", "28"),
    "28 steps of UniPC": ("unipc", "28"),
    "image to image, strength 0.6": ("img2img0.6", "50"),
    "the same, from another caption's picture": ("img2img0.6-other", "50"),
}


def test_table_of_other_requests_is_the_measured_one():
    rows = {(r["case"], r["steps"], r["plan"]): float(r["psnr"]) for r in fidelity("transfer.csv")}
    shown = table_after("A fitted plan carries what it was fitted from")
    assert [cells[0] for cells in shown] == list(REQUESTS)
    for name, *cells in shown:
        plans = ("plan of 50 steps", "statistics of 50 steps", "native quick", "native default")
        figures = [rows[(*REQUESTS[name], plan)] for plan in plans]
        assert cells == [f"{figure:.2f}" for figure in figures]
        if "another" not in name:
            assert figures[0] >= max(figures[2:]) - 1


def test_what_a_plan_on_the_fly_takes_is_as_measured():
    rows: dict[tuple[str, ...], float] = {}
    for r in fidelity("build.csv"):  # of a machine whose speed scatters, so the fastest of its runs counts
        key = r["guidance"], r["scheduler"], r["steps"]
        rows[key] = min(float(r["p50_ms"]), rows.get(key, math.inf))
    slow = rows.pop(("3", "unipc", "100"))
    usual = sorted(rows.values())
    assert len(rows) == 29 and usual[-1] < 50
    said = (
        f"takes {usual[0]:.0f} to {usual[-1]:.0f} ms on one CPU thread, {slow:.0f} for 100 steps of UniPC with guidance"
    )
    assert said in " ".join(README.split())


def test_the_figures_by_number_of_prompts_are_the_measured_ones():
    quick = (row for row in fidelity("prompts.csv") if (row["guidance"], row["effort"]) == ("1", "quick"))
    newest = {row["prompts"]: row for row in quick}
    assert list(newest) == ["1", "2", "4", "8", "32"]
    rows = list(newest.values())
    *figures, last = (f"{float(row['psnr']):.1f}" for row in rows)
    assert f"32 prompts come to {', '.join(figures)} and {last} dB" in " ".join(README.split())
    assert all(1.0 <= float(f"{float(row['psnr_sem']):.1f}") <= 1.6 for row in rows)


GUARDED = {
    "captions like the fitted ones": ("1", "captions", "200"),
    "`true_cfg_scale=1.5`": ("1", "true_cfg_scale 1.5", "32"),
    "`true_cfg_scale=3`": ("1", "true_cfg_scale 3", "32"),
    "`true_cfg_scale=6`": ("1", "true_cfg_scale 6", "32"),
    "weights altered by a tenth of their norm": ("1", "weights altered by 0.1", "32"),
    "by three tenths": ("1", "weights altered by 0.3", "32"),
    "by as much as their norm": ("1", "weights altered by 1.0", "32"),
    "sentences as prompts": ("1", "sentences", "32"),
    "random letters as prompts": ("1", "random letters", "32"),
    "captions, fitted at `true_cfg_scale=3`": ("3", "captions", "200"),
    "the same plan at 1.5": ("3", "true_cfg_scale 1.5", "32"),
    "at 6": ("3", "true_cfg_scale 6", "32"),
    "at 3, sentences as prompts": ("3", "sentences", "32"),
}


def test_table_of_the_guard_is_the_measured_one():
    rows = {(r["fitted_guidance"], r["case"], r["requests"], r["guard"]): r for r in fidelity("guard.csv")}
    shown = table_after("## Guard")
    assert [cells[0] for cells in shown] == list(GUARDED)
    for name, *cells in shown:
        alone, guarded = (rows[(*GUARDED[name], way)] for way in ("off", "on"))
        figures = [
            guarded["computed_mean"],
            *(each[column] for column in ("psnr", "psnr_lowest") for each in (alone, guarded)),
        ]
        assert cells == [guarded["requests"], guarded["switches"], *(f"{float(figure):.1f}" for figure in figures)]
        near = rows[GUARDED[name][0], "captions", "200", "on"]
        assert float(guarded["psnr"]) >= float(near["psnr"]) - 1
        assert near["switches"] == "0" and "No caption of 400 left its plan" in README
    timed = [r for r in fidelity("guard.csv") if r["time_ratio"] and r["fitted_guidance"] == "1"]
    cpu = ratios(timed, requests="64")
    newest = next(r["commit"] for r in reversed(timed) if r["requests"] == "200")
    gpu = ratios(timed, requests="200", commit=newest)
    assert f"takes {percents(cpu)} of the time on one CPU thread" in README
    cost = fidelity("guard-cost.csv")
    assert len(gpu) == 6 and median(gpu) < 1.01
    wide, seconds = ratios(cost, model="flux-12")[-3:], {r["model"]: float(r["off_ms"]) / 1e3 for r in cost}
    assert max(wide) < 1.01
    said = (
        f"takes {percents(wide)} of a request of twelve of FLUX.1's blocks at 1024 x 1024 "
        f"([guard-cost.csv](benchmarks/results/guard-cost.csv), {seconds['flux-12']:.2f} s, in a loop of one's "
        "own, which waits for each step's timestep; all its 57 blocks take longer, the guard does not) and "
        f"{percents(gpu)}, in the median {100 * (median(gpu) - 1):.1f} %, in six times 200 pairs of emoji-flux"
    )
    assert said in " ".join(README.split())


def ratios(rows: list[dict[str, str]], **chosen: str) -> list[float]:
    """How much longer guarded requests took, in the rows that are chosen."""
    return [float(r["time_ratio"]) for r in rows if all(r[name] == value for name, value in chosen.items())]


def percents(found: list[float]) -> str:
    return f"{100 * (min(found) - 1):.1f} to {100 * (max(found) - 1):.1f} %"


def test_ablation_table_is_the_measured_one():
    rows = {(r["alpha"], r["stages"], r["prompts"], r["interval"], r["after"]): r for r in fidelity("ablation.csv")}
    shown = table_after("## Ablations")
    assert len(shown) == 8
    for alpha, stages, prompts, *cells in shown:
        after = "123" if prompts == "100" else "3"
        for interval, cell in zip(("5", "7", "10"), cells, strict=True):
            keys = [(alpha.lower(), {"three": "3", "one": "1"}[stages], prompts, interval, a) for a in after]
            figures = [f"{float(rows[key]['psnr']):.2f}" for key in keys if key in rows]
            assert cell == (" / ".join(figures) or "–")


def measured_operators(hardware):
    """p50 in microseconds by (op, shape, provider) and GB/s, of the newest rows, for K = 8 where there is a K."""
    rows = [r for r in fidelity("ops.csv") if hardware in r["hardware"] and r["k"] in ("8", "")]
    return {(r["op"], r["shape"], r["dtype"], r["provider"]): (float(r["p50_us"]), float(r["gbps"])) for r in rows}


def shown_time(us):
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.1f} us"


def test_speed_table_is_the_measured_one():
    rows = measured_operators("H100")
    shown = table_after("On an H100")
    assert len(shown) == 9
    for name, *cells in shown:
        op = name.split("`")[1]
        shape, dtype = ("t50x3", "float32") if op.startswith("kan") else ("flux", "bfloat16")
        for provider, cell in zip(("triton", "eager", "paper", "compile"), cells, strict=False):
            found = rows.get((op, shape, dtype, provider))
            assert cell == (shown_time(found[0]) if found else ""), (op, provider)
        copy = rows.get((op, shape, dtype, "copy"))
        share = f"{rows[op, shape, dtype, 'triton'][1] / copy[1]:.0%}" if copy and shape == "flux" else ""
        assert cells[4] == share


def test_the_measured_operators_reach_what_the_readme_says():
    rows = measured_operators("H100")

    def times_faster(op, provider, shape="flux", dtype="bfloat16"):
        return rows[op, shape, dtype, provider][0] / rows[op, shape, dtype, "triton"][0]

    def share_of_copy(op):
        return rows[op, "flux", "bfloat16", "triton"][1] / rows[op, "flux", "bfloat16", "copy"][1]

    assert times_faster("forecast", "paper") >= 4
    assert times_faster("forecast", "compile") >= 1
    assert share_of_copy("forecast") >= 0.9
    assert times_faster("forecast_head", "compile") >= 1.3
    assert (
        rows["forecast_head", "flux", "bfloat16", "triton"][1]
        >= 0.85 * rows["forecast_head", "flux", "bfloat16", "copy"][1]
    )
    assert times_faster("predict_loss", "eager") >= 5
    assert (
        rows["predict_loss", "flux", "bfloat16", "triton"][0] <= 1.2 * rows["forecast", "flux", "bfloat16", "triton"][0]
    )
    for op in ("kan", "kan_fwd_bwd"):
        assert times_faster(op, "eager", "t50x3", "float32") >= 10
    assert times_faster("kan", "compile", "t50x3", "float32") >= 3
    assert times_faster("train_step", "eager") >= 10


def test_the_cpu_figures_are_the_measured_ones():
    with open(RESULTS / "ops.csv", newline="") as file:
        rows = {
            (r["dtype"], r["provider"]): float(r["p50_us"]) / 1000
            for r in csv.DictReader(file)
            if "CPU" in r["hardware"] and (r["op"], r["shape"], r["k"]) == ("forecast", "flux", "8")
        }
    ours, eager = (
        [f"{rows[dtype, provider]:.1f}" for dtype in ("float32", "bfloat16")] for provider in ("cpp", "eager")
    )
    text = " ".join(README.split())
    assert f"the C++ forecast takes {ours[0]} ms in float32 and {ours[1]} ms in bf16" in text
    assert f"the best eager form {eager[0]} and {eager[1]} ms" in text
    assert all(rows[dtype, "eager"] >= 1.5 * rows[dtype, "cpp"] for dtype in ("float32", "bfloat16"))


@pytest.mark.parametrize("after", ["2", "3"], ids=["the paper's two stages", "with gains"])
def test_lesa_is_ahead_on_held_out_captions(after):
    rows = fidelity("fidelity.csv")
    margins = []
    for interval in ("5", "7", "10"):
        closed = [
            float(r["psnr"])
            for r in rows
            if r["interval"] == interval and r["method"] in ("reuse", "taylor-1", "taylor-2")
        ]
        ours = [float(r["psnr"]) for r in rows if (r["interval"], r["method"], r["after"]) == (interval, "lesa", after)]
        margins.append(ours[0] - max(closed))
    assert min(margins) > 0
    assert sum(margin >= 0.5 for margin in margins) >= 2
