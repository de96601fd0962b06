"""Generic statistics and plans: a model of Gaussian data, known in closed form, recorded in every form."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from written import shifted

from lesa.planner.build import closed_form
from lesa.planner.generic import (
    ASSET,
    FLOW,
    KIND,
    PREDICTIONS,
    Source,
    generic_plan,
    generic_statistics,
    source_of,
    sources,
)
from lesa.planner.statistics import flow_impulse_response, packed
from lesa.plans.plan import Plan
from lesa.plans.storage import read

VARIANCES = np.geomspace(0.01, 30.0, 16)  # of the data, one an element
FLOWS, NOISES = {"emoji-flux", "qwen", "wan"}, {"unet", "pixart"}


def requests(levels: np.ndarray, variance_preserving: bool) -> tuple[np.ndarray, ...]:
    """A request of the perfect model of Gaussian data: alpha, sigma [T], and x_t, d_t, e_t [T, L] of unit noise."""
    alpha, sigma = 1 - levels, levels
    scale = np.hypot(alpha, sigma) if variance_preserving else np.ones_like(levels)
    alpha, sigma = alpha / scale, sigma / scale
    # Both samplers start from the same noise at the same ratio of noise and data.
    x = np.ones(len(VARIANCES)) * np.hypot(alpha[0], sigma[0])
    samples, data, noise = [], [], []
    for t in range(len(levels)):
        power = alpha[t] ** 2 * VARIANCES + sigma[t] ** 2
        samples.append(x)
        data.append(alpha[t] * VARIANCES / power * x)
        noise.append(sigma[t] / power * x)
        if t + 1 < len(levels):
            x = alpha[t + 1] * data[-1] + sigma[t + 1] * noise[-1]
    return alpha, sigma, np.array(samples), np.array(data), np.array(noise)


def recorded(levels: np.ndarray, prediction: str) -> tuple[Source, np.ndarray, np.ndarray]:
    """A source of these requests, what it has inner products of [1 + T, L], and the samples [T, L]."""
    alpha, sigma, samples, data, noise = requests(levels, prediction != FLOW)
    features = noise - data if prediction == FLOW else noise
    vectors = np.concatenate([samples[:1], features])
    gram = vectors @ vectors.T / len(VARIANCES)
    return source_of("gauss", False, prediction, alpha, sigma, gram, 3), vectors, samples


def of_trace(gram: np.ndarray) -> np.ndarray:
    """Scaled to a mean square of 1."""
    return gram * len(gram) / np.trace(gram)


def level_sets() -> dict[str, tuple[float, ...]]:
    return {
        "shift 1": shifted(28, 1.0),
        "shift 5": shifted(28, 5.0),
        "image to image": tuple(np.linspace(0.5, 0.0, 29)),
        "almost clean": tuple(np.linspace(0.01, 0.0, 29)),  # below all that was recorded
        "terminal SNR 0": (1.0, *np.linspace(0.93, 0.02, 27), 0.0),
        "Heun's": tuple(np.repeat(np.linspace(1.0, 0.1, 14), 2)) + (0.0,),
    }


# The asset


def test_the_recordings_of_five_models() -> None:
    found = sources()
    assert {(one.name, one.guided) for one in found} == set(product(FLOWS | NOISES, (False, True)))
    assert len(found) == 10 and sources() is found
    for one in found:
        T = len(one.levels)
        assert one.requests == 64 and one.noise.shape == one.data.shape == (T, T + 1) and one.gram.shape == (T + 1,) * 2
        assert (np.diff(one.levels) < 0).all() and 0 < one.levels[-1] < 0.1
        assert (one.levels[0] == 1.0) == (one.name in FLOWS)
        assert (one.gram == one.gram.T).all()
        assert np.linalg.eigvalsh(one.gram)[0] >= -1e-6 * np.trace(one.gram)
        assert abs(one.gram[0, 0] - 1.0) < 0.01  # the noise


def test_packing_is_undone() -> None:
    description, arrays = read(ASSET, KIND)
    for one, found in zip(description["sources"], sources(), strict=True):
        assert (packed(found.gram) == arrays[f"{one['key']}.gram"]).all()


# Sources of a model in closed form


@pytest.mark.parametrize("prediction", [FLOW, "epsilon"])
def test_noise_and_data_of_a_source_are_those_of_the_model(prediction: str) -> None:
    levels = np.linspace(0.95, 0.02, 30)
    source, vectors, samples = recorded(levels, prediction)
    *_, data, noise = requests(levels, prediction != FLOW)
    np.testing.assert_allclose(source.levels, levels, rtol=1e-14)
    np.testing.assert_allclose(source.noise @ vectors, noise, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(source.data @ vectors, data, rtol=1e-10, atol=1e-12)
    again = source.alpha[:, None] * (source.data @ vectors) + source.sigma[:, None] * (source.noise @ vectors)
    np.testing.assert_allclose(again, samples, rtol=1e-10, atol=1e-12)
    made = source.noise - source.data if prediction == FLOW else source.noise
    np.testing.assert_allclose(made, np.eye(31)[1:], atol=1e-12)


def test_a_flow_starts_from_noise_alone() -> None:
    source, vectors, samples = recorded(np.linspace(1.0, 0.02, 30), FLOW)
    np.testing.assert_allclose(source.noise[0], np.eye(31)[0] * 1.0, atol=1e-14)  # alpha is 0, sigma is 1
    assert (samples[0] == vectors[0]).all() and not (source.data @ vectors)[0].any()


def test_one_form_gives_the_inner_products_of_all_others() -> None:
    for prediction in PREDICTIONS:
        for recorded_as in [FLOW, "epsilon"]:
            levels = np.linspace(0.95, 0.02, 30)
            source, _, _ = recorded(levels, recorded_as)
            alpha, sigma, _, data, noise = requests(levels, True)
            alpha, sigma = alpha[:, None], sigma[:, None]
            direct = {
                "epsilon": noise,
                "sample": data,
                "v_prediction": alpha * noise - sigma * data,
                FLOW: noise - data,
            }
            gram = direct[prediction] @ direct[prediction].T
            np.testing.assert_allclose(source.as_predicted(prediction, levels), of_trace(gram), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_other_levels_are_interpolated(prediction: str) -> None:
    levels = np.linspace(0.95, 0.02, 60)
    wanted = np.asarray(shifted(20, 1.5))[:-1] * 0.95
    brought = recorded(levels, FLOW)[0].as_predicted(prediction, wanted)
    direct = recorded(wanted, "epsilon")[0].as_predicted(prediction, wanted)
    np.testing.assert_allclose(np.trace(brought), 20.0)
    assert np.linalg.norm(brought - direct) < 0.1 * np.linalg.norm(direct)  # the error of 20 first-order steps


# Statistics


def test_the_statistics_are_the_mean_over_those_that_start_as_noisy() -> None:
    for start, names in ((1.0, FLOWS), (0.96, FLOWS), (0.94, FLOWS | NOISES), (0.5, FLOWS | NOISES)):
        levels = tuple(np.linspace(start, 0.0, 13))
        known = generic_statistics(FLOW, True, levels)
        used = [one for one in sources() if one.guided and one.name in names]
        expected = np.mean([one.as_predicted(FLOW, np.asarray(levels[:-1])) for one in used], 0)
        np.testing.assert_array_equal(known.grams["output"], expected)
        assert known.requests == 64 * len(names) and known.contexts == ("*",) and known.sigmas == levels


def test_leaving_models_out() -> None:
    levels = shifted(12)
    alone = generic_statistics("epsilon", False, levels, without=FLOWS | {"unet"})  # starts less noisy than level 1
    (pixart,) = (one for one in sources() if one.name == "pixart" and not one.guided)
    np.testing.assert_array_equal(alone.grams["output"], pixart.as_predicted("epsilon", np.asarray(levels[:-1])))
    assert alone.requests == 64
    assert generic_statistics(FLOW, False, levels, without=("wan",)).requests == 128
    with pytest.raises(ValueError, match="without="):
        generic_statistics(FLOW, False, levels, without={one.name for one in sources()})
    whole, without = (generic_plan(FLOW, False, 4, levels, without=names) for names in ((), FLOWS))
    assert whole.rows_of("*") != without.rows_of("*")


def test_the_impulse_response_is_the_flows_or_the_one_given() -> None:
    levels = shifted(12)
    assert (generic_statistics(FLOW, False, levels).impulse_response == flow_impulse_response(levels)).all()
    given = 0.9 * flow_impulse_response(levels)
    assert (generic_statistics(FLOW, False, levels, given).impulse_response == given).all()
    late = flow_impulse_response(levels) * np.r_[np.zeros(9), np.full(3, 50.0)]  # only the last steps count
    plans = [generic_plan(FLOW, True, 4, levels, response) for response in (None, late)]
    assert sum(plans[1].computed) > sum(plans[0].computed)


# Plans


def sums(plan: Plan) -> np.ndarray:
    return np.array([sum(row.weights) for row in plan.rows_of("*").values()])


def check(plan: Plan, budget: int, levels: tuple[float, ...]) -> None:
    """What holds of every generic plan."""
    T = len(levels) - 1
    assert plan.computed[0] == 0 and plan.budget == budget and plan.num_steps == T and plan.sigmas == levels
    assert (plan.site, set(plan.rows), plan.surrogate) == ("output", {"*"}, None)
    rows = plan.rows_of("*")
    assert set(rows) == set(range(T)) - set(plan.computed)
    for step, row in rows.items():
        assert set(row.steps) <= {q for q in plan.computed if q < step} and not row.bias
        assert all(map(math.isfinite, row.weights))


@pytest.mark.parametrize(("prediction", "guided"), [*product(PREDICTIONS, (False, True))])
def test_plans_of_every_budget(prediction: str, guided: bool) -> None:
    for T in (1, 2, 4, 8, 28, 50, 100):
        levels = shifted(T)
        budgets = range(1, T + 1) if T <= 8 else {1, T // 10, T // 4, T // 2, T - 1, T}
        for budget in budgets:
            plan = generic_plan(prediction, guided, budget, levels)
            check(plan, budget, levels)
            # Features shrink from step to step where steps are large: v and data of the first ones hold little.
            if budget < T:  # features differ in size from step to step, most where steps are large
                assert np.abs(sums(plan) - 1.0).max() < (0.2 if T >= 28 else 0.6)


def test_plans_of_any_levels() -> None:
    for levels in level_sets().values():
        for guided in [False, True]:
            for prediction in PREDICTIONS:
                check(generic_plan(prediction, guided, 6, levels), 6, levels)


def test_a_share_is_a_budget() -> None:
    assert generic_plan(FLOW, False, 0.25, shifted(28)).budget == 7
    assert generic_plan(FLOW, False, 40, shifted(28)).budget == 28


def test_guidance_and_the_prediction_make_other_plans() -> None:
    levels = shifted(28)
    plans = [generic_plan(*kind, 8, levels) for kind in product(PREDICTIONS, (False, True))]
    assert len({tuple(plan.rows_of("*").items()) for plan in plans}) == 8


def test_rows_of_few_steps_are_means_of_closed_forms() -> None:
    for guided, budget, names in [
        (False, 2, ("reuse",)),
        (True, 3, ("reuse",)),
        (True, 4, ("reuse", "regression")),
        (True, 6, ("regression",)),
        (True, 9, ("regression", "taylor-1")),
        (True, 12, ("taylor-1",)),
    ]:
        known = generic_statistics("epsilon", guided, shifted(50))
        plan = generic_plan("epsilon", guided, budget, shifted(50))
        mean = np.mean([closed_form(known, plan.computed, name)[0] for name in names], 0)
        for step, row in plan.rows_of("*").items():
            np.testing.assert_allclose(row.weights, mean[step, list(row.steps)], atol=1e-9)


def test_what_is_no_budget_is_refused() -> None:
    for budget in [0, -1, 0.0, 1.5, "4", True, None, math.nan]:
        with pytest.raises(ValueError, match="budget="):
            generic_plan(FLOW, False, budget, shifted(12))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [generic_statistics, lambda *known: generic_plan(*known[:2], 4, known[2])])
def test_an_unknown_prediction_is_refused(make: object) -> None:
    with pytest.raises(ValueError, match="prediction='velocity'"):
        make("velocity", False, shifted(12))  # type: ignore[operator]
