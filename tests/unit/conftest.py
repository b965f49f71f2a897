"""The tiny corpus as tokens, and the tiny training, each made once for each file of tests; and a store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from retort.tokens.index import TokenIndex
from support.bench import Bench
from support.store import Store, serve_store
from support.tiny import tokenize


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_corpus: Path,
    tiny_teacher: Path,
    tiny_student: Path,
) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), tiny_corpus, tiny_teacher, tiny_student)


@pytest.fixture(scope="module")
def index(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_teacher: Path
) -> TokenIndex:
    """The tokens of the tiny corpus; files of tests that need others make their own."""
    return TokenIndex.read(tokenize(tmp_path_factory.mktemp("tokens"), tiny_corpus, tiny_teacher))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that this process uses, and each of pytest-xdist's workers has its own; tests share what is in it."""
    with (
        serve_store(tmp_path_factory.mktemp("store")) as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in store.env.items():
            patch.setenv(name, value)
        yield store
