"""Likeness: prompts and weights unlike the fitted ones are told, and requests with them watched more closely."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CASES_BY_NAME
from test_guard import COMPUTED, STEPS, checked_plan, measured, scaled
from torch import nn

import lesa
from lesa.plans.describe import describe
from lesa.plans.plan import Expected, Plan
from lesa.runtime.guard import ALERT, TOLERANCE
from lesa.runtime.inputs import Inputs
from lesa.runtime.likeness import ALTERED, FAR, Likeness, Prompts, Weights, embedding_of, likeness_of

FLUX = CASES_BY_NAME["flux_dev"]


def denoiser(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(24)), nn.LayerNorm(8))


# What is compared


def test_center_and_scatter_by_hand() -> None:
    """Four points at the corners of a square of side 2: each lies sqrt(2) from the center, 4/3 of it from the rest."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) + 5
    found = likeness_of({"cond": corners, "few": corners[:3]}, denoiser())
    assert set(found.prompts) == {"cond"}
    assert found.prompts["cond"].center == (5.0, 5.0)
    assert found.prompts["cond"].scatter == pytest.approx(math.sqrt(2) * 4 / 3)
    far = torch.tensor([[5.0, 5.0], [5.0, 8.0]])
    assert found.distance("cond", far) == pytest.approx(3 / (math.sqrt(2) * 4 / 3))
    assert found.distance("cond", far[:1]) == found.distance("other", far) == 0.0
    assert found.distance("cond", torch.zeros(1, 3)) == math.inf


def test_prompts_that_are_all_the_same_tell_nothing() -> None:
    """Negative prompts of one fit; another one, or the same from an encoder of another dtype, is nothing strange."""
    same = torch.ones(4, 9) + 0.001 * torch.eye(4, 9)
    found = likeness_of({"uncond": same, "cond": same + 0.5 * torch.eye(4, 9)}, denoiser())
    assert set(found.prompts) == {"cond"}
    assert found.distance("uncond", torch.zeros(1, 9)) == 0
    assert not likeness_of({"cond": torch.full((4, 2), math.nan)}, denoiser()).prompts


def test_embeddings() -> None:
    tokens = torch.arange(24.0).view(2, 3, 4)
    names = ("hidden_states", "encoder_hidden_states")
    for inputs in (Inputs(names, (), {names[1]: tokens}), Inputs(names, (None, tokens), {})):
        assert torch.equal(embedding_of(inputs), tokens.mean(1))
    assert embedding_of(Inputs(names, (tokens,), {})) is None
    assert embedding_of(Inputs(names, (), {names[1]: [tokens]})) is None
    assert embedding_of(None) is None
    assert embedding_of(Inputs(names, (), {names[1]: tokens.bfloat16()})).dtype == torch.float32


def test_weights() -> None:
    known = likeness_of({}, denoiser())
    assert torch.tensor(known.weights).shape == (16, 16)

    def altered(other: nn.Module) -> bool:
        return known.altered(Weights(other).read())

    assert not altered(denoiser())
    assert not altered(denoiser().bfloat16())
    assert altered(denoiser(1))
    # A small update of all matrices; one that is smaller than is looked for.
    for norm, told in ((3 * ALTERED, True), (0.1 * ALTERED, False)):
        other = denoiser()
        for matrix in (p for p in other.parameters() if p.dim() > 1):
            update = torch.randn(8, 8)
            matrix.data += update * norm * matrix.data.norm() / update.norm()
        assert altered(other) is told
    # An adapter that leaves the weights as they are; some matrices of another dtype.
    adapted = denoiser()
    adapted.append(nn.Linear(8, 4))
    assert altered(adapted)
    mixed = denoiser()
    mixed[3].bfloat16()
    mixed[12].bfloat16()
    assert not altered(mixed)
    assert not Likeness().altered(Weights(denoiser()).read())
    emptied = denoiser()
    Weights(emptied)._places[3][0].weight = nn.Parameter(torch.empty(0, 8))
    for unread in (nn.LayerNorm(8), denoiser().to("meta"), emptied):
        assert Weights(unread).read() is None and not altered(unread)
    assert likeness_of({}, nn.LayerNorm(8)) == Likeness()
    assert known.altered(Weights(nn.Sequential(nn.Linear(8, 8))).read())  # of fewer matrices


def test_a_default_device_changes_nothing() -> None:
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    known, read = likeness_of({"cond": corners}, denoiser()), Weights(denoiser()).read()
    with torch.device("meta"):
        assert known.distance("cond", corners) == pytest.approx(0.75)
        assert not known.altered(read)


def test_weights_are_read_anew() -> None:
    module = denoiser()
    weights, known = Weights(module), likeness_of({}, module)
    assert weights.serves(module) and not weights.serves(denoiser())
    assert not known.altered(weights.read())
    module.double()  # the parameters' memory is exchanged
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.1)
    assert known.altered(weights.read())
    # Others in their places, as offloading and quantising put them.
    fresh = likeness_of({}, denoiser(2))
    weights = Weights(module)
    for own, other in zip(module, denoiser(2), strict=True):
        own.weight = other.weight
    assert not fresh.altered(weights.read())
    chosen, name = weights._places[3]
    setattr(chosen, name, nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False))
    assert weights.read() is None
    module._hf_peft_config_loaded = True
    assert not weights.serves(module)


# What it does


class Marked:
    """A pipeline whose prompts, weights and errors are as a test wants them."""

    def __init__(self, factor: float) -> None:
        plan = measured(FLUX, checked_plan(FLUX, "output"))
        (self.context,) = plan.expected
        self.plan = scaled(plan, self.context, 4, math.exp(-factor))
        self.pipe = FLUX.make()
        tokens: list[torch.Tensor] = []
        hook = self.pipe.transformer.register_forward_pre_hook(
            lambda _, __, kwargs: tokens.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        for prompt in range(4):
            FLUX.call(self.pipe, steps=1, prompt=prompt)
        hook.remove()
        self.likeness = likeness_of({self.context: torch.cat(tokens).mean(1)}, self.pipe.transformer)

    def run(self, likeness: Likeness | None) -> Any:
        lesa.enable(self.pipe, replace(self.plan, likeness=likeness))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", lesa.LesaWarning)
            FLUX.call(self.pipe, steps=STEPS)
        saw = lesa.stats(self.pipe).guard
        return saw.strange, saw.switches, [str(w.message) for w in caught if "weights are not" in str(w.message)]


def test_requests_unlike_the_fitted_are_watched_closely() -> None:
    between = Marked((ALERT + TOLERANCE) / 2)
    near = between.likeness
    assert near.prompts[between.context].scatter > 0
    assert between.run(None) == between.run(near) == between.run(replace(near, prompts={})) == (0, 0, [])
    own = near.prompts[between.context]
    center = tuple(value + 1.01 * FAR * own.scatter for value in own.center)
    far = replace(near, prompts={between.context: Prompts(center, own.scatter)})
    assert between.run(far) == (1, 1, [])
    other = replace(near, weights=tuple(tuple(2 * w for w in matrix) for matrix in near.weights))
    strange, switches, (told,) = between.run(other)
    assert (strange, switches) == (1, 1) and "fit again with these weights" in told
    # Closely watched, but within what is then allowed.
    within = Marked(0.9 * ALERT)
    assert within.run(far) == (1, 0, [])


def test_each_request_is_looked_at_anew() -> None:
    marked = Marked(0.0)
    lesa.enable(marked.pipe, replace(marked.plan, likeness=marked.likeness))
    FLUX.call(marked.pipe, steps=STEPS)
    saw = lesa.stats(marked.pipe).guard
    assert saw.strange == 0
    with torch.no_grad():
        for weight in marked.pipe.transformer.parameters():
            weight.mul_(1.05)
    with pytest.warns(lesa.LesaWarning, match="the denoiser's weights are not those that the plan was fitted to"):
        FLUX.call(marked.pipe, steps=STEPS)
    assert saw.strange == 1
    with torch.no_grad():
        for weight in marked.pipe.transformer.parameters():
            weight.div_(1.05)
    FLUX.call(marked.pipe, steps=STEPS)
    assert saw.strange == 1


# Where it comes from, and its file


def test_fit_remembers(tmp_path: Path) -> None:
    pipe = FLUX.make()
    prompts = ["a red apple", "snow", "two blue birds", "an old door", "a green tree"]
    plan = lesa.fit(
        pipe, prompts, budget=4, effort="quick", request={"num_inference_steps": 8, "height": 32, "width": 32}
    )
    assert plan.likeness is not None and not plan.likeness.altered(Weights(pipe.transformer).read())
    (known,) = plan.likeness.prompts.values()
    encoded = pipe.encode_prompt(prompts, None)[0]
    torch.testing.assert_close(torch.tensor(known.center), encoded.float().mean((0, 1)), rtol=1e-4, atol=1e-5)
    loaded = Plan.load(plan.save(tmp_path / "plan"))
    assert loaded.likeness is not None
    assert loaded.likeness == plan.likeness
    # Plans made of it on the fly know it too.
    lesa.enable(pipe, plan)
    pipe(prompts[0], num_inference_steps=6, height=32, width=32, output_type="latent")
    assert lesa.models.hooks.attached(pipe).driver.plan.likeness == plan.likeness
    assert lesa.models.hooks.attached(pipe).driver.plan.num_steps == 6


def test_round_trip_of_several_contexts(tmp_path: Path) -> None:
    plan = replace(checked_plan(FLUX, "output"), expected={"*": {4: Expected(0.1, 1.0)}})
    assert plan.computed == COMPUTED
    for likeness in (
        Likeness(),
        Likeness({"cond": Prompts((1.5, 2.0), 0.3), "uncond": Prompts((1.0,), 0.1)}),
        Likeness({}, ((1.0, 2.0), (3.0, 4.0))),
    ):
        loaded = Plan.load(replace(plan, likeness=likeness).save(tmp_path / "plan"))
        assert loaded.likeness == likeness
    assert Plan.load(plan.save(tmp_path / "plan")).likeness is None


def test_a_plan_in_words() -> None:
    plan = checked_plan(FLUX, "output")
    assert "likeness" not in describe(plan) and "likeness" not in describe(replace(plan, likeness=Likeness()))
    known = Likeness({"cond": Prompts((1.0,), 0.1)}, ((1.0, 2.0),))
    assert "likeness     the guard knows the fitted prompts of cond and weights" in describe(
        replace(plan, likeness=known)
    )
