"""The requests that benchmarks.transfer brings one recording to, and pipelines of emoji-flux that run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline
from torch import Tensor

from lesa import assets
from lesa.models.pipeline import run

from . import captions
from .fitted_solvers import solvers


@dataclass(frozen=True)
class Case:
    """One kind of request.

    Args:
        name: in the rows; with the steps unique.
        steps: num_inference_steps.
        solver: one of `fitted_solvers.solvers()`.
        guidance: true_cfg_scale; 1 is none.
        strength: of image-to-image; None is text-to-image.
        picture: that image-to-image starts from, as text-to-image makes it: 0 of the same prompt, 1 of the next one.
    """

    name: str
    steps: int
    solver: str = "euler"
    guidance: int = 1
    strength: float | None = None
    picture: int = 0

    @property
    def label(self) -> str:
        """What `--cases` calls it."""
        return f"{self.name}-{self.steps}"

    def request(self, further: int = 0) -> dict[str, Any]:
        """Keyword arguments of its pipeline call, with so many further steps."""
        more = {} if self.strength is None else {"strength": self.strength}
        return captions.request(self.guidance, num_inference_steps=self.steps + further, **more)


CASES = (
    *(Case("euler", steps) for steps in (20, 28, 35, 50, 100)),
    Case("cfg3", 28, guidance=3),
    *(Case(solver, steps, solver) for solver in ("heun", "dpm++", "unipc") for steps in (50, 28)),
    Case("img2img0.6", 50, strength=0.6),
    Case("img2img0.6-other", 50, strength=0.6, picture=1),
)


class FromPictures(FluxImg2ImgPipeline):
    """FLUX's image-to-image where each prompt has its picture: a request is then plain values, as fitting wants it."""

    pictures: Mapping[str, Tensor]

    def __call__(self, prompt: Sequence[str], **kwargs: Any) -> Any:
        """Start from the pictures of these prompts."""
        return super().__call__(prompt=prompt, image=torch.stack([self.pictures[one] for one in prompt]), **kwargs)


class Pipelines:
    """emoji-flux as every case wants it; all share one denoiser.

    Args:
        device: of the pipelines.
        fitting: how many prompts are fitted to.
        shown: how many held-out captions are measured.
    """

    def __init__(self, device: str, fitting: int, shown: int) -> None:
        self._text = captions.load(device)
        self._euler = self._text.scheduler
        self._prompts = {"fitting": (assets.fitting_prompts()[:fitting], range(fitting))}
        self._prompts["shown"] = (assets.held_out_prompts()[:shown], assets.held_out_seeds()[:shown])
        self._image: FromPictures | None = None
        self._made: list[tuple[Sequence[str], Tensor]] = []

    def of(self, case: Case) -> Any:
        """The pipeline of a case, until the next call of this."""
        self._text.scheduler = self._euler
        if case.strength is None:
            self._text.scheduler = solvers()[case.solver] or self._euler
            return self._text
        if self._image is None:
            self._image = self._from_pictures()
        rolled = [(prompts, made.roll(-case.picture, 0)) for prompts, made in self._made]
        self._image.pictures = {k: v for pair in rolled for k, v in zip(*pair, strict=True)}
        return self._image

    def _from_pictures(self) -> FromPictures:
        """Image-to-image, and the pictures it may start from."""
        for prompts, seeds in self._prompts.values():
            made = run(self._text, prompts, seeds, captions.request(), output_type="pt", return_dict=False)[0]
            self._made.append((prompts, made))
        pipe = FromPictures(**self._text.components)
        pipe.set_progress_bar_config(disable=True)
        return pipe
