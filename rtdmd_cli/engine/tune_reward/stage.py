"""Stage 2 as a training run knows it: what happens in an epoch, after it, and at the end."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rtdmd_cli.config.tune_reward import TuneRewardConfig
from rtdmd_cli.engine.report.run_facts import live_now
from rtdmd_cli.engine.rewards.mixture import RewardMixture
from rtdmd_cli.engine.storage.run_folder import State
from rtdmd_cli.engine.training import memory
from rtdmd_cli.engine.training import previews as pictures
from rtdmd_cli.engine.training.assembly import prepare_prompts
from rtdmd_cli.engine.training.health import Health
from rtdmd_cli.engine.training.session import Row, Schedule, Session, Stage
from rtdmd_cli.engine.tune_reward.checks import followed
from rtdmd_cli.engine.tune_reward.measure import Measured, Measurement, measure
from rtdmd_cli.engine.tune_reward.recipe import tune
from rtdmd_cli.engine.tune_reward.report import write_tune_report
from rtdmd_cli.engine.tune_reward.rollouts import Tuner, chosen_prompts
from rtdmd_cli.engine.tune_reward.watch import AFTER, LEFT_OUT, STOPPED, standing, watch

STAGE = "tune-reward"


def tune_stage(
    tuner: Tuner,
    previews: pictures.Previews,
    measurement: Measurement,
    mixture: RewardMixture,
    warn: Callable[[str], None],
) -> Stage:
    """Stage 2 as a training run knows it. `warn` is given a sentence for people and the log."""
    core, config = tuner.core, tuner.config
    health = Health(previews)
    watcher = _Watcher(tuner, health, measurement, mixture, warn)

    def prepare(epoch: int, stopping: Callable[[], bool]) -> bool:
        return prepare_prompts(core, epoch, config.epochs, lambda i: chosen_prompts(tuner, i), stopping)

    def advance(epoch: int) -> None:
        with core.precision():
            tune(tuner, epoch)

    def grid(path: Path, epoch: int) -> dict[str, float]:
        pictures.save_sample_grid(previews, core.ema, path, epoch)
        return health.lag(epoch)

    def baseline(path: Path) -> dict[str, float]:
        pictures.save_baseline(previews, core.ema, path)
        return health.lag(0)

    settings = previews.preset.previews
    return Stage(
        name=STAGE,
        schedule=Schedule(
            config.epochs,
            config.save_every,
            config.log_every,
            config.sample_every,
            config.keep,
            settings.minutes,
            config.save_minutes,
        ),
        sizes=sizes(tuner),
        advance=advance,
        grid=grid,
        baseline=baseline if settings.baseline and config.sample_every else None,
        report=watcher.report,
        finish=watcher.finish,
        after=watcher.after,
        frozen=core.roles.frozen,
        unit="epoch",
        prepare=prepare,
    )


def sizes(tuner: Tuner) -> memory.Sizes:
    """Stage 2's micro-batch: of the rollouts, and of what stage 1's functions do in it."""

    def resize(size: int) -> None:
        for part in (tuner, tuner.core):
            part.config = part.config.model_copy(update={"micro_batch": size})

    batch = tuner.config.images_per_epoch
    return memory.Sizes("tune_reward", batch, lambda: tuner.config.micro_batch or batch, resize)


@dataclass
class _Watcher:
    """Measures the run on the way, once an epoch at most, and warns. newest: of the last epoch that was measured."""

    tuner: Tuner
    health: Health
    measurement: Measurement
    mixture: RewardMixture
    warn: Callable[[str], None]
    newest: dict[int, Measured] = field(default_factory=dict)

    @property
    def config(self) -> TuneRewardConfig:
        return self.tuner.config

    @property
    def trained(self) -> tuple[str, ...]:
        return followed(self.config, self.mixture.differentiable)

    def after(self, session: Session) -> dict[str, float]:
        """Measure where it is the epoch's turn; as figures of a metric line."""
        count_left_out(session, self.warn)
        if not self.due(session):
            return {}
        figures, warning = self.judged(session)
        if warning and self.config.watch.stop:
            session.records[STOPPED] = True
        return figures

    def finish(self, session: Session, state: State, last: Row) -> None:
        """The last measurement, the health panel and the report."""
        # Out of turn: not in the checkpoint, so that a run that is extended goes on as if it had not ended here.
        if not self.due(session):
            last = {"iteration": session.iteration, **last, **self.judged(session)[0]}
        session.records[AFTER] = self.measured(session).means
        self.health.save_panel(session.run.path / "health.png", session.iteration)
        self.report(session, state, last)

    def report(self, session: Session, state: State, last: Row) -> None:
        """The report of what is known; nothing is measured."""
        write_tune_report(
            session.run,
            session.resolved.preset,
            state,
            session.iteration,
            session.seconds,
            session.records,
            held_out_of(self.config, self.mixture),
            last,
            live_now(session.seconds_left, session.seconds_each) if state == "running" else None,
        )

    def due(self, session: Session) -> bool:
        return bool(self.config.eval_every) and session.iteration % self.config.eval_every == 0

    def measured(self, session: Session) -> Measured:
        """Of this epoch, once."""
        epoch = session.iteration
        if epoch not in self.newest:
            self.newest.clear()
            where = f"the measurement of epoch {epoch}"
            self.newest[epoch] = measure(
                self.tuner.core, self.measurement, self.mixture, where, session.run.log
            )
        return self.newest[epoch]

    def judged(self, session: Session) -> tuple[dict[str, float], str]:
        """Measure, and take it into the records; the figures of a metric line, and the watch's warning or ""."""
        found = self.measured(session)
        weights = {name: self.mixture.weights[name] for name in self.trained}
        now = standing(session.iteration, found, session.records, weights)
        warning = watch(session.records, now, self.config.watch)
        if warning:
            self.warn(f"warning, epoch {session.iteration}: {warning}")
        figures = figures_of(found)
        if now.held_out is not None:
            figures["watch/held_out"] = now.held_out
        return figures, warning


def held_out_of(config: TuneRewardConfig, mixture: RewardMixture) -> list[str]:
    """The measured rewards that are not trained on."""
    trained = followed(config, mixture.differentiable)
    return [name for name in (*mixture.weights, *mixture.held_out) if name not in trained]


def count_left_out(session: Session, warn: Callable[[str], None]) -> None:
    """Keep the number of pictures that were left out of training; say so the first time."""
    count = int(session.trainer.metrics.get(LEFT_OUT, 0))
    if count and LEFT_OUT not in session.records:
        warn(
            f"epoch {session.iteration}: {count} pictures that a reward can't judge are left out, see log.txt"
        )
    if count:
        session.records[LEFT_OUT] = session.records.get(LEFT_OUT, 0) + count


def figures_of(found: Measured) -> dict[str, float]:
    """As names of a metric line."""
    features = {f"watch/{name}": value for name, value in found.features.items()}
    return {f"measured/{name}": value for name, value in found.means.items()} | features
