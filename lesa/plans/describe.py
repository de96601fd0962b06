"""A plan in words, for a terminal, a model card and a picture's title."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from .plan import Plan

# Figures of fitting, as people want to read them.
_LABELS = {
    "effort": ("effort", "{}"),
    "fitting_psnr": ("fitting", "{:.2f} dB PSNR"),
    "fitting_ssim": ("fitting", "{:.4f} SSIM"),
    "held_out_psnr": ("held out", "{:.2f} dB PSNR"),
    "held_out_ssim": ("held out", "{:.4f} SSIM"),
    "prompts": ("prompts", "{}"),
    "held_out": ("besides", "{} held out"),
    "seconds": ("took", "{:.1f} s"),
    "generations": ("cost", "the time of {:.1f} full requests"),
    "evaluations": ("compared", "{} plans"),
    "found": ("of these", "{} in an earlier fit"),
    "schedule": ("best plan", "{}"),
}
# what the lines above the figures say already
_SAID = {"alphas", "budget", "stages"}
_COMPUTED, _FORECAST = "#", "."
_LINE, _GROUP = 50, 10


def describe(plan: Plan) -> str:
    """A plan in words: a line for each fact, its schedule drawn, and the known figures of how it was made."""
    lines = [
        f"forecaster   {plan.forecaster}, site {plan.site}, contexts {', '.join(plan.rows) or 'none'}",
        f"schedule     {plan.budget} of {plan.num_steps} steps computed: {' '.join(map(str, plan.computed))}",
        *(f"{'':<13}{line}" for line in drawing(plan)),
        f"sigmas       {plan.sigmas[0]:.4g} to {plan.sigmas[-1]:.4g}",
        f"denoiser     {plan.denoiser or 'any'}, configuration {plan.config_hash or 'any'}",
        f"history      {plan.capacity} features a context",
    ]
    if plan.stages:
        stages = ", ".join(f"{s.name} (window {s.window}, sigma > {s.low:g})" for s in plan.stages)
        lines.append(f"stages       {stages}")
    errors = [expected.error for steps in plan.expected.values() for expected in steps.values()]
    if errors:
        lines.append(f"expected     relative error {min(errors):.3g} to {max(errors):.3g} at computed steps")
    else:
        lines.append("guard        none: the plan does not say which errors to expect")
    if plan.surrogate is not None:
        size = sum(array.nbytes for name, array in plan.surrogate.items() if name != "contexts") / 1000
        lines.append(
            f"adapts       to other step counts, spacings and budgets, out of what it knows of "
            f"{len(plan.surrogate['grams'])} requests, {size:.0f} KB"
        )
    if plan.likeness is not None and (plan.likeness.prompts or plan.likeness.weights):
        known = [f"prompts of {context}" for context in plan.likeness.prompts]
        known += ["weights"] if plan.likeness.weights is not None else []
        lines.append(f"likeness     the guard knows the fitted {' and '.join(known)}")
    lines += [f"{name:<12} {value}" for name, value in figures(plan.training)]
    lines.append(f"written by   lesa {plan.library_version or '(not saved yet)'}")
    return "\n".join(lines)


def drawing(plan: Plan) -> list[str]:
    """The schedule as text, "#" for a computed step and "." for a forecast one: 50 steps a line, in tens."""
    computed = set(plan.computed)
    marks = "".join(_COMPUTED if step in computed else _FORECAST for step in range(plan.num_steps))
    tens = [marks[i : i + _GROUP] for i in range(0, len(marks), _GROUP)]
    return [" ".join(tens[i : i + _LINE // _GROUP]) for i in range(0, len(tens), _LINE // _GROUP)]


def figures(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of `Plan.training` as (name, value): those that `lesa.fit` writes first, then other scalars.

    Lists and tables are left out: they are for programs.
    """
    known = [
        (label, _known(form, training[key])) for key, (label, form) in _LABELS.items() if training.get(key) is not None
    ]
    others = [
        (name, _plain(value))
        for name, value in training.items()
        if name not in _LABELS and name not in _SAID and isinstance(value, (str, int, float))
    ]
    return known + others


def _known(form: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):  # the prompts themselves
        value = len(value)
    return form.format(value) if isinstance(value, (int, float)) else _plain(value)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else textwrap.shorten(str(value), 80, placeholder=" ...")
