"""FLUX.1-dev."""

from __future__ import annotations

from rtdmd_cli.engine.families.facts import (
    SHIFTED_LEVELS,
    SINCE_MANUAL_SIGMAS,
    ComfyFile,
    ExportFamily,
    FamilyFacts,
    Loader,
    Published,
    other_licence,
)

FLUX1 = "black-forest-labs/FLUX.1-dev"
ENCODERS = "comfyanonymous/flux_text_encoders"
LICENCE = other_licence(FLUX1, "FLUX.1 [dev] Non-Commercial License", "flux-1-dev-non-commercial-license")

FACTS = FamilyFacts(
    "FLUX.1-dev",
    models={FLUX1: Published(LICENCE, 34e9)},
    export=ExportFamily(
        rounded_levels=True,
        architecture={"": "flux-1-dev"},
        comfy={
            "": Loader(
                ("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}),
                (
                    "DualCLIPLoader",
                    {
                        "clip_name1": "t5xxl_fp16.safetensors",
                        "clip_name2": "clip_l.safetensors",
                        "type": "flux",
                    },
                ),
                "ae.safetensors",
                "EmptySD3LatentImage",
                files=(
                    ComfyFile("flux1-dev.safetensors", "base model", "diffusion_models", FLUX1),
                    ComfyFile("t5xxl_fp16.safetensors", "text encoder", "text_encoders", ENCODERS),
                    ComfyFile("clip_l.safetensors", "text encoder", "text_encoders", ENCODERS),
                    ComfyFile("ae.safetensors", "VAE", "vae", FLUX1),
                ),
                needs=SINCE_MANUAL_SIGMAS,
                tokens=256,
                guidance=1.0,
                text=SHIFTED_LEVELS.format("FLUX"),
            )
        },
    ),
)
