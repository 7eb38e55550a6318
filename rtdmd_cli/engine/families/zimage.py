"""Z-Image."""

from __future__ import annotations

from rtdmd_cli.engine.families.facts import (
    APACHE,
    SINCE_MANUAL_SIGMAS,
    ComfyFile,
    ExportFamily,
    FamilyFacts,
    Loader,
    Published,
)

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
            )
        },
        unguided={"guidance_scale": "0.0"},  # its scale counts from 0
        float32_noise=True,
    ),
)
