"""The base class of every preset section, the adapters' section, and the settings that both stages share. No torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_SEED = 2**63 - 1
MAX_COUNT = 1_000_000_000
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def one_line(text: str | None) -> str | None:
    """A validator: ValueError for line breaks and control characters."""
    if text is not None and not text.isprintable():
        raise ValueError("must be text without line breaks and control characters")
    return text


class Section(BaseModel):
    """Common behaviour of every section of a preset."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


class LoraConfig(Section):
    """The adapters of generator and fake score, both of the same shape."""

    rank: int = Field(default=32, ge=1, le=4096, description="rank of each adapter matrix, no unit")
    alpha: int = Field(default=64, ge=1, le=65536, description="adapter scale is alpha / rank, no unit")
    dtype: Literal["float32", "bf16"] = Field(
        default="float32",
        description="number format of the adapters; bf16, as published, loses most of an update at the published rates",
    )
    targets: tuple[str, ...] = Field(
        default=ATTENTION,
        strict=False,
        description="endings of the names, below `attn.`, of the linear layers that get an adapter",
    )

    @field_validator("targets")
    @classmethod
    def _distinct(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        plain = all(name.replace("_", "").replace(".", "").isalnum() for name in targets)
        if not targets or len(set(targets)) != len(targets) or not plain:
            raise ValueError("must name at least one module, each once, in letters, digits, `_` and `.`")
        return targets


class TrainingSection(Section):
    """The settings that both stages have."""

    save_minutes: float | None = Field(
        default=30.0,
        gt=0,
        le=1e6,
        description="longest time between two checkpoints, minutes, where `save_every` is longer; null for any",
    )
    lr_decay: Literal["none", "generator", "both"] = Field(
        default="none",
        description="whose learning rate falls to 0 along a half cosine; a run that is extended follows the longer one",
    )
    fake_lr: float = Field(default=3e-5, gt=0, le=1, description="learning rate of the fake score, no unit")
    lr_warmup: int = Field(
        default=0,
        ge=0,
        le=MAX_COUNT,
        description="linear learning-rate warm-up, optimiser steps of each role",
    )
    grad_clip: float = Field(
        default=1.0, gt=0, le=1e6, description="largest gradient norm of a role, no unit"
    )
    consistency_weight: float = Field(
        default=0.01,
        ge=0,
        le=100,
        description="weight of the consistency regulariser, no unit; 0 turns it off",
    )
    prompts: str = Field(
        default="builtin:shapes",
        min_length=1,
        max_length=4096,
        description="training prompts: builtin:shapes, data:NAME (see `rtdmd data list`), or a .txt, .json or .jsonl file",
    )
    seed: int = Field(default=42, ge=0, le=MAX_SEED, description="seed of every random stream, no unit")
    lora: LoraConfig = LoraConfig()
    keep: int = Field(default=3, ge=1, le=100_000, description="checkpoints kept, newest first")

    _one_line = field_validator("prompts")(one_line)
