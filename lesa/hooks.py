"""Hooks on a denoiser: the only file that touches one.

A root hook on the denoiser asks a `Driver` at each call whether to compute or to forecast. At the hidden site
a forecast runs the denoiser's own forward with its blocks passing their inputs through; the last block, the
tail, returns the forecast, so that the model's own head finishes the step. At the output site the forecast is
returned as it is.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager

from .clock import Call, Clock
from .denoisers import Layout, blocks_of, denoiser_of
from .runner import Driver

_NAME = "lesa"
_ROOT_LOST = "lesa's hook on the denoiser was removed by something else; call lesa.enable again"
_TAIL_LOST = (
    "lesa's hook on the last block was not reached (something removed it, e.g. loading a LoRA under group offload); "
    "call lesa.enable again"
)


def attach(target: Any, driver: Driver, site: str) -> None:
    """Put a driver on a pipeline's denoiser, or on a bare denoiser; an earlier one is taken off first.

    Args:
        target: a diffusers pipeline or a denoiser.
        driver: decides what each call does.
        site: "hidden" or "output".

    Raises:
        ValueError: the target has no supported denoiser, or the site is not known for it.
    """
    denoiser = denoiser_of(target)
    blocks, layout = blocks_of(denoiser) if site == "hidden" else ([], None)
    detach(denoiser)
    scheduler_of = None if isinstance(target, torch.nn.Module) else _scheduler_of(target)
    root = RootHook(driver, Clock(scheduler_of), site)
    try:
        for block in blocks:
            assert layout is not None
            _register(block, BlockHook(root, layout, block, is_tail=block is blocks[-1]))
        _register(denoiser, root)
        _invalidate_caches(denoiser)
    except BaseException:
        detach(denoiser)
        raise


def detach(target: Any) -> None:
    """Take lesa's hooks off; without any, do nothing."""
    denoiser = denoiser_of(target)
    for module in denoiser.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and _NAME in registry.hooks:
            _remove(module, registry)
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


class RootHook(ModelHook):
    """Wraps a denoiser's forward: place the call, ask the driver, run or forecast."""

    _is_stateful = True

    def __init__(self, driver: Driver, clock: Clock, site: str) -> None:
        super().__init__()
        self.driver = driver
        self.site = site
        self.context = _ContextName()  # diffusers finds it as an attribute and tells it the cache context
        self.forecast: torch.Tensor | None = None
        self.feature: torch.Tensor | None = None
        self._clock = clock
        self._like: Any = None
        self.runs = False

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Learn where the denoiser takes its timestep and its sample."""
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._sample_name = "sample" if "sample" in self._names else "hidden_states"
        return module

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Forget the request under way."""
        self._clock.abort()
        return module

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute or forecast one step."""
        self.runs = True
        try:
            sample = _argument(self._names, self._sample_name, args, kwargs)
            call = self._clock.tick(self.context.name, _argument(self._names, "timestep", args, kwargs), sample)
            if call.starts:
                self.driver.begin(call.request)
            self.forecast = self.driver.forecast(call)
            if self.forecast is not None:
                with self.driver.stats.timed("forecast", sample.device):
                    output = self._run_forecast(args, kwargs)
                if output is not None:
                    self.driver.stats.forecast += 1
                    return output
                self.driver.lose(_TAIL_LOST)
                self.driver.refuse(call, _TAIL_LOST)
            with self.driver.stats.timed("computed", sample.device):
                return self._run_computed(call, args, kwargs)
        except BaseException:
            self._clock.abort()
            raise
        finally:
            self.runs = False
            self.forecast = self.feature = None

    def _run_forecast(self, args: tuple, kwargs: dict) -> Any:
        assert self.forecast is not None
        if self.site == "output":
            return _like(self._like, self.forecast)
        output = self.fn_ref.original_forward(*args, **kwargs)
        return output if self.feature is not None else None

    def _run_computed(self, call: Call, args: tuple, kwargs: dict) -> Any:
        self.forecast = self.feature = None
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.site == "output":
            self._like, self.feature = output, _first(output)
        if self.feature is None:
            self.driver.lose(_TAIL_LOST)
        self.driver.keep(call, self.feature)
        return output


class BlockHook(ModelHook):
    """Wraps a block: pass the inputs through while forecasting; as the tail, take or give the feature."""

    def __init__(self, root: RootHook, layout: Layout, block: torch.nn.Module, is_tail: bool) -> None:
        super().__init__()
        self._root = root
        self._returns = layout.returns
        self._names = list(inspect.signature(type(block).forward).parameters)[1:]
        self._is_tail = is_tail

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or skip it."""
        root = self._root
        if root.forecast is None:
            output = self.fn_ref.original_forward(*args, **kwargs)
            if self._is_tail and not root.runs:
                root.driver.lose(_ROOT_LOST)
            elif self._is_tail:
                position = self._returns.index("hidden_states")
                root.feature = output[position] if len(self._returns) > 1 else output
            return output
        passed = [_argument(self._names, name, args, kwargs) for name in self._returns]
        if self._is_tail:
            root.feature = passed[self._returns.index("hidden_states")] = root.forecast
        return tuple(passed) if len(passed) > 1 else passed[0]


class _ContextName(StateManager):
    """Keeps the name of the current cache context; diffusers sets it around each denoiser call."""

    def __init__(self) -> None:
        super().__init__(BaseState)
        self.name: str | None = None

    def set_context(self, context: Any) -> None:
        # A CacheContext, or in older releases its name.
        self.name = getattr(context, "name", context)


def _scheduler_of(pipe: Any) -> Callable[[], Any]:
    # A weak reference: the hook must not keep a dropped pipeline and its text encoders in memory.
    reference = weakref.ref(pipe)
    return lambda: getattr(reference(), "scheduler", None)


def _argument(names: Sequence[str], name: str, args: tuple, kwargs: dict) -> Any:
    """The argument `name` of a call to a forward whose parameters are `names`."""
    return kwargs[name] if name in kwargs else args[names.index(name)]


def _first(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return output[0]


def _like(output: Any, feature: torch.Tensor) -> Any:
    """`feature` in the wrapping that the denoiser gave its last computed output."""
    if isinstance(output, torch.Tensor):
        return feature
    return (feature,) if type(output) is tuple else type(output)(sample=feature)


def _invalidate_caches(denoiser: torch.nn.Module) -> None:
    registry = getattr(denoiser, "_diffusers_hook", None)
    if registry is not None and hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()


def _register(module: torch.nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _NAME)
    # What we put in place, to tell at removal what others have put around or in place of it.
    hook.installed, hook.wrapped = module.forward, hook.fn_ref.forward


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
