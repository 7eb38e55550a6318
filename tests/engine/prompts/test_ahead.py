"""Prompts encoded ahead in windows: the same numbers as with all of them in the cache, within the bound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.compute import rng
from rtdmd_cli.engine.prompts.ahead import AheadEncoder
from rtdmd_cli.engine.prompts.embeddings import BLOCK, EmbeddingCache
from rtdmd_cli.errors import EnvironmentFailure
from tests.engine.prompts.test_embeddings import ROW, Encoder, prompts, same

PROMPTS = prompts(500)
TOTAL, BATCH = 60, 20


def order(iteration: int) -> list[int]:
    return rng.integers(0, len(PROMPTS), 1, "prompts", iteration, range(BATCH)).tolist()


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def ahead(folder: Path, rows: int, encode: Any, said: list[str]) -> AheadEncoder:
    """With room for so many prompts."""
    bound = 1024 + rows * (ROW + 128)
    cache = EmbeddingCache(folder, "m", 8, bound / 1e9)
    assert cache.capacity(ROW) == rows
    return AheadEncoder(cache, PROMPTS, encode, rows, said.append)


@pytest.mark.parametrize("rows", [30, BLOCK, 200])
def test_every_iteration_finds_its_prompts_within_the_bound(tmp_path: Path, rows: int) -> None:
    encode, said = Encoder(), list[str]()
    window = ahead(tmp_path, rows, encode, said)
    for iteration in range(TOTAL):
        assert window.prepare(iteration, TOTAL, order)
        asked, indices = len(encode.asked), order(iteration)
        assert same(window(indices), Encoder()([PROMPTS[i] for i in indices]))
        assert len(encode.asked) == asked, "an iteration finds all of its prompts on disk"
        assert size(tmp_path) <= 1024 + rows * (ROW + 128)
    windows = len([line for line in said if "of the iterations" in line])
    assert 1 < windows <= TOTAL
    used = {index for iteration in range(TOTAL) for index in order(iteration)}
    assert {PROMPTS[index] for index in used} == set(encode.asked)
    if rows == 200:
        assert windows < TOTAL / 4 and len(encode.asked) < TOTAL * BATCH


def test_a_window_that_is_on_disk_is_not_encoded_again(tmp_path: Path) -> None:
    first, second, said = Encoder(), Encoder(), list[str]()
    ahead(tmp_path, 200, first, said).prepare(5, TOTAL, order)
    ahead(tmp_path, 200, second, said).prepare(5, TOTAL, order)
    assert first.asked and not second.asked and said[0] == said[-1]
    overlapping = ahead(tmp_path, 200, second, said)
    overlapping.prepare(6, TOTAL, order)
    assert 0 < len(second.asked) < BLOCK, "rows of the earlier window are copied"
    indices = order(6)
    assert same(overlapping(indices), Encoder()([PROMPTS[i] for i in indices]))


def test_what_was_not_prepared_is_encoded_on_the_spot(tmp_path: Path) -> None:
    encode = Encoder()
    window = ahead(tmp_path, 100, encode, [])
    window.prepare(0, TOTAL, order)
    outside = [index for index, text in enumerate(PROMPTS) if text not in window.held][:3]
    asked, before = len(encode.asked), size(tmp_path)
    assert same(window(outside), Encoder()([PROMPTS[i] for i in outside]))
    assert len(encode.asked) == asked + 3 and size(tmp_path) == before


def test_a_bound_below_one_iteration_is_refused(tmp_path: Path) -> None:
    def encode(texts: Sequence[str]) -> Conditioning:
        raise AssertionError("nothing is encoded")

    with pytest.raises(EnvironmentFailure, match="one iteration") as caught:
        ahead(tmp_path, len(set(order(0))) - 1, encode, []).prepare(0, TOTAL, order)
    assert "hardware.cache_gb" in caught.value.hint


def test_prompts_that_stand_twice_are_held_once(tmp_path: Path) -> None:
    encode = Encoder()
    cache = EmbeddingCache(tmp_path, "m", 8, 1.0)
    window = AheadEncoder(cache, ["a", "b", "a", "c"], encode, 2, lambda text: None)
    window.prepare(0, 1, lambda iteration: [0, 2, 1])
    assert encode.asked == ["a", "b"] and same(window([2, 1, 0]), Encoder()(["a", "b", "a"]))


def test_the_encoders_go_once_all_coming_prompts_are_there(tmp_path: Path) -> None:
    freed, encode = list[bool](), Encoder()
    cache = EmbeddingCache(tmp_path, "m", 8, (1024 + 200 * (ROW + 128)) / 1e9)
    window = AheadEncoder(cache, PROMPTS, encode, 200, lambda text: None, lambda: freed.append(True))
    for iteration in range(TOTAL):
        window.prepare(iteration, TOTAL, order)
        if not freed:
            last = iteration
    assert freed == [True] and 0 < last < TOTAL - 1


def test_a_window_is_encoded_as_the_iterations_come_to_it(tmp_path: Path) -> None:
    """A window can take hours on a CPU: training goes on meanwhile, block by block."""
    encode = Encoder()
    window = ahead(tmp_path, 200, encode, [])
    for iteration in range(4):
        window.prepare(iteration, TOTAL, order)
        needed = {index for coming in range(iteration + 1) for index in order(coming)}
        assert len(needed) <= len(encode.asked) < len(needed) + BLOCK


def test_a_window_to_the_end_of_the_run_is_encoded_before_training(tmp_path: Path) -> None:
    freed, encode, said = list[bool](), Encoder(), list[str]()
    cache = EmbeddingCache(tmp_path, "m", 8, 1.0)
    window = AheadEncoder(cache, PROMPTS, encode, 400, said.append, lambda: freed.append(True))
    window.prepare(0, 10, order)
    assert len(encode.asked) == len({index for i in range(10) for index in order(i)})
    assert freed == [True] and "before training" in said[0] and "0 done, 64 under way" in said[1]


def test_a_signal_leaves_it_after_a_block_and_nothing_is_lost(tmp_path: Path) -> None:
    encode, freed = Encoder(), list[bool]()
    cache = EmbeddingCache(tmp_path, "m", 8, 1.0)
    window = AheadEncoder(cache, PROMPTS, encode, 400, lambda text: None, lambda: freed.append(True))
    assert not window.prepare(0, 10, order, lambda: len(encode.asked) >= BLOCK)
    assert len(encode.asked) == BLOCK and not freed
    assert window.prepare(0, 10, order) and len(encode.asked) == len(set(encode.asked)) and freed


def test_an_encoder_that_fails_is_asked_again(tmp_path: Path) -> None:
    freed, encode, fails = list[bool](), Encoder(), [False, True, False]

    def failing(texts: Sequence[str]) -> Conditioning:
        if fails and fails.pop(0):
            raise RuntimeError("out of memory")
        return encode(texts)

    cache = EmbeddingCache(tmp_path, "m", 8, 1.0)
    window = AheadEncoder(cache, PROMPTS, failing, 400, lambda text: None, lambda: freed.append(True))
    with pytest.raises(RuntimeError):
        window.prepare(0, 10, order)
    assert window.prepare(0, 10, order) and freed == [True]
    indices = order(9)
    assert same(window(indices), Encoder()([PROMPTS[i] for i in indices]))
    assert len(encode.asked) == len(set(encode.asked)), "the block before is on disk"


def test_a_process_finds_the_blocks_that_another_has_made_meanwhile(tmp_path: Path) -> None:
    first, second = Encoder(), Encoder()
    one, other = (ahead(tmp_path, 200, encode, []) for encode in (first, second))
    for iteration in range(4):
        assert one.prepare(iteration, TOTAL, order) and other.prepare(iteration, TOTAL, order)
        assert same(one(order(iteration)), other(order(iteration)))
    assert len(first.asked) > BLOCK and not second.asked
