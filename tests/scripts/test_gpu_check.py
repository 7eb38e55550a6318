"""The GPU check's parts that need no GPU, on tiny configurations of the same cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from scripts.gpu import __main__ as gpu_check
from scripts.gpu import measure as measuring
from scripts.gpu import small
from scripts.gpu.measure import measure
from scripts.gpu.models import CASES, COMPILED, Case, empty_transformer, random_backbone
from scripts.gpu.report import agreement_lines, beyond, table
from scripts.gpu.small import both_stages

CPU = torch.device("cpu")
BILLIONS = {
    "SD3-M": (2.0, 2.1),
    "SD3.5-M": (2.2, 2.6),
    "FLUX.2-klein-4B": (3.7, 4.1),
    "FLUX.1-dev": (11.8, 12.0),
}
SMALL = ("model.resolution=64", "distill.lora.rank=2", "hardware.dtype=fp32")
FLUX: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
}
TINY = {
    "sd3": (
        CASES[2],
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 40,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 20,
            "pos_embed_max_size": 8,
        },
    ),
    "flux2": (
        CASES[4],
        FLUX
        | {
            "in_channels": 16,
            "joint_attention_dim": 48,
            "guidance_embeds": False,
            "axes_dims_rope": (4, 4, 4, 4),
            "timestep_guidance_channels": 16,
        },
    ),
    "flux1": (
        CASES[5],
        FLUX
        | {
            "in_channels": 16,
            "joint_attention_dim": 40,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
}


def tiny(family: str) -> Case:
    case, arguments = TINY[family]
    return replace(case, transformer=arguments, tokens=6, changes=(*case.changes, *SMALL))


def test_the_models_have_the_published_sizes() -> None:
    """The number of parameters, and a preset that resolves and says what the name says."""
    for case in (*CASES, COMPILED):
        low, high = BILLIONS[case.name.split()[0]]
        shrunk = (
            {"pos_embed_max_size": 8} if "pos_embed_max_size" in case.transformer else {}
        )  # no parameters
        made = replace(case, transformer={**case.transformer, **shrunk})
        count = sum(parameter.numel() for parameter in empty_transformer(made).parameters())
        assert low < count / 1e9 < high, case.name
        preset = case.settings(CPU)
        assert f"{preset.model.resolution} px" in case.name and preset.distill.batch == 1
        assert preset.hardware.gradient_checkpointing and preset.hardware.compile == ("compiled" in case.name)
        assert preset.hardware.base in case.name or preset.hardware.base == "plain"
    assert sum(case.seconds for case in CASES) < gpu_check.LIMIT


@pytest.mark.parametrize("family", TINY)
def test_an_update_of_each_role_is_measured(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "UPDATES", 1)
    row = measure(tiny(family), CPU, torch.float32)
    assert row["base"] == {"sd3": "int8", "flux1": "nf4", "flux2": "plain"}[family]
    assert all(
        row[f"{role}_seconds"] > 0 and row[f"{role}_peak_gib"] is None for role in ("fake", "generator")
    )
    assert row["model"] in table([row]) and row["parameters"] > 10_000


def test_the_plan_stands_beside_what_was_measured() -> None:
    found = measuring.planned(CASES[0].settings(CPU))
    assert 4 < found["fake_planned_gib"] < 24 and 4 < found["generator_planned_gib"] < 24
    row = {"model": "x", "parameters": 2e9, "weights_gib": 4.0, "fake_seconds": 1.0, "fake_peak_gib": 6.0}
    row |= {"generator_seconds": 2.0, "generator_peak_gib": 7.0}
    shown = table([row | {"fake_planned_gib": 6.1, "generator_planned_gib": 7.2}])
    assert "| 1.00 | 6.0 | 6.1 | 2.00 | 7.0 | 7.2 |" in shown


def test_a_random_backbone_is_finite_and_whole() -> None:
    backbone = random_backbone(tiny("flux2"), CPU, torch.bfloat16)
    parameters = list(backbone.transformer.parameters())
    assert {p.dtype for p in parameters} == {torch.bfloat16} and not any(p.is_meta for p in parameters)
    assert all(bool(p.isfinite().all()) for p in parameters)
    assert len({p.data_ptr() for p in parameters}) == len(parameters)  # of two bases


def test_agreement_on_the_built_in_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measuring.agreement(CPU, backend="eager")
    assert found.keys() == measuring.STATED.keys() and found["int8"] > 0 and found["nf4"] > 0.01
    assert beyond(found, measuring.STATED) == []
    assert beyond(found | {"nf4": float("nan")}, measuring.STATED) == ["nf4"]
    assert "BEYOND" in agreement_lines({"int8": 0.5}, {"int8": 0.02})[0]


def test_both_stages_of_a_small_model(tmp_path: Path) -> None:
    row = both_stages("sd3", CPU, tmp_path, "fp32")
    assert row["distill_seconds"] > 0 and row["tune_seconds"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "sd3-1", "sd3-2"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("no"), "out of memory"),
        (RuntimeError("bad\nlines"), "RuntimeError: bad"),
    ],
)
def test_a_part_that_fails_is_a_note(error: Exception, reason: str) -> None:
    """The others are measured all the same."""

    def fails() -> dict[str, Any]:
        raise error

    failed = dict[str, str]()
    assert gpu_check.attempt("x", fails, failed, CPU) is None and failed == {"x": reason}
    assert gpu_check.attempt("y", lambda: {"model": "y"}, failed, CPU) == {"model": "y"}
    assert f"| {reason} |" in table([{"model": "x", "note": failed["x"]}])


def test_one_failure_does_not_cost_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def stages(name: str, device: torch.device, folder: Path) -> dict[str, Any]:
        if name == "sd3":
            raise ValueError("wrong")
        return {"family": name, "distill_seconds": 1.0, "tune_seconds": 1.0}

    def fails(*given: object) -> Any:
        raise KeyError("gone")

    monkeypatch.setattr(small, "both_stages", stages)
    monkeypatch.setattr(measuring, "agreement", fails)
    monkeypatch.setattr(measuring, "measure", fails)
    monkeypatch.setattr(measuring, "planned", lambda preset: {})
    record = gpu_check.check(CPU, compiled=False)
    assert [row["family"] for row in record["small"]] == [name for name in small.FAMILIES if name != "sd3"]
    assert record["failed"].keys() == {"sd3", "agreement", *(case.name for case in CASES)}
    assert len(record["updates"]) == len(CASES) and record["beyond"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so_and_ends_well(tmp_path: Path) -> None:
    done = CliRunner().invoke(gpu_check.app, ["--out", str(tmp_path / "results")])
    assert done.exit_code == 0 and "No CUDA device: nothing was measured." in done.output
    assert not (tmp_path / "results").exists()
