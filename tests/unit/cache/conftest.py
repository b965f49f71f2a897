"""One small cache, its parts and its index, shared by the tests that only read them."""

from dataclasses import replace
from pathlib import Path

import pytest

from retort.cache.merged import merge_parts
from retort.cache.reader import CacheHeader
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from support.synthetic import make_header, make_table, write_parts, write_tokens


def make_tables() -> list[SequenceTable]:
    """Three shards: the second has labels of its own, the third repeats the first's documents as others."""
    first, second = make_table(9, seed=0), make_table(7, seed=1, first_document=100)
    second = replace(second, label_names=(("", ""), ("art", ""), ("code", "c")))
    return [first, second, replace(first, documents=first.documents + 200)]


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> TokenIndex:
    return write_tokens(tmp_path_factory.mktemp("tokens"), make_tables(), chunk_size=3)


@pytest.fixture(scope="session")
def header(index: TokenIndex) -> CacheHeader:
    return make_header(index)


@pytest.fixture(scope="session")
def parts(index: TokenIndex, header: CacheHeader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "parts"
    write_parts(index, folder, header)
    return folder


@pytest.fixture(scope="session")
def merged(index: TokenIndex, header: CacheHeader, parts: Path) -> Path:
    path = parts.parent / "teacher_logits.h5"
    merge_parts(index, parts, header, path)
    return path
