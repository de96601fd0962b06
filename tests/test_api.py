"""enable, disable, stats and the handle: every way into and out of a `with` block leaves the denoiser whole."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from pipelines import CASES_BY_NAME
from torch import Tensor, nn
from written import statistics

import lesa
from lesa.forecasters import plan_of
from lesa.models import hooks
from lesa.plans.plan import Plan
from lesa.plans.rows import PlanError
from lesa.runtime.clock import sigmas_of

FLUX = CASES_BY_NAME["flux_dev"]
INNER, OUTER = "taylor-1", "reuse"


class StopError(Exception):
    """A user's own; of the builtin ones a forward with stand-ins may be the cause, so that step is computed instead."""


ERRORS = (StopError, KeyboardInterrupt)


@functools.cache
def plan(name: str, site: str) -> Plan:
    pipe = FLUX.make()
    FLUX.call(pipe)
    return plan_of(name, (0, 1, 4, 7), sigmas_of(pipe.scheduler), site)


@functools.cache
def by(name: str | None, site: str) -> Tensor:
    """What a request gives on a fresh pipeline, under a plan or untouched."""
    pipe = FLUX.make()
    if name is not None:
        lesa.enable(pipe, plan(name, site))
    return FLUX.call(pipe)


@pytest.fixture(scope="module")
def shared() -> Any:
    return FLUX.make()


@pytest.fixture
def pipe(shared: Any) -> Any:
    """One pipeline for all tests, each of which must leave it as it was."""
    yield shared
    check(shared, None, "output")


@pytest.fixture(params=["hidden", "output"])
def site(request: Any) -> str:
    return request.param


def traces(pipe: Any) -> list[str]:
    """What is found of lesa anywhere in the denoiser; diffusers leaves an empty registry of its own."""
    found = []
    for name, module in pipe.transformer.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        owned = [*vars(module).values(), *(registry.hooks.values() if registry is not None else ())]
        found += [f"{name}: {type(value)}" for value in owned if type(value).__module__.startswith("lesa")]
        found += [f"{name}: forward"] if "forward" in vars(module) else []
    return found


def check(pipe: Any, name: str | None, site: str) -> None:
    """The pipeline runs by this plan, or is untouched, bit for bit."""
    if name is None:
        assert hooks.attached(pipe) is None and not traces(pipe)
    else:
        assert lesa.stats(pipe) is not None
    assert torch.equal(FLUX.call(pipe), by(name, site))


class Bomb:
    """Does something once, at the n-th call of a module."""

    def __init__(self, module: nn.Module, call: int, action: Any) -> None:
        self._left, self._action = call, action
        self._handle = module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self._left -= 1
        if self._left == 0:
            self._handle.remove()
            self._action()


def interrupt(pipe: Any, where: str, error: type[BaseException]) -> None:
    """A request that ends in an error: inside of a block, in the head of a forecast step, or in the callback."""

    def fail(*_: Any) -> Any:
        raise error("interruption")

    with pytest.raises(error, match="interruption"):
        if where == "callback":
            FLUX.call(pipe, callback_on_step_end=lambda _, step, __, kwargs: fail() if step == 2 else kwargs)
        elif where == "block":
            Bomb(pipe.transformer.single_transformer_blocks[-1].attn, 3, fail)
            FLUX.call(pipe)
        else:
            Bomb(pipe.transformer.norm_out, 3, fail)
            FLUX.call(pipe)


def raise_in(pipe: Any, where: str, error: type[BaseException]) -> None:
    """As `interrupt`, but nobody catches it."""
    interrupt(pipe, where, error)
    raise error("interruption")


# One block


def test_a_block_runs_the_plan_and_leaves_nothing(pipe: Any, site: str) -> None:
    with lesa.enable(pipe, plan(INNER, site)) as run:
        assert run.plan is plan(INNER, site) and run.stats.requests == 0
        check(pipe, INNER, site)
        assert run.stats is lesa.stats(pipe)
    check(pipe, None, site)
    assert (run.stats.requests, run.stats.computed, run.stats.forecast) == (1, 4, 4)
    assert run.plan is plan(INNER, site)
    with pytest.raises(ValueError, match="lesa is not enabled"):
        lesa.stats(pipe)


def test_a_handle_without_a_block(pipe: Any, site: str) -> None:
    run = lesa.enable(pipe, plan(INNER, site))
    check(pipe, INNER, site)
    run.disable()
    check(pipe, None, site)
    run.disable()
    lesa.disable(pipe)
    assert run.stats.forecast == 4


def test_a_block_after_a_warm_run(pipe: Any, site: str) -> None:
    for _ in range(2):
        FLUX.call(pipe)
        with lesa.enable(pipe, plan(INNER, site)):
            check(pipe, INNER, site)
            check(pipe, INNER, site)
        check(pipe, None, site)


def test_a_bare_denoiser_and_its_pipeline_are_one(pipe: Any, site: str) -> None:
    with lesa.enable(pipe.transformer, plan(INNER, site)):
        check(pipe, INNER, site)
        with lesa.enable(pipe, plan(OUTER, site)):
            check(pipe, OUTER, site)
        check(pipe, INNER, site)
    check(pipe, None, site)


def test_the_plan_of_a_handle_is_that_of_the_latest_request(pipe: Any) -> None:
    with lesa.enable(pipe, statistics(), budget=4) as run:
        FLUX.call(pipe, steps=12)
        assert (run.plan.num_steps, run.plan.budget) == (12, 4)
        assert len(run.stats.checks) >= 0 and run.stats.forecast == 8
    assert run.plan.num_steps == 12


# Without a plan


@pytest.mark.parametrize(("budget", "computed"), [(None, (4, 6)), (3, (3, 3)), (0.5, (6, 10)), (1, (1, 1))])
def test_the_handle_without_a_plan(pipe: Any, budget: float | None, computed: tuple[int, int]) -> None:
    with lesa.enable(pipe, budget=budget) as run:
        assert run.plan is None and (run.stats.requests, run.stats.computed) == (0, 0)
        for number, steps in zip(computed, (12, 20), strict=True):
            FLUX.call(pipe, steps=steps)
            assert (run.plan.num_steps, run.plan.budget, run.plan.site) == (steps, number, "output")
        assert run.stats is lesa.stats(pipe) and not run.stats.refused
        assert (run.stats.requests, run.stats.computed, run.stats.forecast) == (2, sum(computed), 32 - sum(computed))
    check(pipe, None, "output")
    assert run.plan.num_steps == 20


def test_a_bare_denoiser_without_a_plan_is_its_pipeline(pipe: Any) -> None:
    FLUX.call(pipe, steps=12)
    levels = sigmas_of(pipe.scheduler)
    with lesa.enable(pipe, budget=5):
        expected = FLUX.call(pipe, steps=12)
    with lesa.enable(pipe.transformer, budget=5, sigmas=levels) as run:
        torch.testing.assert_close(FLUX.call(pipe, steps=12), expected, rtol=1e-4, atol=1e-4)
        assert run.plan.sigmas == levels and run.plan.budget == 5 and run.stats.forecast == 7
        with pytest.raises(PlanError, match="sigmas"):
            FLUX.call(pipe, steps=13)
    with lesa.enable(pipe.transformer, statistics(), budget=5, sigmas=levels) as run:
        FLUX.call(pipe, steps=12)
        assert run.plan.sigmas == levels and run.stats.computed == 5
    check(pipe, None, "output")


def test_what_is_no_budget_enables_nothing(pipe: Any) -> None:
    for wrong in [0, -3, 0.0, 1.5, True, "4", float("nan")]:
        with lesa.enable(pipe, plan(OUTER, "hidden")):
            for target, more in ((pipe, {}), (pipe.transformer, {"sigmas": (1.0, 0.5, 0.0)})):
                with pytest.raises(ValueError, match="budget="):
                    lesa.enable(target, budget=wrong, **more)
            check(pipe, OUTER, "hidden")


def test_what_are_no_sigmas_enables_nothing(pipe: Any) -> None:
    for wrong in [[], [1.0], [1.0, 0.5], [0.5, 1.0, 0.0], [1.0, float("nan"), 0.0], 5, "1, 0"]:
        with pytest.raises(ValueError, match="sigmas"):
            lesa.enable(pipe.transformer, sigmas=wrong)
        with pytest.raises(ValueError, match="sigmas"):
            lesa.enable(pipe, sigmas=[1.0, 0.5, 0.0])
        with pytest.raises(ValueError, match="sigmas"):
            lesa.enable(pipe.transformer)
        with pytest.raises(ValueError, match="budget=3"):
            lesa.enable(pipe.transformer, budget=3, sigmas=[1.0, 0.5, 0.0])
        assert hooks.attached(pipe) is None


def test_a_block_without_a_plan_left_by_an_error(pipe: Any) -> None:
    for error in ERRORS:
        for where in ["callback", "block"]:
            with lesa.enable(pipe, plan(OUTER, "hidden")):
                with pytest.raises(error), lesa.enable(pipe) as run:
                    raise_in(pipe, where, error)
                assert run.stats.requests == 1
                check(pipe, OUTER, "hidden")
            check(pipe, None, "hidden")


def test_a_block_left_by_an_error(pipe: Any, site: str) -> None:
    for error in ERRORS:
        for where in ["callback", "block", "head"]:
            with pytest.raises(error), lesa.enable(pipe, plan(INNER, site)) as run:
                raise_in(pipe, where, error)
            check(pipe, None, site)
            assert run.stats.requests == 1
            with lesa.enable(pipe, plan(INNER, site)):
                interrupt(pipe, where, error)
                check(pipe, INNER, site)
            check(pipe, None, site)


# Blocks in blocks


def test_an_inner_block_gives_the_outer_plan_back(pipe: Any, site: str) -> None:
    other = {"hidden": "output", "output": "hidden"}[site]
    with lesa.enable(pipe, plan(OUTER, other)) as outer:
        check(pipe, OUTER, other)
        for _ in range(2):
            with lesa.enable(pipe, plan(INNER, site)) as inner:
                check(pipe, INNER, site)
            check(pipe, OUTER, other)
            assert inner.stats.requests == 1
        assert lesa.stats(pipe) is outer.stats and outer.stats.requests == 3
    check(pipe, None, site)


def test_a_block_gives_back_a_plan_that_was_enabled_without_one(pipe: Any, site: str) -> None:
    lesa.enable(pipe, plan(OUTER, site))
    with lesa.enable(pipe, plan(INNER, site)):
        check(pipe, INNER, site)
    check(pipe, OUTER, site)
    lesa.disable(pipe)


def test_an_inner_block_left_by_an_error(pipe: Any, site: str) -> None:
    for error in ERRORS:
        for where in ["callback", "block", "head"]:
            with lesa.enable(pipe, plan(OUTER, site)):
                interrupt(pipe, where, error)
                with pytest.raises(error), lesa.enable(pipe, plan(INNER, site)):
                    raise_in(pipe, where, error)
                check(pipe, OUTER, site)
            check(pipe, None, site)
            with pytest.raises(error), lesa.enable(pipe, plan(OUTER, site)), lesa.enable(pipe, plan(INNER, site)):
                raise_in(pipe, where, error)
            check(pipe, None, site)


def test_disable_in_a_block_lasts_until_its_end(pipe: Any, site: str) -> None:
    with lesa.enable(pipe, plan(OUTER, site)):
        with lesa.enable(pipe, plan(INNER, site)):
            lesa.disable(pipe)
            check(pipe, None, site)
        check(pipe, OUTER, site)
        lesa.disable(pipe)
        check(pipe, None, site)
    check(pipe, None, site)


def test_a_plan_enabled_in_a_block_ends_with_it(pipe: Any, site: str) -> None:
    with lesa.enable(pipe, plan(OUTER, site)) as outer:
        within = lesa.enable(pipe, plan(INNER, site))
        check(pipe, INNER, site)
    check(pipe, None, site)
    assert (outer.stats.requests, within.stats.requests) == (0, 1)
    with lesa.enable(pipe, plan(OUTER, site)):
        with lesa.enable(pipe, plan(OUTER, site)):
            lesa.enable(pipe, plan(INNER, site))
        check(pipe, OUTER, site)


def test_an_outer_plan_that_was_disabled_does_not_come_back(pipe: Any, site: str) -> None:
    with lesa.enable(pipe, plan(OUTER, site)) as outer:
        with lesa.enable(pipe, plan(INNER, site)):
            outer.disable()
            check(pipe, INNER, site)
        check(pipe, None, site)
    with (
        lesa.enable(pipe, plan(OUTER, site)),
        lesa.enable(pipe, plan(INNER, site)) as middle,
    ):
        with lesa.enable(pipe, plan(INNER, site)):
            middle.disable()
        check(pipe, OUTER, site)


def test_blocks_left_in_another_order(pipe: Any, site: str) -> None:
    with lesa.enable(pipe, plan(OUTER, site)):
        first = lesa.enable(pipe, plan(INNER, site)).__enter__()
        second = lesa.enable(pipe, plan(INNER, site)).__enter__()
        first.__exit__(None, None, None)
        check(pipe, OUTER, site)
        second.__exit__(None, None, None)
        check(pipe, OUTER, site)


def test_the_same_handle_left_twice(pipe: Any, site: str) -> None:
    with lesa.enable(pipe, plan(OUTER, site)):
        with lesa.enable(pipe, plan(INNER, site)) as run, run:
            check(pipe, INNER, site)
        check(pipe, OUTER, site)
        run.__exit__(None, None, None)
        run.disable()
        check(pipe, OUTER, site)
        with pytest.raises(RuntimeError, match="lesa.enable"), run:
            pass
        check(pipe, OUTER, site)


def test_an_enable_that_fails_in_a_block_changes_nothing(pipe: Any, site: str) -> None:
    with lesa.enable(pipe, plan(OUTER, site)) as run:
        with pytest.raises(ValueError, match="guard="), lesa.enable(pipe, plan(INNER, site), guard="x"):
            pass
        assert run.stats is lesa.stats(pipe)
        check(pipe, OUTER, site)


def test_an_interruption_while_a_hook_is_put_on(pipe: Any, site: str, monkeypatch: Any) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("_invalidate_caches", "_register"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(hooks, name, interrupted)
            lesa.enable(pipe, plan(INNER, site))
        check(pipe, None, site)


# In the middle of a request


@pytest.mark.parametrize("where", ["callback", "block", "head"])
def test_disable_in_the_middle_of_a_request(pipe: Any, site: str, where: str) -> None:
    with lesa.enable(pipe, plan(INNER, site)) as run:
        if where != "callback":
            blocks, head = pipe.transformer.single_transformer_blocks, pipe.transformer.norm_out
            Bomb(blocks[-1].attn if where == "block" else head, 3, run.disable)
            assert FLUX.call(pipe).isfinite().all()
        else:

            def off(_: Any, step: int, __: Any, kwargs: dict) -> dict:
                if step == 2:
                    run.disable()
                return kwargs

            assert FLUX.call(pipe, callback_on_step_end=off).isfinite().all()
            assert (run.stats.computed, run.stats.forecast) == (2, 1)
        check(pipe, None, site)
    check(pipe, None, site)


def test_a_block_around_a_request_within_a_request(pipe: Any, site: str) -> None:
    """The outer request goes on under its plan: what it cannot forecast any more, it computes."""
    found = []

    def within(_: Any, step: int, __: Any, kwargs: dict) -> dict:
        if step == 2:
            with lesa.enable(other, plan(INNER, site)):
                found.append(FLUX.call(other))
        return kwargs

    other = FLUX.make()
    with lesa.enable(pipe, plan(OUTER, site)):
        assert torch.equal(FLUX.call(pipe, callback_on_step_end=within), by(OUTER, site))
    assert torch.equal(found[0], by(INNER, site))


def test_a_handle_keeps_no_pipeline_in_memory() -> None:
    pipe = FLUX.make()
    with lesa.enable(pipe, plan(INNER, "hidden")) as run:
        FLUX.call(pipe)
    kept = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert kept() is None and run.stats.forecast == 4
