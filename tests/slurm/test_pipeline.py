"""The whole workflow on a real cluster, by the profile as it is shipped."""

import json
import re

from cluster import Cluster
from place import Place, sha256, tiny
from project import CONFIG, Project, digest

SUBMITTED = {
    "evaluate",
    "generate_logits",
    "merge_h5",
    "score_validation",
    "tokenize_shard",
    "train",
}
_GIVEN = re.compile(r"Worker \d/\d  CUDA_VISIBLE_DEVICES: ([\d,]+)\n")


def test_the_whole_workflow_makes_what_it_makes_without_a_cluster(
    project: Project, undisturbed: Place, cluster: Cluster
) -> None:
    """Two tokenizers, two workers, a student of two ranks on one node, by `snakemake --profile profiles/slurm`."""
    process = project.start()
    cluster.wait_until(lambda: len(project.ranks()) == 2, "two ranks train", process=process)
    (node, first), (other, second) = sorted(project.ranks())
    assert node == other and (first, second) == ("0", "1")
    project.finish(process)
    assert digest(project) == digest(undisturbed)
    student = "runs/both/*/final/model.safetensors"
    (mine,), (theirs,) = project.results.glob(student), undisturbed.results.glob(student)
    assert sha256(mine) == sha256(theirs)

    jobs = project.jobs()
    assert {job.state for job in jobs} == {"COMPLETED"}
    assert {
        rule for rule in SUBMITTED for job in jobs if job.comment.startswith(f"rule_{rule}")
    } == SUBMITTED
    assert len(jobs) == 8, "two of tokenize_shard and of generate_logits, one of each other rule"
    by_gpu = {job.partition for job in jobs if re.match("rule_(tokenize|merge)", job.comment)}
    assert by_gpu == {"cpu"}
    assert project.plan() == {}


def test_workers_on_several_nodes_hold_their_gpus_alone(
    teacher_left: Project, undisturbed: Place, cluster: Cluster
) -> None:
    """Three workers of two GPUs: two of them are on one node of four."""
    project = teacher_left
    project.write_config(
        CONFIG
        | {
            "teacher": tiny(teacher={"generation": {"num_workers": 3, "gpus_per_model": 2}})[
                "teacher"
            ]
        }
    )
    process = project.start(project.merged)
    project.pause(process, 0, 1, 2)
    jobs = [project.worker_job(worker) for worker in range(3)]
    held = []
    for worker, job in enumerate(jobs):
        given = _GIVEN.search(project.log(worker))
        assert given, project.log(worker)
        held += [(job.node, gpu) for gpu in given[1].split(",")]
    assert len(set(held)) == 6, held
    assert len({job.node for job in jobs}) == 2
    project.wake()
    project.finish(process)
    assert digest(project) == digest(undisturbed)
    workers = json.loads((project.cache / "run.json").read_text())["workers"]
    assert all(len(worker["parts_done"]) >= 3 for worker in workers), "each node wrote some"
