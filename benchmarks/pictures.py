"""The picture of README.md, from the rows of benchmarks/results/fitted.csv: quality against computed steps.

python -m benchmarks.pictures     # writes docs/images/frontier.png
"""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.tables import BUDGETS, METHODS, ROOT, newest, rows_of

LINES = {  # name: (method of the tables, colour, width, marker)
    "lesa.fit": ("**`lesa.fit`**", "#c2185b", 2.6, "o"),
    "lesa.fit, quick": ("`lesa.fit`, quick", "#e58aae", 1.6, "o"),
    "LESA (CVPR 2026)": ("LESA as in the paper", "#3f51b5", 1.6, "s"),
    "TaylorSeer (order 1)": ("taylor-1, paper's schedule", "#00897b", 1.6, "^"),
    "reuse": ("reuse, paper's schedule", "#f9a825", 1.6, "v"),
    "fewer Euler steps": ("fewer Euler steps", "#757575", 1.6, "x"),
}


def main() -> None:
    """Draw PSNR by computed steps, without guidance on the left and with it on the right."""
    rows = newest(rows_of("fitted.csv"), "guidance", "method", "schedule", "site", "effort", "computed")
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    for axis, guidance, title in zip(axes, "13", ("without guidance", "with guidance (scale 3)"), strict=True):
        for name, (method, colour, width, marker) in LINES.items():
            found = [rows[(guidance, *METHODS[method], budget)] for budget in BUDGETS]
            steps, psnr = [int(row["computed"]) for row in found], [float(row["psnr"]) for row in found]
            axis.plot(steps, psnr, color=colour, linewidth=width, marker=marker, markersize=5, label=name)
        _finish(axis, title)
    axes[0].set_ylabel("PSNR to all 50 steps (dB)")
    axes[0].legend(frameon=False, fontsize=8)
    folder = ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "frontier.png", dpi=150)


def _finish(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("computed steps of 50")
    axis.set_xticks([int(budget) for budget in BUDGETS])
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
