"""Rows of weights, the errors to expect of them, and their tables in a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ANY_CONTEXT = "*"
SITES = ("hidden", "output")
MAX_READS = 16


class PlanError(ValueError):
    """A plan is malformed, unreadable, or does not fit the denoiser or the request."""


class LesaWarning(UserWarning):
    """Something keeps lesa from its full speed or fidelity."""


@dataclass(frozen=True)
class Row:
    """One forecast: F^_t = sum_k weights[k] * F_{steps[k]} + bias.

    Args:
        steps: earlier step indices of the same request, computed or forecast alike.
        weights: one weight a step.
        bias: added to every element.
    """

    steps: tuple[int, ...]
    weights: tuple[float, ...]
    bias: float = 0.0

    def check(self, step: int, where: str) -> None:
        """Check that the row can serve a step.

        Args:
            step: the step it forecasts.
            where: what the row is, for the error.

        Raises:
            PlanError: it reads no, too many or later steps, or holds numbers that are not finite.
        """
        if self._is_sound(step):  # quick: an adapted plan has some hundreds of rows, and a request waits for it
            return
        if len(self.steps) != len(self.weights) or not 1 <= len(self.steps) <= MAX_READS:
            raise PlanError(
                f"{where}: {len(self.steps)} steps and {len(self.weights)} weights; expected as many of each, "
                f"1 to {MAX_READS}"
            )
        if not all(0 <= read < step for read in self.steps):
            raise PlanError(f"{where}: reads steps {self.steps}; only earlier steps of the request can be read")
        raise PlanError(f"{where}: weights {self.weights} and bias {self.bias} must be finite")

    def _is_sound(self, step: int) -> bool:
        return (
            1 <= len(self.steps) == len(self.weights) <= MAX_READS
            and min(self.steps) >= 0
            and max(self.steps) < step
            and all(map(math.isfinite, self.weights))
            and math.isfinite(self.bias)
        )


@dataclass(frozen=True)
class Expected:
    """The relative error ||F^ - F|| / ||F|| of one check in the fitting requests.

    Args:
        error: its geometric mean, at least 0.
        std: the standard deviation of its natural logarithm, above 0.
    """

    error: float
    std: float


Rows = Mapping[str, Mapping[int, Row]]  # by context and step
Errors = Mapping[str, Mapping[int, Expected]]


def rows_to_arrays(prefix: str, rows: Rows, num_steps: int) -> dict[str, np.ndarray]:
    """Rows as arrays [C, T, K], [C, T, K] and [C, T], contexts in sorted order; unused entries read step -1."""
    contexts = sorted(rows)
    width = max((len(row.steps) for by_step in rows.values() for row in by_step.values()), default=1)
    steps = np.full((len(contexts), num_steps, width), -1, np.int32)
    weights = np.zeros((len(contexts), num_steps, width), np.float64)
    bias = np.zeros((len(contexts), num_steps), np.float64)
    for i, context in enumerate(contexts):
        for step, row in rows[context].items():
            steps[i, step, : len(row.steps)] = row.steps
            weights[i, step, : len(row.steps)] = row.weights
            bias[i, step] = row.bias
    return {f"{prefix}steps": steps, f"{prefix}weights": weights, f"{prefix}bias": bias}


def rows_from_arrays(
    prefix: str, arrays: Mapping[str, np.ndarray], contexts: Sequence[str], steps: Iterable[int], num_steps: int
) -> dict[str, dict[int, Row]]:
    """The rows of `rows_to_arrays` at some steps.

    Raises:
        PlanError: an array has another shape or dtype.
    """
    steps, names = list(steps), [f"{prefix}{name}" for name in ("steps", "weights", "bias")]
    if contexts or any(name in arrays for name in names):
        shape = (len(contexts), num_steps, (*arrays[names[0]].shape, 0, 0, 0)[2])
        for name, kind, expected in zip(names, "iff", (shape, shape, shape[:2]), strict=True):
            check_array(name, arrays[name], kind, expected)
    return {context: {step: _row(prefix, arrays, i, step) for step in steps} for i, context in enumerate(contexts)}


def errors_to_arrays(expected: Errors, num_steps: int) -> dict[str, np.ndarray]:
    """Expected errors as arrays [C, T], contexts in sorted order; NaN where there is none."""
    contexts = sorted(expected)
    error, std = (np.full((len(contexts), num_steps), np.nan) for _ in range(2))
    for i, context in enumerate(contexts):
        for step, one in expected[context].items():
            error[i, step], std[i, step] = one.error, one.std
    return {"error": error, "spread": std}  # "spread": its name in files


def errors_from_arrays(
    arrays: Mapping[str, np.ndarray], contexts: Sequence[str], num_steps: int
) -> dict[str, dict[int, Expected]]:
    """The errors of `errors_to_arrays`; none of files that knew only the largest errors.

    Raises:
        PlanError: an array has another shape or dtype.
    """
    if "spread" not in arrays:
        return {}
    for name in ("error", "spread"):
        check_array(name, arrays[name], "f", (len(contexts), num_steps))
    expected: dict[str, dict[int, Expected]] = {}
    for i, context in enumerate(contexts):
        both = zip(arrays["error"][i].tolist(), arrays["spread"][i].tolist(), strict=True)
        expected[context] = {step: Expected(*pair) for step, pair in enumerate(both) if not all(map(math.isnan, pair))}
    return expected


def check_array(name: str, array: np.ndarray, kind: str, shape: tuple[int, ...]) -> None:
    """Check an array of a file.

    Args:
        kind: of its dtype: "i" for integers, "f" for floats.

    Raises:
        PlanError: it has another shape or kind of dtype.
    """
    if array.dtype.kind != kind or array.shape != shape:
        words = {"i": "integers", "f": "floats"}[kind]
        raise PlanError(f"{name} is {array.dtype} {list(array.shape)}: expected {words} {list(shape)}")


def _row(prefix: str, arrays: Mapping[str, np.ndarray], i: int, step: int) -> Row:
    steps, weights = arrays[f"{prefix}steps"][i, step], arrays[f"{prefix}weights"][i, step]
    used = steps >= 0
    bias = float(arrays[f"{prefix}bias"][i, step])
    return Row(tuple(steps[used].tolist()), tuple(weights[used].tolist()), bias)
