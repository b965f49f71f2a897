"""A store that speaks S3: moto's server, in a process of its own, which notes every request."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def _find_endpoint(log: Path, server: "subprocess.Popen[bytes]") -> str:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text()):
            return found[1]
        assert server.poll() is None, log.read_text()
        time.sleep(0.02)
    raise AssertionError(log.read_text())
