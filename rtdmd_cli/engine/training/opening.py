"""The folder of a run around a training: opened, locked, as it was at a checkpoint; and what its status says at the end."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rtdmd_cli.config.loader import Resolved, dump_resolved, preset_values
from rtdmd_cli.engine.compute.processes import Processes
from rtdmd_cli.engine.storage import files
from rtdmd_cli.engine.storage.checkpoint import (
    Checkpoint,
    newest_valid,
    set_aside_after,
)
from rtdmd_cli.engine.storage.run_folder import RunFolder, State, is_run
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.training.trackers import Tracker, open_tracker
from rtdmd_cli.errors import EnvironmentFailure, PictureFailure, UsageError


def rewind(
    run: RunFolder,
    resolved: Resolved,
    checkpoint: Checkpoint | None,
    total: int,
    say: Callable[[str], None],
) -> int:
    """Make the run folder look as it did at a checkpoint (None: at the start); the iterations done.

    Newer checkpoints are moved aside, which is said. The run is locked.

    UsageError if another process has continued it since the checkpoint was chosen.
    """
    newest, _ = newest_valid(run.checkpoints)
    if newest and (checkpoint is None or newest.resolve() != checkpoint.path.resolve()):
        raise UsageError(f"{run.path} has been continued by another process.", "Look at it, then try again.")
    done = checkpoint.step if checkpoint else 0
    run.metrics.truncate_after(done if checkpoint else -1)
    aside = set_aside_after(run.checkpoints, done)
    if aside is not None:
        told = f"newer checkpoints than the one of iteration {done} are kept in {aside}"
        run.log(told)
        say(told)
    files.write_text(run.preset, dump_resolved(resolved.preset))
    run.set_status("running", iteration=done)
    run.log(f"start at iteration {done} of {total}")
    return done


@contextmanager
def opened(
    start: Start,
    place: Path,
    make: Callable[[], RunFolder],
    resolved: Resolved,
    total: int,
    processes: Processes,
    say: Callable[[str], None],
    report: Callable[[RunFolder, State, int], None],
    quiet: bool,
) -> Iterator[tuple[RunFolder, Tracker, int]]:
    """The run folder, locked and as it was at the start's checkpoint, its tracker, and the iterations done.

    place: of a new run; make: makes it; say: prints a line for people. report(run, state, iterations): writes the
    report, here of a run that goes on, and again if it ends before it trains. quiet: trackers print nothing.
    Only the main process touches the disk; the others go on when it is ready.
    """
    run, done = start.run or RunFolder(place), start.checkpoint.step if start.checkpoint else 0
    with ExitStack() as stack:
        name = resolved.preset.hardware.tracker if processes.main else "none"
        with processes.agreeing():
            if processes.main:
                run = start.run or make()
                stack.enter_context(run.lock())
        begun = start.run is None
        try:
            with processes.agreeing():
                if processes.main:
                    done, begun = rewind(run, resolved, start.checkpoint, total, say), True
                    run.note_changes(start.changes, done)
                settings = preset_values(resolved.preset)
                first = done + 1 if start.checkpoint else 0
                opening = open_tracker(name, run.path, settings, quiet, run.id, first)
                tracker = stack.enter_context(opening)
                if processes.main:
                    report(run, "running", done)
            yield run, tracker, done
        except BaseException as error:  # raised again; `failing` has said it where the training had begun
            there = is_run(run.path)  # not where it was moved away meanwhile
            if processes.main and begun and there and run.status()["state"] == "running":
                state = end_start(run, error, done, total, new=start.run is None)
                with suppress(EnvironmentFailure):  # of a full disk, say: what is to be said is the error
                    if state is not None:
                        report(run, state, done)
            raise


def end_start(run: RunFolder, error: BaseException, done: int, total: int, new: bool) -> State | None:
    """After a start that failed: a new run leaves nothing behind, but for one that a signal ended, which can go on.

    The state that the run has now; None where it is gone.
    """
    if new and not isinstance(error, KeyboardInterrupt):
        files.remove_folder(run.path)
        return None
    return note_end(run, error, done, total)


def note_end(run: RunFolder, error: BaseException, iteration: int, total: int) -> State:
    """Set and return the state of a run that `error` ends: interrupted by a signal, else failed.

    One that has come to its end stays finished where only its pictures failed.
    """
    if isinstance(error, KeyboardInterrupt):
        run.set_status("interrupted", iteration=iteration)
        run.log(f"stopped at once; a resume goes on at iteration {iteration}")
        return "interrupted"
    state: State = "finished" if isinstance(error, PictureFailure) and iteration >= total else "failed"
    run.set_status(state, iteration=iteration, reason=str(error))
    return state
