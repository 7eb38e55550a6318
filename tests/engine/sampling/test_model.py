"""Which weights a generator's pictures are made with, and what tells models apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rtdmd_cli.engine.sampling.model import model_hash, open_model
from rtdmd_cli.engine.sampling.pictures import encoding_ahead
from rtdmd_cli.engine.sampling.source import resolve
from rtdmd_cli.engine.storage.checkpoint import save_checkpoint
from rtdmd_cli.errors import DataError, UsageError
from tests.tiny_runs import add_checkpoint, generator_weights, make_run, write_preset

CPU, F32 = torch.device("cpu"), torch.float32


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def test_a_generator_is_opened_with_its_ema_weights(runs: Path) -> None:
    make_run(runs, "a", (10,))
    model = open_model(resolve("a", runs), CPU, F32)
    assert model.roles is not None
    for name, tensor in generator_weights(10).items():
        assert torch.equal(model.roles.state("generator")[name], tensor)
    assert (model.plan().kind, model.plan().steps, model.plan().evaluations) == ("generator", 4, 4)
    assert model.label == "a/step-000010"


def test_a_generators_text_encoders_leave_before_its_transformer_comes(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    make_run(runs, "a", (10,))
    encode, seen = encoding_ahead(["a red ring"], None, (32, 32)), []

    def prepare(backbone: Any) -> None:
        encode(backbone)
        seen.append(
            next(backbone._pipe.transformer.parameters()).is_meta and backbone._pipe.text_encoder is None
        )

    model = open_model(resolve("a", runs), CPU, F32, prepare)
    assert seen == [True] and not any(p.is_meta for p in model.backbone.transformer.parameters())
    with pytest.raises(UsageError, match="can't make pictures of 36 x 32 px"):
        open_model(resolve("a", runs), CPU, F32, encoding_ahead(["a red ring"], None, (32, 36)))


def test_a_preset_is_opened_without_adapters(runs: Path) -> None:
    write_preset(Path("mine.yaml"))
    model = open_model(resolve("mine.yaml", runs), CPU, F32)
    assert model.roles is None
    plan = model.plan()
    assert (plan.kind, plan.steps, plan.guidance, plan.evaluations) == ("teacher", 6, 4.0, 12)


def test_the_hash_tells_models_apart(runs: Path) -> None:
    run = make_run(runs, "a", (10, 20))
    write_preset(Path("mine.yaml"))
    sources = [resolve(str(run.checkpoints / name), runs) for name in ("step-000010", "step-000020")]
    hashes = [open_model(source, CPU, F32).model_hash for source in [*sources, resolve("mine.yaml", runs)]]
    assert len(set(hashes)) == 3 and all(len(text) == 12 for text in hashes)
    assert open_model(sources[0], CPU, F32).model_hash == hashes[0]


def test_the_hash_depends_on_base_scale_names_and_values() -> None:
    ema = {"a": torch.zeros(2, 2), "b": torch.ones(3)}
    variants = [
        model_hash("base", ema, 4),
        model_hash("other", ema, 4),
        model_hash("base", ema, 8),
        model_hash("base", {"a": ema["b"], "b": ema["a"]}, 4),
        model_hash("base", ema | {"b": ema["b"] + 1e-7}, 4),
        model_hash("base", ema | {"a": torch.zeros(4)}, 4),
    ]
    assert len(set(variants)) == len(variants)
    assert model_hash("base", dict(reversed(ema.items())), 4) == variants[0]


def test_checkpoints_that_do_not_fit_the_model(runs: Path) -> None:
    run = make_run(runs, "a")
    wrong: list[tuple[int, dict[str, torch.Tensor], str | None, str]] = [
        (20, generator_weights(1, rank=3), None, r"step-000020/ema\.safetensors belongs to another model"),
        (21, dict(list(generator_weights(1).items())[1:]), None, "is missing"),
        (22, generator_weights(1), "0" * 64, "trained on another version"),
    ]
    for step, weights, base, expected in wrong:
        path = add_checkpoint(run, step, weights, base)
        with pytest.raises(DataError, match=expected):
            open_model(resolve(str(path), runs), CPU, F32)
    path = save_checkpoint(run.checkpoints, 23, {"generator": generator_weights(1)}, {}, 9, {})
    with pytest.raises(DataError, match=r"holds no generator: ema\.safetensors"):
        open_model(resolve(str(path), runs), CPU, F32)
