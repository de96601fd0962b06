"""The verbs a user types."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from .models.denoisers import check_fit, denoiser_of
from .ops import BACKENDS
from .planner.statistics import Statistics
from .plans import files
from .plans.plan import Plan, PlanError
from .runtime.guard import GuardOption, guard_for
from .runtime.runner import PlanRunner
from .runtime.stats import Stats

if TYPE_CHECKING:
    from .runtime.adapting import Adaptive


def enable(
    target: Any,
    plan: Plan | Statistics | str | os.PathLike[str],
    backend: str | None = None,
    budget: int | float | None = None,
    guard: GuardOption = None,
) -> None:
    """Run a pipeline's denoiser, or a bare denoiser, by a plan, or by plans made on the fly.

    Enabling again replaces the earlier plan. Nothing is changed if an error is raised.

    Args:
        target: a diffusers pipeline, or a denoiser module in a loop of your own. A pipeline's scheduler tells lesa
            where requests start and how many steps they have; a bare denoiser's timestep argument does, at the
            cost of reading it back from the device. If a bare denoiser is called more than once a step, name the
            calls with `with denoiser.cache_context("cond")`. Compile it before or after, as you like.
        plan: a `Plan`, or what `Plan.from_pretrained` takes (a file, a folder, a hub repository "owner/name"), made for
            one step count and its noise levels; where it was fitted by `lesa.fit`, a pipeline's requests of any other
            step count, spacing, shift and strength have a plan made of it on the fly. Or, with `budget`, `Statistics`
            or their path, which serve such requests too.
        backend: what forecasts: "triton", "cpp" or "torch"; None takes the best for the device. One asked for
            never falls back: where it cannot serve, the request fails.
        budget: with statistics or a fitted plan: computed steps of each request, a number of at least 1 (all of a
            request that has fewer), or as a float up to 1 a share of its steps. None is the plan's own number.
        guard: whether forecasts are watched. At computed steps the forecast that would have been made is compared with
            the truth; where the logarithm of its error lies more than `guard` spreads above what fitting saw (5 by
            default, above 0; 2 for a request whose prompt or weights are unlike the fitted ones), the request is
            computed: what ran of it over again, in one go, so that it ends where the full request ends, as long as the
            sampler makes Euler steps; under another one step repays an estimate of what went wrong. So is a request
            with guidance under a plan fitted without. Forecasts that are not finite are replaced by computed steps.
            A request waits for the device at its start; a check is read when it is long done. None: on where the plan
            knows its expected errors; True, a number or a `lesa.Guard` needs them; infinity only measures and replaces
            what is not finite; False: off.

    Raises:
        PlanError: the plan cannot be read, or it or the statistics do not fit the denoiser; or they do not say which
            errors the guard that is asked for should expect.
        TypeError: `plan` is none of these.
        ValueError: `target` has no supported denoiser, or is a bare one where statistics need a pipeline; the backend
            is unknown; there is a budget with a plan that was not fitted, or none with statistics; the statistics
            cannot be read; `guard` is a number not above 0.
    """
    from .models import hooks

    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}, or None for the best there is")
    if not isinstance(plan, (Plan, Statistics, str, os.PathLike)):
        raise TypeError(f"plan: expected a Plan, Statistics or a path, got {type(plan).__name__}")
    denoiser = denoiser_of(target)
    source = plan if isinstance(plan, (Plan, Statistics)) else source_of(plan, budget)
    check_budget(source, budget)
    driver: PlanRunner | Adaptive
    if isinstance(source, Statistics):
        driver = _from_statistics(target, source, backend, budget, guard)
    elif source.surrogate is not None:
        driver = _from_fitted(denoiser, source, backend, budget, guard)
    else:
        check_fit(source, denoiser)
        driver = PlanRunner(source, backend, guard_for(guard, source))
    hooks.attach(target, driver, driver.plan.site)


def source_of(path: str | os.PathLike[str], budget: int | float | None) -> Plan | Statistics:
    """What lies there; a budget is what statistics need, so without one only a plan will do.

    Raises:
        PlanError: there is no plan, or it cannot be read.
        ValueError: the statistics cannot be read.
    """
    of_statistics = str(files.format_of(path)).startswith("lesa-statistics") if os.path.isfile(path) else False
    return Statistics.load(path) if of_statistics and budget is not None else Plan.from_pretrained(path)


def check_budget(source: Plan | Statistics, budget: int | float | None) -> None:
    """Check that plans of another budget can be made.

    Raises:
        ValueError: there is a budget, but the plan was not fitted.
    """
    if budget is not None and isinstance(source, Plan) and source.surrogate is None:
        raise ValueError(
            f"budget={budget!r}: the plan has one, {source.budget} computed steps, and holds no statistics to make "
            "another from; leave `budget` out, fit the plan again with this version, or give statistics in its place"
        )


def _from_fitted(
    denoiser: torch.nn.Module,
    plan: Plan,
    backend: str | None,
    budget: int | float | None,
    guard: GuardOption,
) -> Adaptive:
    """The driver of a fitted plan."""
    from .runtime.adapting import Adaptive

    check_fit(plan, denoiser)
    # The same for the plans made of it: where one has nothing to check, its forecasts still have to be finite.
    watch = guard_for(guard, plan)
    return Adaptive(plan, budget, runner=lambda made: PlanRunner(made, backend, watch))


def _from_statistics(
    target: Any,
    statistics: Statistics,
    backend: str | None,
    budget: int | float | None,
    guard: GuardOption,
) -> Adaptive:
    """The driver that makes plans out of statistics."""
    from .runtime.adapting import Adaptive

    if isinstance(target, torch.nn.Module):
        raise ValueError(
            f"a bare {type(target).__name__} does not tell the noise levels of a request before it runs: enable the "
            "pipeline, or the plan that lesa.planner.build.plan_for(statistics, budget, sigmas) makes"
        )
    driver = Adaptive(statistics, budget, runner=lambda plan: PlanRunner(plan, backend, guard_for(guard, plan)))
    try:
        check_fit(driver.plan, denoiser_of(target))
    except PlanError as error:
        raise PlanError(f"the statistics are of another denoiser: {error}") from error
    return driver


def disable(target: Any) -> None:
    """Take lesa off; the denoiser is then bit-equal to before. Does nothing where lesa is not enabled."""
    from .models import hooks

    hooks.detach(target)


def stats(target: Any) -> Stats:
    """What happened since `enable`: computed, forecast and refused steps, and the time saved.

    Raises:
        ValueError: lesa is not enabled on `target`.
    """
    from .models import hooks

    root = hooks.attached(target)
    if root is None:
        raise ValueError(f"lesa is not enabled on this {type(target).__name__}: call lesa.enable(target, plan) first")
    return root.driver.stats
