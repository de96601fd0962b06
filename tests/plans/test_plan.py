"""Plans: what is refused, files that give back every bit or one clear error, and slots that lose nothing."""

from __future__ import annotations

import json
import math
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import CASES_BY_NAME
from safetensors import safe_open
from safetensors.numpy import save as serialize_numpy

import lesa
from lesa import assets
from lesa.forecasters import plan_of
from lesa.models import hooks
from lesa.models.layouts import check_fit, config_hash
from lesa.plans.plan import Plan
from lesa.plans.rows import ANY_CONTEXT, MAX_READS, Expected, PlanError, Row
from lesa.plans.schedule import PAPER_STAGES
from lesa.runtime.clock import Call, Request
from lesa.runtime.runner import PlanRunner

FLUX = CASES_BY_NAME["flux_dev"]
SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)
ROWS = {1: Row((0,), (1.0,)), 3: Row((0, 1, 2), (0.5, -1.0, 1.5), 0.25)}


def small(**changes: Any) -> Plan:
    return Plan(**{"computed": (0, 2), "sigmas": SIGMAS, "rows": {"*": ROWS}, **changes})


def random_plan(rng: random.Random, steps: int | None = None) -> Plan:
    """Any schedule, one to three contexts, rows of 1 to 16 reads of any earlier steps in any order."""
    total = steps or rng.randint(2, 40)
    computed = (0, *sorted(rng.sample(range(1, total), rng.randint(0, total - 1))))
    names = rng.sample(("cond", "uncond", "*"), rng.randint(1, 3))
    rows: dict[str, dict[int, Row]] = {name: {} for name in names}
    for name in names:
        for step in set(range(total)) - set(computed):
            reads = tuple(rng.sample(range(step), rng.randint(1, min(step, MAX_READS))))
            rows[name][step] = Row(reads, tuple(rng.gauss(0, 1) for _ in reads), rng.choice((0.0, rng.gauss(0, 1))))
    sigmas = (*sorted((rng.random() for _ in range(total)), reverse=True), 0.0)
    return Plan(computed, sigmas, rows)


# Validation


def test_every_misplaced_value_is_named() -> None:
    for changes, message in [
        ({"sigmas": ()}, "sigmas"),
        ({"sigmas": (1.0,)}, "sigmas"),
        ({"sigmas": (1.0, float("nan"), 0.5, 0.25, 0.0)}, "sigmas.*finite"),
        ({"sigmas": (float("inf"), 0.75, 0.5, 0.25, 0.0)}, "sigmas.*finite"),
        ({"computed": ()}, r"computed=\(\).*first of them 0"),
        ({"computed": (1, 2)}, r"computed=\(1, 2\).*first of them 0"),
        ({"computed": (2, 0)}, r"computed=\(2, 0\).*ascending"),
        ({"computed": (0, 2, 2)}, r"computed=\(0, 2, 2\).*ascending"),
        ({"computed": (0, 2, 4)}, "computed step 4.*4 steps"),
        ({"site": "middle"}, r"site='middle'.*hidden.*output"),
        ({"timesteps": (1.0, 0.5)}, "timesteps="),
        ({"rows": {}}, "rows is empty"),
        ({"rows": {"cond": {1: ROWS[1]}}}, r"context 'cond'.*\[3\]"),
        ({"rows": {"*": ROWS, "cond": {}}}, r"context 'cond'.*\[1, 3\]"),
        ({"rows": {"*": {**ROWS, 2: Row((0,), (1.0,))}}}, "step 2.*computed"),
        ({"rows": {"*": {**ROWS, 4: Row((0,), (1.0,))}}}, "step 4.*outside"),
        ({"rows": {"*": {**ROWS, -1: Row((0,), (1.0,))}}}, "step -1.*outside"),
        ({"rows": {"*": {**ROWS, 1: Row((), ())}}}, "step 1: 0 steps and 0 weights"),
        ({"rows": {"*": {**ROWS, 1: Row((0,), (1.0, 2.0))}}}, "step 1: 1 steps and 2 weights"),
        ({"rows": {"*": {**ROWS, 3: Row((0,) * 17, (1.0,) * 17)}}}, "step 3: 17 steps.*1 to 16"),
        ({"rows": {"*": {**ROWS, 3: Row((3,), (1.0,))}}}, r"step 3: reads steps \(3,\).*earlier"),
        ({"rows": {"*": {**ROWS, 1: Row((2,), (1.0,))}}}, r"step 1: reads steps \(2,\).*earlier"),
        ({"rows": {"*": {**ROWS, 1: Row((-1,), (1.0,))}}}, r"step 1: reads steps \(-1,\).*earlier"),
        ({"rows": {"*": {**ROWS, 1: Row((0,), (float("nan"),))}}}, "step 1: weights.*finite"),
        ({"rows": {"*": {**ROWS, 1: Row((0,), (1.0,), float("inf"))}}}, "step 1: .*bias inf.*finite"),
    ]:
        small()
        with pytest.raises(PlanError, match=message):
            small(**changes)


def test_figures_of_a_plan() -> None:
    plan = small()
    assert (plan.num_steps, plan.budget) == (4, 2)
    assert plan.rows_of("cond") == ROWS
    own = {1: ROWS[1], 3: Row((2,), (1.0,))}
    assert small(rows={"cond": own, ANY_CONTEXT: ROWS}).rows_of("cond") == own
    assert small(rows={"cond": own, ANY_CONTEXT: ROWS}).rows_of("uncond") == ROWS
    assert small(rows={"cond": own}).rows_of("uncond") == {}


def test_all_computed_needs_no_rows(tmp_path: Path) -> None:
    for rows in ({}, {"cond": {}}):
        plan = Plan((0, 1, 2, 3), SIGMAS, rows)
        assert plan.capacity == 0
        assert plan.slots == (-1,) * 4
        assert replace(Plan.load(plan.save(tmp_path / "plan")), library_version=None) == plan


# Files


def bits(plan: Plan) -> Any:
    """Every number of a plan as bits, so that 0.0 and -0.0 differ."""

    def pack(*values: float) -> bytes:
        return struct.pack(f"{len(values)}d", *values)

    rows = {
        context: {s: (row.steps, pack(*row.weights), pack(row.bias)) for s, row in by_step.items()}
        for context, by_step in plan.rows.items()
    }
    return plan.computed, pack(*plan.sigmas), rows, plan.timesteps and pack(*plan.timesteps)


def test_round_trip_is_bit_exact(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        plan = random_plan(rng)
        odd = [-0.0, 5e-324, 1.7976931348623157e308, 0.1, -1 / 3]
        rows = {
            c: {s: replace(r, weights=(rng.choice(odd), *r.weights[1:])) for s, r in by.items()}
            for c, by in plan.rows.items()
        }
        plan = replace(
            plan,
            rows=rows,
            site=rng.choice(("hidden", "output")),
            forecaster="lesa",
            timesteps=rng.choice((None, tuple(1000 * s for s in plan.sigmas[:-1]))),
            denoiser="FluxTransformer2DModel",
            config_hash="0123456789abcdef",
            stages=PAPER_STAGES,
            training={"psnr": 31.25, "alphas": {"*": [None, 0.1]}, "note": "é 日本"},
        )
        loaded = Plan.load(plan.save(tmp_path / "plan.safetensors"))
        assert bits(loaded) == bits(plan)
        assert loaded.library_version == lesa.__version__
        assert replace(loaded, library_version=None) == plan


def test_saving_a_loaded_plan_gives_the_same_bytes(tmp_path: Path, seed: int) -> None:
    first = random_plan(random.Random(seed)).save(tmp_path / "a")
    assert Plan.load(first).save(tmp_path / "b").read_bytes() == first.read_bytes()


def rewritten(plan: Plan, folder: Path, change: Any) -> Path:
    """A saved plan with something changed inside."""
    path = plan.save(folder / "plan.safetensors")
    with safe_open(path, framework="np") as file:
        description = json.loads(file.metadata()["lesa"])
        del description["checksum"]  # as older files, which have none
        arrays = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
    change(arrays, description)
    path.write_bytes(serialize_numpy(arrays, {"lesa": json.dumps(description)}))
    return path


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert path.name in str(caught.value)


def test_truncated_anywhere(tmp_path: Path) -> None:
    data = small().save(tmp_path / "plan").read_bytes()
    path = tmp_path / "short"
    for length in (*range(0, len(data), 97), len(data) - 1):
        path.write_bytes(data[:length])
        assert_refused(path, "cannot be read")


def test_changed_bytes_give_a_valid_plan_or_one_clear_error(tmp_path: Path, seed: int) -> None:
    """Numbers may change unnoticed, but nothing other than a PlanError may come out of a damaged file."""
    rng = random.Random(seed)
    data = small(timesteps=(4, 3, 2, 1), stages=PAPER_STAGES, training={"a": 1}).save(tmp_path / "plan").read_bytes()
    path = tmp_path / "damaged"
    refused = 0
    for position in range(0, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            Plan.load(path)
        except PlanError as error:
            assert "damaged" in str(error)  # the file's name
            refused += 1
    assert refused > len(data) // 9


def test_missing_array(tmp_path: Path) -> None:
    for name in ["computed", "sigmas", "steps", "weights", "bias"]:
        assert_refused(rewritten(small(), tmp_path, lambda arrays, _, name=name: arrays.pop(name)), "incomplete")


def test_missing_description(tmp_path: Path) -> None:
    for name in ["contexts", "num_steps", "stages", "site", "training"]:
        assert_refused(rewritten(small(), tmp_path, lambda _, text, name=name: text.pop(name)), "incomplete")


def test_row_that_reads_the_future_is_refused_on_load(tmp_path: Path) -> None:
    def change(arrays: dict[str, np.ndarray], _: Any) -> None:
        arrays["steps"][0, 1, 0] = 3

    with pytest.raises(PlanError, match="earlier"):
        Plan.load(rewritten(small(), tmp_path, change))


# Slots


def test_slots_lose_nothing_and_waste_nothing(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        plan = random_plan(rng)
        readers = {step: [0] for step in range(plan.num_steps)}
        for rows in plan.rows.values():
            for step, row in rows.items():
                for read in row.steps:
                    readers[read].append(step)
        last = {step: max(by) for step, by in readers.items()}
        for read in range(plan.num_steps):
            assert (plan.slots[read] >= 0) == (last[read] > 0)
            between = range(read + 1, last[read])
            assert plan.slots[read] < 0 or all(plan.slots[s] != plan.slots[read] for s in between), (plan, read)
        alive = [sum(last[early] > now for early in range(now + 1)) for now in range(plan.num_steps)]
        assert plan.capacity == max(alive)


def test_runner_equals_brute_force_that_keeps_everything(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        plan = random_plan(rng)
        runner = PlanRunner(plan)
        for _request in range(2):
            request = Request(plan.num_steps, plan.sigmas)
            runner.begin(request)
            kept: dict[str, list[torch.Tensor]] = {"cond": [], "uncond": []}
            for step in range(plan.num_steps):
                for context in kept:
                    if not plan.rows_of(context) and plan.budget < plan.num_steps:
                        continue
                    call = Call(context, step, None, torch.zeros(1), request, False)
                    coming = runner.forecast(call)
                    assert (coming is None) == (step in plan.computed)
                    if coming is None:
                        actual = torch.randn(3, 2, dtype=torch.float64)
                        runner.keep(call, actual)
                        kept[context].append(actual.clone())
                        continue
                    actual = coming.feature()
                    row = plan.rows_of(context)[step]
                    terms = [w * kept[context][s] for w, s in zip(row.weights, row.steps, strict=True)]
                    size = sum(term.abs().max() for term in terms) + abs(row.bias)
                    assert (actual - (sum(terms) + row.bias)).abs().max() <= 1e-14 * size, (plan, step, context)
                    kept[context].append(actual.clone())
        assert not runner.stats.refused


# Joining


def test_join_keeps_the_rows_of_each_context(tmp_path: Path) -> None:
    other = {1: Row((0,), (0.5,), 1.0), 3: Row((2,), (2.0,))}
    first = small(training={"loss": 1, "alphas": {"*": [0.5]}})
    second = small(rows={"*": other}, training={"loss": 1, "alphas": {"*": [0.7]}})
    joined = Plan.join({"cond": first, "uncond": second})
    assert joined.rows_of("cond") == ROWS
    assert joined.rows_of("uncond") == other
    assert joined.rows_of("third") == {}
    assert joined.training == {"loss": 1, "alphas": {"cond": [0.5], "uncond": [0.7]}}
    assert replace(Plan.load(joined.save(tmp_path / "joined")), library_version=None) == joined


def test_join_takes_a_context_out_of_a_plan_that_names_it() -> None:
    own = {1: ROWS[1], 3: Row((2,), (3.0,))}
    assert Plan.join({"cond": small(rows={"cond": own, "*": ROWS})}).rows_of("cond") == own


def test_join_refuses_plans_that_differ() -> None:
    for name, other in [
        ("computed", small(computed=(0, 1, 2), rows={"*": {3: ROWS[3]}})),
        ("sigmas", small(sigmas=(1.0, 0.75, 0.5, 0.3, 0.0))),
        ("site", small(site="output")),
        ("denoiser", small(denoiser="Another")),
    ]:
        with pytest.raises(PlanError, match=f"differ in {name} at"):
            Plan.join({"cond": small(), "uncond": other})


def test_join_of_nothing() -> None:
    with pytest.raises(PlanError, match="empty"):
        Plan.join({})


# Plans for another model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": "WanTransformer3DModel"}, "made for WanTransformer3DModel but this denoiser is a Flux"),
        ({"config_hash": "feedfacefeedface"}, "another configuration.*feedfacefeedface"),
    ],
)
def test_plan_of_another_model_is_refused_with_nothing_half_enabled(changes: dict[str, Any], message: str) -> None:
    pipe = FLUX.make()
    own = small(denoiser="FluxTransformer2DModel", config_hash=config_hash(pipe.transformer))
    check_fit(own, pipe.transformer)
    check_fit(small(), pipe.transformer)
    other = replace(own, **changes)
    with pytest.raises(PlanError, match=message):
        check_fit(other, pipe.transformer)
    for target in (pipe, pipe.transformer):
        with pytest.raises(PlanError, match=message):
            lesa.enable(target, other)
        assert hooks.attached(target) is None
        assert not any(hasattr(module, "_diffusers_hook") for module in pipe.transformer.modules())
    lesa.enable(pipe, own)
    root = hooks.attached(pipe)
    with pytest.raises(PlanError, match=message):
        lesa.enable(pipe, other)
    assert hooks.attached(pipe) is root


def test_config_hash_tells_configurations_apart() -> None:
    first, same, other = FLUX.make(), FLUX.make(), CASES_BY_NAME["flux_schnell"].make()
    assert config_hash(first.transformer) == config_hash(same.transformer)
    assert config_hash(first.transformer) != config_hash(other.transformer)
    assert config_hash(torch.nn.Linear(1, 1)) is None


def taylor(computed: tuple[int, ...], total: int, **changes: Any) -> Plan:
    plan = plan_of("taylor-1", computed, tuple(1 - i / total for i in range(total + 1)), "output")
    return replace(plan, **changes)


def with_random_checks(plan: Plan, rng: random.Random) -> Plan:
    checks: dict[str, dict[int, Row]] = {context: {} for context in plan.rows}
    for by_step in checks.values():
        for step in plan.computed[1:]:
            if rng.random() < 0.7:
                reads = tuple(rng.sample(range(step), rng.randint(1, min(step, 6))))
                by_step[step] = Row(reads, tuple(rng.gauss(0, 1) for _ in reads), rng.gauss(0, 1))
    return replace(plan, checks=checks)


def test_every_misplaced_check_is_named() -> None:
    for checks, expected, message in [
        ({1: Row((0,), (1.0,))}, {}, "check of context 'c', step 1: the step is not computed"),
        ({0: Row((0,), (1.0,))}, {}, "check of context 'c', step 0: reads steps"),
        ({2: Row((2,), (1.0,))}, {}, "check of context 'c', step 2: reads steps"),
        ({2: Row((0,), (math.inf,))}, {}, "check of context 'c', step 2: weights"),
        (
            {2: Row((0,), (1.0,))},
            {3: Expected(1.0, 1.0)},
            "expected error of context 'c', step 3: the step has no check",
        ),
        ({2: Row((0,), (1.0,))}, {2: Expected(-1.0, 1.0)}, "expected error of context 'c', step 2 is .*error=-1.0"),
        ({2: Row((0,), (1.0,))}, {2: Expected(1.0, 0.0)}, "expected error of context 'c', step 2 is .*std=0.0"),
        ({2: Row((0,), (1.0,))}, {2: Expected(math.nan, 1.0)}, "expected error of context 'c', step 2 is .*error=nan"),
    ]:
        with pytest.raises(PlanError, match=message):
            taylor((0, 2), 4, checks={"c": checks}, expected={"c": expected})


def test_round_trip_and_joining(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        plan = with_random_checks(random_plan(rng), rng)
        errors = {
            c: {s: Expected(rng.random(), 0.1 + rng.random()) for s in by if rng.random() < 0.8}
            for c, by in plan.checks.items()
        }
        plan = replace(plan, expected=errors)
        loaded = Plan.load(plan.save(tmp_path / "plan"))
        assert replace(loaded, library_version=None) == plan
        again = Plan.join(dict.fromkeys(plan.rows, plan))
        for context in plan.rows:
            assert again.checks_of(context) == plan.checks_of(context)
            assert again.expected_of(context) == plan.expected_of(context)


@pytest.mark.parametrize("name", ["error", "spread", "timesteps"])
def test_a_damaged_file_blinds_no_check(name: str, tmp_path: Path) -> None:
    plan = Plan.load(assets.fitted_path(10))
    plan = replace(plan, timesteps=plan.sigmas[:-1])
    path = rewritten(plan, tmp_path, lambda arrays, _: arrays[name].fill(math.nan))
    with pytest.raises(PlanError):
        Plan.load(path)


def test_files_from_before_there_were_checks(tmp_path: Path) -> None:
    plan = taylor((0, 2), 4, checks={"*": {2: Row((0,), (1.0,))}}, expected={"*": {2: Expected(0.5, 0.3)}})

    def largest(arrays: dict[str, np.ndarray], _: Any) -> None:
        assert np.nanmax(arrays["error"]) == 0.5 and np.nanmax(arrays["spread"]) == 0.3
        del arrays["spread"]
        arrays["expected"] = arrays.pop("error")

    def none(arrays: dict[str, np.ndarray], description: dict[str, Any]) -> None:
        for name in [name for name in arrays if name.startswith(("error", "spread", "check_"))]:
            del arrays[name]
        del description["check_contexts"], description["expected_contexts"]

    loaded = Plan.load(rewritten(plan, tmp_path, largest))
    assert (loaded.checks, loaded.expected) == (plan.checks, {})
    loaded = Plan.load(rewritten(plan, tmp_path, none))
    assert (loaded.checks, loaded.expected, loaded.rows) == ({}, {}, plan.rows)


# Words


def test_drawing_is_in_tens_and_fifties() -> None:
    assert small().drawing() == ["#.#."]
    lines = taylor((*range(4), *range(7, 120, 7)), 120).drawing()
    assert [len(line) for line in lines] == [54, 54, 21]
    assert lines[0].startswith("####...#.. ....#.....")
    assert "".join(lines).replace(" ", "").count("#") == len({*range(4), *range(0, 120, 7)})


def test_summary_tells_known_figures_first_and_then_scalars_only() -> None:
    training = {
        "alphas": {"*": [0.1]},
        "budget": 2,
        "gains": [0.5],
        "interval": 7,
        "rate": 0.123456789,
        "prompts": ["a", "b"],
        "seconds": 41.23,
        "held_out_psnr": 32.499,
        "fitting_psnr": float("inf"),
        "fitting_ssim": 0.99987,
        "calibrated": None,
        "a name that is long": "x" * 200,
    }
    plan = small(training=training)
    assert plan.figures()[:-1] == [
        ("fitting", "inf dB PSNR"),
        ("fitting", "0.9999 SSIM"),
        ("held out", "32.50 dB PSNR"),
        ("prompts", "2"),
        ("fitting time", "41.2 s"),
        ("interval", "7"),
        ("rate", "0.1235"),
    ]
    name, value = plan.figures()[-1]
    assert name == "a name that is long" and len(value) < 100
    told = plan.summary()
    assert all(value in told for _, value in plan.figures()) and small().figures() == []
