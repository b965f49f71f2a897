"""Objects in a store that speaks Google's protocol, which runs in a process of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from retort.io.objects import ByteRange, list_sizes, read_ranges, require_usable, upload
from support.store import BUCKET, serve_google_store

FOLDER = f"gs://{BUCKET}/objects"


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("store")
    with serve_google_store(folder) as env, pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        yield


def test_a_file_is_stored_read_by_ranges_and_listed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    content = bytes(number % 251 for number in range(1000))
    file.write_bytes(content)
    url = f"{FOLDER}/first/file.h5"
    upload(file, url)
    ranges = [ByteRange(url, 0, 10), ByteRange(url, 5, 5), ByteRange(url, 990, 1000)]
    assert read_ranges(ranges) == [content[:10], b"", content[990:]]
    assert list_sizes(f"{FOLDER}/first") == {"file.h5": 1000}
    assert list_sizes(f"{FOLDER}/nowhere") == {}
    with pytest.raises(ValueError, match=r"none\.h5 does not exist any more"):
        read_ranges([ByteRange(f"{FOLDER}/none.h5", 0, 1)])


def test_a_store_that_can_be_used_keeps_nothing_of_the_check() -> None:
    require_usable(f"{FOLDER}/checked")
    assert list_sizes(f"{FOLDER}/checked") == {}


def test_a_bucket_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="gs://nowhere/x: there is no bucket 'nowhere'"):
        require_usable("gs://nowhere/x")
