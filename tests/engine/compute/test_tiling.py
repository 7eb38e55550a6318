"""Tiled decoding: near the whole picture, and exactly it where one tile holds it."""

import pytest
import torch
from diffusers import AutoencoderKL

from rtdmd_cli.engine.compute import tiling
from rtdmd_cli.engine.compute.tiling import enable_tiling


def autoencoder(sample_size: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=sample_size,
    ).eval()


def test_tiles_are_of_512_pixels_at_most() -> None:
    for size, pixels, latents in ((1024, 512, 256), (32, 32, 16)):
        vae = autoencoder(size)
        enable_tiling(vae)
        assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (pixels, latents)


@torch.no_grad()
def test_a_tiled_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of two, 64 px in tiles of 32 px: other pixels, by little; and equal to the whole up to one tile."""
    monkeypatch.setattr(tiling, "TILE", 32)
    vae, latents = autoencoder(1024), torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    whole = [vae.decode(part, return_dict=False)[0] for part in (latents, latents[..., :16, :16])]
    enable_tiling(vae)
    tiled = [vae.decode(part, return_dict=False)[0] for part in (latents, latents[..., :16, :16])]
    assert tiled[0].shape == whole[0].shape
    assert 0 < float((tiled[0] - whole[0]).norm() / whole[0].norm()) < 0.5
    torch.testing.assert_close(tiled[1], whole[1])
