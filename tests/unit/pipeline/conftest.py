"""A config that passes the checks."""

from pathlib import Path

import pytest

from support.checked import Setting


@pytest.fixture
def setting(tmp_path: Path, tiny_corpus: Path, tiny_teacher: Path, tiny_student: Path) -> Setting:
    return Setting(tmp_path, tiny_corpus, tiny_teacher, tiny_student)
