"""Where a training starts: anew, or from a checkpoint. A file of its own, because those of a run import for seconds."""

from dataclasses import dataclass

from rtdmd_cli.engine.storage.checkpoint import Checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Start:
    """A run folder to continue (None: a new one) and the checkpoint to load (None: from nothing)."""

    run: RunFolder | None
    checkpoint: Checkpoint | None
