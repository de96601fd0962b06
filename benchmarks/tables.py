"""Every table of figures in README.md and docs/, made from the rows in benchmarks/results.

    python -m benchmarks.tables --check     # exit 1 if a page differs from the rows; CI runs this
    python -m benchmarks.tables --write     # rewrite the pages

A page holds `<!-- table: NAME -->` ... `<!-- end -->`, or `<!-- figure: NAME -->` ... `<!-- end -->` within a line.
What stands between is generated. Where several rows describe the same cell, the newest (the last in the file) counts.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import fitted_table, generic_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"<!-- (table|figure): (\S+) -->(.*?)<!-- end -->", re.DOTALL)
BUDGETS = ("13", "10", "8", "6")
Row = dict[str, str]

# What a table of fitted.csv calls a method: (method, schedule, site, effort).
METHODS = {
    "fewer Euler steps": ("euler", "fewer", "", ""),
    "fewer UniPC steps": ("unipc", "fewer", "", ""),
    "fewer DPM-Solver++ steps": ("dpm++", "fewer", "", ""),
    "reuse, paper's schedule": ("reuse", "paper", "output", ""),
    "taylor-1, paper's schedule": ("taylor-1", "paper", "output", ""),
    "LESA as in the paper": ("lesa", "paper", "hidden", ""),
    "reuse, searched schedule": ("reuse", "searched", "output", ""),
    "taylor-2, searched schedule": ("taylor-2", "searched", "output", ""),
    "hermite-2, searched schedule": ("hermite-2", "searched", "output", ""),
    "regression, searched schedule": ("regression", "searched", "output", ""),
    "`lesa.fit`, quick": ("lesa.fit", "fitted", "output", "quick"),
    "**`lesa.fit`**": ("lesa.fit", "fitted", "output", "default"),
    "`lesa.fit`, thorough": ("lesa.fit", "fitted", "output", "thorough"),
}
HEADLINE = {
    "fewer Euler steps": METHODS["fewer Euler steps"],
    "TaylorSeer (order 1)": METHODS["taylor-1, paper's schedule"],
    "LESA (CVPR 2026), our implementation": METHODS["LESA as in the paper"],
    "**`lesa.fit`**": METHODS["**`lesa.fit`**"],
}
REQUESTS = {
    "20 steps": ("euler", "20"),
    "28 steps": ("euler", "28"),
    "35 steps": ("euler", "35"),
    "100 steps": ("euler", "100"),
    "28 steps, `true_cfg_scale=3`": ("cfg3", "28"),
    "28 steps of Heun": ("heun", "28"),
    "28 steps of DPM-Solver++": ("dpm++", "28"),
    "28 steps of UniPC": ("unipc", "28"),
    "image to image, strength 0.6": ("img2img0.6", "50"),
    "the same, from another caption's picture": ("img2img0.6-other", "50"),
}
SOURCES = ("plan of 50 steps", "statistics of 50 steps", "native quick", "native default")
OPERATORS = {
    "forecast": "weighted sum of cached features",
    "forecast_head": "the same, through the model's head to its output",
    "predict": "KAN and forecast in one kernel",
    "predict_loss": "loss and all gradients",
    "predict_loss_fwd_bwd": "the same through autograd",
    "forecast_errors": "error and size of a forecast, for the check",
    "kan": "KAN, forward",
    "kan_fwd_bwd": "KAN, forward and backward",
    "train_step": "one optimiser step, all included",
}


def rows_of(name: str) -> list[Row]:
    """The rows of a results file, oldest first."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def newest(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], Row]:
    """The newest row of each cell; `columns` say which cell a row belongs to."""
    return {tuple(row[column] for column in columns): row for row in rows}


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def _fits() -> dict[tuple[str, ...], Row]:
    return newest(rows_of("fitted.csv"), "guidance", "method", "schedule", "site", "effort", "computed")


def headline() -> str:
    """README's table: PSNR without guidance, four methods."""
    rows = _fits()
    lines = []
    for name, method in HEADLINE.items():
        cells = [f"{float(rows[('1', *method, budget)]['psnr']):.1f}" for budget in BUDGETS]
        lines.append([name, *(f"**{cell}**" if name.startswith("**") else cell for cell in cells)])
    return markdown(["method", *(f"{budget} steps" for budget in BUDGETS)], lines)


def fitted_summary(guidance: str) -> str:
    """PSNR of chosen methods at one guidance scale; the best of a column is bold."""
    rows = _fits()
    psnr = {name: [float(rows[(guidance, *key, b)]["psnr"]) for b in BUDGETS] for name, key in METHODS.items()}
    best = [max(column) for column in zip(*psnr.values(), strict=True)]
    lines = []
    for name, figures in psnr.items():
        shown = [f"**{x:.2f}**" if x == top else f"{x:.2f}" for x, top in zip(figures, best, strict=True)]
        lines.append([name, *shown])
    return markdown(["method", *(f"{budget} steps" for budget in BUDGETS)], lines)


def fitted_all(guidance: str) -> str:
    """PSNR with standard error and SSIM of every method at one guidance scale."""
    return fitted_table.table_of([row for row in rows_of("fitted.csv") if row["guidance"] == guidance])


def _costs() -> dict[tuple[str, str], list[float]]:
    """What the newest fits took, in full requests, by effort and hardware."""
    fits = [row for row in rows_of("fitted.csv") if row["method"] == "lesa.fit"]
    costs: dict[tuple[str, str], list[float]] = {}
    for row in newest(fits, "effort", "hardware", "guidance", "computed").values():
        costs.setdefault((row["effort"], row["hardware"]), []).append(float(row["generations"]))
    return costs


def _range(figures: Iterable[float], digits: int = 0) -> str:
    """From the lowest to the highest, or the one there is."""
    shown = [f"{figure:.{digits}f}" for figure in sorted(figures)]
    return " to ".join(dict.fromkeys([shown[0], shown[-1]]))


def fit_cost() -> str:
    """What fits take, by effort and hardware."""
    newer = {kind: costs for kind, costs in _costs().items() if kind[0] != "thorough" or "CPU" in kind[1]}
    lines = [[f"`{effort}`", hardware, str(len(costs)), _range(costs)] for (effort, hardware), costs in newer.items()]
    order = ("`quick`", "`default`", "`thorough`")
    lines.sort(key=lambda cells: order.index(cells[0]))
    return markdown(["effort", "hardware", "fits", "full requests"], lines)


def fit_cost_of(effort: str) -> str:
    """What fits of one effort take on any hardware."""
    return _range(cost for (kind, _), costs in _costs().items() for cost in costs if kind == effort)


def transfer() -> str:
    """Requests of other kinds at 8 computed steps, by what their plan is made of."""
    rows = newest(rows_of("transfer.csv"), "case", "steps", "plan")
    lines = [
        [name, *(f"{float(rows[(*case, source)]['psnr']):.2f}" for source in SOURCES)]
        for name, case in REQUESTS.items()
    ]
    return markdown(
        ["request", "the plan of 50 steps", "its statistics", "quick fit there", "default fit there"], lines
    )


def prompts() -> str:
    """Fits by number of prompts."""
    rows = newest(rows_of("prompts.csv"), "guidance", "effort", "prompts")
    counts = sorted({count for _, _, count in rows}, key=int)
    lines = []
    for guidance, effort in dict.fromkeys((guidance, effort) for guidance, effort, _ in rows):
        found = [rows.get((guidance, effort, count)) for count in counts]
        cells = [f"{float(row['psnr']):.1f} ± {float(row['psnr_sem']):.1f}" if row else "" for row in found]
        lines.append(["without" if guidance == "1" else f"scale {guidance}", f"`{effort}`", *cells])
    return markdown(["guidance", "effort", *(f"{count} prompt{'s' * (count != '1')}" for count in counts)], lines)


def build() -> str:
    """How long an adapted plan takes to make; of a machine whose speed scatters, so the fastest run counts."""
    best: dict[tuple[str, str, str], float] = {}
    for row in rows_of("build.csv"):
        cell = row["guidance"], row["scheduler"], row["steps"]
        best[cell] = min(float(row["p50_ms"]), best.get(cell, math.inf))
    columns = (("20", "19"), ("28", "27"), ("50", "49"), ("100", "99"))  # Heun ends one call early
    lines = []
    for guidance, scheduler in dict.fromkeys((guidance, scheduler) for guidance, scheduler, _ in best):
        found = [
            next((best[guidance, scheduler, n] for n in c if (guidance, scheduler, n) in best), None) for c in columns
        ]
        cells = [f"{ms:.0f} ms" if ms is not None else "" for ms in found]
        lines.append([scheduler, "without" if guidance == "1" else f"scale {guidance}", *cells])
    return markdown(["scheduler", "guidance", *(f"{steps} steps" for steps, _ in columns)], lines)


def fidelity() -> str:
    """The paper's method against the closed forms, on the paper's schedules at the hidden site."""
    rows = newest(rows_of("fidelity.csv"), "method", "after", "computed")
    named = {name: (name, "") for name in ("fewer steps", "reuse", "taylor-1", "taylor-2")}
    named |= {"LESA as in the paper": ("lesa", "2"), "LESA with gains": ("lesa", "3")}
    lines = []
    for name, key in named.items():
        found = [rows[(*key, budget)] for budget in ("13", "10", "8")]
        figures = [f"{float(r['psnr']):.2f} ± {float(r['psnr_sem']):.2f}, {float(r['ssim']):.4f}" for r in found]
        lines.append([name, *figures])
    return markdown(["method", "N = 5: 13 steps", "N = 7: 10 steps", "N = 10: 8 steps"], lines)


def ablation() -> str:
    """The paper's ablations: after stage 1 / after stage 2 / with gains."""
    rows = newest(rows_of("ablation.csv"), "alpha", "stages", "prompts", "interval", "after")
    variants = [("kan", "3", "100"), ("mlp", "3", "100"), ("kan", "1", "100"), ("mlp", "1", "100")]
    variants += [("kan", "3", count) for count in ("50", "10", "5", "1")]
    lines = []
    for alpha, stages, count in variants:
        after = "123" if count == "100" else "3"
        cells = []
        for interval in ("5", "7", "10"):
            found = [rows.get((alpha, stages, count, interval, stage)) for stage in after]
            cells.append(" / ".join(f"{float(row['psnr']):.2f}" for row in found if row))
        lines.append([alpha.upper(), {"3": "three", "1": "one"}[stages], count, *cells])
    return markdown(["alpha", "stages", "prompts", "N = 5", "N = 7", "N = 10"], lines)


def operators() -> str:
    """The operators on a GPU at FLUX's size, K = 8."""
    measured = [row for row in rows_of("ops.csv") if "H100" in row["hardware"] and row["k"] in ("8", "")]
    rows = newest(measured, "op", "shape", "dtype", "provider")
    lines = []
    for op, what in OPERATORS.items():
        shape = ("t50x3", "float32") if op.startswith("kan") else ("flux", "bfloat16")
        cells = [_time(rows.get((op, *shape, provider))) for provider in ("triton", "eager", "paper", "compile")]
        ours, copy = rows[(op, *shape, "triton")], rows.get((op, *shape, "copy"))
        share = f"{float(ours['gbps']) / float(copy['gbps']):.0%}" if copy and shape[0] == "flux" else ""
        lines.append([f"`{op}`: {what}", f"**{cells[0]}**", *cells[1:], share])
    head = ["operator", "lesa", "best eager torch", "as in the released code", "torch.compile", "of a copy's bandwidth"]
    return markdown(head, lines)


def operators_cpu() -> str:
    """The forecast on two CPU cores at FLUX's size, K = 8."""
    measured = [row for row in rows_of("ops.csv") if "CPU" in row["hardware"] and row["k"] == "8"]
    rows = newest(measured, "op", "shape", "dtype", "provider")
    kinds = ("float32", "bfloat16")
    lines = [[kind, *(_time(rows["forecast", "flux", kind, who]) for who in ("cpp", "eager"))] for kind in kinds]
    return markdown(["`forecast`", "lesa, C++", "best eager torch"], lines)


def generic(make: Callable[[list[Row]], generic_table.Table]) -> str:
    """A table of plans without a fit; nothing where nothing was measured."""
    rows = generic_table.read(RESULTS / "generic.csv") if (RESULTS / "generic.csv").is_file() else []
    head, lines = make(rows)
    return markdown(head, lines) if lines else ""


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    us = float(row["p50_us"])
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.1f} us"


def demo(requests: str) -> str:
    """What `make demo` prints of one kind of requests."""
    lines = []
    for row in json.loads((RESULTS / "demo.json").read_text()):
        if row["requests"] != requests:
            continue
        quality = ["", ""] if row["psnr"] is None else [f"{row['psnr']:.2f}", f"{row['ssim']:.4f}"]
        method = f"**{row['method']}**" if row["method"].startswith("lesa") else row["method"]
        speed = [f"{row['flops_speedup']:.2f}x", f"{row['speedup']:.2f}x"]
        lines.append([method, str(row["interval"] or ""), str(row["computed"]), *speed, *quality])
    return markdown(["method", "N", "computed", "FLOPs", "speed", "PSNR", "SSIM"], lines)


def _full_size() -> dict[tuple[str, str], list[Row]]:
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows_of("full-size.csv"):
        cells.setdefault((row["model"], row["mode"]), []).append(row)
    return cells


def full_size() -> str:
    """Speed at real size: the time of a full request, and each method's latency speed-up over its FLOPs speed-up."""
    columns = (("fewer steps", ""), ("lesa", "output"), ("lesa", "hidden"))
    lines = []
    for (model, mode), rows in _full_size().items():
        ours = next(row for row in rows if row["method"] == "lesa")
        seconds = f"{float(rows[0]['full_seconds']):.2f} s" if rows[0]["full_seconds"] else ""
        cells = [_ratios(row for row in rows if (row["method"], row["site"]) == column) for column in columns]
        lines.append([model, mode, f"{ours['computed']} of {ours['steps']}", seconds, *cells])
    return markdown(["model", "mode", "computed", "full request", "fewer steps", "lesa, output", "lesa, hidden"], lines)


def full_size_peers() -> str:
    """The same ratio of other libraries and methods."""
    lines = []
    for (model, _), rows in _full_size().items():
        others = dict.fromkeys(r["method"] for r in rows if r["method"] not in ("fewer steps", "lesa"))
        lines += [[model, name, _ratios(row for row in rows if row["method"] == name)] for name in others]
    return markdown(["model", "method", "latency speed-up over FLOPs speed-up"], lines)


def _ratios(rows: Iterable[Row]) -> str:
    ratios = [float(row["ratio"]) for row in rows]
    return _range(ratios, 3) if ratios else ""


def flux(what: str) -> str:
    """FLUX at full size: seconds of a full request, of one by lesa at the hidden site, or how many times faster."""
    rows = [r for r in rows_of("full-size.csv") if r["model"].startswith("FLUX") and r["full_seconds"]]
    row = next(r for r in reversed(rows) if (r["method"], r["site"]) == ("lesa", "hidden"))
    full, faster = float(row["full_seconds"]), float(row["ratio"]) * int(row["steps"]) / int(row["computed"])
    return {"full": f"{full:.1f} s", "lesa": f"{full / faster:.2f} s", "faster": f"{faster:.1f}x"}[what]


def support() -> str:
    """What was tried on each denoiser, and works; cells that were not tried are empty."""
    groups: dict[str, list[Row]] = {}
    for row in newest(rows_of("support.csv"), "pipeline").values():
        groups.setdefault(row["denoiser"], []).append(row)
    lines = []
    for denoiser, rows in sorted(groups.items()):
        names = dict.fromkeys(row["pipeline"].partition(",")[0].removesuffix("Pipeline") for row in rows)
        guidance = dict.fromkeys(row["guidance"] for row in rows if row["guidance"])
        cells = [_agreed(row[column] for row in rows) for column in ("output", "hidden", "compile", "offload", "lora")]
        lines.append([denoiser, ", ".join(names), *cells[:2], ", ".join(guidance), *cells[2:]])
    return markdown(
        ["denoiser", "pipelines", "`output`", "`hidden`", "guidance", "`torch.compile`", "offload", "LoRA"], lines
    )


def _agreed(cells: Iterable[str]) -> str:
    """ "yes" where all that were tried work, else how many do."""
    tried = [cell == "yes" for cell in cells if cell]
    return "" if not tried else "yes" if all(tried) else f"{sum(tried)} of {len(tried)}"


CONTENTS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "fitted": lambda: fitted_summary("1"),
    "fitted-guided": lambda: fitted_summary("3"),
    "fitted-all": lambda: fitted_all("1"),
    "fitted-guided-all": lambda: fitted_all("3"),
    "generic": lambda: generic(lambda rows: generic_table.quality_table(rows, 50)),
    "generic-steps": lambda: generic(generic_table.quality_table),
    "generic-margins": lambda: generic(generic_table.margin_table),
    "fit-cost": fit_cost,
    "fit-cost-quick": lambda: fit_cost_of("quick"),
    "fit-cost-default": lambda: fit_cost_of("default"),
    "transfer": transfer,
    "prompts": prompts,
    "build": build,
    "fidelity": fidelity,
    "ablation": ablation,
    "operators": operators,
    "operators-cpu": operators_cpu,
    "demo": lambda: demo("without guidance"),
    "demo-guided": lambda: demo("with true_cfg_scale=3"),
    "full-size": full_size,
    "full-size-peers": full_size_peers,
    "support": support,
    "flux-full": lambda: flux("full"),
    "flux-lesa": lambda: flux("lesa"),
    "flux-faster": lambda: flux("faster"),
}


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may hold markers."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def filled(page: str) -> str:
    """The page with all that stands between markers made anew.

    Raises:
        ValueError: a marker names no table.
    """

    def made(found: re.Match[str]) -> str:
        kind, name, _ = found.groups()
        if name not in CONTENTS:
            raise ValueError(f"{name!r} is no table or figure: expected one of {', '.join(CONTENTS)}")
        text = CONTENTS[name]()
        around = "\n\n" if kind == "table" else ""  # a blank line ends the comment's HTML block
        return f"<!-- {kind}: {name} -->{around}{text}{around}<!-- end -->"

    return MARKED.sub(made, page)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Check or rewrite the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="exit 1 if a page differs from the rows")
    what.add_argument("--write", action="store_true", help="rewrite the pages")
    options = parser.parse_args(arguments)
    differ = {page: new for page in pages(root) if (new := filled(page.read_text())) != page.read_text()}
    for page, new in differ.items():
        if options.write:
            page.write_text(new)
        print(f"{page.relative_to(root)}: {'rewritten' if options.write else 'differs from benchmarks/results'}")
    if differ and options.check:
        print("python -m benchmarks.tables --write rewrites them", file=sys.stderr)
    return 1 if differ and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
