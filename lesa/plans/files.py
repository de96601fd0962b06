"""Files of the library: written at once or not at all, and read with one clear error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

_KEY = "lesa"
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A kind of file: safetensors, with a JSON description among its metadata.

    Args:
        noun: what it holds, e.g. "a plan"; without an article where it is plural.
        format: the description's "format"; None leaves that to whoever reads.
        error: what is raised for a file that is not as it should be.
        remedy: how to get another file.
        writer: what writes such files.
        instead: for the start of other formats, what to do with such a file.
    """

    noun: str
    format: str | None
    error: type[ValueError]
    remedy: str
    writer: str
    instead: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The noun without its article."""
        return self.noun.removeprefix("a ")

    def verb(self, singular: str, plural: str) -> str:
        """The form that goes with the noun."""
        return plural if self.name == self.noun else singular


def metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file with this description."""
    return {_KEY: json.dumps(description)}


def read(path: str | os.PathLike[str], kind: Kind, framework: str = "np") -> tuple[dict[str, Any], dict[str, Any]]:
    """The description and the tensors of a file.

    Args:
        path: of the file.
        kind: what it should be.
        framework: of the tensors, "np" or "pt".

    Raises:
        ValueError: of the kind's own class: the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    where = f"{kind.name} {str(path)!r}"
    if not path.is_file():
        raise kind.error(
            f"{where} {kind.verb('does', 'do')} not exist: give the path of a .safetensors file written by "
            f"{kind.writer}"
        )
    try:
        with safe_open(path, framework=framework) as file:
            description = _description(file)
            ours = kind.format in (None, description.get("format"))
            # Another file's tensors may be of types numpy does not know, and huge.
            tensors = {name: file.get_tensor(name) for name in (file.keys() if ours else ())}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise kind.error(
            f"{where} cannot be read ({error}): the file is damaged or not a safetensors file; {kind.remedy}"
        ) from error
    if ours:
        return description, tensors
    for start, advice in kind.instead.items():
        if str(description.get("format")).startswith(start):
            raise kind.error(f"{str(path)!r} {advice}")
    raise kind.error(
        f"{str(path)!r} holds no {kind.name}: it is a safetensors file but not {kind.noun} of this library (expected "
        f"format {kind.format!r} in its metadata); give a file written by {kind.writer}"
    )


def load(
    path: str | os.PathLike[str],
    kind: Kind,
    build: Callable[[dict[str, Any], dict[str, Any]], T],
    framework: str = "np",
) -> T:
    """What `build` makes of a file's description and tensors.

    Raises:
        ValueError: of the kind's own class: as `read`, or the file lacks something or holds a value out of place.
    """
    description, tensors = read(path, kind, framework)
    try:
        return build(description, tensors)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, StopIteration) as error:
        said = str(error) if isinstance(error, kind.error) else repr(error)
        raise kind.error(
            f"{kind.name} {str(path)!r} {kind.verb('is', 'are')} incomplete, or a value is out of place ({said}): "
            f"{kind.remedy}"
        ) from error


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


def _description(file: Any) -> dict[str, Any]:
    description = json.loads((file.metadata() or {}).get(_KEY, "null"))
    return description if isinstance(description, dict) else {}


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
