"""Train the small VAE on the rendered emoji and set its latent scale and shift."""

import argparse

import torch
from common import (
    Clock,
    load_checkpoint,
    load_emoji,
    prepare_torch,
    save_checkpoint,
    to_model_range,
    training_parser,
)
from diffusers import AutoencoderKL
from models import build_vae
from torch.nn import functional

KL_WEIGHT = 1e-4


def loss_of(vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Reconstruction error in both norms, and a light pull of the latents towards a unit Gaussian."""
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator, device=images.device)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return functional.mse_loss(decoded, images) + functional.l1_loss(decoded, images) + KL_WEIGHT * divergence


def train(args: argparse.Namespace, vae: AutoencoderKL, images: torch.Tensor) -> bool:
    """Train from the last checkpoint on; True once the run is finished."""
    path = args.run / "vae.pt"
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99))
    generator = torch.Generator(args.device).manual_seed(args.seed)
    clock = Clock(args)
    if state := load_checkpoint(path):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        clock = Clock(args, state["step"], state["elapsed"])

    def save() -> None:
        state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
        save_checkpoint(path, state | {"step": clock.step, "elapsed": clock.elapsed})

    for bar in clock.ticks():
        picks = torch.randint(len(images), (args.batch,), generator=generator, device=args.device)
        loss = loss_of(vae, images[picks], generator)
        optimizer.param_groups[0]["lr"] = clock.learning_rate()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if clock.step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", done=f"{clock.fraction:.0%}", refresh=False)
        if clock.save_due():
            save()
    save()
    return clock.finished


@torch.no_grad()
def measure(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Set scale and shift so that latents have mean 0 and deviation 1, and print the reconstruction PSNR."""
    latents, squared = [], []
    for part in images.split(256):
        latents.append(vae.encode(part).latent_dist.mode())
        decoded = vae.decode(latents[-1]).sample.clamp(-1, 1)
        squared.append(((decoded - part) / 2).square().mean(dim=(1, 2, 3)))
    latents = torch.cat(latents)
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    psnr = -10 * torch.cat(squared).log10()
    print(f"latent mean {latents.mean():.4f}, deviation {latents.std():.4f}")
    print(f"reconstruction PSNR: mean {psnr.mean():.2f} dB, worst {psnr.min():.2f} dB")


def main() -> None:
    """Train, measure and save the VAE."""
    args = training_parser(__doc__, seconds=75, batch=64, lr=1e-3).parse_args()
    prepare_torch()
    torch.manual_seed(args.seed)
    images = to_model_range(load_emoji(args.run)[0], args.device)
    vae = build_vae().to(args.device)
    if train(args, vae, images):
        measure(vae, images)
        vae.save_pretrained(args.run / "vae")


if __name__ == "__main__":
    main()
