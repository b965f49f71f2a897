"""The Hub on 127.0.0.1 that takes uploads too: repositories are made, files sent by LFS, and committed."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.hub import Hub, _Handler, answer

TOKEN = "hf_" + "secret" * 5


@dataclass
class UploadHub(Hub):
    """A Hub with an account whose token is TOKEN; repositories are folders below `folder`."""

    folder: Path = Path()
    private: set[str] = field(default_factory=set)
    received: list[str] = field(default_factory=list)  # names of files that were sent
    lost: int = 0  # uploads that fail with a server's error before one succeeds
    seen: list[str] = field(default_factory=list)  # methods and paths of requests

    def create(self, key: str, *, is_private: bool) -> None:
        self.repositories[key] = self.folder / key
        self.repositories[key].mkdir(parents=True)
        if is_private:
            self.private.add(key)


@contextmanager
def serve_uploads(folder: Path) -> Iterator[UploadHub]:
    """Serve an empty Hub within the block."""
    hub = UploadHub({}, folder=folder / "hub", home=folder / "home")
    (hub.folder / "lfs").mkdir(parents=True)
    with answer(hub, _Uploads):
        yield hub


class _Uploads(_Handler):
    hub: UploadHub

    def do_GET(self) -> None:  # noqa: N802
        self.hub.seen.append(f"{self.command} {self.path}")
        kind, name, words = self.parse()
        key = f"{kind}/{name}"
        if key in self.hub.private and not self.is_owner():
            self.answer({"error": "not found"}, 401, X_Error_Code="RepoNotFound")
        elif (
            self.path.startswith("/api/")
            and words[:1] in ([], ["revision"])
            and key in self.hub.repositories
        ):
            folder = self.hub.repositories[key]
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            names = [{"rfilename": str(p.relative_to(folder))} for p in files]
            about = {"id": name, "sha": self.hub.sha, "private": key in self.hub.private}
            self.answer(about | {"gated": False, "disabled": False, "tags": [], "siblings": names})
        else:
            super().do_GET()

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:  # noqa: N802
        self.hub.seen.append(f"POST {self.path}")
        body = self.read_body()
        if not self.is_owner():
            sent = self.headers.get("authorization")
            self.answer({"error": f"Invalid username or password: {sent}"}, 401)
            return
        path = self.path.partition("?")[0]
        kind, name, words = self.parse()
        if path == "/api/repos/create":
            self.create_repo(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate_card(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.offer_uploads(json.loads(body))
        elif words[:1] == ["preupload"]:
            self.choose_modes(json.loads(body))
        elif words[:1] == ["branch"]:
            self.answer({})
        elif words[:1] == ["commit"]:
            self.commit(f"{kind}/{name}", [json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": "not found"}, 404)

    def do_PUT(self) -> None:  # noqa: N802
        oid = Path(self.path).name
        body = self.read_body()
        if self.hub.lost > 0:
            self.hub.lost -= 1
            self.answer({"error": "lost"}, 400)
            return
        assert hashlib.sha256(body).hexdigest() == oid
        (self.hub.folder / "lfs" / oid).write_bytes(body)
        self.hub.received.append(oid)
        self.answer({})

    def is_owner(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def read_body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def create_repo(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        key = f"{asked.get('type', 'model')}s/{name}"
        if key in self.hub.repositories:
            self.answer({"error": "You already created this repo"}, 409)
            return
        self.hub.create(key, is_private=asked.get("visibility") == "private")
        self.answer({"url": f"{self.hub.endpoint}/{key.removeprefix('models/')}"})

    def validate_card(self, asked: dict[str, Any]) -> None:
        """Refuse what the Hub refuses: metadata without an end, and a licence that it does not know."""
        import yaml

        data = yaml.safe_load(asked["content"].split("---")[1]) or {}
        if data.get("license") not in (None, "mit", "apache-2.0", "other"):
            self.answer({"errors": [{"message": '"license" must be one of [...]'}]}, 400)
            return
        self.answer({"errors": [], "warnings": []})

    def choose_modes(self, asked: dict[str, Any]) -> None:
        modes = {
            f["path"]: "lfs" if f["path"].endswith((".safetensors", ".h5")) else "regular"
            for f in asked["files"]
        }
        files = [
            {"path": path, "uploadMode": mode, "shouldIgnore": False}
            for path, mode in modes.items()
        ]
        self.answer({"files": files})

    def offer_uploads(self, asked: dict[str, Any]) -> None:
        objects = []
        for known in asked["objects"]:
            offer: dict[str, Any] = {"oid": known["oid"], "size": known["size"]}
            if not (self.hub.folder / "lfs" / known["oid"]).exists():
                href = f"{self.hub.endpoint}/lfs/{known['oid']}"
                offer["actions"] = {"upload": {"href": href}}
            objects.append(offer)
        self.answer({"objects": objects, "transfer": "basic"})

    def commit(self, key: str, lines: list[dict[str, Any]]) -> None:
        folder = self.hub.repositories[key]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                continue
            target = folder / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "lfsFile":
                target.write_bytes((self.hub.folder / "lfs" / value["oid"]).read_bytes())
            else:
                target.write_bytes(base64.b64decode(value["content"]))
        url = f"{self.hub.endpoint}/{key.removeprefix('models/')}/commit/{self.hub.sha}"
        self.answer({"commitUrl": url, "commitOid": self.hub.sha, "success": True})
