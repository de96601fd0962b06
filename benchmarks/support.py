"""What works with lesa on each pipeline: the rows of results/support.csv, which docs/models.md shows.

    PYTHONPATH=tests/helpers python -m benchmarks.support --results benchmarks/results/support.csv --commit COMMIT

Each tiny pipeline of tests/helpers/zoo_*.py runs by three plans (all computed, reuse, Taylor) against the oracle of
tests/helpers/oracle.py, at each site. The first pipeline of each denoiser class runs also with its denoiser compiled
(backend "eager": tracing, guards and recompilation, no code), offloaded in groups, and with a LoRA. A cell is "yes",
empty where it was not tried, or what was wrong.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import zoo_images
import zoo_unets
import zoo_videos
from diffusers.hooks import apply_group_offloading
from oracle import Run, Subject, denoisers_of, faults_at, sites_of
from peft import LoraConfig
from torch import nn

COLUMNS = ("commit", "pipeline", "denoiser", "guidance", "output", "hidden", "compile", "offload", "lora")
_CPU = torch.device("cpu")
_ATTENTION = {"to_q", "to_k", "to_v", "to_query", "to_value", "q", "v", "qkv", "attention_projection"}


def row_of(subject: Subject, known: set[str]) -> dict[str, str]:
    """One row of the table, without its commit; `known` are the denoisers that were tried with all else."""
    pipe = subject.make()
    untouched = subject.run(pipe)
    sites = sites_of(pipe)
    row = {"pipeline": subject.name, "denoiser": " + ".join(type(part).__name__ for part in denoisers_of(pipe))}
    row["guidance"] = guidance_of(subject, pipe, untouched)
    row |= {site: cell(lambda site=site: faults_at(site, subject, pipe, untouched)) for site in sites}
    if row["denoiser"] in known:
        return row
    known.add(row["denoiser"])
    changes: dict[str, Callable[[Any], None]] = {"compile": compiled, "offload": offloaded}
    for name, change in changes.items():
        row[name] = cell(lambda change=change: _faults_of(subject, sites, change))
    if all(hasattr(part, "add_adapter") for part in denoisers_of(pipe)):
        row["lora"] = cell(lambda: _faults_of(subject, sites, lambda pipe: None, with_lora))
    return row


def cell(find: Callable[[], Iterable[str]]) -> str:
    """ "yes", or the first fault."""
    try:
        found = list(find())
    except Exception as error:  # whatever happens is a result
        found = [f"{type(error).__name__}: {error}"]
    return found[0].splitlines()[0][:200] if found else "yes"


def guidance_of(subject: Subject, pipe: Any, untouched: Run) -> str:
    """How the request has guidance: in several calls a step, in one batch, or not at all."""
    branches = max(sum(place[:2] == other[:2] for other in untouched.calls) for place in untouched.calls)
    if branches > 1:
        return f"{branches} calls"
    batches: list[int] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim() > 2]
        batches.append(tensors[0].shape[0] if tensors else 1)

    handles = [part.register_forward_pre_hook(look, with_kwargs=True) for part in denoisers_of(pipe)]
    subject.run(pipe)
    for handle in handles:
        handle.remove()
    return "one batch" if batches and max(batches) > 1 else ""


def compiled(pipe: Any) -> None:
    """Compile the denoisers."""
    torch._dynamo.reset()
    for part in denoisers_of(pipe):
        part.compile(backend="eager")


def offloaded(pipe: Any) -> None:
    """Offload the denoisers' leaves."""
    for part in denoisers_of(pipe):
        apply_group_offloading(part, onload_device=_CPU, offload_device=_CPU, offload_type="leaf_level")


def with_lora(pipe: Any) -> None:
    """Give the denoisers a LoRA of random weights on all attention."""
    for part in denoisers_of(pipe):
        names = {name.rpartition(".")[2] for name, module in part.named_modules() if isinstance(module, nn.Linear)}
        torch.manual_seed(3)
        part.add_adapter(LoraConfig(r=2, target_modules=sorted(names & _ATTENTION), init_lora_weights=False))
        part.eval()


def _faults_of(
    subject: Subject, sites: Iterable[str], change: Callable[[Any], None], before: Callable[[Any], None] | None = None
) -> list[str]:
    """What is wrong on a pipeline with denoisers of its own, changed `before` all runs or by `change` for lesa's."""
    found = []
    for site in sites:
        pipe = subject.make()
        for name, part in list(pipe.components.items()):
            if any(part is denoiser for denoiser in denoisers_of(pipe)):
                setattr(pipe, name, copy.deepcopy(part))
        if before is not None:
            before(pipe)
        found += faults_at(site, subject, pipe, subject.run(pipe), functools.partial(change))
    return found


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="the file that rows are added to")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--only", default="", help="only pipelines with this in their name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fresh, known = not options.results.exists(), set[str]()
    with options.results.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if fresh:
            writer.writeheader()
        for subject in (*zoo_images.SUBJECTS, *zoo_videos.SUBJECTS, *zoo_unets.SUBJECTS):
            if options.only in subject.name:
                writer.writerow({"commit": options.commit, **row_of(subject, known)})
                file.flush()
                print(subject.name, flush=True)


if __name__ == "__main__":
    main()
