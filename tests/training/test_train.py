"""From prompts to plans on tiny pipelines, and the plan against the predictor it was compiled from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CASES_BY_NAME, NEGATIVE, PROMPTS, Case
from torch import Tensor

import lesa
from lesa.models.layouts import config_hash
from lesa.models.pipeline import run
from lesa.plans.plan import Plan
from lesa.plans.rows import LesaWarning
from lesa.plans.schedule import ONE_STAGE, PAPER_STAGES, Stage, paper
from lesa.runtime.clock import Call, Request, sigmas_of
from lesa.runtime.driver import Forecast, Stats
from lesa.training import train as training
from lesa.training.predictor import Predictor
from lesa.training.recording import Recording, RecordingError, replay
from lesa.training.stages import TrainingConfig
from lesa.training.train import FinalError, calibrate, train, trained_plan

pytestmark = pytest.mark.filterwarnings("error::lesa.LesaWarning")

STEPS = 8
INTERVALS = (3, 5)
STAGES = (Stage("high", 0.6, 2), Stage("low", 0.0, 3))
PREDICTOR = {"stages": STAGES, "width": 8, "depth": 1, "alpha_init": 0.5}
CONFIG = TrainingConfig(lr=1e-3, checkpoint_every=1)
FLUX, QWEN, SDXL = (CASES_BY_NAME[name] for name in ("flux_dev", "qwen_image", "sdxl"))
ON_CASES = pytest.mark.parametrize(
    ("case", "site"),
    [(FLUX, "hidden"), (QWEN, "hidden"), (SDXL, "output")],
    ids=["flux-hidden", "qwen-hidden", "sdxl-output"],
)


def request_of(case: Case) -> dict[str, Any]:
    request = {**case.request, "num_inference_steps": STEPS, "height": 32, "width": 32}
    del request["output_type"]
    return {**request, "negative_prompt": None if case is FLUX else NEGATIVE}


def trained(case: Case, folder: Path, site: str = "hidden", **more: Any) -> tuple[Any, dict[int, Path]]:
    pipe = case.make()
    options: dict[str, Any] = {
        "intervals": INTERVALS,
        "config": CONFIG,
        "predictor": PREDICTOR,
        "calibration": 0,
        **more,
    }
    return pipe, train(pipe, PROMPTS[:2], folder, request=request_of(case), site=site, **options).plans


def contexts_of(case: Case) -> tuple[str, ...]:
    return case.contexts or ("default",)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Path]]:
    """A finished training, not to be changed."""
    folder = tmp_path_factory.mktemp("flux")
    return folder, trained(FLUX, folder)[1]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Path]]:
    """A finished training in two contexts, not to be changed."""
    folder = tmp_path_factory.mktemp("qwen")
    return folder, trained(QWEN, folder, intervals=(3,))[1]


class Live:
    """Forecasts with the predictors themselves, from everything the request did so far."""

    def __init__(self, predictors: Mapping[str, Predictor], computed: Sequence[int], sigmas: Sequence[float]) -> None:
        self.stats = Stats()
        self.predictors, self.computed, self.sigmas = predictors, computed, sigmas
        self.history: dict[str, list[Tensor]] = {}

    def begin(self, request: Request) -> None:
        self.history = {context: [] for context in self.predictors}

    def forecast(self, call: Call) -> Forecast | None:
        history = self.history[call.context]
        assert call.step == len(history)
        if call.step in self.computed:
            return None
        history.append(self.predictors[call.context](history, call.step, self.sigmas).detach())
        feature = history[-1]
        return Forecast(lambda: feature)

    def keep(self, call: Call, feature: Tensor | None) -> None:
        assert feature is not None
        self.history[call.context].append(feature.clone())

    def refuse(self, call: Call, reason: str) -> None:
        raise AssertionError(reason)

    def lose(self, reason: str) -> None:
        raise AssertionError(reason)

    def observe(self, call: Call, output: Tensor) -> None:
        pass


@ON_CASES
def test_from_prompts_to_plans_that_run(case: Case, site: str, tmp_path: Path) -> None:
    pipe, paths = trained(case, tmp_path, site)
    contexts, denoiser = contexts_of(case), case.denoiser(pipe)
    assert list(paths) == list(INTERVALS)
    full = run(pipe, ["a new prompt"], [7], request_of(case))[0]
    sigmas = sigmas_of(pipe.scheduler)
    for interval, path in paths.items():
        plan = Plan.load(path)
        assert plan.computed == paper(STEPS, interval)
        assert plan.sigmas == sigmas
        assert plan.timesteps is not None and len(plan.timesteps) == STEPS
        assert (plan.site, plan.forecaster, plan.stages) == (site, "lesa", STAGES)
        assert (plan.denoiser, plan.config_hash) == (type(denoiser).__name__, config_hash(denoiser))
        assert set(plan.rows) == (set(contexts) if len(contexts) > 1 else {"*"})

        lesa.enable(pipe, path)
        accelerated = run(pipe, ["a new prompt"], [7], request_of(case))[0]
        stats = lesa.stats(pipe)
        assert (stats.requests, stats.computed) == (1, plan.budget * len(contexts))
        assert stats.forecast == (STEPS - plan.budget) * len(contexts)
        assert not stats.refused
        lesa.disable(pipe)

        predictors = {c: Predictor.load(tmp_path / f"predictor-n{interval}-{c}.safetensors") for c in contexts}
        live = run(pipe, ["a new prompt"], [7], request_of(case), Live(predictors, plan.computed, sigmas), site)[0]
        scale = live.abs().max()
        assert (accelerated - live).abs().max() < 1e-4 * scale
        assert (accelerated - full).abs().max() > 1e-2 * scale


def test_contexts_learn_apart(qwen: tuple[Path, dict[int, Path]]) -> None:
    folder, paths = qwen
    plan = Plan.load(paths[3])
    forecast_steps = set(range(STEPS)) - set(plan.computed)
    assert {context: set(rows) for context, rows in plan.rows.items()} == dict.fromkeys(
        ("cond", "uncond"), forecast_steps
    )
    assert all(plan.rows["cond"][s].weights != plan.rows["uncond"][s].weights for s in forecast_steps)
    sigmas = Recording.open(folder / "recording").sigmas
    for context in ("cond", "uncond"):
        predictor = Predictor.load(folder / f"predictor-n3-{context}.safetensors")
        assert plan.rows[context] == predictor.to_plan(plan.computed, sigmas).rows["*"]


def test_what_is_kept_of_the_training(flux: tuple[Path, dict[int, Path]]) -> None:
    folder, paths = flux
    plan = Plan.load(paths[3])
    forecast_steps = sorted(set(range(STEPS)) - set(plan.computed))
    assert plan.training["prompts"] == 2
    assert plan.training["config"]["lr"] == CONFIG.lr
    assert [step for step, alpha in enumerate(plan.training["alphas"]["*"]) if alpha is not None] == forecast_steps
    losses = json.loads((folder / "losses.json").read_text())
    first = min(min(set(range(STEPS)) - set(paper(STEPS, n))) for n in INTERVALS)
    assert len(losses["guided"]["cond"]) == 2 * (STEPS - first)
    assert len(losses["closed loop, N = 3"]["cond"]) == 2 * 2 * len(forecast_steps)
    tail = losses["closed loop, N = 3"]["cond"][-max(1, len(forecast_steps) * 4 // 10) :]
    assert plan.training["final_loss"]["closed_loop"]["cond"] == pytest.approx(sum(tail) / len(tail))


def test_closed_loop_starts_from_the_guided_predictor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Tensor]] = []
    closed_loop, guided = training.closed_loop, training.guided

    def after_guided(predictors: Mapping[str, Predictor], *args: Any) -> Any:
        losses = guided(predictors, *args)
        started.append({name: t.clone() for name, t in predictors["cond"].state_dict().items()})
        return losses

    def before_closed(predictors: Mapping[str, Predictor], *args: Any) -> Any:
        started.append({name: t.clone() for name, t in predictors["cond"].state_dict().items()})
        return closed_loop(predictors, *args)

    monkeypatch.setattr(training, "guided", after_guided)
    monkeypatch.setattr(training, "closed_loop", before_closed)
    trained(FLUX, tmp_path)
    assert len(started) == 1 + len(INTERVALS)
    untrained = Predictor(STEPS, **PREDICTOR).state_dict()
    assert any(not torch.equal(started[0][name], tensor) for name, tensor in untrained.items())
    for other in started[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in started[0].items())


@pytest.mark.parametrize("killed_at", [9, 40], ids=["recording", "second closed loop"])
def test_a_killed_run_gives_the_same_plans(tmp_path: Path, flux: tuple[Path, dict[int, Path]], killed_at: int) -> None:
    """Two recorded requests are 16 denoiser calls, each closed loop is four requests of 8."""
    whole, expected = flux
    pipe, calls = FLUX.make(), [0]

    def kill(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == killed_at:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"intervals": INTERVALS, "config": CONFIG, "predictor": PREDICTOR, "calibration": 0}
    handle = pipe.transformer.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        train(pipe, PROMPTS[:2], tmp_path / "killed", request=request_of(FLUX), **options)
    handle.remove()
    actual = train(pipe, PROMPTS[:2], tmp_path / "killed", request=request_of(FLUX), **options).plans
    for interval in INTERVALS:
        assert actual[interval].read_bytes() == expected[interval].read_bytes()
    assert (tmp_path / "killed/losses.json").read_bytes() == (whole / "losses.json").read_bytes()
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.endswith(".partial")]


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    pipe, paths = trained(FLUX, tmp_path, calibration=2)
    before = {interval: path.read_bytes() for interval, path in paths.items()}
    calls: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    again = train(
        pipe,
        PROMPTS[:2],
        tmp_path,
        request=request_of(FLUX),
        intervals=INTERVALS,
        config=CONFIG,
        predictor=PREDICTOR,
        calibration=2,
    ).plans
    handle.remove()
    assert not calls
    assert {interval: path.read_bytes() for interval, path in again.items()} == before


def test_bad_arguments_are_refused_before_anything_happens(tmp_path: Path) -> None:
    pipe, folder = FLUX.make(), tmp_path / "new"
    for prompts, more, named in (
        ("red apple", {}, "prompts="),
        (["snow"], {"request": 7}, "request="),
        (["snow"], {"intervals": ()}, "intervals="),
        (["snow"], {"intervals": (3, 0)}, "intervals="),
        (["snow"], {"calibration": -1}, "calibration="),
    ):
        with pytest.raises(ValueError, match=named):
            train(pipe, prompts, folder, **{"request": request_of(FLUX), **more})
    assert not folder.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder"):
        train(pipe, ["snow"], tmp_path / "file", request=request_of(FLUX))


def test_calibration_brings_its_requests_closer_to_the_full_ones(tmp_path: Path) -> None:
    pipe, plain = trained(FLUX, tmp_path / "plain", intervals=(3,))
    _, calibrated = trained(FLUX, tmp_path / "calibrated", intervals=(3,), calibration=16)
    measure = FinalError(pipe, Recording.open(tmp_path / "plain" / "recording"), 2)
    before, after = Plan.load(plain[3]), Plan.load(calibrated[3])
    assert before.training["gains"] == [1.0, 1.0] != after.training["gains"]
    assert (before.training["calibration"], after.training["calibration"]) == (0, 2)  # as many as there are prompts
    assert measure(after) < measure(before)
    # Only the update of Eq. 7 is scaled: weights of the last feature's own copy stay.
    low = max(set(range(STEPS)) - set(after.computed))
    gain = after.training["gains"][1]
    for (old, new), read in zip(
        zip(before.rows["*"][low].weights, after.rows["*"][low].weights, strict=True),
        before.rows["*"][low].steps,
        strict=True,
    ):
        kept = float(read == low - 1)
        assert new - kept == pytest.approx(gain * (old - kept), rel=1e-9)


def test_final_error_of_the_full_request_is_nothing(tmp_path: Path) -> None:
    pipe, paths = trained(FLUX, tmp_path, intervals=(3,))
    recording = Recording.open(tmp_path / "recording")
    everything = dataclasses.replace(Plan.load(paths[3]), computed=tuple(range(STEPS)), rows={})
    assert FinalError(pipe, recording, 2)(everything) == pytest.approx(-200.0)
    assert FinalError(pipe, recording, 2, batch=2)(everything) == pytest.approx(-200.0)


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    trained(FLUX, tmp_path)
    with pytest.raises(ValueError, match="guided.safetensors.*another training"):
        trained(FLUX, tmp_path, predictor={**PREDICTOR, "alpha_init": 0.0})
    with pytest.raises(RecordingError, match="another site"):
        trained(FLUX, tmp_path, "output")


def test_training_brings_the_plan_closer_to_the_full_request(tmp_path: Path) -> None:
    """On the prompts it saw."""
    config = TrainingConfig(lr=3e-3, guided_epochs=5, closed_loop_epochs=5)
    pipe, paths = trained(FLUX, tmp_path, intervals=(3,), config=config)
    recording = Recording.open(tmp_path / "recording")
    full = run(pipe, PROMPTS[:2], [0, 1], request_of(FLUX))[0]

    def error(plan: Plan) -> float:
        lesa.enable(pipe, plan)
        result = run(pipe, PROMPTS[:2], [0, 1], request_of(FLUX))[0]
        lesa.disable(pipe)
        return float((result - full).norm() / full.norm())

    untrained = trained_plan({"cond": Predictor(STEPS, **PREDICTOR)}, recording, paper(STEPS, 3))
    assert error(Plan.load(paths[3])) < 0.8 * error(untrained)


def test_plan_of_one_context_serves_all_and_of_two_each_its_own() -> None:
    recording = Recording(
        Path(), (), (), {}, "output", ("a", "b"), tuple(1 - t / 8 for t in range(9)), tuple(range(8, 0, -1)), "Net", "x"
    )
    one, two = (Predictor(STEPS, **PREDICTOR, seed=seed) for seed in (0, 1))
    single = trained_plan({"a": one}, recording, (0, 1, 4))
    assert set(single.rows) == {"*"}
    both = trained_plan({"a": one, "b": two}, recording, (0, 1, 4))
    assert both.rows_of("a") == single.rows["*"] != both.rows_of("b")
    assert (both.site, both.denoiser, both.config_hash) == ("output", "Net", "x")
    assert both.timesteps == recording.timesteps


def test_replay_under_a_live_driver_has_the_recorded_start(flux: tuple[Path, dict[int, Path]]) -> None:
    folder, _ = flux
    recording = Recording.open(folder / "recording")
    driver = Live({"cond": Predictor.load(folder / "predictor-n3-cond.safetensors")}, (0, 1, 4, 7), recording.sigmas)
    replay(FLUX.make(), recording, [1], driver)
    truth = recording.features(1, "cond")
    assert torch.equal(driver.history["cond"][0], truth[0])
    assert torch.equal(driver.history["cond"][1], truth[1])
    assert not torch.equal(driver.history["cond"][7], truth[7])


def test_a_context_the_plan_does_not_know_is_computed(qwen: tuple[Path, dict[int, Path]]) -> None:
    plan = Plan.load(qwen[1][3])
    pipe = QWEN.make()
    lesa.enable(pipe, Plan(plan.computed, plan.sigmas, {"cond": plan.rows["cond"]}))
    with pytest.warns(LesaWarning, match="no row for context 'uncond'"):
        run(pipe, ["a new prompt"], [7], request_of(QWEN))
    assert lesa.stats(pipe).forecast == STEPS - plan.budget


def valley(*lowest: float) -> tuple[Callable[[tuple[float, ...]], float], list[tuple[float, ...]]]:
    """An error whose lowest point is known, and the gains it was asked for."""
    asked: list[tuple[float, ...]] = []

    def error(gains: tuple[float, ...]) -> float:
        asked.append(gains)
        return sum((gain - low) ** 2 for gain, low in zip(gains, lowest, strict=True))

    return error, asked


def test_calibrate_finds_the_lowest_point() -> None:
    for lowest in ((1.0, 1.0, 1.0), (1.0, 1.15, 0.7), (0.4, 1.6, 1.0)):
        assert calibrate(PAPER_STAGES, valley(*lowest)[0]) == pytest.approx(lowest)


def test_calibrate_is_never_worse_than_no_gains_and_asks_for_none_twice() -> None:
    error, asked = valley(0.62)
    gains = calibrate(ONE_STAGE, error)
    assert error(gains) <= error((1.0,))
    assert len(set(asked[:-2])) == len(asked[:-2])


def test_calibrate_stays_within_its_range() -> None:
    assert calibrate(ONE_STAGE, valley(9.0)[0]) == (1.9,)
    assert calibrate(ONE_STAGE, valley(-9.0)[0]) == (0.1,)


def test_calibrate_takes_nan_for_no_improvement() -> None:
    def error(gains: tuple[float, ...]) -> float:
        return 0.0 if gains == (1.0,) else float("nan")

    assert calibrate(ONE_STAGE, error) == (1.0,)
    with pytest.raises(ValueError, match="error of nan"):
        calibrate(ONE_STAGE, lambda _gains: float("nan"))


def test_calibrate_begins_at_low_noise() -> None:
    error, asked = valley(0.7, 1.0, 0.7)
    calibrate(PAPER_STAGES, error)
    assert asked[1] == (1.0, 1.0, 0.85)
