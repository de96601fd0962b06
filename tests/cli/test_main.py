"""main: options, exit codes, and errors and warnings of one line."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from commandline import fails

import lesa
from lesa import assets
from lesa.cli import commands
from lesa.cli import main as cli

STEPS = 8
WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "apple", "snow", "blue", "bird")
SIGMAS = tuple(1 - t / STEPS for t in range(STEPS)) + (0.0,)
N5 = assets.HERE / "emoji-flux-lesa-n5.safetensors"


def test_a_warning_is_one_line(tmp_path: Path, capsys: Any) -> None:
    start = ["generate", "--plan", str(assets.fitted_path(10)), "--out", str(tmp_path), "--device", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main([*start, "--steps", "3", "snow"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "forecasts nothing" in line]
    assert len(told) == 1 and told[0].startswith("lesa: lesa forecasts nothing in requests of 3 steps")


def test_messages_of_several_lines_become_one(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("first\n  second\n")

    monkeypatch.setattr(commands, "_load", fail)
    fails(["generate", "snow"], "lesa generate: first second", tmp_path / "out", capsys, 1)


def test_interruption(capsys: Any, monkeypatch: Any) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_load", interrupt)
    assert cli.main(["generate", "snow"]) == 130
    assert capsys.readouterr().err == "lesa generate: interrupted\n"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(lesa.PlanError, match="does not exist"):
        cli.main(["--debug", "info", "missing.safetensors"])


def test_usage(capsys: Any) -> None:
    for arguments in (["nonsense"], ["train"], ["fit"], ["generate"], ["generate", "--steps", "x", "snow"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert "usage: lesa" in capsys.readouterr().err


def test_no_command_prints_the_help(capsys: Any) -> None:
    assert cli.main([]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: lesa [-h] [--debug] [--version] command ...\n")
    assert all(f"\n    {name} " in captured.out for name in ("demo", "fit", "train", "generate", "info"))
    assert captured.err == ""


@pytest.mark.parametrize("module", ["lesa", "lesa.cli.main"])
def test_python_m(module: str) -> None:
    """As a program the module runs the command and hands on its exit code."""
    call = [sys.executable, "-m", module]
    told = subprocess.run([*call, "--version"], capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout == f"lesa {lesa.__version__}\n"
    failed = subprocess.run([*call, "info", "missing.safetensors"], capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert failed.stderr.startswith("lesa info: plan 'missing.safetensors'")


def test_a_reader_that_has_gone_is_no_error() -> None:
    """As with `lesa info | head -0`."""
    read, write = os.pipe()
    os.close(read)
    try:
        told = subprocess.run(
            [sys.executable, "-m", "lesa", "info"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(write)
    assert (told.returncode, told.stderr) == (1, "")
