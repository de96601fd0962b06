"""Statistics for models that nobody recorded: those of small trained models, brought to a request's noise levels.

Inner products of features as functions of the noise level are much alike from model to model. A feature is what the
scheduler is given, with guidance what guidance makes of all contexts. What a model predicts does not matter: with the
initial noise n among the features, every sample x_t is a weighted sum of them, since the sampler is linear, and so are
the noise e_t and the data d_t that a model sees in it, whatever it predicts itself:

    x_t = alpha_t d_t + sigma_t e_t        flow: e - d     epsilon: e     v: alpha e - sigma d     sample: d

So the statistics of flow models serve models that predict the noise, and the other way round. Levels are s = sigma /
(alpha + sigma), which is the sigma of flow matching.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..plans.plan import Plan
from ..plans.rows import ANY_CONTEXT
from ..plans.schedule import spaced
from ..plans.storage import Kind, read
from .build import (
    closed_form,
    computed_steps,
    linear_extrapolation,
    moved,
    plan_from_weights,
    prior_error_gains,
)
from .search import search
from .statistics import Statistics, StatisticsError, flow_impulse_response, interpolation, unpacked
from .surrogate import Surrogate, carry

FLOW = "flow_prediction"
PREDICTIONS = (FLOW, "epsilon", "v_prediction", "sample")  # as schedulers name them
ASSET = Path(__file__).parents[1] / "assets" / "generic.safetensors"
KIND = Kind("generic statistics", "lesa-generic-1", "generic.safetensors", StatisticsError, "examples/generic/build.py")
_VARIANCE = 16.0  # of the data where forecasts err
_TINY_SIGMA = 1e-6
# Below so many computed steps rows are the mean of reuse and regression; regression; its mean with linear
# extrapolation; that alone; its mean with the surrogate's best rows; these. The fewer, the wider the gaps to bridge.
_MOST = {False: (0, 0, 0, 0, 10, math.inf), True: (5, 8, 10, 16, 20, math.inf)}
_BLIND = 3  # so few computed steps tell nothing: even steps, and reuse
_REACH = 0.02  # how far above a source's noisiest level a request may start


@dataclass(frozen=True)
class Source:
    """What was recorded of one small model.

    Args:
        name: of the model.
        guided: whether its requests had guidance.
        alpha, sigma: [T] of its samples.
        noise, data: [T, 1 + T], e_t and d_t as weights of the initial noise and the T features.
        gram: [1 + T, 1 + T], mean inner products of these.
        requests: how many were averaged.
    """

    name: str
    guided: bool
    alpha: np.ndarray
    sigma: np.ndarray
    noise: np.ndarray
    data: np.ndarray
    gram: np.ndarray
    requests: int

    @property
    def levels(self) -> np.ndarray:
        """[T] noise levels."""
        return self.sigma / (self.alpha + self.sigma)

    def as_predicted(self, prediction: str, levels: np.ndarray) -> np.ndarray:
        """[T', T'], inner products of what such a model would return at T' levels; their mean square is 1."""
        to = interpolation(self.levels.tolist(), levels.tolist())
        noise, data = to @ self.noise, to @ self.data
        scale = np.hypot(1 - levels, levels)[:, None]
        alpha, sigma = (1 - levels)[:, None] / scale, levels[:, None] / scale
        made = {"epsilon": noise, "sample": data, "v_prediction": alpha * noise - sigma * data, FLOW: noise - data}
        gram = made[prediction] @ self.gram @ made[prediction].T
        return gram * len(gram) / np.trace(gram)


@functools.cache
def sources() -> tuple[Source, ...]:
    """The recordings that come with the package."""
    description, arrays = read(ASSET, KIND)
    return tuple(
        source_of(one["name"], one["guided"], one["prediction"], *_unpacked(arrays, one["key"]), one["requests"])
        for one in description["sources"]
    )


def source_of(
    name: str, guided: bool, prediction: str, alpha: np.ndarray, sigma: np.ndarray, gram: np.ndarray, requests: int
) -> Source:
    """A source out of what was recorded with first-order steps: Euler's along a flow, DDIM's of the noise."""
    features = np.eye(len(alpha) + 1)[1:]
    sample = np.eye(len(alpha) + 1)[0]
    noise, data = np.zeros_like(features), np.zeros_like(features)
    for t, feature in enumerate(features):
        if prediction == FLOW:
            noise[t], data[t] = sample + alpha[t] * feature, sample - sigma[t] * feature
        else:
            noise[t], data[t] = feature, (sample - sigma[t] * feature) / alpha[t]
        if t + 1 < len(features):
            sample = alpha[t + 1] * data[t] + sigma[t + 1] * noise[t]
    return Source(name, guided, alpha, sigma, noise, data, gram, requests)


def generic_statistics(
    prediction: str,
    guided: bool,
    levels: Sequence[float],
    impulse_response: np.ndarray | None = None,
    *,
    without: Collection[str] = (),
) -> Statistics:
    """The statistics of a request of any model: the mean over the small models that start as noisy as the request.

    Args:
        prediction: what the denoiser predicts, one of `PREDICTIONS`.
        guided: whether the request has guidance.
        levels: the T + 1 noise levels of the request, the final 0 included.
        impulse_response: [T + 1, T], see `Statistics`; by default the flow-matching one.
        without: names of small models to leave out, to judge how well the others serve them.

    Returns:
        Statistics of one context, "*": what the scheduler is given.

    Raises:
        ValueError: the prediction is unknown, or all small models are left out.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction={prediction!r}: expected one of {PREDICTIONS}")
    wanted = np.asarray(levels, np.float64)[:-1]
    known = [one for one in sources() if one.guided == guided and one.name not in without]
    if not known:
        raise ValueError(f"without={sorted(without)}: leaves no small model: leave fewer of them out")
    highest = max(one.levels.max() for one in known)
    starts = min(float(wanted.max()), highest) - _REACH
    used = [one for one in known if one.levels.max() >= starts]
    return Statistics(
        sigmas=tuple(levels),
        timesteps=tuple(wanted.tolist()),
        contexts=(ANY_CONTEXT,),
        guidance=(1.0,),
        grams={"output": np.mean([one.as_predicted(prediction, wanted) for one in used], 0)},
        impulse_response=flow_impulse_response(levels) if impulse_response is None else impulse_response,
        requests=sum(one.requests for one in used),
    )


def generic_plan(
    prediction: str,
    guided: bool,
    budget: int | float,
    levels: Sequence[float],
    impulse_response: np.ndarray | None = None,
    *,
    without: Collection[str] = (),
) -> Plan:
    """The plan of a request of any model, of the output site.

    Which schedule and which rows serve models that nobody recorded was decided by leaving out each small model in turn
    and running the others' plans on it (docs/benchmarks.md). Without guidance the schedule is the one of least error
    where errors last, and the rows are the surrogate's; with few computed steps their mean with linear extrapolation.
    With guidance less is alike: the schedule counts no answers to errors, and rows lean on linear extrapolation, with
    few computed steps on regression.

    Args:
        prediction, guided, levels, impulse_response, without: see `generic_statistics`.
        budget: see `plan_for`.

    Raises:
        ValueError: the prediction is unknown, the budget is none, or all small models are left out.
    """
    known = generic_statistics(prediction, guided, levels, impulse_response, without=without)
    total, training = known.num_steps, {"requests": known.requests, "schedule": "generic"}
    number = computed_steps(budget, total)
    if number <= _BLIND:
        computed = spaced(total, number)
        return plan_from_weights(known, computed, closed_form(known, computed, "reuse"), training=training)
    gram, response = known.gram("output", ANY_CONTEXT), known.impulse_response
    gains = prior_error_gains(known, 1) if guided else lasting_error_gains(prediction, levels, response)
    model = Surrogate(gram[None], response, np.ones(1), gains)
    if guided:
        computed = search(gram, response[-1], number)
    else:
        computed = moved(model, [search(gram, lasting_response(response, gains[0, :, 0]), number)])
    linear, regression = linear_extrapolation(computed, 1, total), closed_form(known, computed)
    best, _ = model.optimise(computed, linear)
    reuse = closed_form(known, computed, "reuse")
    means = ((reuse, regression), (regression,), (regression, linear), (linear,), (linear, best), (best,))
    used = next(rows for most, rows in zip(_MOST[guided], means, strict=True) if number < most)
    return plan_from_weights(known, computed, np.mean(used, 0), training=training)


def lasting_error_gains(prediction: str, levels: Sequence[float], impulse_response: np.ndarray) -> np.ndarray:
    """Error gains [1, T, 1] of a perfect model of Gaussian data.

    Forecasts err in what the data will be, where its variance V is large. The data that a model sees in x = alpha d +
    sigma e answers an error of x by k = alpha V / (alpha^2 V + sigma^2), and what it predicts follows from both. So an
    error of the sample lasts, in units of the data: a flow answers by -1 / alpha. (Without the answer of the data, as
    in `prior_error_gains`, all errors heal. With guidance that is nearer to the truth: its condition leaves little
    open.)

    Args:
        prediction, levels, impulse_response: see `generic_statistics`.
    """
    sigma = np.maximum(np.asarray(levels, np.float64)[:-1], _TINY_SIGMA)
    alpha = 1 - sigma
    data = alpha * _VARIANCE / (alpha**2 * _VARIANCE + sigma**2)
    noise = (1 - alpha * data) / sigma
    if prediction == FLOW:
        gains = noise - data
    else:  # per unit of the final sample, which is x / alpha
        scale = np.hypot(alpha, sigma)
        gains = (
            alpha
            * {"epsilon": noise, "v_prediction": (alpha * noise - sigma * data) / scale, "sample": data}[prediction]
        )
    return (gains * carry(impulse_response)[:-1])[None, :, None]


def levels_of(sigmas: Sequence[float]) -> tuple[str, tuple[float, ...]]:
    """What a loop with these noise levels predicts, and its levels from 1 to 0: above 1 they are sigma / alpha."""
    if max(sigmas) <= 1.0:
        return FLOW, tuple(sigmas)
    return "epsilon", tuple(sigma / (1.0 + sigma) for sigma in sigmas)


def lasting_response(impulse_response: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """[T], what one unit of error of each step's output does to the final sample, where outputs answer errors.

    Args:
        impulse_response: [T + 1, T] of the scheduler.
        gains: [T], error gains of the outputs.
    """
    lasting = np.zeros_like(impulse_response)
    for step in range(1, len(lasting)):
        lasting[step] = impulse_response[step] + (impulse_response[step] * gains) @ lasting[:-1]
    return lasting[-1]


def _unpacked(arrays: dict[str, np.ndarray], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    alpha, sigma = arrays[f"{key}.alpha"], arrays[f"{key}.sigma"]
    return alpha, sigma, unpacked(arrays[f"{key}.gram"], len(alpha) + 1)
