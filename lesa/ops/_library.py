"""Shared by all operators: schemas, the choice of a backend, and the checks of plain torch.

The schemas are defined here, in Python. The C++ library only adds kernels for the CPU, so it may be absent. It is
loaded at the first call on CPU tensors, and triton at the first call on a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..plans.rows import MAX_READS

BACKENDS = ("triton", "cpp", "torch")
# ROCm's tensors carry the key CUDA.
_GPU_KEYS = ("CUDA", "XPU")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Operators without a C++ kernel: on the CPU, plain torch is as fast.
_NO_CPP = ("forecast_head", "spread")

_library = torch.library.Library("lesa", "DEF")
_plain: dict[str, Callable[..., Any]] = {}
_triton: dict[str, Callable[..., Any]] = {}
_tensors: dict[str, tuple[tuple[int, str], ...]] = {}  # positions and names of the arguments that are single tensors


def define(
    schema: str,
    plain: Callable[..., Any],
    triton: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
) -> None:
    """Define one operator.

    Args:
        schema: the schema, which starts with the name, without namespace.
        plain: the implementation in plain torch, for any device and dtype.
        triton: calls the launcher, which it imports, see `launcher`.
        fake: makes outputs of the right shape, dtype and device.
        backward: the autograd formula; None for operators without one.
        setup: saves what it needs; None for one that only refuses.
    """
    name = schema.partition("(")[0]
    _plain[name], _triton[name] = plain, triton

    def checked_fake(*args: Any) -> Any:
        _check_devices(name, args)  # real tensors get here too if one of them is on meta
        return fake(*args)

    arguments = schema[schema.index("(") + 1 : schema.rindex(") ->")].split(", ")
    _tensors[name] = tuple((i, a.split()[1]) for i, a in enumerate(arguments) if re.match(r"Tensor(\(a!\))? ", a))
    _library.define(schema)
    _library.impl(name, functools.partial(_run_default, name), "CompositeExplicitAutograd")
    for key in _GPU_KEYS:
        _library.impl(name, functools.partial(_run_gpu, name), key)
    torch.library.register_fake(f"lesa::{name}", checked_fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"lesa::{name}", backward, setup_context=setup, lib=_library)


def launcher(module: str, name: str) -> Callable[..., Any]:
    """A launcher of lesa.kernels that takes an operator's arguments as they are; imported when it is first called."""
    return lambda *args: getattr(importlib.import_module(f"..kernels.{module}", __package__), name)(*args)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which features like `tensor` are accumulated: float32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def no_second_derivative(ctx: Any, *grads: Any) -> Any:
    """The autograd formula of operators that a backward calls.

    Raises:
        NotImplementedError: always. Without it, torch would silently take second derivatives as 0.
    """
    raise NotImplementedError("lesa's operators have first derivatives only: leave create_graph=True out")


def call(name: str, backend: str | None, *args: Any) -> Any:
    """Call an operator on the best backend, or on the given one.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: `backend` is unknown.
        RuntimeError: `backend` cannot serve these tensors; no other is tried.
    """
    for i, argument in _tensors[name]:
        if not isinstance(args[i], Tensor):
            raise no_tensor(name, argument, args[i])
    if backend is None:
        return getattr(torch.ops.lesa, name)(*args)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}, or None for the best there is")
    if backend == "torch":
        return _plain[name](*args)
    first = args[0]
    reason = _cpp_missing(name, first.device) if backend == "cpp" else _triton_missing(first)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run {name}: {reason}")
    if backend == "triton" and first.device.type == "cpu":  # the interpreter
        return _triton[name](*args)
    return getattr(torch.ops.lesa, name)(*args)


def no_tensor(name: str, argument: str, value: Any) -> TypeError:
    """The error for an argument that should be a tensor."""
    remedy = "make one with torch.tensor"
    if argument in ("slots", "keep"):
        remedy = f"torch.tensor({argument}, dtype=torch.int32) makes one"
    elif isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
        remedy = f"torch.stack({argument}) makes one"
    return TypeError(f"{name}: {argument} is a {type(value).__name__}, expected a tensor; {remedy}")


def backend_of(name: str, tensor: Tensor) -> str:
    """The backend that serves operator `name` on tensors like this one."""
    if tensor.device.type == "cpu":
        return "torch" if _cpp_missing(name, tensor.device) else "cpp"
    return "torch" if _triton_missing(tensor) else "triton"


def launches(tensor: Tensor, backend: str | None) -> bool:
    """Whether a kernel may be launched directly, without the dispatcher, on tensors like this one."""
    return tensor.device.type in ("cuda", "xpu") and backend in (None, "triton") and not _triton_missing(tensor)


def describe() -> dict[str, str]:
    """For every backend: its version, or why it is missing and what to do."""
    triton = _triton_version()
    gpu = _gpu_name()
    no_triton = f"{triton}, but no GPU is here" if triton else "not installed: pip install triton"
    return {
        "triton": f"{triton} on {gpu}" if triton and gpu else no_triton,
        "cpp": f"{cpp_path().name}" if load_cpp() else _NO_LIBRARY,  # type: ignore[union-attr]
        "torch": torch.__version__,
    }


_NO_LIBRARY = "not built: install lesa where a C++ compiler is, with --no-build-isolation; plain torch serves the CPU"


@functools.cache
def cpp_path() -> Path | None:
    """The C++ library in the package; None if it was not built."""
    return next(iter(sorted(Path(__file__).parents[1].glob("_cpu*.so"))), None)


@functools.cache
def load_cpp() -> bool:
    """Load the C++ library once, and return whether it is there."""
    path = cpp_path()
    if path is None:
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        warnings.warn(
            f"{path.name} does not fit torch {torch.__version__}, so plain torch serves the CPU: "
            f"install lesa again ({error})",
            stacklevel=2,
        )
        return False
    return True


def _check_devices(name: str, args: tuple[Any, ...]) -> None:
    tensors = [part for arg in args for part in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    devices = {tensor.device for tensor in tensors if isinstance(tensor, Tensor)}
    if len(devices) > 1:
        raise ValueError(
            f"{name} was given tensors on {', '.join(sorted(map(str, devices)))}: move all of them to one device"
        )


def _run_default(name: str, *args: Any) -> Any:
    """Runs where the device has no kernel, e.g. on the CPU before the C++ library is loaded, or without it."""
    _check_devices(name, args)
    if args[0].device.type == "cpu" and not load_cpp.cache_info().currsize and load_cpp() and name not in _NO_CPP:
        return getattr(torch.ops.lesa, name)(*args)
    with torch.no_grad():
        return _plain[name](*args)


def _run_gpu(name: str, *args: Any) -> Any:
    _check_devices(name, args)
    if _triton_missing(args[0]):
        with torch.no_grad():
            return _plain[name](*args)
    return _triton[name](*args)


def _cpp_missing(name: str, device: torch.device) -> str | None:
    """Why the C++ library cannot serve an operator on `device`; None if it can."""
    if device.type != "cpu":
        return f"it serves CPU tensors, these are on {device}"
    if name in _NO_CPP:
        return "the C++ library has no kernel for it; leave backend out"
    return None if load_cpp() else f"the library is {_NO_LIBRARY}"


def _triton_missing(tensor: Tensor) -> str | None:
    """Why Triton cannot serve tensors like this one; None if it can."""
    if tensor.dtype not in _KERNEL_DTYPES:
        return f"the kernels take {', '.join(map(str, _KERNEL_DTYPES))}, not {tensor.dtype}"
    if _triton_version() is None:
        return "triton is not installed: pip install triton"
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "these are CPU tensors: move the pipeline or tensors to a GPU, or leave backend out (kernels run on the "
            "CPU only under TRITON_INTERPRET=1, slowly)"
        )
    if tensor.device.type not in ("cpu", "cuda", "xpu"):
        return f"the kernels run on cuda and xpu devices, these tensors are on {tensor.device}"
    return None


@functools.cache
def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def _gpu_name() -> str | None:
    for module in (torch.cuda, getattr(torch, "xpu", None)):
        if module is not None and module.is_available():
            return str(module.get_device_name())
    return None


def check_row(history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, newest: bool = False) -> None:
    """Check one row of weights against the history it reads.

    Args:
        history: [H, ...], floating.
        slots: [K] int32, below H.
        weights: [K], float32 or wider.
        bias: [] or [1], like `weights`.
        newest: whether the last slot must be a used one.

    Raises:
        ValueError: an argument differs from the above.
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
    """Check that the slots lie in the history; negative ones are unused."""
    outside = [slot for slot in slots.tolist() if slot >= len(history)]
    if outside:
        raise ValueError(f"slots names {outside[0]}, but history holds slots 0 to {len(history) - 1}")


def check_step(step: Tensor, rows: Tensor) -> int:
    """The step as an int, checked against the rows of a table."""
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
            f"spline_weight is {_kind(spline)}, spline_scale {_kind(scale)}: expected {list(base.shape)}, the "
            "first with one more axis of at least 4 bases"
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
