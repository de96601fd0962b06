"""Plan: which steps a request computes, and the weights that forecast the others.

Everything learned or searched ends in a `Plan`. The runtime reads plans and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .rows import (
    ANY_CONTEXT,
    SITES,
    Errors,
    Expected,
    PlanError,
    Row,
    Rows,
    check_array,
    errors_from_arrays,
    errors_to_arrays,
    rows_from_arrays,
    rows_to_arrays,
)
from .schedule import Stage
from .storage import Kind, SafetensorsFile, card

PLAN_FILE = "plan.safetensors"
_NONE = type(None)
# Saved as plain JSON of these types.
_PLAIN: dict[str, tuple[type, ...]] = {
    "site": (str,),
    "forecaster": (str,),
    "denoiser": (str, _NONE),
    "config_hash": (str, _NONE),
    "training": (dict,),
    "library_version": (str, _NONE),
}
# The label and the format of each figure of fitting.
_LABELS = {
    "effort": ("effort", "{}"),
    "fitting_psnr": ("fitting", "{:.2f} dB PSNR"),
    "fitting_ssim": ("fitting", "{:.4f} SSIM"),
    "held_out_psnr": ("held out", "{:.2f} dB PSNR"),
    "held_out_ssim": ("held out", "{:.4f} SSIM"),
    "prompts": ("prompts", "{}"),
    "held_out": ("held-out prompts", "{}"),
    "seconds": ("fitting time", "{:.1f} s"),
    "generations": ("cost", "the time of {:.1f} full requests"),
    "evaluations": ("plans compared", "{}"),
    "schedule": ("best plan", "{}"),
}
_MOST_STEPS, _DEEPEST, _LARGEST = 4_000, 16, 2**63  # of a plan, of `training`, of its integers
_SURROGATE = "surrogate_"  # name prefix of its arrays
_SAID = {"alphas", "budget", "stages"}  # already printed above
# The surrogate's arrays, by their names in files.
_SURROGATE_ARRAYS = {
    "slopes": "error gains [C, T, P]",
    "grams": "Gram matrices [P, ...]",
    "response": "impulse response [T (T + 1) / 2]",
    "guidance": "guidance [C]",
    "contexts": "contexts [C]",
}


@dataclass(frozen=True)
class Plan(SafetensorsFile):
    """A schedule and the rows that forecast the steps it leaves out.

    Args:
        computed: steps the denoiser computes, ascending, step 0 among them.
        sigmas: the T + 1 noise levels of the request, the final 0 included.
        rows: for each context the `Row` of every forecast step; "*" is for all contexts not named.
        site: "hidden" (before the final norm and projection) or "output" (what the denoiser returns).
        forecaster: the source of the weights, e.g. "taylor-1" or "lesa".
        timesteps: the denoiser's timestep argument at each of the T steps, to check a bare denoiser's calls; or None.
        denoiser: class name of the plan's denoiser; None fits any.
        config_hash: hash of that denoiser's configuration; None fits any.
        stages: the stages of the forecaster, for pictures and provenance.
        training: time, cost and quality of the fit or training, JSON-able.
        checks: rows that forecast computed steps, only to compare with the true feature; "*" as in `rows`.
        expected: for each context the errors of the checks in fitting; "*" as in `rows`.
        surrogate: the surrogate's arrays (`Surrogate.to_arrays`), which `adapt` needs; for the output site only.
            Ignored by ==.

    Raises:
        PlanError: a value is not valid; the message names it.
    """

    kind: ClassVar[Kind] = Kind(
        "plan",
        "lesa-plan-1",
        PLAN_FILE,
        PlanError,
        "Plan.save",
        {"lesa-statistics": "holds statistics, which need a budget, e.g. lesa.enable(pipe, path, budget=10)"},
    )

    computed: tuple[int, ...]
    sigmas: tuple[float, ...] = field(repr=False)
    rows: Rows = field(default_factory=dict, repr=False)
    site: str = "hidden"
    forecaster: str = "custom"
    timesteps: tuple[float, ...] | None = field(default=None, repr=False)
    denoiser: str | None = None
    config_hash: str | None = None
    stages: tuple[Stage, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict, repr=False)
    library_version: str | None = None
    checks: Rows = field(default_factory=dict, repr=False)
    expected: Errors = field(default_factory=dict, repr=False)
    surrogate: Mapping[str, np.ndarray] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", tuple(int(s) for s in self.computed))
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
        self._check_schedule()
        for context, rows in self.rows.items():
            self._check_rows(context, rows)
        for context, rows in self.checks.items():
            self._check_checks(context, rows)
        for context, errors in self.expected.items():
            self._check_expected(context, errors)
        if self.surrogate is not None:
            self._check_surrogate(self.surrogate)

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
        """The history slot of each step's feature, -1 if no later row or check reads it.

        A slot is free again after the last reader of its feature, so the history holds as few features as the rows
        allow. A check runs before the feature of its step is stored.
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

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The plan as arrays and a description, see `SafetensorsFile`."""
        arrays: dict[str, np.ndarray] = {
            "computed": np.asarray(self.computed, np.int32),
            "sigmas": np.asarray(self.sigmas, np.float64),
            **rows_to_arrays("", self.rows, self.num_steps),
            **rows_to_arrays("check_", self.checks, self.num_steps),
            **errors_to_arrays(self.expected, self.num_steps),
        }
        if self.timesteps is not None:
            arrays["timesteps"] = np.asarray(self.timesteps, np.float64)
        description: dict[str, Any] = {
            "contexts": sorted(self.rows),
            "check_contexts": sorted(self.checks),
            "expected_contexts": sorted(self.expected),
            "num_steps": self.num_steps,
            "stages": [asdict(stage) for stage in self.stages],
            **{name: getattr(self, name) for name in _PLAIN},
            "training": dict(self.training),
            "library_version": _version(),
        }
        if self.surrogate is not None:
            parts = dict(self.surrogate)
            description["surrogate_contexts"] = parts.pop("contexts").tolist()
            arrays |= {f"{_SURROGATE}{name}": array for name, array in parts.items()}
        return {name: array for name, array in arrays.items() if array.size}, description

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], description: dict[str, Any]) -> Plan:
        """The plan that `to_arrays` or an earlier version wrote."""
        steps, T = arrays["computed"], len(arrays["sigmas"]) - 1
        check_array("computed", steps, "i", (steps.size,))
        check_array("sigmas", arrays["sigmas"], "f", (T + 1,))
        if "timesteps" in arrays:
            check_array("timesteps", arrays["timesteps"], "f", (T,))
        _check_steps(T)
        if description["num_steps"] != T:
            raise PlanError(f"num_steps={description['num_steps']!r:.80}, but there are {T + 1} sigmas")
        _check_description(description)
        computed = tuple(steps.tolist())
        forecast = sorted(set(range(T)) - set(computed))
        # Earlier files lack checks and expected errors; only fitted plans have a surrogate.
        checks = rows_from_arrays("check_", arrays, description.get("check_contexts", []), computed, T)
        surrogate = None
        if (surrogate_contexts := description.get("surrogate_contexts")) is not None:
            own = {name.removeprefix(_SURROGATE): array for name, array in arrays.items() if _SURROGATE in name}
            surrogate = own | {"contexts": np.array(surrogate_contexts)}
        return cls(
            computed=computed,
            sigmas=tuple(arrays["sigmas"].tolist()),
            rows=rows_from_arrays("", arrays, description["contexts"], forecast, T),
            timesteps=tuple(arrays["timesteps"].tolist()) if "timesteps" in arrays else None,
            stages=tuple(Stage(**stage) for stage in description["stages"]),
            checks={context: {step: row for step, row in own.items() if row.steps} for context, own in checks.items()},
            expected=errors_from_arrays(arrays, description.get("expected_contexts", []), T),
            surrogate=surrogate,
            **{name: description[name] for name in _PLAIN},
        )

    def title(self) -> str:
        """One line: the denoiser and the number of computed steps."""
        return f"Plan: {self.denoiser or 'any denoiser'}, {self.budget} of {self.num_steps} steps computed"

    def summary(self) -> str:
        """The plan in words: one line per fact, its schedule drawn, and the figures of its fit."""
        lines: list[tuple[str, str]] = [
            ("forecaster", f"{self.forecaster}, site {self.site}, contexts {', '.join(self.rows) or 'none'}"),
            ("schedule", f"{self.budget} of {self.num_steps} steps computed: {' '.join(map(str, self.computed))}"),
            *(("", line) for line in self.drawing()),
            ("sigmas", f"{self.sigmas[0]:.4g} to {self.sigmas[-1]:.4g}"),
            ("denoiser", f"{self.denoiser or 'any'}, configuration {self.config_hash or 'any'}"),
            ("history", f"{self.capacity} features per context"),
        ]
        if stages := ", ".join(f"{s.name} (window {s.window}, sigma > {s.low:g})" for s in self.stages):
            lines.append(("stages", stages))
        errors = [expected.error for steps in self.expected.values() for expected in steps.values()]
        known = f"expected relative error {min(errors):.3g} to {max(errors):.3g}" if errors else "none"
        lines.append(("checks", known))
        if self.surrogate is not None:
            lines.append(("adapts", "to other step counts, spacings, schedulers and budgets"))
        lines += [*self.figures(), ("written by", f"lesa {self.library_version or '(not saved yet)'}")]
        return "\n".join(f"{name:<16} {value}" for name, value in lines)

    def drawing(self) -> list[str]:
        """The schedule as text, "#" for a computed step and "." for a forecast one: 50 steps per line, in tens."""
        computed = set(self.computed)
        marks = "".join("#" if step in computed else "." for step in range(self.num_steps))
        tens = [marks[i : i + 10] for i in range(0, len(marks), 10)]
        return [" ".join(tens[i : i + 5]) for i in range(0, len(tens), 5)]

    def figures(self) -> list[tuple[str, str]]:
        """The figures of `training` as (name, value): first those of `lesa.fit`, then other scalars."""
        known = [
            (label, _figure(form, self.training[key]))
            for key, (label, form) in _LABELS.items()
            if self.training.get(key) is not None
        ]
        others = [
            (name, _plain(value))
            for name, value in self.training.items()
            if name not in _LABELS and name not in _SAID and isinstance(value, (str, int, float))
        ]
        return known + others

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the plan: its schedule and its weights, as `lesa info --out` does; needs the extra [demo].

        Looks upward, as `adapt` does: drawing lives in `lesa.evaluation`.
        """
        from ..evaluation.plan_plots import plan_picture

        return plan_picture(path, self)

    def adapt(self, sigmas: Sequence[float] | None = None, budget: int | float | None = None) -> Plan:
        """The plan for other noise levels or another budget, made from the surrogate.

        Looks upward, as `plot` does: `lesa.planner` makes plans.

        Args:
            sigmas: the T + 1 noise levels of the request, the final 0 included; by default those of this plan.
            budget: computed steps, or a float in (0, 1]: the share of all steps; by default this plan's own.

        Raises:
            PlanError: the plan was not fitted.
            ValueError: an argument is not valid.
        """
        from ..planner.build import adapt

        return adapt(self, budget, sigmas)

    def model_card(self, name: str, filename: str) -> str:
        """The README.md of the plan: what it is for, its figures, and how to use it."""
        where = json.dumps(name, ensure_ascii=False)
        if filename != PLAN_FILE:
            where = f'lesa.Plan.from_pretrained({where}, filename="{filename}")'
        facts = [
            ("denoiser", self.denoiser or "any"),
            ("configuration", self.config_hash or "any"),
            ("steps", f"{self.num_steps}, sigmas {self.sigmas[0]:.4g} to {self.sigmas[-1]:.4g}"),
            ("budget", f"{self.budget} computed steps: {' '.join(map(str, self.computed))}"),
            ("forecaster", f"{self.forecaster}, site {self.site}"),
            *self.figures(),
        ]
        rows = [f"| {name} | " + value.replace("|", "\\|") + " |" for name, value in facts]
        return card(
            filename,
            self.title(),
            [
                "A plan of `lesa` says which steps of a diffusion request the denoiser computes, and which weights",
                "forecast the others. It holds no weights of the model.",
                "",
                *("| | |", "|---|---|", *rows),
                "",
                *("```", *self.drawing(), "```"),
                "",
                "`#` is a computed step, `.` a forecast one. Use it with the pipeline it was made for:",
                "",
                "```python",
                "import lesa",
                f"lesa.enable(pipe, {where})",
                f"result = pipe(prompt, num_inference_steps={self.num_steps})",
                "```",
            ],
        )

    @classmethod
    def join(cls, plans: Mapping[str, Plan]) -> Plan:
        """One plan out of plans for single contexts, e.g. {"cond": ..., "uncond": ...}.

        `training` is copied from the first plan; alphas are kept for each context. The surrogate is kept if all plans
        share it.

        Raises:
            PlanError: the plans differ in anything but rows and training.
        """
        if not plans:
            raise PlanError("plans is empty: give at least one plan")
        first = next(iter(plans.values()))
        for context, plan in plans.items():
            for name in ("computed", "sigmas", "site", "timesteps", "denoiser", "config_hash", "stages"):
                if getattr(plan, name) != getattr(first, name):
                    raise PlanError(f"plans differ in {name} at context {context!r}: join plans with the same {name}")
        rows = {context: plan.rows_of(context) for context, plan in plans.items()}
        checks = {context: plan.checks_of(context) for context, plan in plans.items() if plan.checks}
        expected = {context: plan.expected_of(context) for context, plan in plans.items() if plan.expected}
        training = dict(first.training)
        if all("alphas" in plan.training for plan in plans.values()):
            training["alphas"] = {c: next(iter(plan.training["alphas"].values())) for c, plan in plans.items()}
        surrogate = first.surrogate if all(plan.surrogate is first.surrogate for plan in plans.values()) else None
        tables: dict[str, Any] = {"rows": rows, "checks": checks, "expected": expected}
        return replace(first, **tables, training=training, surrogate=surrogate)

    def _check_schedule(self) -> None:
        total = self.num_steps
        _check_steps(total)
        if total < 1 or not all(math.isfinite(s) for s in self.sigmas):
            raise PlanError(f"sigmas={self.sigmas!r:.200}: expected the T + 1 finite noise levels of a request")
        if list(self.computed) != sorted(set(self.computed)) or not self.computed or self.computed[0] != 0:
            raise PlanError(f"computed={self.computed!r:.200}: expected ascending steps, the first of them 0")
        if self.computed[-1] >= total:
            raise PlanError(f"computed step {self.computed[-1]} is outside a request of {total} steps")
        if wrong := [name for name in (*self.rows, *self.checks, *self.expected) if not isinstance(name, str)]:
            raise PlanError(f"context {wrong[0]!r:.40}: expected a name")
        if not isinstance(self.training, Mapping):
            raise PlanError(f"training={self.training!r:.40}: expected figures by name")
        if self.site not in SITES:
            raise PlanError(f"site={self.site!r:.80}: expected one of {SITES}")
        timesteps = self.timesteps
        if timesteps is not None and not (len(timesteps) == total and all(map(math.isfinite, timesteps))):
            raise PlanError(f"timesteps={timesteps!r:.200}: expected {total} finite numbers, one per step")
        if len(self.computed) < total and not self.rows:
            raise PlanError("rows is empty: every step that is not computed needs a row")

    def _check_rows(self, context: str, rows: Mapping[int, Row]) -> None:
        forecast = set(range(self.num_steps)) - set(self.computed)
        missing = forecast - set(rows)
        if missing:
            raise PlanError(f"context {context!r} has no row for forecast steps {sorted(missing)!s:.200}")
        for step, row in rows.items():
            where = f"row of context {context!r}, step {step}"
            if step not in forecast:
                raise PlanError(f"{where}: the step is computed or outside the request; rows are for forecast steps")
            row.check(step, where)

    def _check_checks(self, context: str, rows: Mapping[int, Row]) -> None:
        for step, row in rows.items():
            where = f"check of context {context!r}, step {step}"
            if step not in self.computed:
                raise PlanError(f"{where}: the step is not computed; checks are for computed steps {self.computed}")
            row.check(step, where)

    def _check_expected(self, context: str, errors: Mapping[int, Expected]) -> None:
        for step, error in errors.items():
            where = f"expected error of context {context!r}, step {step}"
            if step not in self.checks_of(context):
                raise PlanError(f"{where}: the step has no check; add its row to `checks`, or leave it out")
            if not (0 <= error.error < math.inf and 0 < error.std < math.inf):
                raise PlanError(f"{where} is {error}: expected a finite error of at least 0 and a std above 0")

    def _check_surrogate(self, arrays: Mapping[str, np.ndarray]) -> None:
        if self.site != "output":
            raise PlanError(f"surrogate with site={self.site!r}: a surrogate needs site='output'; leave it out")
        if missing := [name for name in _SURROGATE_ARRAYS if name not in arrays]:
            raise PlanError(f"surrogate lacks {missing}: give what Surrogate.to_arrays makes, or fit the plan again")
        T, C, P = self.num_steps, max(np.size(arrays["contexts"]), 1), (*np.shape(arrays["slopes"]), 0, 0, 0)[2]
        if P < 1:
            raise PlanError("surrogate holds no requests: fit the plan again")
        shapes = ((C, T, P), (P, C * T * (C * T + 1) // 2), (T * (T + 1) // 2,), (C,), (C,))
        for (name, words), shape in zip(_SURROGATE_ARRAYS.items(), shapes, strict=True):
            array = np.asarray(arrays[name])
            if array.shape != shape:
                raise PlanError(f"surrogate: {words} of shape {array.shape}; expected {shape}: fit the plan again")
            if array.dtype.kind != ("U" if name == "contexts" else "f"):
                raise PlanError(f"surrogate: {words} of dtype {array.dtype}: fit the plan again")
            if name != "contexts" and not np.isfinite(array).all():
                raise PlanError(f"surrogate: {words} with numbers that are not finite: fit the plan again")


def _check_steps(total: int) -> None:
    """Check that so many steps can be a request's.

    Raises:
        PlanError: there are too many.
    """
    if total > _MOST_STEPS:
        raise PlanError(f"sigmas are of {total} steps: expected at most {_MOST_STEPS}")


def _check_description(description: Mapping[str, Any]) -> None:
    """Check the types in a file's description.

    Raises:
        PlanError: a value has another type than `to_arrays` gives it, or is too large or nested too deeply.
    """
    for name in ("contexts", "check_contexts", "expected_contexts", "surrogate_contexts"):
        names = description.get(name, None if name == "contexts" else [])
        if not (isinstance(names, list) and all(type(one) is str for one in names) and len({*names}) == len(names)):
            raise PlanError(f"{name}={names!r:.80}: expected a list of different names")
    for name, types in _PLAIN.items():
        if not isinstance(description[name], types):
            raise PlanError(f"{name} is a {type(description[name]).__name__}: expected {types[0].__name__}")
    for stage in description["stages"]:
        if [type(stage[name]) for name in ("name", "low", "window")] not in ([str, float, int], [str, int, int]):
            raise PlanError(f"stages hold {stage!r:.80}: expected a name, a noise level and a window")
    alphas = description["training"].get("alphas", {"*": ()})
    if not (isinstance(alphas, dict) and alphas):
        raise PlanError(f"training holds alphas={alphas!r:.80}: expected those of each context")
    _check_plain(description["training"])


def _check_plain(value: Any, depth: int = 0) -> None:
    """Check that what was saved as JSON can be printed and saved again.

    Raises:
        PlanError: it is nested too deeply, or holds an integer that no array can hold.
    """
    if depth > _DEEPEST:
        raise PlanError(f"training is nested deeper than {_DEEPEST} levels")
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise PlanError(f"training holds an integer of {value.bit_length()} bits: expected at most 63")
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_plain(one, depth + 1)


def _version() -> str | None:
    try:
        return metadata.version("lesa")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return None


def _figure(form: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):  # the prompts themselves
        value = len(value)
    return form.format(value) if isinstance(value, (int, float)) else _plain(value)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else textwrap.shorten(str(value), 80, placeholder=" ...")
