"""Making and writing pictures: records, folders, what is kept, and that nothing is ever overwritten."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from rtdmd_cli import __version__
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.compute.signals import Stopped, StopRequest
from rtdmd_cli.engine.sampling import pictures
from rtdmd_cli.engine.sampling.model import Model, open_model
from rtdmd_cli.engine.sampling.pictures import (
    Job,
    choose_folder,
    default_batch,
    free_folder,
    read_chunks,
    read_picture,
    records,
    write_grid,
    write_pictures,
)
from rtdmd_cli.engine.sampling.source import Source, resolve
from rtdmd_cli.engine.storage.files import locked
from rtdmd_cli.errors import BusyError, EnvironmentFailure, NumericalError, UsageError
from tests.tiny_runs import make_run, write_preset

PROMPTS = ["a red circle", "two blue rings", "ein grüner Stern 星"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder, "a")
    return resolve("a", folder)


@pytest.fixture
def job(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    model = open_model(source, torch.device("cpu"), torch.float32)
    return Job(model, model.plan(), PROMPTS, 2, 7, 32, 32, 4)


def reopened(job: Job, **changes: object) -> Job:
    """The job with a model of its own, since making pictures frees the text encoders."""
    return replace(job, model=open_model(job.model.source, torch.device("cpu"), torch.float32), **changes)  # type: ignore[arg-type]


def write(folder: Path, job: Job) -> pictures.Written:
    return write_pictures(folder, job, lambda n: None)


def test_names_sort_and_records_say_how(job: Job) -> None:
    found = records(replace(job, images=3))
    assert list(found) == sorted(found) and len(found) == 9
    assert list(found)[4] == "0001-0001-seed7.png"
    assert found["0001-0001-seed7.png"] == {
        "prompt": "two blue rings",
        "prompt_index": 1,
        "image_index": 1,
        "negative": None,
        "seed": 7,
        "steps": 4,
        "guidance": 1.0,
        "eta": 0.9,
        "width": 32,
        "height": 32,
        "dtype": "fp32",
        "model": "a/step-000010",
        "model_hash": job.model.model_hash,
        "version": __version__,
    }
    many = list(records(replace(job, prompts=["x"] * 10_001, images=1)))
    assert many == sorted(many) and many[0] == "00000-0000-seed7.png"


def test_pictures_carry_their_record_and_stand_in_the_index(job: Job, tmp_path: Path) -> None:
    told: list[int] = []
    written = write_pictures(tmp_path / "out", job, told.append)
    assert told == [0, 4, 2] and written.kept == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == list(records(job))
    for (path, record), line in zip(written.pictures, lines, strict=True):
        assert line == {"file": path.name, **record}
        with Image.open(path) as image:
            assert image.size == (32, 32)
            assert image.info["prompt"] == record["prompt"] and image.info["negative"] == "none"
            assert (image.info["seed"], image.info["steps"], image.info["eta"]) == ("7", "4", "0.9")
            assert image.info["model_hash"] == job.model.model_hash


def test_batch_and_number_do_not_change_a_picture(job: Job, tmp_path: Path) -> None:
    write(tmp_path / "a", job)
    write(tmp_path / "b", reopened(job, batch=1, images=1))
    for name in records(replace(job, images=1)):
        first, second = (read_picture(tmp_path / folder / name) for folder in "ab")
        assert float((first - second).abs().max()) <= 1.01 / 255
    names = list(records(job))
    assert (
        float((read_picture(tmp_path / "a" / names[0]) - read_picture(tmp_path / "a" / names[1])).abs().max())
        > 0.1
    )


def test_an_interrupted_job_continues(job: Job, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    write(whole, job)
    names = list(records(job))

    class Stop(Exception):
        pass

    def stop(n: int) -> None:
        if n:
            raise Stop

    with pytest.raises(Stop):
        write_pictures(part, reopened(job), stop)
    assert sorted(path.name for path in part.glob("*.png")) == names[:4]
    index = part / "index.jsonl"
    index.write_text(
        "".join(index.read_text().splitlines(keepends=True)[:3])
    )  # killed before the fourth line
    before = (part / names[0]).stat().st_mtime_ns
    assert choose_folder(part, job, grid=False) == part
    assert write(part, reopened(job)).kept == 4
    assert (part / names[0]).stat().st_mtime_ns == before
    for name in names:
        assert (read_picture(part / name) - read_picture(whole / name)).abs().max() <= 1.01 / 255
    assert [json.loads(line)["file"] for line in index.read_text().splitlines()] == names
    again = write(part, job)
    assert (again.kept, len(index.read_text().splitlines())) == (6, 6)


@pytest.mark.parametrize(
    "change", [{"prompts": [*PROMPTS[:2], "another"]}, {"width": 48}, {"prompts": PROMPTS[1:]}]
)
def test_other_pictures_of_the_same_names_are_left_alone(
    job: Job, tmp_path: Path, change: dict[str, object]
) -> None:
    out = tmp_path / "out"
    write(out, job)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert choose_folder(out, job, grid=True) == out
    other = replace(job, **change)  # type: ignore[arg-type]
    assert choose_folder(out, other, grid=False) == tmp_path / "out-2"
    (tmp_path / "out-2").write_text("a file")
    (tmp_path / "out-3").mkdir()
    assert choose_folder(out, other, grid=False) == tmp_path / "out-3"
    (tmp_path / "out-3" / next(iter(records(other)))).write_text("no PNG")
    assert choose_folder(out, other, grid=False) == tmp_path / "out-4"
    assert choose_folder(out, replace(job, seed=8), grid=False) == out
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_an_index_of_somebody_else_is_left_alone(job: Job, tmp_path: Path) -> None:
    for number, text in enumerate(('{"mine": 1}\n', "no JSON\n", "half a line", '{"file": "a.png"}\n')):
        out = tmp_path / f"{number}"
        out.mkdir()
        (out / "index.jsonl").write_text(text)
        assert choose_folder(out, job, grid=False) == tmp_path / f"{number}-2", text
        assert (out / "index.jsonl").read_text() == text
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "index.jsonl").symlink_to(tmp_path / "0/index.jsonl")
    assert choose_folder(linked, job, grid=False) == tmp_path / "linked-2"
    write(tmp_path / "ours", job)
    index = tmp_path / "ours" / "index.jsonl"
    whole = index.read_text()
    for _ in range(2):  # killed in the last line, and again after going on
        index.write_text(whole[:-40])
        assert choose_folder(tmp_path / "ours", job, grid=False) == tmp_path / "ours"
        write(tmp_path / "ours", job)
        assert index.read_text() == whole


def test_a_folder_that_another_process_writes_to_is_left_alone(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with locked(out, "Wait."):
        assert choose_folder(out, job, grid=False) == tmp_path / "out-2"
        with pytest.raises(BusyError):
            write(out, job)
    assert choose_folder(out, job, grid=False) == out


def test_a_stop_is_served_between_two_batches(job: Job, tmp_path: Path) -> None:
    stop = StopRequest()

    def after(count: int) -> None:
        stop.received = signal.SIGTERM if count else None

    with pytest.raises(Stopped, match="are kept, and the same command makes the rest") as caught:
        write_pictures(tmp_path, replace(job, batch=2), after, stop)
    assert caught.value.exit_code == 143 and not caught.value.at_once
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert write(tmp_path, job).kept == 2


def test_a_file_that_appears_meanwhile_is_not_replaced(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = pictures.paint, tmp_path / "out" / next(iter(records(job)))

    def paint(*args: object, **kwargs: object) -> Tensor:
        taken.write_text("mine")
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, "paint", paint)
    with pytest.raises(EnvironmentFailure, match="meanwhile"):
        write(tmp_path / "out", job)
    assert taken.read_text() == "mine"


def test_the_grid_belongs_to_its_pictures(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, job)
    path = write_grid(out, job)
    with Image.open(path) as image:
        assert image.height > 3 * 128 and image.width >= 2 * 128
    before = path.read_bytes()
    assert write_grid(out, job) == path and path.read_bytes() == before
    assert choose_folder(out, job, grid=True) == out
    assert choose_folder(out, replace(job, images=1), grid=False) == out
    assert choose_folder(out, replace(job, images=1), grid=True) == tmp_path / "out-2"


def test_a_large_grid_is_cut(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[object]] = []

    def one_pixel(path: Path) -> Tensor:
        asked.append(path.name)  # type: ignore[arg-type]
        return torch.zeros(3, 1, 1)

    monkeypatch.setattr(pictures, "read_picture", one_pixel)
    write_grid(tmp_path, replace(job, prompts=["x"], images=200))
    assert len(asked) == 128


def test_folders_without_a_name_are_not_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_folder(Path(), lambda folder: True) == Path()
    for out in (Path(), Path("..")):
        with pytest.raises(UsageError, match="other files"):
            free_folder(out, lambda folder: False)
    Path("file").write_text("")
    with pytest.raises(UsageError, match="file is a file"):
        free_folder(Path("file"), lambda folder: True)


def test_what_is_no_png_has_no_text(tmp_path: Path, job: Job) -> None:
    written = write(tmp_path / "out", replace(job, prompts=PROMPTS[:1], images=1))
    path = written.pictures[0][0]
    data = path.read_bytes()
    for number, broken in enumerate((b"", b"GIF89a", data[: len(data) // 2])):
        bad = tmp_path / f"{number}.png"
        bad.write_bytes(broken)
        assert read_chunks(bad) is None
    assert read_chunks(tmp_path) is None and read_chunks(tmp_path / "none") is None
    assert read_chunks(path) == pictures.text_chunks(written.pictures[0][1])


def test_pictures_that_are_not_finite_stop_the_job(job: Job, tmp_path: Path) -> None:
    assert job.model.roles is not None
    name, weight = job.model.roles.named_parameters("generator")[0]
    job.model.roles.load(
        "generator", job.model.roles.state("generator") | {name: weight.detach() + torch.nan}
    )
    with pytest.raises(NumericalError, match="a/step-000010"):
        write(tmp_path / "out", job)
    assert not list((tmp_path).glob("out/*.png"))


def test_the_default_batch_is_smaller_for_large_pictures() -> None:
    preset = load_preset("shapes-4step", ["evaluate.batch=64"], {}).preset
    assert [default_batch(preset, side, side) for side in (32, 512, 1024, 4096)] == [64, 16, 4, 1]


def test_a_teacher_is_guided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    preset = str(write_preset(tmp_path / "mine.yaml"))

    def made(guidance: float) -> Tensor:
        model: Model = open_model(resolve(preset, tmp_path), torch.device("cpu"), torch.float32)
        job = Job(model, model.plan(2, guidance), PROMPTS[:1], 1, 0, 32, 32, 1)
        return read_picture(write(tmp_path / str(guidance), job).pictures[0][0])

    assert (made(1.0) - made(9.0)).abs().max() > 2 / 255
