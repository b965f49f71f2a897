"""Parts of unlike kinds are merged only if that is asked for, and no kind reaches the merged cache."""

import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest

from retort.cache.kinds import PartKind, UnlikePartsError, refuse_unlike_work
from retort.cache.merged import merge_parts
from retort.cache.parts import part_files, read_kinds, remove_parts, write_part
from retort.cache.reader import CacheHeader, LogitCache, read_kind
from retort.tokens.index import TokenIndex
from support.synthetic import targets_of

H100 = PartKind("NVIDIA H100 80GB HBM3", "bfloat16", "2.13.0", "5.23.0")
OTHERS = {
    "device": replace(H100, device="NVIDIA A100-SXM4-80GB"),
    "dtype": replace(H100, dtype="float32"),
    "torch": replace(H100, torch="2.13.1"),
    "transformers": replace(H100, transformers="5.24.0"),
    "unknown": None,
}
Write = Callable[..., Path]


@pytest.fixture
def write(index: TokenIndex, header: CacheHeader, tmp_path: Path) -> Write:
    """A function that writes all parts into a new folder, of these kinds in turn."""

    def write(kinds: Iterable[PartKind | None], name: str = "parts") -> Path:
        paths = part_files(index, tmp_path / name, header)
        for part, path, kind in zip(index.parts, paths, cycle(kinds), strict=False):
            table = index.read_part(part)
            write_part(path, table, targets_of(table, header.codec), header, kind=kind)
        return tmp_path / name

    return write


@pytest.mark.parametrize("mode", ["copy", "virtual"])
def test_the_merged_cache_does_not_depend_on_the_kinds(
    mode: str, write: Write, index: TokenIndex, header: CacheHeader, tmp_path: Path
) -> None:
    merged = set()
    for kinds in ([None], [H100], list(OTHERS.values())):
        folder = write(kinds)
        out = tmp_path / "merged.h5"
        counts = merge_parts(index, folder, header, out, mode=mode, accept_unlike=True)
        assert set(counts) == set(kinds) and counts.total() == len(index.parts)
        assert LogitCache(out).kind is None
        merged.add(out.read_bytes())
    assert len(merged) == 1


def test_a_part_names_its_kind(write: Write, index: TokenIndex, header: CacheHeader) -> None:
    folder = write([H100, None])
    paths = part_files(index, folder, header)
    assert [LogitCache(path).kind for path in paths[:2]] == [H100, None]
    assert [read_kind(path) for path in paths[:2]] == [H100, None]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    found = read_kinds(paths, most=len(paths))
    assert list(found) == paths[2:], "what is missing or damaged has no kind"
    assert len(read_kinds(paths, most=2)) < len(paths) - 2


@pytest.mark.parametrize("name", OTHERS)
def test_unlike_parts_are_refused_with_counts_and_what_to_do(
    name: str, write: Write, index: TokenIndex, header: CacheHeader, tmp_path: Path
) -> None:
    other, out = OTHERS[name], tmp_path / "merged.h5"
    folder = write([H100, H100, other])
    paths = part_files(index, folder, header)
    rare = [path for path in paths if read_kind(path) == other]
    with pytest.raises(UnlikePartsError, match="are of 2 unlike kinds") as caught:
        merge_parts(index, folder, header, out)
    said = str(caught.value)
    assert f"{len(paths) - len(rare)} parts: {H100}\n" in said
    assert f"{len(rare)} parts: {other or 'of an earlier Retort'}" in said
    assert "merge.accept_unlike_parts: true" in said and not out.exists()

    (command,) = [line for line in said.splitlines() if "xargs" in line]
    subprocess.run(command, shell=True, check=True)
    assert [path for path in paths if not path.exists()] == rare
    remove_parts(folder)
    assert not folder.exists(), "the list is removed with the parts"


@pytest.mark.parametrize("kind", [H100, None])
def test_parts_of_one_kind_merge(
    kind: PartKind | None, write: Write, index: TokenIndex, header: CacheHeader, tmp_path: Path
) -> None:
    folder = write([kind])
    counts = merge_parts(index, folder, header, tmp_path / "merged.h5")
    assert counts == {kind: len(index.parts)}
    assert not list(folder.glob("*.unlike"))


def test_a_worker_adds_no_parts_of_another_kind() -> None:
    path = Path("parts/a.h5")
    refuse_unlike_work(H100, {path: H100})
    for other in OTHERS.values():
        with pytest.raises(UnlikePartsError, match=r"(?s)kind than those in parts, .*a\.h5: "):
            refuse_unlike_work(H100, {Path("parts/b.h5"): H100, path: other})
