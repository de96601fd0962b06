"""Training: both stages against a plain loop written out here, and runs that are killed or mixed up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lesa.plans.schedule import Stage, paper
from lesa.runtime.clock import Call, Request
from lesa.training.predictor import Predictor
from lesa.training.stages import ClosedLoop, Learner, Losses, TrainingConfig, closed_loop, guided

STEPS = 10
SIGMAS = tuple(1 - t / STEPS for t in range(STEPS)) + (0.0,)
STAGES = (Stage("high", 0.55, 2), Stage("low", 0.0, 3))
COMPUTED = (0, 1, 4, 7)
FAST = TrainingConfig(lr=1e-2)


@dataclass(frozen=True)
class Trajectories:
    """A recording in memory: smooth curves over the step, each prompt and context with its own."""

    prompts: tuple[str, ...] = ("a", "b", "c", "d")
    contexts: tuple[str, ...] = ("cond",)
    sigmas: tuple[float, ...] = SIGMAS
    size: float = 1.0
    width: int = 1

    def features(self, index: int, context: str) -> Tensor:
        """[T, width, 3, 4]."""
        generator = torch.Generator().manual_seed(100 * index + self.contexts.index(context))
        level, slope, bend = (torch.randn(self.width, 3, 4, generator=generator) for _ in range(3))
        times = torch.linspace(0, 1, len(self.sigmas) - 1).view(-1, 1, 1, 1)
        return self.size * (level + slope * times + 2 * bend * times**2)


def predictor(**changes: Any) -> Predictor:
    steps = changes.pop("steps", STEPS)
    return Predictor(steps, **{"stages": STAGES, "width": 4, "depth": 1, "alpha_init": 0.3, **changes})


def predictors(recording: Trajectories, **changes: Any) -> dict[str, Predictor]:
    return {context: predictor(seed=i, **changes) for i, context in enumerate(recording.contexts)}


def parameters(by_context: Mapping[str, Predictor]) -> dict[str, Tensor]:
    return {f"{c}.{n}": t.clone() for c, p in by_context.items() for n, t in p.state_dict().items()}


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def order(config: TrainingConfig, epoch: int, count: int) -> list[list[int]]:
    """The batches of an epoch: every prompt once, in an order that the seed decides."""
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed + epoch)).tolist()
    return [shuffled[i : i + config.batch] for i in range(0, count, config.batch)]


class PlainLoop:
    """The paper's recipe written out: AdamW, L1, gradient norm at most 1, learning rate halved every so many steps."""

    def __init__(self, model: Predictor, config: TrainingConfig) -> None:
        self.model, self.config = model, config
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.losses: list[float] = []

    def step(self, history: Sequence[Tensor], step: int, target: Tensor) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.config.lr_decay ** (len(self.losses) // self.config.lr_step)
        self.optimizer.zero_grad()
        forecast = self.model(list(history), step, SIGMAS)
        loss = (forecast - target).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], self.config.clip)
        self.optimizer.step()
        self.losses.append(loss.item())
        return forecast.detach()


# First stage


@pytest.mark.parametrize(
    "config",
    [
        TrainingConfig(lr=1e-2, lr_step=7, lr_decay=0.25, guided_epochs=3, seed=4),
        TrainingConfig(lr=1e-2, clip=1e-3, weight_decay=0.5),
        TrainingConfig(lr=1e-2, batch=3, guided_epochs=2),
    ],
    ids=["decay", "clip", "batch"],
)
def test_guided_is_the_recipe(config: TrainingConfig) -> None:
    recording = Trajectories(contexts=("cond", "uncond"))
    trained, first = predictors(recording), 2
    losses = guided(trained, recording, first, config)
    for context, start in predictors(recording).items():
        plain = PlainLoop(start, config)
        for epoch in range(config.guided_epochs):
            for batch in order(config, epoch, 4):
                features = torch.cat([recording.features(i, context) for i in batch], 1)
                for step in range(first, STEPS):
                    plain.step(features[:step], step, features[step])
        assert losses[context] == pytest.approx(plain.losses, rel=1e-5)
        for name, tensor in start.state_dict().items():
            torch.testing.assert_close(trained[context].state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
        before = predictors(recording)[context].state_dict()
        assert max(float((tensor - before[name]).abs().max()) for name, tensor in start.state_dict().items()) > 0.01


def test_guided_loss_falls() -> None:
    recording = Trajectories()
    config = TrainingConfig(lr=1e-2, guided_epochs=15)
    losses = guided(predictors(recording, alpha_init=0.0), recording, 2, config)["cond"]
    an_epoch = 4 * (STEPS - 2)
    assert sum(losses[-an_epoch:]) < 0.4 * sum(losses[:an_epoch])


def test_number_of_optimiser_steps_of_the_paper() -> None:
    """50 steps at N = 7: one for each of the 46 steps that can be forecast, every prompt once."""
    recording = Trajectories(tuple(map(str, range(5))), sigmas=tuple(1 - t / 50 for t in range(51)))
    first = min(set(range(50)) - set(paper(50, 7)))
    losses = guided({"cond": predictor(steps=50)}, recording, first)
    assert first == 4
    assert len(losses["cond"]) == 5 * 46


def learn(learner: Learner, features: Tensor, step: int) -> Tensor:
    for earlier in range(step):
        learner.remember(earlier, features[earlier])
    return learner.learn(step, features[step])


def test_recipe_of_the_paper() -> None:
    config = TrainingConfig()
    assert (config.lr, config.weight_decay, config.lr_step, config.lr_decay, config.clip) == (1e-4, 1e-4, 500, 0.5, 1.0)
    assert (config.guided_epochs, config.closed_loop_epochs, config.batch) == (1, 2, 1)
    optimizer = Learner(predictor(), SIGMAS, config).optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 1e-4)


def test_learning_rate_halves_at_lr_step() -> None:
    learner = Learner(predictor(), SIGMAS, TrainingConfig(lr=0.5, lr_step=3))
    features = Trajectories().features(0, "cond")
    rates = []
    for _ in range(8):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        learn(learner, features, 5)
    assert rates == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]


def test_gradient_is_clipped_to_its_norm() -> None:
    def norm_after_learning(clip: float, size: float) -> float:
        learner = Learner(predictor(), SIGMAS, TrainingConfig(clip=clip))
        features = Trajectories(size=size).features(0, "cond")
        learn(learner, features, 5)
        grads = [p.grad for p in learner.predictor.parameters() if p.grad is not None]
        return float(torch.cat([grad.flatten() for grad in grads]).norm())

    free = norm_after_learning(1e9, 1e4)
    assert free > 100
    assert norm_after_learning(1.0, 1e4) == pytest.approx(1.0, rel=1e-4)
    assert norm_after_learning(2.5, 1e4) == pytest.approx(2.5, rel=1e-4)
    assert norm_after_learning(1.0, 1e-6) == pytest.approx(norm_after_learning(1e9, 1e-6), rel=1e-6)


def test_only_the_expert_of_the_step_learns() -> None:
    learner = Learner(predictor(), SIGMAS, TrainingConfig(lr=0.1))
    before = parameters({"": learner.predictor})
    features = Trajectories().features(0, "cond")
    learn(learner, features, 3)  # sigma 0.7: the first stage
    after = parameters({"": learner.predictor})
    changed = {name.split(".")[2] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"0"}


def test_learn_returns_the_forecast_made_before() -> None:
    start = predictor()
    features = Trajectories().features(0, "cond")
    expected = predictor()(features[:5], 5, SIGMAS)
    with torch.no_grad():  # as in a pipeline
        actual = learn(Learner(start, SIGMAS, FAST), features, 5)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-6, atol=1e-6)
    assert not actual.requires_grad


def test_features_in_half_precision_are_learned_in_float32() -> None:
    class Half(Trajectories):
        def features(self, index: int, context: str) -> Tensor:
            return super().features(index, context).bfloat16()

    trained = predictors(Half())
    losses = guided(trained, Half(), 2, FAST)
    assert all(parameter.dtype == torch.float32 for parameter in trained["cond"].parameters())
    assert losses["cond"] == pytest.approx(guided(predictors(Trajectories()), Trajectories(), 2, FAST)["cond"], abs=0.1)


# Second stage


class Sampler:
    """A stand-in for the accelerated sampler: its computed features drift with the forecasts it was given."""

    def __init__(self, recording: Trajectories) -> None:
        self.recording = recording
        self.events: list[tuple[str, int, str, Tensor]] = []
        self.indices: list[list[int]] = []

    def __call__(self, indices: Sequence[int], driver: ClosedLoop) -> None:
        self.indices.append(list(indices))
        request = Request(STEPS, SIGMAS)
        driver.begin(request)
        drift = {context: torch.zeros(()) for context in self.recording.contexts}
        for step in range(STEPS):
            for context in self.recording.contexts:
                call = Call(context, step, SIGMAS[step], torch.zeros(1), request, step == 0)
                truth = torch.cat([self.recording.features(i, context)[step] for i in indices])
                coming = driver.forecast(call)
                forecast = None if coming is None else coming.feature()
                if forecast is None:
                    feature = truth + drift[context]
                    driver.keep(call, feature)
                    self.events.append((context, step, "computed", feature.clone()))
                else:
                    drift[context] = drift[context] + 0.1 * (forecast - truth)
                    self.events.append((context, step, "forecast", forecast.clone()))


def test_closed_loop_learns_from_what_the_sampler_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """The history holds forecasts and computed features of this very request; the target is the recorded feature."""
    recording = Trajectories(contexts=("cond", "uncond"))
    sampler = Sampler(recording)
    learned: list[tuple[str, int, list[Tensor], Tensor]] = []
    remembered: dict[str, dict[int, Tensor]] = {"cond": {}, "uncond": {}}
    trained = predictors(recording)
    names = {id(model): context for context, model in trained.items()}
    learn, remember = Learner.learn, Learner.remember

    def spy(self: Learner, step: int, target: Tensor) -> Tensor:
        context = names[id(self.predictor)]
        window = [remembered[context][t] for t in range(max(0, step - 3), step)]
        learned.append((context, step, window, target.clone()))
        return learn(self, step, target)

    def spy_on_memory(self: Learner, step: int, feature: Tensor) -> None:
        remembered[names[id(self.predictor)]][step] = feature.clone()
        remember(self, step, feature)

    monkeypatch.setattr(Learner, "learn", spy)
    monkeypatch.setattr(Learner, "remember", spy_on_memory)
    losses = closed_loop(trained, recording, COMPUTED, sampler, FAST)

    forecast_steps = [step for step in range(STEPS) if step not in COMPUTED]
    assert sampler.indices == order(FAST, 0, 4) + order(FAST, 1, 4)
    assert [(c, s) for c, s, _, _ in learned] == [(c, s) for c, s, kind, _ in sampler.events if kind == "forecast"]
    assert len(learned) == 8 * 2 * len(forecast_steps)
    position = 0
    for run in range(8):
        events = sampler.events[run * 2 * STEPS : (run + 1) * 2 * STEPS]
        [index] = sampler.indices[run]
        done: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
        for context, step, kind, feature in events:
            if kind == "forecast":
                where, at, history, target = learned[position]
                position += 1
                assert (where, at) == (context, step)
                assert torch.equal(target, recording.features(index, context)[step])
                expected = done[context][-3:]
                assert len(history) == len(expected)
                assert all(torch.equal(a, b) for a, b in zip(history, expected, strict=True))
            done[context].append(feature)
        truth = torch.cat([recording.features(index, "cond")[s] for s in range(STEPS)])
        assert (torch.cat(done["cond"]) - truth).abs().max() > 1e-3  # the spy told forecasts and truth apart
    assert {context: len(values) for context, values in losses.items()} == {"cond": 48, "uncond": 48}


@pytest.mark.parametrize("config", [FAST, replace(FAST, batch=2, lr_step=5, closed_loop_epochs=3)])
def test_closed_loop_is_the_recipe(config: TrainingConfig) -> None:
    recording = Trajectories()
    trained = predictors(recording)
    losses = closed_loop(trained, recording, COMPUTED, Sampler(recording), config)
    plain = PlainLoop(predictor(), config)
    for epoch in range(config.closed_loop_epochs):
        for batch in order(config, epoch, 4):
            features = torch.cat([recording.features(i, "cond") for i in batch], 1)
            history: list[Tensor] = []
            drift = torch.zeros(())
            for step in range(STEPS):
                if step in COMPUTED:
                    history.append(features[step] + drift)
                    continue
                history.append(plain.step(history, step, features[step]))
                drift = drift + 0.1 * (history[-1] - features[step])
    assert losses["cond"] == pytest.approx(plain.losses, rel=1e-4)
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(trained["cond"].state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_closed_loop_forecasts_in_the_dtype_of_the_features() -> None:
    targets = {"cond": Trajectories().features(0, "cond").bfloat16()}
    driver = ClosedLoop({"cond": Learner(predictor(), SIGMAS, FAST)}, (0,), targets)
    request = Request(STEPS, SIGMAS)
    driver.begin(request)
    calls = [Call("cond", step, None, torch.zeros(1), request, step == 0) for step in range(2)]
    assert driver.forecast(calls[0]) is None
    driver.keep(calls[0], targets["cond"][0])
    coming = driver.forecast(calls[1])
    assert coming is not None and coming.ring is None
    forecast = coming.feature()
    assert forecast is not None
    assert forecast.dtype == torch.bfloat16
    assert not forecast.requires_grad


def test_closed_loop_histories_do_not_outlive_a_request() -> None:
    recording = Trajectories()
    config = replace(FAST, lr=1e-30, weight_decay=0.0)
    targets = {"cond": recording.features(0, "cond")}
    driver = ClosedLoop({"cond": Learner(predictor(), SIGMAS, config)}, COMPUTED, targets)
    first, second = Sampler(recording), Sampler(recording)
    first([0], driver)
    second([0], driver)
    for (_, _, _, one), (_, _, _, two) in zip(first.events, second.events, strict=True):
        assert torch.equal(one, two)


def test_closed_loop_stops_where_a_feature_is_lost() -> None:
    driver = ClosedLoop({"cond": Learner(predictor(), SIGMAS, FAST)}, (0,), {})
    with pytest.raises(RuntimeError, match="training stopped: the hook is gone"):
        driver.lose("the hook is gone")
    with pytest.raises(RuntimeError, match="training stopped at step 3: the hook is gone"):
        driver.refuse(Call("cond", 3, None, torch.zeros(1), Request(), False), "the hook is gone")


# Runs that are killed

Stage_ = Callable[[dict[str, Predictor], Trajectories, TrainingConfig, Any], Losses]


def run_guided(trained: dict[str, Predictor], recording: Any, config: TrainingConfig, checkpoint: Any) -> Losses:
    return guided(trained, recording, 2, config, checkpoint)


def run_closed(trained: dict[str, Predictor], recording: Any, config: TrainingConfig, checkpoint: Any) -> Losses:
    return closed_loop(trained, recording, COMPUTED, Sampler(recording), config, checkpoint)


ON_STAGES = pytest.mark.parametrize("run", [run_guided, run_closed])


class Killed(Trajectories):
    """A recording whose n-th read kills the run."""

    def __init__(self, reads: int, **more: Any) -> None:
        super().__init__(**more)
        object.__setattr__(self, "reads", [reads])

    def features(self, index: int, context: str) -> Tensor:
        self.reads[0] -= 1  # type: ignore[attr-defined]
        if self.reads[0] < 0:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return super().features(index, context)


@ON_STAGES
def test_killed_run_goes_on_bit_equal(run: Stage_, tmp_path: Path) -> None:
    config = replace(FAST, checkpoint_every=2, guided_epochs=2, closed_loop_epochs=2, lr_step=11)
    both = ("cond", "uncond")
    whole = predictors(Trajectories(contexts=both))
    expected = run(whole, Trajectories(contexts=both), config, None)
    reads = 9 if run is run_guided else 9 * STEPS
    with pytest.raises(KeyboardInterrupt):
        run(predictors(Trajectories(contexts=both)), Killed(reads, contexts=both), config, tmp_path / "checkpoint")
    again = predictors(Trajectories(contexts=both))
    actual = run(again, Trajectories(contexts=both), config, tmp_path / "checkpoint")
    assert actual == expected
    assert_same(parameters(again), parameters(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@ON_STAGES
def test_checkpoint_saves_the_work_before_it(run: Stage_, tmp_path: Path) -> None:
    config = replace(FAST, checkpoint_every=2, guided_epochs=1, closed_loop_epochs=1)
    with pytest.raises(KeyboardInterrupt):
        run(predictors(Trajectories()), Killed(3 if run is run_guided else 3 * (STEPS + 1)), config, tmp_path / "c")
    rest = Killed(2 if run is run_guided else 2 * (STEPS + 1))  # enough for two prompts of four
    assert len(run(predictors(Trajectories()), rest, config, tmp_path / "c")["cond"]) == 4 * len(
        [s for s in range(STEPS) if s not in (COMPUTED if run is run_closed else (0, 1))]
    )


@ON_STAGES
def test_finished_run_is_not_repeated(run: Stage_, tmp_path: Path) -> None:
    first = predictors(Trajectories())
    losses = run(first, Trajectories(), FAST, tmp_path / "checkpoint")
    again = predictors(Trajectories())
    assert run(again, Killed(0), FAST, tmp_path / "checkpoint") == losses
    assert_same(parameters(again), parameters(first))


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    config = replace(FAST, checkpoint_every=1)
    bad = order(config, 0, 4)[1][0]

    class Spoiled(Trajectories):
        def features(self, index: int, context: str) -> Tensor:
            return super().features(index, context) * (float("nan") if index == bad else 1.0)

    with pytest.raises(ValueError, match="not finite"):
        run_guided(predictors(Spoiled()), Spoiled(), config, tmp_path / "checkpoint")
    with safe_open(tmp_path / "checkpoint", framework="pt") as file:
        assert json.loads(file.metadata()["lesa"])["position"] == 1


# Checkpoints that do not fit


def refused(run: Callable[[], Any], message: str, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        run()
    assert path.name in str(caught.value)
    assert "delete it" in str(caught.value)
    assert path.read_bytes() == before


def test_corrupt_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    run_guided(predictors(Trajectories()), Trajectories(), FAST, path)
    for data in (path.read_bytes()[:-10], b"no checkpoint", b""):
        path.write_bytes(data)
        refused(lambda: run_guided(predictors(Trajectories()), Trajectories(), FAST, path), "cannot be read", path)


def test_foreign_checkpoint(tmp_path: Path) -> None:
    path, old = tmp_path / "model.safetensors", {"lesa": '{"identity": {"format": "lesa-training-2"}}'}
    for metadata in (None, old):
        save_file({"weight": torch.zeros(3)}, path, metadata)
        refused(lambda: run_guided(predictors(Trajectories()), Trajectories(), FAST, path), "holds no checkpoint", path)


def test_checkpoint_of_another_training(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    run_guided(predictors(Trajectories()), Trajectories(), FAST, path)
    others: list[tuple[Trajectories, TrainingConfig, dict[str, Any]]] = [
        (Trajectories(("a", "b", "c")), FAST, {}),
        (Trajectories(), replace(FAST, lr=2e-2), {}),
        (Trajectories(), replace(FAST, seed=1), {}),
        (Trajectories(), replace(FAST, guided_epochs=2), {}),
        (Trajectories(contexts=("cond", "uncond")), FAST, {}),
        (Trajectories(contexts=("uncond",)), FAST, {}),
        (Trajectories(), FAST, {"width": 5}),
        (Trajectories(), FAST, {"alpha": "mlp"}),
        (Trajectories(), FAST, {"alpha_init": 0.0}),
        (Trajectories(), FAST, {"stages": (Stage("high", 0.7, 2), Stage("low", 0.0, 3))}),
        (Trajectories(sigmas=SIGMAS[:5] + (0.0,)), FAST, {"steps": 5}),
    ]
    for recording, config, changes in others:
        refused(
            lambda one=recording, by=config, how=changes: run_guided(predictors(one, **how), one, by, path),
            "another training",
            path,
        )


def test_checkpoint_of_another_stage_or_schedule(tmp_path: Path) -> None:
    recording, path = Trajectories(), tmp_path / "checkpoint"
    run_guided(predictors(recording), recording, FAST, path)
    refused(lambda: run_closed(predictors(recording), recording, FAST, path), "another training", path)
    refused(lambda: guided(predictors(recording), recording, 3, FAST, path), "another training", path)
    path.unlink()
    run_closed(predictors(recording), recording, FAST, path)
    other = lambda: closed_loop(predictors(recording), recording, (0, 5), Sampler(recording), FAST, path)  # noqa: E731
    refused(other, "another training", path)


def test_checkpoint_without_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    run_guided(predictors(Trajectories()), Trajectories(), FAST, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["lesa"])["position"] == 4
    save_file({"cond/predictor/nothing": torch.zeros(1)}, path, metadata)
    refused(lambda: run_guided(predictors(Trajectories()), Trajectories(), FAST, path), "incomplete", path)


# Arguments


@ON_STAGES
def test_one_predictor_a_context(run: Stage_) -> None:
    recording = Trajectories(contexts=("cond", "uncond"))
    for given in (("cond",), ("cond", "uncond", "third"), ("a", "b"), ()):
        with pytest.raises(ValueError, match=r"contexts .*\['cond', 'uncond'\]"):
            run({context: predictor() for context in given}, recording, FAST, None)


def test_settings_are_checked() -> None:
    for name in ("lr", "lr_step", "lr_decay", "clip", "batch", "checkpoint_every"):
        for value in (0, -1, float("nan")):
            with pytest.raises(ValueError, match=f"{name}={value}"):
                TrainingConfig(**{name: value})
    with pytest.raises(ValueError, match="first_step=0"):
        guided(predictors(Trajectories()), Trajectories(), 0)
