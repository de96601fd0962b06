"""Statistics: inner products of a denoiser's features, which replace the features, and interpolation in sigma.

The best weights of a forecast and the cost of a schedule are quadratic forms in these inner products. So a matrix of
T x T numbers for each site and pair of contexts is enough, whatever the size of the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from ..plans.rows import SITES
from ..plans.schedule import noise_levels
from ..plans.storage import Kind, SafetensorsFile

GUIDED = "guided"
_SAME = 1e-6  # noise levels come from float32
_RIDGE = 1e-6  # towards interpolation, relative
_ROUNDING = 1e-9  # of squares: what float32 leaves of nothing
_TINY = 1e-30
_EXACT = 1e-3  # of the sample's change: what float32 leaves unexplained


class StatisticsError(ValueError):
    """Statistics are malformed, unreadable, or do not fit each other."""


@dataclass(frozen=True)
class Statistics(SafetensorsFile):
    """Mean inner products of the features of full requests.

    Args:
        sigmas: the T + 1 noise levels of the requests, the final 0 included.
        timesteps: the denoiser's timestep argument at each of the T steps.
        contexts: the C cache contexts, in the order they were met, e.g. ("cond", "uncond").
        guidance: weight of each context in what the scheduler is given: (1.0,), or (s, 1 - s) at guidance scale s.
        grams: for each site the symmetric [C * T, C * T] float64; block (a, b) holds at (i, j) the mean of
            F^a_i * F^b_j over requests and elements.
        impulse_response: R [T + 1, T] float64; the sample before step t is x_t = (a part of the noise) +
            sum_i R[t, i] v_i, where the scheduler is given v_i at step i; 0 for i >= t.
        requests: how many were averaged, at least 1.
        scheduler: class name of the scheduler; None for a loop of one's own.
        denoiser: class name of the denoiser.
        config_hash: hash of its configuration.
        request: keyword arguments of the pipeline calls, JSON-able.

    Raises:
        StatisticsError: a value is out of place; the message names it.
    """

    kind: ClassVar[Kind] = Kind(
        "statistics", "lesa-statistics-1", "statistics.safetensors", StatisticsError, "Statistics.save"
    )

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    contexts: tuple[str, ...]
    guidance: tuple[float, ...]
    grams: Mapping[str, np.ndarray]
    impulse_response: np.ndarray
    requests: int
    scheduler: str | None = None
    denoiser: str | None = None
    config_hash: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sigmas", "timesteps", "guidance"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        object.__setattr__(self, "contexts", tuple(self.contexts))
        object.__setattr__(self, "impulse_response", np.asarray(self.impulse_response, np.float64))
        object.__setattr__(self, "grams", {site: np.asarray(gram, np.float64) for site, gram in self.grams.items()})
        self._check()

    @classmethod
    def gather(
        cls,
        target: Any,
        prompts: Sequence[str] | None = None,
        *,
        request: Mapping[str, Any] | None = None,
        requests: Sequence[Callable[[], Any]] | None = None,
        sigmas: Sequence[float] | None = None,
        scheduler: Any = None,
        guidance: Sequence[float] | None = None,
        seeds: Sequence[int] | None = None,
        batch: int = 1,
        sites: Sequence[str] | None = None,
        offload: bool = False,
    ) -> Statistics:
        """Run full requests and keep the mean inner products of their features.

        Nothing is written to disk. In memory are the T features of each site and context of one pipeline call (FLUX at
        1024x1024, 50 steps in bfloat16: 1.3 GB), and 64 MB for their product; each call's are dropped before the next.

        Where guidance is batched (one call for both halves, e.g. SDXL and DiT) there is one context. Its output is then
        the sum of the halves that the scheduler is given; hidden features are averaged over both halves. Where the
        denoiser also returns a variance, that part of the output is left out. What a pipeline does to the guided sum
        (Qwen-Image rescales it) is not in the statistics.

        This is the one place where `lesa.planner` imports `lesa.models`, which lies above it: only when it is called.

        Args:
            target: a diffusers pipeline, or a bare denoiser in a loop of your own.
            prompts: for a pipeline that takes prompts, at least one.
            request: keyword arguments of the pipeline call, JSON-able, e.g. {"num_inference_steps": 50}.
            requests: in the place of prompts: functions without arguments, each of which runs one request.
            sigmas: the T + 1 noise levels of a bare denoiser's requests, the final 0 included. A flow model needs none:
                its timesteps are sigma or 1000 * sigma.
            scheduler: the diffusers scheduler of the loop that calls a bare denoiser, in the place of `sigmas`.
            guidance: the weight of each context in what the scheduler is given, in the order the contexts are called,
                or of each part of the batch where one call holds all. None finds them from how the samples change;
                where that does not tell, by the guidance scale of the request (`true_cfg_scale` if above 1, else
                `guidance_scale`).
            seeds: of each prompt's noise; the prompt's index by default.
            batch: prompts run in one pipeline call.
            sites: "hidden", "output" or both; both by default, where the hidden site of the denoiser is known.
            offload: keep the features on the CPU until their product is made, which is slower.

        Raises:
            StatisticsError: features are not finite or were lost, or the requests are not of one kind.
            ValueError: an argument is out of place, or lesa is enabled on the target.
        """
        from ..fitting.trials import gather_calls
        from ..models.pipeline import calls_of

        request = request or {}
        calls = calls_of(target, prompts, requests, request, seeds, batch)
        loop = {"sigmas": sigmas, "scheduler": scheduler, "guidance": guidance}
        return gather_calls(target, calls, request, **loop, sites=sites, offload=offload)

    @property
    def num_steps(self) -> int:
        """T, the number of steps of a request."""
        return len(self.sigmas) - 1

    def gram(self, site: str, context: str) -> np.ndarray:
        """The inner products [T, T] of one context's features, or of what guidance makes of all contexts.

        Args:
            site: "hidden" or "output".
            context: its name, or "guided": sum_a guidance_a F^a, what the scheduler is given (at the output site).

        Raises:
            StatisticsError: the statistics hold no such site or context.
        """
        if site not in self.grams:
            raise StatisticsError(f"site={site!r}: these statistics hold {sorted(self.grams)}; gather that site too")
        blocks = self.grams[site].reshape(len(self.contexts), self.num_steps, len(self.contexts), self.num_steps)
        if context == GUIDED:
            weights = np.asarray(self.guidance)
            return np.einsum("a,aibj,b->ij", weights, blocks, weights)
        if context not in self.contexts:
            raise StatisticsError(
                f"context={context!r}: these statistics hold {list(self.contexts)} and {GUIDED!r}; "
                "gather requests that use it"
            )
        index = self.contexts.index(context)
        return blocks[index, :, index].copy()

    def at(
        self,
        sigmas: Sequence[float],
        impulse_response: np.ndarray | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> Statistics:
        """The statistics of requests with other noise levels, interpolated in sigma.

        Features are assumed to be smooth in sigma. Each is a weighted sum of the gathered ones, so the matrices stay
        positive semidefinite. Beyond the gathered levels features are extrapolated for half a step, then constant.

        Args:
            sigmas: the T' + 1 noise levels of the other request, the final 0 included.
            impulse_response: [T' + 1, T'] of its scheduler; None takes the flow-matching one.
            timesteps: its T' timesteps; None interpolates them too.

        Raises:
            StatisticsError: `sigmas` are no noise levels, or lengths differ.
        """
        if impulse_response is None:  # by a user: a scheduler's levels need not end at 0
            sigmas = noise_levels(sigmas, error=StatisticsError)
        weights = interpolation(self.sigmas[:-1], sigmas[:-1])
        every = np.kron(np.eye(len(self.contexts)), weights)
        return replace(
            self,
            sigmas=tuple(sigmas),
            timesteps=tuple(weights @ self.timesteps) if timesteps is None else tuple(timesteps),
            grams={site: _symmetric(every @ gram @ every.T) for site, gram in self.grams.items()},
            impulse_response=flow_impulse_response(sigmas) if impulse_response is None else impulse_response,
        )

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The statistics as arrays and a description, see `SafetensorsFile`."""
        # Half of a symmetric matrix in float64 is as large as a whole one in float32, which would lose the differences
        # of neighbouring steps.
        arrays = {f"gram.{site}": packed(gram) for site, gram in self.grams.items()}
        arrays |= {name: np.asarray(getattr(self, name), np.float64) for name in ("sigmas", "timesteps", "guidance")}
        arrays["response"] = self.impulse_response
        names = ("requests", "scheduler", "denoiser", "config_hash")
        description = {"contexts": list(self.contexts), "request": dict(self.request)}
        return arrays, description | {name: getattr(self, name) for name in names}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], description: dict[str, Any]) -> Statistics:
        """The statistics of `to_arrays`."""
        known = {name: value for name, value in description.items() if name != "format"}
        numbers: dict[str, Any] = {name: array for name, array in arrays.items() if "." not in name}
        size = len(known["contexts"]) * len(numbers["timesteps"])
        grams = {name.removeprefix("gram."): unpacked(arrays[name], size) for name in sorted(arrays) if "." in name}
        return cls(grams=grams, impulse_response=numbers.pop("response"), **numbers, **known)

    def title(self) -> str:
        """One line: of which denoiser, and of how many requests."""
        return f"Statistics: {self.denoiser or 'any denoiser'}, {self.requests} requests of {self.num_steps} steps"

    def _check(self) -> None:
        steps, contexts = len(self.timesteps), len(self.contexts)
        shape = (contexts * steps,) * 2
        if steps < 1 or len(self.sigmas) != steps + 1 or not all(map(math.isfinite, self.sigmas)):
            raise StatisticsError(
                f"{len(self.sigmas)} sigmas and {steps} timesteps: expected T + 1 finite noise levels and T timesteps"
            )
        if contexts < 1 or len(self.guidance) != contexts or not all(map(math.isfinite, self.guidance)):
            raise StatisticsError(f"guidance={self.guidance}: expected a weight for each of {list(self.contexts)}")
        if self.requests < 1:
            raise StatisticsError(f"requests={self.requests}: expected at least 1")
        if not self.grams or not set(self.grams) <= set(SITES):
            raise StatisticsError(f"grams are of sites {sorted(self.grams)}: expected some of {SITES}")
        for site, gram in self.grams.items():
            if gram.shape != shape or not np.isfinite(gram).all():
                raise StatisticsError(f"gram of site {site!r} has shape {gram.shape}: expected {shape}, all finite")
            if not np.allclose(gram, gram.T, 1e-6, 1e-6 * float(np.abs(gram).max())):
                raise StatisticsError(f"gram of site {site!r} is not symmetric, as inner products are")
        if self.impulse_response.shape != (steps + 1, steps) or not np.isfinite(self.impulse_response).all():
            raise StatisticsError(
                f"impulse_response has shape {self.impulse_response.shape}: expected {(steps + 1, steps)}, all finite"
            )


def guidance_of(changes: np.ndarray) -> tuple[np.ndarray, float] | None:
    """The weights that a sampler gives its K contexts, from what it does to the sample.

    A step of Euler's or DDIM's method is x' = a x + b sum_c w_c v_c. Least squares of x' on x and all v_c gives b w_c,
    and the weights of guidance sum to one. Methods of higher order take the first step so, and later ones nearly.

    Args:
        changes: [S, K + 2, K + 2], inner products of x', x, v_1 ... v_K at S steps.

    Returns:
        The weights [K] and the share of the change that they leave unexplained: medians over the steps that are
        explained exactly, or else over all. None where no step tells them: all outputs are alike, or nothing changes.
    """
    found = []
    for gram in changes:
        rest = gram - np.outer(gram[:, 1], gram[1]) / max(gram[1, 1], _TINY)  # what x does not explain
        change, along, inner = rest[0, 0], rest[2:, 0], rest[2:, 2:]
        size = np.sqrt(np.maximum(np.diag(inner), _TINY))
        if change <= _ROUNDING * gram[0, 0] or np.linalg.eigvalsh(inner / np.outer(size, size))[0] <= _ROUNDING:
            continue
        scaled = np.linalg.solve(inner, along)
        if scaled.sum():
            found.append([*(scaled / scaled.sum()), math.sqrt(max(1 - scaled @ along / change, 0.0))])
    if not found:
        return None
    *weights, share = np.median([one for one in found if one[-1] <= _EXACT] or found, 0)
    return np.array(weights) / sum(weights), float(share)


def apart_from_flow(changes: np.ndarray, guidance: Sequence[float], sigmas: Sequence[float]) -> float:
    """The share of the sample's changes that Euler steps along a flow, x' = x + (sigma' - sigma) v, leave unexplained.

    Args:
        changes: [T - 1, K + 2, K + 2], see `guidance_of`; all of the request's steps but the last.
        guidance: [K], v = sum_c guidance_c v_c. Some pipelines rescale this sum: 0.2 to 2 times it will do.
        sigmas: the T + 1 noise levels.
    """
    steps, weights = np.diff(sigmas)[: len(changes)], np.asarray(guidance)
    change = np.array([gram[0, 0] - 2 * gram[0, 1] + gram[1, 1] for gram in changes]).sum()
    along = steps @ ((changes[:, 0, 2:] - changes[:, 1, 2:]) @ weights)
    flow = steps**2 @ np.einsum("a,sab,b->s", weights, changes[:, 2:, 2:], weights)
    size = np.clip(along / max(flow, _TINY), 0.2, 2.0)
    return math.sqrt(max(change - 2 * size * along + size**2 * flow, 0.0) / max(change, _TINY))


def flow_impulse_response(sigmas: Sequence[float]) -> np.ndarray:
    """The impulse response of Euler steps along a flow: R[t, i] = sigma_{i+1} - sigma_i for i < t.

    Args:
        sigmas: the T + 1 noise levels.

    Returns:
        [T + 1, T] float64.
    """
    steps = np.diff(np.asarray(sigmas, np.float64))
    return np.tril(np.broadcast_to(steps, (len(steps) + 1, len(steps))), -1)


def interpolation(known: Sequence[float], wanted: Sequence[float]) -> np.ndarray:
    """Weights that interpolate values at known noise levels to other noise levels.

    A level that comes twice in a request, as in Heun's method, has a curve for each time.

    Args:
        known: T noise levels, in any order.
        wanted: T' noise levels.

    Returns:
        [T', T] float64; every row sums to one.
    """
    weights = np.zeros((len(wanted), len(known)))
    turns, wanted_turns = _turns(known), _turns(wanted)
    for turn in set(wanted_turns):
        last = {round(level / _SAME): i for i, level in enumerate(known) if turns[i] <= turn}
        nodes = np.array([i for _, i in sorted(last.items())])
        rows = np.array([i for i, own in enumerate(wanted_turns) if own == turn])
        weights[np.ix_(rows, nodes)] = _curve(np.asarray(known)[nodes], np.asarray(wanted)[rows])
    return weights


def learned(weights: np.ndarray, known: Sequence[float], wanted: Sequence[float], gram: np.ndarray) -> np.ndarray:
    """Interpolation weights with those below all known noise levels replaced by least squares.

    Near zero noise, features look alike at every scale. So a level is forecast from the three levels above it with the
    weights that forecast the lowest known level from three levels as many times higher.

    Args:
        weights: [T', T], of `interpolation`.
        known: T noise levels.
        wanted: T' noise levels.
        gram: [T, T], mean inner products of the features at the known ones.
    """
    rows, levels, others = weights.copy(), np.asarray(known), np.asarray(wanted)
    for i in np.flatnonzero(others < levels.min()):
        nodes = np.flatnonzero(weights[i])
        nodes = nodes[np.argsort(levels[nodes])]
        x = levels[nodes]
        at = max(others[i], x[0] - (x[1] - x[0]) / 2) if len(nodes) == 3 else 0.0
        if at > 0 and x[0] * x[2] / at <= levels.max():
            higher = interpolation(known, (x[0] * x / at).tolist())
            inner, start = higher @ gram @ higher.T, weights[i, nodes]
            ridge = _RIDGE * np.trace(inner) / 3 * np.eye(3)
            rows[i, nodes] += np.linalg.solve(inner + ridge, higher @ gram[:, nodes[0]] - inner @ start)
    return rows


def _turns(levels: Sequence[float]) -> list[int]:
    """How often each level came before."""
    keys = [round(level / _SAME) for level in levels]
    return [keys[:i].count(key) for i, key in enumerate(keys)]


def _curve(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Weights [N', N] of the cubic Hermite curve through values at ascending x [N], evaluated at `at` [N'].

    Its slope at a node is that of the parabola through the node and its neighbours; at an end, that of the outermost
    parabola. Beyond its ends the curve goes on for half a step and then is constant. Above it is linear. Below, where
    features change faster the less noise is left, it is the parabola in sqrt(x) through the three lowest nodes.
    """
    if len(x) == 1:
        return np.ones((len(at), 1))
    one, step = np.eye(len(x)), np.diff(x)
    rise = np.diff(one, axis=0) / step[:, None]
    slope = np.concatenate([rise, rise[-1:]])
    if len(x) > 2:
        before, after = step[:-1, None], step[1:, None]
        slope[1:-1] = (rise[:-1] * after + rise[1:] * before) / (before + after)
        slope[0], slope[-1] = 2 * rise[0] - slope[1], 2 * rise[-1] - slope[-2]
    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    h = step[left, None]
    inside = np.clip(at, x[0], x[-1])
    u = (inside - x[left])[:, None] / h
    values = (1 + 2 * u) * (1 - u) ** 2 * one[left] + u**2 * (3 - 2 * u) * one[left + 1]
    slopes = u * (1 - u) ** 2 * slope[left] - u**2 * (1 - u) * slope[left + 1]
    beyond = np.clip((at - inside)[:, None], -h / 2, h / 2)
    curve = values + h * slopes + beyond * np.where(beyond < 0, slope[0], slope[-1])
    below = at < x[0]
    if below.any() and len(x) > 2 and x[0] > 0:
        curve[below] = 0.0
        curve[below, :3] = _parabola(np.sqrt(x[:3]), np.sqrt(np.maximum(at[below], max(x[0] - step[0] / 2, 0.0))))
    return curve


def _parabola(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Weights [N', 3] of the values at x [3] in the parabola through them at `at` [N'], by Lagrange's formula."""
    weights = np.ones((len(at), 3))
    for i in range(3):
        for j in {0, 1, 2} - {i}:
            weights[:, i] *= (at - x[j]) / (x[i] - x[j])
    return weights


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    return (matrix + matrix.T) / 2


def packed(matrix: np.ndarray) -> np.ndarray:
    """Half of a symmetric matrix, as files have it."""
    return matrix[np.triu_indices(len(matrix))]


def unpacked(half: np.ndarray, size: int) -> np.ndarray:
    """The symmetric matrix [size, size] of a half."""
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size)] = half
    return np.triu(matrix) + np.triu(matrix, 1).T
