"""The program itself: speed of the help, exit codes, messages, and what is imported when."""

import errno
import json
import logging
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rtdmd_cli import __version__, errors
from rtdmd_cli.cli import app, console, failures, quiet
from rtdmd_cli.engine.compute.signals import Stopped
from tests.commands import LIMIT
from tests.tiny_runs import write_preset

HEAVY = {"accelerate", "bitsandbytes", "diffusers", "numpy", "peft", "torch", "transformers"}
MODULE = [sys.executable, "-m", "rtdmd_cli"]
BUFFERED = os.environ | {"PYTHONUNBUFFERED": ""}  # stdout that still holds text when the program ends


def run(*command: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environ, timeout=LIMIT)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Runs `rtdmd eval` with a body that raises the given error; returns the exit code."""

    def call(error: BaseException) -> int:
        def body() -> None:
            raise error

        monkeypatch.setitem(app.COMMANDS, "eval", app.Entry(lambda: body, "fails"))
        return app.main(["eval"])

    return call


def test_help_takes_under_half_a_second() -> None:
    """Processor time, which a busy machine does not change, of the best of three."""

    def seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        before = seconds()
        assert run(*MODULE, "--help").returncode == 0
        times.append(seconds() - before)
    assert min(times) < 0.5, times


def test_no_command_imports_torch_before_its_body_runs() -> None:
    code = (
        "import sys; from rtdmd_cli.cli import app; list(map(app.load_command, app.COMMANDS)); "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = set(run(sys.executable, "-c", code).stdout.split())
    assert "typer" in loaded and not HEAVY & loaded


def test_listing_the_commands_imports_none_of_them() -> None:
    code = (
        "import sys; from rtdmd_cli.cli import app; app.main(['--help']); "
        "print(*(name for name in app.COMMANDS if 'rtdmd_cli.cli.' + name in sys.modules), file=sys.stderr)"
    )
    result = run(sys.executable, "-c", code)
    assert result.stdout.startswith("Usage: rtdmd") and result.stderr.split() == []


def test_module_and_script_are_the_same_program() -> None:
    script = shutil.which("rtdmd", path=str(Path(sys.executable).parent))
    assert script, "the project is not installed: run scripts/setup"
    for arguments in (["--version"], ["--help"], ["presets", "list"], ["nonsense"]):
        ours, theirs = run(*MODULE, *arguments), run(script, *arguments)
        assert (ours.returncode, ours.stdout, ours.stderr) == (
            theirs.returncode,
            theirs.stdout,
            theirs.stderr,
        )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rtdmd {__version__}\n"


def test_help_states_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["-h"]) == 0
    shown = capsys.readouterr().out.partition("Exit codes:")[2]
    assert re.findall(r"^ +(\d+) ", shown, re.MULTILINE) == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
        "129",
        "130",
        "141",
        "143",
    ]


def test_without_a_command_the_help_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("Usage: rtdmd [OPTIONS] COMMAND")


@pytest.mark.parametrize("name", app.COMMANDS)
def test_the_list_says_of_a_command_what_its_own_help_says(name: str) -> None:
    assert (app.load_command(name).help or "").partition("\n")[0] == app.COMMANDS[name].help


def test_the_app_runs_under_the_test_runner_of_typer() -> None:
    result = CliRunner().invoke(app.app, ["presets", "list"])
    assert result.exit_code == 0 and "shapes-4step" in result.stdout


def test_completion_knows_commands_and_their_options() -> None:
    def complete(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        return run(*MODULE, _RTDMD_COMPLETE="complete_bash", **words).stdout.split()

    assert complete("rtdmd pre") == ["presets"]
    assert complete("rtdmd distill --dry") == ["--dry-run"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RtdmdError("The cause.", "Do this."), 1),
        (errors.UsageError("The cause.", "Do this."), 2),
        (errors.EnvironmentFailure("The cause.", "Do this."), 3),
        (errors.DataError("The cause.", "Do this."), 4),
        (errors.NumericalError("The cause.", "Do this."), 5),
    ],
)
def test_our_errors_are_two_lines(
    error: errors.RtdmdError,
    code: int,
    failing: Callable[[BaseException], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert failing(error) == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "error: The cause.\nhint: Do this.\n")


def test_a_message_stays_on_its_line(
    failing: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(errors.DataError("two\nlines and \x1b[31mcolour", "")) == 4
    assert capsys.readouterr().err == "error: two lines and \\x1b[31mcolour\n"


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "code", "message", "hint"),
    [
        (MemoryError(), 3, "error: The memory is full", "micro_batch"),
        (OutOfMemoryError("CUDA: nothing left. Tried 2 GiB."), 3, "full: CUDA: nothing left.\n", "--batch 1"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            3,
            "The memory is full",
            "micro_batch",
        ),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), 3, "error: No space left: /x/y.\n", "space"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            3,
            "Permission denied: /x.\n",
            "permissions",
        ),
    ],
)
def test_failures_of_the_machine(
    error: Exception,
    code: int,
    message: str,
    hint: str,
    failing: Callable[[BaseException], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert failing(error) == code
    first, second = capsys.readouterr().err.splitlines(keepends=True)
    assert message in first and second.startswith("hint: ") and hint in second


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (typer.Exit(143), 143), (typer.Exit(), 0), (BrokenPipeError(), 141)],
)
def test_silent_ends(
    error: BaseException,
    code: int,
    failing: Callable[[BaseException], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert failing(error) == code
    assert capsys.readouterr() == ("", "")


def test_an_unexpected_error_is_one_line_without_a_traceback(
    failing: Callable[[BaseException], int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RTDMD_DEBUG", raising=False)
    assert failing(ValueError("x is\n3")) == 1
    line = "error: internal error, ValueError: x is 3 (set RTDMD_DEBUG=1 for the traceback)\n"
    assert capsys.readouterr().err == line
    monkeypatch.setenv("RTDMD_DEBUG", "1")
    assert failing(ValueError("x is\n3")) == 1
    debug = capsys.readouterr().err
    assert debug.startswith("Traceback") and "in body" in debug and debug.endswith(line)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("distil", "`rtdmd` has no command `distil`; the nearest is `distill`.", "rtdmd --help"),
        ("qqq", "`rtdmd` has no command `qqq`; the nearest is `", "rtdmd --help"),
        (
            "presets lst",
            "`rtdmd presets` has no command `lst`; the nearest is `list`.",
            "rtdmd presets --help",
        ),
        ("--verison", "`rtdmd` has no option `--verison`; the nearest is `--version`.", "rtdmd --help"),
        (
            "distill --pre x",
            "`rtdmd distill` has no option `--pre`; the nearest is `--preset`.",
            "rtdmd distill --help",
        ),
        ("distill --itrations 3", "`rtdmd distill` has no option `--itrations`.", "rtdmd distill --help"),
        ("export --foo", "`rtdmd export` has no option `--foo`.", "rtdmd export --help"),
        ("distill --seet=a=b", "has no option `--seet`; the nearest is `--set`.", "rtdmd distill --help"),
        ("presets list extra", "Got unexpected extra argument(s) (extra).", "rtdmd presets list --help"),
        ("presets show", "Missing argument 'NAME|FILE'.", "rtdmd presets show --help"),
        ("sample x -n 0", "Invalid value for '-n'", "rtdmd sample --help"),
        ("sample x -n many", "Invalid value for '-n'", "rtdmd sample --help"),
        ("distill --preset shapes-4stepp", "`shapes-4step`", "rtdmd presets list"),
        ("distill --set distill.iteration=3", "`distill.iterations`", "rtdmd presets show"),
    ],
)
def test_a_wrong_command_line(
    arguments: str, message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(arguments.split()) == 2
    shown = capsys.readouterr()
    first, second = shown.err.splitlines()
    assert shown.out == "" and first.startswith("error: ") and message in first
    assert second.startswith("hint: ") and hint in second


def test_a_reader_that_leaves_is_no_error() -> None:
    with subprocess.Popen(
        [*MODULE, "presets", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_stdout() -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [*MODULE, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED
        )
    assert result.returncode == 3
    assert (
        result.stderr
        == "error: No space left on device.\nhint: Free some disk space, or choose a folder on another disk.\n"
    )


@pytest.mark.parametrize("command", [("data", "list"), ("rewards", "list"), ("presets", "list")])
def test_lists_in_a_terminal_of_ascii(command: tuple[str, ...]) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "COLUMNS": "90"}
    done = subprocess.run([*MODULE, *command], env=BUFFERED | ascii_only, capture_output=True)
    assert done.returncode == 0 and done.stdout.isascii() and done.stderr.isascii() and len(done.stdout) > 500
    assert b"error" not in done.stderr


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2>&- >&-"])
def test_errors_that_nobody_can_read_change_no_exit_code(redirection: str) -> None:
    line = f"{shlex.join([*MODULE, 'presets', 'show', 'none'])} {redirection}"
    done = subprocess.run(["bash", "-c", line], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_a_closed_stream_is_no_place_for_a_file(tmp_path: Path) -> None:
    """The next file that is opened would get the number of stderr, and be written to by whatever prints."""
    program = "import os, sys; from rtdmd_cli.cli.streams import open_streams; open_streams(); "
    program += "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT); print('to stderr', file=sys.stderr); sys.exit(fd)"
    line = f"{shlex.join([sys.executable, '-c', program, str(tmp_path / 'f')])} 2>&- <&-"
    assert subprocess.run(["bash", "-c", line], env=BUFFERED).returncode > 2
    assert (tmp_path / "f").read_bytes() == b""


@pytest.mark.parametrize(
    ("number", "code", "at_once", "said"),
    [
        (signal.SIGINT, 130, True, "stopped at once: a is kept\n"),
        (signal.SIGTERM, 143, False, "stopped: a is kept\n"),
        (signal.SIGHUP, 129, True, "stopped\n"),
    ],
)
def test_a_signal_ends_with_its_code_and_a_word(
    number: int,
    code: int,
    at_once: bool,
    said: str,
    failing: Callable[[BaseException], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = "a is kept" if ":" in said else ""
    assert failing(Stopped(number, kept, at_once)) == code
    assert capsys.readouterr() == ("", said)


def test_nothing_that_is_imported_reports_to_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in quiet.TELEMETRY:
        monkeypatch.delenv(name, raising=False)
    assert app.main(["--version"]) == 0
    assert {name: os.environ[name] for name in quiet.TELEMETRY} == dict(quiet.TELEMETRY)
    assert os.environ["ORT_DISABLE_TELEMETRY"] == os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")  # what the user has chosen stays
    assert app.main(["--version"]) == 0
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"


def test_only_the_known_noise_of_libraries_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    quiet.quiet_libraries()
    quiet.quiet_libraries()
    for name, text in quiet.NOISE.items():
        logger = logging.getLogger(name)
        logger.warning("before %s after", text)
        logger.warning("something else of %s", name)
        logger.error("an error")
    assert caplog.messages == [
        text for name in quiet.NOISE for text in (f"something else of {name}", "an error")
    ]


def test_the_program_silences_it_before_anything_is_imported() -> None:
    code = (
        "import logging; from rtdmd_cli.cli import app, quiet; app.main(['--version']); "
        "print(all(quiet.is_wanted in logging.getLogger(name).filters for name in quiet.NOISE))"
    )
    assert run(sys.executable, "-c", code).stdout.splitlines()[-1] == "True"


def test_progress_bars_of_the_hub_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    quiet.quiet_libraries()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    quiet.quiet_libraries()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"


def test_a_result_is_one_json_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    result: dict[str, Any] = {
        "run": Path("runs/ä"),
        "score": float("nan"),
        "each": [1, float("inf"), (True, None)],
    }
    console.show(result, as_json=True)
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.isascii()
    assert json.loads(shown.out) == {"run": "runs/ä", "score": None, "each": [1, None, [True, None]]}
    console.show({"run": Path("runs/a"), "iterations": 3}, as_json=False)
    assert capsys.readouterr().out == "run         runs/a\niterations  3\n"


def test_messages_go_to_stderr_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("shown")
    console.say("hidden", quiet=True)
    assert capsys.readouterr() == ("", "shown\n")


def test_nearest() -> None:
    assert failures.nearest("iteration", ["batch", "iterations", "seed"]) == "iterations"


def test_quiet_silences_remarks_on_prompts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Comments and options in a file, prompts that are cut off: our own and the libraries'."""
    long = "a photo of a red circle and " * 12 + "a ring"  # longer than the encoders read
    file, preset = tmp_path / "prompts.txt", str(write_preset(tmp_path / "tiny.yaml"))
    file.write_text(f"# shapes\n{long}\na ring --w 512\n", encoding="utf-8")
    draw = ["sample", f"--prompts={file}", f"--from={preset}", "--steps=1", f"--out={tmp_path / 'x'}"]
    plan = ["distill", f"--preset={preset}", f"--set=distill.prompts={file}", "--dry-run"]
    for number, command in enumerate((draw, plan)):
        told = []
        for given in ([], ["--quiet"]):
            monkeypatch.setenv(
                "RTDMD_CACHE", str(tmp_path / f"{number}{len(given)}")
            )  # nothing encoded before
            caplog.clear()
            assert app.main([*command, *given]) == 0
            told.append((capfd.readouterr().err, caplog.text))
        (spoken, logged), silent = told
        assert "begin with #" in logged and "looks like options" in logged and "truncated" not in spoken
        assert ("their ends are cut off" in logged) is (command is draw)
        assert silent == ("", "")
    assert quiet.OWN.isEnabledFor(logging.WARNING)  # for the next command in this process


def test_no_summary_ends_in_an_ellipsis_and_no_value_is_a_type(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--help"],
        ["runs", "--help"],
        ["presets", "--help"],
        ["sample", "--help"],
        ["export", "--help"],
    ):
        assert app.main(words) == 0
        text = capsys.readouterr().out
        assert "..." not in text.replace("[ARGS]...", "").replace("[RUN ...]", "") and "range>" not in text
        assert "[[" not in text
    assert app.main(["sample", "--help"]) == 0
    assert "--steps N" in capsys.readouterr().out


def test_windows_is_told_where_to_go() -> None:
    """Before anything is imported that it lacks."""
    code = "import sys; sys.platform = 'win32'; from rtdmd_cli.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[0] == "error: rtdmd needs Linux or macOS." and "WSL2" in done.stderr
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"rtdmd": "rtdmd_cli.__main__:main"}
