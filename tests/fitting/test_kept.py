"""Kept runs: a fit that was interrupted goes on where it was, bit for bit, and files that are no use are made again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipelines import flux_dev

import lesa
from lesa.fitting.kept import Kept, digest
from lesa.fitting.session import EFFORTS
from lesa.fitting.trials import Measured, Trials
from lesa.fitting.tuning import Session
from lesa.models.works import works_of
from lesa.plans.plan import Plan
from lesa.runtime.driver import LesaWarning

REQUEST = {"num_inference_steps": 8, "height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["a red apple", "snow", "a bird", "a dog"]
FIGURES = ("candidates", "fitting_psnr", "held_out_psnr", "fitting_ssim", "held_out_ssim", "schedule", "evaluations")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flux_dev()


@pytest.fixture(scope="module", autouse=True)
def efforts() -> Any:
    """Smaller than they are, so that few runs reach into every part of the search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "default", replace(EFFORTS["default"], generations=28, share=0.65))
        patch.setitem(EFFORTS, "thorough", replace(EFFORTS["thorough"], generations=36, share=0.75, experts=False))
        yield


@pytest.fixture
def runs(monkeypatch: Any) -> list[int]:
    """Counts runs of plans on all fitting requests; runs[1] of them may begin, then somebody interrupts."""
    counted, run = [0, 1000], Trials.run

    def counting(self: Trials, plan: Plan) -> Measured:
        if self.count == 3:  # the held-out one is no candidate
            if counted[0] == counted[1]:
                raise KeyboardInterrupt
            counted[0] += 1
        return run(self, plan)

    monkeypatch.setattr(Trials, "run", counting)
    return counted


@pytest.fixture(scope="module")
def trials(pipe: Any) -> Trials:
    """Those of `fit`."""
    works = works_of(pipe, PROMPTS[:3], None, REQUEST, None, 1, output_type="np")
    options: dict[str, Any] = {"sigmas": None, "guidance": None, "effort": "quick", "seed": 0, "folder": None}
    return Session(pipe, works, [], REQUEST, **options).trials


def fit(pipe: Any, folder: Path | None, **more: Any) -> Plan:
    return lesa.fit(pipe, PROMPTS, **{"budget": 4, "request": REQUEST, "folder": folder, "held_out": 1, **more})


@pytest.fixture(scope="module")
def whole(pipe: Any) -> Plan:
    """What comes without interruption, and without a folder."""
    return fit(pipe, None)


def same(one: Plan, other: Plan) -> None:
    for name in ("computed", "rows", "checks", "expected", "site", "forecaster", "sigmas"):
        assert getattr(one, name) == getattr(other, name), name
    for name in FIGURES:
        assert one.training[name] == other.training[name], name


@pytest.mark.parametrize("after", [1, 8])
def test_an_interrupted_fit_goes_on(pipe: Any, whole: Plan, runs: list[int], tmp_path: Path, after: int) -> None:
    total = whole.training["evaluations"]
    assert total > 9 and whole.training["found"] == 0 and whole.expected
    runs[1] = after
    with pytest.raises(KeyboardInterrupt):
        fit(pipe, tmp_path)
    assert len(list((tmp_path / "trials-4").glob("*"))) == after
    runs[:] = 0, 1000
    plan = fit(pipe, tmp_path)
    assert runs[0] == total - after and plan.training["found"] == after
    same(plan, whole)
    assert not list(tmp_path.rglob("*.partial"))


def test_interrupted_twice(pipe: Any, whole: Plan, runs: list[int], tmp_path: Path) -> None:
    for most in (3, 4):
        runs[:] = 0, most
        with pytest.raises(KeyboardInterrupt):
            fit(pipe, tmp_path)
        assert runs[0] == most
    runs[:] = 0, 1000
    plan = fit(pipe, tmp_path)
    assert runs[0] == whole.training["evaluations"] - 7 and plan.training["found"] == 7
    same(plan, whole)


def test_time_that_found_runs_took_counts(trials: Trials, whole: Plan, tmp_path: Path) -> None:
    first = Kept(trials, tmp_path)
    first.measure(whole), first.measure(whole)
    assert (first.found, first.seconds) == (0, 0.0), "its own are not found"
    second = Kept(trials, tmp_path)
    second.measure(whole), second.measure(whole)
    assert second.found == 1 and second.seconds > 0


def test_more_effort_finds_what_less_has_run(pipe: Any, whole: Plan, runs: list[int], tmp_path: Path) -> None:
    fit(pipe, tmp_path)
    runs[:] = 0, 1000
    plan = fit(pipe, tmp_path, effort="thorough")
    found, total = plan.training["found"], plan.training["evaluations"]
    assert found >= 1 and total > whole.training["evaluations"]
    assert total - found <= runs[0] <= total - found + 1, "the best once more, where its pictures were not judged"
    apart = fit(pipe, None, effort="thorough")
    same(plan, apart)


def test_another_recording_finds_nothing(trials: Trials, whole: Plan, tmp_path: Path) -> None:
    """Nor does it replace what others kept."""
    Kept(trials, tmp_path).measure(whole)
    other = Kept(replace(trials, references=trials.references[::-1]), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*")}
    other.measure(whole)
    after = {path: path.read_bytes() for path in tmp_path.glob("*")}
    assert other.found == 0 and len(after) == 2 and before.items() <= after.items()


def test_other_seeds_are_another_fit(pipe: Any, tmp_path: Path) -> None:
    """The prompts alone do not tell."""
    first = fit(pipe, tmp_path, seeds=[5, 6, 7, 8], effort="quick")
    with pytest.raises(ValueError, match="fitted to other requests .another seeds.: name another folder"):
        fit(pipe, tmp_path, seeds=[4, 6, 7, 8], effort="quick")
    assert first.rows != fit(pipe, tmp_path / "other", seeds=[4, 6, 7, 8], effort="quick").rows


def spoil(change: Callable[[bytes], bytes]) -> Callable[[list[Path]], None]:
    return lambda paths: paths[0].write_bytes(change(paths[0].read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil(lambda _: b""), "cannot be read"),
        (spoil(lambda _: b"nonsense" * 99), "cannot be read"),
        (spoil(lambda data: data[: len(data) // 2]), "cannot be read"),
        (spoil(lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]), "not those that were written"),
        (lambda paths: paths[0].write_bytes(paths[1].read_bytes()), "of another plan or recording"),
        (lambda paths: Plan((0,), (1.0, 0.0)).save(paths[0]), "holds no run"),
    ],
    ids=["empty", "nonsense", "half", "one bit", "another run", "a plan"],
)
def test_files_of_no_use_are_made_again(
    trials: Trials, whole: Plan, runs: list[int], tmp_path: Path, damage: Callable[[list[Path]], Any], message: str
) -> None:
    plans = [replace(whole, site="hidden", surrogate=None, expected={}), whole]
    written = [Kept(trials, tmp_path).measure(plan) for plan in plans]
    first, second = list(tmp_path.glob("*"))
    paths = [first, second] if digest(plans[0], trials.identity).startswith(first.stem) else [second, first]
    damage(paths)
    kept = Kept(trials, tmp_path)
    with pytest.warns(LesaWarning, match=message):
        again = kept.measure(plans[0])
    assert (runs[0], kept.found) == (3, 0)
    np.testing.assert_array_equal(again.outcome.along, written[0].outcome.along)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LesaWarning)
        for plan in plans:
            Kept(trials, tmp_path).measure(plan)
    assert runs[0] == 3, "it was replaced"


def test_a_fit_in_a_damaged_folder(pipe: Any, whole: Plan, runs: list[int], tmp_path: Path) -> None:
    runs[1] = 5
    with pytest.raises(KeyboardInterrupt):
        fit(pipe, tmp_path)
    for path in list((tmp_path / "trials-4").glob("*"))[:2]:
        path.write_bytes(b"nonsense")
    runs[:] = 0, 1000
    with pytest.warns(LesaWarning, match="the plan is run once more"):
        plan = fit(pipe, tmp_path)
    assert runs[0] == whole.training["evaluations"] - 3
    same(plan, whole)


def test_a_run_comes_back_as_it_was(trials: Trials, whole: Plan, tmp_path: Path) -> None:
    written = Kept(trials, tmp_path).measure(whole)
    kept = Kept(trials, tmp_path)
    read = kept.measure(whole)
    assert kept.found == 1 and written.final is not None and read.final is None
    assert all(path.stat().st_size < 4000 for path in tmp_path.glob("*")), "no pictures"
    for name in ("psnr", "error_gains"):
        np.testing.assert_array_equal(getattr(written, name), getattr(read, name))
    for name in ("basis", "along", "error"):
        np.testing.assert_array_equal(getattr(written.outcome, name), getattr(read.outcome, name))
    assert read.refused == ()
    kept.judge(whole, read, again=False)
    assert read.ssim is None
    kept.judge(whole, read)
    assert read.ssim is not None and read.ssim.shape == (3,)
    np.testing.assert_array_equal(Kept(trials, tmp_path).measure(whole).ssim, read.ssim)


def test_what_a_digest_is_of(whole: Plan) -> None:
    whole = replace(whole, surrogate=None, expected={})
    step = max(whole.rows["*"])
    row = whole.rows["*"][step]
    rows = {"*": {**whole.rows["*"], step: replace(row, weights=(row.weights[0] + 1e-15, *row.weights[1:]))}}
    moved = {"*": {**whole.rows["*"], step: replace(row, bias=1e-15)}}
    others = [
        replace(whole, rows=rows),
        replace(whole, rows=moved),
        replace(whole, site="hidden"),
        replace(whole, sigmas=(whole.sigmas[0] + 1e-9, *whole.sigmas[1:])),
    ]
    digests = {digest(whole), digest(whole, "another recording"), *map(digest, others)}
    assert len(digests) == 6
    assert digest(replace(whole, training={}, forecaster="x", checks={})) == digest(whole)
