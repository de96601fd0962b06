"""Time tilings of the kernels of the KAN and of the live predictor, beside eager and compiled torch.

    python -m benchmarks.tune_kan [--only layer,network,predict,loss] [--quick]

Every variant is first compared with float64, on fresh random inputs and with outputs filled with NaN; `error` is in
units of what the tests allow. Times are medians of CUDA events around a graph of several launches; "launched" times
leave the graph out, so that Python's part shows. Features are larger than the L2 cache; the KAN's parameters, as in
training, are not.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lesa.ops.reference import bspline_basis, bspline_grid, kan_layer

LOW, HIGH, BASES = -3.0, 3.0, 8
WIDTHS = (51, 256, 256, 1)
FEATURE, WINDOW = (1, 4096, 3072), 8
SECTIONS = ("layer", "network", "predict", "loss")


def time_us(function: Callable[[], Any], launches: int = 20, repeats: int = 30, graph: bool = True) -> float:
    """Median microseconds of one call."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            for _ in range(launches):
                function()
        run: Callable[[], Any] = recorded.replay
    else:

        def run() -> None:
            for _ in range(launches):
                function()

    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / launches)
    return statistics.median(times)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty comes filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error_of(results: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """The largest error in units of the limit, twice the plain formula's error and a last digit; NaN if unwritten."""
    worst = 0.0
    for result, want, usual in zip(results, exact, plain, strict=True):
        usual = usual.to(result.dtype).double()
        limit = 2 * ((usual - want).abs().max() + torch.finfo(result.dtype).eps * want.abs().max())
        ratio = float((result.double() - want).abs().max() / limit)
        worst = ratio if ratio != ratio else max(worst, ratio)
    return worst


def line(case: str, variant: object, error: float | None, microseconds: float, note: str = "") -> None:
    """One row of the table."""
    text = variant if isinstance(variant, str) else " ".join(map(str, variant))  # type: ignore[call-overload]
    shown = "" if error is None else f"{error:.2f}" + ("" if error <= 1 else " WRONG")
    print(f"{case:24} {text:46} {shown:>10} {microseconds:9.2f} us  {note}", flush=True)


def attempt(case: str, variant: Any, check: Callable[[], float], function: Callable[[], Any], note: str = "") -> None:
    """Check and time one variant; a variant that does not build is a row too."""
    try:
        with poisoned():
            error = check()
        line(case, variant, error, time_us(function), note)
    except Exception as problem:  # noqa: BLE001 - the other variants are still of interest
        print(f"{case:24} {variant} failed: {type(problem).__name__}: {str(problem)[:200]}", flush=True)


def random_layer(experts: int, steps: int, inputs: int, outputs: int) -> list[Tensor]:
    edges = (experts, outputs, inputs)
    shapes = ((experts, steps, inputs), edges, (*edges, BASES), edges)
    return [torch.randn(shape, device="cuda") * factor for shape, factor in zip(shapes, (2, 1, 1, 1), strict=True)]


def oracle(grad: Tensor, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    grid = bspline_grid(BASES - 3, 3, (LOW, HIGH), dtype).cuda()
    y = torch.stack([kan_layer(*parts, grid, 3) for parts in zip(*leaves, strict=True)])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


def forwards(steps: int, inputs: int, outputs: int) -> list[Any]:
    """Tilings of the forward to compare with the default."""
    from lesa.kernels.kan import ForwardConfig as Cut

    if min(steps, outputs) == 1:
        return [Cut("rows", 1, 1, 256)]
    tiles = [(16, 32, 16, 4, 4), (16, 32, 32, 8, 8)]
    narrow, wide = (Cut("dot", *tile, "tf32x3", warps) for *tile, warps in tiles)
    if inputs < 64:
        return [narrow, narrow._replace(span=32), narrow._replace(outputs=16), wide._replace(outputs=16)]
    cuts = [narrow._replace(span=span) for span in (0, 64, 128)] + [
        Cut("dot", 16, 32, 8, 4, span=span) for span in (32, 64, 128)
    ]
    cuts += [wide._replace(stages=3), wide._replace(span=64), wide._replace(span=128)]
    return [*cuts, Cut("dot", 16, 64, 8, 4, span=64), Cut("dot", 32, 32, 8, 4, span=32)]


def backwards(steps: int, inputs: int, outputs: int) -> list[Any]:
    """Tilings of the backward to compare with the default."""
    from lesa.kernels.kan import BackwardConfig as Cut

    if steps == 1:
        return [Cut("rows", 1, 4, 64, 1, 256, 2)]
    if outputs == 1:
        return [Cut("rows", *tile) for tile in ((64, 1, 4, 1, 1, 64), (32, 1, 8, 1, 1, 128))]
    tall = Cut("dot", 32, 64, 8, 64, 32, 4)
    if inputs < 64:
        return [tall, Cut("dot", 32, 32, 4, 64, 32, 4), Cut("dot", 32, 32, 8, 32, 32, 8, "ieee")]
    cuts = [tall, tall._replace(stages=3), tall._replace(rows=64), tall._replace(dx_inputs=8, warps=8)]
    return [*cuts, Cut("dot", 32, 32, 8, 32, 16, 8, stages=3)]


def layers() -> None:
    """Variants of one layer; dx of the first is not wanted, as in a network."""
    from lesa.kernels.kan import launch_kan_bwd, launch_kan_fwd

    for experts, steps, inputs, outputs in ((3, 50, 256, 256), (3, 50, 51, 256), (3, 50, 256, 1), (1, 1, 256, 256)):
        tensors = random_layer(experts, steps, inputs, outputs)
        grad = torch.randn(experts, steps, outputs, device="cuda")
        exact, plain = oracle(grad, tensors, torch.float64), oracle(grad, tensors, torch.float32)
        needs_x = inputs != WIDTHS[0]
        case = f"{experts}x{steps} [{inputs}, {outputs}]"
        floor = sum(part.numel() for part in tensors) * 4 / 3e6

        for cut in [None, *forwards(steps, inputs, outputs)]:

            def forward(cut: Any = cut, tensors: list[Tensor] = tensors) -> list[Tensor]:
                return [launch_kan_fwd(*tensors, LOW, HIGH, cut)]

            def check(run: Any = forward, exact: Any = exact, plain: Any = plain) -> float:
                return error_of(run(), exact[:1], plain[:1])

            attempt(f"forward {case}", cut or "default", check, forward, f"bytes {floor:.1f} us")
        first = 1 if needs_x else 2
        for cut in [None, *backwards(steps, inputs, outputs)]:

            def backward(
                cut: Any = cut, tensors: list[Tensor] = tensors, grad: Tensor = grad, needs_x: bool = needs_x
            ) -> list[Any]:
                return list(launch_kan_bwd(grad, *tensors, LOW, HIGH, needs_x, cut))[0 if needs_x else 1 :]

            def check_back(run: Any = backward, exact: Any = exact[first:], plain: Any = plain[first:]) -> float:
                return error_of(run(), exact, plain)

            attempt(f"backward {case}", cut or "default", check_back, backward, f"bytes {2 * floor:.1f} us")


def chain_eager(x: Tensor, params: Sequence[Sequence[Tensor]], grid: Tensor) -> Tensor:
    """The network expert by expert, as a module in eager torch runs it."""
    outputs = []
    for e in range(len(params[0][0])):
        values = x[e]
        for layer in params:
            values = kan_layer(values, *(part[e] for part in layer), grid, 3)
        outputs.append(values)
    return torch.stack(outputs)


def chain_batched(x: Tensor, params: Sequence[Sequence[Tensor]], grid: Tensor) -> Tensor:
    """The network with all experts in one batched product."""
    for base, spline, scale in params:
        flat = (spline * scale.unsqueeze(-1)).flatten(2)
        x = F.silu(x) @ base.mT + bspline_basis(x, grid, 3).flatten(2) @ flat.mT
    return x


def network(quick: bool) -> None:
    """The published network: forward, and forward with backward, ours and, unless `quick`, torch's."""
    from lesa.kernels.kan import launch_kan_bwd, launch_kan_fwd

    grid = bspline_grid(BASES - 3, 3, (LOW, HIGH), torch.float32).cuda()
    for experts, steps in ((3, 50), (1, 1)):
        sizes = list(zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
        params = [random_layer(experts, 1, *size)[1:] for size in sizes]
        for layer, (inputs, _) in zip(params, sizes, strict=True):
            layer[0] /= inputs**0.5
            layer[1] /= inputs**0.5
        x = torch.rand(experts, steps, WIDTHS[0], device="cuda") * 2 - 1
        grad = torch.randn(experts, steps, 1, device="cuda")
        leaves = [[part.clone().requires_grad_() for part in layer] for layer in params]

        def ours(backward: bool, x: Tensor = x, params: Any = params, grad: Tensor = grad) -> Tensor:
            values = [x]
            for layer in params:
                values.append(launch_kan_fwd(values[-1], *layer, LOW, HIGH))
            flow: Any = grad
            for i in reversed(range(len(params) if backward else 0)):
                flow, *_ = launch_kan_bwd(flow, values[i], *params[i], LOW, HIGH, i > 0)
            return values[-1]

        exact, plain = (
            chain_eager(x.to(dtype), [[part.to(dtype) for part in layer] for layer in params], grid.to(dtype))
            for dtype in (torch.float64, torch.float32)
        )
        with poisoned():
            error = error_of([ours(False)], [exact], [plain])
        chains: dict[str, Any] = {}
        if not quick:
            chains = {"eager": chain_eager, "eager, experts batched": chain_batched}
        if experts > 1 and not quick:
            chains["compiled"] = torch.compile(chain_eager, dynamic=False)
            chains["compiled, experts batched"] = torch.compile(chain_batched, dynamic=False)
        for back in (False, True):
            case = f"{'forward+backward' if back else 'forward'} {experts}x{steps}"
            for graph in (True, False):
                note = "graph" if graph else "launched"
                line(case, "ours", error, time_us(partial(ours, back), 5, graph=graph), note)
                for name, chain in chains.items() if not (graph and back) else ():
                    run = partial(torchs, chain, x, leaves, grid, grad if back else None)
                    try:
                        line(case, name, None, time_us(run, 5, 10, graph), note)
                    except Exception as problem:  # noqa: BLE001 - not every compiled chain can be captured
                        print(f"{case:24} {name} {note} failed: {type(problem).__name__}: {str(problem)[:200]}")


def torchs(chain: Any, x: Tensor, params: Sequence[Sequence[Tensor]], grid: Tensor, grad: Tensor | None) -> None:
    """The network in torch, with its backward where `grad` is given."""
    with torch.set_grad_enabled(grad is not None):
        y = chain(x, params, grid)
        if grad is not None:
            torch.autograd.grad(y, [part for layer in params for part in layer], grad)


def random_row(window: int) -> list[Tensor]:
    """History, slots, weights, bias, alpha, target; two spare slots hold NaN."""
    history = torch.randn(window + 2, *FEATURE, device="cuda", dtype=torch.bfloat16)
    history[:2] = float("nan")
    slots = (torch.randperm(window, device="cuda") + 2).to(torch.int32)
    weights, bias, alpha = (torch.randn(size, device="cuda") for size in (window, 1, ()))
    return [history, slots, weights, bias, alpha, torch.randn(FEATURE, device="cuda", dtype=torch.bfloat16)]


def forecast_formula(row: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    history, slots, weights, bias, alpha, _ = row
    z = torch.zeros(FEATURE, dtype=dtype, device="cuda")
    for slot, weight in zip(slots.tolist(), weights.to(dtype), strict=True):
        z += weight * history[slot].to(dtype)
    return history[int(slots[-1])] + alpha.to(dtype) * (z + bias.to(dtype))


def references(row: Sequence[Tensor]) -> None:
    """What the feature kernels are measured by: a copy, and the plain forecast."""
    from lesa.kernels.forecast import launch_forecast_fwd

    feature = row[0][2:]
    copy = torch.empty_like(feature)
    microseconds = time_us(lambda: copy.copy_(feature), 4)
    bytes_read = feature.numel() * 2
    line("reference", "copy", None, microseconds, f"{2 * bytes_read / microseconds / 1e6:.2f} TB/s")
    microseconds = time_us(lambda: launch_forecast_fwd(None, *row[:4]), 4)
    moved = bytes_read * (WINDOW + 1) / WINDOW
    line("reference", f"forecast, K={WINDOW}", None, microseconds, f"{moved / microseconds / 1e6:.2f} TB/s")


def predict() -> None:
    """Variants of the live forecast."""
    from lesa.kernels.predict import PredictConfig as Cut
    from lesa.kernels.predict import launch_predict_fwd

    row = random_row(WINDOW)
    references(row)
    params = [part[0] / (inputs**0.5 if i < 2 else 1) for inputs, layer in _network() for i, part in enumerate(layer)]
    dt = torch.rand(WIDTHS[0], device="cuda") * 2 - 1
    bytes_moved = row[5].numel() * 2 * (WINDOW + 1)
    cuts = [Cut(block, 1, 256, warps) for block, warps in ((4096, 8), (2048, 4), (2048, 8), (1024, 4), (8192, 8))]
    cuts += [Cut(*tile) for tile in ((4096, 2, 256, 8), (2048, 2, 256, 8), (2048, 2, 128, 4), (2048, 4, 128, 4))]
    for cut in cuts:

        def run(cut: Cut = cut) -> tuple[Tensor, ...]:
            return launch_predict_fwd(*row[:4], dt, params, LOW, HIGH, cut)

        def check(run: Any = run) -> float:
            exact, plain = (
                chain_eager(
                    dt.to(dtype).reshape(1, 1, -1),
                    [[part.to(dtype).unsqueeze(0) for part in params[i : i + 3]] for i in (0, 3, 6)],
                    bspline_grid(BASES - 3, 3, (LOW, HIGH), dtype).cuda(),
                ).reshape(())
                for dtype in (torch.float64, torch.float32)
            )
            forecast, alpha, *_ = run()
            # alpha is one number, which may cancel: its error is relative to 1.
            error = float((alpha - exact).abs() / (2 * ((plain - exact).abs() + 2**-23 * exact.abs().clamp(min=1))))
            given = [*row[:4], alpha, row[5]]
            formulas = [[forecast_formula(given, dtype)] for dtype in (torch.float64, torch.float32)]
            return max(error, error_of([forecast], *formulas))

        attempt("predict", cut, check, run, f"bytes {bytes_moved / 3e6:.1f} us")


def _network() -> list[tuple[int, list[Tensor]]]:
    sizes = zip(WIDTHS[:-1], WIDTHS[1:], strict=True)
    return [(inputs, random_layer(1, 1, inputs, outputs)[1:]) for inputs, outputs in sizes]


def loss() -> None:
    """Variants of the loss."""
    from lesa.kernels.loss import LossConfig as Cut
    from lesa.kernels.loss import launch_predict_loss

    row = random_row(WINDOW)
    references(row)
    features = row[0][row[1].long()].double()
    formulas = []
    for dtype in (torch.float64, torch.float32):
        forecast = forecast_formula(row, dtype)
        error = forecast - row[5].to(dtype)
        sign = error.sign() / error.numel()
        sums = torch.stack([(sign.double() * feature).sum() for feature in features]).to(dtype)
        d_alpha = sums @ row[2].to(dtype) + sign.sum() * row[3][0].to(dtype)
        numbers = [error.abs().mean(), *(row[4] * sums), row[4] * sign.sum(), d_alpha]
        formulas.append([torch.stack([number.to(dtype) for number in numbers]), forecast])
    del features
    cuts = [Cut(128, 16, programs, 4) for programs in (132, 264, 528, 792, 1056, 2112, 4224)]
    cuts += [Cut(128, 16, programs, 4, stages) for programs in (132, 264, 528) for stages in (2, 3, 4)]
    cuts += [
        Cut(256, 16, 528, 8),
        Cut(64, 16, 2112, 2),
        Cut(256, 8, 1056, 8),
        Cut(256, 8, 528, 4),
        Cut(128, 8, 1056, 4),
    ]
    for want in (True, False):
        bytes_moved = row[5].numel() * 2 * (WINDOW + 1 + want)
        for cut in cuts if want else cuts[3:4]:

            def run(cut: Cut = cut, want: bool = want) -> tuple[Tensor, ...]:
                return launch_predict_loss(*row, False, want, cut)

            def check(run: Any = run, want: bool = want) -> float:
                value, forecast, grads = run()
                results = [torch.cat([value.reshape(1), grads]), forecast]
                return error_of(results[: 1 + want], *(formula[: 1 + want] for formula in formulas))

            case = "loss, forecast written" if want else "loss alone"
            attempt(case, cut, check, run, f"bytes {bytes_moved / 3e6:.1f} us")


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between them")
    parser.add_argument("--quick", action="store_true", help="leave torch's networks out")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if not set(chosen) <= set(SECTIONS):
        parser.error(f"--only takes {', '.join(SECTIONS)}; got {options.only}")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), torch.__version__)
    print(f"{'case':24} {'variant':46} {'error':>10} {'time':>12}")
    for name, section in zip(SECTIONS, (layers, partial(network, options.quick), predict, loss), strict=True):
        if name in chosen:
            section()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
