"""Files of the library: what is read back, and one clear error of the reader's own class for everything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import save_file

from lesa.plans import files


class BoxError(ValueError):
    """What a box that is not as it should be raises."""


BOX = files.Kind("a box", "lesa-box-1", BoxError, "pack it again", "Box.save", {"lesa-bag": "holds a bag: open it"})
SOCKS = files.Kind("socks", "lesa-socks-1", BoxError, "wash them", "Socks.save")
ANY = files.Kind("a thing", None, BoxError, "make it again", "anybody")


def written(path: Path, form: str | None = "lesa-box-1", **description: object) -> Path:
    metadata = files.metadata({"format": form, **description}) if form else None
    files.replace_file(path, save({"a": np.arange(3.0)}, metadata))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "box", size=3, name="é 日本")
    description, tensors = files.read(str(path), BOX)
    assert description == {"format": "lesa-box-1", "size": 3, "name": "é 日本"}
    assert tensors.keys() == {"a"} and tensors["a"].tolist() == [0.0, 1.0, 2.0]
    assert files.load(path, BOX, lambda described, found: described["size"] * found["a"].sum()) == 9.0
    assert isinstance(files.read(path, BOX, "pt")[1]["a"], torch.Tensor)


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    folder = tmp_path / "boxes"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"path='{folder}' is a folder: give the name of a file"):
        files.replace_file(folder, b"")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("kind", "verb"), [(BOX, "box '{}' does not exist"), (SOCKS, "socks '{}' do not exist"), (ANY, "thing '{}' does")]
)
def test_a_missing_file(tmp_path: Path, kind: files.Kind, verb: str) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BoxError, match=f"{verb.format(path)}.*written by {kind.writer}"):
            files.read(path, kind)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = written(tmp_path / "box")
    data = path.read_bytes()
    for wrong in (b"", b"nothing of the kind", data[: len(data) // 2], data[:-1]):
        path.write_bytes(wrong)
        with pytest.raises(BoxError, match="box '.*' cannot be read .*pack it again"):
            files.read(path, BOX)
        assert files.format_of(path) is None


@pytest.mark.parametrize("form", ["lesa-box-2", "lesa-socks-1", None])
def test_a_file_of_another_kind(tmp_path: Path, form: str | None) -> None:
    path = written(tmp_path / "other", form)
    with pytest.raises(BoxError, match="holds no box: .*not a box of this library .*'lesa-box-1'.*by Box.save"):
        files.read(path, BOX)
    assert files.format_of(path) == form
    assert files.read(path, ANY)[0] == ({"format": form} if form else {})


def test_a_file_of_a_kind_that_serves_otherwise(tmp_path: Path) -> None:
    path = written(tmp_path / "other", "lesa-bag-7")
    with pytest.raises(BoxError, match=f"'{path}' holds a bag: open it"):
        files.read(path, BOX)


def test_another_file_with_tensors_that_numpy_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_file({"a": torch.zeros(2, dtype=torch.bfloat16)}, path, {"lesa": "[1, 2]"})
    with pytest.raises(BoxError, match="holds no box"):
        files.read(path, BOX)
    assert files.format_of(path) is None


@pytest.mark.parametrize("error", [KeyError("lid"), IndexError(7), TypeError("x"), RuntimeError("x"), StopIteration()])
def test_what_is_missing_inside(tmp_path: Path, error: Exception) -> None:
    def build(*_: object) -> None:
        raise error

    path = written(tmp_path / "box")
    with pytest.raises(
        BoxError, match="box '.*' is incomplete, or a value is out of place .*: pack it again"
    ) as caught:
        files.load(path, BOX, build)
    assert repr(error) in str(caught.value) and caught.value.__cause__ is error
    with pytest.raises(BoxError, match="thing '.*' is incomplete"):
        files.load(path, ANY, build)
    with pytest.raises(KeyboardInterrupt):
        files.load(path, BOX, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))


def test_what_is_out_of_place_inside_is_told_in_its_own_words(tmp_path: Path) -> None:
    def build(*_: object) -> None:
        raise BoxError("side=-1: expected at least 0")

    with pytest.raises(BoxError, match=r"out of place \(side=-1: expected at least 0\): pack it again"):
        files.load(written(tmp_path / "box"), BOX, build)
