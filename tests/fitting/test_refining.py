"""Refining with all effort: what is published is run too, and whatever is best is bettered."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pipelines import flux_dev

import lesa
from lesa.fitting import refining
from lesa.fitting.climbing import Climber, published, spaced
from lesa.fitting.kept import Kept, digest
from lesa.fitting.promises import Promise, Promises
from lesa.fitting.refining import RULES, Candidate, Refiner
from lesa.fitting.session import EFFORTS
from lesa.fitting.trials import Measured, Trials
from lesa.fitting.tuning import Session
from lesa.forecasters import FORECASTERS, plan_of
from lesa.models.works import works_of
from lesa.planner.surrogate import interpolated_error_gains
from lesa.plans.plan import Plan

REQUEST = {"num_inference_steps": 8, "height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["a red apple", "snow"]


@pytest.fixture(scope="module")
def trials() -> Trials:
    pipe = flux_dev()
    works = works_of(pipe, PROMPTS, None, REQUEST, None, 1, output_type="np")
    options: dict[str, Any] = {"sigmas": None, "guidance": None, "effort": "quick", "seed": 0, "folder": None}
    return Session(pipe, works, [], REQUEST, **options).trials


class Runs(Kept):
    """Counts runs, and remembers the plans; flatters those of one name."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(trials, None)
        self.plans: list[Plan] = []
        self.better: dict[int, float] = {}

    def measure(self, plan: Plan) -> Measured:
        self.plans.append(plan)
        measured = super().measure(plan)
        return replace(measured, psnr=measured.psnr + self.better.get(len(self.plans) - 1, 0.0))


def refine(
    trials: Trials, runs: int, seed: int = 0, kept: Runs | None = None, prices: int = 60, **more: Any
) -> tuple[Refiner, Candidate]:
    climber = Climber(trials, 3, prices, seed)
    refiner = Refiner(trials, kept or Runs(trials), climber, 3, runs, **{"rules": RULES, **more})
    return refiner, refiner.run()


@pytest.fixture(scope="module")
def surveyed(trials: Trials) -> tuple[Refiner, Candidate, Runs]:
    kept = Runs(trials)
    return *refine(trials, 44, kept=kept), kept


def test_a_rule_of_each_kind_is_run() -> None:
    kinds = {re.sub(r"-<.*", "", name) for name in FORECASTERS}
    assert {re.sub(r"-\d+$", "", rule) for rule in RULES} == kinds
    assert EFFORTS["thorough"].rules == RULES and not EFFORTS["default"].rules


def test_what_is_published_is_run(trials: Trials, surveyed: tuple[Refiner, Candidate, Runs]) -> None:
    refiner, best, kept = surveyed
    names, skipped = [name for name, _ in refiner.seen], dict(refiner.skipped)
    wanted = {f"{schedule} schedule, {rule}" for schedule in ("published", "searched") for rule in RULES}
    plain = {"even schedule", "front-loaded schedule"}
    assert wanted | plain <= set(names) | set(skipped)
    assert len(names) == len(kept.plans) == 44, "each costs one run"
    assert set(skipped.values()) <= {"it is the same as one that was run"}
    floor, sigmas = published(8, 3)[0], trials.statistics.sigmas
    expected = {"even schedule": spaced(8, 3, 1.0), "front-loaded schedule": spaced(8, 3, 1.5)}
    by_name = dict(zip(names, kept.plans, strict=True))
    for name in wanted - set(skipped):
        schedule, rule = name.split(" schedule, ")
        computed = floor if schedule == "published" else by_name[name].computed
        gram = trials.statistics.gram("output", "cond")
        assert by_name[name].rows == padded(plan_of(rule, computed, sigmas, "output", gram)), name
        assert by_name[name].computed == computed
    for name in plain - set(skipped):
        assert by_name[name].computed == expected[name]
    searched = {by_name[name].computed for name in wanted - set(skipped) if name.startswith("searched")}
    assert len(searched) == 1 and searched <= {by_name["searched"].computed, by_name["searched again"].computed}
    assert best.score == max(score for _, score in refiner.seen)


def padded(plan: Plan) -> dict[str, dict[int, Any]]:
    """The plan's rows over all computed steps before, as fitted plans have them."""
    rows = {}
    for step, row in plan.rows["*"].items():
        weights = dict(zip(row.steps, row.weights, strict=True))
        reads = tuple(s for s in plan.computed if s < step)
        rows[step] = replace(row, steps=reads, weights=tuple(weights.get(s, 0.0) for s in reads))
    return {"*": rows}


def test_without_runs_one_call_tells_how_the_denoiser_answers(trials: Trials, monkeypatch: Any) -> None:
    ran, run = [], Trials._run
    monkeypatch.setattr(Trials, "_run", lambda self, *how: ran.append(how) or run(self, *how))
    climber = Climber(trials, 3, 60, 0)
    exact, prior = climber.starts()[0], climber.error_gains
    best = Refiner(trials, Runs(trials), climber, 3, 0).run()
    [(probe, work, _)] = ran
    assert work is trials.works[0] and probe.computed == exact and best.measured is None
    told = interpolated_error_gains(trials.run(probe).error_gains, exact, 8)
    assert np.array_equal(climber.error_gains, np.repeat(told[:, :, :1], 2, 2)), "of the first request, for all"
    assert not np.allclose(climber.error_gains, prior) and not np.allclose(climber.error_gains, told)
    other = Climber(trials, 3, 60, 0)
    other.learn(climber.error_gains)
    assert best.computed == other.climb(other.starts())
    assert best.weights is not None and np.array_equal(best.weights, other.rows(best.computed))


@pytest.mark.parametrize("budget", [1, 8])
def test_a_probe_without_errors_tells_nothing(trials: Trials, budget: int) -> None:
    climber = Climber(trials, budget, 60, 0)
    prior = climber.error_gains.copy()
    assert Refiner(trials, Runs(trials), climber, budget, 0).run().plan.budget == budget
    assert np.array_equal(climber.error_gains, prior)


def test_a_search_that_goes_far_begins_as_one_that_does_not(trials: Trials, monkeypatch: Any) -> None:
    kept = Runs(trials)
    near, same = refine(trials, 4, prices=100, rules=())[0], refine(trials, 4, prices=101, rules=(), kept=kept)[0]
    assert near.seen == same.seen and near.seen[2][0] == "searched again", "it found the same, which is not run again"
    assert len({digest(plan) for plan in kept.plans}) == len(kept.plans)
    climb, other = Climber.climb, (0, 1, 7)
    monkeypatch.setattr(Climber, "climb", lambda self, starts, far=False: other if far else climb(self, starts))
    elsewhere = refine(trials, 4, prices=101, rules=())[0]
    assert [name for name, _ in elsewhere.seen] == [*(name for name, _ in near.seen[:3]), "searched far"]
    assert elsewhere.seen[:3] == near.seen[:3]


def test_same_seed_same_search(trials: Trials, surveyed: tuple[Refiner, Candidate, Runs]) -> None:
    refiner, best = refine(trials, 44)
    assert (refiner.seen, refiner.skipped) == (surveyed[0].seen, surveyed[0].skipped)
    assert best.plan == surveyed[1].plan


def test_half_of_the_runs_are_left_for_bettering(trials: Trials) -> None:
    refiner, _ = refine(trials, 11)
    names, skipped = [name for name, _ in refiner.seen], dict(refiner.skipped)
    survey = [name for name in names if " schedule" in name][1:]
    assert len(names) == 11 and len(survey) == 4  # of the 8 after the floor and both searches
    assert list(skipped.values()).count("no runs are left for it") >= 10
    assert any(name.endswith("+") for name in names[7:])


def test_what_is_promised_is_run_first_and_once(trials: Trials, surveyed: tuple[Refiner, Candidate, Runs]) -> None:
    """Beside the rules that are run anyway, or where no other runs are left."""
    promised = [Promise(schedule, rule) for schedule in ("published", "searched") for rule in ("taylor-2", "taylor-3")]
    refiner, _ = refine(trials, 44, promises=Promises(tuple(promised)))
    names, skipped = [name for name, _ in refiner.seen], [name for name, _ in refiner.skipped]
    before = {name for name, _ in [*surveyed[0].seen, *surveyed[0].skipped] if "schedule, " in name}
    now = [name for name in [*names, *skipped] if "schedule, " in name]
    assert set(now) == before | {"published schedule, taylor-3", "searched schedule, taylor-3"}
    assert len(set(now)) == len(now)
    assert set(map(str, promised)) <= {*names[3:7], *skipped}, "after the floor and both searches"
    refiner, _ = refine(trials, 6, promises=Promises(tuple(promised)))
    expected = [name for name in map(str, promised) if name not in dict(refiner.skipped)]
    assert len(expected) >= 2
    expected = ["published schedule, taylor-1", "searched", *expected]
    assert [name for name, _ in refiner.seen][: len(expected)] == expected, "nothing comes before"


def test_the_best_of_them_is_bettered(trials: Trials, surveyed: tuple[Refiner, Candidate, Runs]) -> None:
    """As if the published schedule with reuse were far better than all others."""
    kept, name = Runs(trials), "published schedule, reuse"
    kept.better = {[name for name, _ in surveyed[0].seen].index(name): 40.0}
    refiner, best = refine(trials, 44, kept=kept)
    names = [name for name, _ in refiner.seen]
    assert best.name == name and f"{name} +" in names
    assert best.plan == kept.plans[names.index(name)]


def test_why_a_rule_is_left_out(trials: Trials, monkeypatch: Any) -> None:
    """Rows beyond what a plan's row can read, not finite, or that cannot be made."""
    closed_form = refining.closed_form

    def rows(statistics: Any, computed: Any, rule: str = "regression") -> Any:
        weights = closed_form(statistics, computed, rule)
        if rule == "reuse":
            weights[0, 7, 6] = 1.0  # a step that is not computed, or not before the last
        if rule == "hermite-2":
            weights[0, 7, 0] = float("nan")
        if rule == "l2p":
            raise ValueError("no such rows")
        return weights

    monkeypatch.setattr(refining, "closed_form", rows)
    refiner, _ = refine(trials, 44)
    skipped = dict(refiner.skipped)
    beyond = "its rows read more computed steps than a row of a plan can, or are not finite"
    assert skipped["published schedule, reuse"] == skipped["searched schedule, hermite-2"] == beyond
    assert skipped["published schedule, l2p"] == "no such rows"


def test_one_that_computes_more_than_it_should_is_not_the_best(trials: Trials) -> None:
    class Refused(Runs):
        def measure(self, plan: Plan) -> Measured:
            measured = super().measure(plan)
            return replace(measured, refused=("why",), psnr=measured.psnr + 9) if len(self.plans) == 3 else measured

    refiner, best = refine(trials, 5, kept=Refused(trials))
    assert max(refiner.seen, key=lambda pair: pair[1])[0] == refiner.seen[2][0] != best.name


def test_a_thorough_fit(monkeypatch: Any) -> None:
    monkeypatch.setitem(
        EFFORTS, "thorough", replace(EFFORTS["thorough"], generations=14, share=0.75, prices=60, experts=False)
    )
    plan = lesa.fit(flux_dev(), PROMPTS, budget=3, request=REQUEST, effort="thorough", held_out=0)
    names = [name for name, _ in plan.training["candidates"]]
    assert len(names) == plan.training["evaluations"] == int(12 * 0.75 / (2 * 3 / 8))
    assert "even schedule" in names and plan.training["skipped"]
    assert plan.training["fitting_psnr"] == max(score for _, score in plan.training["candidates"])


def test_what_is_promised_is_run_however_many_prompts(monkeypatch: Any) -> None:
    """Recording alone takes more than the effort here."""
    monkeypatch.setitem(EFFORTS, "default", replace(EFFORTS["default"], generations=1))
    plan = lesa.fit(flux_dev(), PROMPTS, budget=3, request=REQUEST, held_out=0)
    assert [name for name, _ in plan.training["candidates"]] == ["published schedule, taylor-1", "searched"]
