"""The arrows that must not be: who may import whom, read from the source and checked in fresh processes."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "lesa").rglob("*.py"))
}
MATHEMATICS = {
    *("plan", "schedule", "routing", "forecasters", "experts", "predictor", "learning", "training", "reference"),
    *("search", "statistics", "interpolation", "surrogate", "segments", "tables", "transfer", "files", "planfile"),
    "expectations",
}
RUNTIME = {
    *("clock", "inputs", "driver", "runner", "history", "stats", "adapting", "response"),
    *("guard", "vigil", "mailbox", "retrace", "likeness"),
}
MAY_IMPORT_DIFFUSERS = {"hooks", "roothook", "denoisers", "recording", "commands", "demo", "assets"}
FOREIGN = {"diffusers", "transformers", "triton", "lesa.kernels"}


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Absolute names of everything a source imports, inside functions and by `import_module("name")` too."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value)


def imported_by(module: str) -> set[str]:
    path = MODULES[module]
    return set(imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"))


def offending(names: set[str], forbidden: set[str]) -> set[str]:
    return {name for name in names for root in forbidden if name == root or name.startswith(root + ".")}


def existing(names: set[str]) -> list[str]:
    return [module for module in MODULES if module.count(".") and module.split(".")[1] in names]


def others(names: set[str]) -> list[str]:
    return [module for module in MODULES if module not in existing(names)]


@pytest.mark.parametrize(
    "source",
    [
        "import triton.language as tl",
        "def f():\n    import triton",
        "from triton import jit",
        "if TYPE_CHECKING:\n    from diffusers import DiffusionPipeline",
        "from .kernels.forecast import launch",
        "from . import kernels",
        "from .. import kernels",
        "from lesa import kernels",
        "import importlib\nimportlib.import_module('diffusers.hooks')",
    ],
)
def test_the_reader_sees_every_way_to_import(source):
    assert offending(set(imports(source, "lesa.sub.room" if ".." in source else "lesa.room")), FOREIGN)


def test_the_reader_is_not_misled():
    source = "import tritonic\nfrom .plan import kernels_of\nfrom . import kernelshop\nname = 'diffusers'\n"
    assert not offending(set(imports(source, "lesa.room")), FOREIGN)


def test_the_rooms_are_where_they_are_looked_for():
    assert {"plan", "schedule", "routing", "forecasters", "predictor", "training", "reference"} <= {
        module.split(".")[1] for module in existing(MATHEMATICS)
    }


@pytest.mark.parametrize("module", existing(MATHEMATICS | RUNTIME | {"history"}))
def test_mathematics_and_runtime_know_no_diffusers_and_no_kernels(module):
    assert not offending(imported_by(module), FOREIGN)


@pytest.mark.parametrize("module", existing(MATHEMATICS))
def test_mathematics_knows_no_integration(module):
    integration = (
        *("hooks", "roothook", "denoisers", "recorded", "recording", "gathering", "gatherer", "requests"),
        *("api", "cli", "commands", "demo"),
        *("report", "planview", "trials", "refining", "tuning", "frontier"),
        *("session", "kept", "candidates", "climbing", "watch", "works", "trainer", "promises", "finishing"),
    )
    rooms = {f"lesa.{room}" for room in integration}
    assert not offending(imported_by(module), rooms)


@pytest.mark.parametrize("module", ["lesa.plans.schedule", "lesa.plans.routing"])
def test_schedule_and_routing_need_no_torch(module):
    assert not offending(imported_by(module), {"torch", "numpy"})


def test_search_needs_numpy_only():
    roots = {name if name.startswith("lesa") else name.split(".")[0] for name in imported_by("lesa.planner.search")}
    assert roots - set(sys.stdlib_module_names) == {"numpy", "lesa.plans.schedule.check"}


@pytest.mark.parametrize("module", ["lesa.forecasters", "lesa.forecasters.closed", "lesa.forecasters.learned"])
def test_forecasters_need_no_torch(module):
    roots = {name.split(".")[0] for name in imported_by(module)} - set(sys.stdlib_module_names)
    assert roots <= {"numpy", "lesa"}


@pytest.mark.parametrize("module", ["lesa.planner.statistics", "lesa.planner.interpolation"])
def test_statistics_need_no_torch(module):
    names = imported_by(module)
    roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert roots <= {"numpy", "safetensors", "lesa"}
    assert {".".join(name.split(".")[:2]) for name in names if name.startswith("lesa.")} <= {
        "lesa.plans.plan",
        "lesa.planner.interpolation",
        "lesa.plans.files",
    }


def test_reference_needs_torch_only():
    roots = {name.split(".")[0] for name in imported_by("lesa.ops.reference")}
    assert roots - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("module", others(MAY_IMPORT_DIFFUSERS))
def test_only_the_rooms_of_integration_import_diffusers(module):
    assert not offending(imported_by(module), {"diffusers", "transformers"})


@pytest.mark.parametrize("module", others({"ops", "kernels"}))
def test_only_ops_reaches_the_kernels(module):
    assert not offending(imported_by(module), {"triton", "lesa.kernels"})


@pytest.mark.parametrize("module", MODULES)
def test_the_library_imports_no_tests_benchmarks_or_examples(module):
    assert not offending(imported_by(module), {"tests", "benchmarks", "examples", "pytest"})


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
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_lesa_loads_no_diffusers_and_no_triton():
    light = ["lesa", *existing(MATHEMATICS | RUNTIME | {"history"})]
    # torch itself may load triton
    loaded = loaded_after(f"import {', '.join(light)}") - loaded_after("import torch")
    assert "lesa.training.training" in loaded
    assert not offending(
        loaded, {*FOREIGN, "huggingface_hub", "matplotlib", "skimage", "lesa.models.hooks", "lesa.evaluation.report"}
    )
