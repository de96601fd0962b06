"""The response of schedulers, against the schedulers themselves on random outputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from lesa.planner.statistics import flow_impulse_response
from lesa.plans.rows import LesaWarning
from lesa.runtime import clock as scheduling
from lesa.runtime.clock import impulse_response_of, sigmas_of

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "stochastic euler flow": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "heun flow": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "dpm-solver++ flow": lambda: DPMSolverMultistepScheduler(**FLOW),
    "dpm-solver++ 3 flow": lambda: DPMSolverMultistepScheduler(solver_order=3, **FLOW),
    "unipc flow": lambda: UniPCMultistepScheduler(**FLOW),
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddim v": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "euler": EulerDiscreteScheduler,
    "euler ancestral": EulerAncestralDiscreteScheduler,
    "pndm": lambda: PNDMScheduler(skip_prk_steps=True),
}
STEPS = 13


def samples(scheduler: Any, outputs: Tensor, noise: Tensor) -> np.ndarray:
    """Every sample [T + 1, ...] of a request that starts from `noise` and is given `outputs`."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(6)
    sample, path = noise, [noise]
    for timestep, output in zip(scheduler.timesteps[-len(outputs) :], outputs, strict=True):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)
        takes_generator = isinstance(scheduler, EulerAncestralDiscreteScheduler)
        more = {"generator": generator} if takes_generator else {}
        sample = scheduler.step(output, timestep, sample, return_dict=False, **more)[0]
        path.append(sample)
    return torch.stack(path).double().numpy()


def check(response: np.ndarray, make: Callable[[], Any], steps: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    outputs = torch.randn(steps, 2, 3, 4, 4, generator=random)
    noise = torch.randn(outputs.shape[1:], generator=random)
    moved = samples(make(), outputs, noise) - samples(make(), torch.zeros_like(outputs), noise)
    expected = np.tensordot(response, outputs.double().numpy(), 1)
    # Schedulers work in float32: their samples are rounded at the size of the largest.
    assert np.abs(moved - expected).max() <= 1e-5 * np.abs(moved).max()
    assert np.abs(moved[-1]).max() > 0.01


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_response_is_what_the_scheduler_does(name: str, seed: int) -> None:
    def make() -> Any:
        scheduler = SCHEDULERS[name]()
        scheduler.set_timesteps(STEPS)
        return scheduler

    scheduler = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LesaWarning)
        response = impulse_response_of(scheduler)
    steps = len(scheduler.timesteps)
    assert response.shape == (steps + 1, steps) and response.dtype == np.float64
    assert not np.triu(response).any()
    check(response, make, steps, seed)


def test_euler_along_a_flow_is_the_closed_form() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(9)
    np.testing.assert_allclose(impulse_response_of(scheduler), flow_impulse_response(sigmas_of(scheduler)), atol=1e-6)


@pytest.mark.parametrize(("name", "runs"), [("unipc flow", 1), ("stochastic euler flow", 2), ("euler ancestral", 2)])
def test_one_run_unless_something_comes_of_nothing(name: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, seen = SCHEDULERS[name](), []
    scheduler.set_timesteps(STEPS)
    run = scheduling._run
    monkeypatch.setattr(scheduling, "_run", lambda *args: seen.append(args) or run(*args))  # type: ignore[func-returns-value]
    impulse_response_of(scheduler)
    assert len(seen) == runs


def test_heun_calls_twice_a_step() -> None:
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    response = impulse_response_of(scheduler)
    assert response.shape == (8, 7)
    # After the first trial step x moves by the whole step along v_0, after its correction by half along each.
    step = float(scheduler.sigmas[1] - scheduler.sigmas[0])
    np.testing.assert_allclose(response[1:3, :2], [[step, 0], [step / 2, step / 2]], rtol=1e-5)


def test_the_scheduler_stays_as_it_was_and_its_state_does_not_matter(seed: int) -> None:
    for name in SCHEDULERS:
        scheduler = SCHEDULERS[name]()
        scheduler.set_timesteps(STEPS)
        clean = impulse_response_of(scheduler)
        random = torch.Generator().manual_seed(seed)
        outputs = torch.randn(5, 1, 2, 2, generator=random)
        state = torch.get_rng_state()
        for timestep, output in zip(scheduler.timesteps[:5], outputs, strict=True):  # in the middle of a request
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(output, timestep)
            scheduler.step(output, timestep, output, return_dict=False)
        torch.set_rng_state(state)
        timesteps, before = scheduler.timesteps, copy.deepcopy(vars(scheduler))
        np.testing.assert_array_equal(impulse_response_of(scheduler), clean)
        assert torch.equal(torch.get_rng_state(), state)
        assert scheduler.timesteps is timesteps and vars(scheduler).keys() == before.keys()
        for key, value in before.items():
            now = vars(scheduler)[key]
            assert torch.equal(now, value) if isinstance(value, Tensor) else repr(now) == repr(value), key


def test_generators_of_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed seeds them too; a user's next noise would always be the same."""
    for device in (torch.cuda, torch.xpu, torch.mps):
        for seeds in ("manual_seed_all", "manual_seed"):
            if hasattr(device, seeds):
                monkeypatch.setattr(device, seeds, lambda _: pytest.fail("seeded"))
    scheduler = SCHEDULERS["euler ancestral"]()
    scheduler.set_timesteps(STEPS)
    impulse_response_of(scheduler)


def test_image_to_image_leaves_out_the_first_steps(seed: int) -> None:
    for name in ["euler flow", "dpm-solver++ flow", "unipc flow", "ddim", "euler"]:

        def make(name: str = name) -> Any:
            scheduler = SCHEDULERS[name]()
            scheduler.set_timesteps(STEPS)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(4)
            return scheduler

        response = impulse_response_of(make(), 4)
        assert response.shape == (STEPS - 3, STEPS - 4)
        check(response, make, STEPS - 4, seed)
        if hasattr(make(), "begin_index"):
            np.testing.assert_array_equal(impulse_response_of(make()), response)


@pytest.mark.parametrize("bend", [{"clip_sample": True}, {"thresholding": True}])
def test_clipping_is_left_out(bend: dict[str, bool]) -> None:
    straight, bent = DDIMScheduler(clip_sample=False), DDIMScheduler(**{"clip_sample": False, **bend})
    for scheduler in (straight, bent):
        scheduler.set_timesteps(STEPS)
    np.testing.assert_array_equal(impulse_response_of(bent), impulse_response_of(straight))
    assert dict(bent.config)[next(iter(bend))]


class Own:
    """A scheduler of one's own, with a result of its own."""

    def __init__(self, power: float = 1.0) -> None:
        self.config = SimpleNamespace(num_train_timesteps=1000)
        self.timesteps = torch.tensor([900.0, 600.0, 300.0])
        self.power = power

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        moved = model_output.sign() * model_output.abs() ** self.power
        return SimpleNamespace(prev_sample=0.5 * sample + moved * timestep / 1000)


def test_a_scheduler_of_ones_own_by_hand() -> None:
    expected = [[0, 0, 0], [0.9, 0, 0], [0.45, 0.6, 0], [0.225, 0.3, 0.3]]
    np.testing.assert_allclose(impulse_response_of(Own()), expected, atol=1e-6)


def test_a_scheduler_that_is_not_linear_gets_the_flows_response() -> None:
    with pytest.warns(LesaWarning, match="Own.*not linear"):
        response = impulse_response_of(Own(power=2.0))
    np.testing.assert_allclose(response, flow_impulse_response((0.9, 0.6, 0.3, 0.0)))


def test_a_scheduler_that_cannot_be_run_gets_the_flows_response() -> None:
    scheduler = Own()
    scheduler.power = None  # type: ignore[assignment]
    with pytest.warns(LesaWarning, match="Own.*could not be run.*TypeError"):
        response = impulse_response_of(scheduler, 1)
    np.testing.assert_allclose(response, flow_impulse_response((0.6, 0.3, 0.0)))


def test_a_wrapper_around_the_update_is_not_run() -> None:
    scheduler, calls = Own(), []
    expected, step = impulse_response_of(scheduler), scheduler.step
    scheduler.step = lambda *args: calls.append(args) or step(*args)  # type: ignore[method-assign]
    np.testing.assert_array_equal(impulse_response_of(scheduler), expected)
    assert not calls and "step" in vars(scheduler)


def test_a_scheduler_that_yields_nan_gets_the_flows_response() -> None:
    scheduler = Own(power=float("nan"))
    with pytest.warns(LesaWarning, match="not linear"):
        assert np.isfinite(impulse_response_of(scheduler)).all()
