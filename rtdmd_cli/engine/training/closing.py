"""How a training ends: its last pictures and report, and its status, also where it fails."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rtdmd_cli.engine.compute.signals import StopRequest
from rtdmd_cli.engine.storage.checkpoint import step_name
from rtdmd_cli.engine.storage.run_folder import State
from rtdmd_cli.engine.training.opening import note_end
from rtdmd_cli.engine.training.session import (
    Outcome,
    Session,
    grid_path,
    sample_grid,
    save_unsaved,
    saved_step,
)
from rtdmd_cli.errors import EnvironmentFailure, PictureFailure, is_out_of_memory

LAST_WORK = "drawing the last pictures and writing the report"


def finish(session: Session, stop: StopRequest) -> Outcome:
    """Final grid, the stage's own panel and report, and the status, by the main process.

    An interrupted run has its status before its last pictures are drawn; a finished one after its report is written.
    """
    run = session.run
    over = session.iteration >= session.stage.schedule.total or session.stopped
    if session.trainer.processes.main:
        state: State = "finished" if over else "interrupted"
        if not over:
            set_end(session, state)
        with stop.during(LAST_WORK, session.kept):
            session.say(LAST_WORK)
            figures: dict[str, Any] = {}
            baseline = (
                session.iteration == 0 and grid_path(session).exists()
            )  # of a run that is stopped at once
            if session.clock.grid_of != session.iteration and not baseline:
                # Not in the metrics, so that a run that is extended goes on as if it had not ended here.
                figures = {"iteration": session.iteration, **sample_grid(session)}
            session.stage.finish(session, state, figures)
        set_end(session, state)
        run.log(f"{state} at iteration {session.iteration}")
    last = run.checkpoints / step_name(session.iteration)
    code = 0 if over else stop.exit_code
    return Outcome(run.path, session.iteration, session.seconds, last, code, session.records)


def set_end(session: Session, state: State) -> None:
    """The status of a run that ends with a checkpoint of this iteration, with what is known of it by then."""
    known: dict[str, Any] = {} if session.best is None else {"best": step_name(session.best)}
    known |= {"measured": session.records["rewards_after"]} if "rewards_after" in session.records else {}
    session.run.set_status(state, iteration=session.iteration, seconds=round(session.seconds, 3), **known)


@contextmanager
def failing(session: Session) -> Iterator[None]:
    """What is raised within becomes the status of the run; after a signal the status is that of the last checkpoint."""
    try:
        yield
    except BaseException as error:
        if session.trainer.processes.main:
            aside = isinstance(error, PictureFailure) or (is_out_of_memory(error) and not session.advancing)
            if aside and session.iteration > session.clock.first:  # the training itself is as it should be
                save_unsaved(session)
            done = saved_step(session) if isinstance(error, KeyboardInterrupt) else session.iteration
            state = note_end(session.run, error, done, session.stage.schedule.total)
            with suppress(EnvironmentFailure):  # of a full disk, say: what is to be said is the error
                session.stage.report(session, state, {})
        raise
