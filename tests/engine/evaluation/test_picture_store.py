"""Pictures that others made: which are taken as they are, which are refused, and how much memory they may take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rtdmd_cli.engine.evaluation import picture_store
from rtdmd_cli.engine.evaluation.folder import ABOUT, read_about
from rtdmd_cli.engine.evaluation.generate_phase import Timing
from rtdmd_cli.engine.evaluation.picture_store import (
    FolderPictures,
    check_pictures,
    exact_path,
    read_png,
    scan_folder,
)
from rtdmd_cli.engine.evaluation.prompts import EvalPrompts
from rtdmd_cli.engine.evaluation.score_phase import ScoreFile
from rtdmd_cli.engine.evaluation.sums import PICTURES, PictureSums
from rtdmd_cli.errors import DataError

KEYS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def prompts() -> EvalPrompts:
    return EvalPrompts({0: "a ring", 1: "a star"}, {0: {}, 1: {}}, 2, "0" * 64)


def store(root: Path, exact: bool = False) -> FolderPictures:
    return FolderPictures(root, prompts(), exact, PictureSums.open(root))


def fill(root: Path, exact: bool = False) -> FolderPictures:
    pictures, source = store(root, exact), torch.Generator().manual_seed(0)
    for key in KEYS:
        pictures.write(key, torch.rand(3, 8, 8, generator=source), {})
    return pictures


@pytest.mark.parametrize("exact", [True, False])
def test_the_sums_of_pictures(tmp_path: Path, exact: bool) -> None:
    made = fill(tmp_path, exact)
    _, _, sums = check_pictures(made, KEYS)
    again = store(tmp_path, exact)
    kind = "exact" if exact else "png"
    assert {key: known[kind] for key, known in again.sums.known.items()} == sums
    assert all(again.has(key) for key in KEYS)
    _, found, _ = scan_folder(tmp_path, None, None)
    assert found.exact == exact and check_pictures(found, KEYS)[2] == sums
    one, other = made.files((0, 0))[kind], made.files((1, 0))[kind]
    one.write_bytes(other.read_bytes())
    for pictures in (again, scan_folder(tmp_path, None, None)[1]):
        with pytest.raises(DataError, match=rf"{one} is not the one that was made"):
            check_pictures(pictures, KEYS)


def test_a_picture_without_its_sum_or_its_values_is_made_again(tmp_path: Path) -> None:
    made = fill(tmp_path, exact=True)
    whole = (tmp_path / PICTURES).read_bytes()
    (tmp_path / PICTURES).write_bytes(whole[:-9])  # a kill in the last line
    exact_path(made.path((0, 1))).unlink()
    again = store(tmp_path, exact=True)
    assert [again.has(key) for key in KEYS] == [True, False, True, False]
    fill(tmp_path, exact=True)
    assert (tmp_path / PICTURES).read_bytes() == whole


def test_folders_of_one_number_are_told_apart(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "00001").rename(tmp_path / "1")
    assert scan_folder(tmp_path, None, None)[0].texts == {0: "a ring", 1: "a star"}
    fill(tmp_path)
    with pytest.raises(DataError, match="have the same number"):
        scan_folder(tmp_path, None, None)


def test_large_pictures_are_refused_by_their_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fill(tmp_path)
    monkeypatch.setattr(picture_store, "MAX_SIDE", 7)
    with pytest.raises(DataError, match="8 x 8 px, more than 7 a side"):
        check_pictures(made, KEYS)


def test_16_bits_and_transparency(tmp_path: Path) -> None:
    """A ramp of 16 bits is scaled, not cut off at 255; what is transparent lies on white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    found = read_png(tmp_path / "grey.png")
    expected = torch.from_numpy(ramp / 65535).float().expand(3, 8, 8)
    assert (found - expected).abs().max() <= 0.5 / 255 + 1e-6
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    clear[:, :4] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    found = read_png(tmp_path / "clear.png")
    assert found[:, 0, 0].tolist() == [1, 0, 0] and found[:, 0, 7].tolist() == [1, 1, 1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
LINES = st.lists(
    st.dictionaries(
        st.sampled_from(
            ["prompt", "image", "score", "sha256", "check", "judge", "weights", "pictures", "seconds"]
        ),
        JSON,
    ),
    max_size=3,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON, LINES, st.binary(max_size=30))
def test_whatever_an_evaluations_folder_holds(
    tmp_path: Path, about: object, lines: list[object], rest: bytes
) -> None:
    """It is read, left out line by line, or refused with the file's name."""
    text = b"\n".join([*(json.dumps(line).encode() for line in lines), rest])
    for name in (PICTURES, "timing.jsonl", "judge.jsonl"):
        (tmp_path / name).write_bytes(text)
    (tmp_path / ABOUT).write_text(json.dumps(about))
    (tmp_path / "7").mkdir(exist_ok=True)
    (tmp_path / "7/metadata.jsonl").write_bytes(json.dumps(about).encode())
    assert PictureSums.open(tmp_path).known == {} or lines
    assert Timing.open(tmp_path / "timing.jsonl").seconds_per_picture is None
    readers = (
        lambda: read_about(tmp_path),
        lambda: scan_folder(tmp_path, None, None),
        lambda: ScoreFile.open(tmp_path / "judge.jsonl", "judge", "published"),
    )
    for read in readers:
        try:
            read()
        except DataError as error:
            assert str(tmp_path) in error.message
