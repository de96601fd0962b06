"""Operators lesa::*: schemas, fakes, autograd, plain torch, choice of backend ("triton", "cpp" or "torch").

May import lesa.plans.rows (constants) and, inside functions, lesa.kernels.
"""

from ._library import BACKENDS, backend_of, describe, wide_dtype
from .forecast import feature_sums, forecast, forecast_at, forecast_into_, prepared_forecast, spread
from .fused import forecast_errors, forecast_head, prepared_errors
from .training import LAYERS, kan, predict, predict_loss

__all__ = ["BACKENDS", "LAYERS", "backend_of", "describe", "feature_sums", "forecast", "forecast_at", "forecast_errors"]
__all__ += ["forecast_head", "forecast_into_", "kan", "predict", "predict_loss", "prepared_errors", "prepared_forecast"]
__all__ += ["spread", "wide_dtype"]
