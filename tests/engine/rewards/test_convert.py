"""Pickled weights: what is read, when, and what is refused. The pickles are real ones, written by torch.save."""

import json
import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rtdmd_cli.engine.rewards.convert import converted, converted_from
from rtdmd_cli.engine.storage.hub import hub_file
from rtdmd_cli.engine.storage.tensors import check_tensors
from rtdmd_cli.errors import DataError, EnvironmentFailure
from tests.tiny_hub import offline_hub, publish

NAME = "tiny-1"


class Doubled:
    """A converter that counts its calls: a call means that the pickle was opened."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        return {f"new.{key}": 2 * value for key, value in tensors.items()}


class Runs:
    """Unpickled without restriction, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rewards"


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3.5).half()}


@pytest.fixture
def file(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    path = tmp_path / "original.pt"
    torch.save(weights, path)
    return path


def values(path: Path) -> dict[str, Any]:
    return {key: value.tolist() for key, value in load_file(path).items()}


DOUBLED = {"new.a": [[0, 2, 4], [6, 8, 10]], "new.b": 7}


def test_a_pickle_becomes_safetensors_in_the_cache(file: Path, cache: Path) -> None:
    path = converted(file, NAME, Doubled())
    assert path.parent == cache and path.name.startswith(f"{NAME}-") and values(path) == DOUBLED
    assert load_file(path)["new.b"].dtype == torch.float16
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata()["source_sha256"][:16] in path.name
    assert not [name for name in cache.iterdir() if name.name.startswith(".tmp-")]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_published_files_look_like(tmp_path: Path, zipped: bool) -> None:
    """A module's state dict, with its hidden metadata and parameters, inside an entry among other ones."""
    layer = nn.Linear(3, 2)
    state = dict(layer.state_dict(keep_vars=True)) if zipped else layer.state_dict()
    file = tmp_path / "original.pt"
    torch.save({"epoch": 7, "name": "x", "state_dict": state}, file, _use_new_zipfile_serialization=zipped)
    found = values(converted(file, NAME, Doubled(), entry="state_dict"))
    assert found == {"new.weight": (2 * layer.weight).tolist(), "new.bias": (2 * layer.bias).tolist()}


def test_the_second_time_the_pickle_is_not_even_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = Doubled()
    path = converted(file, NAME, convert)
    monkeypatch.chdir(file.parent)
    with monkeypatch.context() as patch:
        patch.setattr("rtdmd_cli.engine.rewards.convert._sha256", lambda _: pytest.fail("it was read"))
        assert converted(Path(file.name), NAME, convert) == path
    os.utime(file)  # hashed for its new times, but not unpickled
    assert converted(file, NAME, convert) == path and convert.calls == 1


def test_a_removed_pickle_is_not_missed(file: Path) -> None:
    convert = Doubled()
    path = converted(file, NAME, convert)
    file.unlink()
    assert converted(file, NAME, convert) == path and convert.calls == 1
    shutil.rmtree(file.parent / "cache" / "rewards")
    with pytest.raises(DataError, match=r"original\.pt don't exist\."):
        converted(file, NAME, convert)


def test_a_removed_pickle_whose_conversion_is_damaged(file: Path) -> None:
    path = converted(file, NAME, Doubled())
    file.unlink()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="don't exist any more"):
        converted(file, NAME, Doubled())


def test_garbage_in_the_pickles_place_is_not_taken_for_it(file: Path) -> None:
    """Even with the size and the time of the original."""
    converted(file, NAME, Doubled())
    status = file.stat()
    file.write_bytes(b"x" * status.st_size)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="damaged"):
        converted(file, NAME, Doubled())


def test_other_weights_in_the_pickles_place_are_converted(file: Path) -> None:
    first = converted(file, NAME, Doubled())
    torch.save({"a": torch.ones(2)}, file)
    second = converted(file, NAME, Doubled())
    assert second != first and values(second) == {"new.a": [2, 2]} and values(first) == DOUBLED


def test_the_same_contents_elsewhere_are_not_unpickled_again(file: Path) -> None:
    convert = Doubled()
    copy = file.with_name("copy.pt")
    shutil.copy(file, copy)
    assert converted(file, NAME, convert) == converted(copy, NAME, convert)
    assert convert.calls == 1
    assert converted(file, "tiny-2", convert).name.startswith("tiny-2-") and convert.calls == 2


def test_a_damaged_conversion_is_made_again(file: Path) -> None:
    path = converted(file, NAME, Doubled())
    whole = path.read_bytes()
    foreign = save({"new.a": torch.zeros(2)}, {"source_sha256": "0" * 64})
    for damaged in (whole[:-1], b"", save({"new.a": torch.zeros(2)}), foreign):
        path.write_bytes(damaged)
        assert converted(file, NAME, Doubled()) == path and values(path) == DOUBLED


def test_a_damaged_record_only_costs_a_hash(file: Path, cache: Path) -> None:
    convert = Doubled()
    path = converted(file, NAME, convert)
    (record,) = (cache / "sources").iterdir()
    assert json.loads(record.read_text())["source"] == str(file)
    for content in ("", "{}", '{"state": 3, "sha256": ""}', '{"state": ["x"], "sha256": ""}'):
        record.write_text(content)
        assert converted(file, NAME, convert) == path
    assert convert.calls == 1 and json.loads(record.read_text())["source"] == str(file)


def test_code_is_refused_and_not_run(tmp_path: Path, cache: Path) -> None:
    file, folder = tmp_path / "evil.pt", tmp_path / "made"
    torch.save({"a": torch.ones(2), "b": Runs(folder)}, file)
    for path in (file, tmp_path / "plain.pkl"):
        if path != file:
            path.write_bytes(pickle.dumps(Runs(folder), protocol=2))
        with pytest.raises(DataError, match=r"more than tensors \(posix\.mkdir\); nothing of it was run"):
            converted(path, NAME, Doubled())
    assert not folder.exists() and not list(cache.glob("*.safetensors"))
    torch.load(file, weights_only=False)
    assert folder.exists()  # so it would have been run


def test_damaged_pickles_and_other_files(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    other = tmp_path / "other.pt"
    for content in (b"", b"<html>not found</html>", whole[: len(whole) // 2], whole[:-30], b"\x80\x02"):
        other.write_bytes(content)
        with pytest.raises(DataError, match=r"other\.pt are damaged, or no weights"):
            converted(other, NAME, Doubled())
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(DataError, match="damaged"):
        converted(other, NAME, Doubled())
    with pytest.raises(EnvironmentFailure, match="directory"):
        converted(tmp_path, NAME, Doubled())


@pytest.mark.parametrize(
    ("content", "entry", "message"),
    [
        ([torch.ones(1)], "", "hold a list"),
        ({"a": torch.ones(1), "epoch": 3}, "", "epoch of the weights .* is a int, no tensor"),
        ({3: torch.ones(1)}, "", "3 of the weights .* is a Tensor, no tensor|3 of the weights"),
        ({"model": {}}, "state_dict", "no entry state_dict"),
        (torch.ones(1), "state_dict", "no entry state_dict"),
        ({"state_dict": torch.ones(1)}, "state_dict", "hold a Tensor"),
    ],
)
def test_anything_but_named_tensors_is_refused(
    tmp_path: Path, content: object, entry: str, message: str
) -> None:
    torch.save(content, tmp_path / "original.pt")
    with pytest.raises(DataError, match=message):
        converted(tmp_path / "original.pt", NAME, Doubled(), entry)


def test_what_the_converter_refuses_leaves_nothing(file: Path, cache: Path) -> None:
    def refuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        converted(file, NAME, refuse)
    assert not cache.exists()


def test_a_pickle_that_changes_while_it_is_read(file: Path, cache: Path) -> None:
    def slow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.save({"a": torch.zeros(2, 3)}, file)
        return tensors

    with pytest.raises(DataError, match="changed while"):
        converted(file, NAME, slow)
    assert not cache.exists()


def test_converters_may_return_views(file: Path) -> None:
    def views(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        a = tensors["a"]
        return {"row": a[0], "transposed": a.T, "a": a, "same": a}

    found = values(converted(file, NAME, views))
    rows = [[0, 1, 2], [3, 4, 5]]
    assert found == {"row": rows[0], "transposed": [[0, 3], [1, 4], [2, 5]], "a": rows, "same": rows}


def test_a_full_disk(file: Path, cache: Path) -> None:
    def big(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"big": torch.zeros(1_000_000)}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(EnvironmentFailure, match="Cannot write .*tiny-1"):
            converted(file, NAME, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(cache.iterdir()) == []


def test_check_tensors() -> None:
    shapes = {"a": (2, 3), "b": ()}
    good = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0)}
    check_tensors(good, shapes, "x")
    for tensors, message in (
        ({"a": good["a"]}, r"weights of x lack b \(1 "),
        ({**good, "c": good["b"], "d": good["b"]}, r"unexpected c \(2 "),
        ({**good, "a": torch.zeros(3, 2)}, r"a of the weights of x is \[3, 2\], not \[2, 3\]"),
    ):
        with pytest.raises(DataError, match=message):
            check_tensors(tensors, shapes, "x")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return offline_hub(tmp_path / "hub", monkeypatch)


def test_a_file_of_a_folder_or_of_the_hub(file: Path, hub: Path) -> None:
    publish(hub, "owner/name", file)
    convert = Doubled()
    path = converted_from(str(file.parent), file.name, NAME, convert)
    assert converted_from("owner/name", file.name, NAME, convert) == path
    assert values(path) == DOUBLED and convert.calls == 1


def test_once_converted_the_hub_is_not_asked_again(file: Path, hub: Path) -> None:
    publish(hub, "owner/name", file)
    path = converted_from("owner/name", file.name, NAME, Doubled())
    shutil.rmtree(hub)
    assert converted_from("owner/name", file.name, NAME, Doubled()) == path
    with pytest.raises(EnvironmentFailure):
        converted_from("owner/name", file.name, "tiny-2", Doubled())
    path.unlink()
    with pytest.raises(EnvironmentFailure):
        converted_from("owner/name", file.name, NAME, Doubled())


def test_what_the_hub_cannot_deliver(file: Path, hub: Path) -> None:
    with pytest.raises(EnvironmentFailure, match=r"x\.pt of owner/name is not in the local cache") as caught:
        hub_file("owner/name", "x.pt")
    assert "HF_HUB_OFFLINE" in caught.value.hint and "x.pt" in caught.value.hint
    publish(hub, "owner/name", file)
    assert hub_file("owner/name", file.name).read_bytes() == file.read_bytes()
    for wrong in ("./no/folder", "folder", "/no/such/folder", "a/b/c"):
        with pytest.raises(DataError, match="neither a folder nor a hub id"):
            converted_from(wrong, "x.pt", NAME, Doubled())


ANSWER = httpx2.Response(503, request=httpx2.Request("GET", "https://huggingface.co"))


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("the hub says no",)
    return error


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (hub_error(GatedRepoError), "is gated", "https://huggingface.co/owner/name"),
        (hub_error(RepositoryNotFoundError), r"no public x\.pt of owner/name", "hf auth login"),
        (hub_error(RemoteEntryNotFoundError), r"no public x\.pt of owner/name", "Check the name"),
        (hub_error(OfflineModeIsEnabled), "hub can't be reached", "HF_HUB_OFFLINE"),
        (
            HfHubHTTPError("503 Server Error.\n\nthe hub says no", response=ANSWER),
            r"x\.pt of owner/name .*: the hub says no",
            "disk space",
        ),
        (OSError(28, "No space left on device"), "No space left", "disk space"),
    ],
)
def test_hub_failures_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, hint: str
) -> None:
    def download(*_: object) -> str:
        raise error

    monkeypatch.setattr("rtdmd_cli.engine.storage.hub.hf_hub_download", download)
    with pytest.raises(EnvironmentFailure, match=message) as caught:
        hub_file("owner/name", "x.pt")
    assert hint in caught.value.hint
