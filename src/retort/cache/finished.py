"""Where the finished cache is that a person names."""

from pathlib import Path

from retort.cache.reader import CACHE_FILE

MANIFEST = "manifest.json"


def find_cache(path: Path) -> Path | None:
    """Return the folder of a finished cache: this one, or that of its manifest.json or teacher_logits.h5.

    Raises ValueError for a cache that is not finished.
    """
    folder = path.parent if path.name in (MANIFEST, CACHE_FILE) else path
    files = [(folder / name).exists() for name in (MANIFEST, CACHE_FILE)]
    if any(files) and not all(files):
        raise ValueError(
            f"{folder} is not a finished cache: it needs both {MANIFEST} and {CACHE_FILE}."
        )
    return folder if all(files) else None
