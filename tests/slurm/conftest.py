"""A cluster for all tests, and projects on it: to be run by `make test-slurm`, which makes a namespace for them.

The same command runs outside of it, or where SLURM is missing: every test then skips, and says why.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.cluster import Cluster
from support.forks import Forks, forked_commands
from support.place import Place, lay_out
from support.project import CONFIG, Note, Parts, Project, digest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs the cluster."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def running_cluster() -> Cluster:
    """The cluster; it ends with the namespace."""
    if "RETORT_CLUSTER" not in os.environ:
        missing = " (slurmctld is not installed)" if shutil.which("slurmctld") is None else ""
        pytest.skip(f"no namespace for a SLURM cluster: run `make test-slurm` as root{missing}")
    found = Cluster(Path(os.environ["RETORT_CLUSTER"]))
    found.start()
    return found


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, idle; what a test leaves is cleared away."""
    yield running_cluster
    running_cluster.settle()


@pytest.fixture(scope="session")
def forks(running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """What stands for the interpreter on all nodes, but for a worker's, which tests kill and stop.

    A job on the cluster is three starts of Python, two of them Snakemake's.
    """
    folder = tmp_path_factory.mktemp("forks")
    with forked_commands(folder, real=frozenset({"generate_logits"})) as forks:
        yield forks


@pytest.fixture(scope="session")
def undisturbed(
    forks: Forks,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_teacher: Path,
    tiny_corpus: Path,
    tiny_student: Path,
) -> Place:
    """The workflow run to its end on this machine, by no scheduler and without a disturbance; only to be copied."""
    path = tmp_path_factory.mktemp("undisturbed") / "project"
    place = lay_out(path, teacher=tiny_teacher, corpus=tiny_corpus, student=tiny_student)
    place.write_config(CONFIG)
    place.snakemake()
    return place


@pytest.fixture
def project(cluster: Cluster, undisturbed: Place, tmp_path: Path) -> Iterator[Project]:
    """A project on the cluster, nothing run yet."""
    found = Project.from_parts(undisturbed, tmp_path / "project", cluster)
    yield found
    found.stop()


@pytest.fixture
def teacher_left(project: Project, undisturbed: Place) -> Project:
    """A project on the cluster of which everything before the teacher's pass is done."""
    for name in ("checks", "teachers", "tokens", "validation"):
        shutil.copytree(undisturbed.results / name, project.results / name)
    return project


@pytest.fixture
def note(undisturbed: Place, record_property: Callable[[str, object], None]) -> Note:
    """Note for the table what a fault did; the cache must be the one that nobody disturbed."""

    def note(fault: str, happened: str, parts: Parts, project: Project) -> None:
        is_same = digest(project) == digest(undisturbed)
        again = f"{parts.again} of {parts.done}"
        record_property("fault", (fault, happened, again, "yes" if is_same else "NO"))
        assert is_same

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the faults did."""
    rows = [("fault", "what happened", "parts done again", "same digest")]
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                rows += [value for name, value in report.user_properties if name == "fault"]
    if len(rows) > 1:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        terminalreporter.section("faults on the cluster")
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            terminalreporter.write_line("  ".join(cells).rstrip())
