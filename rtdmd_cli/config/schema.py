"""The preset: one model's whole recipe, as frozen pydantic models.

Defaults are the published values (method.md, section 5). Every field has a range and a description with
its unit; unknown keys are refused and no type is converted, except a whole number where a number is wanted.
This module imports no torch.
"""

import re
from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rtdmd_cli.config.previews import PreviewsConfig
from rtdmd_cli.config.section import MAX_COUNT, MAX_SEED, Section, TrainingSection, one_line
from rtdmd_cli.config.tune_reward import TuneRewardConfig

SHARED_BASE = "teacher"
"""`model.generator_init` of a generator that shares the teacher's base."""


FamilyName = Literal["sd3", "flux1", "flux2", "zimage", "qwenimage"]
"""Each has a file of its name in engine/families and in engine/backbones."""


class ModelConfig(Section):
    """The base model, which is also the teacher."""

    family: FamilyName = Field(description="model family, which chooses the backbone's code")
    path: str = Field(
        min_length=1,
        max_length=4096,
        description="builtin:shapes, a hub id, a folder in diffusers' layout, or a .safetensors file with the transformer",
    )
    components: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="if `path` is a .safetensors file, where all but the transformer comes from: a hub id or a folder",
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="branch, tag or commit of the hub repository; null for its default branch",
    )
    generator_init: str = Field(
        default=SHARED_BASE,
        min_length=1,
        max_length=4096,
        description="generator's start: teacher (one shared base), or a hub id or folder whose transformer is its own base",
    )
    generator_revision: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="branch, tag or commit of the repository in `generator_init`; null for its default branch",
    )
    resolution: int = Field(
        ge=16, le=2048, multiple_of=8, description="side of the square training pictures, pixels"
    )
    text_length: int = Field(
        default=128,
        ge=1,
        le=512,
        description="prompt length for T5 (sd3, flux1) or Qwen (the others), tokens",
    )
    guidance: float = Field(
        default=7.0,
        ge=1,
        le=100,
        description="the teacher's guidance scale, no unit: classifier-free (1 is none), or embedded where FLUX.1 takes it",
    )
    teacher_steps: int = Field(
        default=50, ge=1, le=1000, description="steps of the teacher when it is sampled in full"
    )

    _printable = field_validator("path", "components", "revision", "generator_init", "generator_revision")(
        one_line
    )


class SamplerConfig(Section):
    """The generator's few-step sampler (CPS, method.md section 2)."""

    raw_steps: tuple[int, ...] = Field(
        default=(1000, 750, 500, 250),
        strict=False,
        description="unshifted noise levels of the evaluations, thousandths; they fall strictly from 1000",
    )
    eta: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="share of fresh noise in a step of the sampler, no unit; 0 is Euler, without any",
    )

    @field_validator("raw_steps")
    @classmethod
    def _falls(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        falling = all(a > b for a, b in pairwise(steps))
        if not 1 <= len(steps) <= 1000 or steps[0] != 1000 or steps[-1] < 1 or not falling:
            raise ValueError("must fall strictly, starting at 1000 and ending at 1 or more")
        return steps


class DistillConfig(TrainingSection):
    """Stage 1 (method.md section 3)."""

    iterations: int = Field(
        default=15_000,
        ge=1,
        le=MAX_COUNT,
        description="length of the training, iterations (fake-score steps)",
    )
    batch: int = Field(default=72, ge=1, le=65536, description="images per optimiser step")
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="images per forward pass, divides the batch; null for the batch",
    )
    fake_per_generator: int = Field(
        default=10, ge=1, le=10_000, description="fake-score steps for each generator step"
    )
    generator_lr: float = Field(
        default=3e-5, gt=0, le=1, description="learning rate of the generator, no unit"
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's weight decay, no unit")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), strict=False, description="AdamW's two decay rates, no unit, each in [0, 1)"
    )
    eps: float = Field(default=1e-8, gt=0, le=0.01, description="AdamW's epsilon, no unit")
    consistency_max_step: int = Field(
        default=200,
        ge=1,
        le=1000,
        description="longest step of the consistency regulariser, thousandths of sigma",
    )
    t_margin: float = Field(default=0.01, gt=0, le=0.5, description="least distance of t above s, in sigma")
    t_min: float = Field(default=0.02, gt=0, lt=1, description="lower clamp of t, in sigma")
    t_max: float = Field(default=0.98, gt=0, le=1, description="upper clamp of t, in sigma")
    max_weight: float = Field(
        default=10.0, gt=0, le=1e6, description="upper clamp of the fake-score loss's weight, no unit"
    )
    ema_decay: float = Field(
        default=0.904, ge=0, lt=1, description="decay of the generator's average per generator step, no unit"
    )
    ema_warmup: bool = Field(default=False, description="start the decay at min((1+n)/(10+n), ema_decay)")
    guidance: float | None = Field(
        default=None,
        ge=1,
        le=100,
        description="the teacher's guidance inside the generator loss, in both stages; null for model.guidance",
    )
    guidance_noisy: float | None = Field(
        default=None,
        ge=1,
        le=100,
        description="the teacher's guidance at t = 0.95 and above, linear from there to `guidance` at 0.5 "
        "and below; null for `guidance` at every t",
    )
    boundaries: Literal["one", "every"] = Field(
        default="one",
        description="which boundaries (noise levels between the steps) of a rollout are trained on: one at "
        "random, or every one",
    )
    boundaries_batched: bool = Field(
        default=False,
        description="evaluate fake score and teacher on all boundaries of a rollout at once: quicker, more memory",
    )
    backprop_steps: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="number of last steps of a rollout (one sampling from noise) that gradients flow back "
        "through; 1: only the step that lands on the boundary",
    )
    interval: Literal["sub", "full"] = Field(
        default="sub",
        description="what noise is added to: sub for a boundary's latent x_s, up to t in (s, 1], or full for "
        "its clean prediction, up to t in (0, 1]",
    )
    boundary_weight: Literal["published", "balanced"] = Field(
        default="published",
        description="weight of a boundary s in the fake-score loss: 1, or (1-s)^2, which evens out the targets' sizes",
    )
    consistency_batched: bool = Field(
        default=False, description="run both evaluations of the consistency regulariser in one batch"
    )
    normaliser: Literal["published", "noise-free"] = Field(
        default="published", description="the generator loss's normaliser, with or without the noise of x_s"
    )
    train: Literal["lora", "full"] = Field(
        default="lora",
        description="what is trained, in both stages: adapters on the shared base, or a full copy of its weights a role",
    )
    save_every: int = Field(default=500, ge=1, le=MAX_COUNT, description="iterations between two checkpoints")
    log_every: int = Field(default=10, ge=1, le=MAX_COUNT, description="iterations between two metric lines")
    sample_every: int = Field(
        default=500,
        ge=0,
        le=MAX_COUNT,
        description="iterations between two sample grids, see also previews.minutes; 0 for the end only",
    )

    @field_validator("betas")
    @classmethod
    def _rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must be two numbers of at least 0 and below 1")
        return betas

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(
                f"`distill.micro_batch` ({self.micro_batch}) must divide `distill.batch` ({self.batch})"
            )
        self.require_one_pass("distill.backprop_steps", self.backprop_steps)
        if self.t_min >= self.t_max:
            raise ValueError(f"`distill.t_min` ({self.t_min}) must be below `distill.t_max` ({self.t_max})")
        return self

    def require_one_pass(self, name: str, backprop_steps: int) -> None:
        """ValueError, naming the setting, if joined steps would need one backward pass for each boundary."""
        if backprop_steps > 1 and self.boundaries == "every" and not self.boundaries_batched:
            raise ValueError(
                f"`{name}` ({backprop_steps}) needs `distill.boundaries_batched: true`: "
                "one backward pass for all boundaries"
            )


class EvaluateConfig(Section):
    """How benchmarks sample."""

    resolution: int | None = Field(
        default=None,
        ge=16,
        le=2048,
        multiple_of=8,
        description="side of a benchmark's square pictures, pixels; null for model.resolution",
    )

    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="seed of the evaluation noise, no unit")
    images_per_prompt: int = Field(
        default=1, ge=1, le=10_000, description="pictures for each benchmark prompt"
    )
    batch: int = Field(
        default=64, ge=1, le=65536, description="pictures per forward pass; does not change them"
    )


class HardwareConfig(Section):
    """Where and how it runs."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto",
        description="device; auto is cuda where there is one, else cpu; CUDA_VISIBLE_DEVICES chooses among cards",
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="precision of the base model; auto is bf16 on cuda, else fp32"
    )
    float32_matmul: Literal["highest", "high", "medium"] = Field(
        default="highest",
        description="how far training may round float32 products, in torch's words: TF32 on cuda, oneDNN's choice on the CPU",
    )
    mixed_precision: Literal["none", "auto", "bf16"] = Field(
        default="none",
        description="training's products in bf16, weights as they are; auto: if dtype is auto and the CPU multiplies bf16",
    )
    base: Literal["plain", "int8", "nf4"] = Field(
        default="plain",
        description="storage of the frozen base's blocks: plain (in dtype), or 8 or 4 bits a weight by bitsandbytes",
    )
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = Field(
        default="adamw",
        description="AdamW with float32 states, or bitsandbytes' with 8-bit ones; paged: in the host's memory if need be",
    )
    compile: bool = Field(
        default=False,
        description="compile the repeated blocks for training: minutes of warm-up, faster iterations",
    )
    vae_tiling: bool = Field(
        default=False,
        description="decode pictures over 512 px in tiles and one at a time: less memory, faint seams",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, more time"
    )
    text_encoder: Literal["auto", "device", "int8", "cpu"] = Field(
        default="auto",
        description="where prompts are encoded: device (int8: in 8 bits) or CPU; auto is the CPU where the encoders must stay",
    )
    cache_gb: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="bound of the cache of encoded prompts, 10^9 bytes; null for RTDMD_CACHE_GB, or else 20",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of torch; null for torch's own choice"
    )
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        default="none",
        description="experiment tracker beside metrics.jsonl, installed as `pip install 'rtdmd[NAME]'`",
    )


ONLY_ON: dict[tuple[str, str], tuple[str, ...]] = {
    ("base", "int8"): ("cpu", "cuda"),
    ("base", "nf4"): ("cpu", "cuda"),
    ("text_encoder", "int8"): ("cpu", "cuda"),
    ("optimizer", "adamw8bit"): ("cpu", "cuda"),
    ("optimizer", "paged_adamw8bit"): ("cuda",),
}
"""Settings of `hardware`, and the devices on which bitsandbytes has them."""


class Preset(Section):
    """A whole recipe."""

    name: str = Field(
        min_length=1,
        max_length=64,
        description="name: up to 64 letters, digits, `.`, `_`, `-`; the file's own name where none is given",
    )
    description: str = Field(default="", max_length=1000, description="one line for `rtdmd presets list`")
    model: ModelConfig
    sampler: SamplerConfig = SamplerConfig()
    distill: DistillConfig = DistillConfig()
    tune_reward: TuneRewardConfig = TuneRewardConfig()
    previews: PreviewsConfig = PreviewsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    hardware: HardwareConfig = HardwareConfig()

    @model_validator(mode="after")
    def _enough_steps(self) -> Self:
        steps, own = len(self.sampler.raw_steps), self.tune_reward.matching_backprop_steps or 1
        self.distill.require_one_pass("tune_reward.matching_backprop_steps", own)
        for name, value in (
            ("distill.backprop_steps", self.distill.backprop_steps),
            ("tune_reward.matching_backprop_steps", own),
        ):
            if value > steps:
                raise ValueError(f"`{name}` is {value}; the sampler has {steps} steps")
        return self

    @property
    def matching_guidance(self) -> tuple[float, float]:
        """The teacher's guidance scale in the generator loss: at low and at high noise (`guidance_at`)."""
        low = self.model.guidance if self.distill.guidance is None else self.distill.guidance
        return low, low if self.distill.guidance_noisy is None else self.distill.guidance_noisy

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                "must begin with a letter or digit and go on with letters, digits, `.`, `_`, `-`"
            )
        return name

    _printable = field_validator("description")(one_line)

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.distill.train == "full" and self.hardware.base != "plain":
            raise ValueError(
                f"`distill.train: full` needs `hardware.base: plain`: weights in {self.hardware.base} can't be trained"
            )
        return self

    @model_validator(mode="after")
    def _on_its_device(self) -> Self:
        hardware = self.hardware
        chosen = {
            "base": hardware.base,
            "text_encoder": hardware.text_encoder,
            "optimizer": hardware.optimizer,
        }
        device = hardware.device
        for (key, value), devices in ONLY_ON.items():
            if chosen[key] == value and device not in ("auto", *devices):
                raise ValueError(
                    f"`hardware.{key}: {value}` is for {' and '.join(devices)} alone, not for `hardware.device: {device}`"
                )
        return self
