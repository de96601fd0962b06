"""What all launchers share: checks of what a kernel would misread, the device, and launches made again and again."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

MAX_WINDOW = 16
FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A kernel is compiled once for addresses that are multiples of it, and once for others.
_ALIGNED = 16


class Launch:
    """A kernel with all arguments fixed but the first ones, tensors whose dtypes never change.

    `kernel[grid](...)` inspects every argument to find the compiled binary; this takes longer than a small kernel
    runs. `Launch` keeps the binary of its first launch and uses it again while the changing tensors are aligned.

    Args:
        kernel: the kernel.
        programs: size of the grid.
        fixed: the arguments after the changing ones, in order, constexprs too; at least one is a tensor.
        options: launch options, e.g. num_warps.
    """

    def __init__(self, kernel: triton.JITFunction, programs: int, fixed: tuple[Any, ...], **options: Any) -> None:
        self._kernel, self._grid, self._fixed, self._options = kernel, (programs, 1, 1), fixed, options
        self._device = next(argument.device for argument in fixed if isinstance(argument, Tensor))
        # The interpreter runs on the CPU: there is no device to choose.
        self._module: Any = None if self._device.type == "cpu" else torch.get_device_module(self._device)
        self._binary: Any = None

    def __call__(self, *changing: Tensor) -> None:
        """Launch with these tensors as the first arguments."""
        if self._module is None or self._module.current_device() == self._device.index:
            self._launch(changing)
        else:
            with self._module.device(self._device):
                self._launch(changing)

    def _launch(self, changing: tuple[Tensor, ...]) -> None:
        aligned = not any(tensor.data_ptr() % _ALIGNED for tensor in changing)
        if aligned and self._binary is not None:
            self._binary(*changing, *self._fixed)
            return
        compiled = self._kernel[self._grid](*changing, *self._fixed, **self._options)
        if aligned and compiled is not None:  # the interpreter compiles nothing
            self._binary = compiled[self._grid]


def guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which the device of `tensor` is current; empty if it is already, and for the interpreter."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    module = torch.get_device_module(tensor.device)
    if tensor.device.index == module.current_device():
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[object] = module.device(tensor.device)
    return context


def check_history(history: Tensor) -> None:
    """Check that a ring has dense features of a dtype that the kernels know.

    Args:
        history: [H, *feature], any stride between slots.

    Raises:
        ValueError: it has not.
    """
    if history.dtype not in FEATURE_DTYPES:
        raise ValueError(f"history has dtype {history.dtype}; expected float32, float16 or bfloat16")
    if history.dim() < 1 or not (history.is_contiguous() or not history.numel() or history[0].is_contiguous()):
        raise ValueError(
            f"history of shape {tuple(history.shape)} has strides {history.stride()}; expected contiguous features "
            "(history[i]); call .contiguous() on the ring"
        )


def check_row(slots: Tensor, step: Tensor | None, **rows: Tensor | None) -> int:
    """Check rows of slots and weights.

    Args:
        slots: [K] int32, or [T, K] with `step`.
        step: [1] int64, or None.
        rows: by name. `weights` and `coefficients` are like `slots`, `bias` and `keep` hold one value a row; None is
            left out.

    Returns:
        K.

    Raises:
        ValueError: the dtype, window or strides of a row differ from the above.
    """
    window = slots.shape[-1]
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"slots has a window of {window}; expected 1 to {MAX_WINDOW}")
    if slots.dim() != (1 if step is None else 2):
        raise ValueError(f"slots has shape {tuple(slots.shape)}; expected [K] without step, [T, K] with it")
    if step is not None and step.dtype != torch.int64:
        raise ValueError(f"step has dtype {step.dtype}; expected int64")
    expected = {"slots": (slots, torch.int32, slots.numel())}
    for name, row in rows.items():
        if row is not None:
            dtype = torch.int32 if name == "keep" else torch.float32
            expected[name] = (row, dtype, slots.numel() // (1 if name in ("weights", "coefficients") else window))
    for name, (row, dtype, count) in expected.items():
        if row.dtype != dtype or row.numel() != count or not row.is_contiguous():
            convert = "" if row.dtype == dtype else f"; convert it with {name}.to({dtype})"
            raise ValueError(
                f"{name} is {row.dtype} of shape {tuple(row.shape)} and strides {row.stride()}; "
                f"expected {count} contiguous values of {dtype}{convert}"
            )
    return window


def check_grad(grad: Tensor, shape: torch.Size) -> None:
    """Check that a gradient is a dense feature of a shape.

    Raises:
        ValueError: it has another shape, none of the feature dtypes, or is not contiguous.
    """
    if grad.dtype not in FEATURE_DTYPES or grad.shape != shape or not grad.is_contiguous():
        raise ValueError(
            f"grad is {grad.dtype} of shape {tuple(grad.shape)} and strides {grad.stride()}; "
            f"expected contiguous values of a feature's shape {tuple(shape)} in float32, float16 or bfloat16"
        )


def check_feature(name: str, feature: Tensor, history: Tensor) -> None:
    """Check that a tensor is a dense feature like those of a ring [H, *feature].

    Raises:
        ValueError: it has another dtype or shape, or is not contiguous; `name` says which argument it is.
    """
    if feature.dtype != history.dtype or feature.shape != history.shape[1:] or not feature.is_contiguous():
        raise ValueError(
            f"{name} is {feature.dtype} of shape {tuple(feature.shape)} and strides {feature.stride()}; "
            f"expected a contiguous feature {tuple(history.shape[1:])} of {history.dtype}"
        )


def padded(size: int) -> int:
    """The next power of two."""
    return int(triton.next_power_of_2(size))
