"""Compiles every Triton kernel ahead of time, without a GPU, and reads registers, spills and shared memory.

    python tests/helpers/aot.py --write benchmarks/results/registers.csv

The variants are listed beside this file, in aot_*.py, each with a list VARIANTS of `Variant`.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = (80, 90, 100, 120)
MODULES = ("aot_forecast", "aot_kan")
COLUMNS = ("kernel", "variant", "sm", "registers", "spills", "shared")
# Bytes of shared memory a block may ask for. sm_80 stands for 86 and 89 too, which have the 99 KiB of sm_120.
SHARED = {80: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a real launch would make it.

    Args:
        kernel: the @triton.jit function.
        signature: type of every run-time argument by name, e.g. {"p_out": "*bf16", "L": "i32"}; arguments left out here
            must be in `constexprs`. Pointers count as divisible by 16.
        constexprs: value of every compile-time argument by name; also of integers that a launch specialises (1).
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        label: tells variants of one kernel apart.
        divisible: integer arguments that are multiples of 16 (strides, sizes).
        unaligned: pointers that are not multiples of 16 bytes.
        targets: compute capabilities this variant is launched on.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    label: str = ""
    divisible: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = field(default=())
    targets: tuple[int, ...] = TARGETS


@dataclass(frozen=True)
class Row:
    """What one variant needs on one target: registers a thread, spilled bytes a thread, shared bytes a block."""

    kernel: str
    variant: str
    sm: int
    registers: int
    spills: int
    shared: int


def variants() -> list[Variant]:
    """All variants of all kernels that are there."""
    found: list[Variant] = []
    for module in MODULES:
        if Path(__file__).with_name(f"{module}.py").exists():
            found += importlib.import_module(module).VARIANTS
    return found


def measure(variant: Variant, sm: int) -> Row:
    """Compile `variant` for compute capability `sm` and read what the machine code needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    pointers = {name for name, kind in signature.items() if kind.startswith("*")} - set(variant.unaligned)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(pointers | set(variant.divisible))}
    constexprs = {(names.index(name),): value for name, value in variant.constexprs.items()}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    registers, spills = _resources(compiled.asm["cubin"])
    return Row(variant.kernel.__name__, variant.label, sm, registers, spills, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread of the kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(usage[1]), int(usage[2]) + int(usage[3])


@functools.cache
def cuobjdump() -> str:
    """The path of cuobjdump: the one that comes with triton, or one on the PATH."""
    import triton

    shipped = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    if path is None:
        raise FileNotFoundError("cuobjdump is neither in triton nor on the PATH")
    return path


def faults(rows: Sequence[Row]) -> list[str]:
    """Sentences about rows that spill or ask for more shared memory than their target has."""
    spilled = [f"{row} spills {row.spills} bytes a thread" for row in rows if row.spills]
    return spilled + [f"{row} has more than {SHARED[row.sm]} bytes" for row in rows if row.shared > SHARED[row.sm]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile everything, print the table, write it if asked; 1 if anything spills or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="CSV file to write")
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--quick", action="store_true", help="compile each variant for its newest target only")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set; unset it, interpreted kernels are not compiled")
    chosen = [variant for variant in variants() if options.only in variant.kernel.__name__]
    last = -1 if options.quick else 0
    rows = [measure(variant, sm) for variant in chosen for sm in variant.targets[last:]]
    table = [[str(getattr(row, column)) for column in COLUMNS] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(COLUMNS, *table, strict=True)]
    for line in [COLUMNS, *table]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    if options.write:
        with options.write.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *table])
    wrong = faults(rows)
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
