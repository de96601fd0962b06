"""lesa's one hook: put on a denoiser's root, asked at each call, and taken off again, the denoiser as it was.

The hook asks a `Driver` at each call whether to compute or to forecast. At the hidden site a forecast runs the
denoiser's own forward with stand-ins for its blocks (see `standins`); at the output site the forecast is returned as it
is.

torch.compile never sees the hook: its frame is skipped, what it decides is disabled, and the frames below are those of
the bare denoiser, once with its blocks and once with stand-ins. So a compiled denoiser breaks no graph here, and no
step makes it compile again.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch._dynamo.decorators import skip  # unlike torch.compiler.disable(recursive=False), for good, not call by call

from .. import ops
from ..runtime.clock import Call, Clock
from ..runtime.driver import Driver, Forecast
from .layouts import denoiser_of, layout_of
from .standins import Exchange, Stands, Tail, Tap

_NAME = "lesa"
_TAIL_LOST = "the denoiser's last block was not run (something skips it or runs another forward)"


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


class RootHook(ModelHook):
    """Wraps a denoiser's forward: place the call, ask the driver, run or forecast.

    Args:
        driver: decides what each call does.
        clock: places the calls.
        stands: stand-ins of the denoiser's children; None at the output site.
    """

    _is_stateful = True

    def __init__(self, driver: Driver, clock: Clock, stands: Stands | None) -> None:
        super().__init__()
        self.driver = driver
        self.retired = False  # by the handle that put it here: nobody puts it back
        self.before: RootHook | None = None  # what comes back at the end of its `with` block
        self.context = _ContextName()  # diffusers finds it as an attribute and tells it the cache context
        self._clock = clock
        self._stands = stands
        self._like: Any = None
        self._active: Exchange | None = None
        self._owner: dict[str, int] = {}  # setdefault is atomic, and unlike a lock it can be copied

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Learn what the denoiser's arguments are called."""
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        return module

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Forget the request under way."""
        self._clock.abort()
        return module

    @skip
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute or forecast one step."""
        self._acquire()
        try:
            turn = self._begin(args, kwargs)
            output = self._run(turn, args, kwargs)
            if not self._end(turn, output):
                turn = self._compute(turn.call)
                output = self._run(turn, args, kwargs)
                self._end(turn, output)
            return output if turn.wrap is None else turn.wrap(output)
        except BaseException:
            self._abort()
            raise
        finally:
            self.restore()

    @skip
    def _run(self, turn: _Turn, args: tuple, kwargs: dict) -> Any:
        try:
            self._enter(turn)
            return turn.run(*args, **kwargs)
        finally:
            self._leave()

    @torch.compiler.disable
    def restore(self) -> None:
        """Put the denoiser's children back and let other threads in; needed again only where this was interrupted."""
        self._leave()
        self._owner.clear()

    @torch.compiler.disable
    def _enter(self, turn: _Turn) -> None:
        if turn.exchange is not None:
            self._active = turn.exchange  # before anything moves, so that whoever comes next can put it back
            turn.exchange.enter()

    @torch.compiler.disable
    def _leave(self) -> None:
        if self._active is not None:
            self._active.undo()
            self._active = None

    @torch.compiler.disable
    def _acquire(self) -> None:
        """Let one thread in at a time: the denoiser's children are exchanged meanwhile."""
        me = threading.get_ident()
        owner = self._owner.setdefault("thread", me)
        if owner != me and any(thread.ident == owner for thread in threading.enumerate()):
            raise RuntimeError(
                "another thread is running this denoiser: give each thread a denoiser of its own, or take turns"
            )
        self._owner["thread"] = me
        self._leave()

    @torch.compiler.disable
    def _abort(self) -> None:
        self._clock.abort()

    @torch.compiler.disable
    def _begin(self, args: tuple, kwargs: dict) -> _Turn:
        """Place the call and ask the driver."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        sample: Any = given.get("sample" if "sample" in self._names else "hidden_states")
        call = self._clock.tick(self.context.name, given.get("timestep"), sample)
        if call.starts:
            self.driver.begin(call.request)
        coming = self.driver.forecast(call)
        return self._compute(call) if coming is None else self._forecast(call, coming)

    @torch.compiler.disable
    def _compute(self, call: Call) -> _Turn:
        """The turn that computes a step, its feature tapped on the way."""
        stop = self.driver.stats.start("computed", call.sample.device)
        if self._stands is None:
            return _Turn(call, stop, self._original())
        exchange, tap = self._stands.tap()
        return _Turn(call, stop, self._original(), exchange, tap)

    def _forecast(self, call: Call, forecast: Forecast) -> _Turn:
        """The turn that forecasts a step."""
        stop = self.driver.stats.start("forecast", call.sample.device)
        ring, stands = forecast.ring, self._stands
        name = "forecast_into_"
        if stands is None:
            turn = _Turn(call, stop, _copy(forecast.feature()), wrap=functools.partial(_like, self._like))
        elif ring is not None and stands.fuses(ring, call.timestep):
            name = "forecast_head"
            turn = _Turn(call, stop, self._original(), *stands.head(call.context, ring))
        else:
            turn = _Turn(call, stop, self._original(), *stands.tail(forecast.feature()))
        turn.forecast, turn.accept = True, forecast.accept
        if ring is not None:
            turn.operator = f"{name}: {ring.backend or ops.backend_of(name, ring.history)}"
        return turn

    @torch.compiler.disable
    def _end(self, turn: _Turn, output: Any) -> bool:
        """Count the turn; whether its output stands."""
        driver, call, stand = self.driver, turn.call, turn.stand
        if turn.forecast:
            if isinstance(stand, Tail):
                stand.feature = None
                if not stand.reached:
                    driver.lose(_TAIL_LOST)
                    driver.refuse(call, _TAIL_LOST)
                    return False
            if turn.accept is not None and not turn.accept(_first(output)):
                return False
            turn.stop()
            driver.stats.forecast += 1
            if turn.operator is not None:
                driver.stats.operators[turn.operator] += 1
            driver.observe(call, _first(output))
            return True
        turn.stop()
        feature: torch.Tensor | None
        if stand is None:
            self._like, feature = output, _first(output)
        else:
            feature, stand.feature = stand.feature, None
        if feature is None:
            driver.lose(_TAIL_LOST)
        driver.keep(call, feature)
        driver.observe(call, _first(output))
        return True

    def _original(self) -> Callable[..., Any]:
        """What this hook wraps; another hook beneath it may have been removed since."""
        return self.fn_ref.original_forward if self.fn_ref.forward is self.wrapped else self.fn_ref.forward


@dataclass
class _Turn:
    """One run of a step: what runs, and what stands in the denoiser meanwhile."""

    call: Call
    stop: Callable[[], None]
    run: Callable[..., Any]
    exchange: Exchange | None = None
    stand: Tap | Tail | None = None
    wrap: Callable[[torch.Tensor], Any] | None = None
    operator: str | None = None
    accept: Callable[[torch.Tensor], bool] | None = None
    forecast: bool = False


class _ContextName(StateManager):
    """Keeps the name of the current cache context; diffusers sets it around each denoiser call."""

    def __init__(self) -> None:
        super().__init__(BaseState)
        self.name: str | None = None

    def set_context(self, context: Any) -> None:
        # A CacheContext, or in older releases its name.
        self.name = getattr(context, "name", context)


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _copy(feature: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Gives the caller a tensor of its own; a frame for torch.compile, which insists on one in a fullgraph call."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        return feature.clone()

    return run


@torch.compiler.disable
def _like(output: Any, feature: torch.Tensor) -> Any:
    """`feature` in the wrapping that the denoiser gave its last computed output."""
    if isinstance(output, torch.Tensor):
        return feature
    return (feature,) if type(output) is tuple else type(output)(sample=feature)
