"""lesa makes diffusion transformers fast: it computes some denoiser steps and forecasts the others.

plan = lesa.fit(pipe, prompts, budget=10)  # or the path of a plan that is there already
lesa.enable(pipe, plan)
image = pipe("red apple").images[0]
print(lesa.stats(pipe))
lesa.disable(pipe)
"""

from typing import TYPE_CHECKING, Any

from .api import disable, enable, stats
from .planner.statistics import Statistics
from .plans.plan import Plan, PlanError, Row
from .runtime.driver import LesaWarning
from .runtime.guard import Guard
from .runtime.stats import Stats
from .training.predictor import Predictor

if TYPE_CHECKING:
    from .fitting.fit import fit

__version__ = "0.1.0"
__all__ = [
    *("Guard", "LesaWarning", "Plan", "PlanError", "Predictor", "Row", "Statistics", "Stats"),
    *("disable", "enable", "fit", "stats"),
]


def __getattr__(name: str) -> Any:
    """`lesa.fit`, which needs diffusers, is imported when it is asked for."""
    if name == "fit":
        from .fitting.fit import fit

        return fit
    raise AttributeError(f"module 'lesa' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What people use."""
    return sorted([*__all__, "__version__"])
