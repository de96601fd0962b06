"""Recordings: they hold what the denoiser saw, survive kills and damage, and refuse to be mixed up."""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CASES_BY_NAME, NEGATIVE, PROMPTS, Case
from safetensors import safe_open
from torch import Tensor

from lesa.models import hooks
from lesa.models.layouts import config_hash
from lesa.models.pipeline import run
from lesa.plans.rows import LesaWarning
from lesa.runtime.clock import sigmas_of
from lesa.training import recording as recording_module
from lesa.training.recording import Recording, RecordingError, Shards, record, replay

FLUX = CASES_BY_NAME["flux_dev"]
STEPS = 4
ON_CASE_SITES = pytest.mark.parametrize(
    ("case", "site"),
    [(CASES_BY_NAME["qwen_image"], "hidden"), (CASES_BY_NAME["sdxl"], "output")],
    ids=["qwen-hidden", "sdxl-output"],
)


def request_of(case: Case, steps: int = STEPS) -> dict[str, Any]:
    height, width = case.size or (None, None)
    request = {**case.request, "num_inference_steps": steps, "height": height, "width": width}
    if len(case.contexts) != 1:  # classifier-free guidance, in calls of its own or batched
        request["negative_prompt"] = NEGATIVE
    return {name: value for name, value in request.items() if value is not None and name != "output_type"}


def recorded(pipe: Any, folder: Path, prompts: tuple[str, ...] = PROMPTS[:3], **more: Any) -> Recording:
    return record(pipe, prompts, folder, **{"request": request_of(FLUX), **more})


@contextmanager
def hand_hooked(case: Case, pipe: Any, site: str) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Samples, timesteps and features of every denoiser call, taken with plain torch hooks."""
    denoiser = case.denoiser(pipe)
    samples: list[Tensor] = []
    timesteps: list[Tensor] = []
    features: list[Tensor] = []

    def before(_module: Any, args: tuple, kwargs: dict) -> None:
        name = "sample" if "sample" in kwargs else "hidden_states"
        samples.append((kwargs[name] if name in kwargs else args[0]).clone())
        timesteps.append(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).clone())

    def after(_module: Any, _args: Any, output: Any) -> None:
        position = case.feature if site == "hidden" else 0
        features.append((output if isinstance(output, Tensor) else output[position]).clone())

    tail = getattr(denoiser, case.blocks[-1])[-1] if site == "hidden" else denoiser
    handles = [denoiser.register_forward_pre_hook(before, with_kwargs=True), tail.register_forward_hook(after)]
    try:
        yield samples, timesteps, features
    finally:
        for handle in handles:
            handle.remove()


def calls_of(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of every request that `record` makes from now on."""
    seen: list[str] = []

    def watched(pipe: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(prompts)
        return run(pipe, prompts, *args, **kwargs)

    monkeypatch.setattr(recording_module, "run", watched)
    return seen


def assert_clean(pipe: Any) -> None:
    assert hooks.attached(pipe) is None
    registries = [getattr(module, "_diffusers_hook", None) for module in pipe.transformer.modules()]
    assert not any(registry.hooks for registry in registries if registry is not None)


def assert_same_content(actual: Recording, expected: Recording) -> None:
    for index in range(len(expected.prompts)):
        assert torch.equal(actual.noise(index), expected.noise(index))
        for context in expected.contexts:
            assert torch.equal(actual.features(index, context), expected.features(index, context))


# What is recorded


@pytest.mark.parametrize(
    ("case", "site"),
    [(FLUX, "hidden"), (FLUX, "output"), (CASES_BY_NAME["qwen_image"], "hidden"), (CASES_BY_NAME["sdxl"], "output")],
    ids=["flux-hidden", "flux-output", "qwen-hidden", "sdxl-output"],
)
def test_features_are_those_of_a_hand_hooked_run(case: Case, site: str, tmp_path: Path) -> None:
    pipe, request = case.make(), request_of(case)
    found = record(pipe, PROMPTS[:2], tmp_path, request=request, site=site, seeds=(5, 9))
    contexts = case.contexts or ("default",)
    assert found.contexts == contexts
    for index, seed in enumerate((5, 9)):
        with hand_hooked(case, pipe, site) as (samples, timesteps, features):
            generator = torch.Generator("cpu").manual_seed(seed)
            pipe(prompt=[PROMPTS[index]], generator=[generator], output_type="latent", **request)
        assert len(features) == STEPS * len(contexts)
        assert torch.equal(found.noise(index), samples[0])
        for i, context in enumerate(contexts):
            assert torch.equal(found.features(index, context), torch.stack(features[i :: len(contexts)]))
        assert found.timesteps == tuple(float(t.max()) for t in timesteps[:: len(contexts)])
    assert found.sigmas == sigmas_of(pipe.scheduler)
    assert found.num_steps == STEPS
    assert (found.prompts, found.seeds, found.request, found.site) == (PROMPTS[:2], (5, 9), request, site)
    assert found.denoiser == type(case.denoiser(pipe)).__name__
    assert found.config_hash == config_hash(case.denoiser(pipe))


def test_seeds_are_the_prompts_indices_by_default(tmp_path: Path) -> None:
    pipe = FLUX.make()
    assert recorded(pipe, tmp_path / "a").seeds == (0, 1, 2)
    assert_same_content(recorded(pipe, tmp_path / "b", seeds=(0, 1, 2)), recorded(pipe, tmp_path / "a"))
    assert not torch.equal(recorded(pipe, tmp_path / "a").noise(0), recorded(pipe, tmp_path / "a").noise(1))


@ON_CASE_SITES
def test_batches_of_two_agree_with_single_prompts(case: Case, site: str, tmp_path: Path) -> None:
    pipe = case.make()
    prompts = ("red apple", "blue bird", "green door")  # of one length, since some pipelines pad a batch
    one = record(pipe, prompts, tmp_path / "one", request=request_of(case), site=site)
    two = record(pipe, prompts, tmp_path / "two", request=request_of(case), site=site, batch=2)
    assert two.contexts == one.contexts
    assert two.timesteps == one.timesteps
    for index in range(3):
        assert torch.equal(two.noise(index), one.noise(index))
        for context in one.contexts:
            expected = one.features(index, context)
            other = one.features((index + 1) % 3, context)
            torch.testing.assert_close(two.features(index, context), expected, rtol=1e-4, atol=1e-4)
            assert (other - expected).abs().max() > 0.05


def test_a_recorded_pipeline_is_left_as_it_was(tmp_path: Path) -> None:
    pipe = FLUX.make()
    before = FLUX.call(pipe)
    recorded(pipe, tmp_path)
    assert_clean(pipe)
    assert torch.equal(FLUX.call(pipe), before)


def test_dtype_of_the_denoiser_is_kept(tmp_path: Path) -> None:
    found = recorded(FLUX.make().to(torch.bfloat16), tmp_path)
    assert found.features(0, "cond").dtype == torch.bfloat16
    assert found.damaged(0) is None


def test_open_gives_what_record_gave(tmp_path: Path) -> None:
    found = recorded(FLUX.make(), tmp_path)
    assert Recording.open(tmp_path) == found
    assert Recording.open(str(tmp_path)).provenance == {
        "site": "hidden",
        "timesteps": found.timesteps,
        "denoiser": "FluxTransformer2DModel",
        "config_hash": found.config_hash,
    }
    assert all(found.damaged(index) is None for index in range(3))


# Going on


def test_a_killed_recording_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FLUX.make()
    whole = recorded(pipe, tmp_path / "whole")
    calls = [0]

    def kill(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == STEPS + 3:  # third step of the second prompt
            raise KeyboardInterrupt

    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        recorded(pipe, tmp_path / "killed")
    handle.remove()
    assert_clean(pipe)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["00000.safetensors", "recording.json"]
    seen = calls_of(pipe, monkeypatch)
    found = recorded(pipe, tmp_path / "killed")
    assert seen == list(PROMPTS[1:3])
    assert_same_content(found, whole)
    seen.clear()
    assert recorded(pipe, tmp_path / "killed") == found
    assert seen == []


def test_only_missing_prompts_are_run_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FLUX.make()
    found = recorded(pipe, tmp_path, PROMPTS)
    for index in (0, 2, 3):
        found.shard(index).unlink()
    seen = calls_of(pipe, monkeypatch)
    recorded(pipe, tmp_path, PROMPTS, batch=2)
    assert seen == [PROMPTS[0], PROMPTS[2], PROMPTS[3]]


def test_more_prompts_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FLUX.make()
    recorded(pipe, tmp_path, PROMPTS[:2])
    seen = calls_of(pipe, monkeypatch)
    found = recorded(pipe, tmp_path, PROMPTS)
    assert seen == list(PROMPTS[2:])
    assert found.prompts == Recording.open(tmp_path).prompts == PROMPTS
    assert_same_content(found, recorded(pipe, tmp_path / "at-once", PROMPTS))


def test_fewer_prompts_use_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FLUX.make()
    whole = recorded(pipe, tmp_path, PROMPTS)
    seen = calls_of(pipe, monkeypatch)
    recorded(pipe, tmp_path, PROMPTS[:2])
    assert seen == []
    whole.shard(1).unlink()
    whole.shard(3).unlink()
    found = recorded(pipe, tmp_path, PROMPTS[:2])
    assert seen == [PROMPTS[1]]
    assert (found.prompts, found.seeds) == (PROMPTS[:2], (0, 1))
    assert Recording.open(tmp_path).prompts == PROMPTS  # the others' shards are not given up


# Damage


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_tensor_bit(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-5] ^= 4
    shard.write_bytes(data)


def replace_by_other_prompt(shard: Path) -> None:
    shutil.copy(shard.with_name("00000.safetensors"), shard)


def shorten(shard: Path) -> None:
    """The same prompt and seed, soundly recorded, but with fewer steps."""
    recorded(FLUX.make(), shard.parent / "other", request=request_of(FLUX, 3))
    shutil.copy(shard.parent / "other" / shard.name, shard)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "unreadable"),
        (flip_tensor_bit, "checksum"),
        (replace_by_other_prompt, "another prompt"),
        (shorten, "another recording"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_shard_is_named_and_recorded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], reason: str
) -> None:
    pipe = FLUX.make()
    whole = recorded(pipe, tmp_path / "whole")
    found = recorded(pipe, tmp_path / "damaged")
    damage(found.shard(1))
    assert reason in str(found.damaged(1))
    assert found.damaged(0) is found.damaged(2) is None
    seen = calls_of(pipe, monkeypatch)
    with pytest.warns(LesaWarning, match=f"00001.safetensors.*{reason}.*recording it again"):
        again = recorded(pipe, tmp_path / "damaged")
    assert seen == [PROMPTS[1]]
    assert_same_content(again, whole)


def test_any_changed_byte_is_found(tmp_path: Path, seed: int) -> None:
    """In the header damage may fall on padding; in the tensors every bit counts."""
    rng = random.Random(seed)
    shard = recorded(FLUX.make(), tmp_path, PROMPTS[:1]).shard(0)
    found, data = Recording.open(tmp_path), shard.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for position in (*range(0, header), *rng.sample(range(header, len(data)), 100)):
        changed = bytearray(data)
        changed[position] ^= 1 << rng.randrange(8)
        shard.write_bytes(changed)
        reason = found.damaged(0)
        assert reason is not None or (position < header and chr(data[position]).isspace()), position


def test_unreadable_shard_is_named_when_it_is_used(tmp_path: Path) -> None:
    found = recorded(FLUX.make(), tmp_path)
    truncate(found.shard(1))
    for use in (lambda: found.noise(1), lambda: found.features(1, "cond")):
        with pytest.raises(RecordingError, match=r"00001\.safetensors.*run the recording again"):
            use()
    with pytest.raises(RecordingError, match=r"00000\.safetensors"):
        found.features(0, "uncond")


def test_damaged_manifest(tmp_path: Path) -> None:
    pipe, manifest = FLUX.make(), tmp_path / "recording.json"
    recorded(pipe, tmp_path, PROMPTS[:1])
    data = json.loads(manifest.read_text())
    with pytest.raises(RecordingError, match="holds no recording"):
        Recording.open(tmp_path / "other")
    for text in ("", "{", "[]", "null", "{}", '{"format": "lesa-recording-0"}'):
        manifest.write_text(text)
        with pytest.raises(RecordingError, match=r"recording\.json.*damaged.*record again"):
            Recording.open(tmp_path)
    with pytest.raises(RecordingError, match=r"recording\.json.*damaged.*record again"):
        recorded(pipe, tmp_path, PROMPTS[:1])
    for name in data.keys() - {"format"}:
        manifest.write_text(json.dumps({key: value for key, value in data.items() if key != name}))
        with pytest.raises(RecordingError, match=f"damaged.*{name}"):
            Recording.open(tmp_path)


# Folders of another recording


def test_folder_of_another_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FLUX.make()
    found = recorded(pipe, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    seen = calls_of(pipe, monkeypatch)
    others: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"request": request_of(FLUX, 6)}, ("another request", "num_inference_steps=4", "num_inference_steps=6")),
        ({"site": "output"}, ("another site", "'hidden'", "'output'")),
        ({"prompts": (PROMPTS[0], "a lion", PROMPTS[2])}, ("another prompts", PROMPTS[1], "a lion")),
        ({"seeds": (0, 7, 2)}, ("another seeds", "(0, 1, 2)", "(0, 7, 2)")),
        ({"request": {**request_of(FLUX), "height": 48}}, ("another request", "height=32", "height=48")),
    ]
    for changes, named in others:
        with pytest.raises(RecordingError, match="give another folder") as caught:
            recorded(pipe, tmp_path, **changes)
        assert all(text in str(caught.value) for text in (*named, str(tmp_path)))
    assert seen == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Recording.open(tmp_path) == found


def test_folder_of_another_model(tmp_path: Path) -> None:
    recorded(CASES_BY_NAME["flux_schnell"].make(), tmp_path)
    with pytest.raises(RecordingError, match="another config_hash"):
        recorded(FLUX.make(), tmp_path)
    with pytest.raises(RecordingError, match="another .*'FluxTransformer2DModel'.*'QwenImageTransformer2DModel'"):
        recorded(CASES_BY_NAME["qwen_image"].make(), tmp_path)


def test_request_with_tuples_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON knows lists only."""
    pipe = CASES_BY_NAME["sdxl"].make()
    request = {**request_of(CASES_BY_NAME["sdxl"]), "crops_coords_top_left": (0, 8)}
    for prompts in (PROMPTS[:1], PROMPTS[:2]):
        found = record(pipe, prompts, tmp_path, request=request, site="output")
    assert len(found.prompts) == 2


# A full disk


def test_space_that_is_just_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FLUX.make()
    found = recorded(pipe, tmp_path / "first")
    size = 3 * (found.noise(0).nbytes + found.features(0, "cond").nbytes)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    recorded(pipe, tmp_path / "second")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(RecordingError, match="3 prompts.*disk"):
        recorded(pipe, tmp_path / "third")
    assert_clean(pipe)
    assert not list((tmp_path / "third").iterdir())


@pytest.mark.parametrize(
    ("failing", "code"),
    [(0, errno.EDQUOT), (3, errno.ENOSPC)],
    ids=["manifest", "third shard"],
)
def test_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, code: int) -> None:
    pipe = FLUX.make()
    write, count = Path.write_bytes, [0]

    def full(self: Path, data: bytes) -> int:
        count[0] += 1
        if count[0] <= failing:
            return write(self, data)
        write(self, data[: len(data) // 2])
        raise OSError(code, "No space left on device")

    folder = tmp_path / "recording"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(RecordingError, match="disk is full.*shards before it are kept.*same command to go on"):
            recorded(pipe, folder)
    assert_clean(pipe)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["recording.json", "00000.safetensors", "00001.safetensors"][:failing]
    )
    seen = calls_of(pipe, monkeypatch)
    assert_same_content(recorded(pipe, folder), recorded(FLUX.make(), tmp_path / "whole"))
    assert seen[: -len(PROMPTS[:3])] == list(PROMPTS[max(0, failing - 1) : 3])


def test_other_disk_errors_keep_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, data: bytes) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(PermissionError):
        recorded(FLUX.make(), tmp_path)


# NaN


@pytest.mark.parametrize(("value", "batch"), [(float("nan"), 1), (float("inf"), 2)])
def test_features_that_are_not_finite(tmp_path: Path, value: float, batch: int) -> None:
    """Step 2 of the fourth prompt: its prompt and step are named, the prompts of earlier requests are kept."""
    pipe = FLUX.make()
    calls = [0]

    def spoil(_module: Any, _args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        calls[0] += 1
        if calls[0] != (3 if batch == 1 else 1) * STEPS + 3:
            return None
        changed = [tensor.clone() for tensor in output]
        changed[FLUX.feature][-1, 3, 5] = value
        return tuple(changed)

    handle = pipe.transformer.transformer_blocks[0].register_forward_hook(spoil)
    with pytest.raises(RecordingError, match=rf"step 2, context 'cond', prompt 3 \('{PROMPTS[3]}'\).*NaN or infinity"):
        recorded(pipe, tmp_path, PROMPTS, batch=batch)
    handle.remove()
    assert_clean(pipe)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"{index:05d}.safetensors" for index in range(3 if batch == 1 else 2)]
    whole = recorded(pipe, tmp_path / "whole", PROMPTS, batch=batch)
    assert_same_content(recorded(pipe, tmp_path, PROMPTS, batch=batch), whole)


def test_nan_in_the_first_request_leaves_an_empty_place(tmp_path: Path) -> None:
    pipe = FLUX.make()
    with torch.no_grad():
        pipe.transformer.single_transformer_blocks[-1].proj_out.bias[0] = float("nan")
    with pytest.raises(RecordingError, match=r"step 0.*prompt 0 \('a red apple'\)"):
        recorded(pipe, tmp_path / "new")
    assert_clean(pipe)
    assert not (tmp_path / "new").exists()


# Arguments


def test_arguments_are_checked(tmp_path: Path) -> None:
    pipe = FLUX.make()
    with pytest.raises(ValueError, match="prompts is empty"):
        recorded(pipe, tmp_path / "new", ())
    with pytest.raises(ValueError, match="prompts='a red apple'"):
        recorded(pipe, tmp_path / "new", "a red apple")
    with pytest.raises(ValueError, match=r"prompts\[1\]=7"):
        recorded(pipe, tmp_path / "new", ["a red apple", 7])
    with pytest.raises(ValueError, match="batch=0"):
        recorded(pipe, tmp_path / "new", batch=0)
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        recorded(pipe, tmp_path / "new", seeds=(1, 2))
    with pytest.raises(ValueError, match="prompt='a'"):
        recorded(pipe, tmp_path / "new", request={**request_of(FLUX), "prompt": "a"})
    with pytest.raises(ValueError, match="DiTPipeline takes no `prompt`"):
        record(CASES_BY_NAME["dit"].make(), ["a"], tmp_path / "new", request={"num_inference_steps": 2})
    with pytest.raises(ValueError, match=r"site='hidden' is not known for UNet2DConditionModel"):
        record(CASES_BY_NAME["sdxl"].make(), ["a"], tmp_path / "new", request=request_of(CASES_BY_NAME["sdxl"]))
    with pytest.raises(ValueError, match="FluxPipeline.*takes no.*true_cfg"):
        recorded(pipe, tmp_path / "new", request={**request_of(FLUX), "true_cfg": 2.0})
    assert_clean(pipe)
    assert not (tmp_path / "new").exists()


# Replay


def test_replay_runs_the_same_request(tmp_path: Path) -> None:
    pipe = FLUX.make()
    found = recorded(pipe, tmp_path)
    for index in range(3):
        shards = Shards(["again"])
        output = replay(pipe, found, [index], shards.recorder)
        tensors = shards.tensors(0)
        assert torch.equal(tensors["noise"], found.noise(index))
        assert torch.equal(tensors["feature.cond"], found.features(index, "cond"))
        plain = run(pipe, [PROMPTS[index]], [index], request_of(FLUX))
        assert torch.equal(output[0], plain[0])
    assert_clean(pipe)


@ON_CASE_SITES
def test_replay_of_a_batch(case: Case, site: str, tmp_path: Path) -> None:
    pipe = case.make()
    prompts = ("red apple", "blue bird", "green door")
    found = record(pipe, prompts, tmp_path, request=request_of(case), site=site)
    shards = Shards(["a", "b"])
    replay(pipe, found, [2, 0], shards.recorder)
    for position, index in enumerate((2, 0)):
        for context in found.contexts:
            actual = shards.tensors(position)[f"feature.{context}"]
            torch.testing.assert_close(actual, found.features(index, context), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["seed", "dtype"])
def test_replay_refuses_other_noise(tmp_path: Path, change: str) -> None:
    pipe = FLUX.make()
    found = recorded(pipe, tmp_path)
    if change == "seed":
        manifest = json.loads((tmp_path / "recording.json").read_text())
        manifest["seeds"][1] = 77
        (tmp_path / "recording.json").write_text(json.dumps(manifest))
        found = Recording.open(tmp_path)
    else:
        pipe = pipe.to(torch.bfloat16)

    recorder, calls = Shards(["again"]).recorder, []
    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(RecordingError, match="does not start from the recorded noise"):
        replay(pipe, found, [1], recorder)
    handle.remove()
    assert not calls and not recorder.timesteps
    assert_clean(pipe)


def test_shards_can_be_read_without_lesa(tmp_path: Path) -> None:
    """One safetensors file a prompt, with plain names."""
    found = recorded(FLUX.make(), tmp_path)
    with safe_open(found.shard(2), framework="pt") as file:
        assert sorted(file.keys()) == ["feature.cond", "noise"]
        assert {"prompt", "seed", "checksum"} <= set(file.metadata())
        assert file.metadata()["prompt"] == PROMPTS[2]
