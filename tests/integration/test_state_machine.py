"""Whatever was done before, a request is what it is on a fresh pipeline.

Sequences of enable, disable, requests, interruptions, schedulers, LoRAs, offload and copies, in random order. Without
lesa, and with every step computed, a request has the bits of a pipeline that lesa never saw; with a plan, those of a
fresh pipeline on which the plan was just enabled. `LESA_SEQUENCES=500` runs as many sequences of each case.
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CASES_BY_NAME, Case
from torch import Tensor, nn

import lesa
from lesa import PlanError
from lesa.plans.plan import Plan
from lesa.plans.rows import Row
from lesa.runtime.clock import sigmas_of

hypothesis = pytest.importorskip("hypothesis")
peft = pytest.importorskip("peft")
accelerate_hooks = pytest.importorskip("accelerate.hooks")
from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.configuration import set_hypothesis_home_dir  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test  # noqa: E402

SEQUENCES = int(os.environ.get("LESA_SEQUENCES", "5"))
RULES = 12  # a sequence
CASES = ("flux_dev", "qwen_image", "wan", "sdxl")
STEPS = (4, 6)
PLANS = ("all", "reuse", "linear", "generic")
LORA = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])


class StopError(Exception):
    """Raised by a callback."""


# The subject


@functools.cache
def made(case: Case) -> Any:
    """A pipeline that is only ever copied."""
    return case.make()


def with_scheduler(pipe: Any, shifted: bool) -> Any:
    """Another scheduler of the same class: lesa must follow it."""
    if not shifted:
        return type(pipe.scheduler).from_config(pipe.scheduler.config)
    config = dict(pipe.scheduler.config)
    name = "timestep_spacing" if "beta_start" in config else "flow_shift" if "flow_shift" in config else "max_shift"
    value = {"timestep_spacing": "trailing", "flow_shift": 2.0, "max_shift": 1.4}[name]
    return type(pipe.scheduler).from_config(config, **{name: value})


@torch.no_grad()
def add_lora(pipe: Any, case: Case) -> None:
    denoiser = case.denoiser(pipe)
    denoiser.add_adapter(LORA, "own")
    draw = torch.Generator().manual_seed(9)
    for name, parameter in denoiser.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 4)
            parameter.requires_grad_(False)


def fresh(case: Case, lora: bool, shifted: bool) -> Any:
    pipe = copy.copy(made(case))
    setattr(pipe, case.denoiser_name, copy.deepcopy(case.denoiser(pipe)))
    pipe.scheduler = with_scheduler(pipe, shifted)
    if lora:
        add_lora(pipe, case)
    return pipe


@functools.cache
def plan_for(case: Case, kind: str, site: str, steps: int, shifted: bool) -> Plan:
    pipe = fresh(case, False, shifted)
    case.call(pipe, steps=steps)
    computed = tuple(range(steps)) if kind == "all" else tuple(step for step in range(steps) if step in (0, 1, 3))
    rows = {}
    for step in set(range(steps)) - set(computed):
        last = max(one for one in computed if one < step)
        rows[step] = Row((last,), (1.0,)) if kind == "reuse" else Row((step - 2, step - 1), (-1.0, 2.0))
    return Plan(computed, sigmas_of(pipe.scheduler), {"*": rows} if rows else {}, site=site)


def enable(pipe: Any, case: Case, plan: tuple) -> None:
    kind, site, steps, shifted = plan
    lesa.enable(pipe, None if kind == "generic" else plan_for(case, kind, site, steps, shifted))


@functools.cache
def wanted(case: Case, plan: tuple | None, lora: bool, shifted: bool, **request: Any) -> Tensor:
    """What a request gives on a fresh pipeline; all-computed plans do not matter."""
    pipe = fresh(case, lora, shifted)
    if plan is not None and plan[0] != "all":
        enable(pipe, case, plan)
    return case.call(pipe, **request)


def branches(case: Case) -> int:
    return max(len(case.contexts), 1)


# The sequences


class Requests(RuleBasedStateMachine):
    """What a user does with one pipeline; `case` is set by a subclass."""

    case: Case

    def __init__(self) -> None:
        super().__init__()
        self.pipe = fresh(self.case, False, False)
        self.plan: tuple | None = None
        self.lora = self.shifted = self.offloaded = self.active = False

    @rule(kind=st.sampled_from(PLANS), hidden=st.booleans(), steps=st.sampled_from(STEPS))
    def enable(self, kind: str, hidden: bool, steps: int) -> None:
        site = "hidden" if hidden and "hidden" in self.case.sites else "output"
        self.plan = (kind, site, steps, self.shifted)
        enable(self.pipe, self.case, self.plan)

    @rule()
    def disable(self) -> None:
        lesa.disable(self.pipe)
        self.plan = None

    @rule()
    def request(self) -> None:
        self.run("itself", None, {})

    @rule(other=st.sampled_from(({"batch": 2}, {"size": None}, {"seed": 1})))
    def another_request(self, other: dict) -> None:
        self.run("itself", None, other)

    @rule(how=st.sampled_from(("copy", "request-scoped")), steps=st.sampled_from((None, *STEPS)))
    def request_of_a_copy(self, how: str, steps: int | None) -> None:
        self.run(how, steps, {})

    def teardown(self) -> None:
        """At last without lesa."""
        self.run("itself", None, {})
        lesa.disable(self.pipe)
        self.plan = None
        self.run("itself", STEPS[0], {})

    def run(self, how: str, steps: int | None, other: dict) -> None:
        """A request; by default with the steps that the plan is for."""
        steps = steps or (self.plan[2] if self.plan else STEPS[0])
        request = {"steps": steps} | ({"size": self.case.other_size} if "size" in other else other)
        pipe = self.runs(how)
        if self.plan is not None and self.plan[0] != "generic" and self.plan[2] != steps:
            with pytest.raises(PlanError, match=f"num_inference_steps={self.plan[2]}"):
                self.case.call(pipe, **request)
            return
        before = self.stats()
        got = self.case.call(pipe, **request)
        torch.testing.assert_close(
            got, wanted(self.case, self.plan, self.lora, self.shifted, **request), rtol=0, atol=0
        )
        self.check_stats(before, steps)

    @rule(how=st.sampled_from(("raises", "interrupts", "block")), step=st.integers(0, 3), copied=st.booleans())
    def stop(self, how: str, step: int, copied: bool) -> None:
        pipe = self.runs("copy" if copied else "itself")

        def callback(running: Any, at: int, _: Any, kwargs: dict) -> dict:
            if at >= step and how == "raises":
                raise StopError
            running._interrupt = at >= step
            return kwargs

        steps = self.plan[2] if self.plan is not None else 4
        try:
            if how == "block":
                with failing(self.case.probes(pipe)[0], step + 1):
                    self.case.call(pipe, steps=steps)
            else:
                self.case.call(pipe, steps=steps, callback_on_step_end=callback)
        except StopError:
            pass

    @rule()
    def swap_scheduler(self) -> None:
        if self.plan is not None and self.plan[0] not in ("generic", "all"):
            return  # such a plan is for one scheduler
        self.shifted = not self.shifted
        self.pipe.scheduler = with_scheduler(made(self.case), self.shifted)

    @precondition(lambda self: not self.offloaded)
    @rule()
    def switch_lora(self) -> None:
        denoiser = self.case.denoiser(self.pipe)
        if self.lora:
            denoiser.delete_adapters("own") if self.active else denoiser.disable_adapters()
            self.active = False
        elif "own" in getattr(denoiser, "peft_config", {}):
            denoiser.enable_adapters()
            self.active = True
        else:
            add_lora(self.pipe, self.case)
            self.active = False
        self.lora = not self.lora

    @rule()
    def switch_offload(self) -> None:
        denoiser = self.case.denoiser(self.pipe)
        if self.offloaded:
            accelerate_hooks.remove_hook_from_module(denoiser, recurse=True)
        else:
            hook = accelerate_hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
            accelerate_hooks.add_hook_to_module(denoiser, hook, append=True)
        self.offloaded = not self.offloaded

    @precondition(lambda self: not self.offloaded)
    @rule(keep=st.booleans())
    def deep_copy(self, keep: bool) -> None:
        other = copy.deepcopy(self.pipe)
        if not keep:
            self.pipe = other

    def runs(self, how: str) -> Any:
        """The pipeline itself, a shallow copy, or one made for this request as servers make them."""
        if how == "copy":
            return copy.copy(self.pipe)
        if how == "request-scoped":
            scheduler = copy.deepcopy(self.pipe.scheduler)
            own = copy.copy(self.pipe)
            components = {**self.pipe.components, "scheduler": scheduler}
            scoped = type(self.pipe)(**{**{k: v for k, v in own.config.items() if k in OPTIONS}, **components})
            scoped.set_progress_bar_config(disable=True)
            for name in ("prompt_template_encode", "prompt_template_encode_start_idx"):  # of Qwen-Image's helper
                if hasattr(self.pipe, name):
                    setattr(scoped, name, getattr(self.pipe, name))
            return scoped
        return self.pipe

    def stats(self) -> tuple[int, int, int, int]:
        if self.plan is None:
            return 0, 0, 0, 0
        stats = lesa.stats(self.pipe)
        return stats.requests, stats.computed, stats.forecast, sum(stats.refused.values())

    def check_stats(self, before: tuple[int, ...], steps: int) -> None:
        if self.plan is None:
            with pytest.raises(ValueError, match="enabled"):
                lesa.stats(self.pipe)
            return
        requests, computed, forecast, refused = (a - b for a, b in zip(self.stats(), before, strict=True))
        assert (requests, computed + forecast, refused) == (1, steps * branches(self.case), 0)
        if self.plan[0] != "generic":
            assert computed == plan_for(self.case, *self.plan).budget * branches(self.case)


OPTIONS = ("add_watermarker",)


class failing:  # noqa: N801 - a context
    """A module that raises at its n-th call."""

    def __init__(self, module: nn.Module, calls: int) -> None:
        self._left, self._module = calls, module

    def __enter__(self) -> None:
        self._handle = self._module.register_forward_pre_hook(self._count)

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def _count(self, *_: Any) -> None:
        self._left -= 1
        if not self._left:
            raise StopError


@pytest.mark.parametrize("name", CASES)
def test_random_sequences(name: str, seed: int, tmp_path: Path) -> None:
    set_hypothesis_home_dir(tmp_path)  # else it leaves files in the tree
    machine = type(f"Requests_{name}", (Requests,), {"case": CASES_BY_NAME[name]})
    few = settings(
        max_examples=SEQUENCES,
        stateful_step_count=RULES,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[hypothesis.Phase.generate],  # shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=few)
