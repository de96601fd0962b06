"""The house: who may import whom, how large rooms are, and what `import lesa` loads."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "lesa"
# What each folder or module beside the folders may import of lesa, and of what else diffusers and triton are.
BELOW = {
    "plans": set(),
    "forecasters": {"plans"},
    "metrics": set(),
    "kernels": set(),
    "ops": {"plans.rows", "kernels"},
    "planner": {"plans", "forecasters"},
    "runtime": {"plans", "planner", "forecasters", "ops"},
    "models": {"plans", "planner", "forecasters", "ops", "runtime"},
    "fitting": {"plans", "planner", "forecasters", "ops", "runtime", "models", "metrics"},
    "training": {"plans", "planner", "forecasters", "ops", "runtime", "models", "metrics"},
    "assets": set(),
    "api": {"plans", "planner", "ops", "runtime", "models", "fitting"},
    "evaluation": {
        *("plans", "planner", "forecasters", "ops", "runtime", "models", "fitting", "training", "metrics", "assets"),
        "api",
    },
}
FOREIGN = {
    "plans": {"numpy", "safetensors", "huggingface_hub"},
    "forecasters": {"numpy"},
    "planner": {"numpy"},
    "metrics": {"numpy", "skimage"},
    "kernels": {"torch", "triton", "numpy"},
    "ops": {"torch", "numpy", "triton"},  # only to ask whether it is there
    "runtime": {"numpy", "torch"},
}
# Three conveniences look upward, inside their functions, and say so.
UPWARD = {
    ("plans", "lesa.planner.build.adapt"),
    ("plans", "lesa.evaluation.plan_plots.plan_picture"),
    ("planner", "lesa.fitting.trials.gather_calls"),
    ("planner", "lesa.models.pipeline.calls_of"),
}


def rooms() -> Iterator[tuple[str, str, Path]]:
    """Folder or module beside the folders, module name and file of everything in lesa."""
    for path in sorted(HOUSE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        yield (parts[1] if len(parts) > 1 else ""), module, path


def imports(module: str, path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, also inside functions; not what only type checkers see."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    hidden = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)


def test_nothing_lower_imports_something_higher() -> None:
    for folder in BELOW:
        allowed = {f"lesa.{name}" for name in BELOW[folder] | {folder}}
        for own, module, path in rooms():
            if own != folder:
                continue
            for name in imports(module, path):
                if (folder, name) in UPWARD:
                    continue
                if name.split(".")[0] == "lesa":
                    assert any(f"{name}.".startswith(f"{one}.") for one in allowed), f"{module} imports {name}"
                elif folder in FOREIGN:
                    root = name.split(".")[0]
                    assert root in FOREIGN[folder] or root in sys.stdlib_module_names, f"{module} imports {name}"


def test_only_models_cli_and_assets_import_diffusers() -> None:
    for folder, module, path in rooms():
        if folder not in ("models", "cli", "assets"):
            assert not [n for n in imports(module, path) if n.split(".")[0] in ("diffusers", "transformers")], module


def test_no_circle() -> None:
    files = {module: path for _, module, path in rooms()}
    graph = {
        module: {m for n in imports(module, path) if (folder, n) not in UPWARD for m in _modules(n, files)} - {module}
        for folder, module, path in rooms()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for lower in graph.get(module, ()):
                visit(lower, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def _modules(name: str, files: dict[str, Path]) -> Iterator[str]:
    """The module that an imported name is, or is in."""
    for found in (name, name.rpartition(".")[0]):
        if found in files:
            yield found
            return


def test_rooms_stay_small() -> None:
    files = [path for _, _, path in rooms()]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    faces = {path for path in files if path.name in ("__init__.py", "__main__.py") and lines[path] < 15}
    by_folder: dict[Path, int] = {}
    for path in files:
        by_folder[path.parent] = by_folder.get(path.parent, 0) + (path not in faces)
    assert len(files) - len(faces) <= 50
    assert max(by_folder.values()) <= 9
    assert by_folder[HOUSE] - 2 <= 6  # __init__ and __main__ aside
    assert sum(lines.values()) <= 16_500  # 13,500 when the house moved; the rest is for what was built since


def test_each_folder_says_what_it_holds() -> None:
    for folder in [p.name for p in sorted(HOUSE.iterdir()) if (p / "__init__.py").exists()]:
        assert ast.get_docstring(ast.parse((HOUSE / folder / "__init__.py").read_text(encoding="utf-8")))


def loaded_after(statements: str) -> set[str]:
    script = f"import json, sys\n{statements}\nprint(json.dumps(sorted(sys.modules)))"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
    return {name.split(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    ("statements", "absent"),
    [
        ("import lesa", {"torch", "diffusers", "triton", "huggingface_hub", "matplotlib"}),
        ("import lesa; lesa.Plan, lesa.Statistics, lesa.forecasters, lesa.schedule", {"torch", "diffusers"}),
        ("import lesa; lesa.ops, lesa.metrics", {"diffusers", "huggingface_hub", "matplotlib"}),
    ],
)
def test_importing_loads_little(statements: str, absent: set[str]) -> None:
    assert not loaded_after(statements) & absent
