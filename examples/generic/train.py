"""Train one of the small models, save it, and draw a sheet of its pictures.

python train.py unet --emoji emoji.npz --run build/generic --seconds 470
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Photographs, split, vocabulary
from models import MODELS, Model, Words, load, save
from PIL import Image
from torch import Tensor
from tqdm import tqdm

CAPTION_DROP, EMA, WARMUP, MIN_SNR = 0.1, 0.999, 200, 5.0
UNIFORM_SHARE = 0.1  # of the noise levels of a flow
JUDGED = 128  # prompts, apart from those whose statistics are recorded


def loss_of(model: Model, network: Any, words: Words, alphas: Tensor, clean: Tensor, prompts: list[str]) -> Tensor:
    """The training loss of one batch."""
    kept = torch.rand(len(prompts)) >= CAPTION_DROP
    text = words([prompt if keep else "" for prompt, keep in zip(prompts, kept.tolist(), strict=True)])
    noise = torch.randn_like(clean)
    shape = (-1, *[1] * (clean.ndim - 1))
    if model.prediction == "flow":
        normal, uniform = torch.randn(len(clean), device=clean.device), torch.rand(len(clean), device=clean.device)
        sigma = torch.where(torch.rand_like(uniform) < UNIFORM_SHARE, uniform, normal.sigmoid())
        made = model.call(network, torch.lerp(clean, noise, sigma.view(shape)), 1000 * sigma, text)
        return (made.float() - (noise - clean)).square().mean()
    steps = torch.randint(len(alphas), (len(clean),), device=clean.device)
    a = alphas[steps]
    noisy = a.sqrt().view(shape) * clean + (1 - a).sqrt().view(shape) * noise
    made = model.call(network, noisy, steps, text)
    weight = (a / (1 - a)).clamp_max(MIN_SNR) / (a / (1 - a))  # min-SNR, for a prediction of the noise
    return ((made.float() - noise).square().flatten(1).mean(1) * weight).mean()


def train(name: str, data: Any, words: Words, options: argparse.Namespace) -> tuple[torch.nn.Module, Words]:
    """The moving average of the weights, after so many seconds."""
    model = MODELS[name]
    network = model.denoiser().to(options.device)
    alphas = model.scheduler().alphas_cumprod.to(options.device) if model.prediction == "epsilon" else torch.zeros(1)
    both = torch.nn.ModuleList([network, words])
    average = copy.deepcopy(both).requires_grad_(False)
    optimizer = torch.optim.AdamW(both.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    fast = torch.compile(network, dynamic=False) if options.compile else network
    begin, step, shown = time.monotonic(), 0, 0.0
    interval = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(desc=name, mininterval=interval, maxinterval=2 * interval) as bar:
        while (done := (time.monotonic() - begin) / options.seconds) < 1.0 and step != options.steps:
            rate = options.lr * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * done))
            optimizer.param_groups[0]["lr"] = rate
            pictures, prompts = data.draw(options.batch)
            with torch.autocast(torch.device(options.device).type, torch.bfloat16):
                loss = loss_of(model, fast, words, alphas, model.encode(pictures), prompts)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            step += 1
            decay = min(EMA, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(both.parameters()), 1 - decay)
            if step % 50 == 0:
                shown = loss.item() if shown == 0.0 else 0.9 * shown + 0.1 * loss.item()
                bar.set_postfix_str(f"step {step}, loss {shown:.4f}, {done:.0%}")
            bar.update()
    size = sum(weight.numel() for weight in network.parameters())
    print(f"{name}: {step} steps, running loss {shown:.4f}, {size:,} parameters")
    return average[0].eval(), average[1].eval()


def sheet(pipe: Any, prompts: list[str], path: Path, steps: int = 50) -> None:
    """Pictures of some prompts, without guidance in the upper rows and with it in the lower ones."""
    rows = []
    for more in ({}, pipe.model.guided):
        noise = [torch.Generator("cpu").manual_seed(i) for i in range(len(prompts))]
        request = {**pipe.model.request, **more, "num_inference_steps": steps}
        images = pipe(prompt=prompts, generator=noise, **request).images
        images = images if images.ndim == 4 else np.concatenate([images[:, 0], images[:, -1]], 2)
        rows += [np.concatenate(list(part), 1) for part in np.array_split(images, 2)]
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)


def main() -> None:
    """Train, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--emoji", type=Path, help="emoji.npz of examples/emoji_flux/render.py")
    parser.add_argument("--photographs", type=Path, help="folder of pictures, whose names tell what they show")
    parser.add_argument("--run", type=Path, default=Path("build/generic"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=470.0)
    parser.add_argument("--steps", type=int, default=-1, help="end after so many")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails at these sizes
    model = MODELS[options.name]
    source = options.photographs if model.data is Photographs else options.emoji
    data = model.data(source, options.device)
    words = Words(vocabulary(data.prompts())).to(options.device)
    path = options.run / f"{options.name}.safetensors"
    save(path, *train(options.name, data, words, options))
    path.with_suffix(".txt").write_text("\n".join(data.prompts()) + "\n", encoding="utf-8")
    torch.set_float32_matmul_precision("highest")
    pipe = load(options.name, path, options.device)
    steps = 50 if options.steps < 0 else 2
    sheet(pipe, split(data.prompts(), JUDGED)[1][:16], options.run / f"{options.name}.png", steps)


if __name__ == "__main__":
    main()
