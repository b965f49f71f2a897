"""What was really found in a model folder: a digest of its weights, and one of its tokenizer.

A fingerprint is recorded inside an artifact and compared again whenever the artifact is used.
"""

import os
from pathlib import Path

from retort.io.digests import digest, digest_file, hash_file

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def _weights_memo() -> Path | None:
    """Where the digests of weights are remembered: jobs know no results folder, and projects share teachers.

    None for a user without a home: in some containers nobody knows who it is.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(cache) / "retort" / "digests.json"


def list_weights(folder: Path) -> list[Path]:
    """Return the files that hold a model's weights and architecture."""
    weights = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    return [p for p in (folder / "config.json", *weights) if p.exists()]


def fingerprint_weights(folder: Path) -> str:
    """Return the fingerprint of the weights and the architecture in a model folder.

    Raises ValueError when the folder holds no weights.
    """
    files = list_weights(folder) if folder.is_dir() else []
    if not any(path.suffix in WEIGHT_SUFFIXES for path in files):
        raise ValueError(
            f"no model weights in {str(folder)!r}: expected a folder with config.json and *.safetensors "
            "(or *.bin), as save_pretrained() writes it. Give such a folder or a Hub id."
        )
    return digest([[p.name, digest_file(p, memo=_weights_memo())] for p in files])


def fingerprint_tokenizer(folder: Path) -> str:
    """Return the fingerprint of the tokenizer in a folder (its files' bytes, not just its size)."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not files:
        raise ValueError(
            f"no tokenizer in {str(folder)!r}: expected tokenizer.json or another of "
            f"{', '.join(TOKENIZER_FILES)}."
        )
    return digest([[p.name, hash_file(p)] for p in files])
