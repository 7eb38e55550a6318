"""The program `rtdmd`: its commands, imported when they are called, and its exit codes."""

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer._click.core import Command, Context
from typer.core import TyperCommand, TyperGroup

from rtdmd_cli import __version__
from rtdmd_cli.cli import failures
from rtdmd_cli.cli.helping import first_sentence, polished
from rtdmd_cli.cli.quiet import no_telemetry, own_warnings, quiet_libraries, torch_attention
from rtdmd_cli.cli.streams import open_streams
from rtdmd_cli.engine.compute.allocator import let_segments_grow
from rtdmd_cli.engine.compute.signals import Stopped, StopRequest, stop_on_signals

PROGRAM = "rtdmd"
COMPLETION = "_RTDMD_COMPLETE"  # set by the shell while it completes a line
MARKUP = None  # plain help: rich's panels double the time to the first line
EPILOG = """\b
Exit codes:
  0    done
  1    internal error
  2    wrong usage or preset
  3    the machine: device, memory, disk, network, permission
  4    bad or incompatible data
  5    a value that is not finite
  6    another process works on the same folder
  129  stopped, as the terminal was closed
  130  stopped by Ctrl-C
  141  the reader of the output left
  143  stopped by SIGTERM
"""


def _distill() -> Callable[..., Any]:
    from rtdmd_cli.cli.distill import distill

    return distill


def _tune_reward() -> Callable[..., Any]:
    from rtdmd_cli.cli.tune_reward import tune_reward

    return tune_reward


def _sample() -> Callable[..., Any]:
    from rtdmd_cli.cli.sample import sample

    return sample


def _eval() -> Callable[..., Any]:
    from rtdmd_cli.cli.eval import eval_command

    return eval_command


def _export() -> Callable[..., Any]:
    from rtdmd_cli.cli.export import export

    return export


def _presets() -> typer.Typer:
    from rtdmd_cli.cli.presets import app

    return app


def _rewards() -> typer.Typer:
    from rtdmd_cli.cli.rewards import app

    return app


def _runs() -> typer.Typer:
    from rtdmd_cli.cli.runs import app

    return app


def _data() -> typer.Typer:
    from rtdmd_cli.cli.data import app

    return app


def _fetch() -> Callable[..., Any]:
    from rtdmd_cli.cli.fetch import fetch

    return fetch


def _doctor() -> Callable[..., Any]:
    from rtdmd_cli.cli.doctor import doctor

    return doctor


def _plan() -> Callable[..., Any]:
    from rtdmd_cli.cli.plan import plan

    return plan


@dataclass(frozen=True)
class Entry:
    """A command of the program: how to import its function or Typer app, and the first sentence of its help."""

    load: Callable[[], Callable[..., Any] | typer.Typer]
    help: str


COMMANDS = {
    "distill": Entry(_distill, "Turn a model into a 4-step generator (stage 1)."),
    "tune-reward": Entry(_tune_reward, "Raise a generator's rewards (stage 2)."),
    "plan": Entry(_plan, "Say what a training takes: memory of card and host, disk, hours."),
    "sample": Entry(_sample, "Make pictures of a prompt, or of a file of prompts."),
    "eval": Entry(_eval, "Measure a model on a benchmark: strict score, interval, and what it cost."),
    "export": Entry(_export, "Write a generator as other tools load it: diffusers, ComfyUI."),
    "runs": Entry(_runs, "List the runs, show one, view all in the browser, compare two on one page."),
    "fetch": Entry(
        _fetch, "Download the weights of a model or a reward beforehand, naming size and licence."
    ),
    "data": Entry(_data, "List and fetch the public sets of prompts."),
    "rewards": Entry(_rewards, "List the rewards, and check that they work: order, range, gradient."),
    "doctor": Entry(
        _doctor,
        "Check this machine: Python, libraries, GPU, memory, disk, hub; PASS, WARN or FAIL, and how to fix it.",
    ),
    "presets": Entry(
        _presets, "List, show, copy and check presets (a YAML file is a recipe), and list the keys of --set."
    ),
}


def load_command(name: str) -> Command:
    """Import a command of COMMANDS."""
    holder = typer.Typer(rich_markup_mode=MARKUP)
    holder.callback()(lambda: None)
    loaded = COMMANDS[name].load()
    if isinstance(loaded, typer.Typer):
        holder.add_typer(loaded, name=name)
    else:
        holder.command(name)(loaded)
    return polished(typer.main.get_group(holder).commands[name])


class LazyGroup(TyperGroup):
    """The commands of COMMANDS: only the one that is called is imported, none for the list of them."""

    def list_commands(self, ctx: Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        """What the list of commands needs: name and help."""
        if cmd_name not in COMMANDS:
            return None
        text = COMMANDS[cmd_name].help
        return TyperCommand(cmd_name, help=text, short_help=first_sentence(text))

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load_command(name), rest


app = typer.Typer(
    cls=LazyGroup,
    help="Few-step generators from flow models, on one workstation GPU.",
    epilog=EPILOG,
    rich_markup_mode=MARKUP,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options of the program itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with these arguments, by default the process's; returns the exit code, prints every error."""
    open_streams()
    _escape_what_has_no_code()
    no_telemetry()
    torch_attention()
    let_segments_grow()
    quiet_libraries()
    stop = StopRequest()
    try:
        with own_warnings(), stop_on_signals() as stop:
            code = _execute(sys.argv[1:] if argv is None else argv)
            print(end="", flush=True)  # a full disk or a reader that left shows here
            return code
    except Stopped as stopped:
        return failures.report_stopped(stopped)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, OSError):
            _discard_output()
            if stop.received is not None and error.errno in (errno.EIO, errno.EPIPE):
                return stop.exit_code  # the terminal is gone, and with it the place for the result
        return failures.report(error)


def _execute(arguments: Sequence[str]) -> int:
    command = typer.main.get_command(app)
    if COMPLETION in os.environ:
        command.main(prog_name=PROGRAM)  # leaves with SystemExit
    try:
        with command.make_context(PROGRAM, list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    return 0


def _escape_what_has_no_code() -> None:
    """Letters that stdout has no code for are escaped: an ASCII terminal, a folder whose name is no UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Drop what stdout still holds if it cannot be written, or Python would complain once more when it ends."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
