"""Servers on loopback for tests of remote tiers: an S3 protocol server behind a proxy that misbehaves on request, and a file server."""

from __future__ import annotations

import http.client
import logging
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import unquote, urlsplit

from moto.server import ThreadedMotoServer

Fault = Literal["500", "503", "403", "404", "slowdown", "silence", "cut", "truncate", "shorten"]

_HOP = frozenset(("connection", "transfer-encoding", "keep-alive", "content-length", "date", "server"))
_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
_CODES = {"500": "InternalError", "503": "ServiceUnavailable", "403": "AccessDenied", "404": "NoSuchKey", "slowdown": "SlowDown"}


@dataclass(frozen=True)
class Seen:
    """One request that came by, and what was done to it."""

    method: str
    path: str
    range: str | None
    fault: Fault | None


@dataclass
class Script:
    """Which requests go wrong: each fault is good for `times` requests for which `matches` is true."""

    seen: list[Seen] = field(default_factory=list)
    _faults: list[tuple[Fault, Callable[[str, str], bool], list[int]]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, fault: Fault, times: int = 1, method: str = "GET", path: str = "") -> None:
        self._faults.append((fault, lambda verb, place: verb == method and re.search(path, place) is not None, [times]))

    def take(self, method: str, path: str, requested: str | None) -> Fault | None:
        with self._lock:
            fault = next((fault for fault, matches, left in self._faults if left[0] > 0 and matches(method, path)), None)
            if fault is not None:
                next(left for name, matches, left in self._faults if name == fault and left[0] > 0 and matches(method, path))[0] -= 1
            self.seen.append(Seen(method, path, requested, fault))
            return fault

    def forget(self) -> None:
        self.seen.clear()
        self._faults.clear()

    def count(self, method: str, path: str = "") -> int:
        return sum(seen.method == method and re.search(path, seen.path) is not None for seen in self.seen)


class _Proxy(BaseHTTPRequestHandler):
    """Passes requests on to `upstream`, apart from what the script says."""

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[tuple[str, int]]
    script: ClassVar[Script]

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.script.take(self.command, unquote(self.path), self.headers.get("Range"))
        if fault == "silence":
            self.connection.settimeout(5)
            with _quietly():  # until the client gives up
                self.connection.recv(1)
            self.close_connection = True
        elif fault == "cut":
            self.close_connection = True
            # a reset, not an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault in _CODES:
            status = {"slowdown": 503}.get(fault) or int(fault)
            self._answer(status, [("Content-Type", "application/xml")], _ERROR.format(code=_CODES[fault]).encode())
        else:
            self._pass_on(body, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any  # noqa: N815  (http.server's names)

    def _pass_on(self, body: bytes, fault: Fault | None) -> None:
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        wanted = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
        connection.request(self.command, self.path, body, wanted)
        answer = connection.getresponse()
        data = answer.read()
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP]
        length = int(answer.getheader("Content-Length") or 0) if self.command == "HEAD" else len(data)
        connection.close()
        if fault == "shorten":
            data = data[: len(data) // 2]
            length = len(data)
        self._answer(answer.status, headers, data[: len(data) // 2] if fault == "truncate" else data, length)
        if fault == "truncate":
            self.close_connection = True

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int | None = None) -> None:
        with _quietly():
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (http.server's name)
        pass


class _Files(BaseHTTPRequestHandler):
    """Serves the files below `root`, and ranges of them, as a plain web server does."""

    protocol_version = "HTTP/1.1"
    root: ClassVar[Path]
    script: ClassVar[Script]

    def _any(self) -> None:
        requested = self.headers.get("Range")
        self.script.take(self.command, self.path, requested)
        file = self.root / unquote(urlsplit(self.path).path).lstrip("/")
        if not file.is_file():
            self._answer(404, b"")
            return
        data = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", requested or "")
        if found is None:
            self._answer(200, data)
        else:
            start, stop = int(found[1]), min(len(data), int(found[2] or len(data)) + 1)
            self._answer(206, data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}")

    do_GET = do_HEAD = _any  # noqa: N815  (http.server's names)

    def _answer(self, status: int, data: bytes, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (http.server's name)
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what these tests are about."""


@contextmanager
def _quietly() -> Iterator[None]:
    with suppress(OSError):
        yield


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port of loopback until the end of the `with`; yield the URL."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def fault_proxy(upstream: tuple[str, int]) -> Iterator[tuple[str, Script]]:
    """Yield the URL of a proxy before `upstream`, and the script of its faults."""
    script = Script()
    with serving(type("Proxy", (_Proxy,), {"upstream": upstream, "script": script})) as url:
        yield url, script


@contextmanager
def file_server(root: Path) -> Iterator[tuple[str, Script]]:
    """Yield the URL of a web server over a directory, and the script that sees its requests."""
    script = Script()
    with serving(type("Files", (_Files,), {"root": root, "script": script})) as url:
        yield url, script


@contextmanager
def s3_server(bucket: str) -> Iterator[tuple[str, int]]:
    """Start moto's S3 server with one bucket; yield its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        connection = http.client.HTTPConnection(host, port, timeout=60)
        connection.request("PUT", f"/{bucket}")
        assert connection.getresponse().status == 200
        connection.close()
        yield host, port
    finally:
        server.stop()
