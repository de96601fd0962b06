"""Candidates: plans of one's own beside the searched ones; what does not fit is named, the best one is returned."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import flux_dev

import lesa
from lesa.fitting import candidates
from lesa.fitting.candidates import Given, expressible, misfit, names_of, read, table_of
from lesa.fitting.climbing import published
from lesa.fitting.kept import Kept
from lesa.fitting.session import EFFORTS
from lesa.fitting.trials import Measured
from lesa.forecasters import FORECASTERS, plan_of
from lesa.planner.statistics import Statistics, flow_impulse_response
from lesa.plans.plan import Plan, PlanError, Row

REQUEST = {"num_inference_steps": 8, "height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["a red apple", "snow"]
SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)


def plan(rows: dict[int, Row], computed: tuple[int, ...] = (0, 2), steps: int = 4, **more: Any) -> Plan:
    sigmas = tuple(1 - t / steps for t in range(steps)) + (0.0,)
    return Plan(computed, sigmas, {"*": rows}, **{"site": "output", **more})


# Rows over computed steps


def test_forecasts_that_rows_read_are_written_out() -> None:
    table = table_of(plan({1: Row((0,), (1.5,)), 3: Row((1, 2), (2.0, -1.0))}), ["cond"])
    expected = np.zeros((1, 4, 4))
    expected[0, 1, 0] = 1.5
    expected[0, 3, [0, 2]] = 3.0, -1.0
    assert table is not None
    np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize("seed", range(3))
def test_the_table_says_what_the_rows_do(seed: int) -> None:
    """Windows of the last steps, forecasts among them, as LESA's rows have, in two contexts."""
    print(f"seed {seed}")
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


# What does not fit


def test_what_is_read(tmp_path: Path) -> None:
    one = plan_of("reuse", (0, 2), SIGMAS)
    path = one.save(tmp_path / "mine.safetensors")
    first, second = read([one, path], budgets=[2])
    assert (first.name, first.plan) == ("candidate 0 (reuse, hidden site)", one)
    assert (second.name, second.plan.rows) == ("candidate 1 (mine.safetensors)", one.rows)
    assert read(None) == read([]) == []
    for wrong in (one, str(path), path):
        with pytest.raises(ValueError, match=r"candidates is one \w+: give a list"):
            read(wrong)
    with pytest.raises(ValueError, match=r"candidates\[1\] is a int: expected a Plan, the path of one, or"):
        read([one, 3])  # type: ignore[list-item]
    with pytest.raises(PlanError, match=r"missing\.safetensors"):
        read([tmp_path / "missing.safetensors"])
    with pytest.raises(ValueError, match=r"candidate 1 \(mine.safetensors\) computes 2 steps, .* asked for \(1, 3\)"):
        read([plan_of("reuse", (0,), SIGMAS), path], budgets=[3, 1])
    with pytest.raises(ValueError, match=r"effort='quick', which compares nothing"):
        read([one], "quick")


def test_names_of_forecasters(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    one = plan_of("reuse", (0, 2), SIGMAS)
    one.save(tmp_path / "reuse")
    known = [name.replace("<order>", "3").replace("<degree>", "5") for name in FORECASTERS]
    assert known[1:4] == ["taylor-3", "hermite-3", "chebyshev-5"]
    assert names_of([*known, one, "lesa", Path("reuse"), *known]) == [*known, "lesa"]
    assert [given.name for given in read(["reuse", "lesa", Path("reuse")], budgets=[2])] == ["candidate 2 (reuse)"]
    assert names_of(None) == names_of(["taylor-", "Taylor-1", "lesa ", "./lesa"]) == []
    with pytest.raises(ValueError, match=r"candidates\[1\]='taylor-16': order=16: expected 0 to 15"):
        names_of(["lesa", "taylor-16"])
    with pytest.raises(PlanError, match=r"plan 'tailor-1' does not exist.* are reuse, taylor-<order>, .*, lesa$"):
        read(["tailor-1"])
    with pytest.raises(ValueError, match="candidates is one str: give a list"):
        names_of("lesa")
    with pytest.raises(ValueError, match=r"effort='quick', which compares nothing"):
        read(["reuse"], "quick")


def test_misfits() -> None:
    grams = {"output": np.eye(8)}
    statistics = Statistics(
        SIGMAS,
        (4, 3, 2, 1),
        ("cond", "uncond"),
        (2.0, -1.0),
        grams,
        flow_impulse_response(SIGMAS),
        1,
        config_hash="abc",
    )
    one = plan_of("reuse", (0, 2), SIGMAS)
    assert misfit(one, statistics) is None and misfit(replace(one, config_hash="abc"), statistics) is None
    assert misfit(plan_of("reuse", (0, 2), SIGMAS[1:]), statistics) == "it was made for 3 steps, they have 4"
    shifted = plan_of("reuse", (0, 2), (1.0, 0.8, 0.5, 0.25, 0.0))
    assert misfit(shifted, statistics) == "its sigmas differ from theirs by up to 0.05"
    assert misfit(replace(one, config_hash="x"), statistics) == "its denoiser has configuration x, theirs abc"
    partial = replace(one, rows={"cond": one.rows["*"]})
    assert misfit(partial, statistics) == "it has no rows for context 'uncond'"
    with pytest.raises(ValueError, match="mine does not fit the requests: it has no rows for context 'uncond'; make"):
        candidates.check_requests([Given("mine", partial)], statistics)


# In a fit


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flux_dev()


@pytest.fixture(scope="module")
def fitted(pipe: Any) -> Plan:
    return fit(pipe)


@pytest.fixture
def short(monkeypatch: Any) -> None:
    """No more runs than are promised."""
    monkeypatch.setitem(EFFORTS, "default", dataclasses.replace(EFFORTS["default"], generations=3, share=0.65))


def fit(pipe: Any, given: Any = None, **more: Any) -> Plan:
    return lesa.fit(pipe, PROMPTS, **{"budget": 4, "request": REQUEST, "held_out": 0, "candidates": given, **more})


def scores(plan: Plan) -> dict[str, float]:
    """By name, the best of each."""
    return dict(sorted(map(tuple, plan.training["candidates"]), key=lambda pair: pair[1]))


def test_one_that_wins_is_returned_itself(pipe: Any, fitted: Plan, short: None, tmp_path: Path) -> None:
    mine = replace(fitted, forecaster="mine", expected={}, training={"note": 7, "seconds": -1.0})
    path = mine.save(tmp_path / "mine.safetensors")
    weak = plan_of("taylor-1", (0, 1, 2, 3), fitted.sigmas, "hidden")
    best = fit(pipe, [weak, path])
    names = ["published schedule, taylor-1", "candidate 0 (taylor-1, hidden site)", "candidate 1 (mine.safetensors)"]
    assert [name for name, _ in best.training["candidates"]] == [*names, "searched"]
    assert best.training["schedule"] == names[2]
    assert (best.computed, best.rows, best.checks, best.forecaster) == (mine.computed, mine.rows, mine.checks, "mine")
    assert best.training["note"] == 7 and best.training["seconds"] > 0
    assert best.training["fitting_psnr"] == max(scores(best).values()) == fitted.training["fitting_psnr"]
    assert best.training["evaluations"] == 4 and best.training["found"] == 0


def test_one_that_leads_is_bettered(pipe: Any, fitted: Plan, monkeypatch: Any) -> None:
    """Its last row reads a forecast too."""
    copied = dict(fitted.rows["*"])
    step = max(copied)
    copied[step] = Row((*copied[step].steps, min(copied)), (*copied[step].weights, 1e-3))
    mine = replace(fitted, rows={"*": copied})
    monkeypatch.setitem(EFFORTS, "default", dataclasses.replace(EFFORTS["default"], generations=14, share=0.65))
    best = fit(pipe, [mine])
    found = scores(best)
    assert best.training["fitting_psnr"] == max(found.values()) >= found["candidate 0 (fitted, output site)"]
    assert "candidate 0 (fitted, output site) +" in found


@pytest.mark.parametrize("request_", [REQUEST, {**REQUEST, "true_cfg_scale": 2.0, "negative_prompt": ""}])
def test_the_hidden_site_can_win(pipe: Any, fitted: Plan, monkeypatch: Any, request_: dict[str, Any]) -> None:
    hidden = plan_of("taylor-1", fitted.computed, fitted.sigmas, "hidden", denoiser="FluxTransformer2DModel")
    measure = Kept.measure

    def flattering(self: Kept, plan: Plan) -> Measured:
        measured = measure(self, plan)
        return replace(measured, psnr=measured.psnr + 50) if plan.site == "hidden" else measured

    monkeypatch.setattr(Kept, "measure", flattering)
    monkeypatch.setitem(EFFORTS, "default", dataclasses.replace(EFFORTS["default"], generations=14, share=0.65))
    best = fit(pipe, [hidden], request=request_)
    assert (best.site, best.rows["*"], best.forecaster) == ("hidden", hidden.rows["*"], "taylor-1")
    names = [name for name, _ in best.training["candidates"]]
    assert best.training["evaluations"] == len(names) == 7, "all runs are taken"
    assert "searched again +" in names, "the search goes on with the others"
    lesa.enable(pipe, best)
    try:
        pipe("a", output_type="latent", **request_)
        assert lesa.stats(pipe).computed == 4 * (1 if request_ is REQUEST else 2)
    finally:
        lesa.disable(pipe)


def test_what_the_guard_may_expect_of_it(pipe: Any, fitted: Plan, short: None) -> None:
    """Mean and spread of the logarithms of the errors that requests have one by one; here of the first context."""
    request = {**REQUEST, "true_cfg_scale": 2.0, "negative_prompt": ""}
    assert fitted.computed == (0, 3, 5, 6)
    checks = {"*": {step: Row((read,), (weight,)) for step, read, weight in ((3, 0, 1.0), (5, 3, 1.0), (6, 0, -1.0))}}
    mine = replace(fitted, checks=checks, expected={}, surrogate=None)
    prompts = [*PROMPTS, "a bird", "a dog"]
    best = lesa.fit(pipe, prompts, budget=4, request=request, held_out=0, candidates=[mine])
    assert best.training["schedule"].startswith("candidate 0"), "or this tests nothing"
    found: dict[int, list[float]] = {5: [], 6: []}  # of the first check, at step 3, nothing is expected
    for seed, prompt in enumerate(prompts):
        lesa.enable(pipe, best, guard=float("inf"))
        try:
            run_once(pipe, prompt, seed, request)
            stats = lesa.stats(pipe).guard
        finally:
            lesa.disable(pipe)
        assert stats is not None
        for step in found:
            found[step].append(math.log(stats.errors["cond"][step]))
    assert set(best.expected) == {"*", "cond", "uncond"} and best.expected["*"].keys() == found.keys()
    assert best.rows == dict.fromkeys(best.expected, mine.rows["*"]), (
        "named, or the guard would take them for another's"
    )
    for step, logs in found.items():
        expected = best.expected["*"][step]
        assert len(logs) == 4
        assert expected.error == pytest.approx(math.exp(statistics.mean(logs)), rel=1e-3)
        assert expected.std == pytest.approx(max(statistics.stdev(logs) * math.sqrt(5 / 4), 0.2), rel=1e-2)


def run_once(pipe: Any, prompt: str, seed: int, request: dict[str, Any]) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    pipe([prompt], generator=[generator], output_type="latent", **{**request, "negative_prompt": [""]})


def test_only_those_of_the_budget_are_run(pipe: Any, fitted: Plan, short: None) -> None:
    given = [plan_of("reuse", range(n), fitted.sigmas, "output") for n in (3, 4)]
    plans = fit(pipe, given, budget=[3, 4])
    for i, budget in enumerate((3, 4)):
        assert [name for name in scores(plans[budget]) if "candidate" in name] == [
            f"candidate {i} (reuse, output site)"
        ]
    [speedy] = [name for name in scores(fit(pipe, given[1:], budget=None, speedup=2.0)) if "candidate" in name]
    assert speedy == "candidate 0 (reuse, output site)"


def test_names_are_run_on_both_schedules(pipe: Any, short: None) -> None:
    rules = ["hermite-1", "taylor-1", "chebyshev-5"]
    best = fit(pipe, [*rules, rules[0]])
    wanted = [f"{schedule} schedule, {rule}" for schedule in ("published", "searched") for rule in rules]
    names = [name for name, _ in best.training["candidates"]]
    left_out = dict(map(tuple, best.training.get("skipped", ())))
    ran = [wanted[1], wanted[0], *wanted[2:]]  # the floor first
    assert [name for name in names if "schedule, " in name] == [name for name in ran if name not in left_out]
    assert set(left_out) <= set(wanted) and set(left_out.values()) <= {"it is the same as one that was run"}
    assert best.training["fitting_psnr"] == max(scores(best).values()) and best.training["names"] == rules
    floor = plan_of("hermite-1", published(8, 4)[0], best.sigmas, "output")
    own = scores(fit(pipe, [floor]))["candidate 0 (hermite-1, output site)"]
    assert own == pytest.approx(scores(best)["published schedule, hermite-1"], abs=1e-3)


def test_names_serve_any_budget(pipe: Any, short: None) -> None:
    least = fit(pipe, budget=3).training["fitting_psnr"] - 0.1
    best = fit(pipe, ["taylor-2"], budget=None, target_psnr=least)
    assert best.budget <= 3 and "published schedule, taylor-2" in scores(best)


def test_other_names_are_another_fit(pipe: Any, short: None, tmp_path: Path) -> None:
    fit(pipe, ["hermite-1"], folder=tmp_path)
    again = fit(pipe, ["taylor-2"], folder=tmp_path)
    assert again.training["found"] >= 2 and "published schedule, taylor-2" in scores(again)


def test_another_candidate_is_another_fit(pipe: Any, fitted: Plan, short: None, tmp_path: Path) -> None:
    one, other = (plan_of(rule, (0, 2, 4, 6), fitted.sigmas, "output") for rule in ("reuse", "taylor-1"))
    assert fit(pipe, [one], folder=tmp_path).training["found"] == 0
    path = tmp_path / "plan-4.safetensors"
    kept = path.read_bytes()
    fit(pipe, [one], folder=tmp_path)
    assert path.read_bytes() == kept
    again = fit(pipe, [other], folder=tmp_path)
    assert (again.training["found"], again.training["evaluations"]) == (2, 3) and path.read_bytes() != kept


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({}, {"budget": 3}, r"candidate 0 \(reuse, output site\) computes 4 steps, .* asked for \(3\)"),
        ({}, {"budget": [3, 5]}, r"candidate 0 .* computes 4 steps, .* asked for \(3, 5\)"),
        ({}, {"effort": "quick"}, "candidates with effort='quick', which compares nothing"),
        ({"config_hash": "x"}, {}, r"candidate 0 .* cannot be run: the plan was made for a Flux.* of another"),
        ({"denoiser": "Other"}, {}, r"candidate 0 .* cannot be run: the plan was made for Other"),
    ],
)
def test_what_is_wrong_is_found_before_anything_runs(
    pipe: Any, fitted: Plan, change: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    mine = replace(plan_of("reuse", (0, 1, 2, 3), fitted.sigmas, "output"), **change)
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the denoiser was run"))
    try:
        with pytest.raises(ValueError, match=message):
            fit(pipe, [mine], **more)
    finally:
        handle.remove()


def test_other_requests(pipe: Any, fitted: Plan) -> None:
    other = plan_of("reuse", (0, 1, 2, 3), tuple(1 - t / 9 for t in range(9)) + (0.0,), "output")
    with pytest.raises(ValueError, match=r"candidate 0 .* it was made for 9 steps, they have 8"):
        fit(pipe, [other])
    with pytest.raises(ValueError, match=r"candidate 0 .* computes 4 steps, .* asked for \(8\)"):
        fit(pipe, [plan_of("reuse", (0, 1, 2, 3), fitted.sigmas)], budget=None, speedup=1.01)


def test_one_whose_forecasts_are_refused_is_named(pipe: Any, fitted: Plan, short: None) -> None:
    """It would be measured with more than its computed steps."""
    rows = {step: Row((0,), (1e38,)) for step in range(4, 8)}
    wild = Plan((0, 1, 2, 3), fitted.sigmas, {"*": rows}, site="output")
    with pytest.raises(ValueError, match=r"candidate 0 .* computes more than its 4 steps: the forecast was not finite"):
        fit(pipe, [wild])
