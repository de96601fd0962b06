"""Questions to a device: numbers that it is asked for while it has other things to do."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_LATER = "cuda"  # the device, ROCm's too, that answers while it has other things to do
_UNWRITTEN = -1.0
_NAP = 5e-5  # seconds


def answers_later(device: torch.device) -> bool:
    """Whether a device can be asked without waiting for it."""
    return device.type == _LATER


class Question:
    """What a device is asked again and again, for two numbers that are not below 0 (NaN they may be).

    It has its own memory for the answer, as to pin memory takes longer than all else that is done with it. Until both
    numbers are written there it holds others: an event to wait for would take longer to record than the question.

    Args:
        put: is given the memory [2], pinned if the device answers later, and what the question is about, and has the
            device write to it.
        device: that is asked.
        dtype: of the numbers.
    """

    def __init__(
        self, put: Callable[[torch.Tensor, torch.Tensor], None], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._put, self._device, self._waits = put, device, False
        with torch.inference_mode(False):  # later requests may run outside inference mode
            self._memory = torch.empty(2, dtype=dtype, device="cpu", pin_memory=answers_later(device))
        self._numbers = self._memory.numpy()

    def ask(self, about: torch.Tensor) -> Callable[[], list[float]]:
        """Ask; returns what waits for the answer, but for nothing that the device is told to do later.

        To be read before the question is put again, which waits for an answer that nobody read.
        """
        if self._waits:
            self._read()
        self._numbers[:] = _UNWRITTEN
        self._waits = True
        self._put(self._memory, about)
        return self._read

    def _read(self) -> list[float]:
        found: list[float] = self._numbers.tolist()
        while _UNWRITTEN in found:
            self._wait()
            found = self._numbers.tolist()
        self._waits = False
        return found

    def _wait(self) -> None:
        """Wait a little, or for a device that has nothing else to do."""
        module = torch.get_device_module(self._device)
        if not module.current_stream(self._device).query():  # raises the device's errors
            time.sleep(_NAP)
            return
        module.synchronize(self._device)  # it was asked on another stream
        if _UNWRITTEN in self._numbers.tolist():
            raise RuntimeError(f"{self._device} did not answer a question")

    def __deepcopy__(self, memo: dict[int, object]) -> Question:
        return self  # the answer is written here only

    def __del__(self) -> None:
        if self._waits and answers_later(self._device):  # the memory must not be another's when it is written to
            torch.get_device_module(self._device).synchronize(self._device)
