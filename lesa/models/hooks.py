"""Puts lesa's one hook on a denoiser's root, and takes it off again: the denoiser is then as it was."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry

from ..runtime.clock import Clock
from ..runtime.driver import Driver
from .denoisers import denoiser_of, layout_of
from .exchange import Stands
from .roothook import RootHook

_NAME = "lesa"


def attach(target: Any, driver: Driver, site: str) -> RootHook:
    """Put a driver on a pipeline's denoiser, or on a bare denoiser; an earlier one is taken off first.

    Args:
        target: a diffusers pipeline or a denoiser.
        driver: decides what each call does.
        site: "hidden" or "output".

    Returns:
        The hook that asks the driver.

    Raises:
        ValueError: the target has no supported denoiser, or the site is not known for it.
    """
    denoiser = denoiser_of(target)
    stands = Stands(denoiser, layout_of(denoiser)) if site == "hidden" else None
    scheduler_of = None if isinstance(target, torch.nn.Module) else _scheduler_of(target)
    return attach_hook(denoiser, RootHook(driver, Clock(scheduler_of), stands))


def attach_hook(denoiser: torch.nn.Module, hook: RootHook) -> RootHook:
    """Put a hook on a denoiser; an earlier one is taken off first."""
    detach(denoiser)
    try:
        _register(denoiser, hook)
        _invalidate_caches(denoiser)
    except BaseException:
        detach(denoiser)
        raise
    return hook


def detach(target: Any) -> None:
    """Take lesa's hooks off; without any, do nothing."""
    denoiser = denoiser_of(target)
    registry = getattr(denoiser, "_diffusers_hook", None)
    if registry is not None and _NAME in registry.hooks:
        registry.hooks[_NAME].restore()
        _remove(denoiser, registry)
    _invalidate_caches(denoiser)


def attached(target: Any) -> RootHook | None:
    """The root hook on a pipeline's or bare denoiser, None if there is none."""
    registry = getattr(denoiser_of(target), "_diffusers_hook", None)
    return registry.hooks.get(_NAME) if registry is not None else None


def check_free(target: Any) -> None:
    """Check that lesa is not enabled, before requests that must run by themselves.

    Raises:
        ValueError: it is.
    """
    if attached(target) is not None:
        raise ValueError(
            "lesa is enabled on this pipeline: call lesa.disable(pipe) before you record, train or compare"
        )


def _scheduler_of(pipe: Any) -> Callable[[], Any]:
    # A weak reference: the hook must not keep a dropped pipeline and its text encoders in memory.
    reference = weakref.ref(pipe)
    return lambda: getattr(reference(), "scheduler", None)


def _invalidate_caches(denoiser: torch.nn.Module) -> None:
    registry = getattr(denoiser, "_diffusers_hook", None)
    if registry is not None and hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()


def _register(module: torch.nn.Module, hook: RootHook) -> None:
    inner = module.forward
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _NAME)
    hook.wrapped = hook.fn_ref.forward
    # diffusers' wrapper around a hook is left out: torch.compile would trace it, and us with it.
    module.forward = functools.update_wrapper(functools.partial(hook.new_forward, module), inner)
    # What we put in place, to tell at removal what others have put around or in place of it.
    hook.installed = module.forward


def _remove(module: torch.nn.Module, registry: HookRegistry) -> None:
    """Unregister our hook and leave every wrapper that came after it as it was.

    `remove_hook` replaces what an outer hook of the registry calls, and drops any wrapper put around
    the registry's own; both are put back here.
    """
    index = registry._hook_order.index(_NAME)
    ours = registry._fn_refs[index]
    hook = registry.hooks[_NAME]
    if ours.forward is not hook.wrapped:  # an inner hook was removed, and ours was dropped with it
        ours.original_forward = ours.forward
    outer = registry._fn_refs[index + 1] if index + 1 < len(registry._fn_refs) else None
    outer_forward = outer.forward if outer is not None and outer.original_forward is not None else None
    forward, wrapped = module.forward, getattr(module, "_old_forward", None) is hook.installed
    registry.remove_hook(_NAME, recurse=False)
    if outer is not None and outer_forward is not None:
        outer.forward, outer.original_forward = outer_forward, ours.original_forward
    elif outer is None and wrapped:
        # accelerate's offload hook was put around ours: it calls `_old_forward`.
        module.forward, module._old_forward = forward, ours.original_forward
    if not registry.hooks:
        del module._diffusers_hook
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward
