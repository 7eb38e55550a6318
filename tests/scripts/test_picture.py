"""The README's picture, drawn by the real command: of its two processes the second is forked."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts.reproduce import picture
from scripts.reproduce.picture import ROOT, main
from tests.commands import fork, wait

TEACHER = str(ROOT / "presets/shapes-4step.yaml")


def test_both_rows_show_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    real, calls = picture.rtdmd, list[str]()

    def rtdmd(arguments: Sequence[str]) -> Any:
        calls.append(arguments[0])
        return real(arguments) if len(calls) == 1 else json.loads(wait(fork(tmp_path, *arguments)).out)

    monkeypatch.setattr(picture, "rtdmd", rtdmd)
    main(TEACHER, TEACHER, tmp_path / "a.png", 0, ["a photo of a red circle"])
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["prompts"] == "a photo of a red circle"
        pixels = image.convert("RGB")
    middle = pixels.height // 2
    for box in ((0, 0, pixels.width, middle), (0, middle, pixels.width, pixels.height)):
        half = pixels.crop(box).tobytes()
        red = sum(r > 150 and g < 80 for r, g in zip(half[::3], half[1::3], strict=True))
        assert red > 300
    assert calls == ["sample", "sample"]
