"""Runs kept in a folder, so that a fit that was interrupted, or one with more effort, does not run them again."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as serialize

from ..planner.surrogate import Outcome
from ..plans.files import Kind, load, metadata, replace_file
from ..plans.plan import Plan
from ..runtime.driver import LesaWarning
from .trials import Measured, Trials

_FORMAT = "lesa-trial-1"


class KeptError(ValueError):
    """A kept run cannot be used."""


_KIND = Kind("a run", _FORMAT, KeptError, "it is replaced", "lesa.fit")


class Kept:
    """Runs plans on the fitting requests, and keeps each run in a file of its own.

    Args:
        trials: the fitting requests.
        folder: of the files, tens of kilobytes a run; None keeps nothing.
    """

    def __init__(self, trials: Trials, folder: Path | None) -> None:
        self.found = 0
        self.seconds = 0.0  # that the runs took which were found
        self._trials, self._folder = trials, folder
        self._seconds: dict[str, float] = {}

    def measure(self, plan: Plan) -> Measured:
        """What a plan does: out of the folder if it was run there on the same recording, else run now."""
        found = _load(self._path(plan), self._key(plan)) if self._folder is not None else None
        if found is None:
            return self._run(plan)
        measured, seconds = found
        if self._key(plan) not in self._seconds:
            self._seconds[self._key(plan)] = seconds
            self.found, self.seconds = self.found + 1, self.seconds + seconds
        return measured

    def judge(self, plan: Plan, measured: Measured, again: bool = True) -> None:
        """Take the SSIM of what a plan did, and keep it too.

        Args:
            plan: what was run.
            measured: what it did; its `ssim` is set where there are pictures.
            again: run it once more where its pictures were not kept.
        """
        if measured.ssim is not None or not self._trials.compares_pictures:
            return
        if measured.final is None:
            if not again:
                return
            measured.final = self._trials.run(plan).final
        self._trials.judge(measured)
        self._keep(plan, measured)

    def _run(self, plan: Plan) -> Measured:
        begin = time.perf_counter()
        measured = self._trials.run(plan)
        self._seconds[self._key(plan)] = time.perf_counter() - begin
        self._keep(plan, measured)
        return measured

    def _keep(self, plan: Plan, measured: Measured) -> None:
        if self._folder is None:
            return
        key, outcome = self._key(plan), measured.outcome
        arrays = {"basis": outcome.basis, "along": outcome.along, "error": outcome.error}
        arrays |= {"psnr": measured.psnr, "slopes": measured.error_gains}
        if measured.ssim is not None:
            arrays["ssim"] = measured.ssim
        arrays = {name: np.ascontiguousarray(array, np.float64) for name, array in arrays.items()}
        told = {"format": _FORMAT, "key": key, "seconds": self._seconds[key], "sum": _sum(arrays)}
        told["refused"] = measured.refused
        replace_file(self._path(plan), serialize(arrays, metadata(told)))

    def _key(self, plan: Plan) -> str:
        return digest(plan, self._trials.identity)

    def _path(self, plan: Plan) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._key(plan)[:32]}.safetensors"


def digest(plan: Plan, recording: str = "") -> str:
    """A hash of all that a run of a plan depends on: its schedule, rows and site, and the recording."""
    rows = {context: {step: asdict(row) for step, row in by_step.items()} for context, by_step in plan.rows.items()}
    told = [_FORMAT, recording, plan.site, plan.computed, plan.sigmas, rows]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _sum(arrays: dict[str, np.ndarray]) -> str:
    """A checksum: safetensors have none."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()


def _load(path: Path, key: str) -> tuple[Measured, float] | None:
    """A kept run and its seconds; None where there is none, or it is damaged or another's."""
    if not path.exists():
        return None

    def build(told: dict[str, Any], arrays: dict[str, Any]) -> tuple[Measured, float]:
        if told["key"] != key:
            raise KeptError("it is of another plan or recording")
        if told["sum"] != _sum(arrays):
            raise KeptError("its numbers are not those that were written")
        outcome = Outcome(arrays["basis"], arrays["along"], arrays["error"])
        refused, ssim = tuple(told["refused"]), arrays.get("ssim")
        measured = Measured(arrays["psnr"], outcome, arrays["slopes"], refused, ssim=ssim)
        return measured, float(told["seconds"])

    try:
        return load(path, _KIND, build)
    except KeptError as error:
        warnings.warn(f"{error}; the plan is run once more", LesaWarning, stacklevel=2)
        return None
