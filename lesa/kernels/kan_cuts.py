"""How the KAN's kernels cut their work, by the sizes of a layer."""

from __future__ import annotations

from typing import NamedTuple

import triton

# A product reads at least 16 rows: up to so many rows or outputs, going through them one by one is less work.
_FEW = 4
# Elements of y up to which a program of the forward takes a span of the inputs.
_SMALL = 1 << 16


class ForwardConfig(NamedTuple):
    """How a forward is cut.

    Args:
        form: "rows" sums one row over a tile of edges, "gather" does so reading the active coefficients only,
            "dot" multiplies tiles of at least 16 rows and inputs.
        rows, outputs, inputs: sizes of the tile, powers of two.
        split: parts of the tile's inputs that different warps sum ("dot").
        precision: of products, "ieee" or "tf32x3".
        warps: warps a program.
        stages: depth of the pipeline of loads.
        span: inputs a program sums, a multiple of `inputs`; 0 for all. Sums of several spans are added up afterwards.
    """

    form: str
    rows: int
    outputs: int
    inputs: int
    split: int = 1
    precision: str = "tf32x3"
    warps: int = 4
    stages: int = 2
    span: int = 0


class BackwardConfig(NamedTuple):
    """How a backward is cut: see ForwardConfig; sizes of the tiles of both roles, one row of dx in the form "rows"."""

    form: str
    rows: int
    outputs: int
    inputs: int
    dx_rows: int
    dx_outputs: int
    dx_inputs: int
    precision: str = "tf32x3"
    warps: int = 4
    stages: int = 2


def forward_config(steps: int, inputs: int, outputs: int, bases: int) -> ForwardConfig:
    """The cut for x [*, steps, inputs] and `outputs` outputs."""
    if min(steps, outputs) <= _FEW:
        return ForwardConfig("rows", 1, min(2, padded(outputs)), min(256, padded(inputs)))
    # With few tiles, the way of one program through all the inputs takes longest.
    if inputs > 64 and steps * outputs <= _SMALL:
        return ForwardConfig("dot", 16, 32, max(4, 64 // padded(bases)), split=4, stages=3, span=64)
    return ForwardConfig("dot", 16, 16, max(4, 128 // padded(bases)), split=4)


def backward_config(steps: int, inputs: int, outputs: int, bases: int) -> BackwardConfig:
    """The cut for x [*, steps, inputs] and `outputs` outputs."""
    wide = min(128, padded(outputs))
    if steps <= _FEW:
        return BackwardConfig("rows", 1, min(8, wide), min(32, padded(inputs)), 1, wide, min(64, 512 // wide))
    if outputs <= _FEW:
        return BackwardConfig("rows", min(64, padded(steps)), 1, max(1, 64 // padded(bases)), 1, wide, 64 // wide)
    per_base = max(1, 8 // padded(bases))
    return BackwardConfig("dot", 32, 64, 8 * per_base, 64, 32, 4 * per_base)


def padded(size: int) -> int:
    """The next power of two."""
    return int(triton.next_power_of_2(size))
