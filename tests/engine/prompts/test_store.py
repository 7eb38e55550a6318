"""Public sets on disk: fetched from a server of the test's own, checked, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from rtdmd_cli.engine.prompts import store
from rtdmd_cli.engine.prompts.public_sets import DATA, DataSet, find_data
from rtdmd_cli.engine.prompts.reading import read_prompt_set, read_stored
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError
from tests.public_data import benchmark_file

TEXT = b"a red ring\na blue cross\n"
SHA = hashlib.sha256(TEXT).hexdigest()
BODIES = {
    "/good": TEXT,
    "/short": TEXT,
    "/other": b"<html>",
    "/binary": b"\xff\xfe\x00",
    "/pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
}


class Handler(BaseHTTPRequestHandler):
    """Serves `TEXT`, something else, half of what it announces, or nothing."""

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        body = BODIES[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + 5 * (self.path == "/short")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


def data(url: str, sha256: str | None = SHA, name: str = "toy") -> DataSet:
    return DataSet(name, "training", "A toy.", "train.txt", url, sha256, None, None, "MIT", "here")


def test_a_set_is_fetched_once_and_checked_each_time(server: str, cache: Path) -> None:
    toy = data(f"{server}/good")
    assert store.stored(toy) is None
    first = store.fetch(toy, read_stored)
    assert first.fresh and first.pinned and first.path == cache / "data/toy/train.txt"
    assert first.path.read_bytes() == TEXT
    again = store.fetch(replace(toy, url=f"{server}/missing"), read_stored)
    assert not again.fresh and again.path == first.path
    first.path.write_bytes(TEXT + b"x")
    for look in (store.stored, store.require):
        with pytest.raises(DataError, match="damaged"):
            look(toy)
    assert store.fetch(toy, read_stored, force=True).fresh and first.path.read_bytes() == TEXT
    assert [path.name for path in (cache / "data").iterdir()] == ["toy"]


def test_without_a_pinned_hash_the_one_found_is_recorded(server: str) -> None:
    toy = data(f"{server}/good", sha256=None)
    found = store.fetch(toy, read_stored)
    assert found.fresh and not found.pinned and found.sha256 == SHA
    record = json.loads((found.path.parent / store.RECORD).read_bytes())
    known = {"pinned": False, "own": False, "sha256": SHA, "size": len(TEXT), "url": f"{server}/good"}
    assert record == known
    assert store.require(toy).sha256 == SHA
    assert read_prompt_set(str(found.path.parent)).texts == ["a red ring", "a blue cross"]
    found.path.write_bytes(b"other")
    with pytest.raises(DataError, match="damaged"):
        store.require(toy)


@pytest.mark.parametrize(
    ("page", "kind", "reason"),
    [
        ("missing", EnvironmentFailure, "404"),
        ("short", EnvironmentFailure, "broke off after 24 of 29"),
        ("other", DataError, "not the prompt set toy"),
    ],
)
def test_what_is_not_the_set_changes_nothing(
    server: str, cache: Path, page: str, kind: type[Exception], reason: str
) -> None:
    store.fetch(data(f"{server}/good"), read_stored)
    with pytest.raises(kind, match=reason):
        store.fetch(data(f"{server}/{page}"), read_stored, force=True)
    assert store.require(data("")).path.read_bytes() == TEXT
    assert [path.name for path in (cache / "data").iterdir()] == ["toy"]


def test_an_unpinned_file_that_holds_no_prompts_is_not_recorded(server: str, cache: Path) -> None:
    with pytest.raises(DataError, match="not UTF-8"):
        store.fetch(data(f"{server}/binary", sha256=None), read_stored)
    assert list((cache / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("page", "reason"),
    [("other", "its first and last prompt are others"), ("pointer", "a pointer of Git LFS")],
)
def test_an_unpinned_download_must_have_the_ends_of_the_set(
    server: str, cache: Path, page: str, reason: str
) -> None:
    first, last = (
        hashlib.sha256(line).hexdigest()[:16] for line in (TEXT.splitlines()[0], TEXT.splitlines()[-1])
    )
    toy = replace(data(f"{server}/{page}", sha256=None), ends=(first, last))
    with pytest.raises(DataError, match=f"is not the prompt set toy: .*{reason}") as caught:
        store.fetch(toy, read_stored)
    assert "rtdmd data fetch toy --file FILE" in caught.value.hint and list((cache / "data").iterdir()) == []
    found = store.fetch(replace(toy, url=f"{server}/good"), read_stored)
    assert found.fresh and not found.own


def test_public_text_is_read_as_the_published_programs_do(tmp_path: Path) -> None:
    """Python's text mode: every kind of line end is one, and no line is a comment; a person's own file has comments."""
    body = b"#art, a cat\na dog\ra bird \r\n\r\n# last\r"
    toy, file = data("http://127.0.0.1:9", hashlib.sha256(body).hexdigest()), tmp_path / "mine.txt"
    file.write_bytes(body)
    with file.open("r", encoding="utf-8") as text:
        expected = [line.strip() for line in text.readlines() if line.strip()]
    assert read_stored(store.fetch(toy, read_stored, file)).texts == expected
    assert expected == ["#art, a cat", "a dog", "a bird", "# last"]
    with pytest.raises(DataError, match="lone carriage returns"):
        read_prompt_set(str(file))


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The same server by https, and its certificate, which nobody else knows."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl makes the certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    named = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([program, *made.split(), *named], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{running.server_address[1]}", certificate
        running.shutdown()


def test_a_server_is_trusted_as_the_hub_is(secure: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a Python that has no authorities of its own, as python.org's on macOS."""
    address, certificate = secure
    bare = partial(ssl.SSLContext, ssl.PROTOCOL_TLS_CLIENT)
    monkeypatch.setattr(ssl, "_create_default_https_context", bare)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(EnvironmentFailure, match="CERTIFICATE_VERIFY_FAILED"):
        store.fetch(data(f"{address}/good"), read_stored)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert store.fetch(data(f"{address}/good"), read_stored).pinned


def test_offline_it_says_what_to_place_where(
    server: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = data("http://127.0.0.1:9/train.txt")
    with pytest.raises(EnvironmentFailure, match="refused") as refused:
        store.fetch(nobody, read_stored)
    for part in (SHA, "--file FILE", str(cache / "data/toy/train.txt")):
        assert part in refused.value.hint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFailure, match="HF_HUB_OFFLINE"):
        store.fetch(data(f"{server}/good"), read_stored)
    with pytest.raises(EnvironmentFailure, match="not on this machine") as absent:
        read_prompt_set("data:hpsv3")
    assert "rtdmd data fetch hpsv3" in absent.value.hint


def test_a_file_at_hand_is_taken_after_checking(tmp_path: Path) -> None:
    toy, file = data(""), tmp_path / "mine.txt"
    file.write_bytes(TEXT[:-1])
    with pytest.raises(DataError, match=SHA):
        store.fetch(replace(toy, url="http://127.0.0.1:9"), read_stored, file)
    file.write_bytes(TEXT)
    assert store.fetch(replace(toy, url="http://127.0.0.1:9"), read_stored, file).pinned
    assert file.read_bytes() == TEXT
    with pytest.raises(UsageError, match="no file"):
        store.fetch(toy, read_stored, tmp_path / "none.txt", force=True)


@pytest.mark.parametrize("name", ["geneval", "geneval2", "hpsv3", "ocr", "drawbench"])
def test_the_public_files_are_the_pinned_ones(name: str) -> None:
    row = find_data(f"data:{name}")
    file = benchmark_file(f"{name}{Path(row.file).suffix}")
    found = store.fetch(row, read_stored, file)
    assert found.pinned and row.prompts == len(read_prompt_set(f"data:{name}"))
    assert row.distinct or row.size == file.stat().st_size


def test_drawbench_is_each_prompt_once_whichever_file_it_is() -> None:
    lines = benchmark_file("drawbench.txt").read_text("utf-8").splitlines()
    repeated = "".join(f"{line}\n" * 5 for line in reversed(lines)).encode()
    row = replace(DATA["drawbench"], sha256=hashlib.sha256(repeated).hexdigest())
    path = store.folder(row) / row.file
    path.parent.mkdir(parents=True)
    path.write_bytes(repeated)
    assert read_stored(store.require(row)).texts == lines == sorted(lines)


def test_the_table_names_every_published_set() -> None:
    assert DATA.keys() == {
        "pickscore-train", "geneval-train", "geneval-val", "geneval", "geneval2", "drawbench", "hpsv3", "ocr", "pickscore"
    }  # fmt: skip
    for name, row in DATA.items():
        assert name == row.name and row.licence and row.source and row.what.endswith(".")
        assert row.url.startswith("https://") or name in ("geneval-train", "geneval-val")
        assert all(len(each) == 64 for each in row.accepted)
    with pytest.raises(UsageError, match="genevall") as wrong:
        read_prompt_set("data:genevall")
    assert "geneval" in wrong.value.hint


def test_generated_prompts_need_no_fetching() -> None:
    made = read_prompt_set("data:geneval-train")
    assert len(made) == 50_000 and made.metadata[0]["tag"] == "position" and "prompt" not in made.metadata[0]
    kept = store.fetch(DATA["geneval-train"], read_stored)
    assert kept.pinned and read_stored(kept) == made
    measured = read_prompt_set("data:geneval-val")
    assert len(measured) == 510 and not set(measured.texts) & set(made.texts)
    held_out = store.fetch(DATA["geneval-val"], read_stored)
    assert read_stored(held_out) == measured
    held_out.path.write_text('{"prompt": "of another version"}\n')
    assert store.stored(DATA["geneval-val"]) is None
    again = store.fetch(DATA["geneval-val"], read_stored)
    assert again.fresh and read_stored(again) == measured


def test_a_set_without_a_pinned_hash_is_known_by_its_ends() -> None:
    texts = ["the first", "another", "the last"]
    ends = tuple(hashlib.sha256(text.encode()).hexdigest()[:16] for text in (texts[0], texts[-1]))
    data = replace(find_data("pickscore-train"), ends=ends)
    assert store.recognised(data, texts) and not store.recognised(data, texts[:2])
    assert store.recognised(replace(data, prompts=3), texts) and not store.recognised(
        replace(data, prompts=4), texts
    )
    assert not store.recognised(replace(data, ends=None), texts)
