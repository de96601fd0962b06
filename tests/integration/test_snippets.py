"""Every snippet of README.md and docs/ runs, and every `lesa` command in them is one that the parser knows.

The bundled pipeline keeps two of its ten blocks, its pictures are small, and requests are short and few.
"""

import re
import shlex
from pathlib import Path

import pytest

from lesa import assets
from lesa.cli import main as cli

ROOT = Path(__file__).parents[2]
SMALL = {"num_inference_steps": 12, "height": 32, "width": 32}
PROMPTS = 2
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^( *)```(python|bash)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def snippets(page, language):
    """The blocks of one language, without the indentation of what they stand in, each with its first line's number."""
    text = page.read_text()
    for found in FENCED.finditer(text):
        if found[2] == language:
            body = re.sub(f"^{found[1]}", "", found[3], flags=re.MULTILINE)
            yield text[: found.start(3)].count("\n") + 1, body


def files(page):
    """The files of the repository that a page names, as `models/hooks.py` or with their whole path."""
    folders = "plans|planner|ops|kernels|runtime|models|fitting|training|evaluation|cli"
    for found in re.finditer(
        rf"(lesa/(?:\w+/)?|tests/(?:\w+/)*|benchmarks/(?:results/)?|{folders})/?(\w+\.(?:py|csv))", page.read_text()
    ):
        yield found[0] if found[1].startswith(("lesa/", "tests/", "benchmarks/")) else f"lesa/{found[0]}"


def commands(page):
    """The `lesa` commands of a page, without comments."""
    lines = (line for _, body in snippets(page, "bash") for line in body.replace("\\\n", " ").splitlines())
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "lesa"]


def named(pages):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.fixture
def short(monkeypatch, tmp_path):
    """A small pipeline, requests of few steps, few prompts, and a folder for what the snippets write."""
    few, load = assets.fitting_prompts()[:PROMPTS], assets.load

    def small():
        pipe = load()
        for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
            del blocks[1:]
        return pipe

    monkeypatch.setattr(assets, "load", small)
    for name, value in SMALL.items():
        monkeypatch.setitem(assets.REQUEST, name, value)
    monkeypatch.setattr(assets, "fitting_prompts", lambda: list(few))
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore::lesa.LesaWarning")  # of so few prompts and steps
@pytest.mark.parametrize("page", named(page for page in PAGES if any(snippets(page, "python"))))
def test_snippets_run(page, short):
    names = {"__name__": "__main__"}
    for line, body in snippets(page, "python"):
        # The blank lines make a traceback name the page's own line.
        exec(compile("\n" * (line - 1) + body, str(page), "exec"), names)


@pytest.mark.parametrize("page", named(page for page in PAGES if commands(page)))
def test_commands_are_understood(page):
    for words in commands(page):
        cli._parser().parse_args(words)


@pytest.mark.parametrize("page", named(page for page in PAGES if any(files(page))))
def test_files_that_pages_name_are_there(page):
    assert [name for name in files(page) if not (ROOT / name).is_file()] == []


def test_snippets_are_found():
    assert len([page for page in PAGES if any(snippets(page, "python"))]) >= 7
    assert len([command for page in PAGES for command in commands(page)]) >= 8
