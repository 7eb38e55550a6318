"""The report of a stage-2 run: reads the run folder, fills in `report.html`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.config.tune_reward import TuneRewardConfig
from rtdmd_cli.engine.report.html import Curve, Live, RunReport, metrics_series, write_report
from rtdmd_cli.engine.report.page import Picture, Table
from rtdmd_cli.engine.report.run_facts import grids, recorded_environment, sampler_facts
from rtdmd_cli.engine.storage.run_folder import RunFolder, State
from rtdmd_cli.engine.tune_reward.watch import BEFORE, LEFT_OUT, STOPPED, WATCH, advice, alarm


def write_tune_report(
    run: RunFolder,
    preset: Preset,
    status: State,
    epoch: int,
    seconds: float,
    records: Mapping[str, Any],
    held_out: Sequence[str],
    last: Mapping[str, object] | None = None,
    live: Live | None = None,
) -> None:
    """Write report.html from what lies in the run folder and its records.

    last: a metric line that the run folder does not have. live: of a run that goes on.
    """
    config = preset.tune_reward
    command, environment = recorded_environment(run)
    metrics = [first_line(records), *run.metrics.read(), *([dict(last)] if last else [])]
    before, health = records.get(BEFORE, {}), run.path / "health.png"
    after = newest_measured(metrics)
    report = RunReport(
        title=f"{run.name}: rewards of the {len(preset.sampler.raw_steps)}-step generator",
        status=status,
        iterations=epoch,
        target_iterations=config.epochs,
        seconds=seconds,
        verdict=" ".join(filter(None, (verdict(before, after, held_out), advice(records)))),
        warning=warning(records),
        facts=[
            *sampler_facts(preset, run),
            ("Epoch", f"{config.images_per_epoch} images, {config.images_per_prompt} a prompt"),
            ("Rewards", ", ".join(config.rewards)),
            ("Terms", terms(config)),
            ("Learning rates", f"generator {config.generator_lr:g}, fake score {config.fake_lr:g}"),
            *watch_facts(config, preset.model.teacher_steps, records),
        ],
        tables=[rewards_table(before, after, held_out)] if before else [],
        metrics=metrics,
        curves=reward_curves(before, held_out),
        grids=grids(run, "stage 2 above, stage 1 below", "Epoch"),
        health=Picture(health, "The same noisy points, seen by generator, fake score and teacher")
        if health.is_file()
        else None,
        preset_yaml=run.preset.read_text(encoding="utf-8"),
        environment=environment,
        command=command,
        unit="epoch",
        live=live,
    )
    write_report(run.report, report)


def newest_measured(metrics: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """The mean rewards of the last measurement among the metric lines."""
    found = {name: y[-1] for name, (_, y) in metrics_series(metrics).items()}
    start = "measured/"
    return {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}


def verdict(before: Mapping[str, float], after: Mapping[str, float], held_out: Sequence[str]) -> str:
    """What came out, held-out rewards first."""
    parts = []
    for name in held_out_first(before, held_out):
        verb = " went" if name in held_out else " (trained on)"
        parts.append(f"{name}{verb} from {before[name]:.4g} to {after[name]:.4g}")
    return "; ".join(parts) + "." if parts else ""


def warning(records: Mapping[str, Any]) -> str:
    """What the watch found, and whether it ended the run; "" if nothing."""
    found = alarm(records)
    return f"{found} The run ended here, as its preset asks." if found and STOPPED in records else found


def first_line(records: Mapping[str, Any]) -> dict[str, object]:
    """The measurement of the start as a line of the metrics, of iteration 0."""
    features = records.get(WATCH, {}).get("features", {})
    measured = {f"measured/{name}": value for name, value in records.get(BEFORE, {}).items()}
    return {"iteration": 0, **measured, **{f"watch/{name}": value for name, value in features.items()}}


def watch_facts(config: TuneRewardConfig, steps: int, records: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How much was measured with what, and how many pictures were left out."""
    prompts = config.eval_prompts or f"{config.prompts}, the training prompts"
    facts = [("Rewards measured on", f"{config.eval_images} pictures, one of a prompt; {prompts}")]
    if config.watch.features:
        # Fewer prompts than `prompt_count` may have been there.
        count, each = records.get(WATCH, {}).get("prompts", 0), config.watch.images_per_prompt
        network = f"picture features of the CLIP {config.watch.features}"
        facts.append(
            (
                "Diversity and distance",
                f"{network}; {count * each} pictures, {each} a prompt; {count} of the teacher at {steps} steps",
            )
        )
    if LEFT_OUT in records:
        facts.append(("Left out of training", f"{records[LEFT_OUT]} pictures without a reward, see log.txt"))
    return facts


def reward_curves(names: Iterable[str], held_out: Sequence[str]) -> list[Curve]:
    """A chart of each measured reward, those held out first, then of diversity and distance to the teacher."""
    curves = []
    for name in held_out_first(names, held_out):
        if name in held_out:
            title, lines = f"{name}, held out", {f"measured/{name}": "fixed prompts"}
            reading = "Never trained on: should rise, or at least hold, while the others rise."
        else:
            title = f"{name}, trained on"
            lines = {f"measured/{name}": "fixed prompts", f"reward/{name}": "training pictures"}
            reading = "Can be exploited: judge by the rewards that were held out."
        curves.append(Curve(title, lines, reading))
    return [
        *curves,
        Curve(
            "Gain of the held-out rewards",
            {"watch/held_out": "held-out rewards"},
            "Their mean change since the start, in standard deviations of the start's pictures; the best checkpoint is "
            "where it is greatest.",
        ),
        Curve(
            "Diversity",
            {"watch/diversity": "generator"},
            "Mean cosine distance between the pictures of a prompt; a lasting fall means that they become alike.",
        ),
        Curve(
            "Distance to the teacher",
            {"watch/frechet": "generator"},
            "Squared Fréchet distance of picture features. It depends on the numbers of pictures: compare it within "
            "a run only.",
        ),
    ]


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
    """The names, held-out rewards first; a checkpoint's JSON keeps no order."""
    return sorted(names, key=lambda name: name not in held_out)


MATCHED = {"last": "", "distill": " as in distill"}


def terms(config: TuneRewardConfig) -> str:
    """The terms of the generator's loss that are on."""
    weights = {
        f"policy on {config.subset_steps} steps": config.policy_weight,
        f"distribution matching{MATCHED[config.matching]}": config.dmd_weight,
        f"reward back-propagation through {config.backprop_steps} steps": config.backprop_weight,
        "KL": config.kl_weight,
        "tilt of matching": config.tilt if config.dmd_weight else 0.0,
    }
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight)
