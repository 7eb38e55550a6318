"""Where a run of stage 1 starts; apart from `distill_run.py`, whose imports take seconds."""

from dataclasses import dataclass

from rtdmd_cli.engine.storage.checkpoint import Checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Start:
    """A run folder to continue (None: a new one) and the checkpoint to load (None: from nothing)."""

    run: RunFolder | None
    checkpoint: Checkpoint | None
