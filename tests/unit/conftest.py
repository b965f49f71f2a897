"""The tiny corpus as tokens, and the tiny training, each made once for each file of tests."""

from pathlib import Path

import pytest

from retort.tokens.index import TokenIndex
from support.bench import Bench
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
