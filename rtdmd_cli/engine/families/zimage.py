"""Z-Image."""

from __future__ import annotations

from rtdmd_cli.engine.families.facts import (
    APACHE,
    SINCE_MANUAL_SIGMAS,
    ComfyFile,
    ExportFamily,
    FamilyFacts,
    Loader,
    Names,
    Published,
)

COMFYUI = Names(
    changed={
        "all_x_embedder.2-1.": "x_embedder.",
        "all_final_layer.2-1.": "final_layer.",
        ".attention.norm_q.": ".attention.q_norm.",
        ".attention.norm_k.": ".attention.k_norm.",
        ".attention.to_out.0.": ".attention.out.",
    },
    joined=(".attention.to_q.", ".attention.to_k.", ".attention.to_v."),
    under=".attention.qkv.",
)
"""As in comfy/ldm/lumina/model.py. Up to some version after 0.10 it takes diffusers' names for Lumina 2's, and draws black."""

FACTS = FamilyFacts(
    "Z-Image",
    models={"Tongyi-MAI/Z-Image": Published(APACHE, 21e9)},
    export=ExportFamily(
        architecture={"": "z-image"},
        comfy={
            "": Loader(
                ("UNETLoader", {"unet_name": "z_image_bf16.safetensors", "weight_dtype": "default"}),
                ("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}),
                "ae.safetensors",
                "EmptySD3LatentImage",
                files=(
                    ComfyFile(
                        "z_image_bf16.safetensors", "base model", "diffusion_models", "Comfy-Org/z_image"
                    ),
                    ComfyFile(
                        "qwen_3_4b.safetensors", "text encoder", "text_encoders", "Comfy-Org/z_image_turbo"
                    ),
                    ComfyFile("ae.safetensors", "VAE", "vae", "Comfy-Org/z_image_turbo"),
                ),
                needs=SINCE_MANUAL_SIGMAS,
                tokens=None,
                t5=False,
                names=COMFYUI,
            )
        },
        unguided={"guidance_scale": "0.0"},  # its scale counts from 0
        float32_noise=True,
    ),
)
