"""Train the transformer and both text encoders together by rectified flow, and save the FluxPipeline."""

import argparse
import copy
import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from common import (
    PACKED_SIZE,
    Clock,
    load_checkpoint,
    load_emoji,
    prepare_torch,
    save_checkpoint,
    to_model_range,
    training_parser,
)
from diffusers import AutoencoderKL, FluxPipeline
from models import CLIP_LENGTH, EmojiFlux, load_or_build_tokenizers, save_pipeline
from torch.nn import functional

# T5 padding length -> how often, and which part of the batch, since long sequences are slow. FLUX masks no padding,
# so the networks have to meet every length that a caller may ask for.
TEXT_LENGTHS = {16: (0.94, 1.0), 64: (0.03, 0.5), 512: (0.03, 0.25)}
CAPTION_DROP = 0.1
UNIFORM_SHARE = 0.1  # of the noise levels; the logit-normal alone hardly visits the two ends
EMA_DECAY = 0.999


def sampling_weights(captions: list[str]) -> torch.Tensor:
    """How often to draw each emoji: the skin tones of one motif teach each other, so each of them needs fewer draws."""
    motifs = [re.sub(r" (medium-)?(light|medium|dark) skin tone", "", caption) for caption in captions]
    sizes = Counter(motifs)
    return torch.tensor([sizes[motif] ** -0.5 for motif in motifs])


@dataclass
class Data:
    """Everything a batch is made of, on the training device; the last row of each text table is the empty caption."""

    latents: torch.Tensor
    weights: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: dict[int, torch.Tensor]


@torch.no_grad()
def prepare_data(args: argparse.Namespace, vae: AutoencoderKL, tokenizers: tuple) -> Data:
    """Encode the pictures and tokenize the captions once, as FluxPipeline does it."""
    images, captions = load_emoji(args.run)
    vae = vae.to(args.device)
    parts = to_model_range(images, args.device).split(256)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    texts = [*captions, ""]

    def ids(tokenizer, length: int) -> torch.Tensor:
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids.to(args.device)

    return Data(
        latents=FluxPipeline._pack_latents(latents, *latents.shape),
        weights=sampling_weights(captions).to(args.device),
        clip_ids=ids(tokenizers[0], CLIP_LENGTH),
        t5_ids={length: ids(tokenizers[1], length) for length in TEXT_LENGTHS},
    )


class Trainer:
    """The model with its optimizer, moving average and random state."""

    def __init__(self, args: argparse.Namespace, model: EmojiFlux):
        self.args = args
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=args.device != "cpu"
        )
        self.generator = torch.Generator(args.device).manual_seed(args.seed)
        self.clock = Clock(args)
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, PACKED_SIZE, PACKED_SIZE, args.device, torch.float32)
        # In bfloat16 the timestep would keep 8 bits; FLUX takes its precision from what x_embedder returns.
        model.transformer.x_embedder.register_forward_hook(lambda module, inputs, output: output.float())
        self.fast_transformer = torch.compile(model.transformer) if args.compile else model.transformer

    def save(self) -> None:
        """Write everything that a later call needs to go on."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.clock.step,
            "elapsed": self.clock.elapsed,
        }
        save_checkpoint(self.args.run / "train.pt", state)

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        if state := load_checkpoint(self.args.run / "train.pt"):
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.clock = Clock(self.args, state["step"], state["elapsed"])

    def noise_levels(self, count: int) -> torch.Tensor:
        """Logit-normal sigmas with a share of uniform ones."""
        normal, uniform, choice = (
            draw((count,), generator=self.generator, device=self.args.device)
            for draw in (torch.randn, torch.rand, torch.rand)
        )
        return torch.where(choice < UNIFORM_SHARE, uniform, normal.sigmoid())

    def text_length(self) -> int:
        """The padding length of this step; a function of the step, so a resumed run draws the same."""
        chances = [chance for chance, _ in TEXT_LENGTHS.values()]
        return random.Random(f"{self.args.seed}-{self.clock.step}").choices(list(TEXT_LENGTHS), chances)[0]

    def loss(self, data: Data) -> torch.Tensor:
        """Squared error of the velocity on one random batch."""
        length, device = self.text_length(), self.args.device
        count = max(1, int(self.args.batch * TEXT_LENGTHS[length][1]))
        picks = torch.multinomial(data.weights, count, replacement=True, generator=self.generator)
        dropped = torch.rand(count, generator=self.generator, device=device) < CAPTION_DROP
        texts = torch.where(dropped, len(data.latents), picks)
        clean = data.latents[picks]
        noise = torch.randn(clean.shape, generator=self.generator, device=device)
        sigma = self.noise_levels(count)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        # Only the common length is worth the time of a compilation.
        transformer = self.fast_transformer if length == min(TEXT_LENGTHS) else self.model.transformer
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            pooled, states = self.model.encode(data.clip_ids[texts], data.t5_ids[length][texts])
            velocity = transformer(
                hidden_states=noisy,
                timestep=sigma,
                pooled_projections=pooled,
                encoder_hidden_states=states,
                txt_ids=torch.zeros(length, 3, device=device),
                img_ids=self.image_ids,
                return_dict=False,
            )[0]
        return functional.mse_loss(velocity.float(), noise - clean)

    def update(self, loss: torch.Tensor) -> None:
        """One optimizer step and one step of the moving average."""
        self.optimizer.param_groups[0]["lr"] = self.clock.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(EMA_DECAY, (1 + self.clock.step) / (10 + self.clock.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def run(self, data: Data) -> None:
        """Train until the clock says stop."""
        shown = None
        for bar in self.clock.ticks():
            loss = self.loss(data)
            self.update(loss)
            shown = loss.detach() if shown is None else torch.lerp(shown, loss.detach(), 0.01)
            if self.clock.step % 100 == 0:
                bar.set_postfix(loss=f"{shown.item():.4f}", done=f"{self.clock.fraction:.0%}", refresh=False)
            if self.clock.save_due():
                self.save()
        self.save()
        if shown is not None:
            print(f"step {self.clock.step}, {self.clock.elapsed:.0f} s, running loss {shown.item():.4f}")


def main() -> None:
    """Train, and save the moving average as a pipeline."""
    parser = training_parser(__doc__, seconds=850, batch=256, lr=1e-3)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--init", type=Path, help="saved pipeline to start from; its VAE and tokenizers are used too")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="as saved")
    args = parser.parse_args()
    prepare_torch()
    torch.manual_seed(args.seed)
    if args.init:
        for name in ("vae", "tokenizer", "tokenizer_2"):
            shutil.copytree(args.init / name, args.run / name, dirs_exist_ok=True)
    vae = AutoencoderKL.from_pretrained(args.run / "vae")
    tokenizers = load_or_build_tokenizers(args.run, load_emoji(args.run)[1])
    data = prepare_data(args, vae, tokenizers)
    model = EmojiFlux(*tokenizers)
    if args.init:
        model.start_from(args.init)
    trainer = Trainer(args, model.to(args.device))
    trainer.resume()
    trainer.run(data)
    save_pipeline(args.run / "pipeline", trainer.average, vae, tokenizers, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
