"""The clock: step, context and request of each call, told from a scheduler or from bare timesteps."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from lesa.plans.rows import PlanError
from lesa.runtime.clock import UNNAMED, Call, Clock, Loop, Request, prediction_of, sigmas_of

SAMPLE = torch.zeros(1, 4, 8, 8)


class FakeScheduler:
    """Counts updates as diffusers does: `step_index` is None until the first update."""

    def __init__(self, steps: int, begin: int | None = None) -> None:
        self.step_index: int | None = None
        self.begin_index = begin
        self.set_timesteps(steps)

    def set_timesteps(self, steps: int) -> None:
        self.sigmas = torch.linspace(1, 0, steps + 1)
        self.timesteps = self.sigmas[:-1] * 1000
        self.step_index = None

    def step(self) -> None:
        self.step_index = (self.begin_index or 0) if self.step_index is None else self.step_index
        self.step_index += 1


def fake(steps: int, begin: int | None = None) -> tuple[FakeScheduler, Clock]:
    scheduler = FakeScheduler(steps, begin)
    return scheduler, Clock(lambda: Loop(scheduler))


def place(call: Call) -> tuple[str, int, bool]:
    return call.context, call.step, call.starts


def request(clock: Clock, scheduler: FakeScheduler, contexts: tuple[str | None, ...]) -> list[tuple[str, int, bool]]:
    """Every call of a whole request."""
    places = []
    for timestep in scheduler.timesteps[scheduler.begin_index or 0 :]:
        places += [place(clock.tick(context, timestep, SAMPLE)) for context in contexts]
        scheduler.step()
    return places


# With a scheduler


def test_one_context() -> None:
    scheduler, clock = fake(3)
    assert request(clock, scheduler, ("cond",)) == [("cond", 0, True), ("cond", 1, False), ("cond", 2, False)]


def test_two_contexts_in_either_order() -> None:
    for contexts in (("cond", "uncond"), ("uncond", "cond")):
        scheduler, clock = fake(3)
        first, second = contexts
        assert request(clock, scheduler, contexts) == [
            (first, 0, True), (second, 0, False), (first, 1, False), (second, 1, False), (first, 2, False),
            (second, 2, False),
        ]  # fmt: skip


def test_the_call_carries_what_it_was_given() -> None:
    scheduler, clock = fake(3)
    timestep = scheduler.timesteps[0]
    call = clock.tick("cond", timestep, SAMPLE)
    assert call.timestep is timestep
    assert call.sample is SAMPLE
    assert call.request == Request(3, tuple(torch.linspace(1, 0, 4).tolist()))
    scheduler.step()
    assert clock.tick("cond", timestep, SAMPLE).request is call.request


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_unnamed_calls_of_one_step_are_told_apart_by_order(calls: int) -> None:
    scheduler, clock = fake(3)
    names = [UNNAMED, f"{UNNAMED}#2", f"{UNNAMED}#3", f"{UNNAMED}#4"][:calls]
    expected = [(name, step, step == 0 and name == UNNAMED) for step in range(3) for name in names]
    assert request(clock, scheduler, (None,) * calls) == expected


def test_two_calls_of_one_name() -> None:
    scheduler, clock = fake(2)
    assert [c for c, _, _ in request(clock, scheduler, ("cond", "cond"))] == ["cond", "cond#2", "cond", "cond#2"]


def test_a_branch_that_skips_steps_keeps_its_name() -> None:
    """Guidance on a part of the steps: the branch comes and goes, the step stays the scheduler's."""
    scheduler, clock = fake(4)
    seen = []
    for step in range(4):
        seen.append(place(clock.tick("cond", None, SAMPLE)))
        if step in (1, 3):
            seen.append(place(clock.tick("uncond", None, SAMPLE)))
        scheduler.step()
    assert seen == [
        ("cond", 0, True), ("cond", 1, False), ("uncond", 1, False), ("cond", 2, False), ("cond", 3, False),
        ("uncond", 3, False),
    ]  # fmt: skip


def test_too_many_calls_a_step() -> None:
    scheduler, clock = fake(3)
    for _ in range(4):
        clock.tick(None, None, SAMPLE)
    with pytest.raises(PlanError, match="more than 4 times at step 0.*enable it on the one that runs"):
        clock.tick(None, None, SAMPLE)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_new_request_after_one_that_was_left(done: int) -> None:
    """Whether it ended or was interrupted: new timesteps are a new request, even of equal values."""
    scheduler, clock = fake(3)
    for _ in range(done):
        clock.tick("cond", None, SAMPLE)
        scheduler.step()
    scheduler.set_timesteps(3)
    assert request(clock, scheduler, ("cond", "uncond"))[:3] == [
        ("cond", 0, True), ("uncond", 0, False), ("cond", 1, False),
    ]  # fmt: skip


def test_new_request_of_another_length() -> None:
    scheduler, clock = fake(3)
    request(clock, scheduler, ("cond",))
    scheduler.set_timesteps(7)
    call = clock.tick("cond", None, SAMPLE)
    assert (call.starts, call.request.num_steps, call.request.sigmas) == (
        True,
        7,
        tuple(torch.linspace(1, 0, 8).tolist()),
    )


def test_abort_makes_the_next_call_a_start() -> None:
    scheduler, clock = fake(3)
    request(clock, scheduler, ("cond",))
    clock.abort()
    scheduler.set_timesteps(3)
    assert request(clock, scheduler, ("cond",))[0] == ("cond", 0, True)


def test_swapped_scheduler_is_a_new_request() -> None:
    current = [FakeScheduler(3)]
    clock = Clock(lambda: Loop(current[0]))
    clock.tick("cond", None, SAMPLE)
    current[0] = FakeScheduler(5)
    call = clock.tick("cond", None, SAMPLE)
    assert (call.step, call.starts, call.request.num_steps) == (0, True, 5)


def test_begin_index() -> None:
    scheduler, clock = fake(8, begin=3)
    assert request(clock, scheduler, ("cond",)) == [("cond", step, step == 0) for step in range(5)]
    scheduler.set_timesteps(8)
    found = clock.tick("cond", None, SAMPLE).request
    assert found == Request(5, tuple(torch.linspace(1, 0, 9)[3:].tolist()), begin=3)


# Schedulers of diffusers

SCHEDULERS = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": lambda: DDIMScheduler(),
    "unipc": lambda: UniPCMultistepScheduler(),
    "unipc-flow": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "euler": lambda: EulerDiscreteScheduler(),
}
WITH_BEGIN = [name for name in SCHEDULERS if name != "ddim"]


def drive(clock: Clock, scheduler: Any, begin: int = 0, stop: int | None = None) -> list[Call]:
    """A pipeline's loop with two contexts and real updates."""
    calls = []
    sample = SAMPLE
    for i, timestep in enumerate(scheduler.timesteps[begin:]):
        if i == stop:
            break
        calls += [clock.tick(context, timestep, sample) for context in ("cond", "uncond")]
        sample = scheduler.step(0.1 * sample + 0.1, timestep, sample, return_dict=False)[0]
    return calls


def expected_places(steps: int) -> list[tuple[str, int, bool]]:
    return [(c, step, step == 0 and c == "cond") for step in range(steps) for c in ("cond", "uncond")]


def begin_at(scheduler: Any, begin: int) -> None:
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)


def test_real_scheduler() -> None:
    for name in SCHEDULERS:
        scheduler = SCHEDULERS[name]()
        clock = Clock(lambda scheduler=scheduler: Loop(scheduler))
        for steps, stop in ((6, None), (6, 4), (6, None), (9, 1), (9, None)):
            scheduler.set_timesteps(steps)
            begin_at(scheduler, 0)
            calls = drive(clock, scheduler, stop=stop)
            assert [place(call) for call in calls] == expected_places(stop or steps)
            assert all(call.request is calls[0].request for call in calls)
            assert calls[0].request == Request(steps, sigmas_of(scheduler))


@pytest.mark.parametrize("name", WITH_BEGIN)
def test_real_scheduler_without_begin_index(name: str) -> None:
    """SDXL and others never set it; the scheduler then finds its index by the timestep."""
    scheduler = SCHEDULERS[name]()
    clock = Clock(lambda: Loop(scheduler))
    for _ in range(2):
        scheduler.set_timesteps(5)
        assert [place(call) for call in drive(clock, scheduler)] == expected_places(5)


@pytest.mark.parametrize("name", WITH_BEGIN)
def test_real_scheduler_that_begins_late(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    clock = Clock(lambda: Loop(scheduler))
    for begin in (3, 3, 0, 5):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(begin)
        calls = drive(clock, scheduler, begin)
        assert [place(call) for call in calls] == expected_places(8 - begin)
        assert calls[0].request == Request(8 - begin, sigmas_of(scheduler)[begin:], begin=begin)


def test_ddim_called_more_often_than_it_has_steps() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    clock = Clock(lambda: Loop(scheduler))
    for timestep in scheduler.timesteps:
        clock.tick(None, timestep, SAMPLE)
    with pytest.raises(PlanError, match="context 'default' than the 3 steps"):
        clock.tick(None, scheduler.timesteps[-1], SAMPLE)


def test_ddim_image_to_image_starts_late() -> None:
    """DDIM keeps no begin_index: the first timestep tells how many steps were left out."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(8)
    clock = Clock(lambda: Loop(scheduler))
    calls = [clock.tick(None, timestep, SAMPLE) for timestep in scheduler.timesteps[3:]]
    assert [call.step for call in calls] == [0, 1, 2, 3, 4]
    assert calls[0].request.num_steps == 5
    assert calls[0].request.sigmas == sigmas_of(scheduler)[3:]


def test_sigmas_fall_from_noise_to_zero() -> None:
    for name in SCHEDULERS:
        scheduler = SCHEDULERS[name]()
        scheduler.set_timesteps(10)
        sigmas = sigmas_of(scheduler)
        assert len(sigmas) == 11
        assert sigmas[-1] == 0
        assert 0.85 < sigmas[0] <= 1
        assert all(a > b for a, b in pairwise(sigmas[:-1]))


def test_sigmas_are_the_flow_schedulers_own() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    assert sigmas_of(scheduler) == tuple(scheduler.sigmas.double().tolist())


def test_sigmas_of_other_schedulers_are_those_of_a_flow_with_as_much_noise() -> None:
    for scheduler in (EulerDiscreteScheduler(), DDIMScheduler(), UniPCMultistepScheduler()):
        scheduler.set_timesteps(10)
        squared = np.interp(scheduler.timesteps, np.arange(1000), scheduler.alphas_cumprod)
        expected = np.sqrt(1 - squared) / (np.sqrt(squared) + np.sqrt(1 - squared))
        assert sigmas_of(scheduler) == pytest.approx((*expected, 0.0), abs=1e-5)


def test_the_scheduler_tells_what_is_predicted() -> None:
    for scheduler, prediction in [
        (FlowMatchEulerDiscreteScheduler(), "flow_prediction"),
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "flow_prediction"),
        (DDIMScheduler(), "epsilon"),
        (EulerDiscreteScheduler(prediction_type="v_prediction"), "v_prediction"),
        (SimpleNamespace(sigmas=torch.linspace(14, 0, 9)), "epsilon"),
        (SimpleNamespace(sigmas=torch.linspace(1, 0, 9)), "flow_prediction"),
    ]:
        assert prediction_of(scheduler) == prediction


# Bare


def bare() -> Clock:
    return Clock(None)


def test_bare_request() -> None:
    clock = bare()
    calls = [clock.tick(None, torch.tensor([t]), SAMPLE) for t in (1000.0, 750.0, 500.0, 250.0)]
    assert [place(call) for call in calls] == [(UNNAMED, step, step == 0) for step in range(4)]
    assert calls[0].request == Request(None, None)


@pytest.mark.parametrize("kind", [float, int, lambda t: torch.tensor(t), lambda t: torch.full((3,), t)])
def test_bare_timesteps_of_any_kind(kind: Any) -> None:
    clock = bare()
    assert [place(clock.tick(None, kind(t), SAMPLE)) for t in (3.0, 2.0, 3.0)] == [
        (UNNAMED, 0, True), (UNNAMED, 1, False), (UNNAMED, 0, True),
    ]  # fmt: skip


def test_bare_timestep_a_token_counts_as_its_largest() -> None:
    """Wan 2.2 gives one timestep a token, 0 for given frames."""
    clock = bare()
    assert [clock.tick(None, torch.tensor([[0.0, t]]), SAMPLE).step for t in (9.0, 6.0, 3.0)] == [0, 1, 2]


@pytest.mark.parametrize("left_after", [1, 2, 4])
def test_bare_new_request_on_a_rise(left_after: int) -> None:
    clock = bare()
    for timestep in (1.0, 0.75, 0.5, 0.25)[:left_after]:
        clock.tick("cond", timestep, SAMPLE)
    calls = [clock.tick("cond", t, SAMPLE) for t in (1.0, 0.5)]
    assert [place(call) for call in calls] == [("cond", 0, True), ("cond", 1, False)]


def test_bare_equal_timesteps_in_named_contexts() -> None:
    clock = bare()
    for _ in range(2):
        seen = [
            place(clock.tick(context, timestep, SAMPLE)) for timestep in (1.0, 0.5) for context in ("cond", "uncond")
        ]
        assert seen == [("cond", 0, True), ("uncond", 0, False), ("cond", 1, False), ("uncond", 1, False)]


def test_bare_calls_of_one_step_without_names_are_told_apart_by_their_order() -> None:
    clock = bare()
    for seed in range(2):
        seen = []
        for timestep in (1.0, 0.5):
            sample = torch.full((1, 4), timestep + seed)
            seen += [place(clock.tick(None, timestep, given)) for given in (sample, sample.clone(), sample)]
        names = (UNNAMED, f"{UNNAMED}#2", f"{UNNAMED}#3")
        assert seen == [(name, step, step == 0 and name == UNNAMED) for step in range(2) for name in names]


def test_bare_requests_of_one_step_start_from_other_noise() -> None:
    clock = bare()
    noise = torch.zeros(1, 4)
    for _ in range(3):
        assert place(clock.tick(None, 1.0, noise)) == (UNNAMED, 0, True)
        noise += 1  # in the same memory


def test_bare_requests_of_one_step_from_equal_noise_end_at_the_most_calls_of_a_step() -> None:
    clock = bare()
    assert [clock.tick(None, 1.0, SAMPLE).starts for _ in range(6)] == [True, False, False, False, True, False]


def test_bare_second_call_with_another_sample_is_refused() -> None:
    """Heun's method evaluates between two levels."""
    clock = bare()
    for timestep in (1.0, 0.5):
        clock.tick(None, timestep, SAMPLE)
    with pytest.raises(PlanError, match="timestep 0.5 in context 'default'"):
        clock.tick(None, 0.5, SAMPLE + 1)


def test_a_context_that_comes_late_or_back_is_at_the_step_of_the_others() -> None:
    for names in [("cond", "uncond"), ("uncond", "cond")]:
        for counts_steps in [False, True]:
            for bare in [False, True]:
                scheduler, clock = fake(8)
                if bare:
                    clock = Clock()
                elif not counts_steps:
                    scheduler = DDIMScheduler()
                    scheduler.set_timesteps(8)
                    clock = Clock(lambda scheduler=scheduler: Loop(scheduler))
                for _ in range(2):
                    for step, timestep in enumerate(scheduler.timesteps):
                        for name in names if step in (2, 3, 6, 7) else ("cond",):
                            call = clock.tick(name, timestep, SAMPLE)
                            assert place(call) == (name, step, step == 0)
                        if hasattr(scheduler, "step_index"):
                            scheduler.step()
                    scheduler.set_timesteps(8)


def test_bare_request_left_between_two_contexts() -> None:
    clock = bare()
    for context, timestep in (("cond", 1.0), ("uncond", 1.0), ("cond", 0.5)):
        clock.tick(context, timestep, SAMPLE)
    seen = [place(clock.tick(context, t, SAMPLE)) for t in (1.0, 0.5) for context in ("cond", "uncond")]
    assert seen == [("cond", 0, True), ("uncond", 0, False), ("cond", 1, False), ("uncond", 1, False)]


@pytest.mark.parametrize("left_after", [2, 3])
def test_bare_timesteps_that_rise(left_after: int) -> None:
    """1 - t, as Lumina 2 and SiT are given it."""
    clock = bare()
    times = (0.0, 0.2, 0.6, 0.9)
    for stop in (4, left_after, 4, 1, 4):
        seen = [place(clock.tick(name, t, SAMPLE)) for t in times[:stop] for name in ("cond", "uncond")]
        assert seen == [(name, i, not i and name == "cond") for i in range(stop) for name in ("cond", "uncond")]


def test_branches_are_known_by_what_they_are_given() -> None:
    """Of three unnamed calls a step the second one stops; the last one is still the last one."""
    scheduler, clock = fake(4)
    texts = tuple(torch.full((1, 2, 3), float(i)) for i in range(2))
    given = [texts[0], texts[1], texts[0]]
    seen = []
    for i, timestep in enumerate(scheduler.timesteps):
        if i == 2:
            del given[1]
        seen.append([clock.tick(None, timestep, SAMPLE, (text if i < 3 else text.clone(),)) for text in given])
        scheduler.step()
    names = [[call.context for call in calls] for calls in seen]
    whole = [UNNAMED, f"{UNNAMED}#2", f"{UNNAMED}#3"]
    assert names == [whole, whole, whole[::2], whole[::2]]
    assert not any(call.changed for calls in seen for call in calls)


@pytest.mark.parametrize("how", ["another tensor", "written to", "another number"])
def test_changed_conditions_are_told_once(how: str) -> None:
    scheduler, clock = fake(4)
    text = torch.ones(1, 2, 3)
    changed = []
    for i, timestep in enumerate(scheduler.timesteps):
        if i == 2 and how == "written to":
            text.mul_(2)
        given = (text + 1,) if i >= 2 and how == "another tensor" else (text,) * (1 + (i >= 2 and how[-1] == "r"))
        call, other = clock.tick("cond", timestep, SAMPLE, given), clock.tick("uncond", timestep, SAMPLE)
        changed.append(call.changed is not None)
        assert other.changed is None
        scheduler.step()
    assert changed == [False, False, True, False]


def test_where_a_request_begins_is_told_by_its_first_timestep() -> None:
    """Wan's video-to-video slices its timesteps and calls no set_begin_index."""
    scheduler, clock = fake(8)
    scheduler.step_index = None
    calls = []
    for timestep in scheduler.timesteps[3:]:
        calls.append(clock.tick("cond", timestep / 1000, SAMPLE))
        scheduler.step_index = 3 + len(calls)
    assert [call.step for call in calls] == list(range(5))
    assert calls[0].request == Request(5, tuple(torch.linspace(1, 0, 9)[3:].tolist()), begin=3)


def test_the_pipeline_says_how_many_steps_it_runs() -> None:
    """SDXL's denoising_end."""
    scheduler = FakeScheduler(8)
    clock = Clock(lambda: Loop(scheduler, 5))
    first = [clock.tick("cond", timestep, SAMPLE) for timestep in scheduler.timesteps[:1]][0].request
    assert first == Request(5, tuple(torch.linspace(1, 0, 9)[:6].tolist()))
    scheduler.set_timesteps(4)  # what it said is of another request
    assert clock.tick("cond", scheduler.timesteps[0], SAMPLE).request.num_steps == 4


def test_steps_that_a_copy_of_the_scheduler_makes() -> None:
    """SkyReels-V2's diffusion forcing steps copies; its long videos run their timesteps again."""
    scheduler, clock = fake(4)
    for _ in range(2):
        seen = [place(clock.tick(name, t, SAMPLE)) for t in scheduler.timesteps for name in ("cond", "uncond")]
        assert seen == [(name, i, not i and name == "cond") for i in range(4) for name in ("cond", "uncond")]


def test_unset_schedulers_are_refused_before_anything_is_planned() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(PlanError, match="not set"):
        Clock(lambda: Loop(scheduler)).tick(None, torch.tensor(1.0), SAMPLE)


def test_the_loop_may_tell_the_step() -> None:
    scheduler, clock = fake(4)
    assert [clock.tick("cond", t, SAMPLE, step=i).step for i, t in enumerate(scheduler.timesteps)] == [0, 1, 2, 3]


def test_unnamed_calls_of_one_step_of_a_scheduler_that_does_not_count() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    clock = Clock(lambda: Loop(scheduler))
    seen = [place(clock.tick(None, t, SAMPLE)) for t in scheduler.timesteps for _ in range(2)]
    assert seen == [(name, i, not i and name == UNNAMED) for i in range(3) for name in (UNNAMED, f"{UNNAMED}#2")]


def test_bare_abort() -> None:
    clock = bare()
    clock.tick(None, 1.0, SAMPLE)
    clock.abort()
    assert place(clock.tick(None, 0.5, SAMPLE)) == (UNNAMED, 0, True)


def test_a_dropped_pipeline_leaves_a_bare_denoiser() -> None:
    scheduler: list[Any] = [FakeScheduler(3)]
    clock = Clock(lambda: Loop(scheduler[0]) if scheduler[0] else None)
    clock.tick("cond", 1.0, SAMPLE)
    scheduler[0] = None
    clock.abort()
    assert [clock.tick("cond", t, SAMPLE).step for t in (1.0, 0.5)] == [0, 1]


def test_sigmas_longer_than_a_flow_schedule_are_not_taken_for_one() -> None:
    """Heun and LCM variants keep repeated or extra sigmas: only T + 1 of them are the noise levels."""
    scheduler = SimpleNamespace(
        sigmas=torch.linspace(1, 0, 9),
        timesteps=torch.tensor([900.0, 500.0]),
        config=SimpleNamespace(num_train_timesteps=1000),
    )
    assert sigmas_of(scheduler) == pytest.approx((0.9, 0.5, 0.0))
