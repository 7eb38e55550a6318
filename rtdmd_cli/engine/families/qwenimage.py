"""Qwen-Image."""

from __future__ import annotations

from rtdmd_cli.engine.families.facts import (
    APACHE,
    FULL_ENCODER,
    SHIFTED_LEVELS,
    SINCE_MANUAL_SIGMAS,
    ComfyFile,
    ExportFamily,
    FamilyFacts,
    Loader,
    Published,
)

COMFY = "Comfy-Org/Qwen-Image_ComfyUI"
MODEL, CLIP, VAE = (
    "qwen_image_bf16.safetensors",
    "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "qwen_image_vae.safetensors",
)

FACTS = FamilyFacts(
    "Qwen-Image",
    models={"Qwen/Qwen-Image": Published(APACHE, 58e9)},
    export=ExportFamily(
        rounded_levels=True,
        architecture={"": "qwen-image"},
        comfy={
            "": Loader(
                ("UNETLoader", {"unet_name": MODEL, "weight_dtype": "default"}),
                ("CLIPLoader", {"clip_name": CLIP, "type": "qwen_image"}),
                VAE,
                "EmptySD3LatentImage",
                files=(
                    ComfyFile(MODEL, "base model", "diffusion_models", COMFY),
                    ComfyFile(CLIP, "text encoder", "text_encoders", COMFY),
                    ComfyFile(VAE, "VAE", "vae", COMFY),
                ),
                needs=SINCE_MANUAL_SIGMAS,
                tokens=None,
                t5=False,
                text=f"{SHIFTED_LEVELS.format('Qwen-Image')} {FULL_ENCODER.format('qwen_2.5_vl_7b.safetensors')}",
            )
        },
        unguided={"true_cfg_scale": "1.0"},
        scheduler={"shift_terminal": None},
    ),
)
