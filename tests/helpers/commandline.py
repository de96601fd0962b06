"""Runs of the command `lesa` that fail, and what they print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lesa.cli import main as cli


def lines(text: str) -> list[str]:
    """What stays on a terminal after the progress bars."""
    kept = [line.split("\r")[-1] for line in text.split("\n")]
    return [line for line in kept if line.strip() and "%|" not in line]


def fails(arguments: list[Any], message: str, out: Path, capsys: Any, code: int = 2) -> None:
    """The exit code, one line that says what is wrong, nothing written."""
    arguments = [str(argument) for argument in arguments]
    assert cli.main([*arguments, "--out", str(out)] if arguments[0] != "info" else arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = lines(captured.err)
    assert line.startswith(f"lesa {arguments[0]}: ")
    assert message in line
    assert not out.exists()
