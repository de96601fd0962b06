"""The model of a plan's errors: exact where the denoiser is linear, and Gauss-Newton finds what least squares finds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from written import CONTEXTS, LENGTH, REQUESTS, STEPS, features, model, shifted

from lesa.planner.statistics import flow_impulse_response, interpolation
from lesa.planner.surrogate import Outcome, Segments, Surrogate, carry, interpolated_error_gains, unit_gains

T, L, P = 9, 40, 3
COMPUTED = (0, 1, 3, 6)


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


def world(contexts, generator):
    """Requests of v_c(x, t) = a_(c,t) + s_(c,t) x, and their full trajectories."""
    sigmas = np.linspace(1, 0, T + 1)
    error_gains = 0.5 * torch.randn(contexts, T, generator=generator).double().numpy()
    drift = torch.randn(P, contexts, T, L, generator=generator).double().numpy()
    noise = torch.randn(P, L, generator=generator).double().numpy()
    guidance = np.array([1.0]) if contexts == 1 else np.array([3.0, -2.0])

    def run(weights=None):
        outputs, samples = np.zeros((P, contexts, T, L)), [noise]
        for t in range(T):
            x = samples[-1]
            if weights is None or t in COMPUTED:
                outputs[:, :, t] = drift[:, :, t] + error_gains[:, t, None] * x[:, None]
            else:
                outputs[:, :, t] = np.einsum("cj,pcjl->pcl", weights[:, t], outputs)
            guided = np.einsum("c,pcl->pl", guidance, outputs[:, :, t])
            samples.append(x + (sigmas[t + 1] - sigmas[t]) * guided)
        return outputs, samples

    full, samples = run()
    flat = full.reshape(P, contexts * T, L)
    grams = flat @ flat.transpose(0, 2, 1) / L
    every = np.repeat(error_gains[:, :, None], P, 2)
    return Surrogate(grams, flow_impulse_response(sigmas), guidance, every), run, samples


def predicted(surrogate, computed, weights):
    """The outcome of rows [C, T, T], in the sampler's units."""
    segments = Segments(surrogate, computed)
    return segments.outcome(segments.evaluate(segments.reads(weights))).scaled(1 / segments.carry)


def some_rows(contexts, generator):
    weights = np.zeros((contexts, T, T))
    for t in set(range(T)) - set(COMPUTED):
        for j in (step for step in COMPUTED if step < t):
            weights[:, t, j] = torch.randn(contexts, generator=generator).numpy()
    return weights


@pytest.mark.parametrize("contexts", [1, 2])
def test_exact_for_a_linear_denoiser(contexts, generator):
    surrogate, run, samples = world(contexts, generator)
    weights = some_rows(contexts, generator)
    outcome = predicted(surrogate, COMPUTED, weights)
    outputs, accelerated = run(weights)
    for q, step in enumerate((*COMPUTED[1:], T)):
        error = accelerated[step] - samples[step]
        np.testing.assert_allclose(outcome.error[q], (error**2).mean(1), rtol=1e-9, atol=1e-12)
        basis = outputs[:, :, list(COMPUTED)].reshape(P, -1, L)
        np.testing.assert_allclose(outcome.along[q], np.einsum("pml,pl->pm", basis, error) / L, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(outcome.basis, basis @ basis.transpose(0, 2, 1) / L, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("contexts", [1, 2])
def test_what_is_carried_is_the_derivative(contexts, generator):
    """One unit added to the forecasts of a segment, here times an output: what finite differences give."""
    surrogate, run, samples = world(contexts, generator)
    weights = some_rows(contexts, generator)
    segments = Segments(surrogate, COMPUTED)
    carried = segments.carried(segments.evaluate(segments.reads(weights)))
    outputs, base = run(weights)
    k, j, tiny = 2, 1, 1e-6
    moved = weights.copy()
    moved[0, COMPUTED[k] + 1 : COMPUTED[k + 1], COMPUTED[j]] += tiny
    _, after = run(moved)
    direction = surrogate.guidance[0] * outputs[:, 0, COMPUTED[j]]
    for q, step in enumerate((*COMPUTED[1:], T)):
        expected = carried[q, :, k, None] * direction
        np.testing.assert_allclose((after[step] - base[step]) / tiny, expected, rtol=1e-4, atol=1e-5)


def test_steps_lower_the_objective_to_a_minimum(generator):
    surrogate, run, samples = world(1, generator)
    weights = some_rows(1, generator)
    start = predicted(surrogate, COMPUTED, weights).objective
    better, objective = surrogate.optimise(COMPUTED, weights, 60)
    assert objective == pytest.approx(predicted(surrogate, COMPUTED, better).objective)
    assert objective < start - 0.1
    # No small change of the varied numbers lowers it further.
    for k, j in ((1, 0), (2, 1), (3, 3)):
        for sign in (-1, 1):
            moved = better.copy()
            end = (*COMPUTED[1:], T)[k]
            moved[0, COMPUTED[k] + 1 : end, COMPUTED[j]] += sign * 3e-3
            assert predicted(surrogate, COMPUTED, moved).objective > objective - 1e-3


def test_only_rows_of_forecast_steps_change_and_read_computed_steps(generator):
    surrogate, _, _ = world(2, generator)
    weights = some_rows(2, generator)
    moved = surrogate.step(COMPUTED, weights, predicted(surrogate, COMPUTED, weights), 0.1) - weights
    assert np.abs(moved).max() > 1e-3
    for t, j in np.argwhere(np.abs(moved).max(0) > 0):
        assert t not in COMPUTED and j in COMPUTED and j < t
    # Within a segment every row changes alike.
    np.testing.assert_allclose(moved[:, 4], moved[:, 5], atol=1e-15)
    np.testing.assert_allclose(moved[:, 7], moved[:, 8], atol=1e-15)


def test_a_request_weighs_by_its_decibels(generator):
    """Scaling one request's outputs changes its weight in no way."""
    surrogate, _, _ = world(1, generator)
    weights = some_rows(1, generator)
    louder = surrogate.grams.copy()
    louder[0] *= 1e4
    loud = Surrogate(louder, surrogate.impulse_response, surrogate.guidance, surrogate.error_gains)
    first, second = (
        model.step(COMPUTED, weights, predicted(model, COMPUTED, weights), 0.0) for model in (surrogate, loud)
    )
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)


def test_everything_computed_has_no_error_and_no_step(generator):
    surrogate, _, _ = world(1, generator)
    computed, weights = tuple(range(T)), np.zeros((1, T, T))
    outcome = predicted(surrogate, computed, weights)
    assert np.abs(outcome.error).max() == 0.0
    np.testing.assert_array_equal(surrogate.step(computed, weights, outcome, 0.1), weights)


def test_gains_between_computed_steps_are_interpolated_and_cut():
    """Times sigma, 1 to 1/8: 0.75 at step 2, 1 at step 4, 25 at step 6, of which 8 are left."""
    measured, flow = np.zeros((1, 4, 1)), flow_impulse_response(np.linspace(1, 0, 9))
    measured[0, :, 0] = [5.0, 1.0, 2.0, 100.0]
    sigma = np.arange(8, 0, -1) / 8
    np.testing.assert_allclose(unit_gains(flow), 1 / sigma)
    error_gains = interpolated_error_gains(measured, (0, 2, 4, 6), flow)[0, :, 0]
    np.testing.assert_allclose(error_gains * sigma, [0.75, 0.75, 0.75, 0.875, 1.0, 4.5, 8.0, 8.0])
    # Of samples that are scaled.
    scale = np.array([2.0, 2.0, 3.0, 0.5, 10.0, 0.1, 7.0, 1.0, 1.0])
    scaled = interpolated_error_gains(measured / scale[[0, 2, 4, 6], None], (0, 2, 4, 6), scale[:, None] * flow)
    np.testing.assert_allclose(scaled[0, :, 0], error_gains / scale[:-1])
    measured[0, 2, 0] = np.nan
    error_gains = interpolated_error_gains(measured, (0, 2, 4, 6), flow)[0, :, 0]
    np.testing.assert_allclose(error_gains * sigma, [0.75, 0.75, 0.75, 2.5625, 4.375, 6.1875, 8.0, 8.0])
    assert not interpolated_error_gains(measured[:, :1], (0,), flow).any()


def test_objective_is_the_mean_logarithm():
    error = np.array([[1.0, 4.0], [2.0, 8.0]])
    outcome = Outcome(np.zeros((2, 1, 1)), np.zeros((2, 2, 1)), error)
    np.testing.assert_allclose(outcome.cost, [3.0, 12.0])
    assert outcome.objective == pytest.approx((np.log(3) + np.log(12)) / 2)


def test_any_response_and_any_features(generator):
    """Against the recursion step by step, for a scheduler with memory and error gains that differ between requests."""
    C, computed = 2, (0, 1, 3, 6)
    flat = torch.randn(P, C * T, L, generator=generator).double().numpy()
    impulse_response = np.tril(torch.randn(T + 1, T, generator=generator).double().numpy(), -1)
    error_gains = torch.randn(C, T, P, generator=generator).double().numpy()
    guidance, weights = np.array([3.0, -2.0]), some_rows(C, generator)
    surrogate = Surrogate(flat @ flat.transpose(0, 2, 1) / L, impulse_response, guidance, error_gains)
    outcome = predicted(surrogate, computed, weights)
    truth, outputs = flat.reshape(P, C, T, L), np.zeros((P, C, T, L))
    off = np.zeros((T + 1, P, L))
    for t in range(T + 1):
        guided = np.einsum("c,pctl->tpl", guidance, (outputs - truth)[:, :, :t])
        off[t] = np.einsum("i,ipl->pl", impulse_response[t, :t], guided)
        if t in computed:
            outputs[:, :, t] = truth[:, :, t] + error_gains[:, t].T[:, :, None] * off[t][:, None]
        elif t < T:
            outputs[:, :, t] = np.einsum("cj,pcjl->pcl", weights[:, t], outputs)
    basis = outputs[:, :, list(computed)].reshape(P, -1, L)
    errors = off[[1, 3, 6, T]]
    np.testing.assert_allclose(outcome.basis, basis @ basis.transpose(0, 2, 1) / L, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(outcome.along, np.einsum("qpl,pml->qpm", errors, basis) / L, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(outcome.error, (errors**2).mean(2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("contexts", [1, 2])
def test_a_sampler_may_scale_its_samples(contexts, generator):
    """Errors at step m times c_m and gains divided by it: another way to write the same sampler."""
    surrogate, _, _ = world(contexts, generator)
    scale = np.exp(2 * torch.randn(T + 1, generator=generator).double().numpy())
    scaled = replace(
        surrogate,
        impulse_response=scale[:, None] * surrogate.impulse_response,
        error_gains=surrogate.error_gains / scale[:-1, None],
    )
    weights = some_rows(contexts, generator)
    segments, other = Segments(surrogate, COMPUTED), Segments(scaled, COMPUTED)
    plain, same = segments.evaluate(segments.reads(weights)), other.evaluate(other.reads(weights))
    np.testing.assert_allclose(same.error, scale[-1] ** 2 * plain.error, rtol=1e-8, atol=1e-12)
    assert same.objective == pytest.approx(plain.objective + 2 * np.log(scale[-1]))
    rows, objective = surrogate.optimise(COMPUTED, weights)
    others, promised = scaled.optimise(COMPUTED, weights)
    np.testing.assert_allclose(others, rows, rtol=1e-5, atol=1e-7)
    assert promised == pytest.approx(objective + 2 * np.log(scale[-1]))
    measured = predicted(surrogate, COMPUTED, weights)
    step = scaled.step(COMPUTED, weights, measured.scaled(scale[[*COMPUTED[1:], T]]), 0.1)
    np.testing.assert_allclose(step, surrogate.step(COMPUTED, weights, measured, 0.1), rtol=1e-6, atol=1e-8)
    sigmas, elsewhere = np.linspace(1, 0, T + 1), np.linspace(1, 0, 6)
    again = np.exp(torch.randn(6, generator=generator).double().numpy())
    known, there = flow_impulse_response(elsewhere), again[:, None] * flow_impulse_response(elsewhere)
    expected = surrogate.at(sigmas, elsewhere, known).error_gains / again[:-1, None]
    found = scaled.at(sigmas, elsewhere, there).error_gains
    # No impulse reaches step 0, so its own scale is not known; nor is its gain used there.
    later = interpolation(sigmas[:-1], elsewhere[:-1])[:, 0] == 0
    assert later.sum() > 2
    ratio = scale[-1] / again[-1]
    np.testing.assert_allclose(found[:, later], expected[:, later] / ratio, rtol=1e-9)


def test_what_the_scheduler_carries_to_the_end():
    """1 for Euler steps along a flow, the ratio of scales for DDIM, 1 where nothing is carried."""
    flow = flow_impulse_response(shifted(STEPS, 3.0))
    np.testing.assert_array_equal(carry(flow), np.ones(STEPS + 1))
    alpha = np.linspace(0.05, 0.99, STEPS + 1)
    sigma, response = np.sqrt(1 - alpha), np.zeros((STEPS + 1, STEPS))
    for t in range(STEPS):
        ratio = np.sqrt(alpha[t + 1] / alpha[t])
        response[t + 1] = ratio * response[t]
        response[t + 1, t] = sigma[t + 1] - ratio * sigma[t]
    np.testing.assert_allclose(carry(response)[1:], np.sqrt(alpha[-1] / alpha[1:]), rtol=1e-12)
    forgetting = np.tril(np.triu(np.ones((STEPS + 1, STEPS)), -1), -1)
    np.testing.assert_array_equal(carry(forgetting), np.ones(STEPS + 1))


def test_weights_of_the_newest_steps_alone_may_be_varied(generator):
    surrogate, _, _ = world(2, generator)
    weights = some_rows(2, generator)
    objectives = []
    for most in (1, 2, 4):
        change, objective = Segments(surrogate, COMPUTED, most).optimise(weights, 30)
        assert [bool(np.abs(change[:, k, j]).max()) for k in range(4) for j in range(4)] == [
            COMPUTED[k] not in (0,) and k - most < j <= k for k in range(4) for j in range(4)
        ]
        objectives.append(objective)
    assert objectives[0] > objectives[1] > objectives[2]
    assert objectives[2] == pytest.approx(surrogate.optimise(COMPUTED, weights, 30)[1])


@pytest.mark.parametrize("count", [1, 2])
def test_the_surrogate_elsewhere_is_that_of_the_interpolated_features(count):
    sigmas, others = shifted(STEPS), shifted(23, 3.0)
    impulse_response = flow_impulse_response(others) * 1.5
    there = model(sigmas, count).at(sigmas, others, impulse_response)
    weights = interpolation(sigmas[:-1], others[:-1])
    outputs, error_gains = features(sigmas, count)
    flat = (weights @ outputs).reshape(REQUESTS, -1, LENGTH)
    np.testing.assert_allclose(there.grams, flat @ flat.transpose(0, 2, 1) / LENGTH, atol=1e-12)
    np.testing.assert_allclose(there.error_gains, np.einsum("ts,csp->ctp", weights, error_gains), atol=1e-12)
    assert there.impulse_response is impulse_response and there.contexts == CONTEXTS[count][0] and there.num_steps == 23
    # Features as smooth as these are at the other noise levels what their interpolation says, to a small share of what
    # they change by from step to step.
    truth = model(others, count)
    np.testing.assert_allclose(there.error_gains, truth.error_gains, atol=1e-9)
    step = np.diff(features(others, count)[0], axis=2)
    assert np.abs(weights @ outputs - features(others, count)[0]).max() < 0.02 * np.abs(step).max()


def test_the_surrogate_at_its_own_noise_levels_is_itself():
    known = model(shifted(STEPS), 2)
    same = known.at(shifted(STEPS), shifted(STEPS), known.impulse_response)
    np.testing.assert_allclose(same.grams, known.grams, atol=1e-12)
    np.testing.assert_allclose(same.error_gains, known.error_gains, atol=1e-12)
    with pytest.raises(ValueError, match="21 sigmas for a surrogate of 50 steps"):
        known.at(shifted(20), shifted(STEPS), known.impulse_response)


def test_of_many_requests_some_are_kept():
    known = model(shifted(STEPS))
    assert known.thinned() is known and known.thinned(7) is known
    some = known.thinned(3)
    np.testing.assert_array_equal(some.grams, known.grams[[0, 3, 6]])
    np.testing.assert_array_equal(some.error_gains, known.error_gains[:, :, [0, 3, 6]])


def test_shapes_that_do_not_agree():
    for change in [
        {"grams": np.zeros((6, STEPS, STEPS))},
        {"grams": np.zeros((7, STEPS, STEPS + 1))},
        {"impulse_response": np.zeros((STEPS, STEPS))},
        {"guidance": np.ones(2)},
        {"contexts": ("cond", "uncond")},
    ]:
        with pytest.raises(ValueError, match="of a surrogate have shapes"):
            replace(model(shifted(STEPS)), **change)
