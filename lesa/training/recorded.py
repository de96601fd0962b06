"""Recorded requests on disk: a folder with `recording.json` and one safetensors shard a prompt.

A damaged shard is found by its checksum and named.
"""

from __future__ import annotations

import errno
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from ..plans.files import replace_file

_FORMAT = "lesa-recording-1"
MANIFEST = "recording.json"


class RecordingError(RuntimeError):
    """A recording cannot be made, read or replayed."""


@dataclass(frozen=True)
class Recording:
    """Recorded requests of one pipeline.

    Args:
        folder: where it lies.
        prompts: one a request.
        seeds: of the CPU generator that drew each request's noise.
        request: keyword arguments of the pipeline call besides prompt and generator.
        site: "hidden" or "output".
        contexts: cache contexts of the features.
        sigmas: the T + 1 noise levels, the final 0 included.
        timesteps: the denoiser's timestep argument at each of the T steps.
        denoiser: class name of the denoiser.
        config_hash: hash of its configuration.
    """

    folder: Path
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    request: Mapping[str, Any]
    site: str
    contexts: tuple[str, ...]
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    denoiser: str
    config_hash: str | None

    @property
    def num_steps(self) -> int:
        """T, the number of steps of a request."""
        return len(self.sigmas) - 1

    @property
    def provenance(self) -> dict[str, Any]:
        """What a plan made from this recording says of the model and the request."""
        names = ("site", "timesteps", "denoiser", "config_hash")
        return {name: getattr(self, name) for name in names}

    def noise(self, index: int) -> torch.Tensor:
        """The noise [m, ...] of prompt `index`: the first sample its denoiser saw; m = 2 where guidance is batched."""
        return self._tensor(index, "noise")

    def features(self, index: int, context: str) -> torch.Tensor:
        """The features [T, m, ...] of prompt `index`, in the denoiser's dtype, on the CPU."""
        return self._tensor(index, f"feature.{context}")

    def damaged(self, index: int) -> str | None:
        """Why the shard of prompt `index` cannot be used; None if it is sound."""
        path = self.shard(index)
        if not path.is_file():
            return "missing"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            return f"unreadable ({error})"
        if metadata.get("prompt") != self.prompts[index] or metadata.get("seed") != str(self.seeds[index]):
            return "of another prompt or seed"
        names = {"noise", *(f"feature.{context}" for context in self.contexts)}
        if set(tensors) != names or any(len(tensors[n]) != self.num_steps for n in names - {"noise"}):
            return "of another recording (other contexts or step count)"
        if metadata.get("checksum") != _checksum(tensors):
            return "damaged (its checksum does not match)"
        return None

    def shard(self, index: int) -> Path:
        """Path of the shard of prompt `index`."""
        return self.folder / f"{index:05d}.safetensors"

    @classmethod
    def open(cls, folder: str | Path) -> Recording:
        """Open a recording made by `record`.

        Raises:
            RecordingError: there is none, or it cannot be read.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise RecordingError(f"folder {str(folder)!r} holds no recording ({MANIFEST} is missing): record first")
        try:
            data = json.loads(path.read_text())
            if data.pop("format") != _FORMAT:
                raise ValueError("unknown format")
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return cls(folder=Path(folder), **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordingError(f"{str(path)!r} is damaged ({error}): delete the folder and record again") from error

    def save(self) -> None:
        """Write the manifest: all but the shards."""
        data = {"format": _FORMAT, **{k: v for k, v in asdict(self).items() if k != "folder"}}
        _write(self.folder / MANIFEST, json.dumps(data, indent=1).encode())

    def write(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the shard of prompt `index`: its "noise", and a "feature.<context>" of each context."""
        checksum = _checksum(tensors)
        metadata = {"prompt": self.prompts[index], "seed": str(self.seeds[index]), "checksum": checksum}
        _write(self.shard(index), serialize(dict(tensors), metadata))

    def _tensor(self, index: int, name: str) -> torch.Tensor:
        path = self.shard(index)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RecordingError(f"shard {str(path)!r} cannot be read ({error}): run the recording again") from error


def _write(path: Path, data: bytes) -> None:
    try:
        replace_file(path, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RecordingError(
            f"the disk is full: {path.name} ({len(data) / 1e6:.0f} MB) could not be written to {str(path.parent)!r}; "
            "the shards before it are kept; free space and run the same command to go on"
        ) from error


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(_bytes(tensors[name]), zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
