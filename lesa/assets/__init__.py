"""The bundled pipeline emoji-flux, its captions and its plans."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PIPELINE = HERE / "emoji-flux"
INTERVALS = (5, 7, 10)
BUDGETS = (13, 10, 8, 6)

# Keywords of a call of this pipeline, pipe(prompt, **REQUEST). FLUX's defaults (1024x1024 pictures, 512 text tokens)
# are far larger than what emoji-flux was trained on. num_inference_steps must be the plan's number of steps, 50 for the
# bundled plans.
REQUEST = {"num_inference_steps": 50, "height": 64, "width": 64, "max_sequence_length": 16}
GUIDANCE = {"true_cfg_scale": 3.0, "negative_prompt": ""}  # FLUX's own keywords for guidance

_FITTING, _HELD_OUT = 100, 64


def load(device: str = "cpu") -> Any:
    """emoji-flux as a diffusers pipeline, in float32 on the given device, without its own progress bar."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(PIPELINE).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fitting_prompts() -> list[str]:
    """The 100 captions on which the bundled plans were trained."""
    return _shuffled()[:_FITTING]


def held_out_prompts() -> list[str]:
    """64 captions that no predictor was trained on."""
    return _shuffled()[_FITTING : _FITTING + _HELD_OUT]


def held_out_seeds() -> list[int]:
    """Seeds of the held-out captions' noise, apart from the fitting prompts' 0 to 99."""
    return list(range(1000, 1000 + _HELD_OUT))


def plan_path(interval: int) -> Path:
    """The bundled LESA plan for a computed step every `interval` steps.

    Raises:
        ValueError: there is none for this interval.
    """
    if interval not in INTERVALS:
        raise ValueError(f"interval={interval!r}: the bundled plans are for intervals {', '.join(map(str, INTERVALS))}")
    return HERE / f"emoji-flux-lesa-n{interval}.safetensors"


def fitted_path(budget: int) -> Path:
    """The bundled plan that `lesa.fit` made of 8 fitting prompts for `budget` computed steps.

    Raises:
        ValueError: none is bundled for this budget.
    """
    if budget not in BUDGETS:
        raise ValueError(
            f"budget={budget!r}: fitted plans are bundled for {', '.join(map(str, BUDGETS))} computed steps"
        )
    return HERE / f"emoji-flux-fitted-{budget}.safetensors"


def guided_path() -> Path:
    """The bundled plan that `lesa.fit` made of 8 fitting prompts with `GUIDANCE`, for 8 computed steps."""
    return HERE / "emoji-flux-guided-8.safetensors"


def _shuffled() -> list[str]:
    captions = (HERE / "captions.txt").read_text().splitlines()
    random.Random(0).shuffle(captions)
    return captions
