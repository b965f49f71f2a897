"""A worker that knows its job's time limit: a pass that needs five time slots takes five, and nobody's help."""

import os
import re
import signal

from retort.tokens.index import TokenIndex
from support.cluster import Cluster
from support.place import merge
from support.project import CONFIG, PROFILE, Note, Parts, Project

SLOT_S = 120  # time for a fifth of the parts on a busy machine; a worker ends 20 s before it
SLOTS = 5


def use_up_a_slot(project: Project, cluster: Cluster, parts: Parts, *, number: int) -> None:
    """Stop the worker once so many parts are done, until its slot is used up; it then ends by itself."""
    job = project.worker_job(0)
    cluster.wait_until(lambda: parts.done >= number, f"{number} parts are done")
    worker = project.workers()[0]
    os.kill(worker, signal.SIGSTOP)

    def is_used_up() -> bool:
        minutes, seconds = cluster.run("squeue", "-h", "-j", job.id, "-o", "%M").split(":")
        return 60 * int(minutes) + int(seconds) > SLOT_S - 20

    cluster.wait_until(is_used_up, "the slot is used up")
    os.kill(worker, signal.SIGCONT)
    cluster.wait_until(lambda: cluster.state(job.id) == "FAILED", "the worker ended")


def test_a_pass_that_needs_five_time_slots_takes_five_attempts(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    """The worker is stopped in the middle of each slot but the last, as if the teacher were slow."""
    project = teacher_left
    project.write_config(merge(CONFIG, {"teacher": {"generation": {"num_workers": 1}}}))
    profile = (project.path / PROFILE).read_text()
    limit = r"(?s)(\n  generate_logits:.*?runtime: )240 "
    changed, number = re.subn(limit, rf"\g<1>{SLOT_S // 60} ", profile, count=1)
    assert number == 1
    (project.path / PROFILE).write_text(changed)
    (index,) = project.results.glob("tokens/*/index.json")
    total = len(TokenIndex.read(index).parts)
    with Parts(project) as parts:
        process = project.start(project.merged)
        for slot in range(1, SLOTS):
            use_up_a_slot(project, cluster, parts, number=slot * total // SLOTS + 1)
        project.finish(process)
    assert project.states(0) == ["FAILED"] * (SLOTS - 1) + ["COMPLETED"], "none TIMEOUT"
    assert (parts.done, parts.again) == (total, 0)
    note("five time slots", "ended before each limit by itself; retries went on", parts, project)
