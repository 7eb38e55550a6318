"""FLUX.2-klein, 4B and 9B."""

from __future__ import annotations

from rtdmd_cli.engine.families.facts import (
    APACHE,
    FULL_ENCODER,
    SHIFTED_LEVELS,
    ComfyFile,
    ExportFamily,
    FamilyFacts,
    Licence,
    Loader,
    Published,
    other_licence,
)

BFL = "black-forest-labs/"
SINCE_KEYS = "0.10.0"  # LoRA keys of its fused layers


def _licence(repository: str) -> Licence:
    return other_licence(repository, "FLUX Non-Commercial License", "flux-non-commercial-license")


def _klein(unet: str, repo: str, encoder: str, parts: str, text: str = "") -> Loader:
    model, clip, vae = f"{unet}.safetensors", f"{encoder}.safetensors", "flux2-vae.safetensors"
    return Loader(
        ("UNETLoader", {"unet_name": model, "weight_dtype": "default"}),
        ("CLIPLoader", {"clip_name": clip, "type": "flux2"}),
        vae,
        "EmptyFlux2LatentImage",
        files=(
            ComfyFile(model, "base model", "diffusion_models", f"{BFL}{repo}"),
            ComfyFile(clip, "text encoder", "text_encoders", f"Comfy-Org/{parts}"),
            ComfyFile(vae, "VAE", "vae", f"Comfy-Org/{parts}"),
        ),
        needs=SINCE_KEYS,
        tokens=512,
        t5=False,
        takes_merged=False,
        text=f"{SHIFTED_LEVELS.format('FLUX')} {text}".strip(),
    )


def _klein_4b(unet: str, repo: str) -> Loader:
    return _klein(unet, repo, "qwen_3_4b", "vae-text-encorder-for-flux-klein-4b")


def _klein_9b(unet: str, repo: str) -> Loader:
    full = FULL_ENCODER.format("qwen_3_8b.safetensors")
    return _klein(unet, repo, "qwen_3_8b_fp8mixed", "vae-text-encorder-for-flux-klein-9b", full)


FACTS = FamilyFacts(
    "FLUX.2-klein, 4B and 9B",
    models={
        **{f"{BFL}FLUX.2-klein-{each}4B": Published(APACHE, 16e9) for each in ("", "base-")},
        **{
            name: Published(_licence(name), 35e9)
            for name in (f"{BFL}FLUX.2-klein-9B", f"{BFL}FLUX.2-klein-base-9B")
        },
    },
    export=ExportFamily(
        rounded_levels=True,
        architecture={
            "": "flux-2-klein-4b",
            f"{BFL}flux.2-klein-base-4b": "flux-2-klein-base-4b",
            f"{BFL}flux.2-klein-9b": "flux-2-klein-9b",
            f"{BFL}flux.2-klein-base-9b": "flux-2-klein-base-9b",
        },
        comfy={
            "": _klein_4b("flux-2-klein-4b", "FLUX.2-klein-4B"),
            f"{BFL}flux.2-klein-base-4b": _klein_4b("flux-2-klein-base-4b", "FLUX.2-klein-base-4B"),
            f"{BFL}flux.2-klein-9b": _klein_9b("flux-2-klein-9b", "FLUX.2-klein-9B"),
            f"{BFL}flux.2-klein-base-9b": _klein_9b("flux-2-klein-base-9b", "FLUX.2-klein-base-9B"),
        },
        index={"is_distilled": True},
    ),
)
