"""Text files in every encoding and compression that people bring give the same bytes; a damaged one is refused."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from retort.io.text_files import explain_read_errors, open_utf8

TEXT = "".join(
    f"line {i} \u201e\u00e4\u201c \u6771\u4eac\u2028 \U0001f600 {i * i}\n" for i in range(9000)
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


def in_zip(content: bytes, *, names: tuple[str, ...] = ("in/a.txt",)) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return packed.getvalue()


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zip": in_zip,
    "zst": zstandard.compress,
}


def read(path: Path) -> bytes:
    with explain_read_errors(path), open_utf8(path) as file:
        return file.read()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("compression", ["none", *COMPRESSORS])
def test_any_encoding_and_compression_is_read_as_utf8(
    tmp_path: Path, compression: str, encoding: str
) -> None:
    content = TEXT.encode(encoding)
    path = tmp_path / "text"
    path.write_bytes(COMPRESSORS.get(compression, bytes)(content))
    assert read(path) == TEXT.encode()
    with open_utf8(path) as file:  # by lines, which end at \n alone
        assert list(file) == [line.encode() + b"\n" for line in TEXT.split("\n")[:-1]]


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_two_compressed_files_in_one_are_read_to_the_end(tmp_path: Path, compression: str) -> None:
    if compression == "zip":
        pytest.skip("an archive has one list of its files")
    path = tmp_path / "text"
    path.write_bytes(COMPRESSORS[compression](b"one\n") + COMPRESSORS[compression](b"two\n"))
    assert read(path) == b"one\ntwo\n"


@pytest.mark.parametrize("damage", ["half", "last bytes", "middle"])
@pytest.mark.parametrize("compression", COMPRESSORS)
def test_a_compressed_file_that_is_damaged_or_cut_is_refused(
    tmp_path: Path, compression: str, damage: str
) -> None:
    content = COMPRESSORS[compression](TEXT.encode())
    middle = len(content) // 2
    changed = {
        "half": content[:middle],
        "last bytes": content[:-3],
        "middle": content[:middle] + bytes(60) + content[middle + 60 :],
    }
    path = tmp_path / "text"
    path.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=r"text is damaged or cut short \(.*write or download"):
        read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("caf\u00e9".encode("latin1"), r"is not UTF-8 text \(byte 0xe9.*windows-1252"),
        (b"\xff\xfea\0b\0c", r"is not UTF-16.* text \(byte 0x63: truncated data\)"),
        (in_zip(b"a", names=("a.txt", "b.txt")), "is a zip archive of 2 files: unpack it"),
        (in_zip(b"", names=()), "is a zip archive of 0 files"),
    ],
)
def test_what_is_not_one_text_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said), explain_read_errors(path), open_utf8(path) as file:
        file.read().decode()


def test_what_a_mac_adds_to_a_zip_is_not_a_second_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(in_zip(b"a", names=("a.txt", "__MACOSX/._a.txt", "folder/")))
    assert read(path) == b"a"


def test_a_tar_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for mode in ("w", "w:gz"):
        path = tmp_path / "files.tar"
        with tarfile.open(path, mode) as archive:
            archive.add(tmp_path / "a.txt", "a.txt")
        with pytest.raises(ValueError, match=r"files.tar is a tar archive: unpack it"):
            read(path)
