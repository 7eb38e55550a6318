"""Uploading: what the hub is asked for, and what is said when it refuses. The server is local."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from rtdmd_cli.engine.export.hub import check_login, check_name, push
from rtdmd_cli.errors import EnvironmentFailure, UsageError

TOKEN = "hf_notarealtoken00"


@dataclass
class Hub:
    """A hub that answers as told, and what it was asked."""

    address: str
    answers: dict[str, tuple[int, dict[str, Any]]]
    asked: list[tuple[str, str, Any]] = field(default_factory=list)

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.address, token=TOKEN)


@pytest.fixture
def hub() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            first = body.splitlines()[0] if body[:1] == b"{" else b"null"  # a commit is several lines
            made.asked.append((self.command, path, json.loads(first)))
            code, answer = made.answers.get(path, (404, {"error": "no such thing"}))
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("X-Request-Id", "Root=1-23")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    made = Hub(f"http://127.0.0.1:{server.server_port}", {})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()


def repository(private: bool) -> dict[str, tuple[int, dict[str, Any]]]:
    """The answers of a hub with a repository me/mine."""
    commit = {
        "success": True,
        "commitOid": "a" * 40,
        "commitUrl": "https://huggingface.co/me/mine/commit/" + "a" * 40,
    }
    files = {"files": [{"path": "README.md", "uploadMode": "regular", "shouldIgnore": False}]}
    return {
        "/api/repos/create": (200, {"url": "https://huggingface.co/me/mine"}),
        "/api/models/me/mine": (200, {"id": "me/mine", "private": private, "siblings": []}),
        "/api/models/me/mine/revision/main": (200, {"id": "me/mine", "private": private, "siblings": []}),
        "/api/models/me/mine/preupload/main": (200, files),
        "/api/models/me/mine/commit/main": (200, commit),
        "/api/validate-yaml": (200, {"errors": [], "warnings": []}),
    }


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_is_private_unless_asked_otherwise(hub: Hub, tmp_path: Path, public: bool) -> None:
    (tmp_path / "README.md").write_text("# mine\n")
    hub.answers |= repository(private=not public)
    assert "me/mine" in push(hub.api, tmp_path, "me/mine", public)
    created = next(body for _, path, body in hub.asked if path == "/api/repos/create")
    assert created["visibility"] == ("public" if public else "private")
    assert any(path.endswith("/commit/main") for _, path, _ in hub.asked)


def test_a_public_repository_is_not_written_to_by_surprise(hub: Hub, tmp_path: Path) -> None:
    hub.answers |= repository(private=False)
    with pytest.raises(UsageError, match="is public"):
        push(hub.api, tmp_path, "me/mine", False)
    assert not any(path.endswith("/commit/main") for _, path, _ in hub.asked)


def test_refusals_name_the_folder_and_no_token(hub: Hub, tmp_path: Path) -> None:
    hub.answers["/api/repos/create"] = (403, {"error": "You may not"})
    with pytest.raises(EnvironmentFailure) as caught:
        push(hub.api, tmp_path, "me/mine", False)
    assert f"hf upload me/mine {tmp_path}" in caught.value.hint and "You may not" in caught.value.message
    assert TOKEN not in caught.value.message + caught.value.hint
    hub.answers |= repository(private=True)
    hub.answers["/api/validate-yaml"] = (400, {"errors": [{"message": "no such licence"}], "warnings": []})
    (tmp_path / "README.md").write_text("---\nlicense: none\n---\n# mine\n")
    with pytest.raises(EnvironmentFailure, match="Invalid metadata"):
        push(hub.api, tmp_path, "me/mine", False)


def test_login_is_checked_beforehand(hub: Hub) -> None:
    hub.answers["/api/whoami-v2"] = (401, {"error": "Invalid credentials"})
    with pytest.raises(EnvironmentFailure, match="hub can't be used"):
        check_login(hub.api)
    hub.answers["/api/whoami-v2"] = (200, {"name": "me", "type": "user"})
    check_login(hub.api)
    with pytest.raises(EnvironmentFailure, match="hub can't be used"):
        check_login(HfApi(endpoint="http://127.0.0.1:1", token=TOKEN))


@pytest.mark.parametrize("name", ["a/b/c", "mine", "", "me/-mine", "me/a b"])
def test_bad_names(name: str) -> None:
    with pytest.raises(UsageError, match="can't be the name"):
        check_name(name)
