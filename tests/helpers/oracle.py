"""The oracle for any pipeline: every denoiser call runs in full, and its feature is overwritten by the plan's sum.

Nothing here asks lesa where a call belongs. Steps are counted from the calls of the schedulers' own `step`: a denoiser
call after one begins a step, and `set_timesteps` begins a request.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lesa
from lesa.forecasters import plan_of
from lesa.models.layouts import LAYOUTS
from lesa.plans.plan import Plan
from lesa.runtime.clock import sigmas_of

Place = tuple[int, int, str]  # a denoiser call's request, step, and which call of the step it is
_ROUNDING = 1e-3  # of the samples of a request in float32
DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")


@dataclass(frozen=True, eq=False)
class Subject:
    """A pipeline and one request of it.

    Args:
        name: of the subject.
        make: builds the pipeline.
        request: makes the keyword arguments of a call.
        around: makes a context in which a call runs.
    """

    name: str
    make: Callable[[], Any]
    request: Callable[[], dict[str, Any]]
    around: Callable[[], Any] = nullcontext

    def run(self, pipe: Any, plan: Plan | None = None) -> Run:
        """Run the request and record it; where a plan is given, by the oracle."""
        torch.manual_seed(0)
        run = Run()
        with _watched(pipe, run), oracle(pipe, plan, run) if plan else nullcontext(), self.around(), torch.no_grad():
            run.output = pipe(**self.request())
        return run


@dataclass
class Run:
    """What was seen of one run.

    Args:
        calls: the place of each denoiser call.
        samples: what each scheduler step returned.
        sigmas: noise levels of each request, read at its first scheduler step.
        output: what the pipeline returned.
    """

    calls: list[Place] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    sigmas: list[tuple[float, ...]] = field(default_factory=list)
    output: Any = None
    request: int = 0
    begun: bool = False
    step: int = 0
    stepped: bool = False
    inside: bool = False

    def tensors(self) -> list[np.ndarray]:
        """All numbers of the run: the samples after each step, and the output."""
        return [*(_array(sample) for sample in self.samples), *_flat(self.output)]

    def lengths(self) -> list[int]:
        """How many steps each request had."""
        last = {request: step for request, step, _ in self.calls}
        return [step + 1 for step in last.values()]

    def place(self, names: Counter[str], context: str) -> Place:
        """The place of the denoiser call that begins now."""
        if self.stepped:
            self.stepped, self.step = False, self.step + 1
            names.clear()
        names[context] += 1
        self.begun = True
        place = self.request, self.step, f"{context}#{names[context]}"
        self.calls.append(place)
        return place


def denoisers_of(pipe: Any) -> list[nn.Module]:
    """The denoisers of a pipeline."""
    parts = [getattr(pipe, name, None) for name in DENOISERS]
    return [part for part in parts if isinstance(part, nn.Module)]


def plan_for(run: Run, rule: str, site: str) -> Plan:
    """A plan for the requests of an untouched run; "all" computes every step.

    Raises:
        ValueError: the requests of the run are of different lengths, which no one plan serves.
    """
    lengths = set(run.lengths())
    if len(lengths) != 1:
        raise ValueError(f"requests of {sorted(lengths)} steps in one call")
    total = lengths.pop()
    known = run.sigmas[0] if run.sigmas else ()
    sigmas = (*known[:total], 0.0) if len(known) > total else tuple(np.linspace(1, 0, total + 1).tolist())
    if rule == "all":
        return Plan(tuple(range(total)), sigmas, site=site)
    return plan_of(rule, schedule(total), sigmas, site)


def schedule(steps: int) -> tuple[int, ...]:
    """Computed steps that leave forecast steps on both sides: 0, 1, 4, 7, ..."""
    return tuple(step for step in range(steps) if step == 0 or step % 3 == 1)


@contextmanager
def oracle(pipe: Any, plan: Plan, run: Run) -> Iterator[None]:
    """Overwrite the features of the plan's forecast steps; they are placed by `run`, which must be recording."""
    kept: dict[Any, dict[int, list[Tensor]]] = {}

    def overwrite(features: list[Tensor]) -> list[Tensor]:
        request, step, context = run.calls[-1]
        known = kept.setdefault((request, context), {})
        if step in plan.computed:
            known[step] = [feature.clone() for feature in features]
        else:
            row = plan.rows_of(context)[step]
            sums = [torch.zeros(()) for _ in features]
            for weight, source in zip(row.weights, row.steps, strict=True):
                sums = [total + weight * part for total, part in zip(sums, known[source], strict=True)]
            known[step] = sums
        return [feature.to(given.dtype) for feature, given in zip(known[step], features, strict=True)]

    with ExitStack() as stack:
        for denoiser in denoisers_of(pipe):
            stack.callback(_overwriting(denoiser, plan.site, overwrite).remove)
        yield


def by_lesa(subject: Subject, pipe: Any, plan: Plan) -> tuple[Run, Any, list[str]]:
    """The run under lesa, its stats and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lesa.LesaWarning)
        lesa.enable(pipe, plan)
        try:
            run = subject.run(pipe)
            stats = lesa.stats(pipe)
        finally:
            lesa.disable(pipe)
    return run, stats, [str(w.message) for w in caught if issubclass(w.category, lesa.LesaWarning)]


def sites_of(pipe: Any) -> tuple[str, ...]:
    """The sites of a pipeline's denoisers."""
    names = [type(denoiser).__name__ for denoiser in denoisers_of(pipe)]
    return ("output", "hidden") if len(names) == 1 and names[0] in LAYOUTS else ("output",)


def apart(one: Run, other: Run, exact: bool = True) -> float:
    """The largest difference of two runs in any tensor, relative to its size; inf where their shapes differ.

    Args:
        one: a run.
        other: the run whose sizes count.
        exact: whether what the pipeline returns is compared, too: a decoder may round or quantise.
    """
    first, second = (run.tensors()[: None if exact else len(run.samples)] for run in (one, other))
    if [x.shape for x in first] != [x.shape for x in second]:
        return float("inf")
    return max((_gap(x, y) for x, y in zip(first, second, strict=True)), default=float("inf"))


def faults(subject: Subject) -> list[str]:
    """Everything that is wrong with lesa on a subject, in words; empty where all is right.

    Raises:
        ValueError: the subject is no fair one: no step is forecast, or forecasts change nothing.
    """
    pipe = subject.make()
    untouched = subject.run(pipe)
    found = [fault for site in sites_of(pipe) for fault in faults_at(site, subject, pipe, untouched)]
    if apart(subject.run(pipe), untouched) > 0.0:
        found.append("disabled: differs from the untouched pipeline")
    return found


def faults_at(
    site: str, subject: Subject, pipe: Any, untouched: Run, change: Callable[[Any], None] = lambda pipe: None
) -> list[str]:
    """What is wrong at one site.

    Args:
        site: "output" or "hidden".
        subject: of the pipeline.
        pipe: the pipeline.
        untouched: its run without lesa.
        change: changes the pipeline before lesa runs it, by nothing that its outputs depend on.

    Raises:
        ValueError: as `faults`.
    """
    wanted, plans = {"all": untouched}, {rule: plan_for(untouched, rule, site) for rule in ("all", "reuse", "taylor-1")}
    for rule in ("reuse", "taylor-1"):
        if plans[rule].budget == plans[rule].num_steps:
            raise ValueError(f"a request has {plans[rule].num_steps} steps, so none is forecast")
        wanted[rule] = subject.run(pipe, plans[rule])
        if apart(wanted[rule], untouched) == 0.0:
            raise ValueError("forecasts do not change the output")
    change(pipe)
    found = []
    for rule, plan in plans.items():
        found += [f"{site}, {rule}: {fault}" for fault in _faults_of_plan(subject, pipe, plan, wanted[rule])]
    return found


def _faults_of_plan(subject: Subject, pipe: Any, plan: Plan, wanted: Run) -> list[str]:
    try:
        run, stats, told = by_lesa(subject, pipe, plan)
    except Exception as error:  # any error is a fault to report
        return [f"{type(error).__name__}: {error}"]
    exact, found = plan.forecaster != "taylor-1", []
    gap = apart(run, wanted, exact)
    if gap > (0.0 if exact else _ROUNDING):
        found.append(f"{gap:.2g} from the oracle")
    computed = sum(step in plan.computed for _, step, _ in wanted.calls)
    counts = (len(wanted.lengths()), computed, len(wanted.calls) - computed, 0)
    seen = (stats.requests, stats.computed, stats.forecast, sum(stats.refused.values()))
    if seen != counts:
        found.append(f"requests, computed, forecast, refused are {seen} instead of {counts}")
    return found + [f"warns: {warning}" for warning in told]


def _overwriting(denoiser: nn.Module, site: str, overwrite: Callable[[list[Tensor]], list[Tensor]]) -> Any:
    """A hook that overwrites a denoiser's feature at one site."""
    if site == "hidden":
        norm = denoiser.get_submodule(LAYOUTS[type(denoiser).__name__].norm)
        return norm.register_forward_pre_hook(lambda _, given: (*overwrite([given[0]]), *given[1:]))

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for i, feature in zip(places, overwrite([leaves[i] for i in places]), strict=True):
            leaves[i] = feature
        return pytree.tree_unflatten(leaves, spec)

    return denoiser.register_forward_hook(hook)


@contextmanager
def _watched(pipe: Any, run: Run) -> Iterator[None]:
    """Record a pipeline's denoiser calls and scheduler steps."""
    kinds = {type(part) for part in pipe.components.values() if hasattr(part, "set_timesteps")}
    names: Counter[str] = Counter()
    current = ["default"]
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(_patched(kind, "step", functools.partial(_record_step, run)))
            stack.enter_context(_patched(kind, "set_timesteps", functools.partial(_record_request, run, names)))
        for denoiser in denoisers_of(pipe):
            stack.enter_context(_naming(denoiser, current))
            if "lesa" not in getattr(getattr(denoiser, "_diffusers_hook", None), "hooks", ()):
                handle = denoiser.register_forward_pre_hook(lambda *_: run.place(names, current[0]) and None)
                stack.callback(handle.remove)
        yield


def _record_step(run: Run, original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    if run.inside:  # a scheduler's step may call another of its methods of that name
        return original(scheduler, *args, **kwargs)
    if run.calls and not run.sigmas:  # a pipeline may run another model with a scheduler of its own first
        run.sigmas.append(_sigmas_from(scheduler, args[1] if len(args) > 1 else kwargs["timestep"]))
    run.inside = True
    try:
        result = original(scheduler, *args, **kwargs)
    finally:
        run.inside = False
    run.samples.append((result[0] if isinstance(result, tuple) else result.prev_sample).clone())
    run.stepped = True
    return result


def _record_request(
    run: Run, names: Counter[str], original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any
) -> Any:
    if run.begun:  # several set_timesteps before a request's first call begin one request
        run.request, run.begun = run.request + 1, False
    run.step, run.stepped = 0, False
    names.clear()
    return original(scheduler, *args, **kwargs)


def _sigmas_from(scheduler: Any, timestep: Any) -> tuple[float, ...]:
    """The noise levels from a timestep on; none where the scheduler has no such timestep."""
    if not isinstance(timestep, Tensor) or timestep.numel() != 1:
        return ()
    found = (torch.as_tensor(scheduler.timesteps) == timestep.cpu()).nonzero().flatten()
    return sigmas_of(scheduler)[int(found[0]) :] if len(found) else ()


@contextmanager
def _patched(kind: type, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Put a function around a method of a class, for all of its objects, copies too."""
    original, own = getattr(kind, name), name in vars(kind)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(original, self, *args, **kwargs)

    setattr(kind, name, method)
    try:
        yield
    finally:
        setattr(kind, name, original) if own else delattr(kind, name)


@contextmanager
def _naming(denoiser: nn.Module, current: list[str]) -> Iterator[None]:
    """Note the name of the cache context of each call."""
    original = getattr(denoiser, "cache_context", None)
    if original is None:
        yield
        return

    @contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        before, current[0] = current[0], name
        try:
            with original(name, *args, **kwargs):
                yield
        finally:
            current[0] = before

    denoiser.cache_context = cache_context
    try:
        yield
    finally:
        del denoiser.cache_context


def _flat(value: Any) -> list[np.ndarray]:
    """The arrays within an output of any type."""
    if isinstance(value, Tensor):
        return [_array(value)]
    if isinstance(value, np.ndarray):
        return [value]
    if hasattr(value, "getbands"):  # a PIL image
        return [np.asarray(value)]
    if isinstance(value, dict):
        return [array for part in value.values() for array in _flat(part)]
    if isinstance(value, (list, tuple)):
        return [array for part in value for array in _flat(part)]
    return [] if not hasattr(value, "__dict__") else _flat(vars(value))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def _gap(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("inf")
    return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-12)) if x.size else 0.0
