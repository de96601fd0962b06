"""Plans without a fit on five small models, each judged without its own statistics, against rules, solvers and fits.

    python -m benchmarks.generic --run build/generic --results generic.csv --commit $(git rev-parse --short HEAD)
    python -m benchmarks.generic --table --results benchmarks/results/generic.csv

The folder holds what examples/generic/train.py writes, NAME.safetensors and NAME.txt; emoji-flux comes with lesa. True
PSNR of pictures that nothing was recorded of, against the full request of the same noise, without guidance and with it.
One process for each model and guidance, all pictures in one pipeline call. Rows are written as they are measured; those
of the same hardware, commit and cell are not measured again. After --seconds nothing is begun, and 20 s later what
still runs is ended. The methods:

    generic   generic_plan, the statistics of the model itself left out
    rules     every closed form on the paper's, the even and its own published schedules
    fewer     fewer steps of the pipeline's sampler, and of DPM-Solver++ at its noise levels
    gates     caches of others: on transformers diffusers' FirstBlockCache, its threshold bisected until it computes as
              many steps on average (no row where it does not come within one step; the real number is printed); on
              U-Nets DeepCache with even intervals
    learn     lesa.enable(pipe, learn=4), where there is such a thing
    quick, default    lesa.fit on 8 recorded prompts; like "learn" only at the budgets of the page's tables
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing

import lesa
from benchmarks import fitted_methods
from benchmarks.deep_cache import deep_cache
from benchmarks.first_block import tuned
from benchmarks.fitted_solvers import DpmSolver, MultistepSubset
from benchmarks.generic_table import FITTED_BUDGETS, Rows, margin_table, read
from benchmarks.measuring import full_float32, hardware
from benchmarks.tables import markdown
from lesa import assets, metrics
from lesa.forecasters import plan_of
from lesa.models.pipeline import run as run_pipeline
from lesa.planner.generic import FLOW, generic_plan
from lesa.plans import schedule
from lesa.plans.plan import Plan
from lesa.runtime.clock import impulse_response_of, prediction_of, sigmas_of

EXAMPLES = Path(__file__).parents[1] / "examples" / "generic"
MODELS = ("emoji-flux", "unet", "pixart", "qwen", "wan")
GUIDANCE = ("guided", "plain")
METHODS = ("generic", "rules", "fewer", "gates", "learn", "quick", "default")
FITS = ("learn", "quick", "default")
BUDGETS = (10, 8, 13, 6, 17, 4, 25, 5, 21, 7, 15, 12, 9, 11, 20, 14, 16, 18, 19, 22, 23, 24)  # the telling ones first
LEARNED, FITTING, JUDGED = 4, 8, 128
_GRACE = 20.0  # s after the deadline that what runs may take
_HIGHEST = 100.0  # dB, of pictures that are equal


@dataclass(frozen=True)
class Settings:
    """What a process of the benchmark needs to know.

    Args:
        run: folder of the small models.
        device: of the pipelines.
        captions: pictures judged, at most 64 of emoji-flux and 128 of the others.
        steps: T of the full request.
        budgets: numbers of computed steps, in order.
        methods: some of `METHODS`.
        results: CSV file the rows go to.
        head: first cells of every row: hardware, commit, date.
        deadline: time after which nothing is begun.
    """

    run: Path
    device: str
    captions: int
    steps: int
    budgets: tuple[int, ...]
    methods: tuple[str, ...]
    results: Path
    head: tuple[str, ...]
    deadline: float


class Bench:
    """The pipeline of one model, with the pictures of its full requests.

    Args:
        settings: of the run.
        name: one of `MODELS`.
        guided: whether its requests have guidance.
    """

    def __init__(self, settings: Settings, name: str, guided: bool) -> None:
        full_float32()
        self.settings, self.name, self.guided = settings, name, guided
        self.pipe, request, more, self.fitting, prompts, seeds = _loaded(settings, name)
        self.request = {**request, **(more if guided else {}), "num_inference_steps": settings.steps}
        self.prompts, self.seeds = prompts[: settings.captions], seeds[: settings.captions]
        self.reference = self.images()
        self.sigmas = sigmas_of(self.pipe.scheduler)
        self.impulse_response = impulse_response_of(self.pipe.scheduler, 0)
        self.prediction = prediction_of(self.pipe.scheduler)

    def images(self, **more: Any) -> np.ndarray:
        """The pictures of all prompts [P, H, W, 3]; the frames of a video lie below each other."""
        made = run_pipeline(self.pipe, self.prompts, self.seeds, {**self.request, **more}, output_type="np").images
        return np.asarray(made).reshape(len(made), -1, *np.shape(made)[-2:])

    def psnr(self, images: np.ndarray) -> np.ndarray:
        """PSNR of each prompt, dB."""
        return np.minimum(metrics.psnr(images, self.reference), _HIGHEST)

    def by_plan(self, plan: Plan) -> np.ndarray:
        """PSNR of each prompt with a plan.

        Raises:
            RuntimeError: another number of steps than the plan's was computed.
        """
        with lesa.enable(self.pipe, plan, guard="off") as enabled:
            return self.watched(enabled, plan.budget)

    def watched(self, enabled: Any, budget: int) -> np.ndarray:
        """PSNR of each prompt with what is enabled, which must compute `budget` steps."""
        before = _counts(enabled.stats)
        images = self.images()
        computed, forecast = _counts(enabled.stats) - before
        if computed * self.settings.steps != budget * (computed + forecast):
            raise RuntimeError(f"{computed} of {computed + forecast} calls were computed, not {budget} steps")
        return self.psnr(images)

    def generic(self, budget: int) -> Plan:
        """The plan without a fit, the model's own statistics left out."""
        made = generic_plan(
            self.prediction, self.guided, budget, self.sigmas, self.impulse_response, without=(self.name,)
        )
        return Plan(made.computed, self.sigmas, made.rows, site=made.site, forecaster=made.forecaster)

    def solver(self, budget: int) -> Any:
        """DPM-Solver++ with `budget` steps, at the noise levels the pipeline's own scheduler has just run."""
        own = self.pipe.scheduler
        if self.prediction == FLOW:
            return DpmSolver.at(sigmas_of(own)[:-1])
        spaced = schedule.spaced(self.settings.steps, budget)
        own.set_timesteps(self.settings.steps)
        return MultistepSubset.like(own, [int(own.timesteps[i]) for i in spaced])


def _loaded(settings: Settings, name: str) -> tuple[Any, dict, dict, list[str], list[str], list[int]]:
    """A model's pipeline, its request, what guidance adds, recorded prompts, unseen prompts and seeds of these."""
    if name == "emoji-flux":
        pipe, held_out = assets.load(settings.device), (assets.held_out_prompts(), assets.held_out_seeds())
        return pipe, dict(assets.REQUEST), dict(assets.GUIDANCE), assets.fitting_prompts(), *held_out
    pipe = _examples("models").load(name, settings.run / f"{name}.safetensors", settings.device)
    prompts = [line for line in (settings.run / f"{name}.txt").read_text(encoding="utf-8").splitlines() if line]
    recorded, unseen = _examples("data").split(prompts, JUDGED)
    return pipe, dict(pipe.model.request), dict(pipe.model.guided), recorded, unseen, list(range(1000, 1000 + JUDGED))


def _examples(module: str) -> Any:
    """A script of examples/generic."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return __import__(module)


def _counts(stats: Any) -> np.ndarray:
    """Denoiser calls computed and forecast so far."""
    return np.array([stats.computed + sum(stats.refused.values()), stats.forecast])


def generic(bench: Bench, rows: Rows, budget: int) -> None:
    """The plan without a fit."""
    if rows.wanted(budget, "generic", "searched"):
        begin = time.perf_counter()
        plan = bench.generic(budget)
        seconds = time.perf_counter() - begin
        rows.add((budget, "generic", "searched"), bench.by_plan(plan), 0, seconds)


def rules(bench: Bench, rows: Rows, budget: int) -> None:
    """Every closed form on the published schedules."""
    for kind, name, computed in published(bench.settings.steps, budget):
        if rows.wanted(budget, name, kind):
            rule, options = fitted_methods.CLOSED[name]
            plan = plan_of(rule, computed, bench.sigmas, "output", options=options)
            rows.add((budget, name, kind), bench.by_plan(plan))


def published(steps: int, budget: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Names of schedules, rules on them, and the computed steps."""
    found = schedule.published(steps, budget)
    for kind, computed in zip(("paper", "even")[-len(found) :], found, strict=True):
        yield from ((kind, name, computed) for name in fitted_methods.CLOSED)
    for kind, names in fitted_methods.OWN.items():
        if kind in ("l2p", "dpcache"):
            continue  # these need recordings
        own = fitted_methods.own_schedules(kind, steps).get(budget)
        if own is not None:
            yield from ((kind, name, own) for name in names if name in fitted_methods.CLOSED)


def fewer(bench: Bench, rows: Rows, budget: int) -> None:
    """Fewer steps of the pipeline's sampler and of DPM-Solver++."""
    own, dpm = (budget, "fewer", "own"), (budget, "dpm++", "fewer")
    if not (rows.wanted(*own) or rows.wanted(*dpm)):
        return
    psnr = bench.psnr(bench.images(num_inference_steps=budget))
    if rows.wanted(*own):
        rows.add(own, psnr)
    if rows.wanted(*dpm):
        usual = bench.pipe.scheduler
        bench.pipe.scheduler = bench.solver(budget)
        try:
            rows.add(dpm, bench.psnr(bench.images(num_inference_steps=budget)))
        finally:
            bench.pipe.scheduler = usual


def gates(bench: Bench, rows: Rows, budget: int) -> None:
    """FirstBlockCache with the threshold that computes as many steps on average; DeepCache with even intervals."""
    steps = bench.settings.steps
    if hasattr(bench.pipe, "unet"):
        if rows.wanted(budget, "deepcache", "even"):
            with deep_cache(bench.pipe.unet, schedule.spaced(steps, budget), steps):
                rows.add((budget, "deepcache", "even"), bench.psnr(bench.images()))
    elif hasattr(bench.pipe.transformer, "enable_cache") and rows.wanted(budget, "fbc", "tuned"):
        begin = time.perf_counter()
        images, threshold, computed = tuned(bench.pipe.transformer, bench.images, steps, budget)
        print(f"{bench.name}: threshold {threshold:.4g} computes {computed:.2f} steps", flush=True)
        if abs(computed - budget) <= 1:  # it decides for a whole batch: not every number can be had
            rows.add((budget, "fbc", "tuned"), bench.psnr(images), 0, time.perf_counter() - begin)


def learn(bench: Bench, rows: Rows, budget: int) -> None:
    """A plan learned from requests as they come."""
    if "learn" not in inspect.signature(lesa.enable).parameters or not rows.wanted(budget, "learn", "learned"):
        return
    options: dict[str, Any] = {"learn": LEARNED, "budget": budget, "guard": "off"}
    begin = time.perf_counter()
    with lesa.enable(bench.pipe, **options) as enabled:
        for seed, prompt in enumerate(bench.fitting[:LEARNED]):
            run_pipeline(bench.pipe, [prompt], [seed], bench.request)
        seconds = time.perf_counter() - begin
        rows.add((budget, "learn", "learned"), bench.watched(enabled, budget), LEARNED, seconds)


def fit(bench: Bench, rows: Rows, budget: int, effort: str) -> None:
    """The plan that lesa.fit finds, with what it says it took."""
    if rows.wanted(budget, effort, "fitted"):
        more: dict[str, Any] = {"budget": budget, "request": bench.request, "effort": effort, "batch": FITTING}
        plan = lesa.fit(bench.pipe, bench.fitting[:FITTING], **more)
        cost = plan.training["generations"], plan.training["seconds"]
        rows.add((budget, effort, "fitted"), bench.by_plan(plan), *cost)


_RUN = {"generic": generic, "rules": rules, "fewer": fewer, "gates": gates, "learn": learn}


def tasks(settings: Settings) -> Iterator[tuple[str, int]]:
    """Methods and budgets: fits last, and only at the budgets of the tables."""
    budgets = [budget for budget in settings.budgets if budget < settings.steps]
    plain, fits = ([m for m in METHODS if m in settings.methods and (m in FITS) is later] for later in (False, True))
    yield from ((method, budget) for budget in budgets for method in plain)
    yield from ((method, budget) for budget in budgets if budget in FITTED_BUDGETS for method in fits)


def work(settings: Settings, name: str, guidance: str) -> list[str]:
    """All rows of one model and guidance; returns what went wrong."""
    torch.set_num_threads(1)
    rows, errors = Rows(settings, name, guidance), []
    try:
        bench = Bench(settings, name, guidance == "guided")
    except Exception:  # the other models are worth their time all the same
        return [f"{name} {guidance}: {traceback.format_exc()}"]
    for method, budget in tasks(settings):
        if time.time() > settings.deadline:
            break
        try:
            fit(bench, rows, budget, method) if method not in _RUN else _RUN[method](bench, rows, budget)
        except Exception:  # and so are the other rows
            errors.append(f"{name} {guidance} {method} {budget}: {traceback.format_exc()}")
            print(errors[-1], flush=True)
    return errors


def _work(arguments: tuple[Settings, str, str]) -> list[str]:
    return work(*arguments)


def measure(settings: Settings, models: Sequence[str], guidance: Sequence[str], processes: int | None) -> list[str]:
    """Measure all; returns what went wrong."""
    chosen = [(settings, name, label) for label in guidance for name in models]
    Rows(settings, *chosen[0][1:])  # before the processes would all make the file
    if processes == 0:
        return [error for one in chosen for error in work(*one)]
    errors: list[str] = []
    with multiprocessing.get_context("spawn").Pool(processes or len(chosen), maxtasksperchild=1) as pool:
        results = pool.imap_unordered(_work, chosen, chunksize=1)
        try:
            for _ in chosen:
                errors += results.next(max(settings.deadline + _GRACE - time.time(), 0.1))
        except multiprocessing.TimeoutError:
            errors.append("time ran out: what was running is lost")
    return errors


def _settings(options: argparse.Namespace) -> Settings:
    order = {budget: i for i, budget in enumerate(BUDGETS)}
    return Settings(
        run=options.run,
        device=options.device,
        captions=options.captions,
        steps=options.steps,
        budgets=tuple(sorted(options.budgets, key=lambda budget: order.get(budget, len(order)))),
        methods=tuple(options.methods),
        results=options.results,
        head=(hardware(options.device), options.commit, datetime.date.today().isoformat()),
        deadline=time.time() + options.seconds,
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line; measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of --results and measure nothing")
    parser.add_argument("--run", type=Path, default=Path("build/generic"), help="folder of the small models")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=86400.0, help="begin nothing later")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--guidance", nargs="+", choices=GUIDANCE, default=GUIDANCE)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--processes", type=int, help="default one for each model and guidance; 0: all in this one")
    options = parser.parse_args(arguments)
    errors = [] if options.table else measure(_settings(options), options.models, options.guidance, options.processes)
    print(markdown(*margin_table(read(options.results))))
    if errors:
        sys.exit("\n".join(errors))


if __name__ == "__main__":
    main()
