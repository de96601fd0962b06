"""What benchmarks on the held-out captions of emoji-flux share: the pipeline, its images, and the rows they end in."""

from __future__ import annotations

import argparse
import csv
import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lesa import assets
from lesa.models.pipeline import run
from lesa.runtime.driver import Driver

from .measuring import append_row, full_float32, hardware

_LABELS = ("hardware", "commit", "date", "pipeline", "captions")


def load(device: str) -> Any:
    """emoji-flux in full float32."""
    full_float32()
    return assets.load(device)


def count(device: str) -> int:
    """How many captions are measured by default, in one pipeline call."""
    return 64 if device.startswith("cuda") else 8


def request(guidance: float = 1, **more: Any) -> dict[str, Any]:
    """Keyword arguments of a pipeline call; `guidance` 1 is none."""
    guided = {} if guidance == 1 else {"true_cfg_scale": float(guidance), "negative_prompt": ""}
    return {**assets.REQUEST, **guided, **more}


def images(
    pipe: Any, captions: int, request: Mapping[str, Any], driver: Driver | None = None, site: str = "output"
) -> np.ndarray:
    """The images of the first held-out captions out of one pipeline call, float [captions, H, W, 3] in [0, 1]."""
    prompts, seeds = assets.held_out_prompts()[:captions], assets.held_out_seeds()[:captions]
    return run(pipe, prompts, seeds, request, driver, site, output_type="np", return_dict=False)[0]


def standard_error(values: np.ndarray) -> float:
    """Of the mean of `values`; nan for a single one."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def quality(psnr: np.ndarray) -> list[str]:
    """The cells `psnr` and `psnr_sem`."""
    return [f"{psnr.mean():.3f}", f"{standard_error(psnr):.3f}"]


class Sheet:
    """A CSV file that a later call goes on with: what is there of the same run is not measured again.

    Args:
        path: of the file.
        identity: columns that tell rows of one run apart.
        figures: columns of what is measured.
        device: of the pipeline.
        commit: of the code that runs.
        captions: how many are measured.
        seconds: from now, after which nothing is wanted any more.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(
        self,
        path: Path,
        identity: Sequence[str],
        figures: Sequence[str],
        *,
        device: str,
        commit: str,
        captions: int,
        seconds: float,
    ) -> None:
        self._path, self._identity = path, identity
        self._columns = [*_LABELS, *identity, *figures]
        self._head = [hardware(device), commit, datetime.date.today().isoformat(), "emoji-flux", str(captions)]
        self._deadline = time.monotonic() + seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = self._read()
        self._done = {tuple(row[name] for name in identity) for row in self.rows}

    @property
    def is_late(self) -> bool:
        """Whether nothing new may begin."""
        return time.monotonic() >= self._deadline

    def wants(self, *identity: Any) -> bool:
        """Whether a row is missing, and there is time for it."""
        return tuple(map(str, identity)) not in self._done and not self.is_late

    def add(self, identity: Sequence[Any], figures: Sequence[str]) -> None:
        """Append a row and print it."""
        cells = [*map(str, identity), *figures]
        append_row(self._path, self._columns, [*self._head, *cells])
        self._done.add(tuple(map(str, identity)))
        self.rows.append(dict(zip(self._columns, [*self._head, *cells], strict=True)))
        print(*cells, sep=", ", flush=True)

    def _read(self) -> list[dict[str, str]]:
        """The rows of the same run, whatever their date; a line that was cut off is left out."""
        if not self._path.is_file():
            return []
        with self._path.open(newline="") as file:
            lines = csv.DictReader(file)
            if list(lines.fieldnames or ()) != self._columns:
                raise ValueError(
                    f"{self._path} has the columns {lines.fieldnames}, expected {self._columns}: give another file"
                )
            whole = [row for row in lines if None not in row.values() and None not in row]
        same = {name: cell for name, cell in zip(_LABELS, self._head, strict=True) if name != "date"}
        return [row for row in whole if same.items() <= row.items()]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark that fills a sheet; it adds options of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--captions", type=int, help="held-out ones, up to 64; default 64 on a GPU, 8 on a CPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing new begins")
    return parser


def sheet(options: argparse.Namespace, identity: Sequence[str], figures: Sequence[str]) -> Sheet:
    """The sheet that such a command line asks for."""
    return Sheet(
        options.results,
        identity,
        figures,
        device=options.device,
        commit=options.commit,
        captions=options.captions or count(options.device),
        seconds=options.seconds,
    )
