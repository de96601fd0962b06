"""The paper's forecaster in a fit: trained by the paper's recipe on fitting requests alone, measured, and tidied up."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import CASES_BY_NAME, NEGATIVE, flux_dev

import lesa
from lesa import metrics
from lesa.fitting import trainer
from lesa.fitting.climbing import published
from lesa.fitting.kept import Kept
from lesa.fitting.session import EFFORTS, Session
from lesa.fitting.trainer import Trainer
from lesa.models.requests import run
from lesa.models.works import works_of
from lesa.plans.plan import Plan
from lesa.plans.schedule import paper
from lesa.runtime.runner import PlanRunner
from lesa.training import fitting
from lesa.training.predictor import Predictor
from lesa.training.recorded import RecordingError
from lesa.training.training import TrainingConfig

REQUEST = {"num_inference_steps": 8, "height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS, SEEDS = ["a red apple", "snow", "a bird"], [5, 3, 8]
FLOOR = (0, 1, 4, 7)
BOTH = ["published schedule, lesa", "searched schedule, lesa"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flux_dev()


@pytest.fixture(autouse=True)
def short(monkeypatch: Any, tmp_path: Path) -> Path:
    """No more runs than are promised; and the folder where temporary ones are made."""
    for name, effort in EFFORTS.items():
        monkeypatch.setitem(EFFORTS, name, replace(effort, generations=min(effort.generations, 4), prices=4))
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.fixture
def small(monkeypatch: Any) -> None:
    """Smaller experts than the paper's, which take less time."""
    monkeypatch.setattr(trainer, "Predictor", functools.partial(Predictor, width=8, depth=1))


@pytest.fixture
def made(monkeypatch: Any) -> list[Plan]:
    """The plans that were trained or found."""
    plans, plan = [], Trainer.plan

    def remembering(self: Trainer, computed: Sequence[int]) -> Plan:
        plans.append(plan(self, computed))
        return plans[-1]

    monkeypatch.setattr(Trainer, "plan", remembering)
    return plans


@pytest.fixture
def worked(monkeypatch: Any) -> list[str]:
    """Which parts of training ran."""
    parts: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **more: (parts.append(name), function(*args, **more))[1]

    for name in ("record", "guided", "closed_loop"):
        monkeypatch.setattr(trainer, name, counting(name, getattr(trainer, name)))
    return parts


def fit(pipe: Any, **more: Any) -> Plan:
    options = {"budget": 4, "request": REQUEST, "held_out": 1, "seeds": SEEDS, "candidates": ["lesa"], **more}
    return lesa.fit(pipe, PROMPTS, **options)


def scores(plan: Plan) -> dict[str, float]:
    return dict(map(tuple, plan.training["candidates"]))


def skipped(plan: Plan) -> dict[str, str]:
    return dict(map(tuple, plan.training.get("skipped", ())))


def cheap(monkeypatch: Any) -> None:
    """As if training took no time, so that it fits."""
    for name in ("price", "nominal"):
        monkeypatch.setattr(Trainer, name, lambda *_: 0.0)


def test_trained_by_the_recipe_on_fitting_requests_only(
    pipe: Any, made: list[Plan], monkeypatch: Any, tmp_path: Path
) -> None:
    """Bit for bit what `lesa.training.fitting.train` makes of the fitting prompts and their noise."""
    assert published(8, 4)[0] == paper(8, 3) == FLOOR
    best = fit(pipe, seed=4)
    assert [name for name in scores(best) if name.endswith("lesa")] == BOTH
    record = fitting.record

    def with_seeds(*args: Any, **more: Any) -> Any:
        return record(*args, seeds=SEEDS[:2], **more)

    monkeypatch.setattr(fitting, "record", with_seeds)
    options = {"intervals": [3], "config": TrainingConfig(seed=4), "calibration": 0}
    expected = Plan.load(fitting.train(pipe, PROMPTS[:2], tmp_path / "apart", request=REQUEST, **options)[3])
    first, second = made
    assert (first.computed, first.site, first.forecaster) == (FLOOR, "hidden", "lesa")
    assert first.rows == expected.rows and first.config_hash == expected.config_hash
    for name in ("alphas", "gains", "recording", "config", "final_loss"):
        assert first.training[name] == expected.training[name], name
    assert second.computed != FLOOR and second.rows.keys() == first.rows.keys()
    assert second.computed == best.computed, "the searched schedule"


@pytest.mark.usefixtures("small")
def test_measured_and_never_better_than_what_comes_back(pipe: Any, made: list[Plan]) -> None:
    best = fit(pipe)
    images = [
        run(pipe, [prompt], [seed], REQUEST, driver, made[0].site, output_type="np", return_dict=False)[0]
        for prompt, seed in list(zip(PROMPTS, SEEDS, strict=True))[:2]
        for driver in (PlanRunner(made[0]), None)
    ]
    psnr = np.mean([metrics.psnr(a, b)[0] for a, b in zip(images[::2], images[1::2], strict=True)])
    assert scores(best)[BOTH[0]] == pytest.approx(psnr, abs=0.05)
    assert best.training["fitting_psnr"] == max(scores(best).values()) >= max(scores(best)[name] for name in BOTH)


@pytest.mark.usefixtures("small")
def test_one_that_wins_is_returned(pipe: Any, made: list[Plan], monkeypatch: Any, tmp_path: Path) -> None:
    measure = Kept.measure

    def flattering(self: Kept, plan: Plan) -> Any:
        measured = measure(self, plan)
        return (
            replace(measured, psnr=measured.psnr + 50) if plan.computed == FLOOR and plan.site == "hidden" else measured
        )

    monkeypatch.setattr(Kept, "measure", flattering)
    best = fit(pipe, folder=tmp_path / "fit")
    assert best.training["schedule"] == BOTH[0] and best.rows == made[0].rows and best.site == "hidden"
    assert best.training["final_loss"] == made[0].training["final_loss"] and best.training["held_out_psnr"] > 0
    assert fit(pipe, folder=tmp_path / "fit").rows == best.rows, "found"
    assert len(made) == 2


@pytest.mark.parametrize("name", ["qwen_image", "sdxl"])
@pytest.mark.usefixtures("small")
def test_contexts_stages_and_site(made: list[Plan], name: str) -> None:
    case = CASES_BY_NAME[name]
    request = {k: v for k, v in case.request.items() if k != "output_type"}
    request |= {"num_inference_steps": 8, "height": 32, "width": 32, "negative_prompt": NEGATIVE}
    best = fit(case.make(), request=request)
    assert set(BOTH) <= scores(best).keys()
    qwen = name == "qwen_image"
    assert {plan.site for plan in made} == {"hidden" if qwen else "output"}
    assert [stage.low for stage in made[0].stages] == [0.9, 0.4 if qwen else 0.5, 0.0]
    if qwen:
        assert {"cond", "uncond"} <= made[0].rows.keys() and made[0].rows["cond"] != made[0].rows["uncond"]


@pytest.mark.usefixtures("small")
def test_one_seed_one_fit(pipe: Any, made: list[Plan]) -> None:
    first, second, other = (fit(pipe, seed=seed) for seed in (1, 1, 2))
    assert (first.rows, first.training["candidates"]) == (second.rows, second.training["candidates"])
    assert made[0].rows == made[2].rows != made[4].rows
    assert scores(first)[BOTH[0]] != scores(other)[BOTH[0]]


@pytest.mark.usefixtures("small")
def test_no_recording_is_left(pipe: Any, short: Path, monkeypatch: Any) -> None:
    there: list[int] = []
    loop = trainer.closed_loop

    def looking(*args: Any) -> Any:
        there.append(len(list(short.rglob("recording/*.safetensors"))))
        if len(there) == 2:
            raise KeyboardInterrupt
        return loop(*args)

    monkeypatch.setattr(trainer, "closed_loop", looking)
    with pytest.raises(KeyboardInterrupt):
        fit(pipe)
    assert there == [2, 2] and not list(short.iterdir())
    fit(pipe)
    assert there == [2] * 4 and not list(short.iterdir())


@pytest.mark.usefixtures("small")
def test_a_folder_goes_on_and_keeps_plans_only(
    pipe: Any, worked: list[str], made: list[Plan], monkeypatch: Any, tmp_path: Path, short: Path
) -> None:
    folder, whole = tmp_path / "fit", fit(pipe)
    assert worked == ["record", "guided", "closed_loop", "guided", "closed_loop"], "forecasts begin at steps 2 and 1"
    runs, replay = [0], trainer.replay

    def interrupted(*args: Any) -> Any:
        runs[0] += 1
        if runs[0] == 6:  # the second schedule's second request
            raise KeyboardInterrupt
        return replay(*args)

    monkeypatch.setattr(trainer, "replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(pipe, folder=folder)
    assert len(list(folder.glob("training/*/recording/0*.safetensors"))) == 2
    [times] = folder.glob("training/*/times.json")
    spent = sum(json.loads(times.read_bytes()).values())
    assert spent > 0
    again = fit(pipe, folder=folder)
    assert (again.rows, again.training["candidates"]) == (whole.rows, whole.training["candidates"])
    assert made[-1].rows == made[1].rows and made[-2].rows == made[0].rows
    assert again.training["seconds"] > spent
    assert not list(short.iterdir()), "nothing temporary"
    left = {path.name for path in folder.glob("training/*/*")}
    assert left - {"times.json"} == {path.name for path in folder.glob("training/*/lesa-*.safetensors")}
    assert len(left) == 3 and not list(tmp_path.rglob("*.partial"))

    (folder / "plan-4.safetensors").unlink()
    told = json.loads(times.read_bytes())
    assert sorted(name.split("-")[0] for name in told) == ["closed", "closed", "guided", "guided", "recording"]
    times.write_text(json.dumps({**told, "recording": 1000.0}))
    worked.clear()
    third = fit(pipe, folder=folder)
    assert not worked and third.training["found"] == third.training["evaluations"] == 4
    assert third.rows == whole.rows
    assert 1000 < third.training["seconds"] < 1900, "what training once took counts, and once"


@pytest.mark.usefixtures("small")
def test_a_damaged_folder_is_mended(pipe: Any, made: list[Plan], worked: list[str], tmp_path: Path) -> None:
    fit(pipe, folder=tmp_path / "fit")
    (tmp_path / "fit" / "plan-4.safetensors").unlink()
    for path in tmp_path.glob("fit/training/*/*"):
        path.write_bytes(b"nonsense")
    worked.clear()
    fit(pipe, folder=tmp_path / "fit")
    assert worked.count("closed_loop") == 2 and made[2].rows == made[0].rows


@pytest.mark.usefixtures("small")
def test_budgets_share_a_recording(pipe: Any, worked: list[str]) -> None:
    plans = fit(pipe, budget=[3, 4, 8])
    assert worked.count("record") == worked.count("closed_loop") - 3 == 1
    assert all(set(BOTH) <= scores(plans[budget]).keys() for budget in (3, 4))
    assert set(skipped(plans[8]).values()) == {"every step is computed: there is nothing to train for"}


@pytest.mark.usefixtures("small")
def test_thorough_trains_for_the_published_schedule(pipe: Any, made: list[Plan], monkeypatch: Any) -> None:
    cheap(monkeypatch)
    best = fit(pipe, effort="thorough", candidates=None)
    assert [plan.computed for plan in made] == [FLOOR]
    assert BOTH[0] in scores(best) and BOTH[1] not in scores(best) | skipped(best)


@pytest.mark.usefixtures("small")
def test_thorough_asked_trains_for_both(pipe: Any, made: list[Plan], monkeypatch: Any) -> None:
    monkeypatch.setattr(Trainer, "price", lambda *_: 1e9)
    best = fit(pipe, effort="thorough")
    assert set(BOTH) <= scores(best).keys() and len(made) == 2


@pytest.mark.usefixtures("small")
def test_thorough_says_why_it_trained_nothing(pipe: Any, worked: list[str], short: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(EFFORTS, "thorough", replace(EFFORTS["thorough"], generations=9))
    monkeypatch.setattr(Trainer, "price", lambda *_: 3.5)
    reason = skipped(fit(pipe, effort="thorough", candidates=None))[BOTH[0]]
    assert reason.startswith("training would take the time of about 4 full requests, more than the 3 that this effort")
    assert "candidates=['lesa'] trains it all the same" in reason
    assert not worked and not list(short.iterdir())

    def request() -> Any:
        return pipe(["a"], generator=[torch.Generator().manual_seed(0)], output_type="np", **REQUEST).images

    best = lesa.fit(pipe, requests=[request], budget=4, effort="thorough", held_out=0)
    assert skipped(best)[BOTH[0]].startswith("training needs prompts for a pipeline")


def test_thorough_says_why_its_training_failed(pipe: Any, monkeypatch: Any, short: Path) -> None:
    cheap(monkeypatch)

    def failing(*_: Any, **__: Any) -> Any:
        raise RecordingError("the disk is full")

    monkeypatch.setattr(trainer, "guided", failing)
    best = fit(pipe, effort="thorough", candidates=None)
    assert skipped(best)[BOTH[0]] == "its training failed: the disk is full" and not list(short.iterdir())
    with pytest.raises(RecordingError, match="the disk is full"):
        fit(pipe)
    assert not list(short.iterdir())


def test_default_and_quick_train_nothing(pipe: Any, worked: list[str], monkeypatch: Any) -> None:
    cheap(monkeypatch)
    for effort in ("quick", "default"):
        best = fit(pipe, effort=effort, candidates=None)
        assert "skipped" not in best.training
    assert not worked


@pytest.mark.usefixtures("small")
def test_the_price(pipe: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """2 prompts, 8 steps: a recording, a guided pass of 8 steps, two closed-loop ones of 4 computed and 4 learned."""
    works = works_of(pipe, PROMPTS[:2], None, REQUEST, SEEDS[:2], 1, output_type="np")
    options: dict[str, Any] = {"sigmas": None, "guidance": None, "effort": "quick", "seed": 0, "folder": None}
    trials = Session(pipe, works, [], REQUEST, **options).trials
    monkeypatch.setattr(trials, "seconds", 4.0)  # 2 a request
    one = Trainer(pipe, PROMPTS[:2], SEEDS[:2], REQUEST, "x", folder=tmp_path)
    assert one._seconds_a_step(trials) > 0
    for seconds, expected in ((0.5, 2 + 2 + 2 * (8 + 8) * 0.25), (1e-9, 8.0)):
        monkeypatch.setattr(Trainer, "_seconds_a_step", lambda *_, seconds=seconds: seconds)
        assert Trainer(pipe, PROMPTS[:2], SEEDS[:2], REQUEST, "x").price(trials, 4) == pytest.approx(expected)
    assert one.nominal(trials) == 8.0
    before = one.price(trials, 4)
    monkeypatch.setattr(Trainer, "_seconds_a_step", lambda *_: pytest.fail("timed again"))
    assert Trainer(pipe, PROMPTS[:2], SEEDS[:2], REQUEST, "x", folder=tmp_path).price(trials, 4) == before


@pytest.mark.parametrize("more", [{"requests": [lambda: None]}, {"prompts": None}])
def test_what_cannot_be_trained_is_said_at_once(pipe: Any, more: dict[str, Any]) -> None:
    target = pipe if "requests" in more else pipe.transformer
    message = "candidates names 'lesa', which is trained on prompts of a pipeline, .* candidates=.plan."
    with pytest.raises(ValueError, match=message):
        lesa.fit(target, budget=4, candidates=["lesa"], **more)
