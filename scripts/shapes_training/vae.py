"""The VAE: 32 x 32 pixels to a latent of 8 channels at 8 x 8, diffusers' `AutoencoderKL`."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scripts.shapes_training.data import make_pictures
from scripts.shapes_training.loop import read_weights, run

OBJECT_WEIGHT = 4.0
KL_WEIGHT = 3e-6


def build() -> AutoencoderKL:
    """An untrained VAE with 0.8 million parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=32,
    )


def train(
    folder: Path,
    device: torch.device,
    seed: int,
    steps: int,
    batch: int = 64,
    lr: float = 1e-3,
    count: int = 60_000,
    save_every: int = 500,
) -> AutoencoderKL:
    """Weighted L1 with a small KL term; objects count (1 + OBJECT_WEIGHT) times as much as the background."""
    torch.manual_seed(seed)
    vae = build().to(device=device, memory_format=torch.channels_last)
    pictures = make_pictures(count, seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

    def update(step: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(pictures.captions), (batch,), generator=generator)
        x = pictures.images[index].to(device).float() / 127.5 - 1
        weight = 1 + OBJECT_WEIGHT * pictures.masks[index].to(device).float()[:, None] / 255
        noise = torch.randn((batch, 8, 8, 8), generator=generator).to(device)
        loss, l1 = _loss(vae, x.contiguous(memory_format=torch.channels_last), weight, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.item(), "l1": l1.item()}

    run(folder, vae, [optimizer], update, steps, save_every=save_every)
    return vae.eval()


def load(folder: Path) -> AutoencoderKL:
    """The VAE of a training folder as it stands, on the CPU. DataError without one."""
    vae = build()
    vae.load_state_dict(read_weights(folder)[1])
    return vae.eval()


def _loss(vae: AutoencoderKL, x: Tensor, weight: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean + posterior.std * noise).sample
    error = (y.float() - x).abs()
    kl = posterior.kl().float().mean()
    return (weight * error).mean() + KL_WEIGHT * kl, error.mean()
