"""The report of a stage-1 run: reads the run folder, fills in `report.html`."""

import json
from collections.abc import Mapping

from rtdmd_cli.config.schema import DistillConfig, Preset
from rtdmd_cli.engine.report.html import RunReport, Status, write_report
from rtdmd_cli.engine.report.page import Picture
from rtdmd_cli.engine.storage.run_folder import ENVIRONMENT, RunFolder


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


def recorded_environment(run: RunFolder) -> tuple[str, list[tuple[str, str]]]:
    """The command that made a run, and its machine and versions."""
    environment = json.loads((run.path / ENVIRONMENT).read_text(encoding="utf-8"))
    command = " ".join(environment.pop("command"))
    packages = environment.pop("packages")
    return command, [(k, str(v)) for k, v in {**environment, **packages}.items() if v is not None]


def grids(run: RunFolder, rows: str, unit: str) -> list[Picture]:
    """The sample grids of a run, oldest first. rows: what stands above what; unit: what the steps count."""
    return [
        Picture(path, f"{unit} {int(path.stem.removeprefix('step-'))}: {rows}")
        for path in sorted(run.samples.glob("step-*.png"))
    ]


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


def trained_weights(config: DistillConfig) -> str:
    """What of each role is trained, for people."""
    if config.train == "full":
        return "all weights"
    return f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha}"


def sampler_facts(preset: Preset) -> list[tuple[str, str]]:
    """Model, picture size, and how teacher and generator are sampled."""
    return [
        ("Model", preset.model.path),
        ("Picture", f"{preset.model.resolution} x {preset.model.resolution} px"),
        ("Teacher", f"{preset.model.teacher_steps} steps, guidance {preset.model.guidance:g}"),
        ("Generator", f"{len(preset.sampler.raw_steps)} steps, eta {preset.sampler.eta:g}"),
    ]


def lag_curves(
    metrics: list[dict[str, object]], iteration: int, health: Mapping[str, float]
) -> dict[str, tuple[list[float], list[float]]]:
    """The lag curves: the values noted on the way, and the last one."""
    curves = {}
    for name, last in health.items():
        rows = [
            (row["iteration"], row[name]) for row in metrics if name in row and row["iteration"] != iteration
        ]
        points = [(float(str(x)), float(str(y))) for x, y in rows] + [(float(iteration), last)]
        curves[name] = ([x for x, _ in points], [y for _, y in points])
    return curves
