"""The whole workflow on a real cluster, by the profile as it is shipped."""

import re

from retort.teacher.records import CacheRun
from support.cluster import GPUS, NODES, Cluster
from support.place import Place, sha256, tiny
from support.project import CONFIG, Project, digest

SUBMITTED = {
    "evaluate",
    "generate_logits",
    "merge_h5",
    "score_validation",
    "tokenize_shard",
    "train",
}
_GIVEN = re.compile(r"Worker \d/\d  CUDA_VISIBLE_DEVICES: ([\d,]+)\n")


def share_out(project: Project, **generation: int) -> None:
    """Let so many workers, of so many GPUs each, share the teacher's pass."""
    project.write_config(CONFIG | {"teacher": tiny(teacher={"generation": generation})["teacher"]})


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


def test_a_worker_waits_for_one_node_and_is_not_spread_over_several(
    teacher_left: Project, cluster: Cluster
) -> None:
    """A worker of two GPUs, where every node has one free: two GPUs of two nodes are no group."""
    project = teacher_left
    share_out(project, num_workers=1, gpus_per_model=2)
    sleeps = ["--output=/dev/null", f"--gpus={GPUS - 1}", "--wrap=sleep 3600"]
    for node in NODES:
        cluster.run("sbatch", "--partition=gpu", f"--nodelist={node}", *sleeps)
    process = project.start(project.merged)

    def waits() -> bool:
        jobs = project.jobs("generate_logits")
        return bool(jobs) and "Reason=Resources" in cluster.run(
            "scontrol", "show", "job", jobs[0].id
        )

    cluster.wait_until(waits, "the worker waits for GPUs of one node", process=process)
    cluster.run("scancel", "--nodelist=node3", "--state=RUNNING", "--user=root")
    project.finish(process)
    (job,) = project.jobs("generate_logits")
    assert (job.state, job.node) == ("COMPLETED", "node3")


def test_workers_on_several_nodes_hold_their_gpus_alone(
    teacher_left: Project, undisturbed: Place, cluster: Cluster
) -> None:
    """Three workers of two GPUs: two of them are on one node of four."""
    project = teacher_left
    share_out(project, num_workers=3, gpus_per_model=2)
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
    workers = CacheRun.read(project.cache / "run.json").workers
    assert all(len(worker.parts_done) >= 3 for worker in workers), "each node wrote some"
