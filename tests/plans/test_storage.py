"""hub: plans go to folders and repositories and come back; nothing here touches the network."""

from __future__ import annotations

import inspect
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from pipelines import CASES_BY_NAME

import lesa
from lesa import PlanError
from lesa.forecasters import plan_of
from lesa.plans import hub
from lesa.plans.plan import PLAN_FILE, Plan
from lesa.plans.rows import Row

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


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every attempt to leave this machine fails the test, and the hub's own cache is out of reach."""

    def leave(*address: Any, **_: Any) -> None:
        pytest.fail(f"the network was asked for {address}")

    monkeypatch.setattr(socket, "getaddrinfo", leave)
    monkeypatch.setattr(socket.socket, "connect", leave)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def same(plan: Plan, other: Plan) -> bool:
    return replace(plan, library_version=None) == replace(other, library_version=None)


def cached(folder: Path, plan: Plan, filename: str = PLAN_FILE, revision: str = "main") -> Path:
    """A hub cache that holds one repository with a plan."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = folder / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(commit)
    plan.save(repository / "snapshots" / commit / filename)
    return folder


def code_of(card: str) -> str:
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code.splitlines()) == 3
    return code


# Folders


def test_a_folder_gives_back_what_was_saved(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "plan"
    path = PLAN.save_pretrained(folder)
    assert path == folder / "plan.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "plan.safetensors"]
    for place in (folder, str(folder), path, str(path)):
        assert same(Plan.from_pretrained(place), PLAN)


def test_a_folder_may_hold_several_plans(tmp_path: Path) -> None:
    PLAN.save_pretrained(tmp_path, "n5/plan.safetensors")
    OTHER.save_pretrained(tmp_path, "other.safetensors")
    assert same(Plan.from_pretrained(tmp_path, filename="n5/plan.safetensors"), PLAN)
    assert same(Plan.from_pretrained(tmp_path, filename="other.safetensors"), OTHER)
    message = r"has no file 'plan.safetensors' \(but other.safetensors\): give filename="
    with pytest.raises(PlanError, match=message):
        Plan.from_pretrained(tmp_path)


def test_a_local_folder_comes_before_a_repository_of_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    OTHER.save_pretrained(NAME)
    assert same(Plan.from_pretrained(NAME), OTHER)


@pytest.mark.parametrize(
    "name", ["missing", "missing.safetensors", "out/missing.safetensors", "./a/b", "../b", "a/b/c"]
)
def test_what_is_no_repository_is_never_asked_for(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert not hub.is_repository(name)
    for place in (name, Path(name)):
        with pytest.raises(PlanError, match="does not exist: give the path of a .safetensors plan file, a folder"):
            Plan.from_pretrained(place)


def test_a_path_object_is_never_a_repository() -> None:
    assert hub.is_repository(NAME)
    with pytest.raises(PlanError, match="does not exist"):
        Plan.from_pretrained(Path(NAME))


def test_files_and_folders_need_no_hub_library(tmp_path: Path) -> None:
    path = PLAN.save_pretrained(tmp_path)
    script = (
        "import sys, lesa\n"
        f"lesa.Plan.from_pretrained({str(path)!r}).save_pretrained({str(tmp_path / 'copy')!r})\n"
        f"assert lesa.Plan.from_pretrained({str(tmp_path / 'copy')!r}).budget == 3\n"
        "assert 'huggingface_hub' not in sys.modules and 'lesa.planview' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=Path(lesa.__file__).parents[1])


def test_enable_takes_a_folder(tmp_path: Path) -> None:
    pipe = CASES_BY_NAME["flux_schnell"].make()
    replace(PLAN, config_hash=None).save_pretrained(tmp_path)
    lesa.enable(pipe, str(tmp_path))
    lesa.stats(pipe)
    lesa.disable(pipe)
    with pytest.raises(PlanError, match="does not exist"):
        lesa.enable(pipe, "missing")


# Model cards


def test_the_card_says_what_the_plan_is_for() -> None:
    card = hub.model_card(PLAN, NAME)
    assert card.startswith("---\nlibrary_name: lesa\n")
    for line in (
        "# Plan: FluxTransformer2DModel, 3 of 4 steps computed",
        "| configuration | abc123 |",
        "| steps | 4, sigmas 1 to 0 |",
        "| budget | 3 computed steps: 0 1 3 |",
        "| forecaster | taylor-1, site hidden |",
        "| effort | default |",
        "| fitting | 33.12 dB PSNR |",
        "| held out | 32.50 dB PSNR |",
        "| prompts | 8 |",
        "##.#",
    ):
        assert line in card.splitlines()


@pytest.mark.parametrize("filename", [PLAN_FILE, "n5/plan.safetensors"])
def test_the_three_lines_of_the_card_run(filename: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder = 'a "quoted" name'
    PLAN.save_pretrained(folder, filename)
    enabled: list[Plan] = []
    monkeypatch.setattr(lesa, "enable", lambda _, plan: enabled.append(Plan.from_pretrained(plan)))
    if filename != PLAN_FILE:
        monkeypatch.setattr(lesa, "enable", lambda _, plan: enabled.append(plan))
    names = {"pipe": lambda prompt, num_inference_steps: (prompt, num_inference_steps), "prompt": "a cat"}
    exec(code_of((Path(folder) / "README.md").read_text()), names)
    assert same(enabled[0], PLAN)
    assert names["result"] == ("a cat", 4)


def test_a_card_is_replaced_only_where_it_is_of_the_same_plan_file(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "filename",
    ["plan.bin", "../plan.safetensors", "/plan.safetensors", "a\\b.safetensors", "", "-->.safetensors"],
)
def test_a_bad_file_name_writes_nothing(filename: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=re.escape(f"filename={filename!r}: expected a name")):
        PLAN.save_pretrained(tmp_path / "new", filename)
    with pytest.raises(PlanError, match=re.escape(f"path_in_repo={filename!r}: expected a name")):
        PLAN.push_to_hub(NAME, path_in_repo=filename)
    assert not any(tmp_path.iterdir())


# Fetching


@pytest.mark.parametrize("filename", [PLAN_FILE, "n5/plan.safetensors"])
def test_the_cache_is_read_without_the_network(filename: str, tmp_path: Path, monkeypatch: Any) -> None:
    cache = cached(tmp_path / "cache", PLAN, filename)
    options: dict[str, Any] = {"filename": filename, "cache_dir": cache}
    assert same(Plan.from_pretrained(NAME, local_files_only=True, **options), PLAN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(Plan.from_pretrained(NAME, **options), PLAN)


def test_the_cache_is_read_at_a_revision(tmp_path: Path) -> None:
    cache = cached(tmp_path / "cache", PLAN, revision="v2")
    assert same(Plan.from_pretrained(NAME, revision="v2", cache_dir=cache, local_files_only=True), PLAN)
    with pytest.raises(PlanError, match="at revision 'v3' is not in the hub's cache"):
        Plan.from_pretrained(NAME, revision="v3", cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("variable", [False, True])
def test_what_is_not_cached_is_one_clear_error(variable: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", variable)
    with pytest.raises(PlanError) as caught:
        Plan.from_pretrained(NAME, cache_dir=tmp_path, local_files_only=not variable)
    assert str(caught.value) == (
        f"plan '{NAME}' is no file or folder here, and 'plan.safetensors' of the hub repository '{NAME}' is not in the "
        f"hub's cache, while {'HF_HUB_OFFLINE is set' if variable else 'local_files_only=True'}: fetch it once with "
        "the network there, or give the path of a plan file or of a folder that Plan.save_pretrained wrote"
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "needs its owner's leave"),
        (errors.RepositoryNotFoundError, "cannot be found: check the name; a private repository needs token="),
        (errors.RevisionNotFoundError, "at revision 'v2' cannot be found: check revision="),
        (errors.EntryNotFoundError, "the repository has no such file; give filename="),
        (errors.LocalEntryNotFoundError, "nor can the hub be reached: check the network"),
        (errors.HfHubHTTPError, r"cannot be fetched \(HfHubHTTPError\)"),
        (errors.HFValidationError, r"cannot be \(the reason\): check the name$"),
        (OSError, r"cannot be fetched \(the reason\)"),
    ],
)
def test_what_the_hub_answers_becomes_a_plan_error(kind: type[Exception], message: str, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        # the hub's errors are made from its answers, and differently in each version
        raise kind.__new__(kind, "the reason")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    for asked in (refuse, lambda *_, **__: None):
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked)
        with pytest.raises(PlanError, match=message):
            Plan.from_pretrained(NAME, revision="v2")


def unplug(monkeypatch: Any) -> None:
    """No name has an address, and nobody may wait to try again."""

    def no_address(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))


def test_a_hub_that_cannot_be_reached_is_not_waited_for(tmp_path: Path, monkeypatch: Any) -> None:
    unplug(monkeypatch)
    with pytest.raises(PlanError, match="hub's cache, nor can the hub be reached .*Name or service not known.*network"):
        Plan.from_pretrained(NAME, cache_dir=tmp_path)


def test_a_hub_that_cannot_be_reached_is_not_needed_for_what_is_cached(tmp_path: Path, monkeypatch: Any) -> None:
    unplug(monkeypatch)
    assert same(Plan.from_pretrained(NAME, cache_dir=cached(tmp_path / "cache", PLAN)), PLAN)


@pytest.mark.parametrize("name", ["a--b/c", "a/..b", "a/b.", f"a/{'b' * 99}"])
def test_a_name_that_no_repository_can_have_is_not_asked_for(name: str) -> None:
    assert hub.is_repository(name)
    with pytest.raises(PlanError, match=r"cannot be \(.*[Rr]epo.id.*\): check the name$"):
        Plan.from_pretrained(name)


def test_every_option_reaches_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    path = PLAN.save(tmp_path / "fetched")
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *a, **k: asked.append((a, k)))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 3)
    cache = tmp_path / "c"
    assert same(Plan.from_pretrained(NAME, filename="n5", revision="v2", cache_dir=str(cache), token="t"), PLAN)
    url = huggingface_hub.hf_hub_url(NAME, "n5", revision="v2")
    fetched = (NAME, "n5"), {"revision": "v2", "cache_dir": cache, "token": "t"}
    assert asked == [((url,), {"token": "t", "timeout": 3}), fetched]


@pytest.mark.parametrize(
    ("method", "function"),
    [
        *((Plan.save_pretrained, hub.save_pretrained), (Plan.push_to_hub, hub.push_to_hub)),
        (Plan.from_pretrained, hub.from_pretrained),
    ],
)
def test_the_methods_take_what_the_functions_take(method: Any, function: Any) -> None:
    taken = [list(inspect.signature(one).parameters.values()) for one in (method, function)]
    if not inspect.ismethod(method):
        taken = [parameters[1:] for parameters in taken]  # the plan itself
    assert taken[0] == taken[1]


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
    assert remote.calls == [
        ("token", "t"),
        ("create", "a-plan", True, True),
        ("upload", "me/a-plan", "Plan: FluxTransformer2DModel, 3 of 4 steps computed"),
    ]
    assert sorted(p.name for p in remote.folder.iterdir()) == ["README.md", "plan.safetensors"]
    assert same(Plan.from_pretrained(remote.folder), PLAN)
    assert 'lesa.enable(pipe, "me/a-plan")' in code_of((remote.folder / "README.md").read_text())


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
    with pytest.raises(PlanError, match="HF_HUB_OFFLINE is set, so nothing can be uploaded"):
        PLAN.push_to_hub(NAME)
    assert not remote.calls


def test_push_where_nobody_answers_is_one_clear_error(monkeypatch: Any) -> None:
    unplug(monkeypatch)
    message = f"^repo_id='{NAME}': the plan cannot be uploaded .*Name or service not known.*save_pretrained$"
    with pytest.raises(PlanError, match=message):
        PLAN.push_to_hub(NAME, token="hf_x")


@pytest.mark.parametrize(
    "kind", [errors.HfHubHTTPError, errors.RepositoryNotFoundError, errors.LocalTokenNotFoundError]
)
def test_what_the_hub_refuses_becomes_a_plan_error(kind: type[Exception], remote: FakeHub, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise kind.__new__(kind, "the reason")

    monkeypatch.setattr(remote, "create_repo", refuse)
    with pytest.raises(PlanError, match=rf"^repo_id='{NAME}': the plan cannot be uploaded \(.*check the name"):
        PLAN.push_to_hub(NAME)


@pytest.mark.parametrize("name", ["", "/a/local/path", "a/b/c", 5])
def test_push_to_what_is_no_repository_names_it(name: Any, monkeypatch: Any) -> None:
    unplug(monkeypatch)
    with pytest.raises(PlanError, match=f'^repo_id={name!r} is no name of a repository .*give "owner/name"'):
        PLAN.push_to_hub(name, token="hf_x")


def test_the_calls_of_push_are_those_of_the_real_hub() -> None:
    """The fake takes what huggingface_hub takes."""
    signature = inspect.signature
    api = huggingface_hub.HfApi
    signature(api).bind(token=None)
    signature(api.create_repo).bind(None, NAME, private=None, exist_ok=True)
    signature(api.file_exists).bind(None, NAME, "README.md")
    signature(api.hf_hub_download).bind(None, NAME, "README.md")
    signature(api.upload_folder).bind(None, repo_id=NAME, folder_path=Path(), commit_message="")


def test_a_folder_that_is_a_file_and_no_name(tmp_path: Path) -> None:
    plan = plan_of("reuse", (0, 2), (1.0, 0.6, 0.3, 0.0), "output")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(PlanError, match="folder='.*file' is a file: give a folder"):
        plan.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(PlanError, match="plan '' does not exist"):
        Plan.from_pretrained("")
