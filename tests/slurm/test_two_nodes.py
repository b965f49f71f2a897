"""One student trained on two nodes of a real cluster: the student of one process, and no rank is left behind."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retort.training.stopping import STOPPING
from support.cluster import Cluster
from support.place import Place, merge
from support.project import CONFIG, Project

STEPS = 48
RANKS = {("node1", "0"), ("node1", "1"), ("node2", "0"), ("node2", "1")}


def config(**training: Any) -> dict[str, Any]:
    """Return the config of a longer training, of which each of four ranks has one sequence of every step."""
    return merge(CONFIG, {"training": {"max_steps": STEPS, "save_steps": 4} | training})


def copy_cache(undisturbed: Place, place: Place) -> None:
    """Copy everything that is made before the student."""
    for name in ("checks", "teachers", "tokens", "validation", "logits"):
        shutil.copytree(undisturbed.results / name, place.results / name)


@pytest.fixture(scope="session")
def alone(undisturbed: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A student that one process trained, on this machine."""
    place = undisturbed.copy_to(tmp_path_factory.mktemp("alone") / "project")
    place.write_config(config(device="cpu", gpus=1))
    place.snakemake("--until", "train")
    return place


@pytest.fixture
def cache_made(cluster: Cluster, undisturbed: Place, tmp_path: Path) -> Project:
    """A project on the cluster of which everything before the student is done."""
    project = Project.from_parts(undisturbed, tmp_path / "project", cluster)
    copy_cache(undisturbed, project)
    return project


def students(place: Place) -> list[Path]:
    """Return the folders of students of so many steps."""
    found = (place.results / "runs").glob("both/*")
    return [path for path in found if (path / f"checkpoint-{STEPS}").exists()]


def weights(place: Place) -> dict[str, torch.Tensor]:
    (folder,) = students(place)
    return load_file(folder / "final" / "model.safetensors")


def assert_same_student(one: Place, other: Place) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6)


def checkpoints(project: Project) -> set[str]:
    return {path.parent.name for path in project.results.glob("runs/both/*/*/complete.json")}


def read_log(project: Project) -> str:
    return "".join(path.read_text() for path in project.path.glob("logs/train/both_*.log"))


def test_two_nodes_train_the_student_of_one_process(
    cache_made: Project, alone: Place, cluster: Cluster
) -> None:
    cache_made.write_config(config(device="auto", gpus=2, nodes=2))
    process = cache_made.start()
    cluster.wait_until(lambda: cache_made.ranks() == RANKS, "two ranks train on each of two nodes")
    cache_made.finish(process)
    assert_same_student(cache_made, alone)
    (job,) = cache_made.jobs("train")
    assert job.node == "node[1-2]"
    told = cluster.run("scontrol", "show", "job", "-d", job.id)
    assert "TresPerNode=gres:gpu:2" in told and "TresPerJob=gres:gpu:4" in told, told
    assert read_log(cache_made).count(f"train both  {STEPS} steps") == 1, "one rank speaks"


def test_a_training_on_two_nodes_survives_scancel_and_the_crash_of_one(
    cache_made: Project, alone: Place, cluster: Cluster
) -> None:
    cache_made.write_config(config(device="cpu", gpus=2, nodes=2))
    process = cache_made.start()
    cluster.wait_until(lambda: checkpoints(cache_made), "a checkpoint is there")
    (first,) = cache_made.jobs("train")
    cluster.run("scancel", first.id)
    cluster.wait_until(lambda: cluster.state(first.id) == "CANCELLED", "the job is cancelled")
    cluster.wait_until(lambda: not cache_made.ranks(), "all ranks have ended")
    assert STOPPING in read_log(cache_made)
    done = checkpoints(cache_made)
    cluster.wait_until(lambda: checkpoints(cache_made) - done, "a second job goes on")
    second = cache_made.jobs("train")[-1]
    assert second.id != first.id
    assert cluster.crash("node2") > 3, "the node's daemon, a launcher and its ranks"
    cluster.wait_until(lambda: cluster.state(second.id) != "RUNNING", "the crash is noticed")
    cluster.wait_until(lambda: not cache_made.ranks(), "all ranks have ended")
    # SLURM puts the job into the queue again, unless the other node's end was quicker; then Snakemake submits it again.
    cluster.wait_until(lambda: cluster.state(second.id) != "COMPLETING", "the job has ended")
    if cluster.state(second.id) == "PENDING":
        cluster.hurry(second.id)
    cache_made.finish(process)
    assert "resuming from checkpoint-" in read_log(cache_made)
    assert_same_student(cache_made, alone)
