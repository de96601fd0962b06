"""lesa makes diffusion transformers fast: it computes some denoiser steps and forecasts the others.

lesa.enable(pipe, "plan.safetensors")
image = pipe("red apple").images[0]
print(lesa.stats(pipe))
lesa.disable(pipe)
"""

from .api import disable, enable, stats
from .plan import Plan, PlanError, Row
from .predictor import Predictor
from .runner import LesaWarning
from .stats import Stats

__version__ = "0.1.0"
__all__ = ["LesaWarning", "Plan", "PlanError", "Predictor", "Row", "Stats", "disable", "enable", "stats"]
