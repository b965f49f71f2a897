"""The tiny teacher, its work, and the parts of one undisturbed worker."""

from pathlib import Path

import pytest

from retort.models.causal_lm import CausalLM
from retort.models.load import load_teacher
from support.sections import section
from support.teacher_job import Job, read_parts


@pytest.fixture(scope="session")
def teacher(tiny_teacher: Path) -> CausalLM:
    return load_teacher(str(tiny_teacher), section("teacher", device="cpu"))


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_teacher: Path) -> Job:
    job = Job(tmp_path_factory.mktemp("job"), tiny_corpus, tiny_teacher)
    assert len(job.index.parts) >= 5
    return job


@pytest.fixture(scope="session")
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of the parts of one worker, by file name."""
    folder = tmp_path_factory.mktemp("parts")
    report = job.work(folder)
    assert sorted(report.parts) == sorted(part.name for part in job.index.parts)
    assert report.tokens == job.index.record.train.tokens
    found = read_parts(folder)
    assert len(found) == len(job.index.parts)  # no claim and no temporary file
    return found
