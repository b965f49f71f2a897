"""Many short shards in one SLURM job, by the four lines of the profile that are for thousands of them."""

import re
import time
from itertools import pairwise
from pathlib import Path

from support.cluster import Cluster
from support.place import merge
from support.project import CONFIG, Project

SHARDS = 3


def span(log: Path) -> tuple[float, float]:
    """Return when a job's script began, in whole seconds, and when it last wrote."""
    began = re.search(r"^=== (\S+ \S+)", log.read_text())
    assert began
    return time.mktime(time.strptime(began[1], "%Y-%m-%d %H:%M:%S")), log.stat().st_mtime


def test_a_group_of_shards_is_one_job_with_the_memory_of_one_and_the_time_of_all(
    project: Project, cluster: Cluster
) -> None:
    project.group_shards(20)
    project.write_config(merge(CONFIG, {"dataset": {"num_shards": SHARDS}}))
    project.snakemake(project.find_output(r"tokens/\w+/index\.json$"))
    (job,) = project.jobs()
    told = cluster.run("scontrol", "show", "job", job.id)
    assert f"TimeLimit=0{SHARDS}:00:00" in told, told
    assert "NumCPUs=4 " in told and "MinMemoryNode=8000M" in told, told
    spans = sorted(span(log) for log in project.path.glob("logs/tokenize_shard/*.log"))
    assert len(spans) == SHARDS
    for (_, ended), (began, _) in pairwise(spans):
        assert began >= int(ended), "one after the other"
