"""What happens when the card's memory is full in the middle of an iteration.

The iteration is undone and made again with half the micro-batch: the same images, the same random numbers, the same step.
At a micro-batch of 1 nothing is left to halve: the run saves and ends with the settings that need less.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.compute.device import free_memory
from rtdmd_cli.engine.training.trainer import Trainer
from rtdmd_cli.engine.training.undo import Undo
from rtdmd_cli.errors import EnvironmentFailure, is_out_of_memory

RECORD = "micro_batch"
"""Of a run's records: the micro-batch that it has come down to."""


class MemoryFull(EnvironmentFailure):
    """The memory is full at a micro-batch of 1. Nothing of the iteration has moved."""


@dataclass(frozen=True)
class Sizes:
    """A stage's batch, and how its micro-batch is read and set, in images."""

    section: str
    batch: int
    micro_batch: Callable[[], int]
    resize: Callable[[int], None]

    def halved(self) -> int:
        """The largest part of the batch that is at most half the micro-batch; 0 where that is 1."""
        half = self.micro_batch() // 2
        return next((size for size in range(half, 0, -1) if self.batch % size == 0), 0)


def advance_within_memory(
    trainer: Trainer, sizes: Sizes, advance: Callable[[], None], preset: Preset, tell: Callable[[str], None]
) -> bool:
    """Make an iteration, again and again with a smaller micro-batch where the memory is full; whether it was made smaller.

    tell: is given a line each time. `MemoryFull` where the micro-batch is 1. One of several processes can't make an
    iteration again on its own: there the error is the library's.
    """
    if trainer.processes.count > 1:
        advance()
        return False
    undo, smaller = Undo(trainer), False
    while True:
        undo.begin()
        try:
            advance()
            return smaller
        except RuntimeError as error:
            # not torch's OutOfMemoryError alone: what loads late finds a full card in words of its own
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition(". ")[0].partition("\n")[0].rstrip(".")
        # out of the handler: until here the error holds the frames in which it was raised, and their tensors
        undo.restore()
        free_memory(trainer.backbone.device)
        before, size = sizes.micro_batch(), sizes.halved()
        if not size:
            raise MemoryFull(
                f"The memory is full at a micro-batch of 1: {reason}.", hint(preset, sizes.section)
            )
        sizes.resize(size)
        smaller = True
        tell(
            f"the memory is full at {sizes.section}.micro_batch={before}: this iteration is made again with {size}, "
            "and so are all that follow; the step stays the same"
        )


def keep_size(sizes: Sizes, records: Mapping[str, Any]) -> None:
    """Go on with the micro-batch that a run has come down to, unless the preset's is smaller still."""
    if RECORD in records and records[RECORD] < sizes.micro_batch():
        sizes.resize(records[RECORD])


OPTIMIZER, BASE = "hardware.optimizer", "hardware.base"
"""A saved optimiser is of one kind; a base's format changes the numbers, which a run is asked to allow."""


def hint(preset: Preset, section: str) -> str:
    """The settings that need less memory and are not taken yet, in the order in which `rtdmd plan --fit` takes them."""
    left = less_memory(preset, section)
    if not left:
        return "Every setting that saves memory is taken: lower model.resolution, or use a card with more memory."
    new = [each for each in left if each.startswith(OPTIMIZER)]
    bases = [each for each in left if each.startswith(BASE)][:1]  # the other one is for the next time
    free = [each for each in left if not each.startswith((OPTIMIZER, BASE))]
    chosen = [f"--set {each}" for each in (*free, *bases)] + [f"--allow-change {BASE}"] * len(bases)
    parts = [f"go on with --resume and {' '.join(chosen)}"] if chosen else []
    parts += [f"a new run can also take --set {each}" for each in new]
    return f"In the order of `rtdmd plan --fit`, which counts them beforehand: {'; '.join(parts)}."


def less_memory(preset: Preset, section: str) -> list[str]:
    """Settings, as KEY=VALUE, that save memory while the images per update stay; those that are taken are left out.

    section: "distill" or "tune_reward", the stage that needs it.
    """
    hardware, distill, tuned = preset.hardware, preset.distill, preset.tune_reward
    joined = max(distill.backprop_steps, tuned.matching_backprop_steps or 1) > 1
    bases = (
        () if distill.train == "full" else {"plain": ("int8", "nf4"), "int8": ("nf4",)}.get(hardware.base, ())
    )
    wanted = [
        (
            section == "tune_reward" and tuned.rewards_in_memory != "one",
            "tune_reward.rewards_in_memory=one",
        ),
        (hardware.optimizer == "adamw", "hardware.optimizer=adamw8bit"),
        (not hardware.vae_tiling, "hardware.vae_tiling=true"),
        (not hardware.gradient_checkpointing, "hardware.gradient_checkpointing=true"),
        (distill.boundaries_batched and not joined, "distill.boundaries_batched=false"),
        *((True, f"hardware.base={base}") for base in bases),
    ]
    return [setting for possible, setting in wanted if possible]
