"""What Typer's help leaves to be said better: whole summaries of commands, and names for the values of options."""

from pathlib import Path

from typer._click.core import Command
from typer.core import TyperGroup, TyperOption

VALUES: dict[object, str] = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
"""Type of an option's value -> what stands for it in the help."""


def polished(command: Command) -> Command:
    """The command and all below it, changed in place: no summary ends in an ellipsis, no value is an `<int range>`."""
    for option in command.params:
        if isinstance(option, TyperOption) and option.metavar is None:
            option.metavar = VALUES.get(option.type_descriptor.annotation)
    command.short_help = command.short_help or first_sentence(command.help or "")
    if isinstance(command, TyperGroup):
        for each in command.commands.values():
            polished(each)
    return command


def first_sentence(text: str) -> str:
    """The first paragraph's first sentence, in one line and without its full stop."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")
