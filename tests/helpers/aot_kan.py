"""The KAN, the live predictor and its loss as the launchers specialise them; see aot.py."""

from __future__ import annotations

from typing import Any

from aot import Variant

from lesa.kernels.kan import BackwardConfig, ForwardConfig, _kan_fwd_kernel, backward_config, forward_config
from lesa.kernels.kan_backward import _kan_bwd_kernel
from lesa.kernels.loss import _predict_loss_kernel, loss_config
from lesa.kernels.predict import _ALPHA_WORD, _HIDDEN_WORD, PredictConfig, _predict_fwd_kernel

NETWORK = ((51, 256), (256, 256), (256, 1))
BASES, PADDED = 8, 8
SIZES = {"T": "i32", "X": "i32", "Q": "i32", "SE": "i32", "ST": "i32"}
GRID = dict.fromkeys(("middle", "inverse", "width", "width_rest"), "fp32")


def _sizes(inputs: int, outputs: int) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    signature = {name: kind for name, kind in SIZES.items() if (name, outputs) != ("Q", 1)}
    sizes = {"X": inputs, "Q": outputs, "SE": inputs, "ST": inputs}
    return signature, {"Q": 1} if outputs == 1 else {}, tuple(name for name, size in sizes.items() if size % 16 == 0)


def forward(steps: int, inputs: int, outputs: int, dtype: str = "fp32", cut: ForwardConfig | None = None) -> Variant:
    """The forward of one layer."""
    cut = cut or forward_config(steps, inputs, outputs, BASES)
    integers, one, divisible = _sizes(inputs, outputs)
    pointers = {"p_y": "*fp32", "p_x": "*fp32"} | {f"p_{name}": f"*{dtype}" for name in ("base", "spline", "scale")}
    tile = {"FORM": cut.form, "BT": cut.rows, "BQ": cut.outputs, "BX": cut.inputs, "SPLIT": cut.split}
    return Variant(
        _kan_fwd_kernel,
        pointers | integers | {"SPAN": "i32"} | GRID,
        one | tile | {"M": BASES, "MP": PADDED, "PRECISION": cut.precision},
        cut.warps,
        cut.stages,
        f"{steps}x{inputs}x{outputs} {dtype} {cut.form} {cut.precision}",
        (*divisible, *(("SPAN",) if (cut.span or inputs) % 16 == 0 else ())),
    )


def backward(steps: int, inputs: int, outputs: int, needs_x: bool, cut: BackwardConfig | None = None) -> Variant:
    """The backward of one layer."""
    cut = cut or backward_config(steps, inputs, outputs, BASES)
    integers, one, divisible = _sizes(inputs, outputs)
    parts = ("dx", "dbase", "dspline", "dscale", "grad", "x", "base", "spline", "scale")
    pointers = {f"p_{name}": "*fp32" for name in parts[0 if needs_x else 1 :]}
    tile = {"FORM": cut.form, "BT": cut.rows, "BQ": cut.outputs, "BX": cut.inputs}
    tile |= {
        "DT": cut.dx_rows,
        "DQ": cut.dx_outputs,
        "DX": cut.dx_inputs,
        "M": BASES,
        "MP": PADDED,
        "PRECISION": cut.precision,
    }
    return Variant(
        _kan_bwd_kernel,
        pointers | integers | GRID,
        one | tile | ({} if needs_x else {"p_dx": None}),
        cut.warps,
        cut.stages,
        f"{steps}x{inputs}x{outputs} {'dx' if needs_x else ''} {cut.form} {cut.precision}",
        divisible,
    )


def predict(window: int, dtype: str, cut: PredictConfig = PredictConfig()) -> Variant:  # noqa: B008 - immutable
    """The live predictor with the published network."""
    names = _predict_fwd_kernel.arg_names
    row = {"p_slots": "*i32", "p_words": "*i64", "p_forecast": f"*{dtype}", "p_history": f"*{dtype}"}
    pointers = {name: row.get(name, "*fp32") for name in names if name.startswith("p_")}
    integers = {"S": "i32", "L": "i32", "X": "i32", "Q1": "i32", "Q2": "i32"}
    tile = {"BLOCK": cut.block, "BQ": cut.outputs, "BX": cut.inputs, "ALPHA": _ALPHA_WORD, "HIDDEN": _HIDDEN_WORD}
    return Variant(
        _predict_fwd_kernel,
        pointers | integers | GRID,
        tile | {"K": window, "M": BASES, "MP": PADDED},
        cut.warps,
        label=f"K={window} {dtype}",
        divisible=("S", "L", "Q1", "Q2"),
    )


def loss(window: int, dtype: str, squared: bool) -> Variant:
    """The loss with its forecast written."""
    cut = loss_config(window)
    names = _predict_loss_kernel.arg_names
    kinds = {"p_slots": "*i32", "p_count": "*i32"} | {f"p_{name}": f"*{dtype}" for name in FEATURES}
    pointers = {name: kinds.get(name, "*fp32") for name in names if name.startswith("p_")}
    padded = 1 << (window - 1).bit_length()
    tile = {"R": cut.lanes, "V": cut.bytes // (4 if dtype == "fp32" else 2), "BP": 64, "STAGES": cut.stages}
    return Variant(
        _predict_loss_kernel,
        pointers | {"S": "i32", "L": "i32", "inverse": "fp32"},
        tile | {"K": window, "KP": padded, "K2": 1 << (window + 1).bit_length(), "SQUARED": squared},
        cut.warps,
        label=f"K={window} {dtype} {'l2' if squared else 'l1'}",
        divisible=("S", "L"),
    )


FEATURES = ("forecast", "history", "target")
VARIANTS = [
    *(forward(steps, *layer) for steps in (1, 50) for layer in NETWORK),
    forward(50, 256, 256, "bf16"),
    *(backward(steps, *layer, layer[0] == 256) for steps in (1, 50) for layer in NETWORK),
    *(predict(window, dtype) for window, dtype in ((4, "bf16"), (8, "bf16"), (8, "fp32"), (16, "fp16"))),
    *(loss(window, dtype, squared) for window, dtype, squared in ((4, "bf16", True), (8, "bf16", False))),
    loss(8, "fp32", False),
    loss(16, "fp16", True),
]
