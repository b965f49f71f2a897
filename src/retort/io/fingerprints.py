"""Digests of the weights and of the tokenizer in a model folder.

A fingerprint is recorded in each artifact that a model makes, and compared whenever the artifact is used.
"""

import os
from contextlib import suppress
from pathlib import Path

from retort.io.digests import digest, digest_file, hash_file
from retort.io.records import Entry, Record

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
# All that a tokenizer may be read from: vocabularies, merges, special tokens, chat templates, custom code.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab*",
    "*vocab*.json",
    "*merges*",
    "*.model",
    "*.model.v*",
    "*.spm",
    "*.tiktoken",
    "*.codes",
    "*.tokenizer",
    "tekken.json",
    "normalizer.json",
    "byte_maps.json",
    "emoji.json",
    "word_*.json",
    "dict.txt",
    "tokenization*.py",
)


class TokenizerIdentity(Entry):
    """Which tokenizer: the digest of its files (of a Hub tokenizer's vocabulary), and its number of tokens."""

    fingerprint: str
    size: int


class TeacherRecord(Record, format="retort-teacher", version=2):
    """fingerprint.json of a teacher: a folder, or a Hub id (`name`) at the commit `revision`.

    weights: their fingerprint. vocabulary: width of the output layer.
    """

    weights: str
    revision: str | None
    name: str
    tokenizer: TokenizerIdentity
    vocabulary: int


def _list_memos(record: Path | None = None) -> list[Path]:
    """Return the files that cache digests of weights: one for all projects of a user, and one beside a record.

    The first is missing for a user without a home, as in containers whose user is not in /etc/passwd, and nodes of a
    cluster need not share it; the second lies on the disk of the results, which they do.
    """
    memos = [] if record is None else [record.with_name("digests.json")]
    with suppress(RuntimeError):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        memos.append(Path(cache) / "retort" / "digests.json")
    return memos


def describe_model_file(path: Path) -> str:
    """Return the end of a message about a model that was given as a file: what it is, and what to give instead."""
    folder = "Give the folder that save_pretrained() wrote, or a Hub id"
    if path.suffix == ".gguf":
        return (
            "a GGUF file, the quantized weights of llama.cpp, and is not read. Give the model that it was made from: a "
            "folder that save_pretrained() wrote, or a Hub id."
        )
    if path.suffix in (*WEIGHT_SUFFIXES, ".json", ".model"):
        return f"one file of a model. {folder}: here perhaps {str(path.parent)!r}."
    if path.suffix in (".zip", ".gz", ".tar", ".tgz", ".zst", ".xz"):
        return "an archive. Unpack it, and give the folder with config.json and the weights."
    return f"a file, not a model. {folder}."


def list_weights(folder: Path) -> list[Path]:
    """Return config.json, if there, and the files with weights in a model folder."""
    weights = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    return [p for p in (folder / "config.json", *weights) if p.exists()]


def fingerprint_weights(folder: Path, *, record: Path | None = None) -> str:
    """Return the fingerprint (12 hex digits) of the weights and config.json in a model folder.

    `record`: the model's record in the results, beside which digests of large files are cached for all nodes.
    Raises ValueError when the folder has no weights.
    """
    files = list_weights(folder) if folder.is_dir() else []
    if not any(path.suffix in WEIGHT_SUFFIXES for path in files):
        raise ValueError(
            f"no model weights in {str(folder)!r}: expected a folder with config.json and *.safetensors (or *.bin), "
            "as save_pretrained() writes it (GGUF is not read). Give such a folder or a Hub id."
        )
    return digest([[p.name, digest_file(p, memos=_list_memos(record))] for p in files])


def fingerprint_checkpoint(folder: Path) -> str:
    """Return the fingerprint (12 hex digits) of all files of a training's checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    memos = _list_memos()
    return digest([[p.relative_to(folder).as_posix(), digest_file(p, memos=memos)] for p in files])


def list_tokenizer_files(folder: Path) -> list[Path]:
    """Return the files in a model folder that decide a tokenizer's ids or how it renders chats."""
    found = [p for name in TOKENIZER_FILES for p in sorted(folder.glob(name)) if p.is_file()]
    return list(dict.fromkeys(found))


def fingerprint_tokenizer(folder: Path) -> str:
    """Return the fingerprint (12 hex digits) of the tokenizer's files in a folder, by their bytes.

    Raises ValueError when there is none.
    """
    files = list_tokenizer_files(folder)
    if not files:
        raise ValueError(
            f"no tokenizer in {str(folder)!r}: expected tokenizer.json, tokenizer.model, vocab.txt or other files of "
            "a tokenizer, as save_pretrained() writes them."
        )
    return digest([[p.relative_to(folder).as_posix(), hash_file(p)] for p in files])
