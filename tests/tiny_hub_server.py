"""A hub of our own on this machine: the part of the hub's protocol that a download takes, for the hub's real client.

A process of the program uses it where HF_ENDPOINT is its address and HF_HUB_OFFLINE is not set.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


@dataclass(frozen=True)
class Repository:
    """What is published under one name. gated: its licence has to be accepted first, and nobody has.

    closed: what the hub answers, with 403, to a token that may not read here.
    """

    folder: Path
    gated: bool = False
    closed: str = ""

    def files(self) -> dict[str, Path]:
        """Every file by its path in the repository."""
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}


@dataclass
class Hub:
    """The repositories by "owner/name"; asked: the files that were sent, in order; watch: is told of each beforehand."""

    repositories: Mapping[str, Repository]
    asked: list[str] = field(default_factory=list)
    watch: Callable[[str], None] = lambda path: None
    address: str = ""


@contextmanager
def serving(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """The hub, for as long as the block lasts."""
    hub = Hub(repositories)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(self.command == "GET")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the test's terminal."""

    def _answer(self, body: bool) -> None:
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        of_api = words[:2] == ["api", "models"]
        owner_and_name = "/".join(words[2:4] if of_api else words[:2])
        repository = self.hub.repositories.get(owner_and_name)
        if repository is None:
            self._refuse(401, "RepoNotFound")
        elif of_api:
            self._tell(owner_and_name, repository, words[4:], body)
        elif repository.gated:
            self._refuse(401, "GatedRepo")
        elif repository.closed:
            self._send(b"", {"X-Error-Message": repository.closed}, body, 403)
        else:
            self._send_file(repository, words[3], "/".join(words[4:]), body)

    def _tell(self, name: str, repository: Repository, rest: list[str], body: bool) -> None:
        """What the repository holds: its description, or the list of its files."""
        if rest[1:2] not in ([], ["main"], [COMMIT]):
            self._refuse(404, "RevisionNotFound")
        elif rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": _tag(file)}
                for path, file in repository.files().items()
            ]
            self._send(json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
        else:
            siblings = [{"rfilename": path} for path in repository.files()]
            told = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self._send(json.dumps(told).encode(), {"Content-Type": "application/json"}, body)

    def _send_file(self, repository: Repository, revision: str, path: str, body: bool) -> None:
        file = repository.files().get(path)
        if revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif file is None:
            self._refuse(404, "EntryNotFound")
        else:
            if body:
                self.hub.watch(path)
                self.hub.asked.append(path)
            self._send(file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{_tag(file)}"'}, body)

    def _refuse(self, code: int, reason: str) -> None:
        self._send(b"", {"X-Error-Code": reason, "X-Error-Message": reason}, False, code)

    def _send(self, data: bytes, headers: Mapping[str, str], body: bool, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("X-Request-Id", "Root=1-23")
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _tag(file: Path) -> str:
    """As git names the content of a file."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
