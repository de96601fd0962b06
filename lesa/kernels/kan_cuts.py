"""How the KAN's kernels cut their work, by the sizes of a layer."""

from __future__ import annotations

from typing import NamedTuple

import triton

# A product reads at least 16 rows: up to so many rows or outputs, going through them one by one is less work.
_FEW = 4


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
    """

    form: str
    rows: int
    outputs: int
    inputs: int
    split: int = 1
    precision: str = "tf32x3"
    warps: int = 4
    stages: int = 2


class BackwardConfig(NamedTuple):
    """How a backward is cut: see ForwardConfig; outputs and inputs of the two roles' tiles."""

    form: str
    rows: int
    outputs: int
    inputs: int
    dx_outputs: int
    dx_inputs: int
    precision: str = "tf32x3"
    warps: int = 4
    stages: int = 2


def forward_config(steps: int, inputs: int, outputs: int, bases: int) -> ForwardConfig:
    """The cut for x [*, steps, inputs] and `outputs` outputs."""
    if min(steps, outputs) <= _FEW:
        return ForwardConfig("rows", 1, min(2, padded(outputs)), min(256, padded(inputs)))
    tile = max(8, 256 // padded(bases))
    return ForwardConfig("dot", 16, 32, tile, split=8, warps=8)


def backward_config(steps: int, inputs: int, outputs: int, bases: int) -> BackwardConfig:
    """The cut for x [*, steps, inputs] and `outputs` outputs."""
    if steps <= _FEW:
        wide = min(128, padded(outputs))
        return BackwardConfig("rows", 1, min(8, wide), min(32, padded(inputs)), wide, min(64, 512 // wide))
    tile = max(1, 64 // padded(bases))
    return BackwardConfig("dot", 32, 32, tile, 32, tile)


def padded(size: int) -> int:
    return int(triton.next_power_of_2(size))
