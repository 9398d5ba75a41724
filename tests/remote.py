"""Counterparts on loopback: an S3 server, and a proxy before it that counts requests and makes faults."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

SECRET = "s3cr3t-t0k3n-0f-the-test"  # what must never be found in anything that is written
BUCKET = "bucket"


@dataclass
class Request:
    """What came by: its range as asked for, and how many bytes of body were sent in answer."""

    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0


Fault = Callable[["Request", int], "str | None"]
"""Gives the fault of a request, by it and its number, or None: see `Proxy.FAULTS`."""


@dataclass
class Proxy:
    """Passes requests on to a server, and counts them."""

    target: tuple[str, int]
    requests: list[Request] = field(default_factory=list)
    fault: Fault | None = None
    latency: float = 0.0
    FAULTS: ClassVar = ("500", "503", "reset", "slow", "truncated", "changed", "403", "garbled")

    def __post_init__(self) -> None:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                pass

            def do(self) -> None:
                proxy._pass(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        self.requests.clear()
        self.fault, self.latency = None, 0.0

    def sent(self, key: str = "") -> int:
        """Bytes of bodies of objects that were sent."""
        return sum(
            each.sent
            for each in self.requests
            if each.method == "GET" and key in each.path and "list-type" not in each.path
        )

    def _pass(self, handler: BaseHTTPRequestHandler) -> None:
        request = Request(
            handler.command, handler.path, {key.lower(): value for key, value in handler.headers.items()}
        )
        self.requests.append(request)
        fault = self.fault(request, len(self.requests)) if self.fault else None
        if self.latency:
            time.sleep(self.latency)
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        if fault in ("500", "503", "403"):
            text = b"<Error><Code>Injected</Code></Error>"
            handler.send_response(int(fault))
            if fault == "503":
                handler.send_header("Retry-After", "0")
            handler.send_header("Content-Length", str(len(text)))
            handler.end_headers()
            handler.wfile.write(text if handler.command != "HEAD" else b"")
            return
        connection = http.client.HTTPConnection(*self.target, timeout=60)
        try:
            connection.request(handler.command, handler.path, body or None, dict(handler.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
            handler.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    handler.send_header(
                        name, '"0123456789abcdef"' if fault == "changed" and name.lower() == "etag" else value
                    )
            length = int(answer.getheader("content-length") or 0) if handler.command == "HEAD" else len(data)
            handler.send_header("Content-Length", str(length))
            handler.end_headers()
            self._body(handler, data, fault, request)
        finally:
            connection.close()

    def _body(
        self, handler: BaseHTTPRequestHandler, data: bytes, fault: str | None, request: Request
    ) -> None:
        if fault in ("reset", "truncated"):
            data = data[: len(data) // 2]
        elif fault == "slow":
            for at in range(0, len(data), max(len(data) // 5, 1)):
                handler.wfile.write(data[at : at + max(len(data) // 5, 1)])
                handler.wfile.flush()
                time.sleep(0.02)
            request.sent += len(data)
            return
        with contextlib.suppress(OSError):
            handler.wfile.write(data)
            handler.wfile.flush()
            request.sent += len(data)
        if fault == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if fault in ("reset", "truncated"):
            handler.close_connection = True
            with contextlib.suppress(OSError):
                handler.connection.close() if fault == "reset" else handler.connection.shutdown(
                    socket.SHUT_WR
                )


@dataclass
class Store:
    """An S3 server with one bucket, reached by way of a proxy."""

    proxy: Proxy
    client: object

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)  # type: ignore[attr-defined]

    def upload(self, directory: Path, prefix: str) -> str:
        """A directory, or a file, under a prefix; returns its name."""
        if directory.is_file():
            self.put(prefix, directory.read_bytes())
        for file in sorted(each for each in directory.rglob("*") if each.is_file()):
            self.put(f"{prefix}/{file.relative_to(directory).as_posix()}", file.read_bytes())
        return f"s3://{BUCKET}/{prefix}"


def environment(address: str) -> dict[str, str]:
    """The variables by which clients find it."""
    return {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": f"{SECRET}-session", "AWS_REGION": "us-east-1", "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "NO_PROXY": "127.0.0.1,localhost",
    }  # fmt: skip


@contextlib.contextmanager
def s3() -> Iterator[Store]:
    """A server in this process, of which nothing is left."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port())
    try:
        client = boto3.client(
            "s3", endpoint_url="http://{}:{}".format(*server.get_host_and_port()), region_name="us-east-1",
            aws_access_key_id="test", aws_secret_access_key="other",
        )  # fmt: skip
        client.create_bucket(Bucket=BUCKET)
        yield Store(proxy, client)
    finally:
        proxy.close()
        server.stop()


def ranged(request: Request) -> tuple[int, int] | None:
    """The range that a request asks for."""
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    return (int(match[1]), int(match[2]) + 1) if match else None


@dataclass
class Web:
    """A server of files, with ranges, ETags and pages of links; `files` is by path."""

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    """Path -> where it redirects to."""
    fault: Fault | None = None

    def __post_init__(self) -> None:
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def log_message(self, *_: object) -> None:
                pass

            def do(self) -> None:
                request = Request(
                    self.command, self.path, {key.lower(): value for key, value in self.headers.items()}
                )
                web.requests.append(request)
                fault = web.fault(request, len(web.requests)) if web.fault else None
                if fault in ("500", "503", "403"):
                    return web.answer(self, request, int(fault), b"fault", {"Retry-After": "0"})
                web.handle(self, request, fault)

            do_GET = do_HEAD = do

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def handle(self, handler: BaseHTTPRequestHandler, request: Request, fault: str | None = None) -> None:
        path = request.path.partition("?")[0]
        if path in self.moved:
            return self.answer(handler, request, 302, b"", {"Location": self.moved[path]})
        if path in self.files:
            return self.file(handler, request, self.files[path], fault)
        below = path.rstrip("/") + "/"
        names = {
            each.removeprefix(below).split("/")[0] + "/" * ("/" in each.removeprefix(below))
            for each in self.files
            if each.startswith(below)
        }
        if names and path != below:
            return self.answer(handler, request, 301, b"", {"Location": below})
        links = "".join(f'<a href="{name}">{name}</a>' for name in ("../", "?C=N", *sorted(names)))
        self.answer(handler, request, 200 if names else 404, links.encode(), {"Content-Type": "text/html"})

    def file(
        self, handler: BaseHTTPRequestHandler, request: Request, data: bytes, fault: str | None = None
    ) -> None:
        tag = f'"{hash(data) & 0xFFFFFFFF:x}"'
        if request.headers.get("if-match", tag) != tag:
            return self.answer(handler, request, 412, b"")
        headers = {"ETag": tag, "Accept-Ranges": "bytes"}
        found = ranged(request)
        if not found:
            return self.answer(handler, request, 200, data, headers)
        part = data[found[0] : found[1]]
        headers["Content-Range"] = f"bytes {found[0]}-{found[0] + len(part) - 1}/{len(data)}"
        self.answer(handler, request, 206, part, headers, fault)

    def answer(
        self, handler: BaseHTTPRequestHandler, request: Request, status: int, data: bytes, headers: dict[str, str] | None = None,
        fault: str | None = None,
    ) -> None:  # fmt: skip
        handler.send_response_only(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if handler.command != "HEAD":
            part = data[: len(data) // 2] if fault in ("reset", "truncated") else data
            handler.wfile.write(part)
            handler.wfile.flush()
            request.sent = len(part)
        handler.close_connection = handler.close_connection or bool(fault)

    def sent(self) -> int:
        return sum(each.sent for each in self.requests if ranged(each))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(Web):
    """The routes of a hub for one model, OWNER/REPO; large files are at another host, by addresses that expire."""

    def __init__(self, directory: Path, uses: int = 5, *, private: bool = False) -> None:
        self.private, self.uses, self.given = private, uses, 0
        self.left: dict[str, int] = {}
        self.models = {
            each.relative_to(directory).as_posix(): each.read_bytes()
            for each in sorted(directory.rglob("*"))
            if each.is_file()
        }
        self.store = Blobs(self)
        super().__init__()

    def close(self) -> None:
        super().close()
        self.store.close()

    def handle(self, handler: BaseHTTPRequestHandler, request: Request, fault: str | None = None) -> None:
        path, _, query = request.path.partition("?")
        if self.private and request.headers.get("authorization") != f"Bearer {SECRET}":
            return self.answer(handler, request, 401, b"")
        if path == "/api/models/owner/repo/revision/main":
            document: object = {"id": "owner/repo", "sha": COMMIT, "siblings": []}
        elif path == f"/api/models/owner/repo/tree/{COMMIT}":
            names = sorted(self.models)
            start = int(query.partition("cursor=")[2] or 0)
            rows = [
                {"type": "file", "oid": "0" * 40, "size": len(self.models[name]), "path": name}
                | (
                    {
                        "lfs": {
                            "oid": hashlib.sha256(self.models[name]).hexdigest(),
                            "size": len(self.models[name]),
                        }
                    }
                    if self.large(name)
                    else {}
                )
                for name in names[start : start + 3]
            ]
            headers = {}
            if start + 3 < len(names):
                headers["Link"] = f'<{self.address}{path}?recursive=true&cursor={start + 3}>; rel="next"'
            return self.answer(handler, request, 200, json.dumps(rows).encode(), headers)
        elif path.startswith(f"/owner/repo/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/owner/repo/resolve/{COMMIT}/")
            if path in self.moved:
                return self.answer(handler, request, 302, b"", {"Location": self.moved[path]})
            if not self.large(name):
                return self.file(handler, request, self.models[name], fault)
            self.given += 1
            self.left[str(self.given)] = self.uses
            return self.answer(
                handler,
                request,
                302,
                b"",
                {"Location": f"http://localhost:{self.store.port}/{name}?signature={self.given}"},
            )
        else:
            return self.answer(handler, request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        return self.answer(handler, request, 200, json.dumps(document).encode())

    @staticmethod
    def large(name: str) -> bool:
        return name.endswith(".safetensors")


class Blobs(Web):
    """Where a hub has its large files."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        super().__init__()

    def handle(self, handler: BaseHTTPRequestHandler, request: Request, fault: str | None = None) -> None:
        path, _, signature = request.path.partition("?signature=")
        self.hub.left[signature] -= 1
        if self.hub.left[signature] < 0:
            return self.answer(handler, request, 403, b"expired")
        self.file(handler, request, self.hub.models[path[1:]], fault)
