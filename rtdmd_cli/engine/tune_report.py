"""The report of a stage-2 run: reads the run folder, fills in `report.html`."""

from collections.abc import Iterable, Mapping, Sequence

from rtdmd_cli.config.tune_reward import TuneRewardConfig
from rtdmd_cli.engine.distill_report import grids, lag_curves, recorded_environment, sampler_facts
from rtdmd_cli.engine.report.html import RunReport, write_report
from rtdmd_cli.engine.report.page import Picture, Table
from rtdmd_cli.engine.runtime.run_folder import State
from rtdmd_cli.engine.training_run import Session


def write_tune_report(
    session: Session,
    status: State,
    config: TuneRewardConfig,
    held_out: Sequence[str],
    health: Mapping[str, float],
) -> None:
    """Write report.html from what lies in the run folder, the measured rewards, and the fake score's figures."""
    run, preset = session.run, session.resolved.preset
    command, environment = recorded_environment(run)
    metrics = run.metrics.read()
    before, after = session.records["rewards_before"], session.records["rewards_after"]
    report = RunReport(
        title=f"{run.name}: rewards of the {len(preset.sampler.raw_steps)}-step generator",
        status=status,
        iterations=session.iteration,
        target_iterations=config.epochs,
        seconds=session.seconds,
        verdict=verdict(before, after, held_out),
        facts=[
            *sampler_facts(preset),
            ("Epoch", f"{config.images_per_epoch} images, {config.images_per_prompt} a prompt"),
            ("Rewards", ", ".join(config.rewards)),
            ("Terms", terms(config)),
            ("Learning rates", f"generator {config.generator_lr:g}, fake score {config.fake_lr:g}"),
        ],
        tables=[rewards_table(before, after, held_out)] if before else [],
        metrics=metrics,
        grids=grids(run, "stage 2 above, stage 1 below", "Epoch"),
        health=Picture(
            run.path / "health.png", "The same noisy points, seen by generator, fake score and teacher"
        ),
        lag=lag_curves(metrics, session.iteration, health),
        preset_yaml=run.preset.read_text(encoding="utf-8"),
        environment=environment,
        command=command,
    )
    write_report(run.report, report)


def verdict(before: Mapping[str, float], after: Mapping[str, float], held_out: Sequence[str]) -> str:
    """What came out, held-out rewards first."""
    parts = []
    for name in held_out_first(before, held_out):
        verb = " went" if name in held_out else " (trained on)"
        parts.append(f"{name}{verb} from {before[name]:.4g} to {after[name]:.4g}")
    return "; ".join(parts) + "." if parts else ""


def rewards_table(before: Mapping[str, float], after: Mapping[str, float], held_out: Sequence[str]) -> Table:
    """Every measured reward before and after, those held out first."""
    rows = [
        (
            name,
            "held out" if name in held_out else "trained on",
            f"{before[name]:.4g}",
            f"{after[name]:.4g}",
            f"{after[name] - before[name]:+.4g}",
        )
        for name in held_out_first(before, held_out)
    ]
    note = "Mean over fixed prompts and seeds. Judge by the rewards that were held out: training can exploit the others."
    return Table("Rewards before and after", ("Reward", "", "Before", "After", "Change"), rows, note)


def held_out_first(names: Iterable[str], held_out: Sequence[str]) -> list[str]:
    """The names, those of held-out rewards first; a checkpoint's JSON keeps no order."""
    return sorted(names, key=lambda name: name not in held_out)


def terms(config: TuneRewardConfig) -> str:
    """The terms of the generator's loss that are on."""
    weights = {
        f"policy on {config.subset_steps} steps": config.policy_weight,
        "distribution matching": config.dmd_weight,
        f"reward back-propagation through {config.backprop_steps} steps": config.backprop_weight,
        "KL": config.kl_weight,
    }
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight)
