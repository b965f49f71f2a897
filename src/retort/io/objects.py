"""Objects in a store such as S3, by fsspec: written whole or not at all, and read by ranges of bytes.

A place is a URL, such as s3://bucket/prefix/name or gs://bucket/prefix/name. Who asks, where, and by which endpoint are
settings of the machine (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AWS_ENDPOINT_URL, ...), never of a config,
which is published with results. Requests that fail are repeated by the store's client for some seconds, and here for
two minutes if the store cannot be reached or is busy: a training of days must not end by that. Every error in the end
is one ValueError.
"""

import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

logger = logging.getLogger(__name__)


class _Service(NamedTuple):
    """How the stores of a kind of URL are used: what pip installs, and how a job gets credentials and the address."""

    package: str
    credentials: str
    address: str


_SERVICES = {
    "s3": _Service(
        "s3fs",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment of every job",
        "AWS_ENDPOINT_URL if it is not Amazon's",
    ),
    "gs": _Service(
        "gcsfs",
        "type gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS, the file of a service "
        "account's key, in the environment of every job",
        "STORAGE_EMULATOR_HOST if it is not Google's",
    ),
}
_PIECE_BYTES = 64 << 20  # of an object that is read back; S3 gives some 80 MB/s to a request
_MOST_AT_ONCE = 64  # requests
_PAUSES_S = (1, 2, 5, 10, 30, 60)
_UNREACHABLE = {
    *("EndpointConnectionError", "ConnectionError", "ConnectTimeoutError", "TimeoutError"),
    *("ConnectionClosedError", "ReadTimeoutError", "HTTPClientError", "ClientConnectionError"),
}
_NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"),
    *("DefaultCredentialsError", "RefreshError"),
}
_T = TypeVar("_T")


class ByteRange(NamedTuple):
    """Bytes `start` to before `stop` of an object."""

    url: str
    start: int
    stop: int


def upload(path: Path, url: str) -> None:
    """Write a file as an object, read it back, and compare the two.

    The object appears whole, at the end of the upload, or not at all. Raises ValueError when that fails, or when the
    object is not the file; then it is removed.
    """
    with path.open("rb") as file:
        sent, size = hashlib.file_digest(file, "sha256").digest(), file.tell()

    def send(files: Any) -> bool:
        files.put_file(str(path), url)
        stored = hashlib.sha256()
        for start in range(0, size, _PIECE_BYTES):
            stored.update(files.cat_file(url, start=start, end=min(start + _PIECE_BYTES, size)))
        is_same = stored.digest() == sent and files.info(url)["size"] == size
        if not is_same:
            files.rm_file(url)
        return bool(is_same)

    if not _ask(url, send):
        raise ValueError(
            f"{url} was not stored as it was sent: the network or the store failed. Rerun the same command."
        )


def download(url: str, path: Path) -> None:
    """Write an object to a file, which may be a part of it when this is interrupted."""
    _ask(url, lambda files: files.get_file(url, str(path)))


def read_ranges(ranges: Sequence[ByteRange]) -> list[bytes]:
    """Return the bytes of each range; all are asked for at the same time. Raises ValueError when one is missing."""
    if not all(wanted.stop > wanted.start for wanted in ranges):  # a request cannot be for no bytes
        some = iter(read_ranges([wanted for wanted in ranges if wanted.stop > wanted.start]))
        return [next(some) if wanted.stop > wanted.start else b"" for wanted in ranges]
    if not ranges:
        return []
    urls, starts, stops = map(list, zip(*ranges, strict=True))
    options = {"batch_size": _MOST_AT_ONCE, "on_error": "raise"}
    found: list[bytes] = _ask(
        urls[0], lambda files: files.cat_ranges(urls, starts, stops, **options)
    )
    for wanted, content in zip(ranges, found, strict=True):
        if len(content) != wanted.stop - wanted.start:
            raise ValueError(
                f"{wanted.url} ends before byte {wanted.stop}: another file was written in its place."
            )
    return found


def list_sizes(folder: str) -> dict[str, int]:
    """Return the size in bytes of each object in a folder, by its name; none if there is no such folder."""

    def look(files: Any) -> list[dict[str, Any]]:
        files.invalidate_cache()
        try:
            return list(files.ls(folder, detail=True))
        except FileNotFoundError as error:
            if _is_bucket_missing(folder, error):
                raise
            return []

    sizes = {entry["name"].rpartition("/")[2]: entry["size"] for entry in _ask(folder, look)}
    return {name: size for name, size in sizes.items() if name}


def require_usable(folder: str) -> None:
    """Write, read and remove a small object in a folder. Raises ValueError when that fails."""
    url = f"{folder}/.retort-{os.urandom(8).hex()}"
    content = b"written by Retort to see whether it may write here"
    with _explained(folder) as files:
        files.pipe_file(url, content)
        found = files.cat_file(url)
        files.rm_file(url)
    if found != content:
        raise ValueError(f"{url} was not stored as it was sent: see what {folder} is.")


def _ask(url: str, work: Callable[[Any], _T]) -> _T:
    """Return what `work` makes of the file system of a URL; repeat it where the store does not answer."""
    for pause_s in _PAUSES_S:
        try:
            with _explained(url) as files:
                return work(files)
        except _SilentStoreError as error:
            logger.warning(f"{error} Trying again in {pause_s} s.")
            time.sleep(pause_s)
    with _explained(url) as files:
        return work(files)


class _SilentStoreError(ValueError):
    """The store cannot be reached, or says that it is busy."""


@contextmanager
def _explained(url: str) -> Iterator[Any]:
    """Yield the file system of a URL; any of its errors becomes a ValueError that says what is wrong."""
    protocol = url.partition("://")[0]
    # Objects are all that is asked for; what gcsfs tries of other kinds of buckets is a request more for each client.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec

        # The same one for all calls of a thread; a forked process gets its own.
        files = fsspec.filesystem(protocol)
    except ImportError:
        package = _SERVICES[protocol].package
        raise ValueError(
            f"{url} is in a store that is reached by {package}, which is not installed here. Type: pip install "
            f"{package}"
        ) from None
    try:
        yield files
    except ValueError:
        raise
    except Exception as error:
        kind = _SilentStoreError if _is_silent(error) else ValueError
        raise kind(_explain(url, error)) from error


def _is_bucket_missing(url: str, error: BaseException) -> bool:
    """Say whether an error is about a bucket. gcsfs names what it asked for, which ends in /o for a whole bucket."""
    said = str(error).lower()
    is_about = said.endswith("/o") if url.startswith("gs:") else "bucket" in said
    return isinstance(error, FileNotFoundError) and is_about


def _name_kinds(error: Exception) -> set[str]:
    """Return the names of an error's classes, which are those of fsspec and of a store's client."""
    return {kind.__name__ for one in (error, error.__cause__) for kind in type(one).__mro__}


def _is_silent(error: Exception) -> bool:
    is_busy = isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.EIO)
    return is_busy or bool(_name_kinds(error) & _UNREACHABLE)


def _explain(url: str, error: Exception) -> str:
    """Return what a failed request means, in a sentence."""
    kinds = _name_kinds(error)
    protocol, _, place = url.partition("://")
    bucket, service = place.partition("/")[0], _SERVICES[protocol]
    is_anonymous = getattr(error, "code", None) == 401
    if is_anonymous or kinds & _NO_CREDENTIALS:
        return f"{url} cannot be used without credentials, of which there are none here: {service.credentials}."
    if _is_bucket_missing(url, error):
        return f"{url}: there is no bucket {bucket!r}. Make it first, or correct its name."
    if "PermissionError" in kinds or str(error).startswith("Forbidden"):
        return (
            f"{url}: the store refuses these credentials ({error}). They must be allowed to list the bucket "
            f"{bucket!r}, and to write, read and remove objects below that prefix."
        )
    if kinds & _UNREACHABLE:
        return f"{url}: the store cannot be reached ({error}). See to the network, and to {service.address}."
    if "FileNotFoundError" in kinds:
        return f"{url} does not exist any more, or is not the object that it was."
    return f"{url} cannot be used: {error}."
