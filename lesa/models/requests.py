"""Requests: one pipeline call with given prompts and noise, and the prompts to call it with."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime.driver import Driver
from . import hooks


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
    if driver is not None:
        hooks.check_free(pipe)
    kwargs["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if driver is None:
        return pipe(prompt=list(prompts), **kwargs)
    hooks.attach(pipe, driver, site)
    try:
        return pipe(prompt=list(prompts), **kwargs)
    finally:
        hooks.detach(pipe)


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


def seeds_of(prompts: Sequence[str], seeds: Sequence[int] | None) -> tuple[int, ...]:
    """The seeds of the prompts' noise; their indices by default.

    Raises:
        ValueError: they are not as many.
    """
    seeds = tuple(range(len(prompts)) if seeds is None else seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed a prompt")
    return seeds


def check_request(request: Any) -> None:
    """Check the keyword arguments of a pipeline call before anything runs.

    Raises:
        ValueError: they are no dictionary by names, cannot be kept as JSON, or hold a prompt.
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
