"""The preset's section of limits beyond which stage 2 counts as exploiting its rewards. No torch."""

from pydantic import Field, field_validator

from rtdmd_cli.config.section import Section, one_line


class WatchConfig(Section):
    """What is watched at each measurement (`tune_reward.eval_every`), beside the rewards, and the limits."""

    features: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="CLIP of the picture features: builtin:shapes, a folder or a hub id; null for no diversity and distance",
    )
    prompt_count: int = Field(
        default=64,
        ge=2,
        le=1_000_000,
        description="prompts of diversity and distance to the teacher, evenly spread over those of the measurement",
    )
    images_per_prompt: int = Field(
        default=4, ge=2, le=10_000, description="pictures of each of these prompts; the teacher draws one"
    )
    max_held_out_fall: float = Field(
        default=0.2,
        gt=0,
        le=1e6,
        description="largest fall of the held-out rewards below their best that raises no alarm, in standard "
        "deviations at the start",
    )
    min_diversity: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="least share of the start's diversity; below it by twice the standard error is too little",
    )
    stop: bool = Field(
        default=False, description="end the run where a limit is passed while the trained rewards rise"
    )

    _printable = field_validator("features")(one_line)
