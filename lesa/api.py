"""The verbs a user types."""

from __future__ import annotations

import os
from typing import Any

from .denoisers import check_fit, denoiser_of
from .ops import BACKENDS
from .plan import Plan
from .runner import PlanRunner
from .stats import Stats


def enable(target: Any, plan: Plan | str | os.PathLike[str], backend: str | None = None) -> None:
    """Run a pipeline's denoiser, or a bare denoiser, by a plan.

    Enabling again replaces the earlier plan. Nothing is changed if an error is raised.

    Args:
        target: a diffusers pipeline, or a denoiser module in a loop of your own. A pipeline's scheduler tells lesa
            where requests start and how many steps they have; a bare denoiser's timestep argument does, at the
            cost of reading it back from the device. If a bare denoiser is called more than once a step, name the
            calls with `with denoiser.cache_context("cond")`. Compile it before or after, as you like.
        plan: a `Plan` or the path of one.
        backend: what forecasts: "triton", "cpp" or "torch"; None takes the best for the device. One asked for
            never falls back: where it cannot serve, the request fails.

    Raises:
        PlanError: the plan cannot be read or does not fit the denoiser.
        ValueError: `target` has no supported denoiser, or the backend is unknown.
    """
    from . import hooks

    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}, or None for the best there is")
    denoiser = denoiser_of(target)
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    check_fit(plan, denoiser)
    hooks.attach(target, PlanRunner(plan, backend), plan.site)


def disable(target: Any) -> None:
    """Take lesa off; the denoiser is then bit-equal to before. Does nothing where lesa is not enabled."""
    from . import hooks

    hooks.detach(target)


def stats(target: Any) -> Stats:
    """What happened since `enable`: computed, forecast and refused steps, and the time saved.

    Raises:
        ValueError: lesa is not enabled on `target`.
    """
    from . import hooks

    root = hooks.attached(target)
    if root is None:
        raise ValueError(f"lesa is not enabled on this {type(target).__name__}: call lesa.enable(target, plan) first")
    return root.driver.stats
