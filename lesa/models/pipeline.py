"""Run requests: pipeline calls with given prompts and noise, functions of the user's, and the recorder of features."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..planner.statistics import StatisticsError
from ..runtime.clock import Call, Request, largest
from ..runtime.driver import Driver, Stats
from . import hooks

PART = "part of the batch"
_MOST_PARTS = 4  # cond, uncond and two more
_CHUNK = 1 << 26  # bytes of the widened features that one product reads


def run(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    request: Mapping[str, Any],
    driver: Driver | None = None,
    site: str = "hidden",
    **more: Any,
) -> Any:
    """One pipeline call on `prompts` with noise from CPU generators, run by `driver`.

    Args:
        pipe: a diffusers pipeline.
        prompts: B prompts.
        seeds: B seeds.
        request: keyword arguments of the pipeline call.
        driver: decides computed and forecast steps; None leaves the pipeline as it is.
        site: the driver's site.
        more: further keyword arguments; the image is not decoded unless `output_type` says so.

    Returns:
        What the pipeline returns.

    Raises:
        ValueError: the pipeline takes no prompt or not one of the keyword arguments, or lesa is enabled on it already;
            or `prompts` is no list of prompts.
    """
    check_prompts(prompts)
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" not in parameters:
        raise ValueError(f"{type(pipe).__name__} takes no `prompt`: a text-to-image or -video pipeline is needed")
    kwargs = {"output_type": "latent", **request, **more}
    unknown = sorted(set(kwargs) - set(parameters))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}: leave it out of the request")
    if isinstance(kwargs.get("negative_prompt"), str):
        kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(prompts)
    kwargs["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    call = functools.partial(pipe, prompt=list(prompts), **kwargs)
    return call() if driver is None else _driven(call, pipe, driver, site)


def _driven(function: Callable[[], Any], target: Any, driver: Driver, site: str) -> Any:
    """What a function returns when a driver is put on the target meanwhile.

    Raises:
        ValueError: lesa is enabled on it already.
    """
    hooks.check_free(target)
    hooks.attach(target, driver, site)
    try:
        return function()
    finally:
        hooks.detach(target)


def check_prompts(prompts: Sequence[str]) -> None:
    """Check a list of prompts before anything runs.

    Raises:
        ValueError: it is one string or no list, empty, or holds something else than strings.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts!r:.200} is one string: give a list, e.g. prompts=[{prompts!r:.80}]")
    if not isinstance(prompts, (Sequence, np.ndarray)):
        raise ValueError(f"prompts is a {type(prompts).__name__}: give a list, e.g. list(prompts)")
    if not len(prompts):
        raise ValueError("prompts is empty: give at least one prompt")
    wrong = next((i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)), None)
    if wrong is not None:
        raise ValueError(f"prompts[{wrong}]={prompts[wrong]!r:.80}: expected a string")


def check_batch(batch: Any) -> None:
    """Check how many prompts one pipeline call gets.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    if not isinstance(batch, (int, np.integer)) or isinstance(batch, bool) or batch < 1:
        raise ValueError(f"batch={batch!r}: expected a whole number of prompts in one call, at least 1")


def seeds_of(count: int, seeds: Sequence[int] | None, what: str = "prompt") -> tuple[int, ...]:
    """The seeds of the noise of `count` prompts or requests; their indices by default.

    Raises:
        ValueError: they are not as many whole numbers.
    """
    if seeds is None:
        return tuple(range(count))
    listed = isinstance(seeds, (Sequence, np.ndarray))
    if not listed or not all(isinstance(one, (int, np.integer)) and not isinstance(one, bool) for one in seeds):
        raise ValueError(f"seeds={seeds!r:.80}: expected a list of whole numbers, one a {what}")
    if len(seeds) != count:
        raise ValueError(f"seeds={seeds!r:.80}: {len(seeds)} seeds for {count} {what}s; give one seed a {what}")
    return tuple(int(one) for one in seeds)


def check_request(request: Any) -> None:
    """Check the keyword arguments of a pipeline call before anything runs.

    Raises:
        ValueError: they are no dictionary by names, cannot be kept as JSON, hold a prompt, or ask for no steps.
    """
    if not isinstance(request, Mapping) or not all(isinstance(name, str) for name in request):
        raise ValueError(
            f"request={request!r:.200}: expected keyword arguments of the pipeline call, e.g. "
            '{"num_inference_steps": 50}'
        )
    try:
        json.dumps(dict(request))
    except TypeError as error:
        raise ValueError(f"request={request!r:.200} cannot be kept as JSON ({error}): give plain values") from error
    if "prompt" in request:
        raise ValueError(f"request holds prompt={request['prompt']!r:.80}: give prompts=, one for each request")
    steps = request.get("num_inference_steps")
    if isinstance(steps, (int, float)) and not steps >= 1:
        raise ValueError(f"request holds num_inference_steps={steps!r}: expected at least 1")


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line; blank lines are left out.

    Raises:
        ValueError: the file is missing, no UTF-8 text, or has no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompt file {str(path)!r} does not exist: give a text file with one prompt a line")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {str(path)!r} is not UTF-8 text ({error}): save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {str(path)!r} is empty: write at least one prompt, one a line")
    return prompts


@dataclass(frozen=True)
class PipelineCall:
    """One call of a pipeline, or of a function of the user's, that runs one or more requests.

    Args:
        labels: names of its requests, for errors.
        run: runs them under a driver at a site, and returns what the pipeline or function returned.
    """

    labels: tuple[str, ...]
    run: Callable[[Any, str], Any]


def calls_of(
    target: Any,
    prompts: Sequence[str] | None,
    requests: Sequence[Callable[[], Any]] | None,
    request: Mapping[str, Any],
    seeds: Sequence[int] | None,
    batch: int,
    **more: Any,
) -> list[PipelineCall]:
    """The calls that run these requests.

    Args:
        target, prompts, requests, request, seeds, batch: see `Statistics.gather`.
        more: further keyword arguments of the pipeline call.

    Raises:
        ValueError: an argument is out of place.
    """
    if (prompts is None) == (requests is None):
        given = "neither is given" if prompts is None else "both are given"
        raise ValueError(
            f"prompts, requests: {given}; give either prompts, for a pipeline, or requests, functions each of which "
            "runs one request"
        )
    check_request(request)
    if requests is not None:
        check_functions(requests)
        return [
            PipelineCall((f"request {i}",), functools.partial(_driven, one, target)) for i, one in enumerate(requests)
        ]
    assert prompts is not None
    if isinstance(target, torch.nn.Module):
        raise ValueError("prompts are for a pipeline: for a bare denoiser give requests, functions that run it")
    check_prompts(prompts)
    check_batch(batch)
    seeds = seeds_of(len(prompts), seeds)
    return [
        PipelineCall(
            tuple(f"prompt {i} ({prompts[i]!r})" for i in range(begin, min(begin + batch, len(prompts)))),
            functools.partial(
                run, target, prompts[begin : begin + batch], seeds[begin : begin + batch], request, **more
            ),
        )
        for begin in range(0, len(prompts), batch)
    ]


def check_functions(requests: Sequence[Callable[[], Any]]) -> None:
    """Check a list of functions before anything runs.

    Raises:
        ValueError: it is no list, empty, or holds something that cannot be called.
    """
    if not isinstance(requests, Sequence):
        raise ValueError("requests is not a list: give functions, each of which runs one request, e.g. requests=[run]")
    if not len(requests):
        raise ValueError("requests is empty: give at least one function")
    wrong = next((i for i, function in enumerate(requests) if not callable(function)), None)
    if wrong is not None:
        raise ValueError(
            f"requests[{wrong}] is a {type(requests[wrong]).__name__}: expected a function without arguments that runs "
            "one request"
        )


class FeatureRecorder:
    """A driver that computes every step of one call and records its features.

    It keeps the features of `sites` until `gram` takes their inner products, or hands each feature of the site it is
    attached at to `sink` and keeps none.

    Args:
        labels: names of the call's requests, for errors.
        sites: of the features to keep: "hidden", "output" or both.
        offload: keep them on the CPU.
        sink: takes each denoiser call and its feature.
        error: what is raised where the features cannot be recorded.

    Attributes:
        weights: of the parts of guidance that one call holds, see `combine`.
    """

    def __init__(
        self,
        labels: Sequence[str],
        sites: Sequence[str] = (),
        *,
        offload: bool = False,
        sink: Callable[[Call, Tensor], None] | None = None,
        error: type[Exception] = StatisticsError,
    ) -> None:
        self.stats = Stats()
        self.labels = labels
        self.sites = tuple(sites)
        self.request: Request | None = None
        self.timesteps: list[float] = []
        self.contexts: list[str] = []
        self.weights: tuple[float, ...] = (1.0,)
        self._parts = 1
        self._samples: list[Tensor] = []
        self._device = torch.device("cpu")
        self._offload, self._sink, self._error = offload, sink, error
        self._features: dict[str, dict[str, list[Tensor]]] = {site: {} for site in sites}

    def begin(self, request: Request) -> None:
        """A request starts.

        Raises:
            StatisticsError, or the `error` given: it is the second one.
        """
        if self.request is not None:
            raise self._error(
                f"{self.labels[0]} runs more than one request (its timesteps start again): give one function a request"
            )
        self.request = request

    def forecast(self, call: Call) -> None:
        """Nothing is forecast; the timesteps and contexts are kept."""
        self._device = call.sample.device
        if call.context not in self.contexts:
            self.contexts.append(call.context)
        if call.step == len(self.timesteps):
            self.timesteps.append(largest(call.timestep))
            if "output" in self.sites:
                # Chance makes some samples equal at first; only guidance keeps them so.
                parts = parts_of(call.sample, len(self.labels))
                self._parts = min(parts, self._parts) if self._samples else parts
                self._samples.append(self._copy(call.sample))

    def keep(self, call: Call, feature: Tensor | None) -> None:
        """Keep a hidden feature, or hand on the feature of the site attached at."""
        assert feature is not None  # `lose` raises
        if self._sink is not None:
            self._sink(call, feature)
        if "hidden" in self.sites:
            self._append("hidden", call, feature)

    def observe(self, call: Call, output: Tensor) -> None:
        """Keep an output, without the variance that some denoisers append to their channels."""
        if "output" in self.sites:
            self._append("output", call, without_variance(output, call))

    def refuse(self, call: Call, reason: str) -> None:
        """Nothing is forecast, so nothing can be refused."""

    def lose(self, reason: str) -> None:
        """A request without its features is of no use.

        Raises:
            StatisticsError, or the `error` given: always.
        """
        raise self._error(f"the hidden features cannot be taken: {reason}; take the output site")

    def features(self, site: str) -> dict[str, list[Tensor]]:
        """The features of each context so far, one a step."""
        return self._features[site]

    @property
    def summed(self) -> list[str]:
        """What guidance sums: the contexts, or the parts of the batch of one."""
        several = len(self.contexts) == 1 and self._parts > 1
        return [f"{PART} {i}" for i in range(self._parts)] if several else list(self.contexts)

    def changes(self) -> np.ndarray | None:
        """What the sampler does: [T - 1, K + 2, K + 2], see `guidance_of`, with the outputs of all that is summed.

        Returns:
            None where outputs are missing or not of the sample's size, or there is one step only.
        """
        outputs, samples = list(self._features.get("output", {}).values()), self._samples
        if {len(own) for own in outputs} != {len(samples)} or len(samples) < 2:
            return None
        parts, steps = len(self.summed) if len(outputs) == 1 else 1, []
        for step in range(len(samples) - 1):
            tensors = [part for own in outputs for part in own[step].chunk(parts)]
            # Some samples hold a mask or a first picture behind what the sampler changes.
            size = tuple(slice(length) for length in tensors[0].shape)
            for sample in (samples[step].chunk(parts)[0], samples[step + 1].chunk(parts)[0]):
                tensors.insert(0, sample[size] if sample.dim() == len(size) else sample)
            if len({tensor.shape for tensor in tensors}) > 1:
                return None
            steps.append(_gram([tensor.flatten() for tensor in tensors], self._device))
        return np.stack(steps)

    @property
    def sample(self) -> Tensor:
        """The latest step's sample."""
        return self._samples[-1]

    @property
    def start(self) -> Tensor:
        """The first step's sample."""
        return self._samples[0]

    def label_images(self) -> None:
        """Take each image of the batch for a request, where nobody said how many there are."""
        parts = self._parts if len(self.contexts) == 1 else 1
        self.labels = [f"{self.labels[0]}, image {i}" for i in range(len(self.start) // parts)]

    def combine(self, weights: Sequence[float]) -> None:
        """Put what guidance makes of a batch's parts in the place of each output; drop all samples but the first."""
        del self._samples[1:]
        if len(self.contexts) == 1 and len(weights) > 1:
            self.weights = tuple(weights)
            for own in self._features.get("output", {}).values():
                own[:] = [combined(feature, weights) for feature in own]

    def check(self, site: str) -> None:
        """Check that each context ran at every step, on one sample.

        Raises:
            StatisticsError: a feature is missing, or of another size than the others.
        """
        by_context = self._features[site]
        for context, own in by_context.items():
            if len(own) != len(self.timesteps):
                raise StatisticsError(
                    f"context {context!r} ran {len(own)} of {len(self.timesteps)} steps in {self.labels[0]}: every "
                    "context must run at every step (no guidance interval)"
                )
        if len({feature.numel() for own in by_context.values() for feature in own}) > 1:
            raise StatisticsError(
                f"features of site {site!r} differ in size within one request ({self.labels[0]}): contexts and steps "
                "must work on one sample"
            )

    def gram(self, site: str) -> np.ndarray:
        """The mean inner products [C * T, C * T] of a site's features, which are dropped.

        Raises:
            StatisticsError: a feature is missing, not finite, or of another size than the others.
        """
        self.check(site)
        by_context = self._features[site]
        features = [feature for own in by_context.values() for feature in own]
        gram = _gram([feature.flatten() for feature in features], self._device)
        wrong = ~np.isfinite(np.diag(gram)).reshape(len(by_context), -1)
        if wrong.any():
            step, index = np.argwhere(wrong.T)[0]  # the first in time: others may follow from it
            context = list(by_context)[index]
            label = not_finite(by_context[context][step], self.labels) or self.labels[0]
            raise StatisticsError(not_finite_message(f"site {site!r}, step {step}, context {context!r}, {label}"))
        by_context.clear()
        return gram

    def _append(self, site: str, call: Call, feature: Tensor) -> None:
        self._features[site].setdefault(call.context, []).append(self._copy(feature))

    def _copy(self, feature: Tensor) -> Tensor:
        # It may be a view of more, or its memory the denoiser's own.
        return feature.detach().to("cpu" if self._offload else feature.device, copy=True).contiguous()


def without_variance(output: Tensor, call: Call) -> Tensor:
    """The part of a denoiser's output [m B, ...] that is of the sample's size."""
    channels = call.sample.shape[1]
    return output[:, :channels] if call.sample.dim() > 3 and output.shape[1] == 2 * channels else output


def parts_of(sample: Tensor, count: int) -> int:
    """How often a batch [m B, ...] holds the samples of B requests: m where all parts of guidance run in one call."""
    for parts in range(_MOST_PARTS, 1, -1):
        if len(sample) % (parts * count) == 0:
            first, *others = sample.nan_to_num().chunk(parts)  # what is not finite is told later
            if all(torch.equal(first, other) for other in others):
                return parts
    return 1


def combined(output: Tensor, weights: Sequence[float]) -> Tensor:
    """What guidance makes of an output [m B, ...] whose m parts have these weights: [B, ...], at least in float32."""
    if len(weights) == 1:
        return output
    wide = output.to(torch.promote_types(output.dtype, torch.float32))
    return torch.tensordot(wide.new_tensor(weights), wide.unflatten(0, (len(weights), -1)), 1)


def by_request(batch: Tensor, count: int) -> Tensor:
    """A batch [m B, ...] of B requests as [B, m, ...]: a pipeline call repeats its requests, m times."""
    return batch.unflatten(0, (-1, count)).transpose(0, 1)


def not_finite(feature: Tensor, labels: Sequence[str]) -> str | None:
    """The label of the first request whose feature holds NaN or infinity."""
    if len(feature) % len(labels):
        return None
    finite = by_request(feature.detach().isfinite(), len(labels)).flatten(1).all(1).tolist()
    return None if all(finite) else labels[finite.index(False)]


def not_finite_message(where: str) -> str:
    """What to say and to do where a feature holds NaN or infinity."""
    return (
        f"the feature of {where} holds NaN or infinity: check the model's weights and dtype (float16 overflows in many "
        "transformers; bfloat16 does not)"
    )


def _gram(features: Sequence[Tensor], device: torch.device) -> np.ndarray:
    """Mean products of flat features, in float64; widened piece by piece, since they are large."""
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    size = features[0].numel()
    piece = max(_CHUNK // (8 * len(features)), 1)
    total = torch.zeros(len(features), len(features), dtype=torch.float64, device=device)
    for begin in range(0, size, piece):
        part = torch.stack([feature[begin : begin + piece] for feature in features]).to(device).double()
        total += part @ part.T
    total = total / size
    return ((total + total.T) / 2).cpu().numpy()
