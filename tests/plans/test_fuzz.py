"""Whatever is in a file, a plan comes out of it that works, or one `PlanError`; quickly, and in little memory."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save

from lesa import PlanError, assets
from lesa.plans.plan import Plan
from lesa.plans.rows import Expected, Row
from lesa.plans.schedule import PAPER_STAGES

# One of everything that a file can hold.
PLAN = Plan(
    (0, 1, 3),
    (1.0, 0.75, 0.5, 0.25, 0.0),
    {"cond": {2: Row((0, 1), (-1.0, 2.0), 0.5)}, "uncond": {2: Row((1,), (1.0,))}},
    timesteps=(1000.0, 750.0, 500.0, 250.0),
    denoiser="FluxTransformer2DModel",
    config_hash="abc123",
    stages=PAPER_STAGES,
    training={"fitting_psnr": 33.125, "prompts": 8, "alphas": {"*": [0.1, None]}, "schedule": "searched"},
    checks={"cond": {3: Row((1,), (1.0,))}},
    expected={"cond": {3: Expected(0.1, 0.2)}},
)
DEEP = 100_000
MOST_MEMORY = 2**26  # bytes; the largest file here has 2**18
# In the place of any value of the description.
HOSTILE = (
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, 1e308, math.nan, math.inf, "", "x" * 10_000,
    "*", "../../etc/passwd", "__import__('os').abort()", [], {}, [None], ["*", "*"], [[[[1]]]], [1] * 1000, {"a": {}},
    [{}], [{"name": "a", "low": math.nan, "window": 1}], [{"name": "a", "low": 0.5, "window": 10**30}],
)  # fmt: skip


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.safetensors"


def loaded(path: Path) -> Plan | None:
    """The plan of a file, after everything that reads a plan's parts; None where it is refused."""
    try:
        plan = Plan.load(path)
    except PlanError as error:
        assert path.name in str(error) and len(str(error)) < 1000
        return None
    again = Plan.load(plan.save(path))
    assert replace(again, library_version=None) == replace(plan, library_version=None) or "NaN" in str(plan.training)
    assert plan.capacity <= plan.num_steps
    assert plan.title() in plan.model_card("name", path.name) and plan.summary()
    Plan.join(dict.fromkeys(plan.rows or ("*",), plan))
    return plan


def parts_of(source: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the description of a file, without its checksum."""
    with safe_open(source, framework="np") as file:
        description = json.loads(file.metadata()["lesa"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description.pop("checksum", None)
    return arrays, description


def read_of(arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of the surrogate, if there is one, else all."""
    fitted = any(name.startswith("surrogate_") for name in arrays)
    return ((name, array) for name, array in arrays.items() if name.startswith("surrogate_") or not fitted)


def write(path: Path, arrays: dict[str, np.ndarray], description: Any) -> Path:
    """A file without a checksum, as older versions wrote it."""
    text = description if isinstance(description, str) else json.dumps(description)
    path.write_bytes(save(arrays, {"lesa": text}))
    return path


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container within a JSON value, with each of its keys or first indices."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 1)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places_in(value[key])


def test_a_truncated_file(path: Path) -> None:
    data = PLAN.save(path).read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        assert loaded(path) is None
    path.write_bytes(data + b"\0")
    assert loaded(path) is None


def test_a_flipped_bit_is_told_or_changes_nothing(path: Path, seed: int) -> None:
    plan, data, rng = Plan.load(PLAN.save(path)), path.read_bytes(), random.Random(seed)
    for bit in rng.sample(range(8 * len(data)), 800):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert loaded(path) in (None, plan), bit


def test_several_flipped_bits(path: Path, seed: int) -> None:
    data, rng = PLAN.save(path).read_bytes(), random.Random(seed)
    for _ in range(300):
        damaged = bytearray(data)
        for bit in rng.sample(range(8 * len(data)), rng.choice((2, 3, 20))):
            damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        loaded(path)


@pytest.mark.parametrize("fitted", [False, True])
def test_arrays_of_another_dtype(path: Path, fitted: bool) -> None:
    arrays, description = parts_of(assets.fitted_path(10) if fitted else PLAN.save(path))
    assert loaded(write(path, arrays, description)) is not None
    for name, array in read_of(arrays):
        kind = "f" if array.dtype.kind == "f" else "i"
        for dtype in ("bool", "uint8", "int64", "float16", "float32", "float64", "complex64"):
            if np.dtype(dtype).kind != kind:
                with np.errstate(all="ignore"):
                    other = arrays | {name: np.nan_to_num(array).astype(dtype)}
                assert loaded(write(path, other, description)) is None, (name, dtype)


@pytest.mark.parametrize("fitted", [False, True])
def test_arrays_of_another_shape(path: Path, fitted: bool) -> None:
    arrays, description = parts_of(assets.fitted_path(10) if fitted else PLAN.save(path))
    for name, array in read_of(arrays):
        shapes = [(0,), (), (1, *array.shape), (*array.shape, 1), (*array.shape[:-1], 0), (2 * len(array),)]
        shapes += [(*array.shape[:i], length + 1, *array.shape[i + 1 :]) for i, length in enumerate(array.shape)]
        for shape in shapes:
            read = loaded(write(path, arrays | {name: np.zeros(shape, array.dtype)}, description))
            assert read is None or (name, shape[:2]) == (name, array.shape[:2]), (name, shape)
    for name, _ in read_of(arrays):
        read = loaded(write(path, {other: arrays[other] for other in arrays if other != name}, description))
        assert read is None or name in ("timesteps", "spread"), name


def test_shapes_that_only_the_header_has(path: Path) -> None:
    for shape in [[2**40], [2**62, 4], [-1], [0, 2**62], [1] * 70, [], "x", None, [1.5], [2**70]]:
        data = PLAN.save(path).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        for name in ("computed", "sigmas", "weights"):
            for dtype in ("F64", "BF16", "U8", "X"):
                head = json.loads(data[8 : 8 + length])
                head[name] |= {"shape": shape, "dtype": dtype}
                text = json.dumps(head).encode()
                path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
                assert loaded(path) is None


def test_sizes_that_lie(path: Path) -> None:
    for size in (0, 1, 2**20, 2**40, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", size) + PLAN.save(path).read_bytes()[8:])
        assert loaded(path) is None
    steps = 200_000
    with pytest.raises(PlanError, match="sigmas"):
        Plan.load(
            write(path, {"computed": np.zeros(1, np.int32), "sigmas": np.ones(steps)}, parts_of(PLAN.save(path))[1])
        )


def test_hostile_values_anywhere_in_the_description(path: Path, seed: int) -> None:
    arrays, description = parts_of(PLAN.save(path))
    rng, refused = random.Random(seed), 0
    for number, _ in enumerate(places_in(description)):
        for value in rng.sample(HOSTILE, 10):
            changed = copy.deepcopy(description)
            container, key = list(places_in(changed))[number]
            container[key] = value
            refused += loaded(write(path, arrays, changed)) is None
        changed = copy.deepcopy(description)
        container, key = list(places_in(changed))[number]
        del container[key]
        loaded(write(path, arrays, changed))
    assert refused > 100


def test_a_description_that_is_none(path: Path) -> None:
    for text in [
        "[" * DEEP,
        '{"a":' * DEEP,
        "[" * DEEP + "]" * DEEP,
        "1" * 5000,
        '{"format": "lesa-plan-1"}',
        "NaN",
        "",
        "\ud7ff\0",
        "[]",
    ]:
        arrays, description = parts_of(PLAN.save(path))
        assert loaded(write(path, arrays, text)) is None
        whole = json.dumps(description | {"training": 0})
        assert loaded(
            write(path, arrays, whole.replace('"training": 0', f'"training": {{"a": {text or 0}}}'))
        ) is None or (text in ("NaN", "[]", "", '{"format": "lesa-plan-1"}'))


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_pickle_is_never_opened(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for data in (pickle.dumps(Evil(mark)), pickle.dumps(PLAN)):
        path.write_bytes(data)
        assert loaded(path) is None
    for value in ({"computed": Evil(mark)}, PLAN):
        torch.save(value, path)
        assert loaded(path) is None
    np.save(path.with_suffix(".npy"), np.array([Evil(mark)], object), allow_pickle=True)
    path.write_bytes(path.with_suffix(".npy").read_bytes())
    assert loaded(path) is None
    assert not mark.exists()
