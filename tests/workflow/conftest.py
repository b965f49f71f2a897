"""Workflows on tiny parts: one finished run for all tests to copy.

A whole tiny workflow is a dozen jobs, which take ten seconds of processor, and a minute if each were a real start (see
forks.py). One is run per test session (shared by pytest-xdist's workers through a lock), tests copy it, and a dry run
is used wherever what would run is all that is asked.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from support.forks import Forks, forked_commands
from support.hub import Hub, serve_all
from support.place import REPOSITORY, Once, Place, lay_out


@pytest.fixture(scope="session", autouse=True)
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """What stands for the interpreter wherever a command runs to its end: minutes of imports less."""
    with forked_commands(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture(scope="session")
def hub_with_one_address(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub whose clients' variables never change, so that they are forked too."""
    home = tmp_path_factory.mktemp("hub") / "home"
    with serve_all({}, home=home, patience_s=60) as hub:
        forks.serve(Place(REPOSITORY, env=hub.environment).environment())
        yield hub


@pytest.fixture
def hub(hub_with_one_address: Hub) -> Iterator[Hub]:
    """A Hub on this machine that has nothing yet."""
    yield hub_with_one_address
    hub_with_one_address.clear()


@pytest.fixture(scope="session")
def inputs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_teacher: Path,
    tiny_corpus: Path,
    tiny_student: Path,
) -> Place:
    """The tiny parts and their config, nothing run yet; only to be copied."""
    path = tmp_path_factory.mktemp("inputs")
    return lay_out(path, teacher=tiny_teacher, corpus=tiny_corpus, student=tiny_student)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a place, or find it made by another of pytest-xdist's workers."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def make_once(name: str, make: Callable[[Path], object]) -> Place:
        place, mark = Place(shared / name), shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not mark.exists():
                shutil.rmtree(place.path, ignore_errors=True)
                make(place.path)
                mark.touch()
        return place

    return make_once


@pytest.fixture(scope="session")
def finished(inputs: Place, once: Once) -> Place:
    """The tiny workflow, run to its end once and undisturbed; only to be copied."""
    return once("finished", lambda path: inputs.copy_to(path).snakemake())


@pytest.fixture
def fresh(inputs: Place, tmp_path: Path) -> Place:
    """A copy of the tiny parts, nothing run yet."""
    return inputs.copy_to(tmp_path / "project")


@pytest.fixture
def done(finished: Place, tmp_path: Path) -> Place:
    """A copy of the finished run."""
    return finished.copy_to(tmp_path / "project")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository's own files, free to be changed."""
    root = tmp_path / "checkout"
    for folder in ("workflow", "src", "config", "profiles"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=ignore)
    shutil.copy2(REPOSITORY / "Snakefile", root / "Snakefile")
    return root
