"""compare: methods start from the same noise, figures come from the plans, the smallest budget reaches all targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipelines import CASES_BY_NAME, PROMPTS

import lesa
from lesa import metrics
from lesa.evaluation.compare import (
    BUDGETS,
    BudgetResult,
    Method,
    budget_results,
    budgets_below,
    compare,
    frontier_table,
    smallest_budget,
)
from lesa.forecasters import plan_of
from lesa.plans.plan import Plan

STEPS = 20
SIGMAS = tuple(1 - t / STEPS for t in range(STEPS)) + (0.0,)
# not rising: at 6 the fit had bad luck with its held-out prompt
RESULTS = [
    BudgetResult(4, 0.2, 20.0, 21.0, 0.80, 0.82, "plan-4.safetensors", {"published schedule, taylor-1": 12.0}),
    BudgetResult(5, 0.25, 26.0, 25.0, 0.88, 0.90, "plan-5.safetensors", {"published schedule, taylor-1": 15.0}),
    BudgetResult(6, 0.3, 28.0, 23.0, 0.95, 0.86, "plan-6.safetensors", {"published schedule, taylor-1": 14.0}),
    BudgetResult(9, 0.45, 33.0, 31.0, 0.97, 0.94, "plan-9.safetensors", {"published schedule, reuse": 11.0}),
]


def fitted(budget: int, **figures: Any) -> Plan:
    return plan_of("reuse", range(budget), SIGMAS, "output", training=figures)


def test_compare_starts_every_method_from_the_same_noise() -> None:
    case = CASES_BY_NAME["flux_schnell"]
    pipe = case.make()
    request = {"height": 32, "width": 32, "max_sequence_length": 12, "num_inference_steps": 4}
    sigmas = (1.0, 0.75, 0.5, 0.25, 0.0)
    everything = plan_of("reuse", range(4), sigmas)
    half = plan_of("reuse", (0, 2), sigmas)
    methods = [Method("full", None, 4), Method("all", everything, 4), Method("half", half, 4), Method("few", None, 2)]
    full, same, reuse, few = results = compare(pipe, methods, PROMPTS[:2], [3, 4], request, progress=False)
    assert [result.method.computed for result in results] == [4, 4, 2, 2]
    assert np.array_equal(full.images, same.images) and np.isinf(same.psnr).all() and (same.ssim == 1).all()
    assert full.images.shape == (2, 32, 32, 3) and not np.array_equal(full.images[0], full.images[1])
    assert np.array_equal(reuse.psnr, metrics.psnr(reuse.images, full.images)) and np.isfinite(reuse.psnr).all()
    assert not same.step_errors.any() and reuse.step_errors[0] == 0 and (reuse.step_errors[1:] > 0).all()
    assert few.step_errors is None and all(len(result.seconds) == 1 for result in results)
    assert full.flops >= same.flops > 1.5 * reuse.flops > 0
    row = reuse.row(full)
    assert row["flops_speedup"] == full.flops / reuse.flops and row["psnr"] == reuse.psnr.mean()
    assert full.row(full)["psnr"] is None

    lesa.enable(pipe, half)
    with pytest.raises(ValueError, match="enabled"):
        compare(pipe, methods, PROMPTS[:2], [3, 4], request, progress=False)


def test_results_hold_what_fitting_measured() -> None:
    candidates = [["published schedule, taylor-1", 18.5], ["searched", 24.0], ["Paper, taylor-1", 17.0]]
    candidates += [["(0, 3, 7)", 23.0], ["Paper, taylor-1", 17.5], ["Paper, taylor-1", 16.0]]
    ten = fitted(10, fitting_psnr=25.5, held_out_psnr=24.5, fitting_ssim=0.9, held_out_ssim=0.8, candidates=candidates)
    first, second = budget_results({10: ten, 4: fitted(4, fitting_psnr=None, held_out_psnr=19.0)})
    assert first == BudgetResult(4, 0.2, None, 19.0, None, None, "plan-4.safetensors")
    assert second == BudgetResult(
        10, 0.5, 25.5, 24.5, 0.9, 0.8, "plan-10.safetensors",
        {"published schedule, taylor-1": 18.5, "Paper, taylor-1": 17.5},
    )  # fmt: skip
    assert (first.psnr, first.ssim) == (19.0, None)
    assert (second.psnr, second.ssim) == (24.5, 0.8)
    assert BudgetResult(3, 0.5, fitting_psnr=2.0, held_out_psnr=3.0).psnr == 2.0


def test_smallest_budget() -> None:
    targets: list[tuple[dict[str, float], int]] = [
        ({"psnr": 20.0}, 4),
        ({"psnr": 20.1}, 5),
        ({"psnr": 25.1}, 9),
        ({"psnr": 31.0}, 9),
        ({"ssim": 0.88}, 5),
        ({"psnr": 18.0, "ssim": 0.85}, 5),
        ({"psnr": 25.1, "ssim": 0.1}, 9),
    ]
    for target, budget in targets:
        assert smallest_budget(RESULTS, **target) == budget
        assert smallest_budget(RESULTS[::-1], **target) == budget, "the order of the results does not matter"
    results = [BudgetResult(4, 0.2), BudgetResult(5, 0.25, fitting_psnr=30.0), BudgetResult(6, 0.3, held_out_psnr=40.0)]
    assert (smallest_budget(results, psnr=29), smallest_budget(results, psnr=31)) == (5, 6), "None is left out"


def test_smallest_budget_says_how_far_the_best_gets() -> None:
    for results, target, message in [
        (RESULTS, {}, "psnr=None, ssim=None"),
        (RESULTS, {"psnr": 31.5}, "psnr=31.5: .*the best is 31 at 9 computed steps"),
        (RESULTS[:3], {"ssim": 0.9}, "ssim=0.9: .*the best is 0.88 at 5 computed steps"),
        (RESULTS, {"psnr": float("nan")}, "psnr=nan"),
        ([BudgetResult(4, 0.2, 20.0)], {"psnr": 10.0, "ssim": 0.5}, "ssim=0.5"),
        ([], {"psnr": 10.0}, "psnr=10"),
        (
            [BudgetResult(4, 0.2, 30.0, fitting_ssim=0.5), BudgetResult(5, 0.25, 20.0, fitting_ssim=0.9)],
            {"psnr": 25.0, "ssim": 0.8},
            "psnr=25, ssim=0.8",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            smallest_budget(results, **target)


def test_budgets_below() -> None:
    assert budgets_below(50) == list(range(4, 26)) == list(BUDGETS)
    assert budgets_below(8) == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="num_steps=4"):
        budgets_below(4)


def test_frontier_table() -> None:
    results = [*RESULTS, BudgetResult(10, 0.5, None, 32.0, plan="plan-10.safetensors")]
    heading, first, *_, last = frontier_table(results, "out").split("\n")
    assert heading.split() == ["computed", "share", "published", "fitting", "held", "out", "SSIM", "plan"]
    assert first.split() == ["4", "20%", "12.00", "20.00", "21.00", "0.8000", str(Path("out/plan-4.safetensors"))]
    assert last.split() == ["10", "50%", "-", "-", "32.00", "-", str(Path("out/plan-10.safetensors"))]
    assert heading.index("plan") == first.index("out/") == last.index("out/"), "columns are to be aligned"
