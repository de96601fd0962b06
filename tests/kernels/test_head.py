"""The fused head against float64: on the GPU if there is one, else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import interpret  # noqa: F401 - first, before any kernel
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from interpret import DEVICE, DTYPES, assert_close, poisoned, untouched
from torch import Tensor

triton = pytest.importorskip("triton")

from lesa.kernels.forecast import launch_forecast_fwd  # noqa: E402
from lesa.kernels.head import HeadConfig, launch_forecast_head_fwd  # noqa: E402

EPS = 1e-6
# Whole channels and split ones, pipelined or not; the last slice is shorter than the others at 136 channels.
CONFIGS = (None, HeadConfig(16, 32, 1, 4, 1), HeadConfig(32, 64, 2, 4, 2), HeadConfig(16, 32, 5, 4, 1))


@pytest.fixture(autouse=True)
def _poisoned(seed: int) -> Iterator[None]:
    torch.manual_seed(seed)
    with poisoned():
        yield


def arguments(
    B: int = 2,
    N: int = 37,
    D: int = 136,
    C: int = 12,
    dtype: torch.dtype = torch.float32,
    slots: tuple[int, ...] = (3, -1, 0),
    mean: float = 0.0,
) -> dict[str, Any]:
    """What the launcher takes, random, with NaN wherever nothing may be read."""
    H = 5
    history = (mean + torch.randn(H, B, N, D, device=DEVICE)).to(dtype)
    for slot in set(range(H)) - set(slots):
        history[slot] = torch.nan
    row = torch.tensor(slots, device=DEVICE, dtype=torch.int32)
    weights = torch.rand(len(slots), device=DEVICE) + 0.25
    weights /= weights[row >= 0].sum()  # a mean of features: far from zero where they are, in range of float16
    weights[row < 0] = torch.nan
    return {
        "history": history,
        "slots": row,
        "weights": weights,
        "bias": torch.randn(1, device=DEVICE),
        "keep": None,
        "step": None,
        "scale": (1 + 0.3 * torch.randn(B, D, device=DEVICE)).to(dtype),
        "shift": torch.randn(B, D, device=DEVICE).to(dtype),
        "proj_weight": (torch.randn(C, D, device=DEVICE) / D**0.5).to(dtype),
        "proj_bias": torch.randn(C, device=DEVICE).to(dtype),
        "eps": EPS,
    }


def formula(given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The plain formula in `dtype`, over the used entries."""
    x: Tensor = given["bias"].to(dtype)
    for slot, weight in zip(given["slots"].tolist(), given["weights"], strict=True):
        if slot >= 0:
            x = x + weight.to(dtype) * given["history"][slot].to(dtype)
    x = F.layer_norm(x, x.shape[-1:], eps=given["eps"])
    x = x * given["scale"].to(dtype)[:, None] + given["shift"].to(dtype)[:, None]
    bias = given["proj_bias"]
    return F.linear(x, given["proj_weight"].to(dtype), None if bias is None else bias.to(dtype))


def check(given: dict[str, Any], config: HeadConfig | None = None) -> Tensor:
    """Launch, hold the result against float64, and return it."""
    plain, exact = formula(given, given["history"].dtype), formula(given, torch.float64)
    got = launch_forecast_head_fwd(**given, config=config)
    assert_close(got, plain, exact)
    return got


SPLIT = CONFIGS[3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "config"),
    [((2, 19, 136, 12), config) for config in CONFIGS]
    + [((1, 16, 64, 64), None), ((3, 1, 33, 1), SPLIT), ((1, 33, 256, 48), CONFIGS[2])],
)
def test_against_float64(size: tuple[int, int, int, int], config: HeadConfig | None, dtype: torch.dtype) -> None:
    given = arguments(*size, dtype=dtype)
    got = check(given, config)
    assert torch.equal(launch_forecast_head_fwd(**given, config=config), got)


@pytest.mark.parametrize("window", [1, 2, 4, 5, 8, 16])
def test_window(window: int) -> None:
    check(arguments(1, 17, 40, 5, slots=tuple(k % 4 for k in range(window))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [None, SPLIT])
def test_rows_far_from_zero_and_channels_that_stand_out(config: HeadConfig | None, dtype: torch.dtype) -> None:
    given = arguments(N=17, mean=100.0, dtype=dtype)
    given["history"][:, :, ::3, 7] *= 20
    given["history"][:, :, 1::3, 120] *= -20
    check(given, config)


def test_float16_products_beyond_its_range() -> None:
    given = arguments(dtype=torch.float16)
    given["history"] *= 12_000
    given["scale"] *= 8
    assert check(given, HeadConfig(16, 32, 1, 4, 1)).isfinite().all()


def test_constant_rows_have_the_shift_alone() -> None:
    given = arguments(N=17, slots=(-1, -1))
    given["weights"] = torch.zeros(2, device=DEVICE)
    for config in CONFIGS:
        got = launch_forecast_head_fwd(**given, config=config)
        wanted = F.linear(given["shift"], given["proj_weight"], given["proj_bias"])[:, None].expand_as(got)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_modulation_in_any_layout_of_rows_and_no_bias() -> None:
    given = arguments(N=17)
    chunks = torch.randn(2, 272, device=DEVICE).chunk(2, dim=1)
    given |= {"scale": chunks[0], "shift": chunks[1], "proj_bias": None}
    check(given)
    given |= {"scale": chunks[0][:1].expand(2, -1), "shift": chunks[1][:1].expand(2, -1)}
    check(given)


@pytest.mark.parametrize(
    ("kept", "config", "dtype"),
    [(4, None, DTYPES[0]), (3, SPLIT, DTYPES[1]), (3, CONFIGS[2], DTYPES[0]), (-1, SPLIT, DTYPES[-1])],
)
def test_steps_and_keeping(kept: int, config: HeadConfig | None, dtype: torch.dtype) -> None:
    given = arguments(N=17, dtype=dtype)
    expected = launch_forecast_head_fwd(**given, config=config)
    wanted = given["history"].clone()
    if kept >= 0:
        wanted[kept] = launch_forecast_fwd(None, given["history"], given["slots"], given["weights"], given["bias"])
    for name, other in (("slots", 9), ("weights", torch.nan), ("bias", torch.nan)):
        given[name] = torch.stack([torch.full_like(given[name], other), given[name]])
    given["bias"] = given["bias"].flatten()
    given["keep"] = torch.tensor([9, kept], device=DEVICE, dtype=torch.int32)
    given["step"] = torch.tensor([1], device=DEVICE)
    assert torch.equal(launch_forecast_head_fwd(**given, config=config), expected)
    # The weighted sum may be contracted another way here than in the forecast kernel: one rounding of the last bit.
    assert torch.equal(given["history"].isnan(), wanted.isnan())
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(given["history"], wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_slots_beyond_32_bits() -> None:
    apart = 2**30 + 16
    given = arguments(1, 5, 40, 3, slots=(2,))
    history = untouched(apart, 200, 40, 1, size=(3, 1, 5, 40))
    history[2] = given["history"][2]
    given |= {"history": history, "keep": torch.tensor([2], device=DEVICE, dtype=torch.int32)}
    exact, plain = formula(given, torch.float64), formula(given, torch.float16)
    assert_close(launch_forecast_head_fwd(**given), plain, exact)


def test_empty_features_launch_nothing() -> None:
    assert launch_forecast_head_fwd(**arguments(N=0)).shape == (2, 0, 12)
    assert launch_forecast_head_fwd(**arguments(B=0)).shape == (0, 37, 12)


def test_what_the_kernel_would_misread_is_refused() -> None:
    for name, value in [
        ("history", torch.zeros(5, 37, 136, device=DEVICE)),
        ("history", torch.zeros(5, 2, 136, 37, device=DEVICE).transpose(2, 3)),
        ("scale", torch.zeros(2, 135, device=DEVICE)),
        ("shift", torch.zeros(136, 2, device=DEVICE).t()),
        ("proj_weight", torch.zeros(257, 136, device=DEVICE)),
        ("proj_weight", torch.zeros(12, 272, device=DEVICE)[:, :136]),
        ("proj_bias", torch.zeros(11, device=DEVICE)),
        ("weights", torch.zeros(3, device=DEVICE, dtype=torch.float64)),
    ]:
        with pytest.raises(ValueError, match=f"^{name} "):
            launch_forecast_head_fwd(**arguments() | {name: value})
