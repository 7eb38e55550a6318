"""Stable Diffusion 3 and 3.5 Medium."""

from __future__ import annotations

from rtdmd_cli.engine.families.facts import (
    APACHE,
    SINCE_MANUAL_SIGMAS,
    ComfyFile,
    ExportFamily,
    FamilyFacts,
    Licence,
    Loader,
    Published,
    other_licence,
)

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
SD35 = "stabilityai/stable-diffusion-3.5-medium"


def _licence(repository: str) -> Licence:
    return other_licence(repository, "Stability AI Community License", "stabilityai-ai-community")


def _sd3(checkpoint: str, repo: str) -> Loader:
    encoders = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
    names = {f"clip_name{i}": name for i, name in enumerate(encoders, 1)}
    return Loader(
        ("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        ("TripleCLIPLoader", names),
        None,
        "EmptySD3LatentImage",
        files=(
            ComfyFile(checkpoint, "base model and VAE", "checkpoints", repo),
            *(ComfyFile(name, "text encoder", "text_encoders", repo) for name in encoders),
        ),
        needs=SINCE_MANUAL_SIGMAS,
        tokens=77,
    )


FACTS = FamilyFacts(
    "Stable Diffusion 3 and 3.5 Medium, and the built-in shapes model",
    models={
        "builtin:shapes": Published(APACHE, None),
        SD3: Published(_licence(SD3), 16e9),
        SD35: Published(_licence(SD35), 17e9),
    },
    export=ExportFamily(
        architecture={"": "stable-diffusion-v3-medium", SD35: "stable-diffusion-v3.5-medium"},
        comfy={
            "": _sd3("sd3_medium.safetensors", "stabilityai/stable-diffusion-3-medium"),
            SD35: _sd3("sd3.5_medium.safetensors", SD35),
        },
    ),
)
