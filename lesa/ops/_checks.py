"""What the plain-torch operators refuse, so that a program means the same whatever backend serves it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..plans.rows import MAX_READS
from ._library import wide_dtype


def check_row(history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, newest: bool = False) -> None:
    """Check one row of weights against the history it reads.

    Args:
        history: [H, ...], floating.
        slots: [K] int32, below H.
        weights: [K], float32 or wider.
        bias: [] or [1], like `weights`.
        newest: whether the last slot must be a real one.

    Raises:
        ValueError: an argument is out of place.
    """
    if history.dim() < 1 or not history.dtype.is_floating_point:
        raise ValueError(f"history is {_kind(history)}: expected floating features [H, ...]")
    if slots.dim() != 1 or slots.dtype != torch.int32 or slots.shape[0] > MAX_READS:
        convert = "" if slots.dtype == torch.int32 else "; convert it with slots.to(torch.int32)"
        raise ValueError(f"slots is {_kind(slots)}: expected int32 [K], K of at most {MAX_READS}{convert}")
    wide = wide_dtype(history)
    if weights.shape != slots.shape or weights.dtype != wide:
        raise ValueError(f"weights is {_kind(weights)}: expected {wide} {list(slots.shape)}, one a slot")
    if bias.numel() != 1 or bias.dtype != wide:
        raise ValueError(f"bias is {_kind(bias)}: expected one value of {wide}")
    check_slots(history, slots)
    if newest and (not slots.shape[0] or int(slots[-1]) < 0):
        raise ValueError("slots ends with a negative entry: the last one is the newest feature, which is always read")


def check_slots(history: Tensor, slots: Tensor) -> None:
    """Check that slots lie in the history; negative ones are left out."""
    outside = [slot for slot in slots.tolist() if slot >= len(history)]
    if outside:
        raise ValueError(f"slots names {outside[0]}, but history holds slots 0 to {len(history) - 1}")


def check_step(step: Tensor, rows: Tensor) -> int:
    """The step, checked against the rows of a table."""
    if step.numel() != 1 or not 0 <= int(step) < rows.shape[0]:
        raise ValueError(f"step={step.tolist()}: expected one of 0 to {rows.shape[0] - 1}")
    return int(step)


def check_like(name: str, given: Tensor, feature: Tensor) -> None:
    """Check that a tensor is like one feature."""
    if given.shape != feature.shape or given.dtype != feature.dtype:
        raise ValueError(f"{name} is {_kind(given)}: expected {feature.dtype} {list(feature.shape)}, like a feature")


def check_kan(x: Tensor, base: Tensor, spline: Tensor, scale: Tensor, low: float, high: float) -> None:
    """Check a KAN layer's input and parameters [E, T, I], [E, Q, I], [E, Q, I, M], [E, Q, I]."""
    if base.dim() != 3 or x.dim() != 3 or (x.shape[0], x.shape[2]) != (base.shape[0], base.shape[2]):
        raise ValueError(f"x is {_kind(x)} and base_weight {_kind(base)}: expected [E, T, I] and [E, Q, I]")
    if spline.shape[:-1] != base.shape or spline.shape[-1] < 4 or scale.shape != base.shape:
        raise ValueError(
            f"spline_weight is {_kind(spline)}, spline_scale {_kind(scale)}: expected {list(base.shape)}, the first "
            "with at least 4 bases beside"
        )
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"grid_range=({low}, {high}): expected two finite numbers, the lower first")


def check_head(history: Tensor, scale: Tensor, shift: Tensor, proj_weight: Tensor, proj_bias: Tensor | None) -> None:
    """Check the tensors of a head against features [H, B, N, D]."""
    if history.dim() != 4:
        raise ValueError(f"history is {_kind(history)}: expected features [H, B, N, D]")
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor.shape != (history.shape[1], history.shape[3]):
            raise ValueError(f"{name} is {_kind(tensor)}: expected {[history.shape[1], history.shape[3]]}")
    if proj_weight.dim() != 2 or proj_weight.shape[1] != history.shape[3]:
        raise ValueError(f"proj_weight is {_kind(proj_weight)}: expected [C, {history.shape[3]}]")
    if proj_bias is not None and proj_bias.shape != proj_weight.shape[:1]:
        raise ValueError(f"proj_bias is {_kind(proj_bias)}: expected {list(proj_weight.shape[:1])}")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
