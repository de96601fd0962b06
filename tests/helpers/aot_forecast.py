"""The specialisations of the forecast and head kernels that real launches make."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from aot import TARGETS, Variant

from lesa.kernels import forecast, head

# The inputs of the paper's denoisers: 16 channels of 2x2 patches, projected from 3072 channels.
CHANNELS, PROJECTED = 3072, 64


def _forecast(dtype: str, window: int, form: str, size: int = 2**20) -> Variant:
    config = forecast.forecast_config(size)
    types = {"p_out": f"*{dtype}", "p_history": f"*{dtype}", "p_slots": "*i32", "p_weights": "*fp32", "p_bias": "*fp32"}
    types |= {"p_keep": "*i32", "p_step": "*i64", "S": "i32", "L": "i32"}
    missing = {"row": ("p_keep", "p_step"), "step": ("p_keep",), "into": ("p_out",)}[form]
    return Variant(
        forecast._forecast_fwd_kernel,
        {name: kind for name, kind in types.items() if name not in missing},
        dict.fromkeys(missing) | {"K": window, "BLOCK": config.block, "HINT": config.hint},
        num_warps=config.warps,
        label=f"{form} {dtype} K={window}" + f" {config.hint}".rstrip(),
        divisible=("S", "L"),
    )


def _sums(dtype: str, window: int, padded: int) -> Variant:
    config = forecast.SumsConfig()
    return Variant(
        forecast._feature_sums_kernel,
        {"p_part": "*fp32", "p_grad": f"*{dtype}", "p_history": f"*{dtype}", "p_slots": "*i32", "S": "i32", "L": "i32"},
        {"K": window, "KP": padded, "BLOCK": min(config.tile // padded, config.block)},
        num_warps=config.warps,
        num_stages=1,
        label=f"{dtype} K={window}",
        divisible=("S", "L"),
    )


def _errors(dtype: str, window: int, kept: bool = True) -> Variant:
    config = forecast.ErrorsConfig()
    types = dict.fromkeys(("p_history", "p_truth"), f"*{dtype}") | {"p_part": "*fp32", "p_slots": "*i32"}
    if kept:
        types["p_kept"] = f"*{dtype}"
    return Variant(
        forecast._forecast_errors_kernel,
        types | {"p_weights": "*fp32", "p_bias": "*fp32", "S": "i32", "L": "i32"},
        {"K": window, "BLOCK": config.block} | ({} if kept else {"p_kept": None}),
        num_warps=config.warps,
        label=f"{dtype} K={window}{' kept' if kept else ''}",
        divisible=("S", "L"),
    )


def _spread(dtype: str) -> Variant:
    types = {
        "p_out": f"*{dtype}",
        "p_grad": f"*{dtype}",
        "p_coefficients": "*fp32",
        "p_slots": "*i32",
        "L": "i32",
        "H": "i32",
    }
    constexprs = {"K": 8, "KP": 8, "BLOCK": 1024}
    return Variant(forecast._spread_kernel, types, constexprs, label=dtype, divisible=("L",))


def head_variant(
    dtype: str, window: int, config: head.HeadConfig, keep: bool = True, targets: tuple[int, ...] = TARGETS
) -> Variant:
    """The head's first kernel at 3072 channels, 64 projected."""
    types = dict.fromkeys(("p_history", "p_scale", "p_shift", "p_proj", "p_proj_bias"), f"*{dtype}")
    types |= {"p_slots": "*i32", "p_weights": "*fp32", "p_bias": "*fp32", "p_keep": "*i32", "p_step": "*i64"}
    types |= dict.fromkeys(("S", "S_SCALE", "S_SHIFT", "N", "D", "C"), "i32") | {"eps": "fp32"}
    constexprs: dict[str, Any] = {}
    if not keep:
        del types["p_keep"]
        constexprs["p_keep"] = None
    if config.slices > 1:
        types |= {"p_out": "*fp32", "p_moments": "*fp32"}
    else:
        types["p_out"] = f"*{dtype}"
        constexprs["p_moments"] = None
    constexprs |= {"K": window, "BM": config.tokens, "BD": config.channels, "BC": PROJECTED, "J": config.slices}
    constexprs |= {"DJ": CHANNELS // config.slices, "OPERAND": tl.bfloat16 if dtype == "bf16" else tl.float32}
    constexprs["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
    return Variant(
        head._forecast_head_fwd_kernel,
        types,
        constexprs,
        num_warps=config.warps,
        num_stages=config.stages,
        label=f"{dtype} K={window} " + "x".join(map(str, config)),
        divisible=("S", "S_SCALE", "S_SHIFT", "N", "D", "C"),
        targets=targets,
    )


def _join(dtype: str, slices: int) -> Variant:
    types = {"p_out": f"*{dtype}", "p_part": "*fp32", "p_moments": "*fp32", "p_proj_bias": f"*{dtype}"}
    types |= {"N": "i32", "D": "i32", "C": "i32", "eps": "fp32"}
    constexprs = {"BM": 16, "BC": PROJECTED, "J": slices, "DJ": CHANNELS // slices}
    label = f"{dtype} J={slices}"
    return Variant(head._join_slices_kernel, types, constexprs, label=label, divisible=("N", "D", "C"))


def _head_defaults() -> list[Variant]:
    found = []
    for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.items():
        history = torch.empty(9, 1, 4096, CHANNELS, dtype=dtype, device="meta")
        for window in (2, 8, 16) if name == "bf16" else (8,):
            config = head.head_config(history, window, PROJECTED)
            pipelined = config.stages > 1  # chosen where there is the shared memory for it
            found.append(head_variant(name, window, config, targets=(90, 100) if pipelined else TARGETS))
            if pipelined:
                small = head.HeadConfig(tokens=32, channels=64, slices=4, warps=4, stages=1)
                found.append(head_variant(name, window, small))
        if config.slices > 1:
            found.append(_join(name, config.slices))
    return found


_REDUCE_TYPES = {"p_sum": "*fp32", "p_part": "*fp32", "P": "i32"}

VARIANTS = [
    *(_forecast("bf16", window, "step") for window in (2, 4, 8, 16)),
    *(_forecast(dtype, 8, form) for dtype in ("fp16", "fp32") for form in ("row", "into")),
    _forecast("bf16", 8, "into"),
    *(_sums("bf16", window, padded) for window, padded in ((1, 1), (8, 8), (16, 16))),
    _sums("fp32", 8, 8),
    *(_errors("bf16", window, kept) for window in (2, 8, 16) for kept in (True, False)),
    _errors("fp32", 8),
    _errors("fp16", 8),
    Variant(
        forecast._reduce_kernel,
        {"p_sum": "*fp32", "p_part": "*fp32", "P": "i32"},
        {"K1": 9, "BLOCK": 1024},
        label="K=8",
    ),
    _spread("bf16"),
    _spread("fp32"),
    *_head_defaults(),
]
