"""`rtdmd plan` by its command line, and its figures in a dry run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rtdmd_cli.cli import app
from rtdmd_cli.cli.plan import refuse_too_large
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.errors import UsageError

TOTALS = {"card_peak_gib", "host_peak_gib", "disk_gib", "hours"}
SMALL = ("--preset", "shapes-4step-lora", "--set", "distill.batch=2")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = app.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, _ = call(capsys, *arguments, "--json", "--quiet")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_plan_and_a_dry_run_say_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    plan = figures(capsys, "plan", *SMALL, "--stage", "distill", "--gpu", "4090")
    assert plan["vram_gb"] == 24 and plan["fits"] is True and plan.keys() >= TOTALS | {"phases", "decides"}
    assert {row["phase"] for row in plan["phases"]} >= {
        "load transformer",
        "fake turn",
        "generator turn",
        "train",
    }
    dry = figures(capsys, "distill", *SMALL, "--dry-run", "--out", str(tmp_path))
    assert {key: dry[key] for key in TOTALS} == {key: plan[key] for key in TOTALS}
    other = figures(
        capsys, "distill", *SMALL, "--set", "distill.batch=3", "--dry-run", "--out", str(tmp_path)
    )
    assert not TOTALS & other.keys()  # not counted yet
    code, out, err = call(capsys, "plan", *SMALL, "--stage", "distill", "--gpu", "4090")
    assert code == 0 and "generator turn" in out and "40% of the dense bf16 rate of 4090" in err


def test_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = call(capsys, "plan", *SMALL, "--gpu", "RTX 4091")
    assert code == 2 and "`4090`" in err
    code, _, err = call(capsys, "plan", "--stage", "tuning")
    assert code == 2 and "distill, tune-reward" in err
    code, _, err = call(capsys, "plan", "--out", str(tmp_path / "x.yaml"))
    assert code == 2 and "--fit" in err
    code, _, err = call(capsys, "plan", *SMALL, "--set", f"model.path={tmp_path}")
    assert code == 4 and "lacks transformer/config.json" in err


def test_all_boundaries_at_once_that_can_not_fit_are_refused() -> None:
    wide = load_preset("shapes-4step-lora", ["distill.boundaries_batched=true"], {})
    with pytest.raises(UsageError, match="boundaries_batched") as caught:
        refuse_too_large(wide, "distill", 0.5)
    assert "plan --fit" in caught.value.hint
    refuse_too_large(wide, "distill", 24.0)
    refuse_too_large(wide, "distill", None)


@pytest.mark.parametrize(
    "settings",
    [
        ("hardware.device=mps", "hardware.base=int8"),
        ("hardware.device=mps", "hardware.optimizer=adamw8bit"),
        ("hardware.device=cpu", "hardware.optimizer=paged_adamw8bit"),
        ("hardware.base=nf4", "distill.train=full"),
    ],
)
def test_pairs_that_can_not_work_are_refused_before_anything_loads(settings: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="alone|needs"):
        load_preset("sd3-4step", list(settings), {})
