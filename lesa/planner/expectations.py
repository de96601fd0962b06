"""Which errors the guard may expect of a plan's checks: how large they are in the fitting requests, and how scattered.

Errors of easy and hard requests differ by factors, so mean and standard deviation are of their logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..plans.plan import Expected, Row

ENOUGH = 4  # requests, to tell a standard deviation
_LEAST = 0.2  # a standard deviation: that of a few requests may be small by chance
_DOUBT = 0.25  # added to it where the features are not those of requests run by the plan, but of full ones
_TINY = 1e-30


def expectations(
    checks: Mapping[str, Mapping[int, Row]], grams: Mapping[str, np.ndarray], measured: bool
) -> dict[str, dict[int, Expected]]:
    """The expected errors of checks, of each context's first one none.

    What the first check sees is how much one early step differs from the next, which scatters so widely between
    requests that a few of them do not tell how widely.

    Args:
        checks: as in `Plan.checks`.
        grams: for each context of the requests the inner products [P, T, T] of P requests' features at the T steps, the
            first also for names that are not among them, such as "*"; those of steps that no check reads or is of do
            not count.
        measured: whether these requests were run by the plan; else its later checks will see somewhat larger errors.

    Returns:
        As in `Plan.expected`; nothing with fewer than `ENOUGH` requests.
    """
    expected: dict[str, dict[int, Expected]] = {}
    first = next(iter(grams.values()))
    for context, own in checks.items():
        gram = grams.get(context, first)
        if len(gram) >= ENOUGH:
            errors = {step: relative_errors(gram, step, own[step]) for step in sorted(own)[1:]}
            expected[context] = {step: _expected(found, measured) for step, found in errors.items()}
    return expected


def relative_errors(gram: np.ndarray, step: int, row: Row) -> np.ndarray:
    """[P]: ||F^ - F|| / ||F|| of a row at a step, out of inner products [P, T, T]."""
    involved = [*row.steps, step]
    own = gram[:, involved][:, :, involved]
    off = np.array([*row.weights, -1.0])
    squares = np.maximum(own @ off @ off, 0.0)
    return np.sqrt(squares / np.maximum(gram[:, step, step], _TINY))


def _expected(errors: np.ndarray, measured: bool) -> Expected:
    logs = np.log(np.maximum(errors, _TINY))
    # Of one more request, whose own deviation comes on top of that of the mean.
    std = max(float(logs.std(ddof=1)) * math.sqrt(1 + 1 / len(logs)), _LEAST)
    return Expected(float(np.exp(logs.mean())), std if measured else math.hypot(std, _DOUBT))
