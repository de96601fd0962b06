"""lesa makes diffusion models fast: it computes some denoiser steps and forecasts the others.

plan = lesa.fit(pipe, prompts, budget=10)  # or the path of a plan that is there already
with lesa.enable(pipe, plan) as run:
    image = pipe("red apple").images[0]
print(run.stats)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import assets, forecasters, metrics, ops
    from .api import disable, enable, stats
    from .fitting.fit import fit
    from .planner.statistics import Statistics
    from .plans import schedule
    from .plans.plan import Plan
    from .plans.rows import LesaWarning, PlanError
    from .runtime.driver import Stats
    from .training.train import train

__version__ = "0.1.0"
_HOMES = {
    "disable": "api",
    "enable": "api",
    "stats": "api",
    "fit": "fitting.fit",
    "train": "training.train",
    "Plan": "plans.plan",
    "Statistics": "planner.statistics",
    "Stats": "runtime.driver",
    "LesaWarning": "plans.rows",
    "PlanError": "plans.rows",
    "assets": "assets",
    "forecasters": "forecasters",
    "metrics": "metrics",
    "ops": "ops",
    "schedule": "plans.schedule",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are asked for: fit and train need diffusers, plans need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lesa' has no attribute {name!r}")
    home = import_module(f"lesa.{_HOMES[name]}")
    found = getattr(home, name, home)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """What people use."""
    return sorted([*__all__, "__version__"])
