"""What a training says and writes of its end."""

from dataclasses import replace
from pathlib import Path

import pytest

from rtdmd_cli.engine.compute.signals import Stopped
from rtdmd_cli.engine.storage.checkpoint import step_of
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.training.loop import ending, grid_due, in_words, save_due
from rtdmd_cli.engine.training.opening import note_end
from rtdmd_cli.engine.training.session import Schedule, kept
from rtdmd_cli.errors import PictureFailure


def test_the_first_signal_names_the_longest_of_the_last_iterations() -> None:
    assert ending("iteration", []) == "finishing this iteration"
    assert ending("iteration", [39.6, 12.0]) == "finishing this iteration (about 40 s)"
    assert ending("epoch", [0.1]) == "finishing this epoch (about 1 s)"
    assert (in_words(99.4), in_words(100.0), in_words(1800.0)) == ("99 s", "2 min", "30 min")


def test_a_grid_is_due_by_iterations_or_by_minutes_whichever_come_first() -> None:
    by_both = Schedule(total=100, save_every=9, log_every=1, sample_every=25, keep=1, sample_minutes=15)
    assert [i for i in range(1, 101) if grid_due(by_both, i, 0.0)] == [25, 50, 75, 100]
    assert not grid_due(by_both, 7, 899.0) and grid_due(by_both, 7, 900.0) and grid_due(by_both, 25, 1.0)
    assert not grid_due(replace(by_both, sample_minutes=None), 7, 1e6)
    assert not grid_due(replace(by_both, sample_every=0), 25, 1e6)  # the end alone has one


def test_a_checkpoint_is_due_by_iterations_or_by_minutes_whichever_come_first() -> None:
    """An epoch of stage 2 can take hours: ten of them are not to be lost to a power cut."""
    by_both = Schedule(total=100, save_every=10, log_every=1, sample_every=0, keep=1, save_minutes=30)
    assert [i for i in range(1, 41) if save_due(by_both, i, 0.0)] == [10, 20, 30, 40]
    assert not save_due(by_both, 7, 1799.0) and save_due(by_both, 7, 1800.0)
    assert not save_due(replace(by_both, save_minutes=None), 7, 1e6)


def test_what_is_kept_is_named() -> None:
    assert kept(None) == "there is no checkpoint yet"
    assert kept(Path("runs/a/checkpoints/step-000500")) == (
        "the last checkpoint (runs/a/checkpoints/step-000500) is kept"
    )
    assert step_of(Path("runs/a/checkpoints/step-000500")) == 500


@pytest.mark.parametrize(
    ("error", "iteration", "state"),
    [
        (Stopped(15, "", True), 2, "interrupted"),
        (KeyboardInterrupt(), 2, "interrupted"),
        (RuntimeError("no"), 3, "failed"),
        (PictureFailure("no"), 9, "finished"),
        (PictureFailure("no"), 3, "failed"),
    ],
)
def test_how_a_run_ended_stands_in_its_status(
    error: BaseException, iteration: int, state: str, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    note_end(run, error, iteration, 9)
    status = run.status()
    assert (status["state"], status["iteration"]) == (state, iteration)
    assert status.get("reason") == (None if isinstance(error, KeyboardInterrupt) else "no")
