"""Launches that are made again and again: what stays the same from one to the next is looked at once."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

# Kernels are compiled for addresses that are multiples of it, and for others.
_ALIGNED = 16


class Launch:
    """One kernel with all its arguments but the first, which are tensors of always the same dtypes.

    `kernel[grid](...)` looks at each argument to find the binary that fits, which takes longer than a small kernel
    runs. Here the binary that the first launch found is used again, as long as the tensors that change are aligned.

    Args:
        kernel: to launch.
        programs: of the grid.
        fixed: the arguments after those that change, in order, constexprs too; at least one tensor.
        options: of the launch, e.g. num_warps.
    """

    def __init__(self, kernel: triton.JITFunction, programs: int, fixed: tuple[Any, ...], **options: Any) -> None:
        self._kernel, self._grid, self._fixed, self._options = kernel, (programs, 1, 1), fixed, options
        self._device = next(argument.device for argument in fixed if isinstance(argument, Tensor))
        # The interpreter runs on the CPU, where there is nothing to choose.
        self._module: Any = None if self._device.type == "cpu" else torch.get_device_module(self._device)
        self._binary: Any = None

    def __call__(self, *changing: Tensor) -> None:
        """Launch on the tensors that change."""
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
