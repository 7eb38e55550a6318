"""The model card of an export: README.md with front matter, as the hub reads it."""

from __future__ import annotations

from pathlib import Path

import diffusers
from huggingface_hub import ModelCard, ModelCardData

from rtdmd_cli import __version__
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.export import code
from rtdmd_cli.engine.export.card_comfyui import lora_section, merged_section
from rtdmd_cli.engine.export.facts import Facts
from rtdmd_cli.engine.export.families import FAMILIES, generator_revision
from rtdmd_cli.engine.export.generator import is_full
from rtdmd_cli.engine.export.markdown import table
from rtdmd_cli.engine.export.names import public_name
from rtdmd_cli.engine.tune_reward.report import held_out_first, terms

PAPER = "https://arxiv.org/abs/2605.26108"
DIFFUSERS = "0.42"
"""The oldest diffusers that runs a card's code: older ones know `torch_dtype=` alone."""
ETA_NOTE = (
    "The stock scheduler knows two samplers of these: Euler, which is eta 0, and `stochastic_sampling=True`, which is "
    "eta 1 and draws from torch's global seed. Training used eta {eta:g}, which lies between."
)


def card_text(facts: Facts) -> str:
    """The whole README.md."""
    sections = [
        f"# {facts.name}",
        _summary(facts),
        "![samples](samples.png)",
        f"Prompts: {'; '.join(facts.prompts)}.",
        *_use(facts),
        "## Sampling",
        _sampling(facts),
        "## Round trip",
        _round_trip(facts),
        "## Recipe",
        table(("", ""), _recipe(facts)),
        "## Rewards and results",
        _results(facts),
        "## Licence",
        _licence(facts),
        "## Files",
        table(
            ("file", "bytes", "sha256"),
            [
                (f"`{name}`", str(size), f"`{sha}`")
                for name, (size, sha) in sorted(facts.files.items())
                if name.endswith(".safetensors")
            ],
        ),
        "The other files' hashes are in `export.json`.",
    ]
    return str(ModelCard(f"---\n{_front_matter(facts)}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _front_matter(facts: Facts) -> str:
    merged = "merged" in facts.formats
    lora = [name for name in facts.formats if name != "merged"]
    data = ModelCardData(
        base_model=facts.base if facts.on_hub else None,
        base_model_relation=("finetune" if merged and not lora else "adapter") if facts.on_hub else None,
        license=facts.licence.id,
        license_name=facts.licence.name,
        license_link=facts.licence.link,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["rtdmd", "few-step", "text-to-image", *(["lora"] if lora else []), *lora],
    )
    return str(data.to_yaml())


def _summary(facts: Facts) -> str:
    stage = "distilled and reward-tuned" if facts.tuned else "distilled"
    return (
        f"A text-to-image generator that needs {facts.steps} network evaluations, {stage} from {facts.base} with "
        f"[RTDMD]({PAPER}) by rtdmd {__version__}. It is sampled without guidance."
    )


def _use(facts: Facts) -> list[str]:
    parts = ["## How to use it"]
    size, length = facts.preset.model.resolution, facts.preset.model.text_length
    off = ", ".join(
        f"`{name}={value}`" for name, value in FAMILIES[facts.preset.model.family].unguided.items()
    )
    parts.append(
        f"Guidance must be off ({off}) and the text length {length} tokens (`max_sequence_length`): the defaults of the stock "
        f"pipeline are others. Pictures are {size} x {size} px. The code needs diffusers {DIFFUSERS} or newer "
        f"(`dtype=`), and ran with {diffusers.__version__}."
    )
    if "diffusers" in facts.formats:
        lora = code.stock_lora(facts.stock, facts.where)
        parts += ["### diffusers, LoRA", code.block(lora, facts.call(merged=False))]
    if "merged" in facts.formats:
        whole = code.Stock(facts.stock.pipeline, code.Place(facts.where))
        parts += ["### diffusers, whole pipeline", code.block(whole, facts.call(merged=True))]
    if "comfyui" in facts.formats:
        parts += ["### ComfyUI, LoRA", lora_section(facts)]
    if "merged" in facts.formats:
        parts += ["### ComfyUI, whole transformer", merged_section(facts)]
    return parts


def _sampling(facts: Facts) -> str:
    sampler = facts.preset.sampler
    levels = ", ".join(f"{sigma:.6g}" for sigma in facts.sigmas)
    text = [
        f"Noise levels: {levels} (raw steps {facts.raw} before the scheduler's shift). "
        + ETA_NOTE.format(eta=sampler.eta)
    ]
    if "merged" in facts.formats:
        if facts.stock_schedule:
            text.append(
                f"The merged pipeline's scheduler takes exactly these levels for {facts.steps} steps."
            )
        else:
            text.append(
                "No setting of the stock scheduler gives these levels, so the merged pipeline too has to be called "
                "with `sigmas=`."
            )
    if facts.fold_error:
        text.append(
            f"The adapter was cut from rank {facts.exact_rank} to {facts.rank}; its change of the weights is off by "
            f"{facts.fold_error:.2%} (Frobenius norm)."
        )
    return "\n\n".join(text)


def _round_trip(facts: Facts) -> str:
    if not facts.trips:
        return "Not run (`--no-check`)."
    rows = [
        (
            name,
            str(trip.pictures),
            f"{trip.mean:.2g}",
            f"{trip.largest:.2g}",
            str(trip.dtype).removeprefix("torch."),
        )
        for name, trip in facts.trips.items()
    ]
    note = (
        "Each format was loaded into the stock pipeline and drew these prompts with fixed seeds and Euler; the run's own "
        "generator drew the same with eta 0. Differences of a pixel, 0 to 1:"
    )
    if facts.off:
        note = (
            "The stock pipeline tells the network rounded levels of noise, by which pictures differ from those with exact "
            f"ones, as in training, by {facts.off:.2g} in the mean (of a pixel, 0 to 1). Both have rounded ones here. {note}"
        )
    return f"{note}\n\n" + table(("format", "pictures", "mean", "largest", "number format"), rows)


def _recipe(facts: Facts) -> list[tuple[str, str]]:
    preset, stage_1, stage_2 = facts.preset, facts.preset.distill, facts.preset.tune_reward
    rows = [
        ("base model", facts.base),
        ("revision", generator_revision(preset) or "default branch" if facts.on_hub else "none"),
        ("base model's hash", f"`{facts.base_hash}`"),
        ("generator's hash", f"`{facts.model_hash}`"),
        ("preset", f"{preset.name}, sha256 `{facts.preset_sha256}`"),
        ("resolution", f"{preset.model.resolution} px"),
        ("teacher", f"{public_name(preset.model.path)}, guidance {preset.model.guidance:g}"),
        (
            "stage 1",
            f"learning rates {stage_1.generator_lr:g} and {stage_1.fake_lr:g}, batch {stage_1.batch}",
        ),
        ("stage 1 prompts", Path(stage_1.prompts).name),
        ("stage 1 adapter", _adapter(stage_1.lora, facts)),
    ]
    if facts.stored != "plain":
        rows.append(
            ("base model in training", f"{facts.stored}; here it is plain, which makes other pictures")
        )
    if not facts.tuned:
        return [*rows, ("iterations", str(facts.iterations))]
    return [
        *rows,
        ("stage 2", f"{terms(stage_2)}; learning rates {stage_2.generator_lr:g} and {stage_2.fake_lr:g}"),
        ("stage 2 adapter", _adapter(stage_2.lora, facts)),
        ("epochs", f"{facts.iterations} of {stage_2.images_per_epoch} images"),
    ]


def _adapter(lora: LoraConfig, facts: Facts) -> str:
    return (
        "none: every weight was trained" if is_full(facts.preset) else f"rank {lora.rank}, alpha {lora.alpha}"
    )


def _results(facts: Facts) -> str:
    if not facts.tuned:
        return "Trained on no reward (stage 1 alone). Held-out results: not measured in this run; see `rtdmd eval`."
    config = facts.preset.tune_reward
    text = f"Trained on: {', '.join(config.rewards)}. Held out: {', '.join(config.held_out) or 'none'}."
    before, after = facts.before, facts.after
    if not before:
        return f"{text} Results: not measured in this run."
    rows = [
        (
            name,
            "held out" if name in config.held_out else "trained on",
            f"{before[name]:.4g}",
            f"{after[name]:.4g}" if after else "not measured",
        )
        for name in held_out_first(before, config.held_out)
    ]
    return f"{text}\n\n" + table(("reward", "", "before stage 2", "after"), rows)


def _licence(facts: Facts) -> str:
    link = f" ({facts.licence.link})" if facts.licence.link else ""
    return f"These weights inherit the licence of the base model {facts.base}: {facts.licence.text}{link}."
