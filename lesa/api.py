"""The verbs a user types: enable, disable, stats."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import torch

from .models import hooks
from .models.hooks import RootHook
from .models.layouts import check_fit, denoiser_of
from .ops import BACKENDS
from .planner.statistics import Statistics
from .plans import storage
from .plans.plan import Plan
from .plans.rows import PlanError
from .runtime.checks import GUARDS
from .runtime.driver import Stats
from .runtime.runner import Adaptive, PlanRunner


class Enabled:
    """What `enable` returns: lesa on one denoiser; also a context manager.

    At the end of the `with` block, also after an exception, the earlier state returns: no lesa, or the outer plan.
    """

    def __init__(
        self, denoiser: torch.nn.Module, hook: RootHook, driver: PlanRunner | Adaptive, before: RootHook | None
    ) -> None:
        self._denoiser, self._hook, self._driver, self._before = denoiser, hook, driver, before
        self._left = False

    @property
    def stats(self) -> Stats:
        """What happened since `enable`, see `lesa.stats`; also after `disable`."""
        self._driver.settle()
        return self._driver.stats

    @property
    def plan(self) -> Plan:
        """The plan of the latest request; before the first, the plan that was enabled."""
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
    plan: Plan | Statistics | str | os.PathLike[str],
    *,
    budget: int | float | None = None,
    guard: str = "warn",
    backend: str | None = None,
) -> Enabled:
    """Run a pipeline's denoiser, or a bare denoiser, by a plan.

    Enabling again replaces the earlier plan. Nothing is changed if an error is raised.

    Args:
        target: a diffusers pipeline, or a denoiser module in a loop of your own. A pipeline's scheduler tells lesa
            where requests start and how many steps they have. For a bare denoiser lesa reads its timestep argument,
            which waits for the GPU. If you call a bare denoiser more than once per step, name the calls with
            `with denoiser.cache_context("cond")`. You may compile the denoiser before or after.
        plan: a `Plan`, or what `Plan.from_pretrained` takes: a file, a folder or a Hub repository "owner/name". A plan
            from `lesa.fit` adapts to a pipeline's other step counts, spacings, shifts and strengths; other plans are
            for one step count and its noise levels. With `budget` also `Statistics` or their path, which adapt too.
        budget: with statistics or a fitted plan, the computed steps of each request: an integer >= 1 (a shorter
            request computes all its steps), or a float in (0, 1]: the share of its steps. None: the plan's own number.
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
        ValueError: `target` has no supported denoiser, or is a bare denoiser and `plan` is statistics.
        ValueError: the backend or the guard is unknown.
        ValueError: a budget with a plan that was not fitted, or statistics without a budget.
        ValueError: the statistics cannot be read.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}, or None for the best")
    if guard not in GUARDS:
        raise ValueError(f'guard={guard!r}: expected "warn", or "off" to measure nothing')
    if not isinstance(plan, (Plan, Statistics, str, os.PathLike)):
        raise TypeError(f"plan: expected a Plan, Statistics or a path, got {type(plan).__name__}")
    denoiser = denoiser_of(target)
    source = plan if isinstance(plan, (Plan, Statistics)) else source_of(plan, budget)
    check_adaptable(source, budget)
    driver = _driver(target, source, budget, guard, backend)
    before = hooks.attached(denoiser)
    return Enabled(denoiser, hooks.attach(target, driver, driver.plan.site), driver, before)


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
    target: Any, source: Plan | Statistics, budget: int | float | None, guard: str, backend: str | None
) -> PlanRunner | Adaptive:
    """The driver of the requests, checked against the denoiser."""
    denoiser = denoiser_of(target)
    if isinstance(source, Plan):
        check_fit(source, denoiser)
        if source.surrogate is None:
            return PlanRunner(source, backend, guard)
    elif isinstance(target, torch.nn.Module):
        raise ValueError(
            f"a bare {type(target).__name__} does not tell a request's noise levels before it runs: enable the "
            "pipeline, or the plan that lesa.planner.build.plan_for(statistics, budget, sigmas) makes"
        )
    driver = Adaptive(source, budget, runner=lambda made: PlanRunner(made, backend, guard))
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
    if isinstance(root.driver, (PlanRunner, Adaptive)):
        root.driver.settle()
    return root.driver.stats
