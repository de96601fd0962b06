"""Where plans, statistics and predictors live: a file, a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

CARD_FILE = "README.md"
_KEY = "lesa"  # of the description among a file's metadata
_CHECKSUM = re.compile(r', "checksum": "([0-9a-f]{8})"}')  # at the end of the description; older files have none
_FILENAME = re.compile(r"([\w-][\w.-]*/)*[\w-][\w.-]*\.safetensors", re.ASCII)
_REPOSITORY = re.compile(r"(?!\.)[\w.-]+/[\w.-]+(?<!\.safetensors)", re.ASCII)
Stored = TypeVar("Stored", bound="SafetensorsFile")


@dataclass(frozen=True)
class Kind:
    """What a class writes.

    Args:
        name: the noun for errors, e.g. "plan".
        format: the description's "format", e.g. "lesa-plan-1".
        filename: in folders and repositories where no other is given.
        error: what is raised for a file that is not as it should be.
        writer: the call that writes such files.
        instead: for the start of other formats, what to do with such a file.
        framework: of the arrays, "np" or "pt".
    """

    name: str
    format: str
    filename: str
    error: type[ValueError]
    writer: str
    instead: Mapping[str, str] = field(default_factory=dict)
    framework: str = "np"


class SafetensorsFile(ABC):
    """An object that is stored as arrays and a JSON description in one safetensors file.

    A subclass names its `kind` and says how it becomes arrays and comes out of them.
    """

    kind: ClassVar[Kind]

    @abstractmethod
    def to_arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays by name, and the description, JSON-able."""

    @classmethod
    @abstractmethod
    def from_arrays(cls: type[Stored], arrays: dict[str, Any], description: dict[str, Any]) -> Stored:
        """What `to_arrays` returned, read back; raises where something is missing or out of place."""

    def title(self) -> str:
        """One line that says what this is."""
        return self.kind.name

    def model_card(self, name: str, filename: str) -> str:
        """The README.md beside the file.

        Args:
            name: what `from_pretrained` takes to find it, e.g. "owner/name".
            filename: of the file in that folder or repository.
        """
        call = f"{type(self).__name__}.from_pretrained({json.dumps(name)}, filename={json.dumps(filename)})"
        return card(filename, self.title(), ["Load it with", "", f"    {call}"])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file; `path` is replaced at once or not at all.

        Raises:
            ValueError: of the class's own kind, e.g. `PlanError`: `path` is a folder, or cannot be written.
        """
        path = _path(self.kind, "path", path)
        if path.is_dir():
            raise self.kind.error(
                f"path={str(path)!r} is a folder: give the name of a file in it, or use save_pretrained(folder)"
            )
        data = self._serialize()
        try:
            replace_file(path, data)
        except OSError as error:
            raise self.kind.error(f"path={str(path)!r} cannot be written ({error}): give another path") from error
        return path

    @classmethod
    def load(cls: type[Stored], path: str | os.PathLike[str]) -> Stored:
        """Read a file that `save` wrote.

        Raises:
            ValueError: of the class's own kind, e.g. `PlanError`: the file is missing, damaged, or of another kind.
        """
        kind = cls.kind
        path = _path(kind, "path", path)
        description, arrays = read(path, kind)
        try:
            return cls.from_arrays(arrays, description)
        except Exception as error:  # a file may hold anything
            said = str(error) if isinstance(error, kind.error) else repr(error)
            raise kind.error(
                f"{kind.name} {str(path)!r}: incomplete, or a value is out of place ({said:.500}): make or copy it "
                "again"
            ) from error

    def save_pretrained(self, folder: str | os.PathLike[str], filename: str | None = None) -> Path:
        """Write the file and a model card into a folder that `from_pretrained` reads.

        Args:
            folder: made if there is none; other files in it stay.
            filename: of the file in the folder; by default the kind's own.

        Returns:
            The path of the file.

        Raises:
            ValueError: of the class's own kind: `filename` is not a .safetensors file inside the folder, or the folder
                is a file.
        """
        path = _path(self.kind, "folder", folder)
        return self._write(path, filename, path.resolve().name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        path_in_repo: str | None = None,
    ) -> str:
        """Upload the file and a model card in one commit, making the repository if there is none.

        A model card that was not written for this file stays as it is.

        Args:
            repo_id: "owner/name", or "name" for one of your own.
            commit_message: by default the title.
            private: of a new repository; None is public unless the organisation's default is private.
            token: of the Hub; None takes the one of `hf auth login`.
            path_in_repo: of the file; by default the kind's own name.

        Returns:
            The address of the commit.

        Raises:
            ValueError: of the class's own kind: `path_in_repo` is not a .safetensors file inside the repository, or
                the Hub cannot be reached or refuses.
        """
        from huggingface_hub import HfApi, constants

        kind = self.kind
        _check_filename(kind, "path_in_repo", path_in_repo)
        if constants.HF_HUB_OFFLINE:
            raise kind.error(
                f"repo_id={repo_id!r}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or write a folder "
                "with save_pretrained"
            )
        try:
            api = HfApi(token=token)
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                if api.file_exists(name, CARD_FILE):
                    there = Path(api.hf_hub_download(name, CARD_FILE))
                    (folder / CARD_FILE).write_bytes(there.read_bytes())
                self._write(folder, path_in_repo, name)
                message = commit_message or self.title()
                return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)
        except Exception as error:  # the Hub's, the HTTP library's, the disk's: each version raises others
            raise kind.error(
                f"repo_id={repo_id!r}: the upload failed ({_told(error)}); check the name, the network and the token "
                "(hf auth login, or token=), or write a folder with save_pretrained"
            ) from error

    @classmethod
    def from_pretrained(
        cls: type[Stored],
        name_or_path: str | os.PathLike[str],
        *,
        filename: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Stored:
        """Read a file, a folder, or a repository of the Hub; what is on disk never touches the network.

        Args:
            name_or_path: a file, a folder that holds one, or, where neither is there, a repository "owner/name".
            filename: of the file in the folder or repository; by default the kind's own.
            revision: branch, tag or commit of the repository.
            cache_dir: of the Hub's files; None takes the Hub's own.
            local_files_only: take a repository from the cache only, as with HF_HUB_OFFLINE.
            token: of the Hub; None takes the one of `hf auth login`.

        Raises:
            ValueError: of the class's own kind: there is no such file, or it cannot be read or fetched.
        """
        kind, path = cls.kind, _path(cls.kind, "name_or_path", name_or_path)
        if name_or_path != "" and path.is_dir():  # "" would be the folder one is in
            return cls.load(_in_folder(kind, path, _path(kind, "filename", filename or kind.filename)))
        if path.is_file():
            return cls.load(path)
        if not isinstance(name_or_path, str) or not is_repository(name_or_path):
            raise kind.error(
                f"{kind.name} {str(name_or_path)!r} does not exist: give the path of a .safetensors file, a folder "
                'that save_pretrained wrote, or a Hub repository "owner/name"'
            )
        _check_filename(kind, "filename", filename)
        filename = filename or kind.filename
        try:
            found = _download(name_or_path, filename, revision, cache_dir, local_files_only, token)
        except Exception as error:  # the Hub's, the HTTP library's, the disk's: each version raises others
            raise kind.error(
                f"{kind.name} {name_or_path!r} is no file or folder here, and {filename!r} cannot be fetched from the "
                f"Hub repository of that name ({_told(error)}); check the name, filename=, revision=, token= and the "
                "network, or give a path"
            ) from error
        return cls.load(found)

    def _serialize(self) -> bytes:
        arrays, description = self.to_arrays()
        head = metadata({"format": self.kind.format, **description})
        if self.kind.framework == "pt":
            from safetensors.torch import save

            return save(arrays, head)
        from safetensors.numpy import save as save_numpy

        # safetensors writes an array's memory as it lies.
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return save_numpy(arrays, _signed(head, arrays))

    def _write(self, folder: Path, filename: str | None, name: str) -> Path:
        _check_filename(self.kind, "filename", filename)
        filename = filename or self.kind.filename
        if folder.exists() and not folder.is_dir():
            raise self.kind.error(f"folder={str(folder)!r} is a file: give a folder, or write a file with save(path)")
        path = self.save(folder / filename)
        readme = folder / CARD_FILE
        # Somebody's own words, or the card of another file, are not ours to replace.
        if not readme.exists() or _mark(filename) in readme.read_text(encoding="utf-8", errors="replace"):
            replace_file(readme, self.model_card(name, filename).encode())
        return path


def card(filename: str, title: str, lines: list[str]) -> str:
    """A model card: front matter for the Hub, a mark that says whose card it is, a title and some lines."""
    head = ["---", "library_name: lesa", "tags:", "- lesa", "- diffusion", "- acceleration", "---"]
    return "\n".join([*head, _mark(filename), f"# {title}", "", *lines, ""])


def is_repository(name: str) -> bool:
    """Whether `name` has the form "owner/name" of a Hub repository."""
    return _REPOSITORY.fullmatch(name) is not None


def read(path: str | os.PathLike[str], kind: Kind) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description and the arrays of a file.

    Raises:
        ValueError: of the kind's own class: the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    where = f"{kind.name} {str(path)!r}"
    if not path.is_file():
        raise kind.error(f"{where} does not exist: give the path of a .safetensors file written by {kind.writer}")
    try:
        with safe_open(path, framework=kind.framework) as file:
            description = _description(file)
            ours = description.get("format") == kind.format
            # Another file's arrays may be of types numpy does not know, and huge.
            arrays = {name: file.get_tensor(name) for name in (file.keys() if ours else ())}
            if ours and kind.framework == "np":
                _check_checksum(file.metadata()[_KEY], arrays)
                description.pop("checksum", None)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise kind.error(
            f"{where} cannot be read ({error}): it is damaged or no safetensors file; make or copy it again"
        ) from error
    if ours:
        return description, arrays
    for start, advice in kind.instead.items():
        if str(description.get("format")).startswith(start):
            raise kind.error(f"{str(path)!r} {advice}")
    raise kind.error(
        f"{str(path)!r} is a safetensors file that holds no {kind.name} (no format {kind.format!r} in its metadata): "
        f"give a file written by {kind.writer}"
    )


def metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file with this description, as `read` finds it."""
    return {_KEY: json.dumps(description)}


def format_of(path: str | os.PathLike[str]) -> str | None:
    """The format that a file says it has; None where it says none or cannot be read."""
    try:
        with safe_open(path, framework="np") as file:
            return _description(file).get("format")
    except (SafetensorError, OSError, ValueError):
        return None


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file beside it, so that a reader never sees half a file.

    Raises:
        ValueError: `path` is a folder.
    """
    if path.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder: give the name of a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_folder(folder: Path, name: str) -> None:
    """Check that files can be written to a folder, which is made to see it and taken away again.

    Args:
        folder: it need not be there.
        name: of the argument or option, for the error.

    Raises:
        ValueError: it is a file, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} {str(folder)!r} is a file: give a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name} {str(folder)!r} cannot be made ({error.strerror}): give another folder") from error
    finally:
        for path in made:
            if path.exists():
                path.rmdir()


def _download(
    name: str,
    filename: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | bool | None,
) -> str:
    """The path of a repository's file in the Hub's cache."""
    from huggingface_hub import (
        constants,
        errors,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    cache = None if cache_dir is None else Path(cache_dir)
    found = try_to_load_from_cache(name, filename, cache_dir=cache, revision=revision)
    if local_files_only or constants.HF_HUB_OFFLINE:  # hf_hub_download(local_files_only=True) may ask the network
        if isinstance(found, str):
            return found
        raise FileNotFoundError("not in the cache, and local_files_only=True or HF_HUB_OFFLINE forbid to fetch it")
    if not isinstance(found, str):
        # Where nobody answers, hf_hub_download tries six times, for 25 s, and has no option for it.
        url = hf_hub_url(name, filename, revision=revision)
        with suppress(errors.HfHubHTTPError):  # the Hub answers: the download says what
            get_hf_file_metadata(url, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return hf_hub_download(name, filename, revision=revision, cache_dir=cache, token=token)


def _path(kind: Kind, argument: str, value: Any) -> Path:
    """`value` as a path that the file system can be asked for."""
    try:
        path = Path(value)
        path.exists()
    except (TypeError, OSError) as error:  # no path, or a name that is too long
        why = getattr(error, "strerror", None) or error
        raise kind.error(f"{argument}={value!r:.80}: expected a path ({why})") from error
    return path


def _description(file: Any) -> dict[str, Any]:
    try:
        description = json.loads((file.metadata() or {}).get(_KEY, "null"))
    except RecursionError:
        raise ValueError("its description is nested too deeply") from None
    return description if isinstance(description, dict) else {}


def _signed(head: Mapping[str, str], arrays: Mapping[str, Any]) -> dict[str, str]:
    """A file's metadata, with the checksum in the description: safetensors keeps no order among several keys."""
    told = head[_KEY]
    return {_KEY: f'{told[:-1]}, "checksum": "{_checksum(told, arrays)}"}}'}


def _check_checksum(description: str, arrays: Mapping[str, Any]) -> None:
    found = _CHECKSUM.search(description)
    if found is not None and found[1] != _checksum(description[: found.start()] + "}", arrays):
        raise ValueError("its checksum does not fit what it holds")


def _checksum(description: str, arrays: Mapping[str, Any]) -> str:
    """A CRC-32 of a file's description and arrays: it tells damage, not forgery."""
    total = zlib.crc32(description.encode())
    for name in sorted(arrays):
        array = arrays[name]
        total = zlib.crc32(f"{name} {array.dtype} {tuple(array.shape)}".encode(), total)
        total = zlib.crc32(array.tobytes(), total)
    return f"{total:08x}"


def _in_folder(kind: Kind, folder: Path, filename: Path) -> Path:
    path = folder / filename
    if not path.is_file():
        found = sorted(str(p.relative_to(folder)) for p in folder.glob("*.safetensors"))[:5]
        raise kind.error(
            f"folder {str(folder)!r} has no file {str(filename)!r} (but {', '.join(found) or 'no .safetensors file'}): "
            "give filename=, or the path of one of them"
        )
    return path


def _check_filename(kind: Kind, argument: str, filename: Any) -> None:
    if filename is not None and not (isinstance(filename, str) and _FILENAME.fullmatch(filename)):
        raise kind.error(
            f'{argument}={filename!r}: expected letters, digits, "-", "_" and ".", such as "{kind.filename}" or '
            f'"n5/{kind.filename}"'
        )


def _mark(filename: str) -> str:
    return f"<!-- lesa: the card of {filename} -->"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
