"""commands: what each command makes, and one line for each mistake with nothing written."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from commandline import fails, lines
from diffusers import DiffusionPipeline
from PIL import Image
from pipelines import CASES_BY_NAME
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lesa
from lesa import assets
from lesa.cli import commands
from lesa.cli import main as cli
from lesa.fitting import fit as fitting
from lesa.forecasters import plan_of
from lesa.plans.plan import Plan
from lesa.training.recording import Recording

STEPS = 8
WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "apple", "snow", "blue", "bird")
SIGMAS = tuple(1 - t / STEPS for t in range(STEPS)) + (0.0,)
N5 = assets.HERE / "emoji-flux-lesa-n5.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX pipeline on disk."""

    def tokenizer(length: int) -> PreTrainedTokenizerFast:
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
        )

    pipe = CASES_BY_NAME["flux_schnell"].make()
    pipe.register_modules(tokenizer=tokenizer(16), tokenizer_2=tokenizer(12))
    path = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan for any denoiser and eight steps."""
    return plan_of("taylor-1", (0, 1, 4, 7), SIGMAS).save(tmp_path / "plan.safetensors")


def on(folder: Path, *more: Any) -> list[str]:
    return [str(a) for a in ("--pipeline", folder, "--height", 32, "--width", 32, "--max-sequence-length", 12, *more)]


def expected(folder: Path, prompts: list[str], seed: int, plan: Path | None = None) -> list[Any]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if plan is not None:
        lesa.enable(pipe, plan)
    generator = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(
        prompts, height=32, width=32, max_sequence_length=12, num_inference_steps=STEPS, generator=generator
    ).images


@pytest.mark.parametrize("planned", [False, True])
def test_generate(folder: Path, plan: Path, tmp_path: Path, capsys: Any, planned: bool) -> None:
    out = tmp_path / "out"
    options = ("--plan", plan) if planned else ("--steps", STEPS)
    arguments = ["generate", *on(folder, *options), "--out", str(out), "--seed", "3", "a red apple", "snow"]
    assert cli.main(arguments) == 0
    stem = "-plan" if planned else ""
    paths = [out / f"a-red-apple-3{stem}.png", out / f"snow-4{stem}.png"]
    assert sorted(out.iterdir()) == paths
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [str(path) for path in paths]
    assert len(printed) == (3 if planned else 2)
    assert not planned or printed[2].startswith("requests 1, computed 4, forecast 4 (forecast_into_: ")
    full = expected(folder, ["a red apple", "snow"], 3)
    for path, image, other in zip(
        paths, expected(folder, ["a red apple", "snow"], 3, plan if planned else None), full, strict=True
    ):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
        assert np.array_equal(np.asarray(image), np.asarray(other)) == (not planned)


def test_generate_replaces_no_picture(folder: Path, plan: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    start = ["generate", *on(folder), "--out", str(out), "snow"]
    runs = [["--steps", "8"], ["--steps", "4"], ["--steps", "2"], ["--plan", str(plan)]]
    for more in runs:
        assert cli.main([*start, *more]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(out))]
    names = ["snow-0.png", "snow-0-2.png", "snow-0-3.png", "snow-0-plan.png"]
    assert printed == [str(out / name) for name in names]
    pictures = [np.asarray(Image.open(out / name)) for name in names]
    assert np.array_equal(pictures[0], np.asarray(expected(folder, ["snow"], 0)[0])), "the first one is to stay"
    assert all(not np.array_equal(pictures[0], other) for other in pictures[1:])


def test_the_dtype_reaches_the_pipeline_without_a_warning(folder: Path) -> None:
    options = cli._parser().parse_args(["generate", *on(folder), "--device", "cpu", "--dtype", "bfloat16", "snow"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = commands._load(options)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    assert not [str(warning.message) for warning in caught if "torch_dtype" in str(warning.message)]


def test_the_dtype_has_the_name_that_diffusers_gives_it(monkeypatch: Any) -> None:
    names = {"0.36.0": "torch_dtype", "0.39.1": "torch_dtype", "0.40.0": "dtype", "0.43.0.dev0": "dtype"}
    for version, name in {**names, "1.0.0": "dtype"}.items():
        monkeypatch.setattr(diffusers, "__version__", version)
        assert commands._dtype_name() == name


def test_the_default_device_is_the_best_there_is(monkeypatch: Any) -> None:
    options = cli._parser().parse_args(["generate", "snow"])
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert commands._device(options.device) == device
        assert commands._device("cpu") == "cpu"


def test_generate_with_a_plan_in_a_folder(folder: Path, plan: Path, tmp_path: Path, monkeypatch: Any) -> None:
    Plan.load(plan).save_pretrained(tmp_path / "kept.here")
    monkeypatch.chdir(tmp_path / "kept.here")
    for name in (tmp_path / "kept.here", "."):
        assert cli.main(["generate", *on(folder), "--out", str(tmp_path / "out"), "--plan", str(name), "snow"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["snow-0-kept.here-2.png", "snow-0-kept.here.png"]


def test_generate_at_another_step_count_and_budget(tmp_path: Path, capsys: Any) -> None:
    """A fitted plan serves what it was not fitted to, and its guard can be turned off."""
    start = ["generate", "--plan", str(assets.fitted_path(10)), "--out", str(tmp_path), "--device", "cpu"]
    for more in (["--guard", "off"], []):
        assert cli.main([*start, "--steps", "12", "--budget", "5", *more, "snow"]) == 0
        *_, printed = capsys.readouterr().out.partition("requests 1, ")
        assert printed.startswith("computed 5, forecast 7 ")
        assert ("guard off" in printed) == bool(more)
    assert len(list(tmp_path.glob("snow-0-emoji-flux-fitted-10-budget-5*.png"))) == 2


def test_generate_by_statistics(folder: Path, tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("snow\nrain\n")
    fitted = ["--prompts", str(prompts), "--out", str(tmp_path / "fit"), "--steps", "8", "--effort", "quick"]
    assert cli.main(["fit", *on(folder), *fitted, "--budget", "4"]) == 0
    [statistics] = (tmp_path / "fit").glob("statistics*.safetensors")
    capsys.readouterr()
    start = ["generate", *on(folder), "--plan", str(statistics), "--out", str(tmp_path / "out")]
    assert cli.main([*start, "--budget", "3", "snow"]) == 0
    assert "requests 1, computed 3, forecast 5 " in capsys.readouterr().out
    assert cli.main([*start, "snow"]) == 2
    assert "budget" in capsys.readouterr().err


def test_generate_with_bad_options(folder: Path, plan: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """All are found before a model is loaded."""
    monkeypatch.setattr(commands, "_load", lambda _: pytest.fail("a model was loaded"))
    mistakes: list[tuple[list[Any], str]] = [
        (["--plan", "missing.safetensors"], "'missing.safetensors' does not exist"),
        (["--steps", 0], "--steps 0"),
        (["--budget", 4], "--budget and --guard"),
        (["--guard", "off"], "--budget and --guard"),
        (["--plan", plan, "--budget", 0], "--budget 0"),
        (["--plan", plan, "--budget", 3], "budget=3"),
    ]
    for arguments, message in mistakes:
        fails(["generate", *on(folder), *arguments, "snow"], message, tmp_path / "out", capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_devices_that_are_not_there(folder: Path, tmp_path: Path, capsys: Any) -> None:
    for device in ("cuda", "cuda:1", "nonsense"):
        arguments = ["generate", *on(folder), "--device", device, "snow"]
        fails(arguments, f"--device {device}", tmp_path / "out", capsys)


def test_a_folder_without_a_pipeline(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    for pipeline in (tmp_path / "empty", "no/such/folder"):
        fails(["generate", "--pipeline", pipeline, "snow"], f"--pipeline {pipeline}", tmp_path / "out", capsys)


def test_plan_that_does_not_fit(folder: Path, plan: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["generate", *on(folder), "--plan", plan]
    fails([*options, "--steps", 6, "snow"], "6 denoiser steps but the plan was made for 8", tmp_path / "out", capsys)
    loaded = Plan.load(plan)
    Plan(loaded.computed, SIGMAS, loaded.rows, denoiser="WanTransformer3DModel").save(plan)
    fails([*options, "snow"], "made for WanTransformer3DModel", tmp_path / "out", capsys)


def test_option_the_pipeline_does_not_take(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(commands, "_load", lambda _: CASES_BY_NAME["wan"].make())
    arguments = ["generate", *on(folder), "--true-cfg-scale", 2, "snow"]
    message = "WanPipeline takes no true_cfg_scale: leave it out"
    fails(arguments, message, tmp_path / "out", capsys)


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: Any) -> Any:
    """Calls `lesa fit` on two prompts: (exit code, keyword arguments that `lesa.fit` was called with)."""
    asked: list[dict[str, Any]] = []
    real = inspect.signature(fitting.fit)

    def plan(budget: int) -> Plan:
        figures = {"fitting_psnr": 20.0 + budget, "held_out_psnr": 19.0 + budget, "held_out_ssim": budget / 10}
        return plan_of("reuse", range(budget), SIGMAS, "output", training=figures)

    def stand_in(pipe: Any, prompts: list[str], **options: Any) -> Any:
        assert (pipe, prompts) == ("pipe", ["a red apple", "snow"])
        real.bind(pipe, prompts, **options)
        asked.append(options)
        return {one: plan(one) for one in options["budget"]}

    def call(*arguments: Any) -> tuple[int, dict[str, Any]]:
        start = ["fit", *on(tmp_path), "--prompts", prompts, "--out", tmp_path / "out", "--steps", STEPS]
        return cli.main([str(argument) for argument in (*start, *arguments)]), asked[-1]

    monkeypatch.setattr(commands, "_load", lambda _: "pipe")
    monkeypatch.setattr(fitting, "fit", stand_in)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n\nsnow\n")
    return call


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.endswith(".safetensors")]


def test_fit(fit: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    request = {"height": 32, "width": 32, "max_sequence_length": 12, "num_inference_steps": STEPS}
    common = {"request": request, "folder": out, "effort": "default", "held_out": None, "batch": 1, "seed": 0}
    common["candidates"] = ()
    assert fit("--budget", 6, 3, 6) == (0, {**common, "budget": [3, 6]})
    assert rows(capsys.readouterr().out) == [
        ["3", "38%", "-", "23.00", "22.00", "0.3000", str(out / "plan-3.safetensors")],
        ["6", "75%", "-", "26.00", "25.00", "0.6000", str(out / "plan-6.safetensors")],
    ]
    more = {"effort": "quick", "held_out": 0, "batch": 2, "seed": 7}
    given = ["--effort", "quick", "--held-out", 0, "--batch", 2, "--seed", 7]
    assert fit("--budget", 5, *given) == (0, {**common, **more, "budget": [5]})
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["5"]
    paths = [str(plan_of("reuse", range(n), SIGMAS).save(tmp_path / f"{n}.safetensors")) for n in (3, 4)]
    several = [option for one in paths for option in ("--candidate", one)]
    assert fit("--budget", 3, 4, *several) == (0, {**common, "budget": [3, 4], "candidates": paths})
    assert not out.exists(), "what is in the folder is lesa.fit's"


def test_fit_frontier(fit: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    code, asked = fit("--frontier")
    assert (code, asked["budget"]) == (0, [4, 5, 6, 7])
    told = capsys.readouterr().out
    assert [row[0] for row in rows(told)] == ["4", "5", "6", "7"]
    assert told.endswith(f"frontier.json and frontier.png are in {out}/\n")
    assert [entry["computed"] for entry in json.loads((out / "frontier.json").read_text())] == [4, 5, 6, 7]
    unmarked = (out / "frontier.png").read_bytes()

    assert fit("--frontier", "--target-psnr", 24.5)[0] == 0
    assert capsys.readouterr().out.endswith("smallest budget that reaches the target: 6\n")
    assert (out / "frontier.png").read_bytes() != unmarked, "the choice is to be marked"
    code, asked = fit("--frontier", "--budget", 7, 2, 3, "--target-ssim", 0.25, "--target-psnr", 10)
    assert (code, asked["budget"]) == (0, [2, 3, 7])
    assert capsys.readouterr().out.endswith("smallest budget that reaches the target: 3\n")


def test_fit_frontier_that_reaches_too_little(fit: Any, tmp_path: Path, capsys: Any) -> None:
    assert fit("--frontier", "--target-psnr", 40)[0] == 1
    captured = capsys.readouterr()
    assert len(rows(captured.out)) == 4, "the table is still of use"
    message = "lesa fit: psnr=40: no budget reaches it; the best is 26 at 7 computed steps"
    assert captured.err.startswith(message)
    assert (tmp_path / "out" / "frontier.png").exists()


def test_fit_with_bad_options(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """All are found before a model is loaded."""
    monkeypatch.setattr(commands, "_load", lambda _: pytest.fail("a model was loaded"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("snow\n")
    mistakes: list[tuple[list[Any], str]] = [
        ([], "--budget"),
        (["--budget", 3, 0], "--budget 0"),
        (["--frontier", "--target-psnr", "nan"], "--target-psnr nan"),
        (["--budget", 3, "--target-psnr", 40], "add --frontier"),
        (["--budget", 3, "--target-ssim", 0.9], "add --frontier"),
        (["--frontier", "--target-ssim", 2], "--target-ssim 2"),
        (["--budget", 3, "--true-cfg-scale", "nan"], "--true-cfg-scale nan"),
        (["--frontier", "--steps", 4], "num_steps=4"),
        (["--budget", 3, "--held-out", 1], "--held-out 1"),
        (["--budget", 3, "--held-out", -1], "--held-out -1"),
        (["--budget", 3, "--batch", 0], "--batch 0"),
        (["--budget", 3, "--steps", 0], "--steps 0"),
        (["--budget", 3, "--prompts", "missing.txt"], "'missing.txt' does not exist"),
        (["--budget", 3, "--candidate", "missing.safetensors"], "'missing.safetensors' does not exist"),
        (["--budget", 3, "--candidate", N5], "computes 13 steps"),
        (["--budget", 13, "--candidate", N5, "--effort", "quick"], "effort='quick'"),
    ]
    for arguments, message in mistakes:
        fails(["fit", "--prompts", prompts, "--steps", STEPS, *arguments], message, tmp_path / "out", capsys)


def test_train_info_generate(folder: Path, tmp_path: Path, capsys: Any) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a red apple\n\nsnow\n")
    arguments = ["train", *on(folder), "--prompts", str(prompts), "--out", str(out), "--steps", str(STEPS)]
    arguments += ["--intervals", "3", "5", "--cuts", "0.8", "0.4", "--batch", "2"]
    assert cli.main(arguments) == 0
    paths = [out / f"lesa-n{interval}.safetensors" for interval in (3, 5)]
    assert capsys.readouterr().out.splitlines() == [
        f"N = 3: {paths[0]}", f"N = 5: {paths[1]}", f"loss curves: {out / 'losses.png'}",
    ]  # fmt: skip
    with Image.open(out / "losses.png") as image:
        assert image.format == "PNG"
    recording = Recording.open(out / "recording")
    assert recording.prompts == ("a red apple", "snow")
    assert recording.request == {"height": 32, "width": 32, "max_sequence_length": 12, "num_inference_steps": STEPS}
    plan = Plan.load(paths[0])
    assert [(stage.low, stage.window) for stage in plan.stages] == [(0.8, 4), (0.4, 8), (0.0, 8)]

    assert cli.main(["info", str(paths[0])]) == 0
    told = capsys.readouterr().out
    for text in (
        "forecaster       lesa, site hidden",
        "4 of 8 steps computed: 0 1 4 7",
        f"FluxTransformer2DModel, configuration {plan.config_hash}",
        f"{plan.capacity} features per context",
        "high (window 4, sigma > 0.8), middle (window 8, sigma > 0.4)",
        "\nprompts          2\n",
        f"written by       lesa {lesa.__version__}",
    ):
        assert text in told
    assert cli.main(["generate", *on(folder), "--plan", str(paths[1]), "--out", str(tmp_path / "out"), "snow"]) == 0
    assert "computed 2, forecast 6" in capsys.readouterr().out


def test_train_with_bad_options(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """All are found before a model is loaded."""
    monkeypatch.setattr(commands, "_load", lambda _: pytest.fail("a model was loaded"))
    prompts, empty = tmp_path / "prompts.txt", tmp_path / "empty.txt"
    prompts.write_text("snow\n")
    empty.write_text("\n  \n")
    mistakes: list[tuple[list[Any], str]] = [
        (["--intervals", 3, 9], "interval=9"),
        (["--intervals", 0], "interval=0"),
        (["--steps", 0], "--steps 0"),
        (["--cuts", 0.4, 0.8], "high=0.4, middle=0.8"),
        (["--batch", 0], "batch=0"),
        (["--prompts", "missing.txt"], "'missing.txt' does not exist"),
        (["--prompts", empty], "is empty"),
    ]
    for arguments, message in mistakes:
        start = ["train", "--prompts", prompts, "--steps", STEPS, "--intervals", 3]
        fails([*start, *arguments], message, tmp_path / "out", capsys)


def test_train_goes_on_only_with_its_own_folder(folder: Path, tmp_path: Path, capsys: Any) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("snow\n")
    start = ["train", *on(folder), "--prompts", str(prompts), "--out", str(out), "--intervals", "3"]
    assert cli.main([*start, "--steps", str(STEPS)]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main([*start, "--steps", "6"]) != 0
    [line] = lines(capsys.readouterr().err)
    assert "num_inference_steps=6" in line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_info_draws_a_plan(plan: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["info", str(plan)]) == 0
    told = capsys.readouterr().out
    assert told == f"{Plan.summary(Plan.load(plan))}\n"
    assert "##..#..#\n" in told
    assert sorted(tmp_path.rglob("*")) == before, "no picture was asked for"

    picture = tmp_path / "new" / "plan.png"
    assert cli.main(["info", str(plan), "--out", str(picture)]) == 0
    assert capsys.readouterr().out == f"{told}picture      {picture}\n"
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 500


def test_info_of_a_folder(plan: Path, tmp_path: Path, capsys: Any) -> None:
    Plan.load(plan).save_pretrained(tmp_path / "folder")
    assert cli.main(["info", str(tmp_path / "folder")]) == 0
    assert "4 of 8 steps computed: 0 1 4 7" in capsys.readouterr().out


def test_info_of_no_plan(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "plan.safetensors"
    fails(["info", path], f"plan '{path}' does not exist", tmp_path / "out", capsys)
    path.write_bytes(b"nonsense")
    fails(["info", path], "cannot be read", tmp_path / "out", capsys)
    save_file({"weight": torch.zeros(2, dtype=torch.bfloat16)}, path)
    fails(["info", path], "holds no plan", tmp_path / "out", capsys)
    path.rename(tmp_path / "other.safetensors")
    fails(["info", tmp_path], "has no file 'plan.safetensors'", tmp_path / "out", capsys)


def test_info_with_a_bad_picture(plan: Path, tmp_path: Path, capsys: Any) -> None:
    for out in (tmp_path / "plan.jpg", tmp_path / "plan"):
        fails(["info", plan, "--out", out], f"--out '{out}': expected a file name that ends in .png", out, capsys)
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "plan.png"
    fails(["info", plan, "--out", out], f"--out '{tmp_path / 'file'}' is a file: give a folder", out, capsys)
    fails(["info", "--out", "plan.png"], "--out 'plan.png': name the plan to draw", tmp_path / "plan.png", capsys)


def test_info_names_the_backends(capsys: Any) -> None:
    assert cli.main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["lesa"] == lesa.__version__
    assert list(lines)[1:] == list(lesa.ops.BACKENDS)
    assert lines["torch"] == torch.__version__
