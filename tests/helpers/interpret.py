"""Import this before any kernel: where there is no GPU, Triton's interpreter runs the kernels on CPU tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's cast from float32 to bfloat16 truncates, so bfloat16 is judged on a GPU.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)


def assert_close(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error against float64 is at most twice that of the plain formula in the same dtype and eps * max|exact|."""
    assert got.shape == exact.shape
    assert got.dtype == plain.dtype
    error = (got.double() - exact).abs().amax()
    allowed = 2 * ((plain.double() - exact).abs().amax() + torch.finfo(got.dtype).eps * exact.abs().amax())
    assert error <= allowed, f"error {error.item():.3g}, allowed {allowed.item():.3g}"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty and its like come filled with NaN, so that an element no kernel wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def untouched(*strided: int, size: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor over memory that is reserved but not filled, however large its strides make it."""
    reach = 1 + sum((length - 1) * stride for length, stride in zip(size, strided, strict=True))
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    try:
        return torch.empty(reach, dtype=dtype, device=DEVICE).as_strided(size, strided)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
