"""A Hugging Face Hub on 127.0.0.1: enough of its API to stream datasets and to download models, with faults.

Clients run in subprocesses with `HF_ENDPOINT` set, because huggingface_hub reads it when it is imported.
"""

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from support.place import Place

NAME = "someone/stories"
MODEL = "someone/teacher"
SHA = "0123456789abcdef0123456789abcdef01234567"
_STALL_S = 30.0

# (file, number of the request for its content, from 1) -> None, a status, ("cut", number of bytes) or "stall"
Fault = Callable[[str, int], "int | tuple[str, int] | str | None"]


@dataclass
class Hub:
    """Folders that stand for repositories, and the requests for their files."""

    repositories: dict[str, Path]  # datasets/<owner>/<name> or models/<owner>/<name>
    fault: Fault = lambda *_: None
    retry_after: str | None = None
    requests: Counter[str] = field(default_factory=Counter)  # for content, by file
    sent: Counter[str] = field(default_factory=Counter)  # bytes of content, by file
    endpoint: str = ""
    sha: str = SHA  # of the newest commit
    home: Path | None = None  # where clients keep what they have downloaded
    patience_s: int = 1  # of a client

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of a client."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": str(self.patience_s),
            "NO_PROXY": "127.0.0.1",
        } | ({"HF_HOME": str(self.home)} if self.home else {})

    def publish(self, folder: Path, *, model: Path | None = None) -> None:
        """Have a folder as the dataset someone/stories, and the folder `model` as someone/teacher."""
        self.repositories = {f"datasets/{NAME}": folder}
        if model:
            self.repositories[f"models/{MODEL}"] = model

    def publish_inputs(self, place: Place, folder: Path) -> None:
        """Have a place's documents and teacher as NAME and MODEL; its commands find them here alone."""
        stories, model = folder / "stories", folder / "model"
        stories.mkdir()
        shutil.move(place.path / "documents.jsonl", stories / "train.jsonl")
        shutil.move(place.path / "teacher", model)
        self.publish(stories, model=model)
        place.env.update(self.environment)

    def clear(self) -> None:
        """Be as new: nothing is here, nothing was asked for, and clients have downloaded nothing."""
        self.repositories, self.sha = {}, SHA
        self.requests.clear()
        self.sent.clear()
        if self.home:
            shutil.rmtree(self.home, ignore_errors=True)


@contextmanager
def serve(
    folder: Path, fault: Fault = lambda *_: None, *, model: Path | None = None, **keys: Any
) -> Iterator[Hub]:
    """Serve a folder as the dataset someone/stories within the block, and the folder `model` as someone/teacher."""
    with serve_all({}, fault, **keys) as hub:
        hub.publish(folder, model=model)
        yield hub


AnyHub = TypeVar("AnyHub", bound=Hub)


@contextmanager
def serve_all(
    repositories: dict[str, Path], fault: Fault = lambda *_: None, **keys: Any
) -> Iterator[Hub]:
    """Serve folders as datasets and models within the block; see `Hub`."""
    with answer(Hub(repositories, fault, **keys), _Handler) as hub:
        yield hub


@contextmanager
def answer(hub: AnyHub, handler: type["_Handler"]) -> Iterator[AnyHub]:
    """Let a handler answer for a Hub within the block, at its `endpoint`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (handler,), {"hub": hub}))
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
        kind, name, words = self.parse()
        folder = self.hub.repositories.get(f"{kind}/{name}")
        if folder is None:
            self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
        elif words[:1] == ["tree"]:
            self.answer(self.describe(folder, _list(folder.joinpath(*words[2:]), self.path)))
        elif words[:1] in ([], ["revision"]):
            about: dict[str, Any] = {"id": name, "sha": self.hub.sha}
            about |= {"private": False, "gated": False, "disabled": False}
            files = [p for p in _list(folder, "recursive=true") if p.is_file()]
            names = [{"rfilename": str(p.relative_to(folder))} for p in files]
            self.answer(about | {"downloads": 0, "likes": 0, "tags": [], "siblings": names})
        elif words[0] == "resolve":
            self.send_content(folder.joinpath(*words[2:]), str(Path(*words[2:])))
        else:
            self.answer({"error": "not found"}, 404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        kind, name, _ = self.parse()
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))))
        folder = self.hub.repositories[f"{kind}/{name}"]
        found = [folder / name for name in body.get("paths", [])]
        self.answer(self.describe(folder, [p for p in found if p.exists()]))

    def parse(self) -> tuple[str, str, list[str]]:
        """Return whether a request is of datasets or models, the name of the repository, and what follows it."""
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        if words[0] == "api":
            kind, words = words[1], words[2:]
        else:
            kind, words = (words[0], words[1:]) if words[0] == "datasets" else ("models", words)
        return kind, "/".join(words[:2]), words[2:]

    def describe(self, folder: Path, paths: list[Path]) -> list[dict[str, object]]:
        return [
            {
                "type": "file" if p.is_file() else "directory",
                "path": str(p.relative_to(folder)),
                "size": p.stat().st_size if p.is_file() else 0,
                "oid": p.name,
            }
            for p in paths
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

    def send_content(self, path: Path, entry: str) -> None:
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
        self.send_header("etag", f'"{entry.replace("/", "-")}{self.hub.sha}"')
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


def _list(folder: Path, query: str) -> list[Path]:
    """Return what is in a folder, and in those below it where the query asks for that."""
    if not folder.is_dir():
        return []
    return sorted(folder.rglob("*") if "recursive=true" in query.lower() else folder.iterdir())
