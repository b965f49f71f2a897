"""Runs that learn from an imported cache (`retort import`): its folder has what the rules make for others."""

from pathlib import Path

from retort.artifacts.project import Corpus, Tokens
from retort.config.sections import Config
from retort.io.digests import digest
from retort.io.files import read_json, suggest_path

_NEEDED = ("manifest.json", "teacher_logits.h5", "import.json", "tokens/index.json", "tokenizer")


def find_import(config: Config) -> Path:
    """Return the folder of `teacher.imported`. Raises ValueError when no finished import is there."""
    folder = Path(str(config.teacher.imported))
    missing = [name for name in _NEEDED if not (folder / name).exists()]
    if missing:
        found = f"has no {missing[0]}" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"teacher.imported {str(folder)!r} {found} (looked in {Path.cwd()}).{suggest_path(folder)} Give the folder "
            "that `retort import` wrote to its end."
        )
    return folder


def build_imported_tokens(config: Config, folder: Path) -> tuple[Tokens, str]:
    """Return the tokens of an import, which no rule makes, and the id of its cache: both count by content.

    Raises ValueError when a record cannot be read.
    """
    manifest, index = read_json(folder / "manifest.json"), read_json(folder / "tokens/index.json")
    try:
        content, cache = manifest["header"]["tokens"], manifest["sha256"]
        longest = max(index[split]["longest"] for split in ("train", "val"))
        is_same = index["content"] == content
    except (KeyError, TypeError):
        content = cache = longest = None
        is_same = False
    if not is_same:
        raise ValueError(
            f"teacher.imported {str(folder)!r}: manifest.json and tokens/index.json are not of one import. Import it "
            "again into another folder."
        )
    dataset = config.dataset.model_copy(
        update={"tokenizer": str(folder / "tokenizer"), "max_length": longest}
    )
    tokens_id = digest(["imported", content])
    corpus = Corpus(tokens_id, folder / "tokens", dataset, needs_snapshot=False, stamp="")
    tokens = Tokens(tokens_id, folder / "tokens", corpus, teacher=None, fingerprint=None)
    return tokens, digest(["imported", cache])


def complete_import(config: Config) -> Config:
    """Return the config with the tokenizer and the longest sequence of what was imported.

    Raises ValueError as `find_import` and `build_imported_tokens` do.
    """
    tokens, _ = build_imported_tokens(config, find_import(config))
    return config.model_copy(update={"dataset": tokens.corpus.dataset})
