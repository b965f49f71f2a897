"""Where a result comes from: digests of values, files and weights, and the run.json beside every output.

Two kinds of name are kept apart. An *identity* is a digest of the config keys that define an artefact; it is
known when the Snakefile is parsed and names the artefact's folder (room `artefacts`). A *fingerprint* is a
digest of what was really found on disk (a teacher's weights, a tokenizer's files, a corpus); it is recorded
inside the artefact and compared again whenever the artefact is used.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import xxhash

_BLOCK_BYTES = 1 << 20
_PIECE_BYTES, _FLUSHED_BYTES = 1 << 17, 1 << 22
# Corpora and weights are hashed whole (an edit may touch one byte, or one layer); above this size the digest is
# remembered by the file's size and times, so that only the first look pays. The change time is among them: it cannot
# be set back.
_MEMO_BYTES = 16 << 20

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


def digest(value: Any) -> str:
    """Return 12 hex digits that name a JSON-like value; equal values give equal names on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digest_file(path: Path, *, memo: Path | None = None) -> str:
    """Return 32 hex digits (xxh3-128) of a file's bytes.

    `memo` names a JSON file in which digests of large files are remembered by size and times. It only saves time:
    one that cannot be read or written is done without.
    """
    status = path.stat()
    if memo is None or status.st_size < _MEMO_BYTES:
        return _hash_whole(path)
    key = str(path.resolve())
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = read_json(memo)
    if known.get(key, [])[:-1] != stamp:
        known[key] = [*stamp, _hash_whole(path)]
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(memo, known)
    return str(known[key][-1])


def stamp_files(paths: Iterable[Path]) -> str:
    """Return a digest of the files' names, sizes and times: another one says that something was written meanwhile.

    The change time is among them: no program can set it back.
    """
    states = [(path, path.stat()) for path in paths]
    return digest([[str(p), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for p, s in states])


def digest_folder(folder: Path) -> dict[str, str]:
    """Return the digest of every file in a folder, by its name within."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _hash_whole(path) for path in files}


def compare_digests(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return what differs, in words; nothing for equal digests. Files that nobody recorded do not count."""
    return [
        f"{name} is {'missing' if name not in found else 'not what was written'}"
        for name in recorded
        if recorded[name] != found.get(name)
    ]


def _hash_whole(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


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
    return digest([[p.name, _hash_whole(p)] for p in files])


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError that names it when it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): delete it and run the same command again."
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: a reader finds the old file or the new one, never half of one."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write bytes: a reader finds the old file or the new one."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        write_pieces(file, memoryview(content))


def write_pieces(file: BinaryIO, content: memoryview) -> None:
    """Write bytes in pieces of 128 KiB, of which every 4 MiB are sent to the disk while the next ones are written.

    A larger write asks the kernel's page cache for larger blocks of memory. Once memory is fragmented, collecting them
    takes longer than the writing: 1.1 GB in pieces of 512 KiB took 0.4 to 1.4 s, in pieces of 128 KiB 0.4 to 0.7
    (Linux 6.18, ext4), fsync included, which has little left to wait for.
    """
    for first in range(0, len(content), _FLUSHED_BYTES):
        block, place = content[first : first + _FLUSHED_BYTES], file.tell()
        for at in range(0, len(block), _PIECE_BYTES):
            file.write(block[at : at + _PIECE_BYTES])
        if hasattr(os, "posix_fadvise"):  # not on macOS
            file.flush()
            os.posix_fadvise(file.fileno(), place, len(block), os.POSIX_FADV_DONTNEED)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it is flushed to the disk and renamed to `path` when the block ends.

    Where the block fails, nothing is left behind and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def held(
    path: Path, *, busy: str, say: Callable[[str], None], patience_s: float = 0.0
) -> Iterator[None]:
    """Hold a lock file for as long as the block; say `busy` where another process holds it longer than that.

    Raises ValueError where the file system keeps no locks.
    """
    # Not the soft lock that filelock falls back to without flock: it would outlive a killed process.
    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience_s)
    except filelock.Timeout:
        say(busy)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise ValueError(
            f"{path} cannot be locked: its file system keeps no locks (flock), so two jobs could write there at once. "
            "Ask for a mount with them (Lustre: -o flock), or set output.results_dir and output.cache_dir to another "
            "disk that all nodes see."
        ) from None
    try:
        yield
    finally:
        lock.release()


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` that no other process on any node uses."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def remove_stale_temporaries(folder: Path, *, older_than_s: float = 3600.0) -> None:
    """Remove what killed writers left in `folder`; younger files of others than the dead of this node stay."""
    now = time.time()
    for path in folder.glob(".*.tmp"):
        node, _, process = path.name.removesuffix(".tmp").rpartition(".")
        is_dead = (
            node.endswith(f".{platform.node()}") and process.isdigit() and has_ended(int(process))
        )
        if is_dead or now - path.stat().st_mtime > older_than_s:
            path.unlink(missing_ok=True)


def has_ended(process: int) -> bool:
    """Say whether no process of this node has that number."""
    try:
        os.kill(process, 0)
    except OSError as error:  # PermissionError: it is alive, and somebody else's
        return isinstance(error, ProcessLookupError)
    return False


def is_path(name: str) -> bool:
    """Say whether a model's name can only be a path: a Hub id has one slash at most, and none of these beginnings."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def suggest_path(path: Path) -> str:
    """Return " Did you mean 'x'?" of the nearest name beside a path that does not exist, or nothing."""
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1)
    return f" Did you mean {str(path.parent / near[0])!r}?" if near else ""


def refuse_file_in_the_way(folder: Path) -> None:
    """Raise ValueError where a file stands at `folder` or above it; nothing is made."""
    nearest = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    if not nearest.is_dir():
        raise _not_writable(folder, f"{nearest} is a file")


def require_writable(folder: Path) -> None:
    """Make `folder` and try to write in it. Raises ValueError when that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(folder, str(error.strerror)) from None


def _not_writable(folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"cannot write to {str(folder.resolve())!r} ({reason}): free space or change its rights, or set "
        "output.results_dir and output.cache_dir to folders of yours."
    )


def describe_run(
    *, section: Mapping[str, Any], seed: int | None, device: str, seconds: float
) -> dict[str, Any]:
    """Return what run.json says of one output: who made it, from what, with which versions, where, how long."""
    commit, is_dirty = _git_state()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit,
        "uncommitted_changes": is_dirty,
        "config": dict(section),
        "seed": seed,
        "device": device,
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": _versions(
            ("torch", "transformers", "tokenizers", "datasets", "numpy", "h5py", "snakemake")
        ),
    }


def _git_state() -> tuple[str | None, bool | None]:
    """Return (commit, has uncommitted changes) of the checkout that this package lies in, or (None, None)."""
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
