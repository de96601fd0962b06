"""Plan: which steps a request computes, and the weights that forecast the others.

Everything learned or searched ends in a `Plan`. The runtime reads plans and nothing else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .routing import Stage

if TYPE_CHECKING:
    from ..runtime.likeness import Likeness

ANY_CONTEXT = "*"
SITES = ("hidden", "output")
MAX_READS = 16
PLAN_FILE = "plan.safetensors"


class PlanError(ValueError):
    """A plan is malformed, unreadable, or does not fit the denoiser or the request."""


@dataclass(frozen=True)
class Row:
    """One forecast: F^_t = sum_k weights[k] * F_{steps[k]} + bias.

    Args:
        steps: earlier step indices of the same request, computed or forecast alike.
        weights: one weight a step.
        bias: added to every element.
    """

    steps: tuple[int, ...]
    weights: tuple[float, ...]
    bias: float = 0.0

    @cached_property
    def gain(self) -> float:
        """How many times larger than what it reads the forecast can be, without its bias."""
        return sum(map(abs, self.weights))


@dataclass(frozen=True)
class Expected:
    """The relative error ||F^ - F|| / ||F|| of one check in the fitting requests.

    Args:
        error: its geometric mean, at least 0.
        std: the standard deviation of its natural logarithm, above 0.
    """

    error: float
    std: float


@dataclass(frozen=True)
class Plan:
    """A schedule and the rows that forecast the steps it leaves out.

    Args:
        computed: steps the denoiser computes, ascending, step 0 among them.
        sigmas: the T + 1 noise levels of the request, the final 0 included.
        rows: for each context the `Row` of every forecast step; the context "*" serves all contexts not named.
        site: "hidden" (before the final norm and projection) or "output" (what the denoiser returns).
        forecaster: the source of the weights, e.g. "taylor-1" or "lesa".
        timesteps: the denoiser's timestep argument at each of the T steps, where recorded; a bare
            denoiser's calls are checked against it.
        denoiser: class name of the denoiser the plan was made for; None fits any.
        config_hash: hash of that denoiser's configuration; None fits any.
        stages: the stages of the forecaster, for pictures and provenance.
        training: figures of how the plan was made, JSON-able.
        checks: for each context the forecast that would have been made of computed steps, which the guard compares
            with the truth; "*" as in `rows`.
        expected: for each context how large the errors of those forecasts were in fitting; "*" as in `rows`.
        impulse_response: [T], what one unit of each step's output does to the final sample; None takes Euler steps
            along a flow, the differences of `sigmas`. The guard repays by it.
        surrogate: arrays of the model of the fitting requests, of `lesa.planner.surrogate.Surrogate.to_arrays`, for
            `lesa.planner.build.adapt`; for the output site only. Plans that differ in nothing else are equal.
        likeness: what the guard knows of the prompts and the weights that the plan was fitted to.

    Raises:
        PlanError: a value is out of place; the message names it.
    """

    computed: tuple[int, ...]
    sigmas: tuple[float, ...] = field(repr=False)
    rows: Mapping[str, Mapping[int, Row]] = field(default_factory=dict, repr=False)
    site: str = "hidden"
    forecaster: str = "custom"
    timesteps: tuple[float, ...] | None = field(default=None, repr=False)
    denoiser: str | None = None
    config_hash: str | None = None
    stages: tuple[Stage, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict, repr=False)
    library_version: str | None = None
    checks: Mapping[str, Mapping[int, Row]] = field(default_factory=dict, repr=False)
    expected: Mapping[str, Mapping[int, Expected]] = field(default_factory=dict, repr=False)
    impulse_response: tuple[float, ...] | None = field(default=None, repr=False)
    surrogate: Mapping[str, np.ndarray] | None = field(default=None, repr=False, compare=False)
    likeness: Likeness | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", tuple(int(s) for s in self.computed))
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
        if self.impulse_response is not None:
            object.__setattr__(self, "impulse_response", tuple(float(r) for r in self.impulse_response))
        self._check_schedule()
        for context, rows in self.rows.items():
            self._check_rows(context, rows)
        for context, rows in self.checks.items():
            self._check_checks(context, rows)
        for context, errors in self.expected.items():
            self._check_expected(context, errors)
        if self.surrogate is not None:
            self._check_surrogate(self.surrogate)
        if self.likeness is not None and not self.likeness.is_finite:
            raise PlanError("likeness holds numbers that are not finite, or a scatter not above 0: fit the plan again")

    @property
    def num_steps(self) -> int:
        """T, the number of steps of a request."""
        return len(self.sigmas) - 1

    @property
    def budget(self) -> int:
        """The number of computed steps."""
        return len(self.computed)

    def rows_of(self, context: str) -> Mapping[int, Row]:
        """The rows that serve `context`: its own, else those of "*", else none."""
        return self.rows.get(context, self.rows.get(ANY_CONTEXT, {}))

    def checks_of(self, context: str) -> Mapping[int, Row]:
        """The checks that serve `context`: its own, else those of "*", else none."""
        return self.checks.get(context, self.checks.get(ANY_CONTEXT, {}))

    def expected_of(self, context: str) -> Mapping[int, Expected]:
        """The expected errors that serve `context`: its own, else those of "*", else none."""
        return self.expected.get(context, self.expected.get(ANY_CONTEXT, {}))

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The history slot of each step's feature, -1 where no later row or check reads it.

        A slot is taken again as soon as the last reader of its feature has run, so the history holds
        as few features as the rows allow. A check runs before the feature of its step is stored.
        """
        last_reader = [-1] * self.num_steps
        for rows in (*self.rows.values(), *self.checks.values()):
            for step, row in rows.items():
                for read in row.steps:
                    last_reader[read] = max(last_reader[read], step)
        slots: list[int] = [-1] * self.num_steps
        free_after: list[int] = []
        for step, reader in enumerate(last_reader):
            if reader < 0:
                continue
            slot = next((i for i, until in enumerate(free_after) if until <= step), len(free_after))
            if slot == len(free_after):
                free_after.append(reader)
            free_after[slot] = reader
            slots[step] = slot
        return tuple(slots)

    @property
    def capacity(self) -> int:
        """How many features the history of one context holds at most."""
        return max(self.slots, default=-1) + 1

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as safetensors with JSON metadata; `path` is replaced at once or not at all.

        Raises:
            PlanError: `path` is a folder.
        """
        from . import planfile

        return planfile.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            PlanError: the file is missing, damaged, or no plan; the message says which and what to do.
        """
        from . import planfile

        return planfile.load(path)

    def save_pretrained(self, folder: str | os.PathLike[str], filename: str = PLAN_FILE) -> Path:
        """Write the plan and a model card into `folder`, for `from_pretrained`; see `lesa.hub.save_pretrained`."""
        from . import hub

        return hub.save_pretrained(self, folder, filename)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        path_in_repo: str = PLAN_FILE,
    ) -> str:
        """Upload the plan and a model card, and return the commit's address; see `lesa.hub.push_to_hub`."""
        from . import hub

        return hub.push_to_hub(
            self, repo_id, commit_message=commit_message, private=private, token=token, path_in_repo=path_in_repo
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        filename: str = PLAN_FILE,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Plan:
        """Read a plan from a file, a folder, or a hub repository "owner/name"; see `lesa.hub.from_pretrained`."""
        from . import hub

        return hub.from_pretrained(
            name_or_path,
            filename=filename,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )

    @classmethod
    def join(cls, plans: Mapping[str, Plan]) -> Plan:
        """One plan out of plans for single contexts, e.g. {"cond": ..., "uncond": ...}.

        The figures of training are the first plan's, but for the alphas, which are kept for each context; surrogate and
        likeness too, where all plans have the same.

        Raises:
            PlanError: the plans differ in anything but rows and training.
        """
        if not plans:
            raise PlanError("plans is empty: give at least one plan")
        first = next(iter(plans.values()))
        for context, plan in plans.items():
            shared = (
                "computed",
                "sigmas",
                "site",
                "timesteps",
                "impulse_response",
                "denoiser",
                "config_hash",
                "stages",
            )
            for name in shared:
                if getattr(plan, name) != getattr(first, name):
                    raise PlanError(
                        f"plans differ in {name} at context {context!r}: join plans of one schedule and model"
                    )
        rows = {context: plan.rows_of(context) for context, plan in plans.items()}
        checks = {context: plan.checks_of(context) for context, plan in plans.items() if plan.checks}
        expected = {context: plan.expected_of(context) for context, plan in plans.items() if plan.expected}
        training = dict(first.training)
        if all("alphas" in plan.training for plan in plans.values()):
            training["alphas"] = {c: next(iter(plan.training["alphas"].values())) for c, plan in plans.items()}
        surrogate = first.surrogate if all(plan.surrogate is first.surrogate for plan in plans.values()) else None
        likeness = first.likeness if all(plan.likeness == first.likeness for plan in plans.values()) else None
        tables: dict[str, Any] = {"rows": rows, "checks": checks, "expected": expected}
        return replace(first, **tables, training=training, surrogate=surrogate, likeness=likeness)

    def _check_schedule(self) -> None:
        total = self.num_steps
        if total < 1 or not all(math.isfinite(s) for s in self.sigmas):
            raise PlanError(f"sigmas={self.sigmas!r}: expected the T + 1 finite noise levels of a request")
        if list(self.computed) != sorted(set(self.computed)) or not self.computed or self.computed[0] != 0:
            raise PlanError(f"computed={self.computed!r}: expected ascending steps, the first of them 0")
        if self.computed[-1] >= total:
            raise PlanError(f"computed step {self.computed[-1]} is outside a request of {total} steps")
        if self.site not in SITES:
            raise PlanError(f"site={self.site!r}: expected one of {SITES}")
        for name in ("timesteps", "impulse_response"):
            values = getattr(self, name)
            if values is not None and (len(values) != total or not all(map(math.isfinite, values))):
                raise PlanError(f"{name} has {len(values)} entries: expected {total} finite numbers, one a step")
        if len(self.computed) < total and not self.rows:
            raise PlanError("rows is empty: every step that is not computed needs a row")

    def _check_rows(self, context: str, rows: Mapping[int, Row]) -> None:
        forecast = set(range(self.num_steps)) - set(self.computed)
        missing = forecast - set(rows)
        if missing:
            raise PlanError(f"context {context!r} has no row for forecast steps {sorted(missing)}")
        for step, row in rows.items():
            if step not in forecast:
                raise PlanError(
                    f"row of context {context!r}, step {step}: the step is computed or outside the request; rows are "
                    "for forecast steps"
                )
            if not _is_sound(row, step):
                _refuse(row, step, f"row of context {context!r}, step {step}")

    def _check_checks(self, context: str, rows: Mapping[int, Row]) -> None:
        for step, row in rows.items():
            where = f"check of context {context!r}, step {step}"
            if step not in self.computed:
                raise PlanError(f"{where}: the step is not computed; checks are for computed steps {self.computed}")
            if not _is_sound(row, step):
                _refuse(row, step, where)

    def _check_expected(self, context: str, errors: Mapping[int, Expected]) -> None:
        for step, error in errors.items():
            where = f"expected error of context {context!r}, step {step}"
            if step not in self.checks_of(context):
                raise PlanError(f"{where}: the step has no check; give `checks` a row for it, or leave it out")
            if not (0 <= error.error < math.inf and 0 < error.std < math.inf):
                raise PlanError(f"{where} is {error}: expected a finite error of at least 0 and a std above 0")

    def _check_surrogate(self, arrays: Mapping[str, np.ndarray]) -> None:
        if self.site != "output":
            raise PlanError(f"surrogate with site={self.site!r}: plans made of it are of the output site; leave it out")
        names = ("slopes", "grams", "response", "guidance", "contexts")
        if missing := [name for name in names if name not in arrays]:
            raise PlanError(f"surrogate lacks {missing}: give what Surrogate.to_arrays makes, or fit the plan again")
        slopes, *others = (np.asarray(arrays[name]) for name in names)
        C, T, P = slopes.shape if slopes.ndim == 3 else (0, 0, 0)
        shapes = [(P, C * T * (C * T + 1) // 2), (T * (T + 1) // 2,), (C,), (C,)]
        if self.num_steps != T or not C or [array.shape for array in others] != shapes:
            raise PlanError(
                f"surrogate of {T} steps and contexts {tuple(arrays['contexts'])}: expected the {self.num_steps} steps "
                "of the plan, named contexts and arrays of their shapes"
            )
        if not all(np.isfinite(array).all() for array in (slopes, *others[:-1])):
            raise PlanError("surrogate holds numbers that are not finite: fit the plan again")


def _is_sound(row: Row, step: int) -> bool:
    """Whether a row may serve a step; a plan made while a request waits has some hundreds of them."""
    return (
        1 <= len(row.steps) == len(row.weights) <= MAX_READS
        and min(row.steps) >= 0
        and max(row.steps) < step
        and all(map(math.isfinite, row.weights))
        and math.isfinite(row.bias)
    )


def _refuse(row: Row, step: int, where: str) -> None:
    """Say why a row may not serve a step."""
    if len(row.steps) != len(row.weights) or not 1 <= len(row.steps) <= MAX_READS:
        raise PlanError(
            f"{where}: {len(row.steps)} steps and {len(row.weights)} weights; expected as many of "
            f"each, 1 to {MAX_READS}"
        )
    if not all(0 <= read < step for read in row.steps):
        raise PlanError(f"{where}: reads steps {row.steps}; only earlier steps of the request can be read")
    raise PlanError(f"{where}: weights {row.weights} and bias {row.bias} must be finite")
