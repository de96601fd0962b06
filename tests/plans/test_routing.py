"""Who: noise level to stage."""

import subprocess
import sys

import numpy as np
import pytest

from lesa.plans.routing import ONE_STAGE, PAPER_STAGES, Stage, check_stages, paper_stages, stage_of


def test_paper_stages_are_the_papers():
    assert [(stage.name, stage.low, stage.window) for stage in PAPER_STAGES[:2]] == [
        ("high", 0.9, 4),
        ("middle", 0.5, 8),
    ]
    assert [stage.window for stage in PAPER_STAGES] == [4, 8, 8]
    assert [stage.window for stage in ONE_STAGE] == [8]


@pytest.mark.parametrize(
    ("sigma", "index"), [(1.0, 0), (0.901, 0), (0.9, 1), (0.7, 1), (0.501, 1), (0.5, 2), (0.1, 2), (0.0, 2)]
)
def test_bounds_belong_to_the_stage_below(sigma, index):
    assert stage_of(sigma, PAPER_STAGES) == index
    assert stage_of(sigma, ONE_STAGE) == 0


def test_cuts_can_be_moved():
    stages = paper_stages(0.8, 0.4)
    assert [stage_of(sigma, stages) for sigma in (0.85, 0.8, 0.45, 0.4)] == [0, 1, 1, 2]


def test_float32_levels_on_a_bound_stay_below_it():
    rounded = float(np.float32(0.4))
    assert rounded > 0.4
    assert stage_of(rounded, paper_stages(0.9, 0.4)) == 2


def test_last_stage_takes_every_other_level():
    assert stage_of(-0.1, PAPER_STAGES) == 2
    assert stage_of(0.01, (Stage("high", 0.5, 2), Stage("low", 0.3, 2))) == 1


@pytest.mark.parametrize("cuts", [(0.5, 0.9), (0.5, 0.5), (1.0, 0.5), (0.9, 0.0), (float("nan"), 0.5)])
def test_impossible_cuts_are_refused(cuts):
    with pytest.raises(ValueError, match="expected 0 < middle < high < 1"):
        paper_stages(*cuts)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="window=0"):
        Stage("high", 0.9, 0)
    with pytest.raises(ValueError, match="low=-inf"):
        Stage("low", float("-inf"), 8)
    with pytest.raises(ValueError, match="NaN"):
        stage_of(float("nan"), PAPER_STAGES)
    with pytest.raises(ValueError, match="stages is empty"):
        check_stages(())
    with pytest.raises(ValueError, match=r"\[0.5, 0.9\]: expected falling"):
        check_stages((Stage("a", 0.5, 4), Stage("b", 0.9, 4)))


@pytest.mark.parametrize("module", ["schedule", "routing"])
def test_file_imports_without_torch(module):
    script = (
        "import importlib.util, pathlib, sys; import_path = pathlib.Path(sys.argv[1])\n"
        "spec = importlib.util.spec_from_file_location('alone', import_path)\n"
        "alone = importlib.util.module_from_spec(spec); sys.modules['alone'] = alone\n"
        "spec.loader.exec_module(alone)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    path = sys.modules[f"lesa.{module}"].__file__
    subprocess.run([sys.executable, "-c", script, path], check=True)
