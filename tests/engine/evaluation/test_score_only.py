"""Pictures in others' folders: what is said where some are missing."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from rtdmd_cli.engine.evaluation.benchmarks import find_benchmark
from rtdmd_cli.engine.evaluation.picture_store import scan_folder
from rtdmd_cli.engine.evaluation.score_only import find_pictures


def folder(root: Path, counts: list[int]) -> Path:
    """Pictures in GenEval's layout, so many of each prompt."""
    for row, count in enumerate(counts):
        place = root / f"{row:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps({"prompt": f"prompt {row}"}))
        for number in range(count):
            Image.new("RGB", (8, 8), (row, number, 0)).save(place / f"samples/{number:04d}.png")
    return root


def test_a_prompt_with_fewer_pictures_is_said(tmp_path: Path) -> None:
    """One missing picture left out one of every other prompt, without a word."""
    root = folder(tmp_path / "found", [2, 1, 2])
    prompts, _, taken = scan_folder(root, None, None)
    said = "1 of up to 2 pictures a prompt, as 00001 holds 1"
    assert taken == 1 and prompts.departures == (said,)
    (tmp_path / "own.txt").write_text("prompt 0\nprompt 1\nprompt 2\n")
    found = find_pictures(find_benchmark(str(tmp_path / "own.txt")), root, None, None, None)
    assert said in found.prompts.departures
    assert scan_folder(folder(tmp_path / "even", [2, 2]), None, None)[0].departures == ()
    assert scan_folder(root, 1, None)[0].departures == ()
