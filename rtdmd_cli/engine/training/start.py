"""Where a training starts: anew, or from a checkpoint. A file of its own, because the files of a run import for seconds."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from rtdmd_cli.engine.storage.checkpoint import Checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Start:
    """A run folder to continue (None: a new one) and the checkpoint to load (None: from nothing).

    allowed: keys of the preset that may differ from the run's although they change the numbers; changes: those that do,
    each with its value before and now.
    """

    run: RunFolder | None
    checkpoint: Checkpoint | None
    allowed: Set[str] = frozenset()
    changes: tuple[tuple[str, Any, Any], ...] = ()
