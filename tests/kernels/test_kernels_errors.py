"""The kernel of the guard against float64: on the GPU if there is one, else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import interpret  # noqa: F401 - first, before any kernel
import pytest
import torch
from interpret import DEVICE, DTYPES, poisoned, untouched
from torch import Tensor

pytest.importorskip("triton")

from lesa import ops  # noqa: E402
from lesa.kernels.forecast import ErrorsConfig, launch_forecast_errors, prepare_forecast_errors  # noqa: E402

SMALL = ErrorsConfig(block=64, alone=1, programs=5)


@pytest.fixture(autouse=True)
def _poisoned(seed: int) -> Iterator[None]:
    torch.manual_seed(seed)
    with poisoned():
        yield


def random_row(window: int, *feature: int, dtype: torch.dtype = torch.float32, unused: int = 0) -> list[Tensor]:
    """A ring with NaN in the slots that are not read, a row whose first entries are unused, and a truth."""
    history = torch.full((window + 2, *feature), torch.nan)
    slots = torch.randperm(window + 2)[:window].to(torch.int32)
    slots[:unused] = -1
    for slot in slots[unused:]:
        history[slot] = torch.randn(feature)
    weights, bias = torch.randn(window), torch.randn(1)
    weights[:unused] = torch.nan
    parts = history.to(dtype), slots, weights, bias, torch.randn(feature).to(dtype)
    return [part.to(DEVICE) for part in parts]


def formula(row: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both sums in `dtype`; and for each the sum of its slopes times the size of what they are taken of."""
    history, slots, weights, bias, truth = row
    read, truth = slots >= 0, truth.to(dtype)
    weights, features = weights[read].to(dtype), history[slots[read].long()].to(dtype)
    miss = torch.tensordot(weights, features, 1) + bias[0].to(dtype) - truth
    terms = torch.tensordot(weights.abs(), features.abs(), 1) + bias[0].to(dtype).abs() + truth.abs()
    sums = torch.stack([miss.square().sum(), truth.square().sum()])
    return sums, torch.stack([(miss.abs() * terms).sum(), truth.square().sum()])


def check(found: Tensor, row: list[Tensor]) -> None:
    """Each sum to the rule of tolerance; eps counts for the numbers that a forecast close to the truth cancels."""
    (exact, terms), (plain, _) = formula(row, torch.float64), formula(row, torch.float32)
    allowed = 2 * ((plain - exact).abs() + torch.finfo(torch.float32).eps * torch.maximum(exact, terms))
    assert ((found - exact).abs() <= allowed).all(), f"{found.tolist()}, exact {exact.tolist()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", range(1, 17))
def test_every_window(window: int, dtype: torch.dtype) -> None:
    row = random_row(window, 3, 5, 101, dtype=dtype, unused=window // 3)
    found = launch_forecast_errors(*row)
    assert (found.shape, found.dtype) == ((2,), torch.float32)
    check(found, row)


@pytest.mark.parametrize("shape", [(), (1,), (63,), (64,), (320,), (2, 3, 701)])
def test_over_several_tiles_and_programs(shape: tuple[int, ...]) -> None:
    row = random_row(5, *shape)
    for config in (SMALL, SMALL._replace(programs=1), SMALL._replace(alone=9), SMALL._replace(block=16, programs=200)):
        check(launch_forecast_errors(*row, config=config), row)


def test_two_runs_are_bit_equal_and_slots_may_lie_apart() -> None:
    row = random_row(4, 5, 997)
    found = launch_forecast_errors(*row, config=SMALL)
    assert torch.equal(launch_forecast_errors(*row, config=SMALL), found)
    wide = torch.full((len(row[0]), 2, 5, 997), torch.nan, device=DEVICE)
    wide[:, 1] = row[0]
    assert torch.equal(launch_forecast_errors(wide[:, 1], *row[1:], config=SMALL), found)


def test_by_hand() -> None:
    history = torch.tensor([[1.0, 2.0, 3.0], [torch.nan] * 3, [2.0, 2.0, 2.0]], device=DEVICE)
    slots = torch.tensor([0, -1, 2], dtype=torch.int32, device=DEVICE)
    row = torch.tensor([2.0, torch.nan, -1.0], device=DEVICE), torch.tensor([0.5], device=DEVICE)
    truth = torch.tensor([0.5, 2.0, 6.5], device=DEVICE)
    # F^ = 0.5, 2.5, 4.5
    assert launch_forecast_errors(history, slots, *row, truth).tolist() == [0.25 + 4.0, 0.25 + 4.0 + 42.25]
    assert launch_forecast_errors(history, slots * 0 - 1, row[0], row[1] * 0, truth).tolist() == [46.5, 46.5]


def test_nothing_and_what_is_not_finite() -> None:
    assert launch_forecast_errors(*random_row(3, 4, 0)).tolist() == [0.0, 0.0]
    for value in (torch.nan, torch.inf):
        row = random_row(3, 130)
        row[4][129] = value
        assert not launch_forecast_errors(*row, config=SMALL).isfinite().any()
        row = random_row(3, 130)
        row[0][row[1][1], 129] = value
        error, size = launch_forecast_errors(*row, config=SMALL)
        assert not error.isfinite() and size.isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [ErrorsConfig(), SMALL], ids=["one", "several"])
def test_one_row_and_many_truths_of_which_each_is_kept(config: ErrorsConfig, dtype: torch.dtype) -> None:
    history, slots, weights, bias, _ = random_row(3, 5, 101, dtype=dtype)
    for slot in (int(slots[1]), next(i for i in range(5) if i not in slots)):  # one that the row reads, and another
        compare = prepare_forecast_errors(history, slots, weights, bias, history[slot], config)
        sums = torch.empty(2, pin_memory=DEVICE == "cuda")
        around = torch.randn(2, 5, 102, device=DEVICE).to(dtype)
        for truth in (
            around[0, :, :-1].contiguous(),
            around[1].flatten()[1:506].view(5, 101),
        ):  # the second not aligned
            before = history.clone()
            compare(sums, truth)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            check(sums.to(DEVICE), [before, slots, weights, bias, truth])
            assert torch.equal(history[slot], truth)
            others = [i for i in range(5) if i != slot]
            assert torch.equal(history[others].nan_to_num(), before[others].nan_to_num())
    with pytest.raises(ValueError, match="kept is"):
        prepare_forecast_errors(history, slots, weights, bias, history[0, :3])
    with pytest.raises(ValueError, match="truth is"):
        compare(sums, truth[:3])


def test_slots_beyond_32_bits() -> None:
    apart = 2**30 + 16  # fits 32 bits; twice that does not
    history = untouched(apart, 1, size=(3, 300))
    history[2] = torch.randn(300, device=DEVICE)
    slots = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    row = [
        history[2:],
        slots * 0,
        torch.tensor([2.0], device=DEVICE),
        torch.zeros(1, device=DEVICE),
        history[2].clone(),
    ]
    found = launch_forecast_errors(history, slots, *row[2:])
    check(found, row)
    torch.testing.assert_close(found[0], found[1])  # F^ = 2 F


def test_the_operator_reaches_it() -> None:
    row = random_row(4, 6, 50)
    found = ops.forecast_errors(*row, backend="triton")
    assert torch.equal(found, launch_forecast_errors(*row))
    across = row[4].mT.contiguous().mT
    assert torch.equal(ops.forecast_errors(*row[:4], across, backend="triton"), found)


def test_refusals() -> None:
    history, slots, weights, bias, truth = random_row(3, 6, 8)
    with pytest.raises(ValueError, match="history"):
        launch_forecast_errors(history.mT, slots, weights, bias, truth.mT)
    with pytest.raises(ValueError, match="truth is .* expected a contiguous feature"):
        launch_forecast_errors(history, slots, weights, bias, truth[:3])
    with pytest.raises(ValueError, match="truth"):
        launch_forecast_errors(history, slots, weights, bias, truth.mT.contiguous().mT)
    with pytest.raises(ValueError, match="truth"):
        launch_forecast_errors(history, slots, weights, bias, truth.half())
    with pytest.raises(ValueError, match="weights"):
        launch_forecast_errors(history, slots, weights[:2], bias, truth)


@pytest.mark.gpu
def test_published_sizes() -> None:
    row = random_row(8, 1, 4096, 3072, dtype=torch.bfloat16)
    found = launch_forecast_errors(*row)
    check(found, row)
    assert all(torch.equal(launch_forecast_errors(*row), found) for _ in range(20))
