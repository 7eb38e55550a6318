"""The preset's section of the pictures of a run in progress. No torch."""

from pydantic import Field, field_validator, model_validator

from rtdmd_cli.config.section import MAX_SEED, Section, one_line

MAX_PICTURES = 64
"""Of one sample grid: its prompts times its seeds."""
MAX_CHARACTERS = 10_000
"""Of a prompt, as of a line of a prompt file."""


class PreviewsConfig(Section):
    """The sample grids of a run: what they show, how far apart they are, and what is measured with them."""

    prompts: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="prompts of the sample grids, a list of texts; none: eight of the training prompts, evenly spread",
    )
    seeds: tuple[int, ...] = Field(
        default=(),
        strict=False,
        description="noise seeds of the sample grids; every prompt is drawn with each; none: evaluate.seed",
    )
    minutes: float | None = Field(
        default=60.0,
        gt=0,
        le=1e6,
        description="longest time between two grids, minutes, where `sample_every` is longer; null for any",
    )
    baseline: bool = Field(
        default=True,
        description="draw teacher, few-step teacher and generator before training (iteration 0)",
    )
    score_images: int = Field(
        default=64,
        ge=0,
        le=100_000,
        description="pictures of the built-in world that are judged with each grid of stage 1; 0 leaves it out",
    )

    @field_validator("prompts")
    @classmethod
    def _texts(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for text in prompts:
            one_line(text)
            if not text.strip() or len(text) > MAX_CHARACTERS:
                raise ValueError(f"must hold texts of 1 to {MAX_CHARACTERS:,} characters")
        return prompts

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or not all(0 <= seed <= MAX_SEED for seed in seeds):
            raise ValueError("must name each seed once, whole numbers from 0")
        return seeds

    @model_validator(mode="after")
    def _few(self) -> "PreviewsConfig":
        count = (len(self.prompts) or 8) * max(len(self.seeds), 1)
        if count > MAX_PICTURES:
            raise ValueError(
                f"`previews.prompts` times `previews.seeds` are {count} pictures, over {MAX_PICTURES}"
            )
        return self
