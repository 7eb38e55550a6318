"""`rtdmd runs` on finished, killed and damaged run folders."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rtdmd_cli.cli import failures
from rtdmd_cli.cli.app import app
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.distill.report import write_run_report
from rtdmd_cli.engine.report.grid import GridRow, picture_grid, save_picture, save_png
from rtdmd_cli.engine.report.run_facts import live_now
from rtdmd_cli.engine.report.viewer_server import Viewer
from rtdmd_cli.engine.storage.files import write_json
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.storage.runs import list_runs
from rtdmd_cli.errors import EnvironmentFailure
from tests.commands import ROOT
from tests.tiny_runs import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs with curves and grids, a killed one, and four that are damaged each in its way."""
    out = tmp_path_factory.mktemp("work") / "runs"
    for number, name in enumerate(("first", "second")):
        run = make_run(out, name, (10, 20))
        add_life(run, number)
    killed = make_run(out, "killed", (), state="running")
    killed.metrics.append({"iteration": 7, "fake_loss": 0.5, "seconds": 3.0, "iterations_per_second": 2.0})
    with killed.metrics.path.open("ab") as file:
        file.write(b'{"iteration": 8, "fake')
    for name in ("no-preset", "no-status", "bad-environment", "bad-preset"):
        shutil.copytree(out / "first", out / name)
    (out / "no-preset" / "preset.resolved.yaml").unlink()
    (out / "no-status" / "status.json").write_bytes(b"{")
    (out / "bad-environment" / "environment.json").write_bytes(b"[]")
    (out / "bad-preset" / "preset.resolved.yaml").write_text("model: {famly: sd3}\n")
    (out / "no run at all").mkdir()
    (out / "a file").write_text("x")
    return out


def add_life(run: RunFolder, number: int) -> None:
    for iteration in (5, 10, 15, 20):
        row = {"iteration": iteration, "fake_loss": 1 / (iteration + number), "grad<script>": 0.5 + number}
        run.metrics.append(row | {"seconds": 2.0 * iteration, "iterations_per_second": 0.5})
    for step in (10, 20):
        picture = picture_grid([GridRow("row", torch.full((2, 3, 16, 16), step / 40 + number / 3))])
        save_png(picture, run.samples / f"step-{step:06d}.png", {})
    run.set_status("finished", iteration=20, seconds=41.0)


def call(runs: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["runs", *arguments], catch_exceptions=True)


def listed(runs: Path) -> dict[str, Any]:
    result = call(runs, "list", "--json", "--out", str(runs))
    assert result.exit_code == 0
    return {each["name"]: each for each in json.loads(result.stdout)}


def test_every_run_has_a_row(runs: Path) -> None:
    found = listed(runs)
    assert found.keys() == {
        "first", "second", "killed", "no-preset", "no-status", "bad-environment", "bad-preset"
    }  # fmt: skip
    second = found["second"]
    assert (second["stage"], second["state"], second["problem"]) == ("distill", "finished", None)
    assert (second["iterations"], second["target"], second["seconds"]) == (20, 15_000, 41.0)
    assert second["figures"] == {"fake_loss": 1 / 21, "grad<script>": 1.5}
    assert second["preset"] == "preset.second"  # of the file .second.yaml
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", second["date"])
    assert [found["killed"][key] for key in ("state", "iterations", "seconds")] == ["killed", 7, 3.0]


def test_damaged_runs_are_named_with_what_can_still_be_read(runs: Path) -> None:
    found = listed(runs)
    reasons = {
        "no-preset": "preset.resolved.yaml is missing",
        "no-status": "status.json is missing or damaged",
        "bad-environment": "environment.json is missing or damaged",
        "bad-preset": "famly",
    }
    for name, reason in reasons.items():
        assert found[name]["state"] == "damaged" and reason in found[name]["problem"]
        assert found[name]["figures"]["fake_loss"] == 1 / 20 and found[name]["iterations"] == 20
    table = call(runs, "list", "--out", str(runs))
    assert table.exit_code == 0 and all(name in table.stdout for name in found)
    assert all(reason in table.stderr for reason in reasons.values())
    assert call(runs, "list", "--out", str(runs), "--quiet").stderr == ""


def test_a_run_that_is_worked_on_is_not_called_killed(runs: Path) -> None:
    with RunFolder(runs / "killed").lock():
        assert listed(runs)["killed"]["state"] == "running"
    assert listed(runs)["killed"]["state"] == "killed"


def test_no_runs_at_all(tmp_path: Path) -> None:
    result = call(tmp_path, "list", "--out", str(tmp_path / "none"))
    assert (result.exit_code, result.stdout) == (0, "") and "no runs" in result.stderr
    assert call(tmp_path, "list", "--json", "--out", str(tmp_path / "none")).stdout == "[]\n"


def test_show_names_checkpoints_and_what_is_damaged_of_them(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "first", copy)
    (copy / "checkpoints/step-000020/ema.safetensors").write_bytes(b"short")
    shown = json.loads(call(runs, "show", str(copy), "--json").stdout)
    assert shown["checkpoints"] == [10, 20] and shown["newest_checkpoint"] == "step-000010"
    assert "ema.safetensors" in shown["damaged_checkpoints"]["step-000020"]
    assert shown["command"] == ["rtdmd"] and shown["grids"] == 2
    text = call(runs, "show", "first", "--out", str(runs))
    assert text.exit_code == 0 and "fake_loss" in text.stdout and "step-000020" in text.stdout
    damaged = call(runs, "show", "no-preset", "--out", str(runs))
    assert damaged.exit_code == 0 and "preset.resolved.yaml is missing" in damaged.stdout


def test_a_killed_run_says_how_it_goes_on(runs: Path) -> None:
    told = call(runs, "show", "killed", "--out", str(runs)).stderr
    run = RunFolder(runs / "killed")
    again = shlex.split(told.partition("Go on with: ")[2])
    assert again == ["rtdmd", "distill", "--preset", str(run.preset), "--resume", str(run.path)]
    assert "Go on with" not in call(runs, "show", "first", "--out", str(runs)).stderr


def test_the_report_of_a_killed_run_says_so_when_the_run_is_looked_at(runs: Path, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(runs / "killed", tmp_path / "killed")))
    preset = load_preset(str(run.preset), environ={}).preset
    write_run_report(run, preset, "running", 7, 3.0, live=live_now(60.0, 1.0))
    living = run.report.read_text("utf-8")
    assert "The run is under way: <strong>7" in living and "location.reload" in living
    with run.lock():  # it is worked on
        call(runs, "show", str(run.path))
    assert run.report.read_text("utf-8") == living
    assert "now it says how it ended" in call(runs, "show", str(run.path)).stderr
    page = run.report.read_text("utf-8")
    assert "The run was killed. When this page was written: <strong>7" in page
    assert not any(word in page for word in ("The run goes on", "under way", "<script", "script-src"))
    over = living.replace(living.partition('id="live"')[2].partition("</div>")[0], "")
    assert len(over) - len(page) < 3000 and page.endswith("</main>\n</body>\n</html>\n")
    assert "now it says" not in call(runs, "show", str(run.path)).stderr
    assert run.report.read_text("utf-8") == page


@pytest.fixture
def impatience() -> Iterator[None]:
    """A test that waits for a pipe fails after a minute."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_pipe_in_the_place_of_a_grid_is_no_picture(runs: Path, tmp_path: Path, impatience: None) -> None:
    run = RunFolder(Path(shutil.copytree(runs / "first", tmp_path / "piped")))
    os.mkfifo(run.samples / "step-000030.png")
    assert json.loads(call(runs, "show", str(run.path), "--json").stdout)["grids"] == 2
    page = tmp_path / "page.html"
    assert call(runs, "compare", str(run.path), str(runs / "second"), "--out", str(page)).exit_code == 0
    write_run_report(run, load_preset(str(run.preset), environ={}).preset, "finished", 20, 41.0)
    for path in (page, run.report):
        text = path.read_text("utf-8")
        assert "data:image/png" in text and "Iteration 20" in text and "Iteration 30" not in text


def test_an_unknown_run_is_refused_with_those_there_are(runs: Path) -> None:
    result = call(runs, "show", "frist", "--out", str(runs))
    failure = failures.explain(result.exception)
    assert failure.exit_code == 2 and "frist" in failure.message and "first" in failure.hint


def test_compare_writes_one_page_and_overwrites_nothing(runs: Path) -> None:
    arguments = ("compare", "first", "second", "--runs", str(runs))
    result = call(runs, *arguments)
    path = runs / "compare-first-second.html"
    assert result.exit_code == 0 and result.stdout == f"{path}\n"
    text = path.read_text("utf-8")
    assert text.count("data:image/png;base64,") == 4  # the newest pair, and the pair at step 10
    assert "<script" not in text and "grad&lt;script&gt;" in text
    chart = text[text.index("Fake-score loss") :].partition("</svg>")[0]
    assert "first" in chart and "second" in chart and chart.count('class="s1') >= 1
    path.write_text("mine")
    again = failures.explain(call(runs, *arguments).exception)
    assert again.exit_code == 2 and "--force" in again.hint and path.read_text() == "mine"
    assert call(runs, *arguments, "--force").exit_code == 0 and path.read_text("utf-8") == text
    path.unlink()


def test_compare_with_a_damaged_and_a_killed_run(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    where = ("--runs", str(runs), "--json", "--out", str(page))
    result = call(runs, "compare", "no-preset", "killed", *where)
    assert result.exit_code == 0 and json.loads(result.stdout) == {"page": str(page)}
    text = page.read_text("utf-8")
    assert "preset.resolved.yaml is missing" in text and "killed has no sample grid" in text
    assert "can&#x27;t be compared" in text


def test_compare_names_the_settings_that_differ(runs: Path, tmp_path: Path) -> None:
    copy, page = tmp_path / "first", tmp_path / "page.html"
    shutil.copytree(runs / "first", copy)
    preset = copy / "preset.resolved.yaml"
    preset.write_text(preset.read_text().replace("seed: 42", "seed: 43"))
    assert call(runs, "compare", str(runs / "first"), str(copy), "--out", str(page)).exit_code == 0
    text = page.read_text("utf-8")
    assert "distill.seed" in text and ">43<" in text and "distill.batch" not in text
    assert f"{tmp_path.name}/first" in text and "runs/first" in text
    same = failures.explain(call(runs, "compare", str(copy), str(copy)).exception)
    assert same.exit_code == 2 and "itself" in same.message


def test_a_name_with_line_ends_is_one_row(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "first", tmp_path / "runs" / "a\n\tb")
    lines = call(runs, "list", "--out", str(tmp_path / "runs")).stdout.splitlines()
    assert [line.startswith("a\\n\\tb ") for line in lines] == [False, True]


def test_the_list_fits_eighty_columns(runs: Path) -> None:
    """Of a terminal: every run in one line, with what tells it apart."""
    import os
    import pty
    import subprocess
    import sys

    main, follower = pty.openpty()
    command = [sys.executable, "-m", "rtdmd_cli", "runs", "list", "--quiet", "--out", str(runs)]
    environment = os.environ | {"COLUMNS": "80", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=follower, env=environment) as process:
        os.close(follower)
        text = b""
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # Linux, when the other side is closed
                break
            text += part
            if not part:
                break
    os.close(main)
    assert process.returncode == 0
    lines = text.decode().split("\r\n")
    assert max(len(line) for line in lines) <= 80
    row = next(line for line in lines if line.startswith("second"))
    assert all(part in row for part in ("finished", "20/15000", "0:41"))


class Viewing:
    """A viewer in a thread, and what it answers."""

    def __init__(self, runs: Path) -> None:
        self.server = Viewer(0, lambda: list_runs(runs))
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def get(self, path: str, host: str | None = None) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        connection.putrequest("GET", path, skip_host=True)
        connection.putheader("Host", host or f"127.0.0.1:{self.server.server_port}")
        connection.endheaders()
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found

    def json(self, path: str) -> Any:
        status, _, body = self.get(path)
        assert status == 200, body
        return json.loads(body)


@pytest.fixture
def viewing(runs: Path) -> Iterator[Viewing]:
    view = Viewing(runs)
    yield view
    view.server.shutdown()
    view.server.server_close()


def test_the_viewer_serves_runs_curves_and_pictures(viewing: Viewing, runs: Path) -> None:
    folder = runs / "first" / "samples" / "pictures"
    picture = save_picture(torch.full((3, 8, 8), 0.5), folder / "step-000010-0123456789ab")
    write_json(folder / "index.json", {
        "order": ["0123456789ab"], "pictures": {"0123456789ab": {"prompt": "<b>bold</b>", "seed": 3}}
    })  # fmt: skip
    listed = {each["name"]: each for each in viewing.json("/api/runs")}
    assert listed["killed"]["state"] == "killed" and listed["no-preset"]["state"] == "damaged"
    name = listed["first"]["id"]
    metrics = viewing.json(f"/api/runs/{name}/metrics")
    assert metrics["series"]["fake_loss"]["x"] == [5, 10, 15, 20] and "<script" in json.dumps(metrics)
    assert "generator's own pictures" in metrics["explained"]["fake_loss"]
    sheet = viewing.json(f"/api/runs/{name}/pictures")
    assert sheet["columns"] == [{"key": "0123456789ab", "prompt": "<b>bold</b>", "seed": 3}]
    assert sheet["steps"] == ["step-000010"]
    status, headers, body = viewing.get(f"/pictures/{name}/{picture.name}")
    assert (status, headers["Content-Type"], body) == (200, "image/png", picture.read_bytes())
    for page in ("/", "/viewer.js", "/viewer.css"):
        status, headers, body = viewing.get(page)
        assert status == 200 and body
        assert "default-src 'none'; script-src 'self'" in headers["Content-Security-Policy"]
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in body
    assert b"innerHTML" not in viewing.get("/viewer.js")[2]  # names and prompts are text


@pytest.mark.parametrize(
    "path",
    ["/pictures/{}/../../preset.resolved.yaml", "/pictures/{}/index.json", "/api/runs/none/metrics", "/etc/passwd",
     "/pictures/{}/step-000010-%2e%2e.png"],
)  # fmt: skip
def test_the_viewer_gives_nothing_else(viewing: Viewing, path: str) -> None:
    name = viewing.json("/api/runs")[0]["id"]
    assert viewing.get(path.format(name))[0] == 404


def test_the_viewer_answers_this_machine_alone(viewing: Viewing) -> None:
    assert viewing.server.server_address[0] == "127.0.0.1"
    assert viewing.get("/api/runs", host="evil.example")[0] == 403
    assert viewing.get("/api/runs", host=f"localhost:{viewing.server.server_port}")[0] == 200
    with pytest.raises(EnvironmentFailure, match="can't be used"):
        Viewer(viewing.server.server_port, list)
