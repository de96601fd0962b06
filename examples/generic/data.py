"""Pictures and prompts of the small models: emoji, photographs and short videos, drawn anew for every batch."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

SIDE = 64  # pixels of a picture
FRAMES, VIDEO_SIDE = 8, 32
WORDS = 8  # of a prompt
_HEIGHTS = {"far": 80, "middle": 136, "near": 240}  # of a photograph, of which a prompt's word tells what a crop shows
_WIDEST = 1.6  # width of a photograph by its height; what is beyond is cut off
_MOTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0), "turning": (0.0, 0.0)}


class Emoji:
    """Captioned emoji of `emoji.npz`, which examples/emoji_flux/render.py writes, shrunk, shifted and turned."""

    def __init__(self, path: Path, device: str) -> None:
        with np.load(path) as data:
            self.captions = [str(caption) for caption in data["captions"]]
            images = torch.from_numpy(data["images"])
        self.images = images.to(device).permute(0, 3, 1, 2)

    def prompts(self) -> list[str]:
        """Every caption once."""
        return self.captions

    def draw(self, count: int) -> tuple[Tensor, list[str]]:
        """Pictures [count, 3, 64, 64] in [-1, 1] and their prompts."""
        picks = torch.randint(len(self.captions), (count,)).tolist()
        device = self.images.device
        pictures = self.images[picks].float() / 127.5 - 1
        angle = (torch.rand(count, device=device) - 0.5) * math.pi / 3
        scale = 1.0 / (0.6 + 0.4 * torch.rand(count, device=device))
        shift = (torch.rand(count, 2, device=device) - 0.5) * 0.5
        return _moved(pictures, angle, scale, shift, SIDE), [self.captions[pick] for pick in picks]


class Videos(Emoji):
    """Emoji that move or turn, eight frames of 32x32."""

    def prompts(self) -> list[str]:
        """Every caption with every motion."""
        return [f"{caption} {motion}" for caption in self.captions for motion in _MOTIONS]

    def draw(self, count: int) -> tuple[Tensor, list[str]]:
        """Videos [count, 3, 8, 32, 32] in [-1, 1] and their prompts."""
        picks = torch.randint(len(self.captions), (count,)).tolist()
        motions = random.choices(list(_MOTIONS), k=count)
        device = self.images.device
        pictures = self.images[picks].float() / 127.5 - 1
        way = torch.tensor([_MOTIONS[motion] for motion in motions], device=device)
        turn = torch.tensor([float(motion == "turning") for motion in motions], device=device)
        angle = (torch.rand(count, device=device) - 0.5) * math.pi / 6
        scale = 1.0 / (0.5 + 0.3 * torch.rand(count, device=device))
        start = (torch.rand(count, 2, device=device) - 0.5) * 0.5
        frames = []
        for frame in range(FRAMES):
            time = frame / (FRAMES - 1) - 0.5
            turned = angle + turn * time * math.pi
            frames.append(_moved(pictures, turned, scale, start - way * time, VIDEO_SIDE))
        return torch.stack(frames, 2), [f"{self.captions[p]} {m}" for p, m in zip(picks, motions, strict=True)]


class Photographs:
    """Crops of the photographs in a folder, at three distances; a prompt names the photograph and the distance."""

    def __init__(self, folder: Path, device: str) -> None:
        paths = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
        self.names = [" ".join(path.stem.lower().replace("_", " ").split()) for path in paths]
        self.levels: dict[str, list[Tensor]] = {}
        for name, height in _HEIGHTS.items():
            self.levels[name] = [_photograph(path, height).to(device) for path in paths]

    def prompts(self) -> list[str]:
        """Every photograph at every distance."""
        return [f"{level} {name}" for name in self.names for level in self.levels]

    def draw(self, count: int) -> tuple[Tensor, list[str]]:
        """Pictures [count, 3, 64, 64] in [-1, 1] and their prompts."""
        crops, prompts = [], []
        for _ in range(count):
            level, pick = random.choice(list(self.levels)), random.randrange(len(self.names))
            photograph = self.levels[level][pick]
            y, x = (random.randint(0, size - SIDE) for size in photograph.shape[1:])
            crop = photograph[:, y : y + SIDE, x : x + SIDE]
            crops.append(crop.flip(2) if random.random() < 0.5 else crop)
            prompts.append(f"{level} {self.names[pick]}")
        return torch.stack(crops).float() / 127.5 - 1, prompts


def vocabulary(prompts: list[str]) -> list[str]:
    """All words of some prompts, the empty one first."""
    return ["", *sorted({word for prompt in prompts for word in prompt.split()})]


def ids_of(prompts: list[str], words: dict[str, int]) -> Tensor:
    """[B, WORDS] numbers of the words, 0 beyond a prompt's end and for unknown ones."""
    rows = [[words.get(word, 0) for word in prompt.split()[:WORDS]] for prompt in prompts]
    return torch.tensor([row + [0] * (WORDS - len(row)) for row in rows])


def split(prompts: list[str], count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Two lists of prompts: to record statistics of and to fit to, and, `count` of them, to judge by."""
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    return shuffled[count:], shuffled[:count]


def _photograph(path: Path, height: int) -> Tensor:
    picture = Image.open(path).convert("RGB")
    width = max(round(picture.width * height / picture.height), SIDE)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized)[:, : round(_WIDEST * height)].copy()).permute(2, 0, 1)


def _moved(pictures: Tensor, angle: Tensor, scale: Tensor, shift: Tensor, side: int) -> Tensor:
    """Pictures turned, shrunk and shifted, at side x side pixels; white comes in at the borders."""
    if side < pictures.shape[2]:
        pictures = functional.interpolate(pictures, size=(side, side), mode="area")
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(rows, list(pictures.shape), align_corners=False)
    return functional.grid_sample(pictures - 1, grid, mode="bilinear", align_corners=False) + 1
