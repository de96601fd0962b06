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
from ..plans.storage import Kind, SafetensorsFile

GUIDED = "guided"
_SAME = 1e-6  # noise levels come from float32
_RIDGE = 1e-6  # towards interpolation, relative


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
        guidance: Sequence[float] | None = None,
        seeds: Sequence[int] | None = None,
        batch: int = 1,
        sites: Sequence[str] | None = None,
        offload: bool = False,
    ) -> Statistics:
        """Run full requests and keep the mean inner products of their features.

        Nothing is written to disk. In memory are the T features of each site and context of one pipeline call (FLUX at
        1024x1024, 50 steps in bfloat16: 1.3 GB), and 64 MB for their product; each call's are dropped before the next.

        Where guidance is batched (one call for both halves, e.g. SDXL and DiT) there is one context, and its statistics
        are the mean over both halves. Where the denoiser also returns a variance, that part of the output is left out.
        What a pipeline does to the guided sum (Qwen-Image rescales it) is not in the statistics.

        This is the one place where `lesa.planner` imports `lesa.models`, which lies above it: only when it is called.

        Args:
            target: a diffusers pipeline, or a bare denoiser in a loop of your own.
            prompts: for a pipeline that takes prompts, at least one.
            request: keyword arguments of the pipeline call, JSON-able, e.g. {"num_inference_steps": 50}.
            requests: in the place of prompts: functions without arguments, each of which runs one request.
            sigmas: of a bare denoiser's requests, T + 1 with the final 0; None reads them from the timestep argument,
                which flow matching gives as sigma or 1000 * sigma.
            guidance: the weight of each context in what the scheduler is given, in the order the contexts are called;
                None takes (s, 1 - s) for a guidance scale s of the request, `true_cfg_scale` if above 1, else
                `guidance_scale`.
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
        return gather_calls(target, calls, request, sigmas=sigmas, guidance=guidance, sites=sites, offload=offload)

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
        sigmas = tuple(float(sigma) for sigma in sigmas)
        if len(sigmas) < 2 or not all(map(math.isfinite, sigmas)):
            raise StatisticsError(f"sigmas={sigmas!r:.200}: expected the T + 1 finite noise levels of a request")
        weights = interpolation(self.sigmas[:-1], sigmas[:-1])
        every = np.kron(np.eye(len(self.contexts)), weights)
        return replace(
            self,
            sigmas=sigmas,
            timesteps=tuple(weights @ self.timesteps) if timesteps is None else tuple(timesteps),
            grams={site: _symmetric(every @ gram @ every.T) for site, gram in self.grams.items()},
            impulse_response=flow_impulse_response(sigmas) if impulse_response is None else impulse_response,
        )

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The statistics as arrays and a description, see `SafetensorsFile`."""
        # Half of a symmetric matrix in float64 is as large as a whole one in float32, which would lose the differences
        # of neighbouring steps.
        arrays = {f"gram.{site}": gram[np.triu_indices(len(gram))] for site, gram in self.grams.items()}
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
        grams = {name.removeprefix("gram."): _unpack(arrays[name], size) for name in sorted(arrays) if "." in name}
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


def _unpack(half: np.ndarray, size: int) -> np.ndarray:
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size)] = half
    return np.triu(matrix) + np.triu(matrix, 1).T
