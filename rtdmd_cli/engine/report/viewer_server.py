"""The server of `rtdmd runs view`: a page on 127.0.0.1 over the runs on this disk, which reads and never writes.

Only requests that name this machine as their host are answered, so that no page from elsewhere can read along by way of
a name that it lets point here.
"""

import errno
import json
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rtdmd_cli.engine.report import viewer_data
from rtdmd_cli.engine.storage.run_folder import PICTURES, RunFolder
from rtdmd_cli.engine.storage.runs import RunSummary
from rtdmd_cli.errors import EnvironmentFailure, RtdmdError

ADDRESS = "127.0.0.1"
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/viewer.css": ("viewer.css", "text/css; charset=utf-8"),
    "/viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
}
"""Address -> file in the package, and its type."""
KINDS = {".png": "image/png", ".jpg": "image/jpeg"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Answer = tuple[HTTPStatus, str, bytes]


class Viewer(ThreadingHTTPServer):
    """Serves the runs that `find` gives; port 0 takes a free one. EnvironmentFailure where the port is taken."""

    daemon_threads = True

    def __init__(self, port: int, find: Callable[[], Sequence[RunSummary]]) -> None:
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise EnvironmentFailure(
                f"Port {port} of this machine can't be used: {error.strerror}.", "Choose another: --port 0"
            ) from error
        self.find = find
        self.runs: dict[str, RunFolder] = {}

    @property
    def url(self) -> str:
        """Where a browser finds the page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def listing(self) -> list[dict[str, Any]]:
        """The runs now, the one that changed last first."""
        found = self.find()
        self.runs = {viewer_data.run_id(each.run): each.run for each in found}
        return [viewer_data.listed(each) for each in found]

    def run(self, name: str) -> RunFolder | None:
        """The run with this id."""
        if name not in self.runs:
            self.listing()
        return self.runs.get(name)

    def answer(self, path: str) -> Answer:
        """What is at an address."""
        if path in PAGES:
            name, kind = PAGES[path]
            return HTTPStatus.OK, kind, (files("rtdmd_cli.engine.report") / "viewer" / name).read_bytes()
        match path.strip("/").split("/"):
            case ["api", "runs"]:
                return _json(self.listing())
            case ["api", "runs", name, "metrics"] if run := self.run(name):
                return _json(viewer_data.metrics(run))
            case ["api", "runs", name, "pictures"] if run := self.run(name):
                return _json(viewer_data.pictures(run))
            case ["pictures", name, file] if (run := self.run(name)) and viewer_data.PICTURE.fullmatch(file):
                return _picture(run.samples / PICTURES / file)
        return _missing()


def _json(value: Any) -> Answer:
    return HTTPStatus.OK, "application/json; charset=utf-8", json.dumps(value, allow_nan=False).encode()


def _picture(path: Path) -> Answer:
    if not path.is_file():
        return _missing()
    return HTTPStatus.OK, KINDS[path.suffix], path.read_bytes()


def _missing() -> Answer:
    return HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"not found"


class _Handler(BaseHTTPRequestHandler):
    server: Viewer

    def do_GET(self) -> None:
        """Answer, to this machine alone."""
        hosts = {f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")}
        if self.headers.get("Host") not in hosts:
            status, kind, body = HTTPStatus.FORBIDDEN, "text/plain; charset=utf-8", b"this machine only"
        else:
            try:
                status, kind, body = self.server.answer(urlsplit(self.path).path)
            except (
                RtdmdError,
                OSError,
            ) as error:  # a run that is removed meanwhile, say: the page asks again
                status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8"
                body = str(error).encode("utf-8", "replace")
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is for people."""

    def version_string(self) -> str:
        """No versions to read from outside."""
        return "rtdmd"
