"""What a person sees of an error: its cause, the next step, and the exit code."""

import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches

from typer._click.exceptions import NoArgsIsHelpError, NoSuchOption, UsageError  # see typer in pyproject.toml
from typer.core import TyperGroup
from typer.exceptions import TyperException

from rtdmd_cli.engine.compute.signals import Stopped
from rtdmd_cli.errors import (
    HINTS,
    EnvironmentFailure,
    RtdmdError,
    chain,
    companion_at_fault,
    companion_hint,
    is_device_fault,
    is_nccl,
    is_out_of_memory,
    no_programs,
)

INTERNAL = 1
ENVIRONMENT = EnvironmentFailure.exit_code
BROKEN_PIPE = 141  # 128 + SIGPIPE
DEBUG = "RTDMD_DEBUG"
OUT_OF_MEMORY_HINT = (
    "Use less at once: --set distill.micro_batch=1 or tune_reward.micro_batch=1 to train, --batch 1 to sample, "
    "or close other programs."
)
DEVICE_HINT = (
    "Look at it with nvidia-smi, and restart the machine if it does not answer; a training goes on by the command of "
    "`rtdmd runs show NAME`."
)
NCCL_HINT = "In a container, give it memory for that: docker run --shm-size=1g, or --ipc=host; NCCL_DEBUG=INFO says more."
NOEXEC_HINT = "Choose another folder for temporary files: TMPDIR=FOLDER, and TORCHINDUCTOR_CACHE_DIR for hardware.compile."


@dataclass(frozen=True)
class Failure:
    """message: one sentence, may be ""; hint: one sentence, or "" for none; exit_code: the process's."""

    message: str
    hint: str
    exit_code: int


def explain(error: Exception) -> Failure:
    """The failure that an exception means to a person."""
    match error:
        case RtdmdError():
            return Failure(error.message, error.hint, error.exit_code)
        case UsageError():
            return _usage(error)
        case TyperException():
            return Failure(error.format_message(), "", error.exit_code)
        case BrokenPipeError():
            return Failure("", "", BROKEN_PIPE)
        case OSError() if error.errno in HINTS:
            where = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
            return Failure(f"{error.strerror}{where}.", HINTS[error.errno], ENVIRONMENT)
        case _ if is_out_of_memory(error):
            return Failure(
                f"The memory is full: {one_sentence(error) or 'no more can be allocated'}.",
                OUT_OF_MEMORY_HINT,
                ENVIRONMENT,
            )
        case _ if is_device_fault(error):
            return Failure(f"The GPU has failed: {one_sentence(error)}.", DEVICE_HINT, ENVIRONMENT)
        case _ if library := no_programs(error):
            return Failure(f"The disk of {library} is mounted noexec.", NOEXEC_HINT, ENVIRONMENT)
        case _ if at_fault := companion_at_fault(error):
            name, words = at_fault
            return Failure(
                f"The {name} that is installed here doesn't fit: {words}.", companion_hint(name), ENVIRONMENT
            )
        case _ if nccl := next(filter(is_nccl, chain(error)), None):
            return Failure(
                f"The processes can't reach each other: {one_sentence(nccl)}.", NCCL_HINT, ENVIRONMENT
            )
    text = f"internal error, {type(error).__name__}: {error} (set {DEBUG}=1 for the traceback)"
    return Failure(text, "", INTERNAL)


def one_sentence(error: BaseException) -> str:
    """The first of its text, without the full stop."""
    return str(error).partition(". ")[0].partition("\n")[0].rstrip(".")


def report(error: Exception) -> int:
    """Print the failure on stderr, with the traceback if RTDMD_DEBUG is set; returns the exit code."""
    failure = explain(error)
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, NoArgsIsHelpError):
        print(error.format_message(), file=sys.stderr)
        return failure.exit_code
    for label, text in (("error", failure.message), ("hint", failure.hint)):
        if text:
            print(f"{label}: {one_line(text)}", file=sys.stderr)
    return failure.exit_code


def report_stopped(stopped: Stopped) -> int:
    """Say on stderr that a signal ended the command and what is kept; returns the exit code."""
    how = "stopped at once" if stopped.at_once and stopped.kept else "stopped"
    print(one_line(f"{how}{': ' * bool(stopped.kept)}{stopped.kept}"), file=sys.stderr)
    return stopped.exit_code


def one_line(text: str) -> str:
    """The text without line breaks, and with other control characters escaped."""
    joined = " ".join(text.split())
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in joined)


def nearest(text: str, known: Iterable[str]) -> str:
    """The most similar of the known names, of which there is at least one."""
    return max(known, key=lambda name: SequenceMatcher(None, text, name).ratio())


def _nearest_of(similar: Sequence[str]) -> str:
    """Half a sentence, or nothing where no name is similar: a setting of the preset, say, given as an option."""
    return f"; the nearest is `{similar[0]}`" if similar else ""


def _usage(error: UsageError) -> Failure:
    """A wrong command line; names the nearest command or option."""
    message, context = f"{error.format_message().rstrip('.')}.", error.ctx
    if context is None:
        return Failure(message, "See: rtdmd --help", error.exit_code)
    command, path = context.command, context.command_path
    unknown = re.match(r"No such command (['\"])(.*?)\1\.", error.message, re.DOTALL)
    if isinstance(error, NoSuchOption):
        options = [
            name for param in command.get_params(context) for name in (*param.opts, *param.secondary_opts)
        ]
        bare = {name.lstrip("-"): name for name in options if name.startswith("-")}  # dashes are alike in all
        similar = [bare[name] for name in get_close_matches(error.option_name.lstrip("-"), bare, 1)]
        message = f"`{path}` has no option `{error.option_name}`{_nearest_of(similar)}."
    elif unknown and isinstance(command, TyperGroup):
        close = nearest(unknown[2], command.list_commands(context))
        message = f"`{path}` has no command `{unknown[2]}`; the nearest is `{close}`."
    return Failure(message, f"See: {path} --help", error.exit_code)
