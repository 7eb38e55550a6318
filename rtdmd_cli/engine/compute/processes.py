"""A training in several processes, each with a part of every batch, through accelerate.

    accelerate launch -m rtdmd_cli distill ...      or      rtdmd distill --processes 2 ...

Every process holds the same weights. Random numbers are keyed by sample, so a part of a batch has the numbers it would
have in one process; gradients are summed before a role moves, and so all move alike. The main process alone writes.

torch is imported by what computes: how many processes there are is asked before every command.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rtdmd_cli.errors import EnvironmentFailure, RtdmdError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

BUCKET = 2**26  # numbers that are summed at once: 268 MB
PATIENCE = timedelta(hours=6)
"""How long the others wait for the main process, which measures rewards alone; NCCL's ten minutes may be too short."""


@dataclass(frozen=True)
class Processes:
    """The processes of a training: this one's index, their count, and accelerate's object, None for one process alone."""

    index: int = 0
    count: int = 1
    accelerator: Any = None  # accelerate carries no types

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.index == 0

    def part(self, total: int) -> range:
        """The samples of this process, of `total` in a batch."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Replace each gradient by its sum over the processes."""
        if self.count == 1:
            return
        import torch

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for bucket in _buckets(gradients):
            total = self.accelerator.reduce(torch.cat([each.flatten() for each in bucket]), "sum")
            for gradient, summed in zip(bucket, total.split([each.numel() for each in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def sum_figures(self, figures: dict[str, float]) -> dict[str, float]:
        """Each figure's sum over the processes, which all have the same names."""
        if self.count == 1:
            return figures
        import torch

        names = sorted(figures)
        own = torch.tensor([figures[name] for name in names], dtype=torch.float64)
        total = self.accelerator.reduce(own.to(self.accelerator.device), "sum")
        return dict(zip(names, total.tolist(), strict=True))

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes [N, ...], in their order, on the CPU; each has as many."""
        if self.count == 1:
            return rows
        gathered: Tensor = self.accelerator.gather(rows.to(self.accelerator.device).contiguous())
        return gathered.cpu()

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        import torch

        own = torch.tensor([number], device=self.accelerator.device)
        return int(self.accelerator.gather(own).max())

    def first_here(self) -> AbstractContextManager[None]:
        """One process of each machine runs the block first; the others then find on disk what it wrote."""
        if self.count == 1:
            return nullcontext()
        block: AbstractContextManager[None] = self.accelerator.local_main_process_first()
        return block

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """An error in one process stops all of them, with the same exit code, so that none waits for one that is gone.

        No process may sum, gather or wait for others within the block.
        """
        if self.count == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # raised again below, once the others know
            failure = error
        code = 0 if failure is None else failure.exit_code if isinstance(failure, RtdmdError) else 1
        agreed = self.largest(code)
        if failure is not None:
            raise failure
        if agreed:
            message = "Another process has stopped; its own message says why." if self.main else ""
            stopped = RtdmdError(message)
            stopped.exit_code = agreed
            raise stopped


ALONE = Processes()


def launched() -> int:
    """How many processes a launcher started, this one among them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_follower() -> bool:
    """Whether a launcher started this process and it is not the main one."""
    return launched() > 1 and os.environ.get("RANK", "0") != "0"


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """Join the launcher's other processes, if there are any; returns the group, and this process's device.

    Returns when all have come.
    """
    if launched() == 1:
        return ALONE, device
    import torch

    place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.type == "cuda" and place >= there:
        raise EnvironmentFailure(
            f"Each process needs a GPU of its own, and this machine has {there}.", "Start fewer processes."
        )
    from accelerate import Accelerator, InitProcessGroupKwargs  # seconds to import

    accelerator = Accelerator(
        cpu=device.type == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
    )
    own = accelerator.device
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator), own


def require_parts(processes: Processes, key: str, total: int, equal: bool) -> None:
    """UsageError if a batch has no sample for some process; equal: also if the parts differ in size."""
    if total < processes.count or (equal and total % processes.count):
        rule = "a multiple of" if equal else "at least"
        raise UsageError(
            f"`{key}` is {total}, and {processes.count} processes share it.",
            f"Make it {rule} {processes.count}.",
        )


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(each.numel() for each in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
