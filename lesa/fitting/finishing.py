"""The plan that a fit returns: the best candidate, with what the guard and plans on the fly need, and all figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..models.denoisers import denoiser_of
from ..planner.build import expectations, expected_by
from ..planner.surrogate import Surrogate, interpolated_error_gains
from ..plans.plan import Plan
from ..runtime.likeness import Likeness, likeness_of
from .candidates import served
from .refining import Candidate
from .trials import Measured, Trials

_NOT_ALWAYS = ("fitting_ssim", "held_out_ssim", "skipped")  # figures that a given plan may have of an earlier fit


def finished(
    best: Candidate,
    error_gains: np.ndarray,
    figures: Mapping[str, Any],
    trials: Trials,
    held: Trials | None,
    likeness: Likeness,
) -> Plan:
    """The plan of the best candidate, run on the requests that were held out.

    Args:
        best: of the fit.
        error_gains: [C, T, P] of the fit's surrogate, for a best candidate that was not run.
        figures: of the fit.
        trials: the fitting requests.
        held: those that are only measured.
        likeness: of all of them.
    """
    kept_out = None if held is None else held.run(best.plan)
    if held is not None and kept_out is not None:
        held.judge(kept_out)
    plan = served(best.plan, trials.statistics)
    told = {
        **{name: figure for name, figure in plan.training.items() if name not in _NOT_ALWAYS},
        **figures,
        "fitting_psnr": None if best.measured is None else best.score,
        "held_out_psnr": None if kept_out is None else kept_out.score,
        **_ssim("fitting_ssim", best.measured),
        **_ssim("held_out_ssim", kept_out),
    }
    model = _surrogate(best, error_gains, trials)
    plan = replace(plan, training=told, surrogate=None if model is None else model.to_arrays(), likeness=likeness)
    measured = [part for part in (best.measured, kept_out) if part is not None] if best.measured is not None else []
    return replace(plan, expected=_expected(plan, model, trials, measured))


def remembered(target: Any, parts: Sequence[Trials]) -> Likeness:
    """What the guard compares later requests with: all that were recorded."""
    references = [reference for part in parts for reference in part.references]
    contexts = {context for reference in references for context in reference.embeddings}
    embeddings = {
        context: torch.cat([r.embeddings[context] for r in references if context in r.embeddings])
        for context in sorted(contexts)
    }
    return likeness_of(embeddings, denoiser_of(target))


def _surrogate(best: Candidate, error_gains: np.ndarray, trials: Trials) -> Surrogate | None:
    """What plans for other requests are made of; of the output site, as they are."""
    if best.plan.site != "output":
        return None
    if best.measured is not None:
        error_gains = interpolated_error_gains(best.measured.error_gains, best.computed, trials.statistics.num_steps)
    return trials.surrogate(error_gains).thinned()


def _expected(plan: Plan, model: Surrogate | None, trials: Trials, measured: Sequence[Measured]) -> Mapping[str, Any]:
    """What the guard may expect of a plan's checks; those of a given plan that are of other features it knows."""
    reads = {read for own in plan.checks.values() for row in own.values() for read in row.steps}
    if model is None or not reads <= set(plan.computed):
        return plan.expected
    if not measured:
        return expected_by(model, plan)
    # Inner products at the computed steps, which is all that checks read.
    run = np.concatenate([part.outcome.basis for part in measured])
    N, T, grams = plan.budget, plan.num_steps, {}
    for c, context in enumerate(trials.statistics.contexts):
        grams[context] = np.zeros((len(run), T, T))
        own = slice(c * N, (c + 1) * N)
        grams[context][:, np.array(plan.computed)[:, None], plan.computed] = run[:, own, own]
    return expectations(plan.checks, grams, measured=True)


def _ssim(name: str, measured: Measured | None) -> dict[str, float]:
    """SSIM where there are pictures."""
    return {} if measured is None or measured.ssim is None else {name: float(measured.ssim.mean())}
