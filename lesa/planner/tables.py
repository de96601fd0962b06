"""Rows of weights as arrays [C, T, T], and the plans they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..forecasters import check_rows, rows_of
from ..plans.plan import ANY_CONTEXT, MAX_READS, Plan, Row
from .statistics import Statistics

_STEEPEST, _TINY = 2.0, 1e-6


def closed_form(statistics: Statistics, computed: Sequence[int], forecaster: str = "regression") -> np.ndarray:
    """The rows [C, T, T] of a forecaster at the output site."""
    T = statistics.num_steps
    grams = (statistics.gram("output", context) for context in statistics.contexts)
    return np.stack([_table(rows_of(forecaster, computed, T, gram), T) for gram in grams])


def linear_extrapolation(computed: Sequence[int], contexts: int, num_steps: int) -> np.ndarray:
    """The rows [C, T, T] of "taylor-1", the same for all contexts, made at once: where to start a search from."""
    steps, every = np.asarray(computed), np.arange(num_steps)
    last = np.searchsorted(steps, every, side="right") - 1
    rows, before = np.zeros((num_steps, num_steps)), np.maximum(last - 1, 0)
    slope = np.where(last > 0, (every - steps[last]) / np.maximum(steps[last] - steps[before], 1), 0.0)
    rows[every, steps[last]] = 1.0 + slope
    rows[every, steps[before]] -= slope
    rows[steps] = 0.0
    return np.broadcast_to(rows, (contexts, num_steps, num_steps)).copy()


def plan_of(statistics: Statistics, computed: tuple[int, ...], weights: np.ndarray, **provenance: Any) -> Plan:
    """The plan of rows [C, T, T] at the output site, with checks for the guard by regression.

    Args:
        statistics: of the requests.
        computed: the schedule.
        weights: [C, T, T].
        provenance: further fields of `Plan`, e.g. `training`.
    """
    contexts, T = statistics.contexts, statistics.num_steps
    rows, checks = {}, {}
    for c, context in enumerate(contexts):
        rows[context] = _rows(weights[c], computed)
        checks[context] = check_rows("regression", computed, T, statistics.gram("output", context))
    served = served_by(statistics)
    return Plan(
        computed,
        statistics.sigmas,
        {name: rows[context] for name, context in served.items()},
        site="output",
        forecaster="fitted",
        denoiser=statistics.denoiser,
        config_hash=statistics.config_hash,
        checks={name: checks[context] for name, context in served.items()},
        impulse_response=tuple(statistics.impulse_response[-1]),
        **provenance,
    )


def written_out(plan: Plan, context: str) -> np.ndarray:
    """[T, T]: each step's feature as weights over computed ones, forecasts that rows read written out; without bias."""
    rows, every = plan.rows_of(context), np.eye(plan.num_steps)
    for step in sorted(rows):
        every[step] = np.asarray(rows[step].weights) @ every[list(rows[step].steps)]
    return every


def served_by(statistics: Statistics) -> dict[str, str]:
    """Which context's rows serve each context that a plan names."""
    # A request may name its contexts otherwise, or not at all: image-to-image pipelines do not.
    first = {ANY_CONTEXT: statistics.contexts[0]}
    return first if len(statistics.contexts) == 1 else first | {context: context for context in statistics.contexts}


def prior_error_gains(statistics: Statistics, requests: int) -> np.ndarray:
    """Error gains [C, T, P] of P requests, not measured: what is not signal goes as the noise does, with 1 / sigma."""
    sigma = np.maximum(np.asarray(statistics.sigmas[:-1]), _TINY)
    error_gains = np.minimum(1.0 / sigma, _STEEPEST)[None, :, None]
    return np.broadcast_to(error_gains, (len(statistics.contexts), len(sigma), requests)).copy()


def _rows(weights: np.ndarray, computed: tuple[int, ...]) -> dict[int, Row]:
    """Rows [T, T] as a plan has them."""
    rows = {}
    for step in sorted(set(range(len(weights))) - set(computed)):
        reads = [j for j in computed if j < step][-MAX_READS:]
        rows[step] = Row(tuple(reads), tuple(float(weights[step, j]) for j in reads))
    return rows


def _table(rows: Mapping[int, Row], num_steps: int) -> np.ndarray:
    """Rows of a plan as [T, T]."""
    table = np.zeros((num_steps, num_steps))
    for step, row in rows.items():
        table[step, list(row.steps)] = row.weights
    return table
