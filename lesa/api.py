"""The verbs a user types: enable, disable, stats."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from .models.layouts import check_fit, denoiser_of
from .ops import BACKENDS
from .planner.statistics import Statistics
from .plans import storage
from .plans.plan import Plan
from .plans.rows import PlanError
from .runtime.checks import GUARDS
from .runtime.driver import Stats
from .runtime.runner import Adaptive, PlanRunner

if TYPE_CHECKING:
    from .models.hooks import RootHook


class Enabled:
    """lesa on one denoiser, as `enable` put it there; also a context manager that takes it off at its end.

    At the end of the `with` block the denoiser is as before `enable`, whatever was enabled or disabled in the block:
    bit-equal to the original, or under the plan of the block around it. An exception or interruption changes nothing
    of that.
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
        """Take lesa off, as `lesa.disable`; does nothing where another plan was enabled since, or none is."""
        from .models import hooks

        self._hook.retired = True
        if hooks.attached(self._denoiser) is self._hook:
            hooks.detach(self._denoiser)

    def __enter__(self) -> Enabled:
        from .models import hooks

        if hooks.attached(self._denoiser) is not self._hook:
            raise RuntimeError("the plan of this handle is not enabled any more: call lesa.enable again")
        self._hook.before = self._before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from .models import hooks

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
            where requests start and how many steps they have; a bare denoiser's timestep argument does, at the
            cost of reading it back from the device. If a bare denoiser is called more than once a step, name the
            calls with `with denoiser.cache_context("cond")`. Compile it before or after, as you like.
        plan: a `Plan`, or what `Plan.from_pretrained` takes (a file, a folder, a Hub repository "owner/name"), made for
            one step count and its noise levels. A plan of `lesa.fit` is adapted to a pipeline's requests of any other
            step count, spacing, shift and strength. Or, with `budget`, `Statistics` or their path, which serve such
            requests too.
        budget: with statistics or a fitted plan: computed steps of each request, a number of at least 1 (all of a
            request that has fewer), or as a float up to 1 a share of its steps. None is the plan's own number.
        guard: "warn" compares, at computed steps, the forecast that would have been made with the truth. If the
            logarithm of an error exceeds its fitted mean by 5 standard deviations, lesa warns once; the plan goes on.
            `lesa.stats` carries the errors of the latest request. "off" measures nothing. Either way a forecast that is
            not finite is replaced by a computed step.
        backend: what forecasts: "triton", "cpp" or "torch"; None takes the best for the device. One asked for
            never falls back: where it cannot serve, the request fails.

    Returns:
        A handle, also a context manager: `with lesa.enable(pipe, plan) as run: ...`, then `run.stats` and `run.plan`.

    Raises:
        PlanError: the plan cannot be read, or it or the statistics do not fit the denoiser.
        TypeError: `plan` is none of these.
        ValueError: `target` has no supported denoiser, or is a bare one where statistics need a pipeline; the backend
            or the guard is unknown; there is a budget with a plan that was not fitted, or none with statistics; the
            statistics cannot be read.
    """
    from .models import hooks

    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}, or None for the best there is")
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
    """What lies there; a budget is what statistics need, so without one only a plan will do.

    Raises:
        PlanError: there is no plan, or it cannot be read.
        ValueError: the statistics cannot be read.
    """
    of_statistics = str(storage.format_of(path)).startswith("lesa-statistics") if os.path.isfile(path) else False
    return Statistics.load(path) if of_statistics and budget is not None else Plan.from_pretrained(path)


def check_adaptable(source: Plan | Statistics, budget: int | float | None) -> None:
    """Check that plans of another budget can be made.

    Raises:
        ValueError: there is a budget, but the plan was not fitted.
    """
    if budget is not None and isinstance(source, Plan) and source.surrogate is None:
        raise ValueError(
            f"budget={budget!r}: the plan has one, {source.budget} computed steps, and holds no statistics to make "
            "another from; leave `budget` out, fit the plan again with this version, or give statistics in its place"
        )


def _driver(
    target: Any, source: Plan | Statistics, budget: int | float | None, guard: str, backend: str | None
) -> PlanRunner | Adaptive:
    """What runs the requests; checked against the denoiser."""
    denoiser = denoiser_of(target)
    if isinstance(source, Plan):
        check_fit(source, denoiser)
        if source.surrogate is None:
            return PlanRunner(source, backend, guard)
        return Adaptive(source, budget, runner=lambda made: PlanRunner(made, backend, guard))
    if isinstance(target, torch.nn.Module):
        raise ValueError(
            f"a bare {type(target).__name__} does not tell the noise levels of a request before it runs: enable the "
            "pipeline, or the plan that lesa.planner.build.plan_for(statistics, budget, sigmas) makes"
        )
    driver = Adaptive(source, budget, runner=lambda made: PlanRunner(made, backend, guard))
    try:
        check_fit(driver.plan, denoiser)
    except PlanError as error:
        raise PlanError(f"the statistics are of another denoiser: {error}") from error
    return driver


def disable(target: Any) -> None:
    """Take lesa off; the denoiser is then bit-equal to before. Does nothing where lesa is not enabled."""
    from .models import hooks

    hooks.detach(target)


def stats(target: Any) -> Stats:
    """What happened since `enable`: computed, forecast and refused steps, measured errors, and the time saved.

    Raises:
        ValueError: lesa is not enabled on `target`.
    """
    from .models import hooks

    root = hooks.attached(target)
    if root is None:
        raise ValueError(f"lesa is not enabled on this {type(target).__name__}: call lesa.enable(target, plan) first")
    if isinstance(root.driver, (PlanRunner, Adaptive)):
        root.driver.settle()
    return root.driver.stats
