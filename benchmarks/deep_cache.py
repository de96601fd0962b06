"""DeepCache on U-Nets: between the computed steps only the first level runs, beside what the deeper ones last returned.

The cheapest branch of the paper (Ma et al., "DeepCache: Accelerating Diffusion Models for Free", CVPR 2024) runs one
layer of the first level; here the whole level runs, which is slower and better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def deep_cache(unet: Any, computed: Sequence[int], steps: int) -> Iterator[None]:
    """Run a U-Net of diffusers by DeepCache, in requests that call it once a step.

    Args:
        unet: the denoiser.
        computed: steps that run in full, 0 among them.
        steps: of each request.
    """
    calls = 0

    def full() -> bool:
        return (calls - 1) % steps in computed

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with ExitStack() as stack:
        stack.callback(unet.register_forward_pre_hook(count).remove)
        for module in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]):
            module.forward = _kept(module, full)
            stack.callback(module.__dict__.pop, "forward")
        yield


def _kept(module: nn.Module, full: Callable[[], bool]) -> Callable[..., Any]:
    """A forward that runs the module's own in full steps, and else returns what that returned last."""
    own, last = module.forward, None

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal last
        if full():
            last = own(*args, **kwargs)
        return last

    return forward
