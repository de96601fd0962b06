"""What the emoji-flux scripts share: options, the clock of a run, checkpoints and the data."""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

IMAGE_SIZE = 64
PACKED_SIZE = 16  # image tokens a side: 64 pixels, halved by the VAE and halved again by the packing


def base_parser(description: str) -> argparse.ArgumentParser:
    """Options that every script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("build/emoji_flux"), help="folder of data and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def training_parser(description: str, seconds: float, batch: int, lr: float) -> argparse.ArgumentParser:
    """Options of the two training scripts."""
    parser = base_parser(description)
    parser.add_argument("--seconds", type=float, default=seconds, help="training time in all, restarts counted in")
    parser.add_argument("--steps", type=int, help="train for so many steps instead of --seconds")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which this call pauses")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between two checkpoints")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=300, help="steps of linear warm-up")
    parser.add_argument("--device", default=default_device())
    return parser


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_torch() -> None:
    """Settings that hold for all scripts."""
    torch.set_float32_matmul_precision("high")
    # The backward pass of cuDNN's attention fails at these sizes with some releases of PyTorch.
    torch.backends.cuda.enable_cudnn_sdp(False)


class Clock:
    """How far a run has come, measured in steps or in seconds and carried over restarts."""

    def __init__(self, args: argparse.Namespace, step: int = 0, elapsed: float = 0.0):
        self.step = step
        self._args = args
        self._earlier = elapsed
        self._start = self._saved = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds trained so far, earlier calls included."""
        return self._earlier + time.monotonic() - self._start

    @property
    def fraction(self) -> float:
        """0 at the beginning of the run, 1 at its end."""
        done = self.step / self._args.steps if self._args.steps else self.elapsed / self._args.seconds
        return min(1.0, done)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.fraction >= 1.0

    def ticks(self) -> Iterator[tqdm]:
        """Yield the progress bar once for each step until the run ends or this call's time is over."""
        # A log file gets one line in a while, a terminal a moving bar.
        interval = 0.1 if sys.stderr.isatty() else 20.0
        with tqdm(total=self._args.steps, initial=self.step, mininterval=interval, maxinterval=2 * interval) as bar:
            while not self.finished and time.monotonic() - self._start < self._args.stop_after:
                yield bar
                self.step += 1
                bar.update()

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine that reaches zero at the end of the run."""
        warm = min(1.0, (self.step + 1) / self._args.warmup)
        return self._args.lr * warm * 0.5 * (1 + math.cos(math.pi * self.fraction))

    def save_due(self) -> bool:
        """True once in every `--save-every` seconds."""
        due = time.monotonic() - self._saved > self._args.save_every
        if due:
            self._saved = time.monotonic()
        return due


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint so that a kill at any moment leaves a whole one behind."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict | None:
    """The last checkpoint on the CPU, or None where there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def load_emoji(run: Path) -> tuple[np.ndarray, list[str]]:
    """The rendered pictures (count, 64, 64, 3) as uint8, and their captions."""
    path = run / "emoji.npz"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run render.py first, with the same --run")
    with np.load(path) as data:
        return data["images"], [str(caption) for caption in data["captions"]]


def to_model_range(images: np.ndarray, device: str) -> torch.Tensor:
    """uint8 pictures (count, height, width, 3) as float tensors (count, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
