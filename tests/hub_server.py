"""A Hugging Face hub of one machine: just enough of its HTTP interface to fetch one repository's files."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True, kw_only=True)
class Hub:
    """``endpoint`` is for ``HF_ENDPOINT``; ``fetched`` collects the names of the files that were asked for, ``revisions`` the
    revisions.
    """

    endpoint: str
    fetched: set[str] = field(default_factory=set)
    revisions: set[str] = field(default_factory=set)


@contextmanager
def serve_hub(files: Mapping[str, bytes], *, refusal: tuple[int, str] | None = None) -> Iterator[Hub]:
    """Serve ``files`` as every repository's, or answer everything with ``refusal``: a status and the hub's error code."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name is http.server's
            """Keep quiet."""

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            name = path.rpartition(f"/resolve/{COMMIT}/")[2]
            if refusal is not None:
                self._send(refusal[0], b"{}", {"X-Error-Code": refusal[1]}, with_body)
            elif path.startswith("/api/models/"):
                revision = path.partition("/revision/")[2]
                hub.revisions.update([unquote(revision)] if revision else [])
                self._send(200, json.dumps(_listing(files) if "/tree/" in path else _info(files)).encode(), {}, with_body)
            elif name in files:
                hub.fetched.add(name)
                self._send(200, files[name], {"ETag": f'"{_blob_id(files[name])}"', "X-Repo-Commit": COMMIT}, with_body)
            else:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, with_body)

        def _send(self, status: int, body: bytes, headers: Mapping[str, str], with_body: bool) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(endpoint=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _info(files: Mapping[str, bytes]) -> dict[str, object]:
    return {"id": "some-org/some-model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}


def _listing(files: Mapping[str, bytes]) -> list[dict[str, object]]:
    return [{"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)} for name, data in files.items()]


def _blob_id(data: bytes) -> str:
    """What git calls the file, which the hub uses as its ETag."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
