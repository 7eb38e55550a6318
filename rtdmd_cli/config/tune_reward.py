"""The preset's section of stage 2, and the small syntax of its reward lists. No torch."""

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rtdmd_cli.config.section import MAX_COUNT, TrainingSection, one_line
from rtdmd_cli.config.watch import WatchConfig

MAX_WEIGHT = 1e6


class TuneRewardConfig(TrainingSection):
    """Stage 2 (method.md section 4)."""

    rewards: tuple[str, ...] = Field(
        default=("clipscore", "hpsv2", "pickscore", "geneval-soft"),
        strict=False,
        description="rewards trained on, NAME or NAME=WEIGHT; see `rtdmd rewards list`",
    )
    held_out: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="rewards that are measured and never trained on, names",
    )
    reward_paths: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="where a reward's weights are, NAME=FOLDER or NAME=HUB_ID, instead of the published source",
    )
    rewards_in_memory: Literal["all", "one"] = Field(
        default="all",
        description="reward models held at a time; one loads each when its turn comes",
    )
    max_bad_share: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of an epoch's or a measurement's images that a reward may fail to judge; above it the run stops",
    )
    reward_seconds: float | None = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="longest time of a reward for one image, s; null for any",
    )
    epochs: int = Field(
        default=1000, ge=1, le=MAX_COUNT, description="length of the training, epochs of one generator step"
    )
    images_per_epoch: int = Field(
        default=512, ge=2, le=1_000_000, description="images rolled out in an epoch"
    )
    images_per_prompt: int = Field(
        default=16, ge=2, le=100_000, description="images of a group, divides images_per_epoch"
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="images per forward pass, divides images_per_epoch; null for all of them",
    )
    subset_steps: int = Field(
        default=2,
        ge=1,
        le=999,
        description="number of stochastic steps in which each image has its own noise (SubGRPO), at most "
        "all; every loss is divided by this number plus 1",
    )
    generator_lr: float = Field(
        default=3e-6, gt=0, le=1, description="learning rate of the generator, no unit"
    )
    generator_weight_decay: float = Field(
        default=1e-4, ge=0, le=1, description="AdamW's weight decay of the generator, no unit"
    )
    fake_weight_decay: float = Field(
        default=0.0, ge=0, le=1, description="AdamW's weight decay of the fake score, no unit"
    )
    policy_weight: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        description="weight of the clipped surrogate of each chosen step; 0 turns it off",
    )
    policy_clip: float = Field(
        default=1e-5, gt=0, lt=1, description="clip range of the probability ratio around 1, no unit"
    )
    logprob: Literal["reduced", "gaussian"] = Field(
        default="reduced",
        description="log-probability of a transition: the mean square (published) or the exact density",
    )
    advantage_clip: float = Field(
        default=5.0, gt=0, le=1e6, description="largest advantage, standard deviations"
    )
    kl_weight: float = Field(
        default=0.0, ge=0, le=1e6, description="weight of the KL to stage 1's generator on the chosen steps"
    )
    dmd_weight: float = Field(
        default=1e-3,
        ge=0,
        le=1e6,
        description="weight of distribution matching; 0 turns it off, and with it the fake score's turn and its tilt",
    )
    matching: Literal["last", "distill"] = Field(
        default="last",
        description="last: of the epoch's images through the last step (published); distill: of fresh rollouts, as in stage 1",
    )
    matching_images: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="images of a turn of `matching: distill`, fresh or drawn by the tilt; null for images_per_epoch",
    )
    matching_backprop_steps: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="last steps that the gradient of `matching: distill` flows back through; null: distill.backprop_steps",
    )
    tilt: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="tilt: how far distribution matching leans to the rewards, 1/advantage; 0: the teacher's own distribution",
    )
    backprop_weight: float = Field(
        default=1e-4, ge=0, le=1e6, description="weight of reward back-propagation; 0 turns it off"
    )
    backprop_margin: float = Field(
        default=3.0, ge=-1e6, le=1e6, description="weighted reward above which back-propagation stops"
    )
    backprop_steps: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="last steps of the rollout that the reward's gradient flows through; published: 1",
    )
    ema_decay: float = Field(
        default=0.74,
        ge=0,
        lt=1,
        description="decay d of the generator's average per optimiser step, no unit; its mean age is d/(1-d) "
        "epochs: 0.74 gives 2.8, as in the published code, which makes 16 updates of 0.9 in every 8th epoch",
    )
    eval_prompts: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="prompts on which rewards are measured before and after; null for the training prompts",
    )
    eval_images: int = Field(
        default=64, ge=0, le=1_000_000, description="pictures of each measurement; 0 leaves it out"
    )
    eval_every: int = Field(
        default=0,
        ge=0,
        le=MAX_COUNT,
        description="epochs between two measurements; 0 for start and end only",
    )
    watch: WatchConfig = WatchConfig()
    save_every: int = Field(default=50, ge=1, le=MAX_COUNT, description="epochs between two checkpoints")
    log_every: int = Field(default=1, ge=1, le=MAX_COUNT, description="epochs between two metric lines")
    sample_every: int = Field(
        default=50,
        ge=0,
        le=MAX_COUNT,
        description="epochs between two sample grids, see also previews.minutes; 0 for the end only",
    )

    _printable = field_validator("eval_prompts")(one_line)

    @field_validator("rewards")
    @classmethod
    def _weighted(cls, rewards: tuple[str, ...]) -> tuple[str, ...]:
        split_weights(rewards)
        if not rewards:
            raise ValueError("must name at least one reward")
        return rewards

    @field_validator("held_out")
    @classmethod
    def _plain_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names) or not all(name.isprintable() and name.strip() for name in names):
            raise ValueError("must name each reward once")
        return names

    @field_validator("reward_paths")
    @classmethod
    def _pairs(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        split_paths(paths)
        return paths

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for name, part in (("images_per_prompt", self.images_per_prompt), ("micro_batch", self.micro_batch)):
            if part is not None and self.images_per_epoch % part:
                raise ValueError(
                    f"`tune_reward.{name}` ({part}) must divide `tune_reward.images_per_epoch` "
                    f"({self.images_per_epoch})"
                )
        for name, value in (
            ("matching_images", self.matching_images),
            ("matching_backprop_steps", self.matching_backprop_steps),
        ):
            if value is not None and self.matching != "distill":
                raise ValueError(f"`tune_reward.{name}` ({value}) needs `tune_reward.matching: distill`")
        both = sorted(set(self.held_out) & split_weights(self.rewards).keys())
        if both:
            raise ValueError(f"`tune_reward.held_out` names {both[0]}, which `tune_reward.rewards` trains on")
        if not (self.policy_weight or self.dmd_weight or self.backprop_weight):
            raise ValueError(
                "`tune_reward.policy_weight`, `tune_reward.dmd_weight` and `tune_reward.backprop_weight` are all 0"
            )
        return self


def split_weights(rewards: Iterable[str]) -> dict[str, float]:
    """`["hpsv2=0.5", "pickscore"]` as {"hpsv2": 0.5, "pickscore": 1.0}. ValueError, for people, if it can't be."""
    weights: dict[str, float] = {}
    for text in rewards:
        name, equals, number = text.partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            raise ValueError(f"must give {name} a number as weight, not {number!r}") from None
        if not name or not name.isprintable() or name in weights:
            raise ValueError("must name each reward once, as NAME or NAME=WEIGHT")
        if not 0 < weight <= MAX_WEIGHT:
            raise ValueError(f"must give {name} a weight above 0 and at most {MAX_WEIGHT:g}")
        weights[name] = weight
    return weights


def split_paths(paths: Iterable[str]) -> dict[str, str]:
    """`["pickscore=/models/pickscore"]` as a dictionary. ValueError, for people, if it can't be."""
    found: dict[str, str] = {}
    for text in paths:
        name, equals, path = text.partition("=")
        if not (equals and name and path and text.isprintable()) or name in found:
            raise ValueError("must name each reward once, as NAME=FOLDER or NAME=HUB_ID")
        found[name] = path
    return found
