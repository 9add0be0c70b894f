"""A plain web server of this process over a folder, which answers as badly as it is told to."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash


@dataclass
class Web:
    """What it serves, what it was asked, and how it answers: each fault in ``faults`` is used up by one GET."""

    root: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        method, name = handler.command, handler.path.removeprefix("/A2b/")
        self.asked.append(f"{method} {name}")
        fault = self.faults.pop(0) if self.faults and method == "GET" else ""
        path = self.root / name
        content = path.read_bytes() if path.is_file() else None
        etag = "" if content is None else f'"{xxhash.xxh3_64_hexdigest(content)}"'
        if fault == "503" or content is None:
            return _send(handler, 503 if fault else 404, {})
        if handler.headers.get("If-None-Match") == etag:
            return _send(handler, 304, {"ETag": etag})
        if handler.headers.get("If-Match", etag) != etag:
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
