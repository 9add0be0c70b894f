"""A plain web server of this process over a folder, which answers as badly as it is told to; and a hub in memory."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import xxhash
from httpx2 import Request, Response
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError


@dataclass
class Web:
    """What it serves, what it was asked, and how it answers: each fault in ``faults`` is used up by one GET."""

    root: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    weak: bool = False

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        method, name = handler.command, handler.path.removeprefix("/A2b/")
        self.asked.append(f"{method} {name}")
        fault = self.faults.pop(0) if self.faults and method == "GET" else ""
        path = self.root / name
        content = path.read_bytes() if path.is_file() else None
        etag = "" if content is None else f'{"W/" * self.weak}"{xxhash.xxh3_64_hexdigest(content)}"'
        if fault == "503" or content is None:
            return _send(handler, 503 if fault else 404, {})
        if handler.headers.get("If-None-Match") == etag:
            return _send(handler, 304, {"ETag": etag})
        if (self.weak and "If-Match" in handler.headers) or handler.headers.get("If-Match", etag) != etag:
            return _send(handler, 412, {})
        status, headers, body = 200, {"ETag": etag, "Last-Modified": "Mon, 30 Nov 2026 10:00:00 GMT"}, content
        if wanted := handler.headers.get("Range"):
            start, stop = (int(text) for text in wanted.removeprefix("bytes=").split("-"))
            body = content[start : stop + 1]
            status, headers["Content-Range"] = 206, f"bytes {start}-{start + len(body) - 1}/{len(content)}"
        if fault == "stall":
            time.sleep(0.5)
        if fault == "hang":
            time.sleep(5)
        return _send(handler, status, headers, body, cut=fault == "close")


def _send(handler: Any, status: int, headers: dict[str, str], body: bytes = b"", *, cut: bool = False) -> None:
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body[: len(body) // 2] if cut else body)
    handler.close_connection = cut


@contextmanager
def served(root: Path) -> Iterator[Web]:
    """The folder at ``web.url``, until the end of the block."""
    web = Web(root)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            web.answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign] # who stalls is hung up on
    web.url = f"http://127.0.0.1:{server.server_address[1]}/A2b"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class FakeHub:
    """The calls of ``HfApi`` that are used, over one repository in memory; ``busy`` of them fail before one works."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {_oid(b""): {}}
        self.busy = 0

    @property
    def main(self) -> str:
        return [*self.commits][-1]

    def repo_info(self, repo_id: str, repo_type: str) -> Any:
        if self.busy:
            self.busy -= 1
            raise _refusal(503)
        if (repo_id, repo_type) != ("me/rows", "dataset"):
            raise _refusal(404)
        return SimpleNamespace(sha=self.main)

    def get_paths_info(self, paths: list[str], revision: str | None = None, **repo: str) -> list[Any]:
        held = self.commits[revision or self.repo_info(**repo).sha]
        return [_file(path, held[path]) for path in paths if path in held]

    def list_repo_tree(self, path_in_repo: str, recursive: bool, expand: bool, **repo: str) -> Iterator[Any]:
        self.repo_info(**repo)
        below = {path: each for path, each in self.commits[self.main].items() if path.startswith(f"{path_in_repo}/")}
        if not below:
            raise EntryNotFoundError("404")
        yield SimpleNamespace(path=f"{path_in_repo}/packs", tree_id="0")
        yield from (_file(path, content) for path, content in below.items())

    def create_commit(self, operations: list[Any], commit_message: str, parent_commit: str | None, **repo: str) -> Any:
        now = dict(self.commits[self.repo_info(**repo).sha])
        if parent_commit not in (None, self.main):
            raise _refusal(412)
        (operation,) = operations
        if hasattr(operation, "path_or_fileobj"):
            content = operation.path_or_fileobj
            now[operation.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
        else:
            del now[operation.path_in_repo]
        self.commits[_oid(f"{self.main} {len(self.commits)}".encode())] = now
        return SimpleNamespace(oid=self.main)

    def ranged(self, store: Any, name: str, start: int, stop: int) -> bytes:
        return self.commits[self.main][f"{store._folder}/{name}"][start:stop]


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _file(path: str, content: bytes) -> Any:
    made = SimpleNamespace(date=datetime.now(UTC))
    return SimpleNamespace(path=path, size=len(content), blob_id=_oid(content), last_commit=made)


def _refusal(status: int) -> HfHubHTTPError:
    return HfHubHTTPError(str(status), response=Response(status, request=Request("GET", "https://hub/")))
