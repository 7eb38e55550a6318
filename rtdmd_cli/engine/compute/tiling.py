"""Decoding large pictures piece by piece."""

from typing import Any

TILE = 512
"""Side of a tile in pixels: what the autoencoders decode whole at the smallest training resolution."""


def enable_tiling(vae: Any) -> None:
    """Let a diffusers autoencoder decode one picture at a time, and one of more than 512 px in overlapping tiles.

    Tiles overlap by a quarter and are blended. A tile sees no further than its edge, so a tiled picture differs a
    little from a whole one. Smaller autoencoders keep their own, smaller tile.
    """
    compression = vae.tile_sample_min_size // vae.tile_latent_min_size
    vae.tile_sample_min_size = min(TILE, vae.tile_sample_min_size)
    vae.tile_latent_min_size = vae.tile_sample_min_size // compression
    vae.enable_tiling()
    vae.enable_slicing()
