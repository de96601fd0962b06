"""Works: the calls of a pipeline or of functions of one's own that run requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import hooks
from .requests import check_batch, check_prompts, check_request, run, seeds_of


@dataclass(frozen=True)
class Work:
    """One call of a pipeline or of a function of the user's.

    Args:
        labels: of its requests, for errors.
        run: runs it under a driver at a site, and returns what it returned.
    """

    labels: tuple[str, ...]
    run: Callable[[Any, str], Any]


def works_of(
    target: Any,
    prompts: Sequence[str] | None,
    requests: Sequence[Callable[[], Any]] | None,
    request: Mapping[str, Any],
    seeds: Sequence[int] | None,
    batch: int,
    **more: Any,
) -> list[Work]:
    """The calls that run these requests.

    Args:
        target, prompts, requests, request, seeds, batch: see `gather`.
        more: further keyword arguments of the pipeline call.

    Raises:
        ValueError: an argument is out of place.
    """
    if (prompts is None) == (requests is None):
        given = "neither is given" if prompts is None else "both are given"
        raise ValueError(
            f"{given}: give either prompts, for a pipeline, or requests, functions each of which runs one request"
        )
    check_request(request)
    if requests is not None:
        check_functions(requests)
        return [Work((f"request {i}",), _own(target, function)) for i, function in enumerate(requests)]
    assert prompts is not None
    if isinstance(target, torch.nn.Module):
        raise ValueError("prompts are for a pipeline: for a bare denoiser give requests, functions that run it")
    check_prompts(prompts)
    check_batch(batch)
    seeds = seeds_of(prompts, seeds)
    return [
        Work(
            tuple(f"prompt {i} ({prompts[i]!r})" for i in range(begin, min(begin + batch, len(prompts)))),
            _piped(target, prompts[begin : begin + batch], seeds[begin : begin + batch], request, more),
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


def _piped(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], request: Mapping[str, Any], more: Mapping[str, Any]
) -> Callable[[Any, str], Any]:
    return lambda driver, site: run(pipe, prompts, seeds, request, driver, site, **more)


def _own(target: Any, function: Callable[[], Any]) -> Callable[[Any, str], Any]:
    def work(driver: Any, site: str) -> Any:
        hooks.check_free(target)
        hooks.attach(target, driver, site)
        try:
            return function()
        finally:
            hooks.detach(target)

    return work
