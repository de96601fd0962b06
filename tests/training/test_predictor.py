"""The learned forecaster: its size, its formulas, its table, its file."""

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from lesa.ops.reference import bspline_grid, forecast, kan_layer
from lesa.plans.rows import MAX_READS
from lesa.plans.schedule import ONE_STAGE, PAPER_STAGES, Stage, paper, paper_stages, stage_of
from lesa.training.experts import Expert, Kan, Mlp
from lesa.training.predictor import Predictor

STAGES = {"one": ONE_STAGE, "three": PAPER_STAGES, "qwen": paper_stages(0.9, 0.4)}


def levels(num_steps: int, shift: float = 3.0) -> tuple[float, ...]:
    unshifted = [1 - i / num_steps for i in range(num_steps + 1)]
    return tuple(shift * s / (1 + (shift - 1) * s) for s in unshifted)


def trained(num_steps: int, seed: int = 0, **config) -> Predictor:
    """A float64 predictor moved away from its initial values in every parameter."""
    predictor = Predictor(num_steps, **{"width": 16, "seed": seed, **config}).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in predictor.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter += 0.1 * noise
    return predictor


def test_one_stage_at_fifty_steps_has_the_published_size():
    predictor = Predictor(50)
    for expert, stage in zip(predictor.experts, PAPER_STAGES, strict=True):
        assert sum(p.numel() for p in expert.net.parameters()) == 788_480
        assert sum(p.numel() for p in expert.projection.parameters()) == stage.window + 1


def test_kan_is_its_layers_in_turn():
    net = Kan([7, 5, 4], generator=torch.Generator().manual_seed(0)).double()
    x = torch.linspace(-1, 1, 14, dtype=torch.float64).reshape(2, 7)
    y = x
    for layer in net.layers:
        y = kan_layer(y, *layer.parts, bspline_grid(5, 3, (-3, 3)), 3)
    assert net(x).shape == (2,)
    torch.testing.assert_close(net(x), y[:, 0], rtol=1e-12, atol=1e-12)


def test_mlp_is_linear_silu_linear():
    net = Mlp([7, 5], constant=0.5, generator=torch.Generator().manual_seed(0)).double()
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    first, last = net.layers
    hidden = first.weight @ x + first.bias
    expected = (last.weight @ (hidden * torch.sigmoid(hidden)) + last.bias)[0]
    torch.testing.assert_close(net(x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("net", [Kan, Mlp])
def test_alpha_gradients(net):
    net = net([4, 3, 3], generator=torch.Generator().manual_seed(0)).double()
    x = torch.linspace(-0.9, 0.8, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in net.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *net.parameters()))


@pytest.mark.parametrize(("alpha", "constant", "num_steps"), [("kan", -0.5, 50), ("mlp", 1.0, 4)])
def test_alpha_starts_near_its_constant(alpha, constant, num_steps):
    predictor = Predictor(num_steps, ONE_STAGE, alpha=alpha, alpha_init=constant)
    assert (predictor.alphas(levels(num_steps)) - constant).abs().max() < 0.2


def test_hidden_values_of_the_kan_fill_the_grid_and_move_with_the_step():
    predictor, sigmas = Predictor(50, ONE_STAGE), levels(50)
    net = predictor.experts[0].net

    def hidden(step):
        return net.layers[1](net.layers[0](predictor.offsets(step, sigmas)))

    values = torch.stack([hidden(step) for step in range(50)]).detach()
    assert 1.0 < values.std() < 3.0
    assert values.std(0).mean() > 0.3


def test_projection_starts_as_a_difference():
    for init, expected in (("difference", [0, 0, 0, -1, 1]), ("span", [-0.25, 0, 0, 0, 0.25])):
        expert = Expert(5, Mlp([3, 4]), init)
        assert expert.weights.tolist() == expected
        assert expert.projection.bias.tolist() == [0.0]


def test_uniform_projection_is_torchs_default():
    expert = Expert(4, Mlp([3, 4]), "uniform", torch.Generator().manual_seed(5))
    values = torch.cat([expert.weights, expert.projection.bias])
    assert values.abs().max() <= 0.5 and values.unique().numel() == 5
    Expert(1, Mlp([3, 4]), "uniform")


def test_untrained_predictor_extrapolates_linearly():
    line = torch.arange(50.0)[:, None] * torch.tensor([1.0, -2.0, 0.5])
    for init in ("difference", "span"):
        predictor = Predictor(50, alpha="mlp", projection_init=init)
        for expert in predictor.experts:
            expert.net.layers[-1].weight.data.zero_()
        for step in (8, 20, 49):
            torch.testing.assert_close(predictor(line[:step], step, levels(50)), line[step])


def test_expert_is_equations_four_to_seven():
    predictor = trained(8, stages=ONE_STAGE)
    sigmas, step = levels(8), 8 - 1
    history = torch.randn(8, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dt = torch.tensor([sigmas[step] - sigma for sigma in sigmas], dtype=torch.float64)
    expert = predictor.expert(sigmas[step])
    torch.testing.assert_close(predictor.offsets(step, sigmas), dt, rtol=0, atol=0)
    weight, bias = expert.weights.tolist(), expert.projection.bias.item()
    z = sum(w * f for w, f in zip(weight, history, strict=True)) + bias
    expected = history[-1] + expert.net(dt) * z
    torch.testing.assert_close(expert(history, dt), expected, rtol=1e-13, atol=1e-13)


def test_each_step_goes_to_the_expert_of_its_noise_level():
    for stages in STAGES.values():
        predictor = Predictor(28, stages, width=8)
        for sigma in levels(28)[:-1]:
            assert predictor.expert(sigma) is predictor.experts[stage_of(sigma, stages)]


def test_short_history_repeats_the_oldest():
    predictor = trained(8, stages=ONE_STAGE)
    features = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([features[:1].expand(5, 5), features])
    expected = predictor.experts[0](padded, predictor.offsets(3, levels(8)))
    torch.testing.assert_close(predictor(list(features), 3, levels(8)), expected, rtol=0, atol=0)
    torch.testing.assert_close(predictor(features, 3, levels(8)), expected, rtol=0, atol=0)


def test_only_the_window_is_read():
    predictor = trained(20)
    features = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    window = predictor.expert(levels(20)[12]).window
    assert window < 12
    torch.testing.assert_close(
        predictor(features, 12, levels(20)), predictor(features[-window:], 12, levels(20)), rtol=0, atol=0
    )


def test_forecast_takes_the_wider_dtype():
    predictor = Predictor(8, width=8)
    for features, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert predictor(torch.ones(3, 2, dtype=features), 3, levels(8)).dtype == expected


@pytest.mark.parametrize(
    ("alpha", "stages", "num_steps", "interval"),
    [("kan", "one", 4, 3), ("kan", "qwen", 8, 2), ("kan", "three", 50, 10), ("mlp", "three", 28, 5)],
)
def test_plan_in_closed_loop_is_the_live_predictor(alpha, stages, num_steps, interval):
    predictor = trained(num_steps, stages=STAGES[stages], alpha=alpha, seed=num_steps + interval)
    sigmas, computed = levels(num_steps), paper(num_steps, interval)
    plan = predictor.to_plan(computed, sigmas)
    rows = plan.rows_of("cond")
    truth = torch.randn(num_steps, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    live: list[torch.Tensor] = []
    table: list[torch.Tensor] = []
    with torch.no_grad():
        for step in range(num_steps):
            if step in computed:
                live.append(truth[step])
                table.append(truth[step])
                continue
            row = rows[step]
            live.append(predictor(live, step, sigmas))
            table.append(forecast(torch.stack([table[s] for s in row.steps]), row.weights, row.bias))
    size = torch.stack(live).flatten(1).abs().amax(1).cummax(0).values.view(-1, 1, 1)
    assert size.isfinite().all()
    difference = (torch.stack(live) - torch.stack(table)).abs() / size
    assert difference.max() < 1e-12
    assert (torch.stack(live)[[s for s in range(num_steps) if s not in computed]] != 0).all()


def test_plan_rows_read_the_window_and_fold_repeats():
    predictor = trained(20, stages=ONE_STAGE)
    plan = predictor.to_plan((0, 1, 5), levels(20))
    rows = plan.rows_of("any")
    assert rows[2].steps == (0, 1) and rows[4].steps == (0, 1, 2, 3)
    assert rows[19].steps == tuple(range(11, 19))
    alpha = predictor.alphas(levels(20))[2].item()
    *oldest, newest = predictor.experts[0].weights.tolist()
    assert rows[2].weights == pytest.approx((alpha * sum(oldest), 1 + alpha * newest), rel=1e-12)
    assert rows[2].bias == pytest.approx(alpha * predictor.experts[0].projection.bias.item(), rel=1e-15)


def test_plan_of_a_float32_predictor_is_evaluated_in_float64():
    predictor = trained(8).float()
    before = {name: value.clone() for name, value in predictor.state_dict().items()}
    assert predictor.to_plan((0, 4), levels(8)) == predictor.double().to_plan((0, 4), levels(8))
    assert all(torch.equal(before[name], value) for name, value in predictor.float().state_dict().items())


def test_plan_carries_alphas_and_provenance():
    predictor = trained(8)
    plan = predictor.to_plan((0, 4), levels(8), site="output", denoiser="Tiny", training={"prompts": 3})
    assert (plan.forecaster, plan.site, plan.denoiser) == ("lesa", "output", "Tiny")
    assert plan.stages == PAPER_STAGES and plan.training["prompts"] == 3
    alphas = plan.training["alphas"]["*"]
    assert [alpha is None for alpha in alphas] == [step in (0, 4) for step in range(8)]
    assert alphas[5] == pytest.approx(predictor.alphas(levels(8))[5].item(), rel=1e-12)


def test_same_seed_same_parameters_and_global_generator_untouched():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, second, other = Predictor(8, width=8), Predictor(8, width=8), Predictor(8, width=8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = list(zip(first.experts[0].net.parameters(), other.experts[0].net.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("alpha", "order"), [("kan", 2), ("mlp", 3)])
def test_the_table_of_alphas_is_every_step_by_itself(alpha, order):
    predictor, sigmas = trained(12, alpha=alpha, width=16, order=order).double(), levels(12)
    expected = torch.stack([predictor.expert(sigmas[t]).net(predictor.offsets(t, sigmas)) for t in range(12)])
    torch.testing.assert_close(predictor.alphas(sigmas), expected, rtol=1e-12, atol=1e-12)


def test_training_parts_the_steps():
    """Two steps of one stage that want different alphas get them."""
    predictor, sigmas = Predictor(12, ONE_STAGE, width=32, projection_init="difference", alpha_init=1.0), levels(12)
    wanted = {8: 0.7, 9: 1.3}
    optimizer = torch.optim.AdamW(predictor.experts[0].net.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _, (step, alpha) in itertools.product(range(150), wanted.items()):
        history = torch.randn(8, 64, generator=generator)
        target = history[-1] + alpha * (history[-1] - history[-2])
        optimizer.zero_grad()
        (predictor(history, step, sigmas) - target).pow(2).mean().backward()
        optimizer.step()
    for step, alpha in wanted.items():
        assert predictor.alphas(sigmas)[step].item() == pytest.approx(alpha, abs=0.1)


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.float64, "kan"), (torch.bfloat16, "mlp")])
def test_file_round_trip_is_exact(tmp_path, dtype, alpha):
    predictor = trained(8, alpha=alpha, stages=STAGES["qwen"], grid=4, order=2).to(dtype)
    loaded = Predictor.load(predictor.save(tmp_path / "new" / "predictor.safetensors"))
    assert loaded.config == predictor.config
    assert json.loads(json.dumps(loaded.config)) == loaded.config
    expected = predictor.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert value.dtype == dtype and torch.equal(value, expected[name])
    assert loaded.to_plan((0, 4), levels(8)) == predictor.to_plan((0, 4), levels(8))


def test_files_of_other_kinds_are_refused(tmp_path):
    path = trained(4).to_plan((0,), levels(4)).save(tmp_path / "plan.safetensors")
    with pytest.raises(ValueError, match="holds no predictor"):
        Predictor.load(path)


def test_files_that_do_not_match_their_config_are_refused(tmp_path):
    path, predictor = tmp_path / "predictor.safetensors", Predictor(4, width=4)
    for config in (None, {}, {**predictor.config, "unknown": 1}, Predictor(5, width=4).config):
        description = json.dumps({"format": "lesa-predictor-1", "config": config})
        save_file(predictor.state_dict(), path, {"lesa": description})
        with pytest.raises(ValueError, match="incomplete"):
            Predictor.load(path)


def test_a_file_of_version_1_loads(tmp_path):
    """What was written before predictors were a `SafetensorsFile`: the parameters, and a description as metadata."""
    predictor, path = trained(4, width=4), tmp_path / "old.safetensors"
    description = json.dumps({"format": "lesa-predictor-1", "config": predictor.config})
    save_file(predictor.state_dict(), path, {"lesa": description})
    assert Predictor.load(path).to_plan((0,), levels(4)) == predictor.to_plan((0,), levels(4))
    assert predictor.save_pretrained(tmp_path).read_bytes() == path.read_bytes()
    assert Predictor.from_pretrained(tmp_path).config == predictor.config


def test_bad_configurations_are_named():
    for config, named in (
        ({"num_steps": 0}, "num_steps=0"),
        ({"alpha": "cnn"}, "alpha='cnn'"),
        ({"width": 0}, "width=0"),
        ({"depth": 0}, "depth=0"),
        ({"grid": 0}, "grid=0"),
        ({"order": 0}, "order=0"),
        ({"grid_range": (1.0, 1.0)}, r"grid_range=\(1.0, 1.0\)"),
        ({"alpha_init": float("nan")}, "alpha_init=nan"),
        ({"projection_init": "zero"}, "projection_init='zero'"),
        ({"stages": ()}, "stages is empty"),
        ({"stages": (Stage("all", 0.0, 1),)}, "window=1"),
        ({"stages": (Stage("all", 0.0, MAX_READS + 1),)}, "window=17"),
    ):
        with pytest.raises(ValueError, match=named):
            Predictor(**{"num_steps": 4, "width": 4, **config})


def test_requests_that_do_not_fit_are_named():
    predictor = Predictor(8, width=4)
    with pytest.raises(ValueError, match="sigmas has 29 entries"):
        predictor.to_plan((0,), levels(28))
    with pytest.raises(ValueError, match="step=8"):
        predictor.offsets(8, levels(8))
    with pytest.raises(ValueError, match="expected step 0 first"):
        predictor.to_plan((1,), levels(8))
    with pytest.raises(ValueError, match="history holds 0 features at step 1"):
        predictor([], 1, levels(8))
    with pytest.raises(ValueError, match="history holds 2 features at step 7"):
        predictor(torch.zeros(2, 3), 7, levels(8))
