"""Stores in processes of their own: moto's, which speaks S3 and notes every request, and one that speaks Google's."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec

BUCKET = "caches"
_PATIENCE_S = 60
_REQUEST = re.compile(r'"([A-Z]+) (\S+) HTTP/1\.1" (\d{3})')


@dataclass(frozen=True)
class Request:
    """One that the server answered: its method, its path with the query, and the status."""

    method: str
    path: str
    status: int


@dataclass(frozen=True)
class Store:
    """A running server with one bucket, and the settings of the environment by which it is used."""

    endpoint: str
    log: Path

    @property
    def env(self) -> dict[str, str]:
        """What a user sets."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def requests(self) -> list[Request]:
        """Return all requests so far."""
        found = _REQUEST.findall(self.log.read_text())
        return [Request(method, path, int(status)) for method, path, status in found]

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Return the content of every object below a prefix, by its path in the bucket."""
        files = self.open()
        paths = files.find(f"{BUCKET}/{prefix}".rstrip("/"))
        return {path.removeprefix(f"{BUCKET}/"): files.cat_file(path) for path in paths}

    def open(self) -> fsspec.AbstractFileSystem:
        """Return a client that notices what others write."""
        env = self.env
        return fsspec.filesystem(
            "s3",
            key=env["AWS_ACCESS_KEY_ID"],
            secret=env["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=self.endpoint,
            use_listings_cache=False,
            skip_instance_cache=True,
        )


@contextmanager
def serve_store(folder: Path) -> Iterator[Store]:
    """Yield a store whose log is in `folder`, and end its process afterwards."""
    log = folder / "store.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with log.open("wb") as file:
        env = {**os.environ, "MOTO_S3_CUSTOM_ENDPOINTS": ""}
        server = subprocess.Popen(command, stdout=file, stderr=file, env=env)
    try:
        store = Store(_find_endpoint(log, server), log)
        store.open().mkdir(BUCKET)
        yield store
    finally:
        server.kill()
        server.wait()


@contextmanager
def serve_google_store(folder: Path) -> Iterator[dict[str, str]]:
    """Yield what a user sets to use a store with one bucket that speaks Google's protocol; end it afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--in-memory"]
    command += ["--host=127.0.0.1", f"--port={port}", f"--default-bucket={BUCKET}"]
    with (folder / "google.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, log.name
                time.sleep(0.05)
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
    finally:
        server.kill()
        server.wait()


def _find_endpoint(log: Path, server: "subprocess.Popen[bytes]") -> str:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text()):
            return found[1]
        assert server.poll() is None, log.read_text()
        time.sleep(0.02)
    raise AssertionError(log.read_text())


class Wire:
    """A wire between clients and a store, which can hold back uploads of parts in the middle of their bytes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.holds_after: int | None = None  # uploads of parts that pass; None: all
        self.is_held = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._passed = 0
        self._is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def env(self) -> dict[str, str]:
        """What a user sets to use the store through this wire."""
        port = self._listener.getsockname()[1]
        return self.store.env | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}

    def hold(self, *, after: int) -> None:
        """From now on let some uploads of parts pass, and only half the bytes of those that follow."""
        self._passed, self.holds_after = 0, after
        self.is_held.clear()

    def release(self) -> None:
        """Let the uploads that follow pass."""
        self.holds_after = None

    def cut(self) -> None:
        """Let no client reach the store."""
        self._is_cut = True

    def mend(self) -> None:
        """Let clients reach it again."""
        self._is_cut = False

    def _accept(self) -> None:
        port = int(self.store.endpoint.rpartition(":")[2])
        while True:
            client, _ = self._listener.accept()
            if self._is_cut:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", port))
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                length = re.search(rb"(?is)^PUT \S+/parts/.*content-length: (\d+)", data)
                if length and self._is_due():
                    target.sendall(data[: data.index(b"\r\n\r\n") + 4 + int(length[1]) // 2])
                    self.is_held.set()
                    while source.recv(1 << 16):
                        pass  # until the client is gone
                    break
                target.sendall(data)
        for end in (source, target):
            end.close()

    def _is_due(self) -> bool:
        self._passed += 1
        return self.holds_after is not None and self._passed > self.holds_after
