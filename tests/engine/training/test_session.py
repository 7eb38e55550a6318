"""What a training says and writes of its end."""

from pathlib import Path

import pytest

from rtdmd_cli.engine.compute.signals import Stopped
from rtdmd_cli.engine.storage.checkpoint import step_of
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.training.opening import note_end
from rtdmd_cli.engine.training.session import ending, in_words, kept
from rtdmd_cli.errors import PictureFailure


def test_the_first_signal_names_the_longest_of_the_last_iterations() -> None:
    assert ending("iteration", []) == "finishing this iteration"
    assert ending("iteration", [39.6, 12.0]) == "finishing this iteration (about 40 s)"
    assert ending("epoch", [0.1]) == "finishing this epoch (about 1 s)"
    assert (in_words(99.4), in_words(100.0), in_words(1800.0)) == ("99 s", "2 min", "30 min")


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
