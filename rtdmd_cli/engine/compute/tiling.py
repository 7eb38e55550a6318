"""Decoding large pictures piece by piece."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

TILE = 512
"""Side of a tile in pixels: what the autoencoders decode whole at the smallest training resolution."""


def enable_tiling(vae: Any) -> None:
    """Let a diffusers autoencoder decode one picture at a time, and one of more than 512 px in overlapping tiles.

    Tiles overlap by a quarter and are blended. A tile sees no further than its edge, so a tiled picture differs a
    little from a whole one. Smaller autoencoders keep their own, smaller tile. Where a gradient is taken, each tile is
    decoded again on the way back, so that no two tiles' activations are held at a time.
    """
    compression = vae.tile_sample_min_size // vae.tile_latent_min_size
    vae.tile_sample_min_size = min(TILE, vae.tile_sample_min_size)
    vae.tile_latent_min_size = vae.tile_sample_min_size // compression
    vae.enable_tiling()
    vae.enable_slicing()
    decode, whole = vae.tiled_decode, vae.decoder.forward

    def tiled_decode(*args: Any, **named: Any) -> Any:
        vae.decoder.forward = again if torch.is_grad_enabled() else whole
        try:
            return decode(*args, **named)
        finally:
            vae.decoder.forward = whole

    def again(*args: Any, **named: Any) -> Any:
        return checkpoint(whole, *args, use_reentrant=False, **named)

    vae.tiled_decode = tiled_decode
