"""The search for one budget: what is run, what is refined, and when refining ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pipelines import flux_dev

from lesa.fitting.arguments import Given
from lesa.fitting.refine import (
    Candidate,
    Refiner,
    ScheduleSearch,
    expressible,
    fingerprint,
    table_of,
)
from lesa.fitting.trials import Measured, Trials, run_in_full
from lesa.forecasters import plan_of
from lesa.models.pipeline import calls_of
from lesa.planner.build import closed_form, prior_error_gains
from lesa.planner.generic import generic_statistics
from lesa.planner.surrogate import interpolated_error_gains
from lesa.plans.plan import Plan
from lesa.plans.rows import Row
from lesa.plans.schedule import published

REQUEST = {"num_inference_steps": 8, "height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["a red apple", "snow"]
FIRST = ["published schedule, taylor-1", "searched"]


@pytest.fixture(scope="module")
def trials() -> Trials:
    pipe = flux_dev()
    return run_in_full(pipe, calls_of(pipe, PROMPTS, None, REQUEST, None, 1, output_type="np"), REQUEST)


class Flattered(Trials):
    """Remembers the plans it ran and those of its probes, and adds to the PSNR of some runs, by their number."""

    def __init__(self, trials: Trials, more: dict[int, float] | None = None) -> None:
        super().__init__(trials.calls, trials.statistics, trials.references, trials.seconds)
        self.grams = trials.grams
        self.plans: list[Plan] = []
        self.probes: list[tuple[Plan, slice]] = []
        self.more = more or {}

    def run(self, plan: Plan, calls: slice = slice(None)) -> Measured:
        measured = super().run(plan, calls)
        if calls != slice(None):
            self.probes.append((plan, calls))
            return measured
        self.plans.append(plan)
        return replace(measured, psnr=measured.psnr + self.more.get(len(self.plans) - 1, 0.0))


def refine(
    trials: Trials, runs: int, evaluations: int = 60, given: tuple[Given, ...] = (), budget: int = 3
) -> tuple[Refiner, Candidate]:
    refiner = Refiner(trials, ScheduleSearch(trials, budget, evaluations, 0), budget, runs, given)
    return refiner, refiner.run()


@pytest.fixture(scope="module")
def usual(trials: Trials) -> tuple[Refiner, Candidate, Flattered]:
    counted = Flattered(trials)
    return *refine(counted, 12), counted


def names(refiner: Refiner) -> list[str]:
    return [name for name, _ in refiner.seen]


def test_the_best_of_all_runs_is_found(trials: Trials, usual: tuple[Refiner, Candidate, Flattered]) -> None:
    refiner, best, counted = usual
    assert names(refiner)[:2] == FIRST and len(counted.plans) == len(refiner.seen) == 12, "each costs one run"
    assert best.score == max(score for _, score in refiner.seen)
    assert counted.plans[0].computed == published(8, 3)[0]
    taylor = plan_of("taylor-1", published(8, 3)[0], trials.statistics.sigmas, "output")
    assert refiner.seen[0][1] == pytest.approx(trials.run(taylor).score, abs=1e-3)


def test_same_seed_same_search(trials: Trials, usual: tuple[Refiner, Candidate, Flattered]) -> None:
    refiner, best = refine(trials, 12)
    assert refiner.seen == usual[0].seen and best.plan == usual[1].plan


def test_gauss_newton_ends_for_good_once_it_has_lost(
    trials: Trials, usual: tuple[Refiner, Candidate, Flattered]
) -> None:
    """And goes on as long as it gains; the runs that are left go to moves."""
    first = next(i for i, name in enumerate(names(usual[0])) if name.endswith("+"))
    for wins in (0, 2):
        # far above the one before, then far below
        more = {first + i: 10.0 * (i + 1) for i in range(wins)} | {first + wins: -10.0}
        found = names(refine(Flattered(trials, more), 9)[0])
        steps = [i for i, name in enumerate(found) if name.endswith("+")]
        assert steps == list(range(first, first + wins + 1))
        assert all(name.startswith("(") for name in found[steps[-1] + 1 :]) and len(found) == 9


def test_a_move_that_wins_is_refined_while_that_gains(
    trials: Trials, usual: tuple[Refiner, Candidate, Flattered]
) -> None:
    """Steps from the best one gain too little for a third one; then a schedule beside it wins."""
    first = next(i for i, name in enumerate(names(usual[0])) if name.endswith("+"))
    base = max(score for _, score in usual[0].seen[:first])
    scores = {first: base + 0.01, first + 1: base + 0.02, first + 2: 90.0, first + 3: 91.0}

    class Scored(Flattered):
        def run(self, plan: Plan, calls: slice = slice(None)) -> Measured:
            measured = super().run(plan, calls)
            i = len(self.plans) - 1
            return replace(measured, psnr=np.full(2, scores[i])) if i in scores else measured

    found = names(refine(Scored(trials), first + 4)[0])
    assert [name.endswith("+") for name in found[first:]] == [True, True, False, True]
    assert found[first + 3] == f"{found[first + 2]} +"


def test_no_schedule_is_run_as_a_move_twice(trials: Trials) -> None:
    """Not even where all beside the best one are run; a budget of one step has no moves."""
    refiner, _ = refine(trials, 60, budget=2)
    moved = [name for name in names(refiner) if name.startswith("(") and not name.endswith("+")]
    assert len(set(moved)) == len(moved) <= 7, "of 8 steps the first and one more"
    assert len(refine(trials, 60, budget=1)[0].seen) < 8


def test_without_runs_two_calls_tell_how_the_denoiser_answers(trials: Trials) -> None:
    """The first by the exact search's schedule, the second by the one that is best with what the first told."""
    counted, schedules = Flattered(trials), ScheduleSearch(trials, 3, 60, 0)
    best = Refiner(counted, schedules, 3, 0).run()
    other, told = ScheduleSearch(trials, 3, 60, 0), []
    computed, response = other.starts()[0], trials.statistics.impulse_response
    prior = other.error_gains
    for call, (probe, part) in enumerate(counted.probes):
        assert probe.computed == computed and part == slice(call, call + 1)
        measured = trials.run(probe, slice(call, call + 1))
        told.append(interpolated_error_gains(measured.error_gains, computed, response))
        assert told[-1].shape == (1, 8, 1)
        other.learn(np.repeat(np.mean(told, 0), 2, 2))
        computed = other.climb(other.starts())
    assert not counted.plans and len(told) == 2 and not np.allclose(prior, other.error_gains)
    np.testing.assert_allclose(schedules.error_gains, other.error_gains, atol=1e-9)
    assert best.measured is None and best.computed == computed
    assert best.weights is not None and np.allclose(best.weights, other.rows(computed), atol=1e-6)


def test_gains_are_assumed_to_be_those_of_predicting_the_noise(trials: Trials) -> None:
    sigmas = np.asarray(trials.statistics.sigmas[:-1])
    gains = prior_error_gains(trials.statistics, 3)
    np.testing.assert_allclose(gains, np.minimum(1 / sigmas, 2.0)[None, :, None].repeat(3, 2), rtol=1e-5)


def test_the_search_counts_each_request_as_measured_and_as_one_whose_errors_heal_or_last(
    trials: Trials, seed: int
) -> None:
    """The mean of what surrogates promise of the same rows: of two, then of the measured one three times, too."""
    trials = replace(trials, calls=trials.calls * 3, references=trials.references * 3)
    schedules, computed = ScheduleSearch(trials, 3, 60, 0), (0, 2, 5)
    measured = np.random.default_rng(seed).normal(size=schedules.error_gains.shape)
    heal, last = np.split(trials.assumed_gains, 2, 2)

    def promised(weights: np.ndarray, *gains: np.ndarray) -> float:
        return float(np.mean([trials.surrogate(own).optimise(computed, weights, 0)[1] for own in gains]))

    for gains in ((heal, last), (measured, measured, measured, heal, last)):
        if len(gains) > 2:
            schedules.learn(measured)
        weights = schedules.rows(computed)
        best = promised(weights, *gains)
        assert best <= schedules.objective(computed) + 1e-6  # found with fewer iterations
        assert all(best <= promised(trials.surrogate(own).optimise(computed, weights, 15)[0], *gains) for own in gains)


@pytest.mark.parametrize("count", [1, 2])
def test_few_requests_tell_a_schedule_of_errors_that_last(trials: Trials, count: int, seed: int) -> None:
    """Whatever gains were measured. A generic request of the same size joins a single one."""
    few = replace(trials, calls=trials.calls[:count], references=trials.references[:count])
    schedules, computed = ScheduleSearch(few, 3, 60, 0), (0, 2, 5)
    before = schedules.objective(computed)
    schedules.learn(np.random.default_rng(seed).normal(size=schedules.error_gains.shape))
    assert schedules.objective(computed) == before
    last = few.assumed_gains[:, :, count:]
    model = few.surrogate(last)
    if count == 1:
        generic = generic_statistics("flow_prediction", False, few.statistics.sigmas).grams["output"]
        size = few.statistics.grams["output"].trace() / generic.trace()
        model = replace(
            model,
            grams=np.concatenate([model.grams, size * generic[None]]),
            error_gains=np.concatenate([last, last], 2),
        )
    assert before == pytest.approx(model.optimise(computed, closed_form(few.statistics, computed), 5)[1], rel=1e-9)


def test_the_rules_that_a_fit_is_compared_with(trials: Trials) -> None:
    found = ScheduleSearch(trials, 4, 60, 0).rules()
    expected = {(rule, computed) for rule in ("reuse", "taylor-1") for computed in published(8, 4)}
    assert len(found) == len(expected)
    for rule, computed in expected:
        same = plan_of(rule, computed, trials.statistics.sigmas, "output")
        [one] = [one for one in found if one.name == f"{rule} on {computed}"]
        assert {step: dict(zip(row.steps, row.weights, strict=True)) for step, row in one.plan.rows["*"].items()} == {
            step: {
                read: dict(zip(row.steps, row.weights, strict=True)).get(read, 0.0)
                for read in one.plan.rows["*"][step].steps
            }
            for step, row in same.rows["*"].items()
        }


def test_the_search_does_not_see_how_samples_are_scaled(trials: Trials, seed: int) -> None:
    """A sampler that scales its sample anew at each step, as DDIM does: the same gains in its units, the same plan."""
    scale = np.exp(np.random.default_rng(seed).normal(size=9))
    scale[-1] = 1.0
    known = trials.statistics
    scaled = replace(known, impulse_response=scale[:, None] * known.impulse_response)
    other = Trials(trials.calls, scaled, trials.references, trials.seconds)
    plain, same = ScheduleSearch(trials, 4, 60, 0), ScheduleSearch(other, 4, 60, 0)
    np.testing.assert_allclose(same.error_gains[:, 1:] * scale[1:-1, None], plain.error_gains[:, 1:], rtol=1e-9)
    found = plain.climb(plain.starts())
    assert same.climb(same.starts()) == found and found not in plain.starts()
    np.testing.assert_allclose(same.rows(found), plain.rows(found), atol=1e-6)


@pytest.mark.parametrize("budget", [1, 8])
def test_a_probe_without_errors_tells_nothing(trials: Trials, budget: int) -> None:
    schedules = ScheduleSearch(trials, budget, 60, 0)
    prior = schedules.error_gains.copy()
    assert Refiner(trials, schedules, budget, 0).run().plan.budget == budget
    assert np.array_equal(schedules.error_gains, prior)


def test_a_search_that_goes_far_begins_as_one_that_does_not(trials: Trials, monkeypatch: Any) -> None:
    counted = Flattered(trials)
    near, same = refine(trials, 5, 100)[0], refine(counted, 5, 101)[0]
    assert near.seen[:4] == same.seen[:4] and names(near)[2] == "searched again"
    assert len({fingerprint(plan) for plan in counted.plans}) == len(counted.plans)
    climb, other = ScheduleSearch.climb, (0, 1, 7)
    monkeypatch.setattr(ScheduleSearch, "climb", lambda self, starts, far=False: other if far else climb(self, starts))
    elsewhere = names(refine(trials, 5, 101)[0])
    searches = elsewhere.index("searched far")
    assert elsewhere[:searches] == names(near)[:searches] and not any(
        name.endswith("+") for name in elsewhere[:searches]
    )


def test_each_search_knows_what_the_runs_before_it_measured(trials: Trials) -> None:
    """The mean of the gains that they measured, for each request its own."""
    learned: list[np.ndarray] = []

    class Watched(ScheduleSearch):
        def learn(self, error_gains: np.ndarray) -> None:
            learned.append(error_gains)
            super().learn(error_gains)

    counted = Flattered(trials)
    Refiner(counted, Watched(trials, 3, 60, 0), 3, 4).run()
    response = trials.statistics.impulse_response
    told = [
        interpolated_error_gains(trials.run(plan).error_gains, plan.computed, response) for plan in counted.plans[1:]
    ]
    for i in range(len(told)):
        np.testing.assert_allclose(learned[2 + i], np.mean(told[: i + 1], 0), rtol=1e-6)


def test_one_that_computes_more_than_it_should_is_not_the_best(trials: Trials) -> None:
    class Refused(Flattered):
        def run(self, plan: Plan, calls: slice = slice(None)) -> Measured:
            measured = super().run(plan, calls)
            return replace(measured, refused=("why",), psnr=measured.psnr + 9) if len(self.plans) == 3 else measured

    refiner, best = refine(Refused(trials), 5)
    assert max(refiner.seen, key=lambda pair: pair[1])[0] == refiner.seen[2][0] != best.name


def test_a_given_plan_that_leads_is_refined(trials: Trials, usual: tuple[Refiner, Candidate, Flattered]) -> None:
    """Its last row reads a forecast too."""
    best = usual[1].plan
    rows = dict(best.rows["*"])
    step = max(rows)
    rows[step] = Row((*rows[step].steps, min(rows)), (*rows[step].weights, 1e-3))
    mine = replace(best, rows={"*": rows})
    refiner, found = refine(Flattered(trials, {1: 20.0}), 7, given=(Given("mine", mine),))
    assert names(refiner)[:4] == [FIRST[0], "mine", "searched", "searched again"] and "mine +" in names(refiner)
    assert found.name == "mine" and found.plan == mine


def test_the_search_goes_on_with_others_where_the_hidden_site_leads(trials: Trials) -> None:
    hidden = plan_of("taylor-1", (0, 2, 4), trials.statistics.sigmas, "hidden")
    refiner, found = refine(Flattered(trials, {1: 50.0}), 7, given=(Given("mine", hidden),))
    assert found.name == "mine" and found.weights is None and len(refiner.seen) == 7
    assert any(name.startswith("searched") and name.endswith("+") for name in names(refiner))


def test_a_given_plan_whose_forecasts_are_refused_is_named(trials: Trials) -> None:
    """It would be measured with more than its computed steps."""
    wild = Plan((0, 1, 2), trials.statistics.sigmas, {"*": {s: Row((0,), (1e38,)) for s in range(3, 8)}}, site="output")
    with pytest.raises(ValueError, match="mine computes more than its 3 steps: the forecast was not finite"):
        refine(trials, 3, given=(Given("mine", wild),))


# Rows over computed steps


def plan(rows: dict[int, Row], computed: tuple[int, ...] = (0, 2), steps: int = 4, **more: Any) -> Plan:
    sigmas = tuple(1 - t / steps for t in range(steps)) + (0.0,)
    return Plan(computed, sigmas, {"*": rows}, **{"site": "output", **more})


def test_forecasts_that_rows_read_are_written_out() -> None:
    table = table_of(plan({1: Row((0,), (1.5,)), 3: Row((1, 2), (2.0, -1.0))}), ["cond"])
    expected = np.zeros((1, 4, 4))
    expected[0, 1, 0] = 1.5
    expected[0, 3, [0, 2]] = 3.0, -1.0
    assert table is not None
    np.testing.assert_array_equal(table, expected)


def test_the_table_says_what_the_rows_do(seed: int) -> None:
    """Windows of the last steps, forecasts among them, as LESA's rows have, in two contexts."""
    random = np.random.default_rng(seed)
    T, computed = 14, (0, 1, 4, 8, 9)
    forecast = [step for step in range(T) if step not in computed]

    def rows() -> dict[int, Row]:
        windows = {step: tuple(range(max(0, step - 8), step)) for step in forecast}
        return {step: Row(reads, tuple(random.normal(size=len(reads)))) for step, reads in windows.items()}

    sigmas = tuple(1 - t / T for t in range(T)) + (0.0,)
    one = Plan(computed, sigmas, {"cond": rows(), "*": rows()}, site="output")
    table = table_of(one, ["uncond", "cond"])
    assert table is not None and table.shape == (2, T, T)
    for c, context in enumerate(["uncond", "cond"]):
        features = random.normal(size=(T, 5))
        truth = features.copy()
        for step in forecast:
            row = one.rows_of(context)[step]
            truth[step] = np.asarray(row.weights) @ truth[list(row.steps)]
        np.testing.assert_allclose(table[c][forecast] @ features, truth[forecast], rtol=1e-10, atol=1e-10)
        assert not table[c][list(computed)].any() and not table[c][:, forecast].any()


def test_what_cannot_be_written_out() -> None:
    rows = {1: Row((0,), (1.0,)), 3: Row((2,), (1.0,))}
    assert table_of(plan(rows), ["cond"]) is not None
    assert table_of(plan(rows, site="hidden"), ["cond"]) is None
    assert table_of(plan({**rows, 1: Row((0,), (1.0,), 0.1)}), ["cond"]) is None
    computed, far = tuple(range(17)), Row((0,), (1.0,))
    newest = Row(tuple(range(1, 17)), (1 / 16,) * 16)
    assert table_of(plan({17: newest}, computed, 18), ["cond"]) is not None
    assert table_of(plan({17: far}, computed, 18), ["cond"]) is None
    assert not expressible(np.full((1, 4, 4), np.nan), (0, 2))


def test_what_a_fingerprint_is_of() -> None:
    one = plan({1: Row((0,), (1.0,)), 3: Row((2,), (1.0,))})
    others = [
        plan({1: Row((0,), (1.0 + 1e-15,)), 3: Row((2,), (1.0,))}),
        plan({1: Row((0,), (1.0,)), 3: Row((2,), (1.0,), 1e-15)}),
        replace(one, site="hidden"),
        replace(one, sigmas=(1.0 - 1e-9, *one.sigmas[1:])),
    ]
    assert len({fingerprint(one), *map(fingerprint, others)}) == 5
    assert fingerprint(replace(one, training={"note": 1}, forecaster="x")) == fingerprint(one)
