"""The report of a stage-1 run: reads the run folder, fills in `report.html`."""

from collections.abc import Mapping

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.report.html import RunReport, Status, write_report
from rtdmd_cli.engine.report.page import Picture
from rtdmd_cli.engine.report.run_facts import (
    grids,
    lag_curves,
    recorded_environment,
    sampler_facts,
    trained_weights,
)
from rtdmd_cli.engine.storage.run_folder import RunFolder


def write_run_report(
    run: RunFolder,
    preset: Preset,
    status: Status,
    iteration: int,
    seconds: float,
    health: Mapping[str, float],
) -> None:
    """Write report.html from what lies in the run folder, and the fake score's figures of this moment."""
    metrics = run.metrics.read()
    command, environment = recorded_environment(run)
    report = RunReport(
        title=f"{run.name}: distillation to {len(preset.sampler.raw_steps)} steps",
        status=status,
        iterations=iteration,
        target_iterations=preset.distill.iterations,
        seconds=seconds,
        verdict=_verdict(health),
        facts=_facts(preset),
        metrics=metrics,
        grids=grids(run, "generator above, teacher below", "Iteration"),
        health=Picture(
            run.path / "health.png", "The same noisy points, seen by generator, fake score and teacher"
        ),
        lag=lag_curves(metrics, iteration, health),
        preset_yaml=run.preset.read_text(encoding="utf-8"),
        environment=environment,
        command=command,
    )
    write_report(run.report, report)


def _verdict(health: Mapping[str, float]) -> str:
    share = health["lag"] / health["lag_teacher"]
    follows = "follows" if share < 0.9 else "lags behind"
    return (
        f"At the end the fake score {follows} the generator: its prediction is {health['lag']:.3f} away from "
        f"the generator's samples, the teacher's {health['lag_teacher']:.3f}."
    )


def _facts(preset: Preset) -> list[tuple[str, str]]:
    config = preset.distill
    return [
        *sampler_facts(preset),
        ("Batch", f"{config.batch} images, {config.boundaries} boundary per rollout"),
        ("Updates", f"one generator step for {config.fake_per_generator} fake-score steps"),
        ("Learning rates", f"generator {config.generator_lr:g}, fake score {config.fake_lr:g}"),
        ("Trained", trained_weights(config)),
    ]
