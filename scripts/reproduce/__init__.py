"""The table of the shapes world, from the commands that make it."""

from rtdmd_cli.cli.quiet import quiet_libraries

quiet_libraries(True)  # before anything imports them; the processes inherit it
