"""Files, folders and repositories give back what was put there, or one clear error; nothing touches the network."""

from __future__ import annotations

import inspect
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from pipelines import CASES_BY_NAME
from safetensors.torch import save_file
from written import statistics

import lesa
from lesa import PlanError, Statistics
from lesa.plans import storage
from lesa.plans.plan import PLAN_FILE, Plan
from lesa.plans.rows import Row
from lesa.plans.storage import Kind, SafetensorsFile

NAME = "someone/a-plan"
TRAINING = {"effort": "default", "fitting_psnr": 33.125, "held_out_psnr": 32.5, "prompts": 8, "seconds": 41.23}
PLAN = Plan(
    (0, 1, 3),
    (1.0, 0.75, 0.5, 0.25, 0.0),
    {"*": {2: Row((0, 1), (-1.0, 2.0), 0.5)}},
    forecaster="taylor-1",
    denoiser="FluxTransformer2DModel",
    config_hash="abc123",
    training=TRAINING,
)
OTHER = replace(PLAN, forecaster="reuse", rows={"*": {2: Row((1,), (1.0,))}})


class BoxError(ValueError):
    """What a box that is not as it should be raises."""


@dataclass
class Box(SafetensorsFile):
    """The least that can be stored."""

    kind: ClassVar[Kind] = Kind(
        "box", "lesa-box-1", "box.safetensors", BoxError, "Box.save", {"lesa-bag": "holds a bag: open it"}
    )
    values: Any
    label: str = "é 日本"

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"values": self.values}, {"label": self.label}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any], description: dict[str, Any]) -> Box:
        if description["label"] == "broken":
            raise BoxError("label='broken': expected another")
        return cls(arrays["values"], description["label"])


class TorchBox(Box):
    """A box of tensors."""

    kind = replace(Box.kind, framework="pt")


class Bag(Box):
    """Another kind, which a box knows."""

    kind = replace(Box.kind, name="bag", format="lesa-bag-7")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every attempt to leave this machine fails the test, and the Hub's own cache is out of reach."""

    def leave(*address: Any, **_: Any) -> None:
        pytest.fail(f"the network was asked for {address}")

    monkeypatch.setattr(socket, "getaddrinfo", leave)
    monkeypatch.setattr(socket.socket, "connect", leave)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def unplug(monkeypatch: Any) -> None:
    """No name has an address, and nobody may wait to try again."""

    def no_address(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))


def same(plan: Plan, other: Plan) -> bool:
    return replace(plan, library_version=None) == replace(other, library_version=None)


def cached(folder: Path, plan: Plan, filename: str = PLAN_FILE, revision: str = "main") -> Path:
    """A Hub cache that holds one repository with a plan."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = folder / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(commit)
    plan.save(repository / "snapshots" / commit / filename)
    return folder


# Files


@pytest.mark.parametrize("values", [np.arange(6.0).reshape(2, 3).T, torch.arange(3.0)])
def test_a_file_gives_back_what_was_saved(values: Any, tmp_path: Path) -> None:
    cls = TorchBox if isinstance(values, torch.Tensor) else Box
    path = cls(values).save(str(tmp_path / "new" / "box"))
    again = cls.load(str(path))
    assert type(again.values) is type(values) and again.label == "é 日本"
    assert again.values.dtype == values.dtype and again.values.tolist() == values.tolist()
    assert storage.format_of(path) == "lesa-box-1"


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_a_save_that_fails_keeps_the_old_file_and_leaves_nothing(broken: str, tmp_path: Path, monkeypatch: Any) -> None:
    path = Box(np.ones(2)).save(tmp_path / "box")
    before = path.read_bytes()

    def fail(self: Any, data: Any, *_: Any) -> None:
        if broken == "write":
            with open(self, "wb") as file:
                file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "write_bytes") if broken == "write" else (storage.os, "replace")), fail)
        with pytest.raises(KeyboardInterrupt):
            Box(np.zeros(2)).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: Any) -> None:
    path, seen, write = tmp_path / "file", [], Path.write_bytes

    def watched(self: Path, data: bytes) -> int:
        result = write(self, data)
        seen.append(path.read_bytes() if path.exists() else None)
        return result

    monkeypatch.setattr(Path, "write_bytes", watched)
    storage.replace_file(path, b"one")
    storage.replace_file(path, b"two")
    assert seen == [None, b"one"] and path.read_bytes() == b"two"


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    path = Box(np.ones(2)).save(tmp_path / "box")
    data = path.read_bytes()
    for wrong in (
        b"",
        b"nothing of the kind",
        bytes(100),
        b"PK\x03\x04" + bytes(50),
        data[: len(data) // 2],
        data[:-1],
    ):
        path.write_bytes(wrong)
        with pytest.raises(BoxError, match=f"box '{path}' cannot be read"):
            Box.load(path)
        assert storage.format_of(path) is None


@pytest.mark.parametrize("metadata", [None, {"lesa": "[1, 2]"}, {"lesa": '{"format": "lesa-box-2"}'}])
def test_another_safetensors_file_is_one_clear_error(metadata: Any, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_file({"a": torch.zeros(2, dtype=torch.bfloat16)}, path, metadata)  # a type that numpy does not know
    with pytest.raises(BoxError, match=f"'{path}' .*holds no box.*Box.save"):
        Box.load(path)


def test_a_file_of_a_known_kind_says_what_to_do(tmp_path: Path) -> None:
    path = Bag(np.ones(2)).save(tmp_path / "bag")
    with pytest.raises(BoxError, match=f"'{path}' holds a bag: open it"):
        Box.load(path)
    with pytest.raises(PlanError, match="budget=10"):
        Plan.load(statistics().save(tmp_path / "statistics"))


def test_what_is_missing_or_out_of_place_inside_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    path = Box(np.ones(2), "broken").save(tmp_path / "box")
    with pytest.raises(BoxError, match=r"box '.*' *: incomplete.*\(label='broken'"):
        Box.load(path)
    for error in (KeyError("lid"), IndexError(7), TypeError("x"), RuntimeError("x"), StopIteration()):

        def build(cls: Any, *_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Box, "from_arrays", classmethod(build))
        with pytest.raises(BoxError, match=re.escape(repr(error))) as caught:
            Box.load(path)
        assert caught.value.__cause__ is error


# Folders


@pytest.mark.parametrize("one", [PLAN, statistics()], ids=["Plan", "Statistics"])
def test_a_folder_gives_back_what_was_saved(one: Any, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    path = one.save_pretrained(folder)
    assert path == folder / one.kind.filename
    assert sorted(p.name for p in folder.iterdir()) == sorted(["README.md", one.kind.filename])
    for place in (folder, str(folder), path, str(path)):
        assert type(one).from_pretrained(place).save(tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_folder_may_hold_several_plans(tmp_path: Path) -> None:
    PLAN.save_pretrained(tmp_path, "n5/plan.safetensors")
    OTHER.save_pretrained(tmp_path, "other.safetensors")
    assert same(Plan.from_pretrained(tmp_path, filename="n5/plan.safetensors"), PLAN)
    assert same(Plan.from_pretrained(tmp_path, filename="other.safetensors"), OTHER)
    with pytest.raises(PlanError, match=r"has no file 'plan.safetensors' \(but other.safetensors\): give filename="):
        Plan.from_pretrained(tmp_path)


def test_a_folder_comes_before_a_repository_of_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    OTHER.save_pretrained(NAME)
    assert same(Plan.from_pretrained(NAME), OTHER)


def test_what_is_no_repository_is_never_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.is_repository(NAME)
    for name in ("", "missing", "missing.safetensors", "out/missing.safetensors", "./a/b", "../b", "a/b/c", Path(NAME)):
        assert isinstance(name, Path) or not storage.is_repository(name)
        with pytest.raises(PlanError, match=f"plan {str(name)!r} does not exist"):
            Plan.from_pretrained(name)


def test_files_and_folders_need_no_hub_library(tmp_path: Path) -> None:
    path = PLAN.save_pretrained(tmp_path)
    script = (
        "import sys, lesa\n"
        f"lesa.Plan.from_pretrained({str(path)!r}).save_pretrained({str(tmp_path / 'copy')!r})\n"
        f"assert lesa.Plan.from_pretrained({str(tmp_path / 'copy')!r}).budget == 3\n"
        "assert not {'huggingface_hub', 'torch', 'lesa.evaluation'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=Path(lesa.__file__).parents[1])


def test_enable_takes_a_folder(tmp_path: Path) -> None:
    pipe = CASES_BY_NAME["flux_schnell"].make()
    replace(PLAN, config_hash=None).save_pretrained(tmp_path)
    with lesa.enable(pipe, str(tmp_path)) as run:
        assert run.plan.computed == PLAN.computed


def test_a_bad_file_name_writes_nothing(tmp_path: Path) -> None:
    for filename in ["plan.bin", "../plan.safetensors", "/plan.safetensors", "a\\b.safetensors", ""]:
        with pytest.raises(PlanError, match=re.escape(f"filename={filename!r}:")):
            PLAN.save_pretrained(tmp_path / "new", filename)
        with pytest.raises(PlanError, match=re.escape(f"path_in_repo={filename!r}:")):
            PLAN.push_to_hub(NAME, path_in_repo=filename)
        assert not any(tmp_path.iterdir())


def test_a_folder_that_is_a_file_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(PlanError, match=f"='{folder}"):
            PLAN.save_pretrained(folder)
    assert (tmp_path / "file").read_text() == "kept"


# Model cards


@pytest.mark.parametrize("filename", [PLAN_FILE, "n5/plan.safetensors"])
def test_the_code_of_the_card_runs(filename: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder = 'a "quoted" name'
    PLAN.save_pretrained(folder, filename)
    card = (Path(folder) / "README.md").read_text()
    assert "| fitting | 33.12 dB PSNR |" in card.splitlines()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    enabled: list[Any] = []
    monkeypatch.setattr(lesa, "enable", lambda _, plan: enabled.append(plan))
    names = {"pipe": lambda prompt, num_inference_steps: (prompt, num_inference_steps), "prompt": "a cat"}
    exec(code, names)
    plan = enabled[0] if isinstance(enabled[0], Plan) else Plan.from_pretrained(enabled[0])
    assert same(plan, PLAN) and names["result"] == ("a cat", 4)


def test_the_code_of_a_plain_card_runs(tmp_path: Path) -> None:
    statistics().save_pretrained(tmp_path)
    [call] = re.findall("^    (.*)$", (tmp_path / "README.md").read_text().replace(tmp_path.name, str(tmp_path)), re.M)
    assert isinstance(eval(call, {"Statistics": Statistics}), Statistics)


def test_a_card_is_replaced_only_where_it_is_of_the_same_file(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    PLAN.save_pretrained(tmp_path)
    OTHER.save_pretrained(tmp_path)
    assert "| forecaster | reuse, site hidden |" in card.read_text()
    PLAN.save_pretrained(tmp_path, "second.safetensors")
    assert "| forecaster | reuse, site hidden |" in card.read_text()
    card.write_text("my own words")
    PLAN.save_pretrained(tmp_path)
    assert card.read_text() == "my own words"
    assert same(Plan.from_pretrained(tmp_path), PLAN)


# Fetching


@pytest.mark.parametrize("filename", [PLAN_FILE, "n5/plan.safetensors"])
def test_the_cache_is_read_without_the_network(filename: str, tmp_path: Path, monkeypatch: Any) -> None:
    options: dict[str, Any] = {"filename": filename, "cache_dir": str(cached(tmp_path / "cache", PLAN, filename))}
    assert same(Plan.from_pretrained(NAME, local_files_only=True, **options), PLAN)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert same(Plan.from_pretrained(NAME, **options), PLAN)
    unplug(monkeypatch)
    assert same(Plan.from_pretrained(NAME, **options), PLAN)


def test_the_cache_is_read_at_a_revision(tmp_path: Path) -> None:
    cache = cached(tmp_path / "cache", PLAN, revision="v2")
    assert same(Plan.from_pretrained(NAME, revision="v2", cache_dir=cache, local_files_only=True), PLAN)
    with pytest.raises(PlanError, match="revision="):
        Plan.from_pretrained(NAME, revision="v3", cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("offline", [False, True])
def test_what_is_not_cached_is_one_clear_error(offline: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(PlanError, match=f"'{NAME}' is no file or folder here, and 'plan.safetensors'"):
        Plan.from_pretrained(NAME, cache_dir=tmp_path, local_files_only=not offline)


def test_a_hub_that_cannot_be_reached_is_not_waited_for(tmp_path: Path, monkeypatch: Any) -> None:
    unplug(monkeypatch)
    with pytest.raises(PlanError, match=f"'{NAME}'.*Name or service not known.*network"):
        Plan.from_pretrained(NAME, cache_dir=tmp_path)


@pytest.mark.parametrize("kind", [errors.GatedRepoError, errors.HFValidationError, OSError])
def test_what_the_hub_answers_becomes_a_plan_error(kind: type[Exception], monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        # The Hub's errors are made from its answers, and differently in each version.
        raise kind.__new__(kind, "the reason")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    for asked in (refuse, lambda *_, **__: None):
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked)
        with pytest.raises(PlanError, match=f"{kind.__name__}.*filename=, revision=, token="):
            Plan.from_pretrained(NAME, revision="v2")


@pytest.mark.parametrize("name", ["a--b/c", "a/..b", f"a/{'b' * 99}"])
def test_a_name_that_no_repository_can_have_is_not_asked_for(name: str) -> None:
    assert storage.is_repository(name)
    with pytest.raises(PlanError, match="check the name"):
        Plan.from_pretrained(name)


def test_every_option_reaches_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    path = PLAN.save(tmp_path / "fetched")
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *a, **k: asked.append((a, k)))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 3)
    options: dict[str, Any] = {"filename": "n5.safetensors", "revision": "v2", "token": "t"}
    assert same(Plan.from_pretrained(NAME, cache_dir=str(tmp_path / "c"), **options), PLAN)
    url = huggingface_hub.hf_hub_url(NAME, "n5.safetensors", revision="v2")
    fetched = {"revision": "v2", "cache_dir": tmp_path / "c", "token": "t"}
    assert asked == [((url,), {"token": "t", "timeout": 3}), ((NAME, "n5.safetensors"), fetched)]


# Pushing


class FakeHub:
    """A repository in a folder, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, []

    def __call__(self, token: Any) -> FakeHub:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        self.calls.append(("create", repo_id, private, exist_ok))
        self.folder.mkdir(exist_ok=True)
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def file_exists(self, _: str, filename: str) -> bool:
        return (self.folder / filename).exists()

    def hf_hub_download(self, _: str, filename: str) -> str:
        return str(self.folder / filename)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        self.calls.append(("upload", repo_id, commit_message))
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: Any) -> FakeHub:
    fake = FakeHub(tmp_path / "remote")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def test_push_makes_one_commit_with_plan_and_card(remote: FakeHub) -> None:
    assert PLAN.push_to_hub("a-plan", private=True, token="t") == "https://hub/me/a-plan/commit/1"
    assert remote.calls == [("token", "t"), ("create", "a-plan", True, True), ("upload", "me/a-plan", PLAN.title())]
    assert sorted(p.name for p in remote.folder.iterdir()) == ["README.md", "plan.safetensors"]
    assert same(Plan.from_pretrained(remote.folder), PLAN)
    assert 'lesa.enable(pipe, "me/a-plan")' in (remote.folder / "README.md").read_text()


def test_push_again_renews_its_own_card_only(remote: FakeHub) -> None:
    PLAN.push_to_hub(NAME)
    OTHER.push_to_hub(NAME, commit_message="better")
    card = remote.folder / "README.md"
    assert remote.calls[-1] == ("upload", NAME, "better")
    assert "| forecaster | reuse, site hidden |" in card.read_text()
    assert same(Plan.from_pretrained(remote.folder), OTHER)
    card.write_text("the card of a model")
    PLAN.push_to_hub(NAME, path_in_repo="plans/n5.safetensors")
    assert card.read_text() == "the card of a model"
    assert same(Plan.from_pretrained(remote.folder, filename="plans/n5.safetensors"), PLAN)
    assert same(Plan.from_pretrained(remote.folder), OTHER)


def test_push_says_that_it_is_offline(remote: FakeHub, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PlanError, match=f"repo_id='{NAME}': HF_HUB_OFFLINE"):
        PLAN.push_to_hub(NAME)
    assert not remote.calls


def test_push_where_nobody_answers_or_the_name_is_none_is_one_clear_error(monkeypatch: Any) -> None:
    for name in [NAME, "", "/a/local/path", "a/b/c", 5]:
        unplug(monkeypatch)
        with pytest.raises(PlanError, match=f"^repo_id={name!r}: .*save_pretrained$"):
            PLAN.push_to_hub(name, token="hf_x")


def test_what_the_hub_refuses_becomes_a_plan_error(remote: FakeHub, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise errors.HfHubHTTPError.__new__(errors.HfHubHTTPError, "the reason")

    monkeypatch.setattr(remote, "create_repo", refuse)
    with pytest.raises(PlanError, match=f"^repo_id='{NAME}': .*HfHubHTTPError.*token="):
        PLAN.push_to_hub(NAME)


def test_the_fake_takes_what_the_real_hub_takes() -> None:
    signature, api = inspect.signature, huggingface_hub.HfApi
    signature(api).bind(token=None)
    signature(api.create_repo).bind(None, NAME, private=None, exist_ok=True)
    signature(api.file_exists).bind(None, NAME, "README.md")
    signature(api.hf_hub_download).bind(None, NAME, "README.md")
    signature(api.upload_folder).bind(None, repo_id=NAME, folder_path=Path(), commit_message="")
