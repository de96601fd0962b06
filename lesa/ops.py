"""The operations of the hot path, one entry each, whatever backend serves them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def forecast(history: torch.Tensor, slots: Sequence[int], weights: Sequence[float], bias: float = 0.0) -> torch.Tensor:
    """Forecast a feature: sum_k weights[k] * history[slots[k]] + bias, accumulated in float32 or wider.

    Args:
        history: features [H, ...] of any floating dtype.
        slots: K indices into the first axis.
        weights: K weights.
        bias: added to every element.

    Returns:
        The forecast feature [...], in the history's dtype.
    """
    accumulator = history[slots[0]].to(torch.promote_types(history.dtype, torch.float32), copy=True)
    accumulator.mul_(weights[0])
    for slot, weight in zip(slots[1:], weights[1:], strict=True):
        accumulator.add_(history[slot], alpha=weight)
    if bias:
        accumulator.add_(bias)
    return accumulator.to(history.dtype)
