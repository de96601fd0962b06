"""lesa's one hook. It sits on the denoiser's root. Its removal leaves the denoiser as it was.

At each call the hook asks a `Driver` whether to compute or to forecast. At the hidden site a forecast runs the
denoiser's own forward with stand-ins for its blocks (see `standins`); at the output site it is the result itself.

torch.compile never sees the hook: Dynamo skips its frame; its Python methods use torch.compiler.disable. The frames
below are the bare denoiser's, with its blocks or with stand-ins. So the hook adds no graph break and no recompile.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch._dynamo.decorators import skip  # permanent; torch.compiler.disable acts per call
from torch.utils import _pytree as pytree  # diffusers registers its outputs with it

from .. import ops
from ..plans.rows import PlanError
from ..runtime.clock import Call, Clock, Loop
from ..runtime.driver import Driver, Forecast
from .layouts import conditions_of, denoiser_of, denoisers_of, layout_of, sample_name, tensor_of, timestep_name
from .standins import Exchange, Feed, Stands, Tap

_NAME = "lesa"
_HEAD_LOST = "the denoiser's head was not run (something skips it or runs another forward)"
_SEVERAL = "the denoiser returns several tensors, and the hidden site knows one head (take a plan for site='output')"
_GRADIENTS = "gradients are recorded, which a forecast has not (sample under torch.no_grad())"
_METHODS: set[CodeType] = set()  # of modules, which call a denoiser but are no pipeline
# Where diffusers' caches are that change what a step computes. TextKVCache changes nothing.
_CACHES = tuple(
    f"diffusers.hooks.{name}"
    for name in (
        "faster_cache",
        "first_block_cache",
        "mag_cache",
        "pyramid_attention_broadcast",
        "sea_cache",
        "taylorseer_cache",
    )
)
# What a forward raises that does not bear stand-ins. Other exceptions are somebody's way to stop a request.
_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def attach(target: Any, driver: Driver, site: str) -> RootHook:
    """Put a driver on a pipeline's denoiser or a bare denoiser, in place of an earlier one.

    Args:
        target: a diffusers pipeline or a denoiser.
        driver: decides what each call does.
        site: "hidden" or "output".

    Returns:
        The hook of the denoiser; where two take turns, that of the first.

    Raises:
        ValueError: the target has no supported denoiser, the denoiser has no such site, or a cache of diffusers.
    """
    denoisers = denoisers_of(target)
    for one in denoisers:
        if other := _other_cache(one):
            raise ValueError(
                f"{other} is on this {type(one).__name__}: call its disable_cache() first, or remove the hooks of that "
                "cache where you applied it yourself"
            )
    stands = [Stands(one, layout_of(one)) if site == "hidden" else None for one in denoisers]
    clock = Clock(None if isinstance(target, torch.nn.Module) else LoopOf(target))
    hooks = [RootHook(driver, clock, stand, i) for i, stand in enumerate(stands)]
    for hook in hooks[1:]:
        hook.like = hooks[0].like  # the next call of a context may be another denoiser's
    hooks[0].others = tuple(zip(denoisers, hooks, strict=True))[1:]
    return attach_hook(denoisers[0], hooks[0])


def attach_hook(denoiser: torch.nn.Module, hook: RootHook) -> RootHook:
    """Put a hook on a denoiser, and those of the denoisers that take turns with it, in place of earlier ones."""
    chosen = ((denoiser, hook), *hook.others)
    for one, _ in chosen:
        detach(one)
    try:
        for one, own in chosen:
            _register(one, own)
            _invalidate_caches(one)
    except BaseException:
        for one, _ in chosen:
            detach(one)
        raise
    return hook


def detach(target: Any) -> None:
    """Take lesa's hook off, if there is one."""
    denoiser = denoisers_of(target)[0]
    registry = getattr(denoiser, "_diffusers_hook", None)
    if registry is not None and _NAME in registry.hooks:
        hook = registry.hooks[_NAME]
        hook.restore()
        _remove(denoiser, registry)
        for other, own in hook.others:
            if attached(other) is own:
                detach(other)
    _invalidate_caches(denoiser)


def attached(target: Any) -> RootHook | None:
    """The root hook on a pipeline's or bare denoiser, None if there is none."""
    registry = getattr(denoiser_of(target), "_diffusers_hook", None)
    return registry.hooks.get(_NAME) if registry is not None else None


def check_free(target: Any) -> None:
    """Check that lesa is not enabled, before requests that must run in full.

    Raises:
        ValueError: lesa is enabled.
    """
    if attached(target) is not None:
        name = type(target).__name__
        raise ValueError(f"lesa is enabled on this {name}: call lesa.disable(...) before you fit, record or compare")


class LoopOf:
    """Finds the loop that calls the denoiser: a pipeline among the callers, else the one that was enabled.

    So whatever pipeline runs an enabled denoiser, a copy or one made for a single request, its scheduler is followed.

    Args:
        pipe: that was enabled. A weak reference is kept: a hook must not keep a dropped pipeline in memory.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)

    def __call__(self) -> Loop | None:
        """What the running pipeline tells; None where no pipeline with a scheduler is left."""
        running = self._running()
        pipe = self._pipe() if running is None else running
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is None:
            return None
        # Of the running one only: what another pipeline says is of its own last request.
        count, timestep = (getattr(running, name, None) for name in ("num_timesteps", "current_timestep"))
        return Loop(scheduler, count if isinstance(count, int) else None, timestep)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoopOf:
        pipe = self._pipe()
        return LoopOf(memo.get(id(pipe), pipe))

    @staticmethod
    def _running() -> Any:
        """The innermost pipeline that is running, by the first arguments of the functions that called."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code not in _METHODS:
                # self, or self and components of modular blocks
                names = code.co_varnames[: min(code.co_argcount, 2)]
                known = frame.f_locals if names[:1] == ("self",) else {}
                for one in map(known.get, names):
                    # Looked for on the class: an instance would make all of its components a dictionary.
                    if hasattr(type(one), "components") and hasattr(one, "scheduler"):
                        return one
                if isinstance(known.get("self"), (torch.nn.Module, RootHook, Clock)):
                    _METHODS.add(code)
            frame = frame.f_back
        return None


def _invalidate_caches(denoiser: torch.nn.Module) -> None:
    registry = getattr(denoiser, "_diffusers_hook", None)
    if registry is not None and hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()


def _register(module: torch.nn.Module, hook: RootHook) -> None:
    outer = module.forward
    offloaded = getattr(getattr(outer, "func", None), "__module__", None) == "accelerate.hooks"
    if offloaded:  # beneath it: accelerate takes its hook off and puts it on again after each request
        setattr(module, "forward", module._old_forward)  # noqa: B010
    inner = module.forward
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _NAME)
    hook.wrapped = hook.fn_ref.forward
    # Without diffusers' wrapper around a hook: torch.compile would trace it, and our hook with it.
    module.forward = functools.update_wrapper(functools.partial(hook.new_forward, module), inner)
    # Our forward: at removal it shows whether others wrapped or replaced it.
    hook.installed = module.forward
    if offloaded:
        module.forward = outer
        setattr(module, "_old_forward", hook.installed)  # noqa: B010


def _remove(module: torch.nn.Module, registry: HookRegistry) -> None:
    """Unregister our hook and keep every later wrapper.

    `remove_hook` replaces the forward of an outer hook and drops wrappers around the registry's own; we restore both.
    """
    index = registry._hook_order.index(_NAME)
    ours = registry._fn_refs[index]
    hook = registry.hooks[_NAME]
    if ours.forward is not hook.wrapped:  # the removal of an inner hook dropped ours too
        ours.original_forward = ours.forward
    outer = registry._fn_refs[index + 1] if index + 1 < len(registry._fn_refs) else None
    outer_forward = outer.forward if outer is not None and outer.original_forward is not None else None
    forward, wrapped = module.forward, getattr(module, "_old_forward", None) is hook.installed
    registry.remove_hook(_NAME, recurse=False)
    if outer is not None and outer_forward is not None:
        outer.forward, outer.original_forward = outer_forward, ours.original_forward
    elif outer is None and wrapped:
        # accelerate's offload hook wraps ours: it calls `_old_forward`.
        module.forward, module._old_forward = forward, ours.original_forward
    if not registry.hooks:
        del module._diffusers_hook
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward


class RootHook(ModelHook):
    """Wraps a denoiser's forward: find the request, context and step, ask the driver, run or forecast.

    Args:
        clock: finds the request, context and step of each call.
        stands: stand-ins of the denoiser's children; None at the output site.
        index: of this denoiser among those that take turns.
    """

    _is_stateful = True

    def __init__(self, driver: Driver, clock: Clock, stands: Stands | None, index: int = 0) -> None:
        super().__init__()
        self.driver = driver
        self.retired = False  # True once its handle ended: never attached again
        self.before: RootHook | None = None  # the hook that returns at the end of its `with` block
        self.others: tuple[tuple[torch.nn.Module, RootHook], ...] = ()  # of the denoisers that take turns with this one
        self.context = _ContextName()  # diffusers looks for this attribute and sets the cache context
        self._clock = clock
        self._stands = stands
        self._index = index
        self.like: dict[str, Any] = {}  # the last computed output of each context
        self._active: Exchange | None = None
        self._owner: dict[str, int] = {}  # setdefault is atomic; a lock cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        raise pickle.PicklingError(
            "lesa is enabled on this denoiser: call lesa.disable(...) before you pickle or save it"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> RootHook:
        copied = memo[id(self)] = type(self).__new__(type(self))
        own = {**vars(self), "_owner": {}, "_active": None, "before": None}
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in own.items()})
        return copied

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Learn the names of the denoiser's arguments."""
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._sample, self._timestep = sample_name(module), timestep_name(module)
        return module

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Forget the current request."""
        self._clock.abort()
        return module

    @skip
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute or forecast one step."""
        self._acquire()
        try:
            if torch.is_grad_enabled() and self._records(module, args, kwargs):
                return self._original()(*args, **kwargs)
            turn = self._begin(module, args, kwargs)
            if turn is None:
                return self._original()(*args, **kwargs)
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
        except _FAULTS as error:
            if not isinstance(turn.stand, Feed) or turn.stand.reached:
                raise  # from the head on the denoiser's own modules run
            told = (str(error).splitlines() or [""])[0][:120]
            turn.failed = f"the denoiser cannot run without its blocks ({type(error).__name__}: {told})"
        finally:
            self._leave()

    @torch.compiler.disable
    def restore(self) -> None:
        """Put the denoiser's children back and let other threads in. Safe to call twice."""
        self._leave()
        self._owner.clear()

    @torch.compiler.disable
    def _enter(self, turn: _Turn) -> None:
        if turn.exchange is not None:
            self._active = turn.exchange  # set first, so that an interrupted exchange can be undone
            turn.exchange.enter()

    @torch.compiler.disable
    def _leave(self) -> None:
        if self._active is not None:
            self._active.undo()
            self._active = None

    @torch.compiler.disable
    def _acquire(self) -> None:
        """Let one thread in at a time: a call exchanges the denoiser's children."""
        me = threading.get_ident()
        owner = self._owner.setdefault("thread", me)
        if owner != me and any(thread.ident == owner for thread in threading.enumerate()):
            raise RuntimeError("another thread is running this denoiser: give each thread its own, or take turns")
        self._owner["thread"] = me
        self._leave()

    @torch.compiler.disable
    def _abort(self) -> None:
        self._clock.abort()

    @torch.compiler.disable
    def _records(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
        """Whether gradients would flow through this call: then it is the denoiser's own, and no step of a request."""
        tensors = (*pytree.tree_leaves((args, kwargs)), *module.parameters())
        if not any(isinstance(one, torch.Tensor) and one.requires_grad for one in tensors):
            return False
        self.driver.lose(_GRADIENTS)
        self.driver.stats.refused[_GRADIENTS] += 1
        return True

    @torch.compiler.disable
    def _begin(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> _Turn | None:
        """Find the request, context and step, and ask the driver; None where the call fits no step of a request."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        timestep, sample = given.pop(self._timestep, None), tensor_of(given.pop(self._sample, None))
        told = self.context
        try:
            again = self._again(args, kwargs)
            call = self._clock.tick(told.name, timestep, sample, conditions_of(given), told.step, self._index, again)
        except PlanError as error:
            self.driver.lose(str(error))
            self.driver.stats.refused[str(error)] += 1
            return None
        if call.starts:
            self.driver.begin(call.request)
            if other := _other_cache(module):
                self.driver.lose(f"{other} is on too (call the denoiser's disable_cache(), or remove its hooks)")
        coming = self.driver.forecast(call)
        return self._compute(call) if coming is None else self._forecast(call, coming)

    def _again(self, args: tuple, kwargs: dict) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Runs the denoiser with these arguments on another sample; None where its sample is a list."""
        place = self._names.index(self._sample) if self._sample in self._names else len(args)
        if not isinstance(args[place] if place < len(args) else kwargs.get(self._sample), torch.Tensor):
            return None
        before, after = args[:place], args[place + 1 :]
        others = {name: value for name, value in kwargs.items() if name != self._sample}

        def run(sample: torch.Tensor) -> torch.Tensor:
            given = {**others, self._sample: sample} if place >= len(args) else others
            where = (sample,) if place < len(args) else ()
            with torch.no_grad():
                return _first(self._original()(*before, *where, *after, **given))

        return run

    @torch.compiler.disable
    def _compute(self, call: Call) -> _Turn:
        """The turn that computes a step and takes its feature."""
        stop = self.driver.stats.start("computed", call.sample.device)
        if self._stands is None:
            return _Turn(call, stop, self._original())
        exchange, tap = self._stands.tap(call.sample.dtype)
        return _Turn(call, stop, self._original(), exchange, tap)

    def _forecast(self, call: Call, forecast: Forecast) -> _Turn:
        """The turn that forecasts a step."""
        stop = self.driver.stats.start("forecast", call.sample.device)
        ring, stands = forecast.ring, self._stands
        name = "forecast_into_"
        if stands is None:
            like = functools.partial(_like, self.like[call.context])
            turn = _Turn(call, stop, _copy(forecast.feature()), wrap=like)
        elif ring is not None and stands.fuses(ring, call.timestep):
            name = "forecast_head"
            turn = _Turn(call, stop, *stands.head(self._original(), call.context, ring))
        else:
            turn = _Turn(call, stop, *stands.tail(self._original(), forecast.feature()))
        turn.forecast, turn.accept = True, forecast.accept
        if ring is not None:
            turn.operator = f"{name}: {ring.backend or ops.backend_of(name, ring.history)}"
        return turn

    @torch.compiler.disable
    def _end(self, turn: _Turn, output: Any) -> bool:
        """Count the call; return whether its output is accepted."""
        driver, call, stand = self.driver, turn.call, turn.stand
        if turn.forecast:
            if isinstance(stand, Feed):
                stand.feature = None
                lost = turn.failed or (None if stand.reached else _HEAD_LOST)
                if lost is not None:
                    driver.lose(lost)
                    driver.refuse(call, lost)
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
            self.like[call.context], feature = output, _packed(output)
        else:
            feature, stand.feature = stand.feature, None
        if feature is None:
            driver.lose(_HEAD_LOST)
        elif stand is not None and _results(output) > 1:
            driver.lose(_SEVERAL)
        driver.keep(call, feature)
        driver.observe(call, _first(output))
        return True

    def _original(self) -> Callable[..., Any]:
        """The forward that this hook wraps, even if another hook beneath it was removed."""
        return self.fn_ref.original_forward if self.fn_ref.forward is self.wrapped else self.fn_ref.forward


@dataclass
class _Turn:
    """One run of a step: the function, and the stand-ins during it."""

    call: Call
    stop: Callable[[], None]
    run: Callable[..., Any]
    exchange: Exchange | None = None
    stand: Tap | Feed | None = None
    wrap: Callable[[torch.Tensor], Any] | None = None
    operator: str | None = None
    accept: Callable[[torch.Tensor], bool] | None = None
    forecast: bool = False
    failed: str | None = None


def _other_cache(denoiser: torch.nn.Module) -> str | None:
    """The cache of diffusers that is on, such as "diffusers' FirstBlockCache"; None without one."""
    config = getattr(denoiser, "_cache_config", None)
    if config is not None:
        return f"diffusers' {type(config).__name__.removesuffix('Config')}"
    registries = (getattr(module, "_diffusers_hook", None) for module in denoiser.modules())
    kinds = {type(hook) for registry in registries if registry is not None for hook in registry.hooks.values()}
    return next((f"diffusers' {kind.__name__}" for kind in kinds if kind.__module__ in _CACHES), None)


class _ContextName(StateManager):
    """Keeps what the current cache context tells; diffusers sets it around each denoiser call."""

    def __init__(self) -> None:
        super().__init__(BaseState)
        self.name: str | None = None
        self.step: int | None = None

    def set_context(self, context: Any) -> None:
        # A CacheContext; older diffusers pass its name.
        self.name = getattr(context, "name", context)
        self.step = getattr(context, "step_index", None)


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else _tensors(output)[0]


def _packed(output: Any) -> torch.Tensor:
    """All tensors of an output in one: a single one as it is, several flat and joined."""
    if isinstance(output, torch.Tensor):
        return output
    tensors = _tensors(output)
    return tensors[0] if len(tensors) == 1 else torch.cat([one.flatten() for one in tensors])


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _results(output: Any) -> int:
    """How many results an output holds; a list of samples is one."""
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    return sum(bool(_tensors(part)) for part in parts)


def _copy(feature: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Gives the caller its own tensor; fullgraph compile needs a Python function here."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        return feature.clone()

    return run


@torch.compiler.disable
def _like(output: Any, feature: torch.Tensor) -> Any:
    """`feature`, see `_packed`, in the output type of the last computed step."""
    tensors = _tensors(output)
    parts = [feature]
    if len(tensors) > 1:
        split = feature.split([one.numel() for one in tensors])
        parts = [part.view(one.shape) for part, one in zip(split, tensors, strict=True)]
    made = iter(parts)
    return pytree.tree_map_only(torch.Tensor, lambda _: next(made), output)
