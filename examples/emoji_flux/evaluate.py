"""Measure how often a saved pipeline draws the emoji that its prompt names, and save grids to look at."""

import argparse
import hashlib
import json
import platform
import random
from pathlib import Path

import numpy as np
import torch
from common import IMAGE_SIZE, base_parser, default_device, load_emoji, prepare_torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# What is generated: the grid's file name, how many captions at most, and the arguments of the pipeline.
VARIANTS = {
    "plain": ("grid.png", None, {"max_sequence_length": 16}),
    "true_cfg_scale=3": ("grid_cfg.png", 64, {"max_sequence_length": 16, "true_cfg_scale": 3.0}),
    "max_sequence_length=512": (None, 64, {"max_sequence_length": 512}),
}
GRID_SIDE = 8


class Ranker:
    """Ranks the rendered emoji by their distance to a generated picture."""

    def __init__(self, images: np.ndarray):
        unique, self.class_of = np.unique(images.reshape(len(images), -1), axis=0, return_inverse=True)
        self.pictures = torch.from_numpy(unique).float() / 255

    def rank(self, image: np.ndarray, own: int) -> int:
        """1 if emoji `own` is the nearest in pixel L2. Emoji that look exactly alike count as one."""
        target = torch.from_numpy(image.reshape(-1)).float() / 255
        distances = (self.pictures - target).square().sum(dim=1)
        return 1 + int((distances < distances[self.class_of[own]]).sum())


def fingerprint(args: argparse.Namespace, settings: dict) -> str:
    """Names a set of generated pictures by the weights and settings that made them."""
    hashed = hashlib.sha256(json.dumps([settings, args.seed, args.steps, args.dtype, args.captions]).encode())
    for file in sorted(args.pipeline.rglob("*.safetensors")):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()[:16]


def generate(args: argparse.Namespace, pipe: FluxPipeline, prompts: list[str], settings: dict) -> np.ndarray:
    """Pictures of all prompts as uint8; batches drawn by an earlier, interrupted call are taken from its cache."""
    cache = args.run / f"evaluate-{fingerprint(args, settings)}.npy"
    images = np.load(cache) if cache.exists() else np.empty((0, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for start in tqdm(range(len(images), len(prompts), args.batch), desc="generate"):
        batch = prompts[start : start + args.batch]
        # One CPU generator a picture, so neither the device nor the batch size changes the noise.
        generators = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(batch))]
        drawn = pipe(
            batch,
            negative_prompt=[""] * len(batch),
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=args.steps,
            generator=generators,
            output_type="np",
            **settings,
        ).images
        images = np.concatenate([images, (drawn * 255).round().astype(np.uint8)])
        np.save(cache, images)
    return images


def save_grid(path: Path, images: np.ndarray, prompts: list[str], ranks: list[int]) -> None:
    """The first pictures with their captions; a caption in red missed the five nearest."""
    width, height, line = 112, 112, 11
    grid = Image.new("RGB", (GRID_SIDE * width, GRID_SIDE * height), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(9)
    for cell in range(min(GRID_SIDE**2, len(images))):
        left, top = cell % GRID_SIDE * width, cell // GRID_SIDE * height
        grid.paste(Image.fromarray(images[cell]), (left + (width - IMAGE_SIZE) // 2, top + 4))
        lines = [""]
        for word in prompts[cell].split():
            joined = f"{lines[-1]} {word}".strip()
            if font.getlength(joined) < width - 6:
                lines[-1] = joined
            else:
                lines.append(word)
        for row, text in enumerate(lines):
            pen.text((left + 3, top + 70 + line * row), text, font=font, fill="black" if ranks[cell] <= 5 else "red")
    grid.save(path, optimize=True)


def summary(ranks: list[int]) -> dict:
    """Shares of captions whose own emoji is the nearest, and among the five nearest."""
    return {
        "captions": len(ranks),
        "top1": sum(rank == 1 for rank in ranks) / len(ranks),
        "top5": sum(rank <= 5 for rank in ranks) / len(ranks),
    }


def hardware(device: str) -> str:
    """The name of the device that drew the pictures."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU"


def evaluate(args: argparse.Namespace) -> dict:
    """Generate, rank and draw the grids of every variant."""
    images, captions = load_emoji(args.run)
    picks = random.Random(args.seed).sample(range(len(captions)), args.captions)
    prompts = [captions[pick] for pick in picks]
    ranker = Ranker(images)
    pipe = FluxPipeline.from_pretrained(args.pipeline).to(args.device, getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    result = {
        "seed": args.seed,
        "steps": args.steps,
        "size": IMAGE_SIZE,
        "dtype": args.dtype,
        "hardware": hardware(args.device),
        "emoji": len(images),
        "distinct_pictures": len(ranker.pictures),
    }
    for name, (grid, most, settings) in VARIANTS.items():
        chosen = prompts[:most]
        drawn = generate(args, pipe, chosen, settings)
        ranks = [ranker.rank(image, pick) for image, pick in zip(drawn, picks, strict=False)]
        result[name] = {"settings": settings} | summary(ranks)
        print(name, result[name])
        if grid:
            save_grid(args.out / grid, drawn, chosen, ranks)
        if name == "plain":
            result["ranks"] = dict(zip(chosen, ranks, strict=True))
    return result


def main() -> None:
    """Evaluate a pipeline and write evaluation.json beside its grids."""
    parser = base_parser(__doc__)
    parser.add_argument("--pipeline", type=Path, help="a saved pipeline; by default the one in --run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the JSON and the grids")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default=default_device())
    args = parser.parse_args()
    args.pipeline = args.pipeline or args.run / "pipeline"
    args.out.mkdir(parents=True, exist_ok=True)
    prepare_torch()
    text = json.dumps(evaluate(args), indent=1, ensure_ascii=False)
    (args.out / "evaluation.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
