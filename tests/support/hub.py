"""A Hugging Face Hub on 127.0.0.1: enough of its API to stream a dataset and to download a model, with faults.

Clients run in subprocesses with `HF_ENDPOINT` set, because huggingface_hub reads it when it is imported.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "someone/stories"
MODEL = "someone/teacher"
SHA = "0123456789abcdef0123456789abcdef01234567"
_STALL_S = 30.0

# (file, number of the request for its content, from 1) -> None, a status, ("cut", number of bytes) or "stall"
Fault = Callable[[str, int], "int | tuple[str, int] | str | None"]


@dataclass
class Hub:
    """The files of one dataset, optionally of one model, and the requests for them."""

    folder: Path
    fault: Fault = lambda *_: None
    retry_after: str | None = None
    requests: Counter[str] = field(default_factory=Counter)  # for content, by file
    sent: Counter[str] = field(default_factory=Counter)  # bytes of content, by file
    endpoint: str = ""
    model: Path | None = None
    sha: str = SHA  # of the newest commit

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of a client."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def serve(folder: Path, fault: Fault = lambda *_: None, **keys: Any) -> Iterator[Hub]:
    """Serve a folder as the dataset someone/stories within the block, and the folder `model` as someone/teacher."""
    hub = Hub(folder, fault, **keys)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        is_model = path.startswith((f"/api/models/{MODEL}", f"/{MODEL}/")) and self.hub.model
        name, folder = (MODEL, self.hub.model) if is_model else (NAME, self.hub.folder)
        assert folder is not None
        api = f"/api/{'models' if is_model else 'datasets'}/{name}"
        content = f"{'' if is_model else '/datasets'}/{name}/resolve/"
        if path.startswith(f"{api}/tree/"):
            # Subfolders (of chat templates, for example) are empty.
            is_top = path.removeprefix(f"{api}/tree/").count("/") == 0
            self.answer(self.describe(sorted(folder.iterdir())) if is_top else [])
        elif path == api or path.startswith(f"{api}/revision/"):
            about = {
                "id": name,
                "sha": self.hub.sha,
                "private": False,
                "gated": False,
                "disabled": False,
            }
            names = [{"rfilename": p.name} for p in sorted(folder.iterdir())]
            self.answer(about | {"downloads": 0, "likes": 0, "tags": [], "siblings": names})
        elif path.startswith(content):
            self.send_content(folder / path.rpartition("/")[2])
        else:
            self.answer({"error": "not found"}, status=404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))))
        found = [self.hub.folder / name for name in body.get("paths", [])]
        self.answer(self.describe([p for p in found if p.is_file()]))

    def describe(self, paths: list[Path]) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in paths
        ]

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_content(self, path: Path) -> None:
        name = path.name
        if not path.is_file():
            self.answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
            return
        content = path.read_bytes()
        fault = None
        if self.command == "GET":
            self.hub.requests[name] += 1
            fault = self.hub.fault(name, self.hub.requests[name])
        if isinstance(fault, int):
            gated = {"X_Error_Code": "GatedRepo"} if fault in (401, 403) else {}
            wait = {"Retry_After": self.hub.retry_after} if self.hub.retry_after else {}
            self.answer({"error": f"gated {fault}"}, fault, **gated, **wait)
            return
        first, last = 0, len(content) - 1
        if byte_range := self.headers.get("range"):
            begin, _, end = byte_range.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(last, int(end or last))
        piece = content[first : last + 1]
        self.send_response(206 if byte_range else 200)
        self.send_header("content-length", str(len(piece)))
        self.send_header("content-range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("accept-ranges", "bytes")
        self.send_header("etag", f'"{name}{self.hub.sha}"')
        self.send_header("x-repo-commit", self.hub.sha)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(fault, tuple):
            piece = piece[: fault[1]]
            self.close_connection = True
        if fault == "stall":
            self.wfile.write(piece[:10])
            self.wfile.flush()
            time.sleep(_STALL_S)
            return
        self.hub.sent[name] += len(piece)
        self.wfile.write(piece)
