"""Mailbox: numbers that a device is asked for while it has other things to do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

_LATER = "cuda"  # the device, ROCm's too, that answers while it has other things to do


def answers_later(tensor: torch.Tensor) -> bool:
    """Whether the device of a tensor can be asked without waiting for it."""
    return tensor.device.type == _LATER


class Mailbox:
    """Copies small results to the host without waiting for the device.

    What it copies into is used again: to pin memory takes longer than all else that is done with it.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, torch.device, torch.Size], list[tuple[torch.Tensor, Any]]]
        self._free = defaultdict(list)

    def __reduce__(self) -> tuple[type[Mailbox], tuple[()]]:
        return Mailbox, ()  # a copy starts empty: events belong to who recorded them

    def ask(self, numbers: torch.Tensor) -> Callable[[], list[float]]:
        """What returns the numbers [N]; it waits for them, but for nothing that the device is told to do later.

        To be called once. Where the device cannot be asked like this, it waits for all.
        """
        if not answers_later(numbers):
            return numbers.tolist
        free = self._free[numbers.dtype, numbers.device, numbers.shape]
        copy, copied = free.pop() if free else _place(numbers)
        copy.copy_(numbers, non_blocking=True)
        copied.record(torch.get_device_module(numbers.device).current_stream(numbers.device))

        def answer() -> list[float]:
            copied.synchronize()
            found: list[float] = copy.tolist()
            free.append((copy, copied))
            return found

        return answer


def _place(numbers: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Pinned memory for such numbers, and an event."""
    with torch.inference_mode(False):  # later requests may run outside inference mode
        copy = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    return copy, torch.get_device_module(numbers.device).Event()
