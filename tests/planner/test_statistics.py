"""Statistics: inner products of features, what guidance makes of them, at other noise levels, on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lesa.planner.statistics import (
    GUIDED,
    Statistics,
    StatisticsError,
    apart_from_flow,
    flow_impulse_response,
    guidance_of,
    interpolation,
    learned,
)


def levels(steps: int, shift: float = 3.0) -> np.ndarray:
    even = np.arange(steps, 0, -1) / steps
    return np.append(shift * even / (1 + (shift - 1) * even), 0.0)


def features(sigmas: np.ndarray, seed: int, count: int = 5, size: int = 400) -> np.ndarray:
    """F_t = sum_p a_p(sigma_t) U_p, smooth in sigma, [T, size]."""
    directions = np.random.default_rng(seed).normal(size=(count, size))
    s = np.asarray(sigmas)[:-1]
    return np.stack([np.ones_like(s), s, np.sin(3 * s), np.exp(-4 * s), 1 / (0.2 + s)], 1)[:, :count] @ directions


def statistics(parts: dict[str, np.ndarray], sigmas: np.ndarray, **more: Any) -> Statistics:
    """Statistics at the output site from features [T, size] of each context."""
    stacked = np.concatenate(list(parts.values()))
    values: dict[str, Any] = {
        "sigmas": sigmas,
        "timesteps": 1000 * np.asarray(sigmas)[:-1],
        "contexts": tuple(parts),
        "guidance": (1.0,) if len(parts) == 1 else (3.0, -2.0),
        "grams": {"output": stacked @ stacked.T / stacked.shape[1]},
        "impulse_response": flow_impulse_response(sigmas),
        "requests": 2,
    }
    return Statistics(**{**values, **more})


def differences(gram: np.ndarray) -> np.ndarray:
    """||F_i - F_j||^2."""
    own = np.diag(gram)
    return own[:, None] + own - 2 * gram


def test_flow_response_by_hand() -> None:
    impulse_response = flow_impulse_response((1.0, 0.75, 0.25, 0.0))
    assert impulse_response.tolist() == [[0, 0, 0], [-0.25, 0, 0], [-0.25, -0.5, 0], [-0.25, -0.5, -0.25]]


def test_grams_of_contexts_and_of_what_guidance_makes_of_them(seed: int) -> None:
    sigmas = levels(6)
    parts = {"cond": features(sigmas, seed), "uncond": features(sigmas, seed + 1)}
    ours = statistics(parts, sigmas, guidance=(2.5, -1.5))
    size = parts["cond"].shape[1]
    for name, own in parts.items():
        np.testing.assert_allclose(ours.gram("output", name), own @ own.T / size, rtol=1e-12)
    guided = 2.5 * parts["cond"] - 1.5 * parts["uncond"]
    np.testing.assert_allclose(ours.gram("output", GUIDED), guided @ guided.T / size, rtol=1e-9)
    other = replace(ours, guidance=(7.0, -6.0))
    guided = 7 * parts["cond"] - 6 * parts["uncond"]
    np.testing.assert_allclose(other.gram("output", GUIDED), guided @ guided.T / size, rtol=1e-9)


def test_a_gram_may_be_changed_without_changing_the_statistics(seed: int) -> None:
    ours = statistics({"cond": features(levels(4), seed)}, levels(4))
    ours.gram("output", "cond")[:] = 0
    assert ours.gram("output", "cond").any() and ours.gram("output", GUIDED).any()


def test_at_its_own_sigmas_nothing_changes(seed: int) -> None:
    sigmas = levels(20)
    ours = statistics({"cond": features(sigmas, seed), "uncond": features(sigmas, seed + 1)}, sigmas)
    same = ours.at(sigmas)
    np.testing.assert_allclose(same.grams["output"], ours.grams["output"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(same.timesteps, ours.timesteps)
    np.testing.assert_array_equal(same.impulse_response, ours.impulse_response)


@pytest.mark.parametrize(("steps", "shift"), [(28, 3.0), (50, 1.5), (100, 3.0)])
def test_another_step_count_or_shift(steps: int, shift: float, seed: int) -> None:
    sigmas, wanted = levels(50), levels(steps, shift)
    both = {"cond": seed, "uncond": seed + 1}
    ours = statistics({name: features(sigmas, own) for name, own in both.items()}, sigmas).at(wanted)
    true = statistics({name: features(wanted, own) for name, own in both.items()}, wanted)
    assert ours.num_steps == steps and ours.sigmas == tuple(wanted)
    inside = np.flatnonzero(wanted[:-1] >= sigmas[-2] - 1e-9)  # the others are beyond what was gathered
    assert len(inside) >= steps - 2
    apart = ~np.eye(len(inside), dtype=bool)
    for context in ("cond", "uncond", GUIDED):
        have, want = (differences(s.gram("output", context)[np.ix_(inside, inside)]) for s in (ours, true))
        error = np.abs(have - want)[apart] / want[apart]
        # They change fastest, as a model's do, near sigma = 0: the last step is the worst.
        assert np.max(error) < 0.05 and np.quantile(error, 0.9) < 0.005
        gram = ours.gram("output", context)
        assert np.linalg.eigvalsh(gram).min() > -1e-12 * np.trace(gram)
    np.testing.assert_allclose(np.array(ours.timesteps)[inside], 1000 * wanted[:-1][inside], rtol=1e-9)
    np.testing.assert_array_equal(ours.impulse_response, flow_impulse_response(wanted))


def test_at_takes_the_response_and_the_timesteps_it_is_given(seed: int) -> None:
    ours = statistics({"cond": features(levels(9), seed)}, levels(9))
    impulse_response = np.tril(np.random.default_rng(seed).normal(size=(6, 5)), -1)
    there = ours.at(levels(5), impulse_response, (5.0, 4.0, 3.0, 2.0, 1.0))
    np.testing.assert_array_equal(there.impulse_response, impulse_response)
    assert there.timesteps == (5, 4, 3, 2, 1) and there.requests == ours.requests


def test_interpolation_by_hand() -> None:
    known = (1.0, 0.5, 0.25)
    # Three points: the parabola through them, here by Lagrange's formula.
    np.testing.assert_allclose(interpolation(known, (0.75, 0.5)), [[1 / 3, 1, -1 / 3], [0, 1, 0]], atol=1e-12)
    # Two points: straight, for half a step beyond.
    np.testing.assert_allclose(interpolation(known[:2], (1.0, 0.6, 0.1)), [[1, 0], [0.2, 0.8], [-0.5, 1.5]], atol=1e-12)
    np.testing.assert_allclose(interpolation((0.4,), (0.9, 0.4, 0.1)), [[1], [1], [1]])


def test_interpolation_below_what_is_known_by_hand() -> None:
    # The parabola in the root, here 1, 1/2 and 1/4 at the nodes, 1/5 and 0 at what is wanted.
    rows = interpolation((1.0, 0.25, 0.0625), (0.04, 0.0))
    np.testing.assert_allclose(rows, [[0.04, -0.32, 1.28], [1 / 3, -2, 8 / 3]], atol=1e-12)
    # For half of the outermost step, 0.125 here; then no further.
    rows = interpolation((1.0, 0.5, 0.25), (0.125, 0.01))
    np.testing.assert_array_equal(rows[0], rows[1])
    roots = np.sqrt([1.0, 0.5, 0.25])
    for power in range(3):
        np.testing.assert_allclose(rows[0] @ roots**power, 0.125 ** (power / 2), rtol=1e-12)
    # What goes on as the logarithm does, as features do near the end, is met better than by a straight line.
    known, wanted = np.array([0.1, 0.08, 0.06, 0.04, 0.02]), 0.01
    linear = np.log(0.02) + (np.log(0.02) - np.log(0.04)) / 2
    found = (interpolation(known, [wanted]) @ np.log(known))[0]
    assert abs(found - np.log(wanted)) < 0.5 * abs(linear - np.log(wanted))


def test_levels_below_are_learned_where_features_look_alike_at_every_scale(seed: int) -> None:
    """Of three powers of the level, every value is the same sum of those at three fixed multiples of the level."""
    known, wanted = [0.8, 0.4, 0.2, 0.1, 0.05], [0.3, 0.05, 0.025]
    random = np.random.default_rng(seed)
    parts = random.normal(size=(3, 20))

    def at(levels: list[float]) -> np.ndarray:
        return np.asarray(levels)[:, None] ** [0.0, 0.3, 1.7] @ parts

    weights, gram = interpolation(known, wanted), at(known) @ at(known).T
    rows = learned(weights, known, wanted, gram)
    np.testing.assert_array_equal(rows[:2], weights[:2])
    off = np.abs(rows @ at(known) - at(wanted))[2].max(), np.abs(weights @ at(known) - at(wanted))[2].max()
    assert off[0] < 0.03 * off[1]
    # Not where that would read levels above those known: 0.05 * 0.2 / 0.025 is 0.4.
    np.testing.assert_array_equal(learned(weights[:, 2:], known[2:], wanted, gram[2:, 2:]), weights[:, 2:])


def test_interpolation_is_exact_for_parabolas(seed: int) -> None:
    known = np.sort(np.random.default_rng(seed).uniform(size=12))[::-1]
    inside = np.linspace(known[-1], known[0], 30)
    values = 3 * known**2 - known + 0.5
    np.testing.assert_allclose(interpolation(known, inside) @ values, 3 * inside**2 - inside + 0.5, rtol=1e-9)


def test_levels_that_come_twice_have_a_curve_for_each_time() -> None:
    known, wanted = (1.0, 0.6, 0.6, 0.2, 0.2), (1.0, 0.6, 0.6, 0.2)
    rows = interpolation(known, wanted)
    np.testing.assert_allclose(rows, np.eye(5)[[0, 1, 2, 3]], atol=1e-12)
    np.testing.assert_allclose(interpolation(wanted, known)[-1], [0, 0, 0, 1], atol=1e-12)


def test_saved_and_loaded_they_are_the_same(tmp_path: Path, seed: int) -> None:
    sigmas = levels(7)
    ours = statistics(
        {"cond": features(sigmas, seed), "uncond": features(sigmas, seed + 1)},
        sigmas,
        scheduler="S",
        denoiser="D",
        config_hash="abc",
        request={"num_inference_steps": 7, "true_cfg_scale": 3.0},
    )
    ours = replace(ours, grams={**ours.grams, "hidden": 2 * ours.grams["output"]})
    path = ours.save(tmp_path / "deep" / "statistics.safetensors")
    again = Statistics.load(path)
    assert set(again.grams) == {"hidden", "output"}
    for site, gram in ours.grams.items():
        np.testing.assert_array_equal(again.grams[site], np.triu(gram) + np.triu(gram, 1).T)
    np.testing.assert_array_equal(again.impulse_response, ours.impulse_response)
    plain = {"grams": {}, "impulse_response": None}
    assert {**vars(again), **plain} == {**vars(ours), **plain}


def test_files_that_hold_no_statistics(tmp_path: Path, seed: int) -> None:
    with pytest.raises(StatisticsError, match="does not exist"):
        Statistics.load(tmp_path / "none")
    path = tmp_path / "file"
    path.write_bytes(b"nonsense")
    with pytest.raises(StatisticsError, match="cannot be read"):
        Statistics.load(path)
    save_file({"a": np.zeros(2)}, path)
    with pytest.raises(StatisticsError, match="statistics"):
        Statistics.load(path)
    whole = statistics({"cond": features(levels(5), seed)}, levels(5)).save(path).read_bytes()
    for wrong in (whole[: len(whole) // 2], whole[:-8]):
        path.write_bytes(wrong)
        with pytest.raises(StatisticsError, match="cannot be read"):
            Statistics.load(path)
    path.write_bytes(whole.replace(b"timesteps", b"timestepz"))
    with pytest.raises(StatisticsError, match="cannot be read"):
        Statistics.load(path)


def test_values_out_of_place_are_named(seed: int) -> None:
    for change, message in [
        ({"sigmas": (1.0, 0.0)}, "2 sigmas and 5 timesteps"),
        ({"sigmas": (1.0, 0.9, float("nan"), 0.4, 0.2, 0.0)}, "finite"),
        ({"guidance": (3.0, -2.0)}, "guidance"),
        ({"requests": 0}, "requests=0"),
        ({"grams": {"blocks": np.eye(5)}}, "sites"),
        ({"grams": {"output": np.eye(4)}}, "shape"),
        ({"grams": {"output": np.tri(5)}}, "symmetric"),
        ({"impulse_response": np.zeros((5, 5))}, "impulse_response"),
    ]:
        ours = statistics({"cond": features(levels(5), seed)}, levels(5))
        with pytest.raises(StatisticsError, match=message):
            replace(ours, **change)


def sampled(weights: np.ndarray, sigmas: np.ndarray, seed: int, keep: float = 1.0, noise: float = 0.0) -> np.ndarray:
    """Inner products of x', x and the outputs [K, ...] at the steps x' = keep x + (sigma' - sigma) w v + noise."""
    random, K = np.random.default_rng(seed), len(weights)
    x, products = random.normal(size=4000), []
    base, own = random.normal(size=4000), random.normal(size=(K, 4000))
    for step in np.diff(sigmas)[:-1]:
        v = base + 0.3 * own + 0.2 * np.sin(x + np.arange(K)[:, None])
        after = keep * x + step * weights @ v + noise * random.normal(size=4000)
        rows = np.stack([after, x, *v])
        products.append(rows @ rows.T / 4000)
        x = after
    return np.stack(products)


def test_weights_of_guidance_are_found(seed: int) -> None:
    for weights in [(3.0, -2.0), (0.0, 1.0), (1.0, 2.5, -2.5), (1.0,)]:
        for keep in [1.0, 0.9]:
            found = guidance_of(sampled(np.array(weights), levels(10), seed, keep))
            assert found is not None and found[1] < 1e-5
            np.testing.assert_allclose(found[0], weights, atol=1e-6)


def test_noise_leaves_a_share_unexplained(seed: int) -> None:
    found = guidance_of(sampled(np.array([3.0, -2.0]), levels(30), seed, noise=0.1))
    assert found is not None and found[1] > 0.3
    np.testing.assert_allclose(found[0], [3.0, -2.0], rtol=0.3)


def test_equal_outputs_and_a_sample_that_stays_tell_no_weights(seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(3, 50))
    for these in ((rows[0], rows[1], rows[2], rows[2]), (rows[0], rows[0], rows[1], rows[2])):
        assert guidance_of((np.stack(these) @ np.stack(these).T)[None]) is None


def test_what_is_apart_from_a_flow(seed: int) -> None:
    weights, sigmas = np.array([3.0, -2.0]), levels(10)
    assert apart_from_flow(sampled(weights, sigmas, seed), weights, sigmas) < 1e-6
    assert apart_from_flow(sampled(weights, sigmas, seed), weights / 2, sigmas) < 1e-6  # rescaled afterwards
    assert apart_from_flow(sampled(weights, sigmas, seed, keep=0.8), weights, sigmas) > 0.3
    even = np.linspace(1, 0, 11)
    assert apart_from_flow(sampled(weights, even**4, seed), weights, even) > 0.3  # other noise levels


def test_unknown_sites_contexts_and_sigmas_are_named(seed: int) -> None:
    ours = statistics({"cond": features(levels(5), seed)}, levels(5))
    with pytest.raises(StatisticsError, match="hidden"):
        ours.gram("hidden", "cond")
    with pytest.raises(StatisticsError, match="uncond"):
        ours.gram("output", "uncond")
    for wrong in ((), (1.0,), (1.0, float("nan"), 0.0)):
        with pytest.raises(StatisticsError, match="sigmas"):
            ours.at(wrong)
