"""Every reader given anything at all: it reads it, or refuses it with a cause and a hint. An internal error is a finding.

RTDMD_FUZZ=N tries N inputs of each kind, 60 without it; what was found and how long it was tried stands in
scripts/EXPERIMENTS.md. Runs, exports and evaluation folders are tried beside their other tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rtdmd_cli.config.fields import dotted, keys
from rtdmd_cli.config.loader import dump_resolved, load_preset
from rtdmd_cli.engine.evaluation.picture_store import read_png
from rtdmd_cli.engine.judges.soft_tifa import read_atoms
from rtdmd_cli.engine.prompts.reading import read_prompt_set
from rtdmd_cli.engine.report.grid import save_png, to_pil
from rtdmd_cli.engine.rewards.geneval import asked_of
from rtdmd_cli.engine.rewards.guard import Failed, answer, answer_with_gradient
from rtdmd_cli.engine.rewards.ocr import wanted_text
from rtdmd_cli.engine.storage.checkpoint import MANIFEST, STATE, load_checkpoint, save_checkpoint
from rtdmd_cli.engine.storage.lora_files import lora_tensors, read_header, read_lora, write_lora
from rtdmd_cli.errors import RtdmdError

fuzz = settings(
    max_examples=int(os.environ.get("RTDMD_FUZZ", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXT = st.text(max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def taken_or_refused(read: Callable[[], Any]) -> None:
    """RtdmdError is a refusal, if it says why; anything else is a finding."""
    try:
        read()
    except RtdmdError as error:
        assert error.message.strip()


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with a few of them changed, removed or added."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(found) - 1)))
        end = place + draw(st.sampled_from([0, 1, 1, 8]))
        found[place:end] = draw(st.binary(max_size=8))
    return bytes(found)


PRESET = dump_resolved(load_preset("shapes-4step", environ={}).preset).encode()


@fuzz
@given(st.binary(max_size=60) | TEXT.map(str.encode) | changed(PRESET))
def test_presets(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    taken_or_refused(lambda: load_preset(str(path), environ={}))


@fuzz
@given(st.sampled_from([dotted(key) for key in keys()]) | TEXT, TEXT | JSON.map(str))
def test_overrides(key: str, value: str) -> None:
    taken_or_refused(lambda: load_preset("shapes-4step", [f"{key}={value}"], {}))
    variable = f"RTDMD_SET_{key.replace('.', '__').upper()}"
    taken_or_refused(lambda: load_preset("shapes-4step", [], {variable: value}))


PROMPTS = st.lists(JSON | st.fixed_dictionaries({"prompt": TEXT | JSON}, optional={"n": JSON}), max_size=4)


@fuzz
@given(st.sampled_from(["a.txt", "a.json", "a.jsonl"]), PROMPTS, st.booleans(), st.binary(max_size=30))
def test_prompts(tmp_path: Path, name: str, entries: list[Any], whole: bool, rest: bytes) -> None:
    lines = [json.dumps(each) for each in entries]
    text = f"[{','.join(lines)}]" if name == "a.json" else "\n".join(lines)
    (tmp_path / name).write_bytes(text.encode() + (b"" if whole else rest))

    def read() -> None:
        found = read_prompt_set(str(tmp_path / name))
        assert len(found.texts) == len(found.metadata) > 0 and all(each.strip() for each in found.texts)

    taken_or_refused(read)


@fuzz
@given(st.data())
def test_checkpoints(tmp_path: Path, data: st.DataObject) -> None:
    """Manifest, state and tensors, each changed, and a manifest of anything."""
    path = save_checkpoint(tmp_path, 1, {"ema": {"a": torch.ones(2)}}, {"n": 1}, 1, {"made": "here"})
    name = data.draw(st.sampled_from([MANIFEST, STATE, "ema.safetensors"]))
    whole = (path / name).read_bytes()
    anything = JSON.map(lambda value: json.dumps(value).encode())
    (path / name).write_bytes(data.draw(changed(whole) | anything))
    taken_or_refused(lambda: load_checkpoint(path))


def manifest_like(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


@fuzz
@given(
    st.fixed_dictionaries(
        {"format": st.just("rtdmd-checkpoint"), "version": st.just(1) | JSON},
        optional={"step": JSON, "files": JSON, "meta": JSON, "sha256": JSON},
    )
)
def test_manifests(tmp_path: Path, body: dict[str, Any]) -> None:
    path = tmp_path / "step-000001"
    path.mkdir(exist_ok=True)
    (path / MANIFEST).write_bytes(manifest_like(body))
    taken_or_refused(lambda: load_checkpoint(path))


MODEL = nn.Sequential(nn.Linear(3, 4))


@fuzz
@given(st.data())
def test_lora_files(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "lora.safetensors"
    write_lora(path, lora_tensors({"0": (torch.ones(2, 3), torch.ones(4, 2))}, "transformer"), {"a": "b"})
    path.write_bytes(data.draw(changed(path.read_bytes()) | st.binary(max_size=40)))

    def read() -> None:
        found = read_lora(path, "transformer", MODEL)
        assert found and all(bool(tensor.isfinite().all()) for tensor in found.values())
        read_header(path)

    taken_or_refused(read)


@fuzz
@given(st.data())
def test_pictures(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.png"
    save_png(to_pil(torch.rand(3, 8, 8)), path, {"prompt": "a ring"})
    path.write_bytes(data.draw(changed(path.read_bytes()) | st.binary(max_size=40)))

    def read() -> None:
        found = read_png(path)
        assert found.ndim == 3 and found.shape[0] == 3 and 0 <= float(found.min()) <= float(found.max()) <= 1

    taken_or_refused(read)


TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8]),
)
ERRORS = st.sampled_from(
    [ValueError("x"), SystemExit(0), GeneratorExit(), StopIteration(), AssertionError(), OSError(28, "full")]
)


@fuzz
@given(TENSORS | JSON | ERRORS)
def test_reward_answers(given_: Any) -> None:
    class Mine:
        differentiable = True

        def score(self, images: Tensor, prompts: Any, metadata: Any) -> Any:
            if isinstance(given_, BaseException):
                raise given_
            return given_

    for ask in (answer, answer_with_gradient):
        images = torch.rand(2, 3, 4, 4).requires_grad_(ask is answer_with_gradient)
        try:
            found = ask(Mine(), images, ["a", "b"], [{}, {}], 5)
            assert found.shape == (2,) and found.is_floating_point()
        except Failed as failed:
            assert str(failed)


CLAUSES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"class": st.sampled_from(["dog", "cat"]) | JSON, "count": st.integers(-1, 3) | JSON,
                      "color": st.just("red") | JSON, "position": st.just(["left of", 0]) | JSON},
    ) | JSON,
    max_size=3,
)  # fmt: skip


@fuzz
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "tag": JSON,
            "include": CLAUSES | JSON,
            "exclude": CLAUSES | JSON,
            "vqa_list": JSON,
            "text": JSON,
        },
    ),
    TEXT,
)
def test_what_is_known_of_prompts(known: dict[str, Any], prompt: str) -> None:
    for read in (
        lambda: asked_of(prompt, known),
        lambda: read_atoms(known, prompt),
        lambda: wanted_text(prompt, known),
    ):
        taken_or_refused(read)


def test_a_finding_is_one() -> None:
    with pytest.raises(ZeroDivisionError):
        taken_or_refused(lambda: 1 / 0)
