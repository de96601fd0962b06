"""The live predictor's kernels against the formulas in float64."""

import pytest
import torch
from interpret import DEVICE, DTYPES, assert_close, poisoned

from lesa.kernels.loss import LossConfig, launch_predict_loss
from lesa.kernels.predict import PredictConfig, launch_predict_fwd
from lesa.ops.reference import bspline_grid, kan_layer

LOW, HIGH = -3.0, 3.0
SMALL = LossConfig(lanes=32, programs=3)


@pytest.fixture(autouse=True)
def poison():
    """What a kernel leaves unwritten is NaN."""
    with poisoned():
        yield


def random_row(seed, shape, window, dtype, unused=0):
    """A ring with NaN in every slot that is not read, and a row whose first entries are unused."""
    generator = torch.Generator().manual_seed(seed)
    history = torch.full((window + 3, *shape), float("nan"))
    slots = torch.randperm(window + 3, generator=generator)[:window].to(torch.int32)
    slots[:unused] = -1
    for slot in slots[unused:]:
        history[slot] = torch.randn(shape, generator=generator)
    weights = torch.randn(window, generator=generator)
    weights[:unused] = float("nan")
    bias, alpha = torch.randn(1, generator=generator), torch.randn((), generator=generator)
    target = torch.randn(shape, generator=generator)
    return [part.to(DEVICE) for part in (history.to(dtype), slots, weights, bias, alpha, target.to(dtype))]


def random_net(seed, widths=(7, 12, 5), bases=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    params = []
    for inputs, outputs in zip(widths, (*widths[1:], 1), strict=True):
        shapes = ((outputs, inputs), (outputs, inputs, bases), (outputs, inputs))
        base, spline, scale = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
        params += [base / inputs**0.5, spline / inputs**0.5, scale]
    return torch.rand(widths[0], generator=generator).to(DEVICE) * 2 - 1, params


def used(history, slots, weights, dtype):
    read = slots >= 0
    return history[slots[read].long()].to(dtype), weights[read].to(dtype)


def close(result, want, usual):
    assert_close(result, usual.to(result.dtype), want)


def check_predict(results, history, slots, weights, bias, dt, params):
    """The KAN's values together, since alpha alone may cancel; the forecast with the alpha that was returned."""
    forecast, alpha, *hidden = results
    values, forecasts = [], []
    for dtype in (torch.float64, torch.float32):
        grid = bspline_grid(params[1].shape[2] - 3, 3, (LOW, HIGH), dtype).to(DEVICE)
        layers = [dt.to(dtype)]
        for i in range(0, 9, 3):
            layers.append(kan_layer(layers[-1], *(part.to(dtype) for part in params[i : i + 3]), grid, 3))
        values.append(torch.cat(layers[1:]))
        features, chosen = used(history, slots, weights, dtype)
        z = torch.tensordot(chosen, features, 1) + bias[0].to(dtype)
        forecasts.append(features[-1] + alpha.to(dtype) * z)
    close(torch.cat([*hidden, alpha.reshape(1)]), *values)
    if forecast.numel():
        close(forecast, *forecasts)


def check_loss(results, history, slots, weights, bias, alpha, target, l2):
    """The forecast; the loss and all gradients together, since the sums of one may cancel."""
    forecasts, numbers = [], []
    for dtype in (torch.float64, torch.float32):
        features, chosen = used(history, slots, weights, dtype)
        leaves = [part.to(dtype).requires_grad_() for part in (chosen, bias, alpha)]
        forecast = features[-1] + leaves[2] * (torch.tensordot(leaves[0], features, 1) + leaves[1][0])
        error = forecast - target.to(dtype)
        loss = (error**2 if l2 else error.abs()).mean()
        d_weights, *rest = torch.autograd.grad(loss, leaves)
        row = torch.zeros(len(slots), dtype=dtype, device=DEVICE)
        row[slots >= 0] = d_weights
        forecasts.append(forecast.detach())
        numbers.append(torch.cat([part.detach().reshape(-1) for part in (loss, row, *rest)]))
    loss, forecast, grads = results
    close(torch.cat([loss.reshape(1), grads]), *numbers)
    close(forecast, *forecasts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "unused", "shape"),
    [(1, 0, (5, 7)), (3, 1, (2, 3, 51)), (4, 0, (1000,)), (8, 0, (3, 999)), (11, 4, ()), (16, 0, (4096,))],
)
def test_predict(window, unused, shape, dtype, seed):
    history, slots, weights, bias, _, _ = random_row(seed, shape, window, dtype, unused)
    dt, params = random_net(seed)
    row = (history, slots, weights, bias, dt, params)
    results = launch_predict_fwd(*row, LOW, HIGH)
    assert [result.dtype for result in results] == [dtype] + [torch.float32] * 3
    check_predict(results, *row)


@pytest.mark.parametrize("config", [PredictConfig(64, 2, 4), PredictConfig(256, 8, 32), PredictConfig(4096, 4, 16)])
@pytest.mark.parametrize(("widths", "bases"), [((1, 5, 1), 4), ((13, 17, 3), 11)])
def test_predict_however_cut(config, widths, bases, seed):
    history, slots, weights, bias, _, _ = random_row(seed, (177,), 5, torch.float32)
    row = (history, slots, weights, bias, *random_net(seed, widths, bases, DTYPES[1]))
    check_predict(launch_predict_fwd(*row, LOW, HIGH, config), *row)


def test_predict_without_elements_has_its_alpha(seed):
    history, slots, weights, bias, _, _ = random_row(seed, (0, 4), 2, torch.float32)
    row = (history, slots, weights, bias, *random_net(seed))
    results = launch_predict_fwd(*row, LOW, HIGH)
    assert results[0].shape == (0, 4)
    check_predict(results, *row)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "l2"), [(1, False), (3, True), (8, False), (16, True)])
def test_loss(window, l2, dtype, seed):
    unused = window // 3
    row = (*random_row(seed, (3, 5, 31), window, dtype, unused), l2)
    loss, forecast, grads = launch_predict_loss(*row, True)
    assert (loss.dtype, forecast.dtype, grads.dtype) == (torch.float32, dtype, torch.float32)
    check_loss((loss, forecast, grads), *row)
    assert (grads[:unused] == 0).all()
    again, none, same = launch_predict_loss(*row, False)
    assert none.shape == (0,) and none.dtype == dtype
    assert torch.equal(again, loss) and torch.equal(same, grads)


@pytest.mark.parametrize(("shape", "l2"), [((), True), ((1,), False), ((257,), True), ((2, 3, 201), False)])
def test_loss_over_several_tiles_and_programs(shape, l2, seed):
    row = (*random_row(seed, shape, 5, torch.float32), l2)
    for config in (SMALL, SMALL._replace(lanes=8, programs=200)):
        check_loss(launch_predict_loss(*row, True, config), *row)


def test_loss_where_forecast_and_target_agree():
    # In whole numbers everything is exact: half of the errors are 0, and their sign counts 0.
    history = torch.arange(8.0, device=DEVICE).reshape(2, 4)
    slots = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    row = [torch.tensor(value, device=DEVICE) for value in ([-1.0, 1.0], [2.0], 0.5)]
    # F_last + 0.5 (F_1 - F_0 + 2) = F_last + 3
    target = torch.tensor([7.0, 9.0, 9.0, 8.0], device=DEVICE)
    loss, forecast, grads = launch_predict_loss(history, slots, *row, target, False, True)
    assert forecast.tolist() == [7.0, 8.0, 9.0, 10.0]
    # Signs 0, -1, 0, 1 over 4: S_k = (F_k[3] - F_k[1]) / 4 = 0.5, S = 0.
    assert loss == 0.75
    assert grads.tolist() == [0.25, 0.25, 0.0, 0.0]


def test_two_runs_are_bit_equal(seed):
    row = random_row(seed, (5, 197), 6, torch.float32)
    dt, params = random_net(seed)
    for first, second in zip(
        launch_predict_loss(*row, False, True, SMALL), launch_predict_loss(*row, False, True, SMALL), strict=True
    ):
        assert torch.equal(first, second)
    for first, second in zip(
        launch_predict_fwd(*row[:4], dt, params, LOW, HIGH),
        launch_predict_fwd(*row[:4], dt, params, LOW, HIGH),
        strict=True,
    ):
        assert torch.equal(first, second)


def test_any_stride_between_slots(seed):
    row = random_row(seed, (3, 100), 4, torch.float32)
    wide = torch.full((len(row[0]), 2, 3, 100), float("nan"), device=DEVICE)
    wide[:, 1] = row[0]
    want = launch_predict_loss(*row, True, True)
    for got, result in zip(launch_predict_loss(wide[:, 1], *row[1:], True, True), want, strict=True):
        assert torch.equal(got, result)
    net = random_net(seed)
    assert torch.equal(
        launch_predict_fwd(wide[:, 1], *row[1:4], *net, LOW, HIGH)[0],
        launch_predict_fwd(*row[:4], *net, LOW, HIGH)[0],
    )


def test_loss_without_elements(seed):
    row = random_row(seed, (4, 0), 3, torch.float32)
    loss, forecast, grads = launch_predict_loss(*row, True, True)
    assert loss == 0 and forecast.shape == (4, 0) and grads.tolist() == [0.0] * 5


def test_refusals(seed):
    history, slots, weights, bias, alpha, target = random_row(seed, (6, 8), 3, torch.float32)
    dt, params = random_net(seed)
    with pytest.raises(ValueError, match="history"):
        launch_predict_fwd(history.mT, slots, weights, bias, dt, params, LOW, HIGH)
    with pytest.raises(ValueError, match="history"):
        launch_predict_loss(history.mT, slots, weights, bias, alpha, target.mT, True, True)
    with pytest.raises(ValueError, match="target"):
        launch_predict_loss(history, slots, weights, bias, alpha, target[:3], True, True)
    with pytest.raises(ValueError, match="target"):
        launch_predict_loss(history, slots, weights, bias, alpha, target.mT.contiguous().mT, True, True)
    with pytest.raises(ValueError, match="params"):
        launch_predict_fwd(history, slots, weights, bias, dt, params[:6] + params[3:6], LOW, HIGH)


@pytest.mark.gpu
def test_published_sizes(seed):
    history, slots, weights, bias, alpha, target = random_row(seed, (1, 4096, 3072), 8, torch.bfloat16)
    row = (history, slots, weights, bias, *random_net(seed, (51, 256, 256)))
    results = launch_predict_fwd(*row, LOW, HIGH)
    check_predict(results, *row)
    for _ in range(200):
        for first, again in zip(results, launch_predict_fwd(*row, LOW, HIGH), strict=True):
            assert torch.equal(first, again)
    for l2 in (False, True):
        row = (history, slots, weights, bias, alpha, target, l2)
        check_loss(launch_predict_loss(*row, True), *row)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    length = 2**31 + 40
    history = torch.ones(2, length, dtype=torch.float16, device=DEVICE)
    history[1, -8:] = torch.arange(8.0, device=DEVICE)
    slots = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    weights, bias = torch.tensor([-1.0, 1.0], device=DEVICE), torch.zeros(1, device=DEVICE)
    alpha, target = torch.ones((), device=DEVICE), torch.zeros(length, dtype=torch.float16, device=DEVICE)
    loss, forecast, _ = launch_predict_loss(history, slots, weights, bias, alpha, target, False, True)
    tail = 2 * torch.arange(8.0, device=DEVICE) - 1
    assert torch.equal(forecast[-8:].float(), tail) and (forecast[-40:-8] == 1).all()
    torch.testing.assert_close(loss.item(), 1.0, rtol=1e-4, atol=0)
    dt, params = random_net(0)
    forecast, alpha, *_ = launch_predict_fwd(history, slots, weights, bias, dt, params, LOW, HIGH)
    want = history[1, -8:].float() + alpha * (history[1, -8:].float() - 1)
    torch.testing.assert_close(forecast[-8:].float(), want, rtol=1e-3, atol=1e-3)
