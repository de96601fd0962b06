"""Smooth features written down instead of recorded: statistics, surrogates and fitted plans of them."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from lesa.planner.build import closed_form, expected_by, plan_from_weights, statistics_of
from lesa.planner.search import search
from lesa.planner.statistics import GUIDED, Statistics, flow_impulse_response
from lesa.planner.surrogate import Surrogate
from lesa.plans.plan import Plan

STEPS, REQUESTS, LENGTH, BUDGET = 50, 7, 64, 8
CONTEXTS = {1: (("cond",), (1.0,)), 2: (("uncond", "cond"), (-2.0, 3.0))}  # not in the order of the alphabet


def shifted(steps, shift=2.0):
    """The shifted sigmas of a request, the final 0 included."""
    even = np.linspace(1.0, 0.0, steps + 1)
    return tuple(shift * even / (1.0 + (shift - 1.0) * even))


def features(sigmas, count=1):
    """Smooth features [P, C, T, L] of requests at any noise levels, of unlike sizes, and error gains [C, T, P]."""
    rng = np.random.default_rng(5)
    phases, rates = rng.uniform(0, 6, (REQUESTS, count, 1, LENGTH)), rng.uniform(0.3, 7, (REQUESTS, 1, 1, LENGTH))
    levels = np.asarray(sigmas[:-1])[:, None]
    sizes = rng.uniform(0.3, 3, (REQUESTS, 1, 1, 1))
    outputs = sizes * (np.sin(levels * rates + phases) / rates + rng.normal(size=(REQUESTS, 1, 1, LENGTH)))
    error_gains = rng.uniform(0.2, 0.8, (count, 1, REQUESTS)) * (2.0 - np.asarray(sigmas[:-1]))[None, :, None]
    return outputs, error_gains


def model(sigmas, count=1):
    """The surrogate of these features."""
    outputs, error_gains = features(sigmas, count)
    flat = outputs.reshape(REQUESTS, -1, LENGTH)
    contexts, guidance = CONTEXTS[count]
    grams = flat @ flat.transpose(0, 2, 1) / LENGTH
    return Surrogate(grams, flow_impulse_response(sigmas), np.array(guidance), error_gains, contexts)


@functools.cache
def fitted(count=1, steps=STEPS, budget=BUDGET):
    """A plan as `lesa.fit` makes it."""
    sigmas = shifted(steps)
    surrogate = model(sigmas, count)
    timesteps = tuple(1000 * s for s in sigmas[:-1])
    bare = Plan(tuple(range(steps)), sigmas, site="output", timesteps=timesteps)
    known = statistics_of(bare, surrogate, sigmas)
    computed = search(known.gram("output", GUIDED), known.impulse_response[-1], budget)
    weights, _ = surrogate.optimise(computed, closed_form(known, computed))
    made = plan_from_weights(known, computed, weights, timesteps=timesteps, surrogate=surrogate.to_arrays())
    return replace(made, expected=expected_by(surrogate, made))


@functools.cache
def statistics(contexts=("cond",), guidance=(1.0,)):
    """Statistics of smooth features of sigma, written down instead of recorded."""
    sigmas = shifted(STEPS)
    rng = np.random.default_rng(3)
    phases = rng.uniform(0.0, 6.0, (len(contexts), 1, 8))
    features = np.sin(np.asarray(sigmas[:-1])[None, :, None] * np.arange(1, 9) + phases) / np.arange(1, 9)
    flat = features.reshape(-1, 8)
    return Statistics(
        sigmas=sigmas,
        timesteps=tuple(1000.0 * s for s in sigmas[:-1]),
        contexts=contexts,
        guidance=guidance,
        grams={"output": flat @ flat.T / 8, "hidden": flat @ np.diag(np.arange(1.0, 9.0)) @ flat.T},
        impulse_response=flow_impulse_response(sigmas),
        requests=2,
    )
