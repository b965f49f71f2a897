"""`retort publish`: a finished student, or a cache, to the Hugging Face Hub, with its card, private unless said.

The token is that of huggingface_hub: the variable HF_TOKEN, or `hf auth login`.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    DatasetCard,
    DatasetCardData,
    HfApi,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from retort.cache.finished import MANIFEST, find_cache
from retort.cache.reader import CACHE_FILE, LogitCache
from retort.cli import first_line
from retort.config.schema import flatten
from retort.corpus.hub import is_transient
from retort.evaluation.card import add_scores
from retort.io.digests import digest
from retort.io.files import format_json, is_path, read_json
from retort.io.run_record import RUN_FILE
from retort.io.units import format_bytes
from retort.pipeline.finished import Student, find_student
from retort.teacher.records import Manifest
from retort.training.model_card import CARD, MODEL

_ADAPTER = "adapter/adapter_config.json"  # of LoRA; it names the model that the adapters are of
_DATASET_CARD = """---
{{ card_data }}
---

# {{ name }}

The distributions of a language model, the teacher, at every position of a training text, as Retort stores them for
distillation. The text is in it too, as token ids.

| | |
|---|---|
{% for key, value in facts.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
To train a student on it, the tokens that it was made from are needed too, whose `index.json` has the content above:
`retort train --signal manifest.json --index index.json`.

Licence: **fill in** (here, and `license:` at the top of this file): that of the teacher and that of the text bind it.
"""


class Upload(NamedTuple):
    """Files of a repository: path in it -> path here, or content."""

    kind: str  # "model" or "dataset"
    files: Mapping[str, Path | bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size
            for name, file in self.files.items()
        }


def publish(
    path: Path,
    repo: str,
    *,
    is_public: bool = False,
    revision: str | None = None,
    is_sure: bool = False,
    api: HfApi | None = None,
) -> str:
    """Upload what `path` is the folder of in one commit, and return its address.

    Files that an interrupted upload had finished are not sent again. On a terminal it asks before, unless `is_sure`.
    Raises ValueError when nothing there is finished, files are not those that were written, there is no token, the
    repository is public and `is_public` is not set, or the other way round, the connection breaks, and with what the
    Hub answered.
    """
    api = api or HfApi()
    token = get_token()
    if token is None:
        raise ValueError(
            "there is no token of the Hub: set the variable HF_TOKEN, or run hf auth login."
        )
    upload = _collect(path, repo)
    try:
        exists = _require_visibility(api, repo, upload.kind, is_public=is_public)
        _show(upload, repo, is_public=is_public, exists=exists)
        if (
            not is_sure
            and sys.stdin.isatty()
            and input("Upload? [y/N] ").strip().lower() not in ("y", "yes")
        ):
            raise ValueError("nothing was uploaded.")
        if not exists:
            api.create_repo(repo, repo_type=upload.kind, private=not is_public)
        if revision:
            api.create_branch(repo, repo_type=upload.kind, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, file) for name, file in upload.files.items()]
        done = api.create_commit(
            repo,
            operations,
            repo_type=upload.kind,
            revision=revision,
            commit_message=f"Upload of a {'student' if upload.kind == 'model' else 'logit cache'} by Retort",
        )
    except (HfHubHTTPError, HFValidationError, RuntimeError) as error:
        # A server may repeat a header.
        raise ValueError(f"the Hub refused {repo!r}: {error}".replace(token, "***")) from None
    except Exception as error:
        if not is_transient(error):
            raise
        raise ValueError(
            f"the connection to the Hub broke ({first_line(error)}). Type the same command again: files that arrived "
            "are not sent again.".replace(token, "***")
        ) from None
    return str(done.commit_url)


def _require_visibility(api: HfApi, repo: str, kind: str, *, is_public: bool) -> bool:
    """Return whether the repository exists. Raises ValueError when others can read it and should not, or cannot."""
    try:
        is_private = api.repo_info(repo, repo_type=kind).private
    except RepositoryNotFoundError:
        return False
    if not is_private and not is_public:
        raise ValueError(
            f"{repo!r} exists and is public: give --public to upload to it, or another --repo."
        )
    if is_private and is_public:
        raise ValueError(
            f"{repo!r} exists and is private: leave --public out, and make it public in its settings on the Hub."
        )
    return True


def _show(upload: Upload, repo: str, *, is_public: bool, exists: bool) -> None:
    print(
        f"{'To' if exists else 'To the new'} {upload.kind} {repo}, {'public' if is_public else 'private'}:"
    )
    for name, size in upload.sizes.items():
        print(f"  {size:>15,}  {name}")
    print(f"  {sum(upload.sizes.values()):>15,}  bytes in {len(upload.files)} files", flush=True)


def _collect(path: Path, repo: str) -> Upload:
    if cache := find_cache(path):
        return _collect_cache(cache, repo)
    student = find_student(path)
    files: dict[str, Path | bytes] = dict(_list_files(student.folder))
    files[CARD] = _write_student_card(student, repo).encode()
    if (path := student.folder / _ADAPTER).exists():
        files[_ADAPTER] = _name_base(path)
    return Upload("model", files)


def _list_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), path


def _write_student_card(student: Student, repo: str) -> str:
    """Return the card as it is uploaded: with the newest numbers, and the id that loads it. The file stays as it is."""
    path = student.folder / CARD
    if not path.exists():
        raise ValueError(
            f"{path} is gone, and a published student needs its card: restore it, or write one."
        )
    text = path.read_text(encoding="utf-8")
    if student.metrics:
        text = add_scores(text, student.metrics)
    return _hide_paths(text, student.folder.with_name(RUN_FILE)).replace(MODEL, repo)


def _name_base(path: Path) -> bytes:
    """Return a file of peft's with a Hub id, or the name of a local folder, as the model that its adapters are of."""
    settings = read_json(path)
    key = "base_model_name_or_path"
    base = str(settings.get(key))
    return format_json(settings | {key: Path(base).name if _is_local(base) else base})


def _is_local(model: str) -> bool:
    return is_path(model) or Path(model).is_dir() or "/" not in model


def _hide_paths(text: str, record: Path) -> str:
    """Return a card with the names of local files and folders for their paths, which earlier versions wrote."""
    if not record.exists():
        return text
    values = (value for _, value in flatten(read_json(record).get("config", {})))
    paths = {value for value in values if isinstance(value, str) and is_path(value)}
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return text


def _collect_cache(folder: Path, repo: str) -> Upload:
    """Return the files of a cache. Raises ValueError when it is virtual, or the two do not belong together."""
    manifest, path = Manifest.read(folder / MANIFEST), folder / CACHE_FILE
    if manifest.mode == "virtual":
        raise ValueError(
            f"{path} is virtual: its records are in the parts. Set merge.mode: copy, delete {folder / MANIFEST} and "
            f"{path}, and rerun the workflow: only the merge is done again."
        )
    cache = LogitCache(path)
    if cache.stored:
        raise ValueError(
            f"{path} has its records in a store ({cache.stored[0].url}, ...), and the Hub takes whole files: "
            "publish the folder that retort export-parquet writes."
        )
    size = path.stat().st_size
    if size != manifest.file_bytes or digest(cache.header.to_json()) != digest(manifest.header):
        raise ValueError(
            f"{path} is not the cache that {folder / MANIFEST} describes ({size:,} bytes, {manifest.file_bytes:,} "
            "there). Delete both and rerun the workflow: the merge is done again."
        )
    card = _write_cache_card(folder, manifest, repo)
    return Upload("dataset", {CACHE_FILE: path, MANIFEST: folder / MANIFEST, CARD: card.encode()})


def _write_cache_card(folder: Path, manifest: Manifest, repo: str) -> str:
    header = manifest.header
    facts: dict[str, Any] = {
        "teacher": _find_teacher(folder),
        "teacher's weights": header["teacher"],
        "tokenizer": header["tokenizer"],
        "tokens": header["tokens"],
        "method": manifest.method,
        "positions": f"{manifest.positions:,} in {manifest.sequences:,} sequences",
        "bytes a position": f"{manifest.bytes_per_position:.1f} ({format_bytes(manifest.file_bytes)} in all)",
    }
    if manifest.fidelity:
        facts["KL(live teacher, cache)"] = f"{manifest.fidelity.kl:.2g} nats"
        facts["top-1 agreement with the live teacher"] = f"{manifest.fidelity.agreement:.2%}"
    card = DatasetCard.from_template(
        DatasetCardData(tags=["retort", "distillation", "logits"], pretty_name=repo.split("/")[-1]),
        template_str=_DATASET_CARD,
        name=repo.split("/")[-1],
        facts=facts,
    )
    return str(card)


def _find_teacher(folder: Path) -> str:
    """Return the teacher's Hub id as a link, or the name of its folder, from the record of the cache's workers."""
    path = folder / RUN_FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r'"model_path": ("(?:[^"\\]|\\.)*")', text)
    if not found:
        return "not recorded"
    name = json.loads(found[1])
    if _is_local(name):
        return f"`{Path(name).name}` (local)"
    return f"[{name}](https://huggingface.co/{name})"
