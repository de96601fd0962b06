"""Record full requests on disk, and run them again: the initial noise and the feature of every step.

A recording is a folder with `recording.json` and one safetensors shard for each prompt. An interrupted recording
continues where it stopped. A damaged shard is found by its checksum and recorded again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from tqdm.auto import tqdm

from ..models.layouts import config_hash, denoiser_of
from ..models.pipeline import (
    FeatureRecorder,
    by_request,
    check_batch,
    check_prompts,
    check_request,
    not_finite,
    not_finite_message,
    run,
    seeds_of,
)
from ..plans.rows import LesaWarning
from ..plans.storage import replace_file
from ..runtime.clock import Call
from ..runtime.driver import Driver, Forecast, Relay

MANIFEST = "recording.json"
_FORMAT = "lesa-recording-1"


class RecordingError(RuntimeError):
    """A recording cannot be made, read or replayed."""


class Features(Protocol):
    """What training reads of a recording."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """One for each request."""

    @property
    def contexts(self) -> tuple[str, ...]:
        """Cache contexts of the features."""

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The T + 1 noise levels."""

    def features(self, index: int, context: str) -> Tensor:
        """The features [T, m, ...] of prompt `index`."""


@dataclass(frozen=True)
class Recording:
    """Recorded requests of one pipeline.

    Args:
        folder: where it lies.
        prompts: one for each request.
        seeds: of the CPU generators that drew the noise, one for each request.
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
        """The fields of a plan that say which model and requests it is for."""
        names = ("site", "timesteps", "denoiser", "config_hash")
        return {name: getattr(self, name) for name in names}

    def noise(self, index: int) -> Tensor:
        """The noise [m, ...] of prompt `index`: the first sample its denoiser saw. m = 2 where guidance is batched."""
        return self._tensor(index, "noise")

    def features(self, index: int, context: str) -> Tensor:
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
            RecordingError: there is none, or its manifest cannot be read.
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

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the shard of prompt `index`: its "noise", and a "feature.<context>" for each context."""
        checksum = _checksum(tensors)
        metadata = {"prompt": self.prompts[index], "seed": str(self.seeds[index]), "checksum": checksum}
        _write(self.shard(index), serialize(dict(tensors), metadata))

    def _tensor(self, index: int, name: str) -> Tensor:
        path = self.shard(index)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RecordingError(f"shard {str(path)!r} cannot be read ({error}): run the recording again") from error


def digest(recording: Features) -> str:
    """Tells recordings apart: by prompts, noise levels, contexts and, where a recording has them, model and site."""
    parts = [recording.prompts, recording.contexts, recording.sigmas, getattr(recording, "provenance", None)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def record(
    pipe: Any,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    request: Mapping[str, Any],
    site: str = "hidden",
    seeds: Sequence[int] | None = None,
    batch: int = 1,
) -> Recording:
    """Run full requests and keep their noise and features; continues a recording that was interrupted.

    Args:
        pipe: a diffusers pipeline that takes prompts; every step is computed.
        prompts: at least one.
        folder: of the recording. Takes T features for each prompt and context (FLUX at 1024x1024, 50 steps: 1.26 GB).
        request: keyword arguments of the pipeline call, e.g. {"num_inference_steps": 50, "height": 64}.
        site: "hidden" or "output".
        seeds: of each prompt's noise; the prompt's index by default.
        batch: prompts run in one pipeline call.

    Raises:
        RecordingError: the folder holds another recording, the disk is full, or a feature is not finite.
        ValueError: `prompts` is empty or one string, lengths differ, `batch` is below 1, or
            `request` cannot be kept as JSON or holds a prompt.
    """
    check_prompts(prompts)
    check_batch(batch)
    seeds = seeds_of(len(prompts), seeds)
    check_request(request)
    folder = Path(folder)
    wanted: dict[str, Any] = {
        "prompts": tuple(prompts),
        "seeds": seeds,
        "request": dict(request),
        "site": site,
        "denoiser": type(denoiser_of(pipe)).__name__,
        "config_hash": config_hash(denoiser_of(pipe)),
    }
    recording = _resume(folder, wanted)
    missing = list(range(len(prompts))) if recording is None else _missing(recording)
    with tqdm(total=len(prompts), initial=len(prompts) - len(missing), desc="record", unit="prompt") as bar:
        for begin in range(0, len(missing), batch):
            indices = missing[begin : begin + batch]
            shards = Shards([f"{i} ({prompts[i]!r})" for i in indices])
            run(pipe, [prompts[i] for i in indices], [seeds[i] for i in indices], request, shards.recorder, site)
            if recording is None:
                recording = Recording(folder=folder, **shards.found(), **wanted)
                _check_space(recording, shards, len(missing))
                recording.save()
            for position, index in enumerate(indices):
                recording.write(index, shards.tensors(position))
                bar.update()
    assert recording is not None
    return recording


def replay(pipe: Any, recording: Recording, indices: Sequence[int], driver: Driver) -> Any:
    """Run recorded prompts again, from the same noise, under another driver.

    Returns:
        What the pipeline returns.

    Raises:
        RecordingError: the pipeline does not draw the recorded noise.
    """
    noise = torch.stack([recording.noise(index) for index in indices], 1).flatten(0, 1)
    prompts, seeds = [recording.prompts[i] for i in indices], [recording.seeds[i] for i in indices]
    return run(pipe, prompts, seeds, recording.request, _SameNoise(driver, noise), recording.site)


class Shards:
    """The noise and features of one pipeline call, taken by its `recorder`, as the shards of its prompts.

    Args:
        labels: names of the call's prompts, for errors.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.recorder = FeatureRecorder(labels, sink=self._take, error=RecordingError)
        self._noise: Tensor | None = None
        self._features: dict[str, list[Tensor]] = {}

    def found(self) -> dict[str, Any]:
        """The contexts, sigmas and timesteps of the call."""
        recorder = self.recorder
        assert recorder.request is not None and recorder.request.sigmas is not None
        return {
            "contexts": tuple(recorder.contexts),
            "sigmas": recorder.request.sigmas,
            "timesteps": tuple(recorder.timesteps),
        }

    def tensors(self, position: int) -> dict[str, Tensor]:
        """The noise and features of one prompt of the call, as a request for it alone would give them."""

        def part(batch: Tensor) -> Tensor:
            return by_request(batch, len(self.recorder.labels))[position]

        assert self._noise is not None
        features = {f"feature.{c}": torch.stack([part(f) for f in fs]) for c, fs in self._features.items()}
        return {"noise": part(self._noise).contiguous(), **features}

    def _take(self, call: Call, feature: Tensor) -> None:
        if self._noise is None:
            self._noise = call.sample.detach().cpu().clone()
        label = not_finite(feature, self.recorder.labels)
        if label is not None:
            raise RecordingError(
                not_finite_message(f"step {call.step}, context {call.context!r}, prompt {label}")
                + "; nothing of this prompt was recorded"
            )
        self._features.setdefault(call.context, []).append(feature.detach().cpu())


class _SameNoise(Relay):
    """Checks that a request starts from the recorded noise, then leaves it to another driver."""

    def __init__(self, driver: Driver, noise: Tensor) -> None:
        super().__init__(driver)
        self._noise = noise

    def forecast(self, call: Call) -> Forecast | None:
        if call.starts and not torch.equal(call.sample.cpu(), self._noise):
            raise RecordingError(
                "the request does not start from the recorded noise: use the pipeline, dtype and library versions of "
                "the recording, or record again"
            )
        return super().forecast(call)


def _resume(folder: Path, wanted: Mapping[str, Any]) -> Recording | None:
    """The recording in `folder` with the prompts of `wanted`, more or fewer; None if there is none."""
    if not (folder / MANIFEST).is_file():
        return None
    found = Recording.open(folder)
    shared = min(len(found.prompts), len(wanted["prompts"]))
    for name, value in wanted.items():
        have = getattr(found, name)
        if name in ("prompts", "seeds"):
            have, value = have[:shared], value[:shared]
        elif name == "request":
            value = json.loads(json.dumps(value))  # as the manifest has it, where tuples are lists
        if have != value:
            raise RecordingError(
                f"folder {str(folder)!r} holds a recording with another {name} ({_difference(have, value)}): give "
                "another folder"
            )
    chosen = replace(found, prompts=wanted["prompts"], seeds=wanted["seeds"])
    if len(chosen.prompts) > shared:
        chosen.save()
    return chosen


def _difference(have: Any, wanted: Any) -> str:
    """What differs, of requests only the arguments that do."""
    if not isinstance(have, dict):
        return f"{have!r:.200}, asked for {wanted!r:.200}"
    names = [name for name in sorted({*have, *wanted}) if have.get(name) != wanted.get(name)]
    sides = [", ".join(f"{name}={side.get(name)!r}" for name in names) for side in (have, wanted)]
    return f"{sides[0]:.200}, asked for {sides[1]:.200}"


def _missing(recording: Recording) -> list[int]:
    missing = []
    for index in range(len(recording.prompts)):
        reason = recording.damaged(index)
        if reason not in (None, "missing"):
            warnings.warn(f"shard {recording.shard(index).name} is {reason}; recording it again", LesaWarning, 2)
        if reason is not None:
            missing.append(index)
    return missing


def _check_space(recording: Recording, shards: Shards, count: int) -> None:
    recording.folder.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.nbytes for tensor in shards.tensors(0).values()) * count
    free = shutil.disk_usage(recording.folder).free
    if size > free:
        raise RecordingError(
            f"recording {count} prompts takes {size / 1e6:.0f} MB but the disk of {str(recording.folder)!r} has "
            f"{free / 1e6:.0f} MB free: free space, give another folder, or fewer prompts"
        )


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


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        data = tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        total = zlib.crc32(data, zlib.crc32(name.encode(), total))
    return f"{total:08x}"
