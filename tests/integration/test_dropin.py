"""Drop-in: on real pipelines lesa changes what a plan says and nothing else, and leaves no trace.

The oracle never skips a block: plain torch hooks overwrite the feature of each forecast step with the plan's
weighted sum, written out here. lesa must reach the same bits while not running the blocks at all.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.hooks import HookRegistry, ModelHook
from pipelines import CASES, CASES_BY_NAME, Case
from torch import Tensor, nn

import lesa
from lesa.forecasters import plan_of
from lesa.plans.plan import Plan
from lesa.plans.rows import PlanError, Row
from lesa.runtime.clock import sigmas_of

pytestmark = pytest.mark.filterwarnings("error::lesa.LesaWarning")

FLUX = CASES_BY_NAME["flux_dev"]
QWEN = CASES_BY_NAME["qwen_image"]
SDXL = CASES_BY_NAME["sdxl"]
WAN = CASES_BY_NAME["wan"]
CASE_SITES = [pytest.param(case, site, id=f"{case.name}-{site}") for case in CASES for site in case.sites]
ON_CASES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ON_CASE_SITES = pytest.mark.parametrize(("case", "site"), CASE_SITES)
# One context and two, hidden and output sites, a scheduler with a memory, both halves of the guidance in one batch.
FEW = [(FLUX, "hidden"), (FLUX, "output"), (QWEN, "hidden"), (WAN, "output"), (SDXL, "output")]
ON_FEW = pytest.mark.parametrize(("case", "site"), [pytest.param(*one, id=f"{one[0].name}-{one[1]}") for one in FEW])
ERRORS = (RuntimeError, KeyboardInterrupt)


# Plans


def schedule(steps: int) -> tuple[int, ...]:
    """Computed steps that leave forecast steps on both sides: 0, 1, 4, 7, ..."""
    return tuple(step for step in range(steps) if step == 0 or step % 3 == 1)


@functools.cache
def sigmas(case: Case) -> tuple[float, ...]:
    """The noise levels of the case's default request."""
    pipe = case.make()
    case.call(pipe)
    return sigmas_of(pipe.scheduler)[-case.steps - 1 :]


def plan_for(case: Case, kind: str, site: str) -> Plan:
    """A plan for the default request: "all" computed, "reuse" of the last computed feature, or "linear".

    "linear" extrapolates from the last two steps, forecast ones too. Its weights are powers of two, so that
    every order of summation gives the same bits.
    """
    computed = tuple(range(case.steps)) if kind == "all" else schedule(case.steps)
    rows = {}
    for step in set(range(case.steps)) - set(computed):
        last = max(s for s in computed if s < step)
        rows[step] = Row((last,), (1.0,)) if kind == "reuse" else Row((step - 2, step - 1), (-1.0, 2.0))
    return Plan(computed, sigmas(case), {"*": rows} if rows else {}, site=site)


def contexts_of(case: Case, guidance: bool | None = None) -> tuple[str, ...]:
    """The cache contexts of a request, in the order of their calls."""
    if guidance is None or case.request.get("negative_prompt", "absent") == "absent" or not case.contexts:
        return case.contexts or ("default",)
    return ("cond", "uncond") if guidance else ("cond",)


# The oracle


@contextmanager
def oracle(module: nn.Module, position: int, plan: Plan, contexts: tuple[str, ...]) -> Iterator[None]:
    """Overwrite item `position` of what `module` returns at the plan's forecast steps."""
    features: dict[str, dict[int, Tensor]] = defaultdict(dict)
    calls = 0

    def overwrite(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal calls
        context, step = contexts[calls % len(contexts)], calls // len(contexts)
        calls += 1
        kept = features[context]
        if step in plan.computed:
            kept[step] = _feature(output, position).clone()
            return output
        row = plan.rows_of(context)[step]
        kept[step] = sum((w * kept[s] for w, s in zip(row.weights, row.steps, strict=True)), torch.zeros(()))
        kept[step] = kept[step] + row.bias if row.bias else kept[step]
        if isinstance(output, Tensor):
            return kept[step]
        if isinstance(output, tuple):
            return (*output[:position], kept[step], *output[position + 1 :])
        return type(output)(sample=kept[step])

    handle = module.register_forward_hook(overwrite)
    try:
        yield
    finally:
        handle.remove()


def _feature(output: Any, position: int) -> Tensor:
    return output if isinstance(output, Tensor) else output[position]


def tail_of(case: Case, pipe: Any) -> nn.Module:
    """The last block that runs."""
    return getattr(case.denoiser(pipe), case.blocks[-1])[-1]


def by_oracle(case: Case, plan: Plan, pipe: Any = None, guidance: bool | None = None, **request: Any) -> Tensor:
    """The output a request must have under `plan`, on a fresh pipeline unless one is given."""
    pipe = pipe or case.make()
    hidden = plan.site == "hidden"
    module, position = (tail_of(case, pipe), case.feature) if hidden else (case.denoiser(pipe), 0)
    with oracle(module, position, plan, contexts_of(case, guidance)):
        return case.call(pipe, guidance=guidance, **request)


@functools.cache
def expected(case: Case, kind: str, site: str, **request: Any) -> Tensor:
    """The output a request must have under `plan_for(case, kind, site)`."""
    return by_oracle(case, plan_for(case, kind, site), **request)


@functools.cache
def untouched(case: Case, **request: Any) -> Tensor:
    """The output of a request on a fresh pipeline that lesa never saw."""
    return case.call(case.make(), **request)


def enabled(case: Case, plan: Plan) -> Any:
    """A fresh pipeline with a plan on."""
    pipe = case.make()
    lesa.enable(pipe, plan)
    return pipe


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# What can be seen from outside


@contextmanager
def counted(modules: list[nn.Module]) -> Iterator[list[int]]:
    """Count the calls of each module while the context is open."""
    counts = [0] * len(modules)

    def count(index: int) -> None:
        counts[index] += 1

    with ExitStack() as stack:
        for i, module in enumerate(modules):
            handle = module.register_forward_pre_hook(lambda *_, i=i: count(i))
            stack.callback(handle.remove)
        yield counts


def traces(denoiser: nn.Module) -> list[str]:
    """Whatever of lesa is found on a denoiser or its submodules."""
    found = []
    for name, module in denoiser.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        hooks = list(registry.hooks.values()) if registry is not None else []
        hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        owners = [hook if hasattr(hook, "__code__") else type(hook) for hook in hooks]
        owners += [type(value) for value in vars(module).values()]
        found += [f"{name}: {owner}" for owner in owners if str(owner.__module__).split(".")[0] == "lesa"]
        if getattr(module.forward, "__func__", None) is not type(module).forward:
            found.append(f"{name}: forward is {module.forward}")
    return found


def stats_of(pipe: Any) -> tuple[int, int, int, int]:
    """Requests, computed, forecast and refused calls."""
    stats = lesa.stats(pipe)
    return stats.requests, stats.computed, stats.forecast, sum(stats.refused.values())


def expected_stats(case: Case, plan: Plan, requests: int = 1) -> tuple[int, int, int, int]:
    branches = len(contexts_of(case)) * requests
    return requests, plan.budget * branches, (case.steps - plan.budget) * branches, 0


@contextmanager
def warned(text: str) -> Iterator[None]:
    """At least one LesaWarning with `text` in it; others are allowed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(w.message) for w in caught if issubclass(w.category, lesa.LesaWarning)]
    assert any(text in message for message in messages), messages


class Interruption:
    """Raises an error at the n-th call of a module, once."""

    def __init__(self, module: nn.Module, error: type[BaseException], call: int) -> None:
        self._left = call
        self._error = error
        self._handle = module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self._left -= 1
        if self._left == 0:
            self._handle.remove()
            raise self._error("interruption")


# The pipelines themselves


@ON_CASES
def test_pipeline_is_a_fair_subject(case: Case) -> None:
    first = untouched(case)
    assert first.isfinite().all()
    assert first.std() > 0.01
    assert not torch.equal(first, untouched(case, seed=1))
    assert not torch.equal(first, untouched(case, prompt=1))
    for site in case.sites:
        assert not torch.equal(first, expected(case, "linear", site))


# A plan that computes everything; taking lesa off


@ON_FEW
def test_disable_leaves_no_trace(case: Case, site: str) -> None:
    pipe, plan = case.make(), plan_for(case, "all", site)
    denoiser = case.denoiser(pipe)
    keys = list(denoiser.state_dict())
    assert not traces(denoiser)
    before = {name: set(vars(module)) for name, module in denoiser.named_modules()}
    assert_same(case.call(pipe), untouched(case))
    lesa.enable(pipe, plan)
    assert list(denoiser.state_dict()) == keys
    assert_same(case.call(pipe), untouched(case))
    assert stats_of(pipe) == expected_stats(case, plan)
    lesa.enable(pipe, plan_for(case, "reuse", site))
    assert traces(denoiser)
    assert_same(case.call(pipe), expected(case, "reuse", site))
    lesa.disable(pipe)
    assert not traces(denoiser)
    after = {name: set(vars(module)) for name, module in denoiser.named_modules()}
    assert after == before
    assert_same(case.call(pipe, seed=1), untouched(case, seed=1))
    with pytest.raises(ValueError, match="not enabled"):
        lesa.stats(pipe)


# Forecasts


@ON_CASE_SITES
def test_forecast_steps_skip_the_blocks(case: Case, site: str) -> None:
    plan = plan_for(case, "linear", site)
    pipe = enabled(case, plan)
    denoiser = case.denoiser(pipe)
    entry = next(module for module in denoiser.modules() if not list(module.children()) and module is not denoiser)
    branches = len(contexts_of(case))
    with counted([*case.probes(pipe), entry]) as counts:
        output = case.call(pipe)
    assert counts[:-1] == [plan.budget * branches] * len(case.probes(pipe))
    if site == "output":
        assert counts[-1] <= plan.budget * branches
    assert_same(output, expected(case, "linear", site))
    assert stats_of(pipe) == expected_stats(case, plan)


@pytest.mark.parametrize("case", [QWEN, WAN], ids=lambda case: case.name)
@pytest.mark.parametrize("site", ["hidden", "output"])
def test_contexts_have_rows_and_features_of_their_own(case: Case, site: str) -> None:
    plan = Plan.join({"cond": plan_for(case, "reuse", site), "uncond": plan_for(case, "linear", site)})
    output = case.call(enabled(case, plan))
    assert_same(output, by_oracle(case, plan))
    swapped = Plan.join({"cond": plan_for(case, "linear", site), "uncond": plan_for(case, "reuse", site)})
    assert not torch.equal(output, by_oracle(case, swapped))


def test_context_without_rows_is_computed_and_counted() -> None:
    plan = Plan.join({"cond": plan_for(QWEN, "reuse", "hidden")})
    pipe = enabled(QWEN, plan)
    with pytest.warns(lesa.LesaWarning, match="uncond"), counted(QWEN.probes(pipe)) as counts:
        output = QWEN.call(pipe)
    assert output.isfinite().all()
    assert counts == [plan.budget + QWEN.steps] * len(counts)
    assert sum(lesa.stats(pipe).refused.values()) == QWEN.steps - plan.budget


@pytest.mark.parametrize("site", ["hidden", "output"])
def test_bias_is_added(site: str) -> None:
    plain = plan_for(FLUX, "reuse", site)
    rows = {step: replace(row, bias=0.5) for step, row in plain.rows_of("*").items()}
    plan = replace(plain, rows={"*": rows})
    output = FLUX.call(enabled(FLUX, plan))
    assert_same(output, by_oracle(FLUX, plan))
    assert not torch.equal(output, by_oracle(FLUX, plain))


def test_hidden_forecast_passes_through_the_models_own_head() -> None:
    """FLUX, by hand: proj_out(norm_out(F, temb)) with the conditioning of the step that is forecast."""
    pipe = FLUX.make()
    model = pipe.transformer
    inputs = loop_inputs(model, seed=3)
    guidance, pooled = inputs["guidance"], inputs["pooled_projections"]
    kept = []
    handle = tail_of(FLUX, pipe).register_forward_hook(lambda _, __, output: kept.append(output[1]))
    lesa.enable(model, Plan((0,), (1.0, 0.5, 0.0), {"*": {1: Row((0,), (1.0,))}}))
    with torch.no_grad():
        model(hidden_states=noise(3), timestep=torch.tensor([1.0]), **inputs)
        output = model(hidden_states=noise(4), timestep=torch.tensor([0.5]), **inputs)[0]
        temb = model.time_text_embed(torch.tensor([0.5]) * 1000, guidance * 1000, pooled)
        expected = model.proj_out(model.norm_out(kept[0], temb))
    handle.remove()
    assert_same(output, expected)


def test_half_precision_keeps_its_dtype() -> None:
    plan = plan_for(FLUX, "linear", "hidden")
    pipe = FLUX.make().to(torch.bfloat16)
    lesa.enable(pipe, plan)
    output = FLUX.call(pipe)
    assert output.dtype == torch.bfloat16
    assert_same(output, by_oracle(FLUX, plan, FLUX.make().to(torch.bfloat16)))


def test_dtype_changes_between_requests() -> None:
    plan = plan_for(FLUX, "linear", "hidden")
    pipe = enabled(FLUX, plan)
    FLUX.call(pipe)
    assert_same(FLUX.call(pipe.to(torch.bfloat16)), by_oracle(FLUX, plan, FLUX.make().to(torch.bfloat16)))


# One request after another


@ON_FEW
def test_requests_and_their_shapes_change(case: Case, site: str) -> None:
    plan = plan_for(case, "linear", site)
    pipe = enabled(case, plan)
    requests: list[dict[str, Any]] = [{"prompt": 1, "seed": 1}, {"batch": 4}, {}]
    if case.other_size:
        requests.insert(1, {"size": case.other_size})
    if case.several:
        requests.insert(2, {"images": 3})
    for request in requests:
        assert_same(case.call(pipe, **request), expected(case, "linear", site, **request))
    assert stats_of(pipe) == expected_stats(case, plan, requests=len(requests))


@pytest.mark.parametrize("case", [FLUX, QWEN, SDXL], ids=lambda case: case.name)
def test_guidance_goes_on_and_off(case: Case) -> None:
    for site in case.sites:
        plan = plan_for(case, "linear", site)
        pipe = enabled(case, plan)
        for guidance in (True, False, True):
            assert_same(case.call(pipe, guidance=guidance), expected(case, "linear", site, guidance=guidance))


@pytest.mark.parametrize("case", [FLUX, SDXL], ids=lambda case: case.name)
def test_enable_and_disable_twice(case: Case) -> None:
    site, other = case.sites[0], case.sites[-1]
    first, second = plan_for(case, "reuse", site), plan_for(case, "linear", other)
    pipe = case.make()
    lesa.disable(pipe)
    lesa.enable(pipe, first)
    lesa.enable(pipe, first)
    assert_same(case.call(pipe), expected(case, "reuse", site))
    lesa.enable(pipe, second)
    assert_same(case.call(pipe), expected(case, "linear", other))
    assert stats_of(pipe) == expected_stats(case, second)
    lesa.disable(pipe)
    lesa.disable(pipe)
    assert not traces(case.denoiser(pipe))
    assert_same(case.call(pipe), untouched(case))


def test_failed_enable_changes_nothing() -> None:
    plan = plan_for(FLUX, "reuse", "hidden")
    pipe = enabled(FLUX, plan)
    with pytest.raises(PlanError, match="WanTransformer3DModel"):
        lesa.enable(pipe, replace(plan, denoiser="WanTransformer3DModel"))
    assert_same(FLUX.call(pipe), by_oracle(FLUX, plan))
    unet = SDXL.make()
    unnamed = plan_for(SDXL, "reuse", "hidden")
    for plan in (unnamed, replace(unnamed, denoiser="UNet2DConditionModel")):
        with pytest.raises(PlanError, match="site='hidden' is not known for UNet2DConditionModel.*site='output'"):
            lesa.enable(unet, plan)
    assert not traces(unet.unet)


@pytest.mark.parametrize(("value", "kind"), [(7, "int"), ([1, 2], "list")])
@pytest.mark.parametrize("budget", [None, 4])
def test_what_is_no_plan_is_refused(value: Any, kind: str, budget: int | None) -> None:
    pipe = FLUX.make()
    with pytest.raises(TypeError, match=f"plan: expected a Plan, Statistics or a path, got {kind}"):
        lesa.enable(pipe, value, budget=budget)
    assert not traces(pipe.transformer)


def test_plan_from_a_file_runs_the_same(tmp_path: Any) -> None:
    plan = plan_for(QWEN, "linear", "hidden")
    pipe = QWEN.make()
    lesa.enable(pipe, plan.save(tmp_path / "plan.safetensors"))
    assert_same(QWEN.call(pipe), expected(QWEN, "linear", "hidden"))


# Errors in the middle of a request


@ON_FEW
def test_request_after_an_error_inside_a_block(case: Case, site: str) -> None:
    plan = plan_for(case, "linear", site)
    pipe = enabled(case, plan)
    last_computed = 1 + (plan.budget - 1) * len(contexts_of(case))
    for error in ERRORS:
        Interruption(case.probes(pipe)[-1], error, call=last_computed)
        with pytest.raises(error, match="interruption"):
            case.call(pipe)
        assert_same(case.call(pipe, seed=1), expected(case, "linear", site, seed=1))
    lesa.disable(pipe)
    assert not traces(case.denoiser(pipe))
    assert_same(case.call(pipe), untouched(case))


@ON_FEW
def test_request_after_an_error_in_the_callback(case: Case, site: str) -> None:
    def fail(error: type[BaseException], _: Any, step: int, __: Any, kwargs: dict) -> dict:
        if step == 2:  # after a forecast step
            raise error("interruption")
        return kwargs

    plan = plan_for(case, "linear", site)
    pipe = enabled(case, plan)
    for error in ERRORS:
        with pytest.raises(error, match="interruption"):
            case.call(pipe, callback_on_step_end=functools.partial(fail, error))
        assert_same(case.call(pipe, seed=1), expected(case, "linear", site, seed=1))
    lesa.disable(pipe)
    assert not traces(case.denoiser(pipe))
    assert_same(case.call(pipe), untouched(case))


class StopError(Exception):
    """Raised by a user's hook."""


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_request_after_a_stop_in_the_head_of_a_forecast_step(error: type[BaseException]) -> None:
    plan = plan_for(FLUX, "linear", "hidden")
    pipe = enabled(FLUX, plan)
    Interruption(pipe.transformer.norm_out, error, call=4)
    with pytest.raises(error, match="interruption"):
        FLUX.call(pipe)
    lesa.disable(pipe)
    assert_same(FLUX.call(pipe), untouched(FLUX))
    lesa.enable(pipe, plan)
    assert_same(FLUX.call(pipe), expected(FLUX, "linear", "hidden"))


def test_request_stopped_by_the_pipelines_own_interrupt() -> None:
    def stop(pipe: Any, step: int, _: Any, kwargs: dict) -> dict:
        pipe._interrupt = step == 3
        return kwargs

    plan = plan_for(FLUX, "linear", "hidden")
    pipe = enabled(FLUX, plan)
    FLUX.call(pipe, callback_on_step_end=stop)
    assert_same(FLUX.call(pipe, seed=1), expected(FLUX, "linear", "hidden", seed=1))


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_changes_between_requests(first: bool) -> None:
    pipe = enabled(FLUX, plan_for(FLUX, "linear", "hidden"))
    for inference in (first, not first):
        with torch.inference_mode(inference):
            assert_same(FLUX.call(pipe).clone(), expected(FLUX, "linear", "hidden"))


def test_guidance_switched_off_within_a_request() -> None:
    """SDXL's batch of two halves becomes one: forecasts wait for a computed step of the new shape."""

    def cut(pipe: Any, step: int, _: Any, kwargs: dict) -> dict:
        if step == 2:
            pipe._guidance_scale = 0.0
            kwargs = {name: value.chunk(2)[-1] if name != "latents" else value for name, value in kwargs.items()}
        return kwargs

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    request = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": names}
    plan = plan_for(SDXL, "reuse", "output")
    assert plan.computed == (0, 1, 4, 7)
    pipe = enabled(SDXL, plan)
    with warned("shape"):
        output = SDXL.call(pipe, **request)
    without = {step: row for step, row in plan.rows_of("*").items() if step != 3}
    assert_same(output, by_oracle(SDXL, replace(plan, computed=(0, 1, 3, 4, 7), rows={"*": without}), **request))
    assert stats_of(pipe) == (1, 4, 3, 1)
    assert_same(SDXL.call(pipe), expected(SDXL, "reuse", "output"))


def test_request_ended_early_by_denoising_end() -> None:
    plan = plan_for(SDXL, "linear", "output")
    pipe = enabled(SDXL, plan)
    for request in ({"denoising_end": 0.5}, {}):
        assert_same(SDXL.call(pipe, **request), expected(SDXL, "linear", "output", **request))


# The wrong number of steps


@pytest.mark.parametrize(
    ("case", "site"), [*FEW, (CASES_BY_NAME["flux_img2img"], "hidden")], ids=lambda one: getattr(one, "name", one)
)
def test_wrong_step_count_is_refused_before_any_work(case: Case, site: str) -> None:
    plan = plan_for(case, "reuse", site)
    pipe = enabled(case, plan)
    children = [module for module in case.denoiser(pipe).modules() if module is not case.denoiser(pipe)]
    asked = 2 * case.request.get("num_inference_steps", case.steps)
    for _ in range(2):
        with (
            counted(children) as counts,
            pytest.raises(PlanError, match=rf"\b{2 * case.steps}\b.*\b{case.steps}\b"),
        ):
            case.call(pipe, steps=asked)
        assert not any(counts)
    assert stats_of(pipe)[1:] == (0, 0, 0)
    assert_same(case.call(pipe), expected(case, "reuse", site))


# Several pipelines


def test_two_pipelines_in_two_threads_step_by_step() -> None:
    """A barrier in the step callback makes the two requests alternate.

    On some CPUs two computing threads once changed the last bits of all that the process computed afterwards: what is
    expected is computed before them, and nothing of it is kept for other tests.
    """
    barrier = threading.Barrier(2, timeout=30)

    def wait(_: Any, __: int, ___: Any, kwargs: dict) -> dict:
        barrier.wait()
        return kwargs

    jobs = [(FLUX, plan_for(FLUX, "linear", "hidden")), (QWEN, plan_for(QWEN, "reuse", "output"))]
    jobs += [(FLUX, plan_for(FLUX, "reuse", "output"))]
    for first, second in ((jobs[0], jobs[1]), (jobs[0], jobs[2])):
        outputs: dict[int, Tensor] = {}
        pair = [(case, plan, enabled(case, plan)) for case, plan in (first, second)]
        wanted = [by_oracle(case, plan, seed=i) for i, (case, plan, _) in enumerate(pair)]

        def run(index: int, case: Case, pipe: Any, outputs: dict[int, Tensor] = outputs) -> None:
            outputs[index] = case.call(pipe, seed=index, callback_on_step_end=wait)

        threads = [threading.Thread(target=run, args=(i, c, p)) for i, (c, _, p) in enumerate(pair)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for i, output in enumerate(wanted):
            assert_same(outputs[i], output)
    expected.cache_clear()
    untouched.cache_clear()


def test_request_inside_another_requests_callback() -> None:
    outer_plan, inner_plan = plan_for(QWEN, "linear", "hidden"), plan_for(FLUX, "linear", "hidden")
    outer, inner = enabled(QWEN, outer_plan), enabled(FLUX, inner_plan)
    results = []

    def nest(_: Any, step: int, __: Any, kwargs: dict) -> dict:
        if step in (1, 2):
            results.append(FLUX.call(inner, seed=step))
        return kwargs

    assert_same(QWEN.call(outer, callback_on_step_end=nest), expected(QWEN, "linear", "hidden"))
    for step, result in zip((1, 2), results, strict=True):
        assert_same(result, expected(FLUX, "linear", "hidden", seed=step))


def test_disabling_one_pipeline_leaves_the_other() -> None:
    plan = plan_for(FLUX, "reuse", "hidden")
    first, second = enabled(FLUX, plan), enabled(FLUX, plan)
    lesa.disable(first)
    assert_same(FLUX.call(first), untouched(FLUX))
    assert_same(FLUX.call(second), expected(FLUX, "reuse", "hidden"))


def test_pipelines_that_share_a_denoiser_share_its_plan() -> None:
    """Text-to-image and image-to-image on the same parts: the plan fits where the number of steps does."""
    image = CASES_BY_NAME["flux_img2img"]
    pipe = FLUX.make()
    other = type(image.make())(**pipe.components)
    other.set_progress_bar_config(disable=True)
    lesa.enable(pipe, plan_for(FLUX, "linear", "hidden"))
    with pytest.raises(PlanError, match=r"\b6\b.*\b8\b"):
        image.call(other)
    assert image.call(other, strength=1.0).isfinite().all()
    assert stats_of(pipe)[1:] == (4, 4, 0)
    assert_same(FLUX.call(pipe), expected(FLUX, "linear", "hidden"))
    lesa.disable(other)
    assert not traces(pipe.transformer)


# Another scheduler


def test_scheduler_swapped_after_enable() -> None:
    plan = plan_for(FLUX, "linear", "hidden")
    other = FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipe, unhooked = enabled(FLUX, plan), FLUX.make()
    FLUX.call(pipe)
    pipe.scheduler, unhooked.scheduler = other, FlowMatchEulerDiscreteScheduler.from_config(other.config)
    # The first request fitted, so it said nothing; the first that does not speaks up, once.
    with pytest.warns(lesa.LesaWarning, match="sigmas"):
        assert_same(FLUX.call(pipe, seed=0), by_oracle(FLUX, plan, unhooked, seed=0))
    assert_same(FLUX.call(pipe, seed=1), by_oracle(FLUX, plan, unhooked, seed=1))
    assert stats_of(pipe) == expected_stats(FLUX, plan, requests=3)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler], ids=lambda s: s.__name__)
def test_scheduler_of_another_class_swapped_in(scheduler: Any) -> None:
    plan = plan_for(SDXL, "reuse", "output")
    pipe, unhooked = enabled(SDXL, plan), SDXL.make()
    SDXL.call(pipe)
    for subject in (pipe, unhooked):
        subject.scheduler = scheduler.from_config(subject.scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lesa.LesaWarning)  # DPM-Solver spaces its timesteps in another way
        for seed in (0, 1):
            assert_same(SDXL.call(pipe, seed=seed), by_oracle(SDXL, plan, unhooked, seed=seed))


def test_scheduler_that_calls_the_denoiser_twice_a_step() -> None:
    plan = plan_for(SDXL, "reuse", "output")
    pipe = enabled(SDXL, plan)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(PlanError, match=r"\b15\b.*\b8\b"):
        SDXL.call(pipe)


def test_other_sigmas_are_reported_once() -> None:
    plan = plan_for(FLUX, "reuse", "hidden")
    pipe, unhooked = FLUX.make(), FLUX.make()
    for subject in (pipe, unhooked):
        subject.scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
    lesa.enable(pipe, plan)
    with pytest.warns(lesa.LesaWarning, match="sigmas"):
        output = FLUX.call(pipe)
    assert_same(output, by_oracle(FLUX, plan, unhooked))
    FLUX.call(pipe)  # a second warning would be an error


# A bare denoiser


@ON_FEW
def test_bare_denoiser_inside_its_pipeline(case: Case, site: str) -> None:
    plan = plan_for(case, "linear", site)
    pipe = case.make()
    lesa.enable(case.denoiser(pipe), plan)
    assert_same(case.call(pipe, seed=1), expected(case, "linear", site, seed=1))
    assert_same(case.call(pipe), expected(case, "linear", site))
    assert stats_of(case.denoiser(pipe)) == expected_stats(case, plan, requests=2)


def noise(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, 16, generator=torch.Generator().manual_seed(seed))


def loop_inputs(model: nn.Module, seed: int, batch: int = 1) -> dict[str, Any]:
    """Everything a FLUX transformer takes beside the sample and the timestep; 4 x 4 tokens of 16 channels."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
        "pooled_projections": torch.randn(batch, 16, generator=generator),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.stack((torch.zeros(16), rows.flatten(), columns.flatten()), -1),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


@torch.no_grad()
def euler_loop(
    model: nn.Module,
    steps: int = 8,
    seed: int = 0,
    contexts: tuple[str | None, ...] = (None,),
    stop: int | None = None,
) -> Tensor:
    """A user's own sampler: Euler steps from sigma 1 to 0, one call a context; breaks before step `stop`."""
    sample = noise(seed)
    levels = torch.linspace(1, 0, steps + 1)
    for step in range(steps):
        if step == stop:
            break
        velocities = []
        for i, context in enumerate(contexts):
            with model.cache_context(context) if context else nullcontext():
                velocities.append(
                    model(sample, timestep=levels[step : step + 1], **loop_inputs(model, seed + 10 * i))[0]
                )
        velocity = velocities[0] if len(velocities) == 1 else velocities[1] + 2 * (velocities[0] - velocities[1])
        sample = sample + (levels[step + 1] - levels[step]) * velocity
    return sample


def loop_plan(site: str, **changes: Any) -> Plan:
    plan = replace(plan_for(FLUX, "linear", site), sigmas=tuple(torch.linspace(1, 0, 9).tolist()))
    return replace(plan, **changes)


LOOPS = pytest.mark.parametrize(
    "contexts", [(None,), ("cond",), ("cond", "uncond")], ids=["unnamed", "cond", "cond-uncond"]
)


def loop_by_oracle(plan: Plan, contexts: tuple[str | None, ...], **loop: Any) -> Tensor:
    pipe = FLUX.make()
    hidden = plan.site == "hidden"
    module, position = (tail_of(FLUX, pipe), 1) if hidden else (pipe.transformer, 0)
    with oracle(module, position, plan, tuple(context or "default" for context in contexts)):
        return euler_loop(pipe.transformer, contexts=contexts, **loop)


@LOOPS
@pytest.mark.parametrize("site", ["hidden", "output"])
def test_own_loop(site: str, contexts: tuple[str | None, ...]) -> None:
    plan = loop_plan(site)
    pipe = FLUX.make()
    model = pipe.transformer
    plain = euler_loop(model, contexts=contexts)
    lesa.enable(model, plan)
    with counted(FLUX.probes(pipe)) as counts:
        assert_same(euler_loop(model, contexts=contexts), loop_by_oracle(plan, contexts))
    assert counts == [plan.budget * len(contexts)] * len(counts)
    assert_same(euler_loop(model, seed=1, contexts=contexts), loop_by_oracle(plan, contexts, seed=1))
    assert lesa.stats(model).requests == 2
    assert not lesa.stats(model).refused
    lesa.enable(model, replace(plan, computed=tuple(range(8)), rows={}))
    assert_same(euler_loop(model, contexts=contexts), plain)
    lesa.disable(model)
    assert not traces(model)
    assert_same(euler_loop(model, contexts=contexts), plain)


@pytest.mark.parametrize(
    ("stop", "contexts"), [(1, ("cond", "uncond")), (3, (None,)), (7, (None,)), (7, ("cond", "uncond"))]
)
def test_own_loop_left_early_then_a_new_one(stop: int, contexts: tuple[str | None, ...]) -> None:
    plan = loop_plan("hidden")
    model = FLUX.make().transformer
    lesa.enable(model, plan)
    euler_loop(model, contexts=contexts, stop=stop)
    assert_same(euler_loop(model, seed=1, contexts=contexts), loop_by_oracle(plan, contexts, seed=1))


def test_own_loop_left_by_an_error_between_two_contexts() -> None:
    contexts = ("cond", "uncond")
    plan = loop_plan("hidden")
    pipe = FLUX.make()
    lesa.enable(pipe.transformer, plan)
    Interruption(FLUX.probes(pipe)[0], RuntimeError, call=4)  # step 1, "uncond"
    with pytest.raises(RuntimeError, match="interruption"):
        euler_loop(pipe.transformer, contexts=contexts)
    assert_same(euler_loop(pipe.transformer, seed=1, contexts=contexts), loop_by_oracle(plan, contexts, seed=1))


@pytest.mark.parametrize("steps", [6, 12])
def test_own_loop_of_another_length(steps: int) -> None:
    """The plan's recorded timesteps tell a loop of another length apart at its second step."""
    plan = loop_plan("hidden", timesteps=tuple(torch.linspace(1, 0, 9)[:-1].tolist()))
    pipe = FLUX.make()
    lesa.enable(pipe.transformer, plan)
    with counted(FLUX.probes(pipe)) as counts, pytest.raises(PlanError, match=r"\b8\b"):
        euler_loop(pipe.transformer, steps=steps)
    assert max(counts) <= 2
    assert_same(euler_loop(pipe.transformer), loop_by_oracle(plan, (None,)))


def test_own_loop_longer_than_a_plan_without_timesteps() -> None:
    model = FLUX.make().transformer
    lesa.enable(model, loop_plan("hidden"))
    with pytest.raises(PlanError, match=r"\b8\b"):
        euler_loop(model, steps=12)
    assert_same(euler_loop(model), loop_by_oracle(loop_plan("hidden"), (None,)))


@pytest.mark.parametrize("computed", [(0, 1, 4, 7), (0, 2, 4, 6)])
def test_own_loop_with_unnamed_branches_is_not_forecast_wrongly(computed: tuple[int, ...]) -> None:
    """Two unnamed calls a step: either each has its own history, or an error or a warning names the cure."""
    plan = plan_of("reuse", computed, loop_plan("hidden").sigmas)
    model = FLUX.make().transformer
    plain = euler_loop(model, contexts=(None, None))
    lesa.enable(model, plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            output = euler_loop(model, contexts=(None, None))
        except PlanError as error:
            assert "cache_context" in str(error)
            return
    if any("cache_context" in str(warning.message) for warning in caught):
        assert_same(output, plain)
    else:
        assert_same(output, loop_by_oracle(plan, ("cond", "uncond")))


# Hooks of other people


class Passing(ModelHook):
    """Somebody else's hook: counts and passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


class OtherHead(nn.Module):
    """A head that somebody put in: it has a norm and does not run it."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.norm = own.norm

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return hidden_states


@pytest.mark.parametrize("computed", [(0, 3), tuple(range(8))], ids=["forecasts", "all computed"])
def test_head_that_is_not_run(computed: tuple[int, ...]) -> None:
    """No feature can be taken: everything is computed, the output is the model's, and stats and a warning say why."""
    bare, pipe = FLUX.make(), FLUX.make()
    for each in (bare, pipe):
        each.transformer.norm_out = OtherHead(each.transformer.norm_out)
    plan = plan_of("reuse", computed, sigmas(FLUX), site="hidden")
    lesa.enable(pipe, plan)
    with warned("was not run"):
        assert_same(FLUX.call(pipe), FLUX.call(bare))
    requests, steps, forecast, refused = stats_of(pipe)
    assert (requests, forecast) == (1, 0)
    assert (steps, refused) == (len(computed), FLUX.steps - len(computed))
    lesa.disable(pipe)
    assert not traces(pipe.transformer)


def test_own_hook_removed_by_somebody_else() -> None:
    """Whoever names lesa's hook takes lesa off; stats say so."""
    pipe = enabled(FLUX, plan_for(FLUX, "linear", "hidden"))
    pipe.transformer._diffusers_hook.remove_hook("lesa", recurse=True)
    assert_same(FLUX.call(pipe), untouched(FLUX))
    with pytest.raises(ValueError, match="not enabled"):
        lesa.stats(pipe)
    lesa.disable(pipe)
    assert_same(FLUX.call(pipe), untouched(FLUX))


@pytest.mark.parametrize("site", ["hidden", "output"])
def test_hooks_registered_before_and_after_outlive_disable(site: str) -> None:
    plan = plan_for(FLUX, "linear", site)
    pipe = FLUX.make()
    places = [pipe.transformer, *pipe.transformer.transformer_blocks, tail_of(FLUX, pipe)]
    before, after = [Passing() for _ in places], [Passing() for _ in places]
    for place, hook in zip(places, before, strict=True):
        HookRegistry.check_if_exists_or_initialize(place).register_hook(hook, "before")
    lesa.enable(pipe, plan)
    for place, hook in zip(places, after, strict=True):
        HookRegistry.check_if_exists_or_initialize(place).register_hook(hook, "after")
    assert_same(FLUX.call(pipe), expected(FLUX, "linear", site))
    lesa.disable(pipe)
    for hook in (*before, *after):
        hook.calls = 0
    assert_same(FLUX.call(pipe), untouched(FLUX))
    assert [hook.calls for hook in (*before, *after)] == [FLUX.steps] * 2 * len(places)
    for place in places:
        place._diffusers_hook.remove_hook("after", recurse=False)
        place._diffusers_hook.remove_hook("before", recurse=False)
    assert_same(FLUX.call(pipe), untouched(FLUX))


@pytest.mark.parametrize("site", ["hidden", "output"])
def test_inner_hooks_of_somebody_else_come_and_go(site: str) -> None:
    """diffusers drops what was put around a hook that it removes, as when a LoRA is loaded under group offload."""
    pipe = FLUX.make()
    places = [pipe.transformer, *pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    for place in places:
        HookRegistry.check_if_exists_or_initialize(place).register_hook(Passing(), "before")
    lesa.enable(pipe, plan_for(FLUX, "linear", site))
    assert_same(FLUX.call(pipe), expected(FLUX, "linear", site))
    for place in places:
        place._diffusers_hook.remove_hook("before", recurse=False)
    assert_same(FLUX.call(pipe), expected(FLUX, "linear", site))
    again = [Passing() for _ in places]
    for place, hook in zip(places, again, strict=True):
        HookRegistry.check_if_exists_or_initialize(place).register_hook(hook, "before")
    assert_same(FLUX.call(pipe), expected(FLUX, "linear", site))
    assert again[0].calls == FLUX.steps
    assert stats_of(pipe)[0] == 3
    lesa.disable(pipe)
    assert_same(FLUX.call(pipe), untouched(FLUX))


@pytest.mark.parametrize("order", ["before", "after"])
def test_offload_hooks_of_accelerate_outlive_disable(order: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Counting(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += 1
            return args, kwargs

    plan = plan_for(FLUX, "linear", "hidden")
    pipe = FLUX.make()
    places = [pipe.transformer, *pipe.transformer.single_transformer_blocks]

    def add() -> None:
        for place in places:
            hooks.add_hook_to_module(place, Counting())

    if order == "before":
        add()
    lesa.enable(pipe, plan)
    if order == "after":
        add()
    assert_same(FLUX.call(pipe), expected(FLUX, "linear", "hidden"))
    lesa.disable(pipe)
    Counting.calls = 0
    assert_same(FLUX.call(pipe), untouched(FLUX))
    assert Counting.calls == FLUX.steps * len(places)
    for place in places:
        hooks.remove_hook_from_module(place)
    assert_same(FLUX.call(pipe), untouched(FLUX))
    assert not traces(pipe.transformer)


def test_cache_of_diffusers_is_not_disturbed() -> None:
    """A stateful hook that reads the cache context still finds it while lesa is on, and after."""
    from diffusers.hooks.hooks import BaseState, StateManager

    class Reader(ModelHook):
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.manager = StateManager(BaseState)
            self.names: list[str] = []

        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.names.append(self.manager.context.name)
            return self.fn_ref.original_forward(*args, **kwargs)

        def reset_state(self, module: nn.Module) -> nn.Module:
            return module

    pipe = QWEN.make()
    reader = Reader()
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.transformer_blocks[0]).register_hook(reader, "reader")
    lesa.enable(pipe, plan_for(QWEN, "all", "hidden"))
    assert_same(QWEN.call(pipe), untouched(QWEN))
    lesa.disable(pipe)
    assert_same(QWEN.call(pipe), untouched(QWEN))
    assert reader.names == ["cond", "uncond"] * 2 * QWEN.steps
