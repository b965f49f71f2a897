"""Nodes without a network: what comes from the Hub is staged on the login node, and then nothing asks for it again."""

import shutil
from dataclasses import replace
from pathlib import Path

from support.cluster import Cluster
from support.hub import MODEL, NAME, Hub, serve
from support.place import merge, sha256
from support.project import CONFIG, Project, digest

STUDENT = "runs/both/*/final/model.safetensors"


def lay_out_hub(project: Project, folder: Path) -> None:
    """Move a project's teacher and corpus to where a Hub has them."""
    folder.mkdir()
    shutil.move(project.path / "teacher", folder / "teacher")
    (folder / "stories").mkdir()
    shutil.move(project.path / "documents.jsonl", folder / "stories" / "train.jsonl")


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Return what a shell on the login node knows: the Hub, and a cache that nodes see."""
    return hub.environment | {"HF_HOME": str(home)}


def test_what_was_staged_on_the_login_node_takes_a_student_to_its_end_without_the_hub(
    project: Project, cluster: Cluster, tmp_path: Path
) -> None:
    """The Hub is stopped before the first job; the same project, alone and beside the Hub, makes the same bytes."""
    lay_out_hub(project, tmp_path / "hub")
    section = {"name": NAME, "data_files": None, "streaming": True, "max_samples": 120}
    config = merge(CONFIG, {"dataset": section, "teacher": {"model_path": MODEL}})
    project.write_config(merge(config, {"teacher": {"generation": {"gpus_per_model": 2}}}))
    alone = project.copy_to(tmp_path / "alone")
    with serve(tmp_path / "hub" / "stories", model=tmp_path / "hub" / "teacher") as hub:
        online = environment(hub, tmp_path / "home")
        alone.env.update(environment(hub, tmp_path / "other_home"))
        alone.snakemake()
        login = replace(alone, path=project.path, env=online)
        said = login.snakemake("stage")
        assert f"model {MODEL}: " in said and f"{NAME}" in said
        assert hub.requests["model.safetensors"] == 2, "once for each of the two caches"
        asked = hub.requests.total()
    project.env.update(online | {"HF_HUB_OFFLINE": "1"})
    project.snakemake()
    assert hub.requests.total() == asked
    assert digest(project) == digest(alone)
    (mine,), (theirs,) = project.results.glob(STUDENT), alone.results.glob(STUDENT)
    assert sha256(mine) == sha256(theirs)
    assert {job.state for job in project.jobs()} == {"COMPLETED"}
    assert not project.jobs("draw_corpus")
