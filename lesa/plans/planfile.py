"""The file of a plan: safetensors with a JSON description."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as serialize

from ..runtime.likeness import Likeness, Prompts
from . import files
from .plan import PLAN_FILE, Expected, Plan, PlanError, Row
from .routing import Stage

KIND = files.Kind(
    "a plan",
    "lesa-plan-1",
    PlanError,
    "make or copy it again",
    "Plan.save",
    {
        "lesa-statistics": "holds statistics, of which plans are made: say how many steps to compute, e.g. "
        "lesa.enable(pipe, path, budget=10)"
    },
)
_SURROGATE = "surrogate_"  # before the names of its arrays
# Fields that JSON holds as they are.
_PLAIN = ("site", "forecaster", "denoiser", "config_hash", "training", "library_version")


def save(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write a plan; `path` is replaced at once or not at all."""
    from .. import __version__

    path, total = Path(path), plan.num_steps
    if path.is_dir():
        raise PlanError(
            f"path={str(path)!r} is a folder: give the name of a file in it, or use plan.save_pretrained(folder), "
            f"which writes {PLAN_FILE} and a model card"
        )
    contexts, checked, expecting = (sorted(by_context) for by_context in (plan.rows, plan.checks, plan.expected))
    arrays: dict[str, np.ndarray] = {
        "computed": np.asarray(plan.computed, np.int32),
        "sigmas": np.asarray(plan.sigmas, np.float64),
        **_tables("", plan.rows, contexts, total),
        **_tables("check_", plan.checks, checked, total),
        "error": _numbers(plan.expected, "error", expecting, total),
        "spread": _numbers(plan.expected, "std", expecting, total),
    }
    for name, values in (("timesteps", plan.timesteps), ("response", plan.impulse_response)):
        if values is not None:
            arrays[name] = np.asarray(values, np.float64)
    description: dict[str, Any] = {
        "format": KIND.format,
        "contexts": contexts,
        "check_contexts": checked,
        "expected_contexts": expecting,
        "num_steps": total,
        "stages": [asdict(stage) for stage in plan.stages],
        **{name: getattr(plan, name) for name in _PLAIN},
        "training": dict(plan.training),
        "library_version": __version__,
    }
    if plan.surrogate is not None:
        parts = dict(plan.surrogate)
        description["surrogate_contexts"] = parts.pop("contexts").tolist()
        arrays |= {f"{_SURROGATE}{name}": array for name, array in parts.items()}
    if plan.likeness is not None:
        arrays |= _of_likeness(plan.likeness)
        description["likeness_contexts"] = list(plan.likeness.prompts)
    # safetensors writes an array's memory as it lies.
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array.size}
    files.replace_file(path, serialize(arrays, files.metadata(description)))
    return path


def load(path: str | os.PathLike[str]) -> Plan:
    """Read a plan.

    Raises:
        PlanError: the file is missing, damaged, or no plan; the message says which and what to do.
    """
    return files.load(path, KIND, _plan)


def _surrogate(arrays: Mapping[str, np.ndarray], contexts: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of `Plan.surrogate`."""
    own = {name.removeprefix(_SURROGATE): array for name, array in arrays.items() if name.startswith(_SURROGATE)}
    return own | {"contexts": np.array(contexts)}


def _of_likeness(likeness: Likeness) -> dict[str, np.ndarray]:
    """A likeness as arrays; the widths of contexts may differ."""
    arrays = {"likeness_scatter": np.array([prompts.scatter for prompts in likeness.prompts.values()])}
    for i, prompts in enumerate(likeness.prompts.values()):
        arrays[f"likeness_center_{i}"] = np.asarray(prompts.center, np.float32)
    if likeness.weights is not None:
        arrays["likeness_weights"] = np.asarray(likeness.weights, np.float32)
    return arrays


def _likeness(arrays: Mapping[str, np.ndarray], contexts: Sequence[str]) -> Likeness:
    """The likeness of `_of_likeness`."""
    prompts = {
        context: Prompts(tuple(arrays[f"likeness_center_{i}"].tolist()), float(arrays["likeness_scatter"][i]))
        for i, context in enumerate(contexts)
    }
    weights = arrays.get("likeness_weights")
    return Likeness(prompts, None if weights is None else tuple(map(tuple, weights.tolist())))


def _plan(description: dict[str, Any], arrays: dict[str, np.ndarray]) -> Plan:
    computed = tuple(arrays["computed"].tolist())
    forecast = sorted(set(range(description["num_steps"])) - set(computed))
    # Plans made before there was a guard know neither checks nor expected errors; only fitted ones know a surrogate.
    checks = _rows("check_", arrays, description.get("check_contexts", []), computed)
    modelled, alike = description.get("surrogate_contexts"), description.get("likeness_contexts")
    return Plan(
        computed=computed,
        sigmas=tuple(arrays["sigmas"].tolist()),
        rows=_rows("", arrays, description["contexts"], forecast),
        timesteps=tuple(arrays["timesteps"].tolist()) if "timesteps" in arrays else None,
        impulse_response=tuple(arrays["response"].tolist()) if "response" in arrays else None,
        stages=tuple(Stage(**stage) for stage in description["stages"]),
        checks={context: {step: row for step, row in own.items() if row.steps} for context, own in checks.items()},
        expected=_expected(arrays, description.get("expected_contexts", [])),
        surrogate=None if modelled is None else _surrogate(arrays, modelled),
        likeness=None if alike is None else _likeness(arrays, alike),
        **{name: description[name] for name in _PLAIN},
    )


def _tables(
    prefix: str, rows: Mapping[str, Mapping[int, Row]], contexts: Sequence[str], total: int
) -> dict[str, np.ndarray]:
    """Rows as arrays [C, T, K], [C, T, K] and [C, T]; unused entries read step -1."""
    width = max((len(row.steps) for by_step in rows.values() for row in by_step.values()), default=1)
    steps = np.full((len(contexts), total, width), -1, np.int32)
    weights = np.zeros((len(contexts), total, width), np.float64)
    bias = np.zeros((len(contexts), total), np.float64)
    for i, context in enumerate(contexts):
        for step, row in rows.get(context, {}).items():
            steps[i, step, : len(row.steps)] = row.steps
            weights[i, step, : len(row.steps)] = row.weights
            bias[i, step] = row.bias
    return {f"{prefix}steps": steps, f"{prefix}weights": weights, f"{prefix}bias": bias}


def _rows(
    prefix: str, arrays: Mapping[str, np.ndarray], contexts: Sequence[str], steps: Iterable[int]
) -> dict[str, dict[int, Row]]:
    """The rows of `_tables` at some steps."""
    steps = list(steps)
    return {context: {step: _row(prefix, arrays, i, step) for step in steps} for i, context in enumerate(contexts)}


def _row(prefix: str, arrays: Mapping[str, np.ndarray], i: int, step: int) -> Row:
    steps, weights = arrays[f"{prefix}steps"][i, step], arrays[f"{prefix}weights"][i, step]
    used = steps >= 0
    bias = float(arrays[f"{prefix}bias"][i, step])
    return Row(tuple(steps[used].tolist()), tuple(weights[used].tolist()), bias)


def _numbers(
    expected: Mapping[str, Mapping[int, Expected]], name: str, contexts: Sequence[str], total: int
) -> np.ndarray:
    """One number of what is expected, for each context and step [C, T]; NaN where there is none."""
    table = np.full((len(contexts), total), np.nan)
    for i, context in enumerate(contexts):
        for step, value in expected[context].items():
            table[i, step] = getattr(value, name)
    return table


def _expected(arrays: Mapping[str, np.ndarray], contexts: Sequence[str]) -> dict[str, dict[int, Expected]]:
    """What `_numbers` wrote; of plans that knew the largest errors only, nothing."""
    if "spread" not in arrays:
        return {}
    expected: dict[str, dict[int, Expected]] = {}
    for i, context in enumerate(contexts):
        both = zip(arrays["error"][i].tolist(), arrays["spread"][i].tolist(), strict=True)
        expected[context] = {step: Expected(*pair) for step, pair in enumerate(both) if not all(map(math.isnan, pair))}
    return expected
