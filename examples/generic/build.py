"""Pack what gather.py recorded into the file that comes with lesa.

python build.py --run build/generic --out ../../lesa/assets/generic.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from models import MODELS
from safetensors.numpy import save_file

from lesa.planner.generic import ASSET, KIND
from lesa.planner.statistics import packed
from lesa.plans.storage import metadata

PREDICTIONS = {"flow": "flow_prediction", "epsilon": "epsilon"}


def main() -> None:
    """Average over the requests, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("build/generic"))
    parser.add_argument("--out", type=Path, default=ASSET)
    options = parser.parse_args()
    recorded = np.load(options.run / "recorded.npz")
    arrays, described = {}, []
    for name in ("emoji-flux", *MODELS):
        for label in ("plain", "guided"):
            key = f"{name}.{label}"
            grams = recorded[f"{key}.grams"]
            arrays[f"{key}.gram"] = packed(grams.mean(0))
            arrays |= {f"{key}.{part}": recorded[f"{key}.{part}"].astype(np.float64) for part in ("alpha", "sigma")}
            prediction = PREDICTIONS[MODELS[name].prediction] if name in MODELS else "flow_prediction"
            more = {"guided": label == "guided", "prediction": prediction, "requests": len(grams)}
            described.append({"name": name, "key": key, **more})
    save_file(arrays, options.out, metadata({"format": KIND.format, "sources": described}))
    print(options.out, options.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
