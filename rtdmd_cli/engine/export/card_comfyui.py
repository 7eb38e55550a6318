"""The parts of a card that are about ComfyUI."""

from __future__ import annotations

from rtdmd_cli.engine.export import code
from rtdmd_cli.engine.export.comfyui import SEED_STRIDE, SEEDS
from rtdmd_cli.engine.export.facts import Facts
from rtdmd_cli.engine.export.families import comfyui_knows
from rtdmd_cli.engine.export.markdown import table
from rtdmd_cli.engine.export.names import COMFYUI, comfyui_lora

SEEDS_NOTE = (
    f"Every sampling node has its own seed: of a picture's seed s, the node of step k (the first is 0) has "
    f"(s + k * {SEED_STRIDE}) modulo 2^{SEEDS.bit_length() - 1}. Equal seeds would mean equal noise: whoever sets them "
    "through the API keeps to that rule."
)
ETA_NOTE = "Through the API a step is the training's own; the window rounds the samplers' eta to 0.01."


def lora_section(facts: Facts) -> str:
    """What to put where, and which workflow to open."""
    return "\n\n".join(
        [
            f"Needs ComfyUI {facts.loader.needs} or newer. Put these files into the folders under `ComfyUI/models`:",
            _files(facts, comfyui_lora(facts.name), "this LoRA", "loras", base=True),
            _workflows(facts, facts.name),
        ]
    )


def merged_section(facts: Facts) -> str:
    """How ComfyUI uses the merged transformer, or that it can't."""
    if not comfyui_knows(facts.base):
        return "ComfyUI knows no model like the built-in one and can't load this one."
    if not facts.loader.takes_merged:
        return "ComfyUI can't load this transformer in the layout of diffusers today; it takes the LoRA of `--format comfyui`."
    target, shards = f"{facts.name}.safetensors", merged_files(facts)
    copied = f"Copy `{shards[0]}` into `ComfyUI/models/diffusion_models` as `{target}`."
    names = facts.loader.names
    if names is not None or len(shards) > 1:
        wanted = (
            "one file"
            if names is None
            else "one file with names of its own (older versions draw black from others)"
        )
        copied = (
            f"ComfyUI wants {wanted}. Run this in the folder of the export, then move `{target}` into "
            f"`ComfyUI/models/diffusion_models`:\n\n{code.join_code(target, names)}"
        )
    return "\n\n".join(
        [
            f"{copied} The other files, in ComfyUI {facts.loader.needs} or newer:",
            _files(facts, target, "this transformer", "diffusion_models", base=facts.loader.vae is None),
            _workflows(facts, f"{facts.name}-merged"),
        ]
    )


def merged_files(facts: Facts) -> list[str]:
    """The files of the merged transformer's weights."""
    return sorted(
        name for name in facts.files if name.startswith("transformer/") and name.endswith(".safetensors")
    )


def length_note(facts: Facts) -> str:
    """Whether ComfyUI's text is as long as the training's."""
    loader, length = facts.loader, facts.preset.model.text_length
    if loader.t5:
        return (
            f"The node T5TokenizerOptions pads the prompt to {length} tokens as in training (by itself ComfyUI pads to "
            f"{loader.tokens}). A longer prompt is cut by diffusers and not by ComfyUI."
        )
    if loader.tokens is None:
        return (
            "ComfyUI reads the prompt at its own length, as training did; one of more than "
            f"{length} tokens is cut by diffusers and not by ComfyUI."
        )
    if length == loader.tokens:
        return f"ComfyUI pads the prompt to {length} tokens, as training did."
    return (
        f"ComfyUI pads the prompt to {loader.tokens} tokens; this model was trained with {length}, and the padding is not "
        "masked, so its pictures differ a little from those of diffusers."
    )


def _files(facts: Facts, own: str, what: str, folder: str, base: bool) -> str:
    """base: whether the base model is needed beside it."""
    rows = [(f"`{own}`", what, folder, "this export")]
    for file in facts.loader.files:
        is_base = file.what.startswith("base model")
        if is_base and not base:
            continue
        mine = is_base and not facts.on_hub
        source = f"[{file.source}](https://huggingface.co/{file.source})"
        rows.append(
            (f"`{file.name}`", file.what, file.folder, f"`{facts.base}` as one file" if mine else source)
        )
    return table(("file", "what it is", "folder", "where from"), rows)


def _workflows(facts: Facts, name: str) -> str:
    eta = facts.preset.sampler.eta
    return (
        f"Then drop a workflow onto the window: `{COMFYUI}/{name}-euler.json` (deterministic), or `{COMFYUI}/{name}-cps.json` "
        f"(a node a step with fresh noise, the sampler of the training with eta {eta:g}). Change the names in the loaders "
        f"where your files are called otherwise. `{name}-euler-api.json` and `{name}-cps-api.json` are the same for the API. "
        f"{ETA_NOTE} {SEEDS_NOTE}\n\n{length_note(facts)} {facts.loader.text}".strip()
    )
