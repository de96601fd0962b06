"""diffusers' FirstBlockCache with the threshold that computes a given number of steps on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from diffusers import FirstBlockCacheConfig
from torch import nn

_HALVINGS = 9
_HIGHEST = 4.0  # of the relative change of the first block's residual


def tuned(denoiser: Any, images: Callable[[], np.ndarray], steps: int, budget: int) -> tuple[np.ndarray, float, float]:
    """Bisect the threshold on the requests that are judged, which favours the cache.

    Args:
        denoiser: a transformer of diffusers.
        images: runs the requests.
        steps: T of each.
        budget: steps to compute.

    Returns:
        The pictures, the threshold and the mean number of computed steps that came nearest.
    """
    low, high, found = 0.0, _HIGHEST, []
    for _ in range(_HALVINGS):
        threshold = (low + high) / 2
        made, share = _run(denoiser, images, threshold)
        found.append((made, threshold, share * steps))
        if share * steps == budget:
            break
        low, high = (threshold, high) if share * steps > budget else (low, threshold)
    return min(found, key=lambda one: abs(one[2] - budget))


def _run(denoiser: Any, images: Callable[[], np.ndarray], threshold: float) -> tuple[np.ndarray, float]:
    """The pictures, and the share of the calls that ran all blocks."""
    counts = {"calls": 0, "computed": 0}

    def count(name: str) -> Callable[..., None]:
        return lambda *_: counts.update({name: counts[name] + 1})

    denoiser.enable_cache(FirstBlockCacheConfig(threshold))  # anew: it remembers the last request
    # The cache takes the place of a block's forward, so what is inside the last block runs only where it is computed.
    inside = next(_last_block(denoiser).children())
    handles = [
        denoiser.register_forward_pre_hook(count("calls")),
        inside.register_forward_pre_hook(count("computed")),
    ]
    try:
        made = images()
    finally:
        denoiser.disable_cache()
        for handle in handles:
            handle.remove()
    return made, counts["computed"] / counts["calls"]


def _last_block(denoiser: nn.Module) -> nn.Module:
    return [blocks for blocks in denoiser.children() if isinstance(blocks, nn.ModuleList) and len(blocks)][-1][-1]
