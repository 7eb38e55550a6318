"""`--processes N`: the same command N times, by accelerate's launcher."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

OPTION = "--processes"
PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds that the launcher gives the processes to finish an iteration and save after a signal; 30 without it."""
THREADS = "OMP_NUM_THREADS"
"""Of each process; 1 without it, with which text encoders on the CPU take hours."""
AT_ONCE = 10.0
"""Seconds that the processes have after a second signal: one that waits for others inside a library hears none."""
GRACE = 60.0
"""Seconds that the others have once the main process has gone, which alone writes anything: they may wait for it for hours."""


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `rtdmd ARGUMENTS` in `count` processes of this machine; the exit code of the first that failed, else 0."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault(PATIENCE, str(6 * 3600))
    os.environ.setdefault(THREADS, str(max(1, cores() // count)))
    signal.signal(signal.SIGUSR1, lambda number, frame: pass_on(number))
    over = threading.Event()
    watch = threading.Thread(target=end_followers, args=(threading.get_native_id(), over), daemon=True)
    watch.start()
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
        # a second signal came while the launcher waited for them: it is theirs too
        end_children(error.sigval)
        return 128 + int(error.sigval)
    finally:
        over.set()
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


def end_children(number: int) -> None:
    """Send a signal to each of `children`, and after AT_ONCE another that none can wait with."""
    pass_on(number)
    until = time.monotonic() + AT_ONCE
    while time.monotonic() < until and ranks():
        time.sleep(0.1)
    kill(ranks())


def end_followers(thread: int, over: threading.Event) -> None:
    """Watch the processes that a thread has started, until `over`; those that outlive the main one by GRACE are killed."""
    seen = time.monotonic()
    while not over.wait(min(1.0, GRACE)):
        there = ranks(thread)
        if "0" in there.values():
            seen = time.monotonic()
        elif time.monotonic() - seen >= GRACE:
            kill(there)


def kill(processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def ranks(thread: int | None = None) -> dict[int, str]:
    """Those of `children` that have a number of the launcher's, and the number."""
    found = {child: rank(child) for child in children(thread)}
    return {child: own for child, own in found.items() if own}


def rank(child: int) -> str:
    """The launcher's number of a process; "" where it has none, or has gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if line.startswith(b"RANK="):
                return line[5:].decode()
    return ""


def children(thread: int | None = None) -> list[int]:
    """The processes that a thread has started, by default this one, and that live; none where the system does not tell."""
    number = threading.get_native_id() if thread is None else thread
    with suppress(OSError):
        found = Path(f"/proc/self/task/{number}/children").read_text().split()
        return [int(word) for word in found if not has_ended(word)]
    return []


def has_ended(child: str) -> bool:
    """Whether a process is over, and only its exit code has not been asked for."""
    with suppress(OSError):
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def without_option(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--processes N` and `--processes=N`."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == OPTION or argument.startswith(f"{OPTION}="):
            skip = argument == OPTION
        else:
            kept.append(argument)
    return kept
