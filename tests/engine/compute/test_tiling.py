"""Tiled decoding: near the whole picture, and exactly it where one tile holds it."""

import pytest
import torch
from diffusers import AutoencoderKL

from rtdmd_cli.engine.compute import tiling
from rtdmd_cli.engine.compute.tiling import enable_tiling
from rtdmd_cli.engine.planning.account import Account


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


@pytest.mark.parametrize("side", [16, 64])
def test_a_gradient_through_tiles(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    """That of diffusers' own tiles, which hold every tile's activations; here those of one, and of one alone as they are."""
    monkeypatch.setattr(tiling, "TILE", 32)
    drawn = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, side, side, generator=drawn)
    pull = torch.randn(1, 3, 2 * side, 2 * side, generator=drawn)
    found, held = [], []
    for own in (False, True):
        vae, x = autoencoder(1024).requires_grad_(False), latents.clone().requires_grad_()
        tiled = vae.tiled_decode
        enable_tiling(vae)
        if not own:
            vae.tiled_decode = tiled
        account = Account()
        with account:
            picture = vae.decode(x, return_dict=False)[0]
            held.append(account.live)
            (picture * pull).sum().backward()
        found.append((picture.detach(), x.grad))
    for own, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, theirs)
    assert found[1][1].any() and (held[1] < 0.2 * held[0] if side == 64 else held[1] == held[0])
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(latents, return_dict=False)[0], found[1][0])
