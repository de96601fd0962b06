"""Forecasts, their sums, the spread and the errors against float64: on a GPU, else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import interpret  # noqa: F401 - first, before any kernel
import pytest
import torch
from interpret import DEVICE, DTYPES, assert_close, poisoned, untouched
from torch import Tensor

triton = pytest.importorskip("triton")

from lesa import ops  # noqa: E402
from lesa.kernels import forecast as kernels  # noqa: E402
from lesa.kernels.forecast import (  # noqa: E402
    ErrorsConfig,
    ForecastConfig,
    SumsConfig,
    launch_feature_sums,
    launch_forecast_errors,
    launch_forecast_fwd,
    launch_spread,
    prepare_forecast_errors,
)

SIZES = (1, 7, 1023, 1025)
WINDOWS = (1, 2, 3, 5, 8, 16)
SMALL = ErrorsConfig(block=64, alone=1, programs=5)


@pytest.fixture(autouse=True)
def _poisoned(seed: int) -> Iterator[None]:
    torch.manual_seed(seed)
    with poisoned():
        yield


def row_of(values: list[int] | list[float]) -> Tensor:
    """Slots as int32, weights as float32, on the device."""
    dtype = torch.int32 if isinstance(values[0], int) else torch.float32
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def ring(slots: int, *feature: int, dtype: torch.dtype = torch.float32, unread: tuple[int, ...] = ()) -> Tensor:
    """Random features, NaN in the slots that must not be read."""
    history = torch.randn(slots, *feature, device=DEVICE).to(dtype)
    for slot in unread:
        history[slot] = torch.nan
    return history


def formula(history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The plain weighted sum over the used entries, in `dtype`."""
    total = torch.zeros(history.shape[1:], dtype=dtype, device=history.device)
    for slot, weight in zip(slots.tolist(), weights, strict=True):
        if slot >= 0:
            total = total + weight.to(dtype) * history[slot].to(dtype)
    return total + bias.to(dtype).reshape(())


def check(got: Tensor, history: Tensor, slots: Tensor, weights: Tensor, bias: Tensor) -> None:
    """`got` is the forecast, to the rule of tolerance."""
    plain = formula(history, slots, weights, bias, history.dtype)
    assert_close(got, plain, formula(history, slots, weights, bias, torch.float64))


@pytest.mark.parametrize(
    ("window", "dtype"), [*((window, DTYPES[0]) for window in WINDOWS), *((3, dtype) for dtype in DTYPES[1:])]
)
def test_odd_sizes(window: int, dtype: torch.dtype) -> None:
    for size in SIZES:
        history = ring(window + 1, size, dtype=dtype, unread=(window // 2,))
        slots = row_of([slot for slot in range(window, -1, -1) if slot != window // 2])
        weights, bias = torch.randn(window, device=DEVICE), torch.randn((), device=DEVICE)
        check(launch_forecast_fwd(None, history, slots, weights, bias), history, slots, weights, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unused_entries_are_not_read_and_slots_may_repeat(dtype: torch.dtype) -> None:
    history = ring(4, 3, 5, 29, dtype=dtype, unread=(0, 3))
    slots, weights = row_of([2, -1, 1, 2, -1]), row_of([0.5, float("nan"), -1.25, 2.0, float("inf")])
    bias = row_of([0.75])
    check(launch_forecast_fwd(None, history, slots, weights, bias), history, slots, weights, bias)
    nothing = launch_forecast_fwd(None, history, row_of([-1, -1]), row_of([1.0, 2.0]), bias)
    assert torch.equal(nothing, torch.full_like(nothing, 0.75))


def test_a_given_output_is_written_and_returned() -> None:
    history, slots, weights = ring(2, 6, 5), row_of([1, 0]), row_of([1.5, -0.5])
    out = torch.empty(6, 5, device=DEVICE)
    assert launch_forecast_fwd(out, history, slots, weights, row_of([0.0])) is out
    check(out, history, slots, weights, row_of([0.0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [3, 1, -1])
def test_steps_and_keeping_give_the_bits_of_a_row(kept: int, dtype: torch.dtype) -> None:
    history = ring(4, 2, 701, dtype=dtype)
    slots = torch.stack([row_of([9, 9, 9]), row_of([2, -1, 1]), row_of([9, 9, 9])])
    weights, bias = torch.randn(3, 3, device=DEVICE), torch.randn(3, device=DEVICE)
    step = torch.tensor([1], device=DEVICE)
    expected = launch_forecast_fwd(None, history, slots[1], weights[1], bias[1])
    assert torch.equal(launch_forecast_fwd(None, history, slots, weights, bias, None, step), expected)

    wanted = history.clone()
    if kept >= 0:
        wanted[kept] = expected  # 1 is a slot the row itself reads
    keep = row_of([9, kept, 9])
    assert launch_forecast_fwd(None, history, slots, weights, bias, keep, step) is history
    assert torch.equal(history, wanted)


def test_the_cut_does_not_change_the_bits() -> None:
    history, slots, weights, bias = ring(8, 1025), row_of([*range(8)]), torch.randn(8, device=DEVICE), row_of([0.1])
    expected = launch_forecast_fwd(None, history, slots, weights, bias)
    for config in (ForecastConfig(64, 1, ""), ForecastConfig(2048, 8)):
        assert torch.equal(launch_forecast_fwd(None, history, slots, weights, bias, config=config), expected)


def test_slots_far_apart() -> None:
    wide = torch.full((3, 100), torch.nan, device=DEVICE)
    history = wide[:, 10:73].unflatten(1, (7, 9))
    history.copy_(ring(3, 7, 9))
    slots, weights, bias = row_of([2, 0]), row_of([1.0, -2.0]), row_of([0.5])
    check(launch_forecast_fwd(None, history, slots, weights, bias), history, slots, weights, bias)
    grad = torch.randn(7, 9, device=DEVICE)
    assert torch.equal(launch_feature_sums(grad, history, slots), launch_feature_sums(grad, history.clone(), slots))


def test_slots_beyond_32_bits() -> None:
    apart = 2**30 + 16  # fits 32 bits; twice that does not
    history = untouched(apart, 1, size=(3, 300))
    history[2] = torch.randn(300, device=DEVICE)
    slots, weights, bias = row_of([2]), row_of([2.0]), row_of([0.0])
    check(launch_forecast_fwd(None, history, slots, weights, bias), history, slots, weights, bias)
    launch_forecast_fwd(None, history, slots, weights, bias, keep=slots)
    grad = torch.ones(300, device=DEVICE)
    torch.testing.assert_close(launch_feature_sums(grad, history, slots)[0], history[2].float().sum())


def test_elements_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    length, tail = 2**31 + 700, 300
    history, out = untouched(length, 1, size=(1, length)), untouched(1, size=(length,))
    history[0, -tail:] = torch.randn(tail, device=DEVICE)
    slots, weights, bias = row_of([0]), row_of([2.0]), row_of([0.0])
    if DEVICE == "cuda":
        launch_forecast_fwd(out, history, slots, weights, bias)
    else:
        # Two million programs are too many for the interpreter: the only one it runs is told to be the last.
        builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
        create = builder.create_get_program_id

        def last(axis: int) -> object:
            handle = create(axis)
            handle.data = handle.data + 2**21
            return handle

        monkeypatch.setattr(builder, "create_get_program_id", last)
        rest = (slots, weights, bias, None, None, history.stride(0), length)
        kernels._forecast_fwd_kernel[(1,)](out, history, *rest, K=1, BLOCK=1024, HINT="")
    check(out[-tail:], history[:, -tail:], slots, weights, bias)


def test_empty_features_launch_nothing() -> None:
    slots, weights, bias = row_of([0]), row_of([1.0]), row_of([0.0])
    history = torch.empty(2, 0, 4, device=DEVICE)
    assert launch_forecast_fwd(None, history, slots, weights, bias).shape == (0, 4)
    assert launch_forecast_fwd(None, history, slots, weights, bias, keep=slots) is history
    assert torch.equal(launch_feature_sums(history[0], history, slots), torch.zeros(2, device=DEVICE))
    assert launch_spread(history[0], weights, slots, 2).shape == (2, 0, 4)


def test_what_the_kernel_would_misread_is_refused() -> None:
    for name, change in [
        ("history", lambda a: a | {"history": a["history"].transpose(1, 2)}),
        ("history", lambda a: a | {"history": a["history"].double()}),
        ("slots", lambda a: a | {"slots": a["slots"].long()}),
        ("slots", lambda a: a | {"slots": a["slots"].repeat(9)}),
        ("slots", lambda a: a | {"step": torch.zeros(1, dtype=torch.int64, device=DEVICE)}),
        ("weights", lambda a: a | {"weights": a["weights"][:1]}),
        ("weights", lambda a: a | {"weights": a["weights"].repeat_interleave(2)[::2]}),
        ("bias", lambda a: a | {"bias": a["bias"].double()}),
        ("keep", lambda a: a | {"keep": a["slots"].long()}),
        ("out", lambda a: a | {"out": torch.empty(5, 6, device=DEVICE)}),
        ("step", lambda a: a | {"slots": a["slots"][None], "step": torch.zeros(1, dtype=torch.int32, device=DEVICE)}),
    ]:
        arguments = {"out": None, "history": ring(3, 6, 5), "slots": row_of([0, 1]), "weights": row_of([1.0, 2.0])}
        arguments["bias"] = row_of([0.0])
        with pytest.raises(ValueError, match=f"^{name} "):
            launch_forecast_fwd(**change(arguments))  # type: ignore[operator]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("slots", "config"),
    [
        ([1], SumsConfig()),
        ([2, -1, 0], SumsConfig(tile=256, programs=3)),
        ([1, 1, 2, 0, -1], SumsConfig()),
        ([*range(16)], SumsConfig(tile=256, programs=3)),
    ],
)
def test_feature_sums(slots: list[int], config: SumsConfig, dtype: torch.dtype) -> None:
    for size in SIZES:
        unread = tuple(slot for slot in range(16) if slot not in slots)
        history, grad = ring(16, size, dtype=dtype, unread=unread), torch.randn(size, device=DEVICE).to(dtype)
        got = launch_feature_sums(grad, history, row_of(slots), config)
        assert got.dtype == torch.float32
        zero = torch.zeros(size, dtype=torch.float64, device=DEVICE)
        terms = [grad.double() * history[slot].double() if slot >= 0 else zero for slot in slots] + [grad.double()]
        for value, term in zip(got, terms, strict=True):
            plain = term.float().sum().double()
            # A sum's condition: its rounding goes with the size of its terms, which may cancel.
            allowed = 2 * ((plain - term.sum()).abs() + torch.finfo(torch.float32).eps * term.abs().sum())
            assert (value.double() - term.sum()).abs() <= allowed
        assert torch.equal(launch_feature_sums(grad, history, row_of(slots), config), got)


def test_sums_of_a_gradient_that_is_not_finite() -> None:
    history, grad = ring(2, 50), torch.ones(50, device=DEVICE)
    grad[3] = torch.inf
    got = launch_feature_sums(grad, history, row_of([0, -1, 1]))
    assert got[1] == 0
    assert got[3] == torch.inf
    assert not got[0].isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 1025])
def test_spread(size: int, dtype: torch.dtype) -> None:
    grad = torch.randn(size, device=DEVICE).to(dtype)
    slots, coefficients = row_of([3, -1, 0, 3]), row_of([0.5, float("nan"), -2.0, 1.5])
    got = launch_spread(grad, coefficients, slots, 5)
    assert got.shape == (5, size)
    assert torch.equal(got[3], 2 * grad)
    assert torch.equal(got[0], -2 * grad)
    assert not got[[1, 2, 4]].any()


def test_a_spread_gradient_that_is_not_finite_leaves_other_slots_zero() -> None:
    grad = torch.tensor([1.0, torch.inf, torch.nan], device=DEVICE)
    got = launch_spread(grad, row_of([1.0]), row_of([1]), 3)
    assert not got[[0, 2]].any()
    assert torch.equal(got[1].nan_to_num(5.0), grad.nan_to_num(5.0))


def test_what_the_sums_and_the_spread_would_misread_is_refused() -> None:
    history, slots = ring(2, 6, 5), row_of([0])
    for grad in (history[0].t(), history[0].double(), history[0].flatten()):
        with pytest.raises(ValueError, match="^grad "):
            launch_feature_sums(grad, history, slots)
    with pytest.raises(ValueError, match="^grad "):
        launch_spread(history[0].t(), row_of([1.0]), slots, 2)
    with pytest.raises(ValueError, match="^coefficients "):
        launch_spread(history[0], row_of([1.0]).double(), slots, 2)


def errors_row(window: int, *feature: int, dtype: torch.dtype = torch.float32, unused: int = 0) -> list[Tensor]:
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


def errors_formula(row: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both sums in `dtype`; and for each the sum of |derivative| times |term|."""
    history, slots, weights, bias, truth = row
    read, truth = slots >= 0, truth.to(dtype)
    weights, features = weights[read].to(dtype), history[slots[read].long()].to(dtype)
    miss = torch.tensordot(weights, features, 1) + bias[0].to(dtype) - truth
    terms = torch.tensordot(weights.abs(), features.abs(), 1) + bias[0].to(dtype).abs() + truth.abs()
    sums = torch.stack([miss.square().sum(), truth.square().sum()])
    return sums, torch.stack([(miss.abs() * terms).sum(), truth.square().sum()])


def check_errors(found: Tensor, row: list[Tensor]) -> None:
    """Each sum to the rule of tolerance; eps counts for the numbers that a forecast close to the truth cancels."""
    (exact, terms), (plain, _) = errors_formula(row, torch.float64), errors_formula(row, torch.float32)
    allowed = 2 * ((plain - exact).abs() + torch.finfo(torch.float32).eps * torch.maximum(exact, terms))
    assert ((found - exact).abs() <= allowed).all(), f"{found.tolist()}, exact {exact.tolist()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_errors(window: int, dtype: torch.dtype) -> None:
    row = errors_row(window, 3, 5, 41, dtype=dtype, unused=window // 3)
    found = launch_forecast_errors(*row)
    assert (found.shape, found.dtype) == ((2,), torch.float32)
    check_errors(found, row)


@pytest.mark.parametrize("shape", [(), (1,), (63,), (64,), (320,), (2, 3, 61)])
def test_errors_over_several_tiles_and_programs(shape: tuple[int, ...]) -> None:
    row = errors_row(5, *shape)
    for config in (SMALL, SMALL._replace(programs=1), SMALL._replace(alone=9), SMALL._replace(block=16, programs=200)):
        check_errors(launch_forecast_errors(*row, config=config), row)


def test_errors_twice_and_with_slots_far_apart() -> None:
    row = errors_row(4, 5, 197)
    found = launch_forecast_errors(*row, config=SMALL)
    assert torch.equal(launch_forecast_errors(*row, config=SMALL), found)
    wide = torch.full((len(row[0]), 2, 5, 197), torch.nan, device=DEVICE)
    wide[:, 1] = row[0]
    assert torch.equal(launch_forecast_errors(wide[:, 1], *row[1:], config=SMALL), found)


def test_errors_by_hand() -> None:
    history = torch.tensor([[1.0, 2.0, 3.0], [torch.nan] * 3, [2.0, 2.0, 2.0]], device=DEVICE)
    slots = torch.tensor([0, -1, 2], dtype=torch.int32, device=DEVICE)
    row = torch.tensor([2.0, torch.nan, -1.0], device=DEVICE), torch.tensor([0.5], device=DEVICE)
    truth = torch.tensor([0.5, 2.0, 6.5], device=DEVICE)
    # F^ = 0.5, 2.5, 4.5
    assert launch_forecast_errors(history, slots, *row, truth).tolist() == [0.25 + 4.0, 0.25 + 4.0 + 42.25]
    assert launch_forecast_errors(history, slots * 0 - 1, row[0], row[1] * 0, truth).tolist() == [46.5, 46.5]


def test_errors_of_nothing_and_of_infinity() -> None:
    assert launch_forecast_errors(*errors_row(3, 4, 0)).tolist() == [0.0, 0.0]
    for value in (torch.nan, torch.inf):
        row = errors_row(3, 130)
        row[4][129] = value
        assert not launch_forecast_errors(*row, config=SMALL).isfinite().any()
        row = errors_row(3, 130)
        row[0][row[1][1], 129] = value
        error, size = launch_forecast_errors(*row, config=SMALL)
        assert not error.isfinite() and size.isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [ErrorsConfig(), SMALL], ids=["one", "several"])
def test_errors_of_many_truths_that_are_kept(config: ErrorsConfig, dtype: torch.dtype) -> None:
    history, slots, weights, bias, _ = errors_row(3, 5, 101, dtype=dtype)
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
            check_errors(sums.to(DEVICE), [before, slots, weights, bias, truth])
            assert torch.equal(history[slot], truth)
            others = [i for i in range(5) if i != slot]
            assert torch.equal(history[others].nan_to_num(), before[others].nan_to_num())
    with pytest.raises(ValueError, match="kept is"):
        prepare_forecast_errors(history, slots, weights, bias, history[0, :3])
    with pytest.raises(ValueError, match="truth is"):
        compare(sums, truth[:3])


def test_errors_of_slots_beyond_32_bits() -> None:
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
    check_errors(found, row)
    torch.testing.assert_close(found[0], found[1])  # F^ = 2 F


def test_the_operator_launches_the_errors() -> None:
    row = errors_row(4, 6, 50)
    found = ops.forecast_errors(*row, backend="triton")
    assert torch.equal(found, launch_forecast_errors(*row))
    across = row[4].mT.contiguous().mT
    assert torch.equal(ops.forecast_errors(*row[:4], across, backend="triton"), found)


def test_errors_refuse() -> None:
    history, slots, weights, bias, truth = errors_row(3, 6, 8)
    with pytest.raises(ValueError, match="history"):
        launch_forecast_errors(history.mT, slots, weights, bias, truth.mT)
    with pytest.raises(ValueError, match="truth"):
        launch_forecast_errors(history, slots, weights, bias, truth[:3])
    with pytest.raises(ValueError, match="truth"):
        launch_forecast_errors(history, slots, weights, bias, truth.mT.contiguous().mT)
    with pytest.raises(ValueError, match="truth"):
        launch_forecast_errors(history, slots, weights, bias, truth.half())
    with pytest.raises(ValueError, match="weights"):
        launch_forecast_errors(history, slots, weights[:2], bias, truth)


@pytest.mark.gpu
def test_errors_of_published_sizes() -> None:
    row = errors_row(8, 1, 4096, 3072, dtype=torch.bfloat16)
    found = launch_forecast_errors(*row)
    check_errors(found, row)
    assert all(torch.equal(launch_forecast_errors(*row), found) for _ in range(20))
