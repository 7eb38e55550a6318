"""The report of a stage-1 run: reads the run folder, fills in `report.html`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.report.charts import format_number
from rtdmd_cli.engine.report.html import Curve, Live, RunReport, Status, metrics_series, write_report
from rtdmd_cli.engine.report.page import Picture
from rtdmd_cli.engine.report.run_facts import (
    grids,
    recorded_environment,
    sampler_facts,
    trained_weights,
)
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.training.held_out import CLIP, DISTANCE, STRICT

FOLLOWS = 0.9
"""The fake score follows the generator where its prediction is nearer than this share of the teacher's distance."""


def write_run_report(
    run: RunFolder,
    preset: Preset,
    status: Status,
    iteration: int,
    seconds: float,
    last: Mapping[str, Any] | None = None,
    live: Live | None = None,
) -> None:
    """Write report.html from what lies in the run folder.

    last: a metric line that the folder does not have. live: of a run that goes on.
    """
    metrics = [*run.metrics.read(), *([dict(last)] if last else [])]
    command, environment = recorded_environment(run)
    health = run.path / "health.png"
    report = RunReport(
        title=f"{run.name}: distillation to {len(preset.sampler.raw_steps)} steps",
        status=status,
        iterations=iteration,
        target_iterations=preset.distill.iterations,
        seconds=seconds,
        verdict=verdict(metrics, preset.previews.score_images),
        facts=_facts(preset, run),
        metrics=metrics,
        curves=CURVES,
        grids=grids(run, "generator above, teacher below", "Iteration"),
        health=Picture(health, "The same noisy points, seen by generator, fake score and teacher")
        if health.is_file()
        else None,
        preset_yaml=run.preset.read_text(encoding="utf-8"),
        environment=environment,
        command=command,
        live=live,
    )
    write_report(run.report, report)


CURVES = (
    Curve(
        "Strict score of held-out captions",
        {STRICT: "generator"},
        "Share of fixed captions, held out from training, that a picture of each shows; iteration 0 is the generator "
        "before training.",
    ),
    Curve(
        "CLIP score of the grid's prompts",
        {CLIP: "generator"},
        "Mean cosine of the grid's pictures with their prompts; iteration 0 is the generator before training.",
    ),
    Curve(
        "Distance to the teacher's pictures",
        {DISTANCE: "generator"},
        "Mean cosine distance of CLIP features, same prompt and noise: falls while the generator learns what the teacher "
        "draws.",
    ),
)
"""What tells whether the pictures get better, which comes first."""


def verdict(metrics: Sequence[Mapping[str, object]], score_images: int) -> str:
    """Whether the pictures got better, by the held-out figures, and then whether the fake score follows the generator.

    score_images: pictures of the strict score, whose chance error they set.
    """
    series = metrics_series(metrics)
    parts = []
    if STRICT in series:
        x, y = series[STRICT]
        error = math.sqrt(sum(p * (1 - p) for p in (y[0], y[-1])) / max(score_images, 1))
        parts.append(
            f"{_words(y[-1] - y[0], 2 * error)}: the strict score, the share of held-out captions that they show, went "
            f"from {y[0]:.2f} at iteration {x[0]:.0f} to {y[-1]:.2f} at iteration {x[-1]:.0f}."
        )
    if CLIP in series:
        (x, y), (_, far) = series[CLIP], series[DISTANCE]
        parts.append(
            f"The CLIP score of the grid's prompts went from {format_number(y[0])} at iteration {x[0]:.0f} to "
            f"{format_number(y[-1])} at iteration {x[-1]:.0f}, the distance to the teacher's pictures from "
            f"{format_number(far[0])} to {format_number(far[-1])}."
        )
    if "lag" in series and "lag_teacher" in series:
        parts.append(_fake_score(series["lag"][1][-1], series["lag_teacher"][1][-1]))
    return " ".join(parts)


def _words(change: float, chance: float) -> str:
    if change > chance:
        return "The pictures got better"
    return (
        "The pictures got worse"
        if change < -chance
        else "The pictures are as good as at the start, within chance"
    )


def _fake_score(lag: float, teacher: float) -> str:
    follows = "follows" if lag < FOLLOWS * teacher else "lags behind"
    return (
        f"The fake score, which learns what the generator draws, {follows} it: its prediction is {lag:.3f} away from "
        f"the generator's samples, the teacher's {teacher:.3f}."
    )


def _facts(preset: Preset, run: RunFolder) -> list[tuple[str, str]]:
    config = preset.distill
    return [
        *sampler_facts(preset, run),
        ("Batch", f"{config.batch} images, {config.boundaries} boundary per rollout"),
        ("Updates", f"one generator step for {config.fake_per_generator} fake-score steps"),
        ("Learning rates", f"generator {config.generator_lr:g}, fake score {config.fake_lr:g}"),
        ("Trained", trained_weights(config)),
    ]
