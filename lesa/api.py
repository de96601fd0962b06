"""The verbs a user types: enable, disable, stats."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from .fitting.learn import Learner
from .models import hooks
from .models.hooks import RootHook
from .models.layouts import check_fit, denoiser_of
from .ops import BACKENDS
from .planner.build import adapt, computed_steps, plan_for
from .planner.statistics import Statistics
from .plans import storage
from .plans.plan import Plan
from .plans.rows import PlanError
from .plans.schedule import noise_levels
from .runtime.checks import GUARDS
from .runtime.driver import Stats
from .runtime.runner import Adaptive, Generic, PlanRunner


class Enabled:
    """What `enable` returns: lesa on one denoiser; also a context manager.

    At the end of the `with` block, also after an exception, the earlier state returns: no lesa, or the outer plan.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        hook: RootHook,
        driver: PlanRunner | Adaptive | Generic | Learner,
        before: RootHook | None,
    ) -> None:
        self._denoiser, self._hook, self._driver, self._before = denoiser, hook, driver, before
        self._left = False

    @property
    def stats(self) -> Stats:
        """What happened since `enable`, see `lesa.stats`; also after `disable`."""
        self._driver.settle()
        return self._driver.stats

    @property
    def plan(self) -> Plan | None:
        """The plan of the latest request; before the first, the plan that was enabled, None if there was none."""
        return self._driver.plan

    def disable(self) -> None:
        """Take lesa off, like `lesa.disable`. Does nothing if this plan is no longer enabled."""
        self._hook.retired = True
        if hooks.attached(self._denoiser) is self._hook:
            hooks.detach(self._denoiser)

    def __enter__(self) -> Enabled:
        if hooks.attached(self._denoiser) is not self._hook:
            raise RuntimeError("this plan is no longer enabled: call lesa.enable again")
        self._hook.before = self._before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._left:
            return
        self._left = self._hook.retired = True
        before, self._before = self._before, None
        while before is not None and before.retired:
            before = before.before
        if before is None:
            hooks.detach(self._denoiser)
        elif hooks.attached(self._denoiser) is not before:
            hooks.attach_hook(self._denoiser, before)


def enable(
    target: Any,
    plan: Plan | Statistics | str | os.PathLike[str] | None = None,
    *,
    budget: int | float | None = None,
    sigmas: Sequence[float] | None = None,
    learn: int | None = None,
    guard: str = "warn",
    backend: str | None = None,
) -> Enabled:
    """Run a pipeline's denoiser, or a bare denoiser, by a plan.

    Enabling again replaces the earlier plan. Nothing is changed if an error is raised.

    Args:
        target: a diffusers pipeline, or a denoiser module in a loop of your own. The scheduler of the pipeline that
            runs tells lesa where requests start and how many steps they have; that may be a copy, or another pipeline
            with this denoiser. For a bare denoiser lesa reads its timestep argument, which waits for the GPU; it falls
            in a request, or rises from 0. If you call a bare denoiser more than once per step, give the calls the same
            sample, or name them with `with denoiser.cache_context("cond")`. You may compile the denoiser before or
            after. Calls that record gradients are not forecast.
        plan: a `Plan`, or what `Plan.from_pretrained` takes: a file, a folder or a Hub repository "owner/name". A plan
            from `lesa.fit` adapts to a pipeline's other step counts, spacings, shifts and strengths; other plans are
            for one step count and its noise levels. With `budget` also `Statistics` or their path, which adapt too.
            None: a plan for each kind of request is made of statistics that come with lesa; nothing is fitted.
        budget: the computed steps of each request: an integer >= 1 (a shorter request computes all its steps), or a
            float in (0, 1]: the share of its steps. None: the plan's own number; without a plan 30 % of the steps, at
            least 4, or half of them where there are 8 or fewer. A plan that was not fitted has one budget.
        sigmas: of a bare denoiser, without a plan or with one that adapts: the T + 1 noise levels of each request,
            falling, the final 0 included. Levels above 1 are sigma / alpha of a model that predicts the noise.
        learn: instead of a plan: the first so many requests run in full and are watched; the next ones run by what was
            learned from them, which `run.plan.save(path)` keeps. `lesa.stats` tells how far it is. Requests that are
            interrupted, or of another kind, do not count.
        guard: "warn": at each computed step lesa also makes the forecast and compares it with the true feature. If the
            logarithm of an error exceeds its fitted mean by 5 standard deviations, lesa warns once; the plan goes on.
            `lesa.stats` shows the errors of the latest request. "off" measures nothing. In both cases, lesa computes
            the step if its forecast is not finite.
        backend: makes the forecasts: "triton", "cpp" or "torch"; None takes the best for the device. If you name a
            backend and it cannot run, the request fails; lesa does not choose another.

    Returns:
        A handle, also a context manager: `with lesa.enable(pipe, plan) as run: ...`, then `run.stats` and `run.plan`.

    Raises:
        PlanError: the plan cannot be read, or the plan or the statistics do not fit the denoiser.
        TypeError: `plan` has another type.
        ValueError: `target` has no supported denoiser, is a pipeline without a scheduler, or a bare denoiser that needs
            `sigmas`; or a cache of diffusers is enabled on the denoiser.
        ValueError: the backend or the guard is unknown, `sigmas` are no noise levels, or `learn` is below 1 or comes
            with a plan.
        ValueError: a budget with a plan that was not fitted, or statistics without a budget.
        ValueError: the statistics cannot be read.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}, or None for the best")
    if guard not in GUARDS:
        raise ValueError(f'guard={guard!r}: expected "warn", or "off" to measure nothing')
    if not isinstance(plan, (Plan, Statistics, str, os.PathLike, type(None))):
        raise TypeError(
            f"plan: expected a Plan, Statistics or a path, got {type(plan).__name__}; give a number of steps as budget="
        )
    denoiser = denoiser_of(target)
    levels = _levels(target, sigmas)

    def runner(made: Plan) -> PlanRunner:
        return PlanRunner(made, backend, guard)

    driver: PlanRunner | Adaptive | Generic | Learner
    if learn is not None and plan is not None:
        raise ValueError(f"learn={learn!r} with a plan: give one of them")
    if plan is None:
        wanted = _checked_budget(target, budget, levels)
        if learn is None:
            driver = Generic(wanted, levels, runner)
        else:
            driver = Learner(target, learn, wanted, runner, levels)
    else:
        source = plan if isinstance(plan, (Plan, Statistics)) else source_of(plan, budget)
        check_adaptable(source, budget)
        driver = _driver(target, source, budget, levels, runner)
    before, site = hooks.attached(denoiser), "output" if driver.plan is None else driver.plan.site
    return Enabled(denoiser, hooks.attach(target, driver, site), driver, before)


def _levels(target: Any, sigmas: Any) -> tuple[float, ...] | None:
    """The noise levels of a loop of one's own.

    Raises:
        ValueError: they are none, or the target is a pipeline, whose scheduler has them.
    """
    if sigmas is None:
        return None
    if not isinstance(target, torch.nn.Module):
        raise ValueError(f"sigmas is for a bare denoiser: the scheduler of this {type(target).__name__} has them")
    return noise_levels(sigmas)


def _checked_budget(target: Any, budget: Any, levels: Sequence[float] | None) -> int | float | None:
    """The budget of a default plan, checked as far as the number of steps is known.

    Raises:
        ValueError: it is none, or exceeds the steps; or nothing tells the noise levels of a request.
    """
    name = type(target).__name__
    if isinstance(target, torch.nn.Module) and levels is None:
        raise ValueError(f"sigmas: a bare {name} does not tell its noise levels: give sigmas=[...] or the pipeline")
    if levels is None and getattr(target, "scheduler", None) is None:
        raise ValueError(f"{name} has no scheduler: set pipe.scheduler, or enable its denoiser with sigmas=[...]")
    steps = 1 if levels is None else len(levels) - 1
    if budget is not None:
        computed_steps(budget, steps)
        if levels is not None and budget > steps:
            raise ValueError(f"budget={budget}: the {len(levels)} sigmas are of {steps} steps; compute 1 to {steps}")
    return budget


def source_of(path: str | os.PathLike[str], budget: int | float | None) -> Plan | Statistics:
    """The plan or the statistics at a path; statistics need a budget.

    Raises:
        PlanError: there is no plan, or it cannot be read.
        ValueError: the statistics cannot be read.
    """
    if budget is not None and os.path.isfile(path) and str(storage.format_of(path)).startswith("lesa-statistics"):
        return Statistics.load(path)
    return Plan.from_pretrained(path)


def check_adaptable(source: Plan | Statistics, budget: int | float | None) -> None:
    """Check that the budget of the source can change.

    Raises:
        ValueError: there is a budget, but the plan was not fitted.
    """
    if budget is not None and isinstance(source, Plan) and source.surrogate is None:
        raise ValueError(
            f"budget={budget!r}: this plan cannot change its budget of {source.budget} (plans from lesa.fit can); "
            "leave budget out, or fit a plan"
        )


def _driver(
    target: Any,
    source: Plan | Statistics,
    budget: int | float | None,
    levels: tuple[float, ...] | None,
    runner: Callable[[Plan], PlanRunner],
) -> PlanRunner | Adaptive:
    """The driver of the requests, checked against the denoiser."""
    denoiser = denoiser_of(target)
    if isinstance(source, Plan):
        check_fit(source, denoiser)
        if source.surrogate is None and levels is None:
            return runner(source)
    if levels is not None:
        made = adapt(source, budget, levels) if isinstance(source, Plan) else plan_for(source, budget, levels)  # type: ignore[arg-type]
        return runner(replace(made, surrogate=None))
    if isinstance(target, torch.nn.Module) and isinstance(source, Statistics):
        raise ValueError(
            f"sigmas: a bare {type(target).__name__} does not tell a request's noise levels before it runs: give "
            "sigmas=[...], or enable the pipeline"
        )
    driver = Adaptive(source, budget, runner)
    try:
        check_fit(driver.plan, denoiser)
    except PlanError as error:
        raise PlanError(f"the statistics were recorded with another denoiser: {error}") from error
    return driver


def disable(target: Any) -> None:
    """Take lesa off; the denoiser is then bit-equal to before. Does nothing if lesa is not enabled."""
    hooks.detach(target)


def stats(target: Any) -> Stats:
    """What happened since `enable`: computed, forecast and refused steps, measured errors, and the time saved.

    Raises:
        ValueError: lesa is not enabled on `target`.
    """
    root = hooks.attached(target)
    if root is None:
        raise ValueError(f"lesa is not enabled on this {type(target).__name__}: call lesa.enable(target, plan) first")
    if isinstance(root.driver, (PlanRunner, Adaptive, Generic, Learner)):
        root.driver.settle()
    return root.driver.stats
