"""`--processes N`: the same command N times, by accelerate's launcher."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

OPTION = "--processes"
PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds that the launcher gives the processes to finish an iteration and save after a signal; 30 without it."""
THREADS = "OMP_NUM_THREADS"
"""Of each process; 1 without it, with which text encoders on the CPU take hours."""


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `rtdmd ARGUMENTS` in `count` processes of this machine; the exit code of the first that failed, else 0."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault(PATIENCE, str(6 * 3600))
    os.environ.setdefault(THREADS, str(max(1, cores() // count)))
    signal.signal(signal.SIGUSR1, lambda number, frame: pass_on(number))
    settings = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--gpu_ids", "all"]
    settings += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["-m", "rtdmd_cli", *without_option(arguments)]
    parsed = launch_command_parser().parse_args([*settings, *command])
    # torchrun's option, which accelerate passes on but does not parse; a signal that is handled is not ignored below any more
    parsed.signals_to_handle = ",".join(not_ignored())
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    except SignalException as error:
        pass_on(error.sigval)  # a second signal came while the launcher waited for them: it is theirs too
        return 128 + int(error.sigval)
    return 0


def cores() -> int:
    """That this process may use: a batch system, a container or taskset can give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def not_ignored() -> list[str]:
    """Names of the signals that end a command, but for those that this process was started to ignore, as by nohup."""
    ending = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    return [each.name for each in ending if signal.getsignal(each) is not signal.SIG_IGN]


def pass_on(number: int) -> None:
    """Send a signal to each of `children`."""
    for child in children():
        with suppress(ProcessLookupError):
            os.kill(child, number)


def children() -> list[int]:
    """The processes that this thread has started and that live; none where the system does not tell."""
    thread = threading.get_native_id()
    with suppress(OSError):
        return [int(word) for word in Path(f"/proc/self/task/{thread}/children").read_text().split()]
    return []


def without_option(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--processes N` and `--processes=N`."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == OPTION or argument.startswith(f"{OPTION}="):
            skip = argument == OPTION
        else:
            kept.append(argument)
    return kept
