"""The embedding cache: encoded once, exact, bounded, and mended when damaged."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.prompts import embeddings
from rtdmd_cli.engine.prompts.embeddings import BLOCK, EmbeddingCache, open_cache
from rtdmd_cli.engine.storage import files
from rtdmd_cli.engine.storage.disk import Disk
from rtdmd_cli.errors import EnvironmentFailure, UsageError
from tests.tiny_flux import TINY, load_tiny

ROW = 4 * (3 * 5 + 2)  # bytes of one prompt: float32, L = 3, D = 5, P = 2


class Encoder:
    """A stand-in for a backbone: numbers made from the prompt's text; counts what it is asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        self.asked += prompts
        seeds = [sum(map(ord, prompt)) * 1000 + len(prompt) for prompt in prompts]
        rows = [torch.randn(17, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        table = torch.stack(rows).to(self.dtype)
        return Conditioning(table[:, :15].view(-1, 3, 5), table[:, 15:])


def cache(folder: Path, model: str = "m", length: int = 8, max_gb: float = 1.0) -> EmbeddingCache:
    return EmbeddingCache(folder, model, length, max_gb)


def prompts(count: int, start: int = 0) -> list[str]:
    return [f"prompt number {i}" for i in range(start, start + count)]


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def same(one: Conditioning, other: Conditioning) -> bool:
    names = one.tensors.keys()
    return names == other.tensors.keys() and all(torch.equal(one.tensors[n], other.tensors[n]) for n in names)


class FullDisk(Disk):
    def create(self, path: Path) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_cache_that_cannot_be_written_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, encode = prompts(BLOCK + 3), Encoder()
    monkeypatch.setattr(files, "disk", FullDisk())
    held = cache(tmp_path / "full")
    with caplog.at_level(logging.WARNING):
        assert held.ensure(wanted, encode) == BLOCK + 3
    assert "held in memory" in caplog.text and caplog.text.count("no space left") == 1
    assert same(held.fetch(wanted), encode(wanted)) and not blocks(tmp_path)
    assert held.ensure(wanted, encode) == 0
    again = cache(tmp_path / "full")  # as a command does that encodes ahead, and frees the encoders
    assert again.ensure(wanted, encode) == 0 and same(again.fetch(wanted), encode(wanted))
    monkeypatch.setattr(embeddings, "MEMORY_BYTES", 1000)
    with pytest.raises(EnvironmentFailure, match="no space left"):
        cache(tmp_path / "other").ensure(wanted, encode)


def test_blocks_that_a_killed_process_left_half_written_are_removed(tmp_path: Path) -> None:
    cache(tmp_path).ensure(prompts(2), Encoder())
    half = files.tmp_path(blocks(tmp_path)[0])
    half.write_bytes(b"half")
    cache(tmp_path)
    assert not half.exists() and len(blocks(tmp_path)) == 1


def test_a_family_without_pooled_embeddings(tmp_path: Path) -> None:
    def encode(texts: Sequence[str]) -> Conditioning:
        return Conditioning(Encoder()(texts).embeds)

    first, again = cache(tmp_path), cache(tmp_path)
    assert first.ensure(prompts(3), encode) == 3 and again.ensure(prompts(3), encode) == 0
    for opened in (first, again):
        found = opened.fetch([prompts(3)[i] for i in (2, 0, 2)])
        assert found.pooled is None and same(found, encode(prompts(3)).select([2, 0, 2]))
    assert found.nbytes == 3 * 15 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_prompt_is_encoded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    encode = Encoder(dtype)
    first = cache(tmp_path)
    assert first.ensure(["a", "b", "a"], encode) == 2
    assert first.ensure(["b", "c"], encode) == 1
    assert encode.asked == ["a", "b", "c"]
    later = cache(tmp_path)
    assert later.ensure(["c", "a"], encode) == 0
    for held in (first, later):
        assert same(held.fetch(["c", "a", "a"]), Encoder(dtype)(["c", "a", "a"]))
    assert encode.asked == ["a", "b", "c"]


@pytest.mark.parametrize("wrong", [{"family": "FluxPipeline"}, {"embeds": 7}, {"pooled": 3}])
def test_a_block_of_another_family_or_width_is_encoded_again(
    tmp_path: Path, wrong: dict[str, str | int], caplog: pytest.LogCaptureFixture
) -> None:
    """As where two models were known by the same name."""
    right: dict[str, str | int] = {"family": "Flux2KleinPipeline", "embeds": 5, "pooled": 2}
    assert EmbeddingCache(tmp_path, "m", 8, 1.0, right).ensure(["a"], Encoder()) == 1
    assert EmbeddingCache(tmp_path, "m", 8, 1.0, right).ensure(["a"], Encoder()) == 0
    assert EmbeddingCache(tmp_path, "m", 8, 1.0, right | wrong).ensure(["a"], Encoder()) == 1
    assert next(iter(wrong)) in caplog.text


def test_model_and_text_length_are_kept_apart(tmp_path: Path) -> None:
    encode = Encoder()
    for model, length in (("m", 8), ("m", 16), ("n", 8)):
        assert cache(tmp_path, model, length).ensure(["a"], encode) == 1
    assert cache(tmp_path, "m", 8).ensure(["a"], encode) == 0


def test_prompts_share_files(tmp_path: Path) -> None:
    encode = Encoder()
    many = prompts(2 * BLOCK + 2)
    cache(tmp_path).ensure(many, encode)
    assert len(blocks(tmp_path)) == 3
    later = cache(tmp_path)
    assert later.ensure(many, encode) == 0
    picked = [many[-1], many[0], many[BLOCK]]
    assert same(later.fetch(picked), Encoder()(picked))


def flip_a_value(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 10),
    "emptied": lambda path: os.truncate(path, 0),
    "garbled": lambda path: path.write_bytes(b"x" * 500),
    "a bit flipped": flip_a_value,
    "foreign": lambda path: path.write_bytes(b"\x02\0\0\0\0\0\0\0{}"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_made_again(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    many = prompts(BLOCK + 1)
    cache(tmp_path).ensure(many, Encoder())
    victim = max(blocks(tmp_path), key=lambda path: path.stat().st_size)
    DAMAGE[name](victim)
    encode, later = Encoder(), cache(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert later.ensure(many, encode) == BLOCK
    assert encode.asked == many[:BLOCK]
    assert same(later.fetch(many), Encoder()(many))
    assert any(str(victim) in record.getMessage() for record in caplog.records)
    assert cache(tmp_path).ensure(many, encode) == 0


def test_the_blocks_unused_for_longest_go_first(tmp_path: Path) -> None:
    groups = [prompts(BLOCK, start) for start in (0, 1000, 2000)]
    for age, group in zip((30, 20, 10), groups, strict=True):
        before = set(blocks(tmp_path))
        cache(tmp_path).ensure(group, Encoder())
        (new,) = set(blocks(tmp_path)) - before
        os.utime(new, (time.time() - age, time.time() - age))
    cache(tmp_path).ensure(groups[0][:1], Encoder())  # used: now the youngest
    size = blocks(tmp_path)[0].stat().st_size
    cache(tmp_path, "other model", max_gb=3.2 * size / 1e9).ensure(prompts(BLOCK), Encoder())
    assert len(blocks(tmp_path)) == 3
    kept = [cache(tmp_path).ensure(group, Encoder()) == 0 for group in groups]
    assert kept == [True, False, True]


def test_a_run_never_removes_its_own_blocks(tmp_path: Path) -> None:
    small = cache(tmp_path, max_gb=2.5 * BLOCK * ROW / 1e9)
    with pytest.raises(EnvironmentFailure, match="need more than") as caught:
        small.ensure(prompts(4 * BLOCK), Encoder())
    assert "RTDMD_CACHE_GB" in caught.value.hint
    assert same(small.fetch(prompts(BLOCK)), Encoder()(prompts(BLOCK)))


def test_rows_stay_readable_when_another_run_removes_the_file(tmp_path: Path) -> None:
    held = cache(tmp_path)
    held.ensure(prompts(3), Encoder())
    for path in blocks(tmp_path):
        path.unlink()
    assert same(held.fetch(prompts(3)), Encoder()(prompts(3)))


def test_a_file_being_written_by_another_run_is_left_alone(tmp_path: Path) -> None:
    cache(tmp_path).ensure(["a"], Encoder())
    (block,) = blocks(tmp_path)
    unfinished = block.with_name(f".tmp-0123abcd-{block.name}")
    with unfinished.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as whoever writes it does
        cache(tmp_path).ensure(["a", "b"], Encoder())
        assert unfinished.exists()
    cache(tmp_path)
    assert not unfinished.exists()


def test_nothing_is_written_where_nothing_may_be(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    held = cache(blocker / "cache")
    assert held.ensure(["a"], Encoder()) == 1
    assert same(held.fetch(["a"]), Encoder()(["a"])) and blocker.read_text() == "not a folder"


def test_folder_and_size_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Any = SimpleNamespace(encoder_key="k", text_length=8, text_fits={}, excess=lambda texts: {})
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path))
    open_cache(backbone).ensure(["a"], Encoder())
    assert len(blocks(tmp_path / "embeddings")) == 1
    monkeypatch.setenv("RTDMD_CACHE_GB", "1e-9")
    with pytest.raises(EnvironmentFailure):
        open_cache(backbone).ensure(["b"], Encoder())
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("RTDMD_CACHE_GB", wrong)
        with pytest.raises(UsageError, match="RTDMD_CACHE_GB"):
            open_cache(backbone)


@pytest.mark.parametrize("family", ["sd3", "flux1", "flux2", "zimage", "qwenimage"])
def test_prompts_that_are_cut_off_are_said_in_one_line(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not by the libraries, which listed the cut texts of every batch: 600 long captions gave 1.4 MB."""
    backbone = load_tiny(family)
    texts = [f"{'a red circle ' * 9}{i}" for i in range(130)] + ["a ring"]
    made = EmbeddingCache(tmp_path, "m", 8, 1.0, backbone.text_fits, backbone.excess)
    assert made.ensure(texts, backbone.encode) == 131
    lines = [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]
    clip = "130 of 131 prompts are longer than the 12 tokens of CLIP: their ends are cut off"
    own = f"130 of 131 prompts are longer than the {TINY[family].text_length} tokens of "
    with_clip = family in ("sd3", "flux1")
    assert (clip in lines) is with_clip and any(line.startswith(own) for line in lines)
    assert len(lines) == (2 if with_clip else 1) and len(capfd.readouterr().err) < 1000
