"""The whole workflow on a real cluster, by the profile as it is shipped."""

import re

from cluster import Cluster
from place import Place
from project import Project, digest

SUBMITTED = [
    "evaluate",
    "generate_logits",
    "merge_h5",
    "score_validation",
    "tokenize_shard",
    "train",
]


def test_the_whole_workflow_makes_what_it_makes_without_a_cluster(
    project: Project, undisturbed: Place, cluster: Cluster
) -> None:
    said = project.snakemake()
    assert digest(project) == digest(undisturbed)
    assert "(100%) done" in said
    jobs = [job for job in cluster.jobs() if job.state == "COMPLETED"]
    rules = [re.match(r"rule_(.+?)(_wildcards_|$)", job.comment)[1] for job in jobs]
    assert sorted(set(rules)) == SUBMITTED
