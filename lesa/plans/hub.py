"""Where plans live: a file, a folder, or a repository of the Hugging Face hub, in huggingface_hub's manner."""

from __future__ import annotations

import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from .describe import drawing, figures
from .files import replace_file
from .plan import PLAN_FILE, Plan, PlanError

CARD_FILE = "README.md"
_FILENAME = re.compile(r"([\w-][\w.-]*/)*[\w-][\w.-]*\.safetensors", re.ASCII)
_REPOSITORY = re.compile(r"(?!\.)[\w.-]+/[\w.-]+(?<!\.safetensors)", re.ASCII)


def is_repository(name: str) -> bool:
    """Whether `name` has the form "owner/name" of a hub repository."""
    return _REPOSITORY.fullmatch(name) is not None


def save_pretrained(plan: Plan, folder: str | os.PathLike[str], filename: str = PLAN_FILE) -> Path:
    """Write a plan and its model card into a folder that `from_pretrained` reads.

    Args:
        plan: what to write.
        folder: made if there is none; other files in it stay.
        filename: of the plan in the folder.

    Returns:
        The path of the plan's file.

    Raises:
        PlanError: `filename` is not a .safetensors file inside the folder, or the folder is a file.
    """
    return _write(plan, Path(folder), filename, Path(folder).resolve().name)


def push_to_hub(
    plan: Plan,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    path_in_repo: str = PLAN_FILE,
) -> str:
    """Upload a plan and its model card in one commit, making the repository if there is none.

    A model card that was not written for this plan file stays as it is.

    Args:
        plan: what to upload.
        repo_id: "owner/name", or "name" for one of your own.
        commit_message: by default it says what the plan is for.
        private: of a new repository; None is public unless the organisation's default is private.
        token: of the hub; None takes the one of `hf auth login`.
        path_in_repo: of the plan's file; several plans of one repository have different ones.

    Returns:
        The address of the commit.

    Raises:
        PlanError: `path_in_repo` is not a .safetensors file inside the repository, `repo_id` names none, HF_HUB_OFFLINE
            is set, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError

    _check_filename("path_in_repo", path_in_repo)
    if constants.HF_HUB_OFFLINE:
        raise PlanError(
            f"repo_id={repo_id!r}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or write a folder "
            "with Plan.save_pretrained"
        )
    try:
        api = HfApi(token=token)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if api.file_exists(name, CARD_FILE):
                there = Path(api.hf_hub_download(name, CARD_FILE))
                (folder / CARD_FILE).write_bytes(there.read_bytes())
            _write(plan, folder, path_in_repo, name)
            message = commit_message or f"Plan: {_summary(plan)}"
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)
    except HFValidationError as error:
        raise PlanError(
            f'repo_id={repo_id!r} is no name of a repository ({_said(error)}): give "owner/name", or write a folder '
            "with Plan.save_pretrained"
        ) from error
    except (_http_error(), OSError) as error:
        raise PlanError(
            f"repo_id={repo_id!r}: the plan cannot be uploaded ({_said(error)}): check the name, the network and the "
            "token (hf auth login, or token=), or write a folder with Plan.save_pretrained"
        ) from error


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    filename: str = PLAN_FILE,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Plan:
    """Read a plan from a file, a folder, or a repository of the hub; a local one never touches the network.

    Args:
        name_or_path: a plan file, a folder that holds one, or, where neither is there, a repository "owner/name".
        filename: of the plan in the folder or repository.
        revision: branch, tag or commit of the repository.
        cache_dir: of the hub's files; None takes the hub's own.
        local_files_only: take a repository from the cache only, as with HF_HUB_OFFLINE.
        token: of the hub; None takes the one of `hf auth login`.

    Raises:
        PlanError: there is no such plan, it cannot be read or fetched; the message says what is missing and what to do.
    """
    path = Path(name_or_path)
    if name_or_path != "" and path.is_dir():  # "" would be the folder one is in
        return Plan.load(_in_folder(path, filename))
    if path.is_file():
        return Plan.load(path)
    if not isinstance(name_or_path, str) or not is_repository(name_or_path):
        raise PlanError(
            f"plan {str(name_or_path)!r} does not exist: give the path of a .safetensors plan file, a folder that "
            'Plan.save_pretrained wrote, or a hub repository "owner/name"'
        )
    return Plan.load(_fetch(name_or_path, filename, revision, cache_dir, local_files_only, token))


def model_card(plan: Plan, name: str, filename: str = PLAN_FILE) -> str:
    """The README.md of a plan: what it is for, its figures, and how to use it.

    Args:
        plan: what the card is of.
        name: what `from_pretrained` takes to find it, e.g. "owner/name".
        filename: of the plan in that folder or repository.
    """
    where = json.dumps(name, ensure_ascii=False)
    if filename != PLAN_FILE:
        where = f'lesa.Plan.from_pretrained({where}, filename="{filename}")'
    facts = [
        ("denoiser", plan.denoiser or "any"),
        ("configuration", plan.config_hash or "any"),
        ("steps", f"{plan.num_steps}, sigmas {plan.sigmas[0]:.4g} to {plan.sigmas[-1]:.4g}"),
        ("budget", f"{plan.budget} computed steps: {' '.join(map(str, plan.computed))}"),
        ("forecaster", f"{plan.forecaster}, site {plan.site}"),
        *figures(plan.training),
    ]
    return "\n".join(
        [
            *("---", "library_name: lesa", "tags:", "- lesa", "- diffusion", "- acceleration", "---"),
            _mark(filename),
            f"# Plan: {_summary(plan)}",
            "",
            "A plan of `lesa` says which steps of a diffusion request the denoiser computes, and by which weights the",
            "others are forecast. It holds no weights of the model.",
            "",
            *("| | |", "|---|---|"),
            *(f"| {name} | {_cell(value)} |" for name, value in facts),
            "",
            *("```", *drawing(plan), "```"),
            "",
            "`#` is a computed step, `.` a forecast one. Use it with the pipeline it was made for:",
            "",
            "```python",
            "import lesa",
            f"lesa.enable(pipe, {where})",
            f"result = pipe(prompt, num_inference_steps={plan.num_steps})",
            "```",
            "",
        ]
    )


def _summary(plan: Plan) -> str:
    return f"{plan.denoiser or 'any denoiser'}, {plan.budget} of {plan.num_steps} steps computed"


def _cell(value: str) -> str:
    return value.replace("|", "\\|")


def _mark(filename: str) -> str:
    return f"<!-- lesa: the card of {filename} -->"


def _write(plan: Plan, folder: Path, filename: str, name: str) -> Path:
    _check_filename("filename", filename)
    if folder.exists() and not folder.is_dir():
        raise PlanError(f"folder={str(folder)!r} is a file: give a folder, or save the plan with plan.save(path)")
    path = plan.save(folder / filename)
    card = folder / CARD_FILE
    # somebody's own words, or the card of another plan, are not ours to replace
    if not card.exists() or _mark(filename) in card.read_text(encoding="utf-8", errors="replace"):
        replace_file(card, model_card(plan, name, filename).encode())
    return path


def _check_filename(argument: str, filename: str) -> None:
    if not _FILENAME.fullmatch(filename):
        raise PlanError(
            f'{argument}={filename!r}: expected a name of letters, digits, "-", "_" and "." such as "{PLAN_FILE}" or '
            f'"n5/{PLAN_FILE}"'
        )


def _in_folder(folder: Path, filename: str) -> Path:
    path = folder / filename
    if not path.is_file():
        found = sorted(str(p.relative_to(folder)) for p in folder.glob("*.safetensors"))[:5]
        raise PlanError(
            f"folder {str(folder)!r} has no file {filename!r} (but {', '.join(found) or 'no .safetensors file'}): give "
            "filename=, the path of one of them, or a folder that Plan.save_pretrained wrote"
        )
    return path


def _fetch(
    name: str,
    filename: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | bool | None,
) -> str:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    cache = None if cache_dir is None else Path(cache_dir)
    offline = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE is set"
    try:
        found = try_to_load_from_cache(name, filename, cache_dir=cache, revision=revision)
        if not local_files_only and not constants.HF_HUB_OFFLINE:
            if not isinstance(found, str):
                # hf_hub_download has no option for this: with nothing in the cache it asks six times more where nobody
                # answers, for 23 s and longer. Whatever is answered, it reads better itself.
                url = hf_hub_url(name, filename, revision=revision)
                with suppress(HfHubHTTPError):
                    get_hf_file_metadata(url, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return hf_hub_download(name, filename, revision=revision, cache_dir=cache, token=token)
        # hf_hub_download(local_files_only=True) may still ask the hub about other things
        if isinstance(found, str):
            return found
        reason = (
            f"is not in the hub's cache, while {offline}: fetch it once with the network there, or give the path of a "
            "plan file or of a folder that Plan.save_pretrained wrote"
        )
        cause: Exception | None = None
    except (EntryNotFoundError, _http_error(), OSError, ValueError) as error:
        reason, cause = _why(error), error
    at = f" at revision {revision!r}" if revision else ""
    raise PlanError(
        f"plan {name!r} is no file or folder here, and {filename!r} of the hub repository {name!r}{at} {reason}"
    ) from cause


def _http_error() -> type[Exception]:
    """The error of the HTTP library, which is another one in each version of the hub's."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _why(error: Exception) -> str:
    from huggingface_hub import errors

    said = _said(error)
    unknown = f"cannot be fetched ({said}): check the name and the network"
    nowhere = "is not in the hub's cache, nor can the hub be reached"
    # a kind stands before the kinds that it is one of
    reasons: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, "needs its owner's leave: ask for it on the repository's page, then give token="),
        (errors.RepositoryNotFoundError, "cannot be found: check the name; a private repository needs token="),
        (errors.RevisionNotFoundError, "cannot be found: check revision="),
        (errors.LocalEntryNotFoundError, f"{nowhere}: check the network"),
        (errors.EntryNotFoundError, "cannot be found: the repository has no such file; give filename="),
        (errors.HFValidationError, f"cannot be ({said}): check the name"),
        (errors.HfHubHTTPError, unknown),
        (_http_error(), f"{nowhere} ({said}): check the network"),
    ]
    return next((reason for kind, reason in reasons if isinstance(error, kind)), unknown)
