"""A canary token and the home path, searched for in what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.report.page import page
from rtdmd_cli.engine.report.run_compare import compare_runs
from rtdmd_cli.engine.storage.run_folder import RunFolder, create_run
from rtdmd_cli.engine.storage.scrubbing import scrub, scrub_page, scrub_text, scrub_values

CANARY = "hf_canaryCANARY0123456789"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "mara"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "a token of another form")
    return home


def test_texts(home: Path) -> None:
    assert scrub_text(f"ValueError: {home}/secret.txt, line 3") == "ValueError: ~/secret.txt, line 3"
    assert scrub_text(f"'{home}' and {home}.") == "'~' and ~."
    for other in (f"{home}x/y", f"{home}-2/y", f"{home}.old/y", f"/mnt{home}/y"):
        assert scrub_text(other) == other
    assert (
        scrub_text(f"{CANARY}; a token of another form; token=abc x") == "<token>; <token>; token=<token> x"
    )
    assert scrub(["rtdmd", "--hub-token", "abc", f"{home}/m"]) == ["rtdmd", "--hub-token", "<token>", "~/m"]
    assert scrub_values({"a": [f"{home}/x", 3, None], "b": {"c": CANARY}}) == {
        "a": ["~/x", 3, None],
        "b": {"c": "<token>"},
    }


def test_pictures_in_a_page_stay_as_they_are(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    uri = '<img src="data:image/png;base64,AAAA/root/BBBB=="> /root/x'
    assert scrub_page(uri) == '<img src="data:image/png;base64,AAAA/root/BBBB=="> ~/x'


def test_nothing_that_a_run_writes_to_be_shared_names_anybody(home: Path, tmp_path: Path) -> None:
    """A model under the home folder, a reward whose error holds a path and a token."""
    said = f"raised RuntimeError: {home}/rewards/mine.py says {CANARY}"
    resolved, runs = load_preset("shapes-4step", [f"model.path={home}/models/mine"], {}), []
    for name in ("one", "two"):
        command = ["rtdmd", "distill", "--preset", f"{home}/my.yaml", "--set", f"x.token={CANARY}"]
        run = create_run(tmp_path / "runs", name, resolved, command, torch.device("cpu"))
        run.log(said)
        run.metrics.append({"iteration": 1, "loss": 1.0})
        run.set_status("failed", iteration=1, reason=said, more=[said])
        runs.append(run)
    compare_runs(*runs, tmp_path / "runs/page.html")
    (tmp_path / "runs/report.html").write_text(page(said, f"<p>{said}</p>"))
    own = {RunFolder(run.path).preset for run in runs}  # which a run goes on from: its paths have to be right
    for path in (tmp_path / "runs").rglob("*"):
        if path.is_file():
            text = path.read_text("utf-8")
            assert CANARY not in text, path
            assert str(home) not in text or path in own, path
    assert "~/rewards/mine.py says <token>" in (runs[0].path / "log.txt").read_text("utf-8")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no entry: there is nothing to hide."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert scrub_text("/srv/models/a hf_abcdefghijklmnopqrstuvwxyzABCDEF") == "/srv/models/a <token>"
