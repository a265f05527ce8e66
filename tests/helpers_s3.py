"""A real S3 server process (moto's) that tests can kill, stop and start again; fixtures over it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from scaletransfer import storage

BUCKET = "shards"
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class S3Server:
    """moto's server on a port of its own. What it holds is in its memory: a kill loses it."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.uploads: list[tuple[Path, str]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """For a process that uses this server."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.endpoint, "NO_PROXY": "127.0.0.1"}

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **KEYS})
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
                time.sleep(0.05)
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def client(self):
        config = Config(retries={"total_max_attempts": 3})
        names = {
            "aws_access_key_id": "test",
            "aws_secret_access_key": "test",
            "region_name": "us-east-1",
            "endpoint_url": self.endpoint,
        }
        return boto3.client("s3", config=config, **names)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def pause(self) -> None:
        """It takes connections (the kernel does) and answers nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def put(self, folder: Path, name: str) -> str:
        """Upload the files of a folder as `name`; its URL."""
        client = self.client
        for path in sorted(folder.iterdir()):
            if path.is_file():
                client.upload_file(str(path), BUCKET, f"{name}/{path.name}")
        self.uploads.append((folder, name))
        return f"s3://{BUCKET}/{name}"

    def put_tree(self, folder: Path, name: str) -> str:
        """Upload a folder and all below it as `name`; its URL."""
        client = self.client
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), BUCKET, f"{name}/{path.relative_to(folder).as_posix()}")
        return f"s3://{BUCKET}/{name}"

    def put_bytes(self, data: bytes, name: str) -> str:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=data)
        return f"s3://{BUCKET}/{name}"

    def restart(self) -> None:
        """Start again after a kill, with the folders that were uploaded."""
        self.start()
        uploads, self.uploads = self.uploads, []
        for folder, name in uploads:
            self.put(folder, name)


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3") / "server.log")
    server.start()
    yield server
    assert server.process is not None
    server.go_on()
    server.kill()


@pytest.fixture
def s3(s3_server, monkeypatch) -> Iterator[S3Server]:
    """The server, running and empty but for its bucket, as the one that this process uses."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.05)
    storage.forget()
    if s3_server.process.poll() is not None:
        s3_server.start()
    s3_server.uploads.clear()
    yield s3_server
    if s3_server.process.poll() is None:
        s3_server.go_on()
    storage.forget()


class Front:
    """A server before the server, in this process: answers the next requests with the faults that a test names.

    faults: "503" (SlowDown), "500", "403", "cut" (the connection ends in the middle of the answer), or "" for none.
    """

    def __init__(self, server: S3Server) -> None:
        self.faults: list[str] = []
        self.requests: list[str] = []
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                front.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
                fault = front.faults.pop(0) if front.faults else ""
                if fault.isdigit():
                    code = {"503": "SlowDown", "500": "InternalError", "403": "AccessDenied"}[fault]
                    self.reply(int(fault), f"<Error><Code>{code}</Code><Message>by the test</Message></Error>".encode())
                    return
                connection = http.client.HTTPConnection("127.0.0.1", server.port)
                length = int(self.headers.get("Content-Length") or 0)
                connection.request(self.command, self.path, self.rfile.read(length), dict(self.headers))
                response = connection.getresponse()
                self.reply(response.status, response.read(), response.headers, cut=fault == "cut")

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def reply(self, status, body, headers=None, cut=False) -> None:
                self.send_response(status)
                kept = {name: text for name, text in (headers or {}).items() if name.lower() != "connection"}
                for name, text in {"Content-Length": str(len(body)), **kept}.items():
                    self.send_header(name, text)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[: len(body) // 2] if cut else body)
                self.close_connection = cut

            def log_message(self, format, *args) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def front(s3, monkeypatch) -> Iterator[Front]:
    """The way to the server, with faults."""
    made = Front(s3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
    storage.forget()
    yield made
    made.http.shutdown()
    made.http.server_close()
