"""The tiny training, made once for each file of tests."""

from pathlib import Path

import pytest
from bench import Bench


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_corpus: Path,
    tiny_teacher: Path,
    tiny_student: Path,
) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), tiny_corpus, tiny_teacher, tiny_student)
