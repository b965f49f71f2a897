"""Objects in a store that speaks S3, which runs in a process of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from retort.io.objects import (
    ByteRange,
    download,
    list_sizes,
    read_ranges,
    require_usable,
    upload,
)
from support.store import BUCKET, Store, Wire

FOLDER = f"s3://{BUCKET}/objects"


@pytest.fixture
def fresh_clients() -> Iterator[None]:
    """Let the test's client, and the one after it, look at the environment."""
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


def make_file(path: Path, size: int = 1000) -> Path:
    path.write_bytes(bytes(number % 251 for number in range(size)))
    return path


def test_a_file_is_stored_read_by_ranges_and_listed(store: Store, tmp_path: Path) -> None:
    file = make_file(tmp_path / "file")
    url = f"{FOLDER}/first/file.h5"
    upload(file, url)
    ranges = [ByteRange(url, 0, 10), ByteRange(url, 5, 5), ByteRange(url, 990, 1000)]
    content = file.read_bytes()
    assert read_ranges(ranges) == [content[:10], b"", content[990:]]
    assert list_sizes(f"{FOLDER}/first") == {"file.h5": 1000}
    download(url, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == content
    assert list_sizes(f"{FOLDER}/nowhere") == {}


def test_ranges_are_asked_for_once_each(store: Store, tmp_path: Path) -> None:
    url = f"{FOLDER}/counted.h5"
    upload(make_file(tmp_path / "file"), url)
    before = len(store.requests())
    assert read_ranges([]) == []
    read_ranges([ByteRange(url, first, first + 7) for first in range(20)])
    assert len(store.requests()) - before == 20


def test_an_object_that_is_not_what_was_sent_is_removed(
    store: Store, fresh_clients: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, url = make_file(tmp_path / "file"), f"{FOLDER}/damaged.h5"
    send = S3FileSystem.put_file

    def damage(self: S3FileSystem, path: str, url: str) -> None:
        Path(path).write_bytes(b"x" * 1000)
        send(self, path, url)

    monkeypatch.setattr(S3FileSystem, "put_file", damage)
    with pytest.raises(ValueError, match=r"damaged\.h5 was not stored as it was sent"):
        upload(file, url)
    assert "damaged.h5" not in list_sizes(FOLDER)


def test_what_is_missing_or_cut_short_is_one_sentence(store: Store, tmp_path: Path) -> None:
    url = f"{FOLDER}/short.h5"
    upload(make_file(tmp_path / "file"), url)
    with pytest.raises(ValueError, match="ends before byte 1001"):
        read_ranges([ByteRange(url, 990, 1001)])
    with pytest.raises(ValueError, match=r"none\.h5 does not exist any more"):
        read_ranges([ByteRange(f"{FOLDER}/none.h5", 0, 1)])


def test_a_store_that_can_be_used_keeps_nothing_of_the_check(store: Store) -> None:
    require_usable(f"{FOLDER}/checked")
    assert list_sizes(f"{FOLDER}/checked") == {}


def test_a_bucket_that_does_not_exist_is_named(store: Store) -> None:
    with pytest.raises(ValueError, match="s3://nowhere/x: there is no bucket 'nowhere'"):
        require_usable("s3://nowhere/x")
    with pytest.raises(ValueError, match="there is no bucket 'nowhere'"):
        list_sizes("s3://nowhere/x")


def test_a_store_without_credentials_is_refused(
    store: Store, fresh_clients: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"cannot be used without credentials.*AWS_ACCESS_KEY_ID"):
        require_usable(FOLDER)


@pytest.mark.slow  # s3fs tries for ten seconds
def test_a_store_that_cannot_be_reached_is_refused(
    store: Store, fresh_clients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"cannot be reached .*AWS_ENDPOINT_URL"):
        require_usable(FOLDER)


@pytest.mark.slow  # so does it before each pause
def test_a_store_that_is_away_for_some_seconds_is_waited_for(
    store: Store,
    fresh_clients: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"{FOLDER}/late.h5"
    upload(make_file(tmp_path / "file"), url)
    wire = Wire(store)
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.env["AWS_ENDPOINT_URL"])
    S3FileSystem.clear_instance_cache()
    wire.cut()
    monkeypatch.setattr("retort.io.objects.time.sleep", lambda _: wire.mend())
    assert read_ranges([ByteRange(url, 0, 2)]) == [bytes([0, 1])]
    assert "cannot be reached" in caplog.text and "Trying again in 1 s" in caplog.text
