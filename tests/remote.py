"""Counterparts on loopback: an S3 server, and a proxy before it that counts requests and makes faults."""

from __future__ import annotations

import contextlib
import http.client
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
