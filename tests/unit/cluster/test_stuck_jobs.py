"""Which pending jobs will never start, and how often they are reported."""

from pathlib import Path

import pytest

from retort.cluster.stuck_jobs import StuckJobs, describe_stuck

LISTING = """\
3|rule_train_wildcards_both_1|Resources
4|rule_train_wildcards_hard_2|Priority
5|rule_generate_logits_wildcards_3_0|launch failed requeued held
6|rule_tokenize_shard_wildcards_4_00001|PartitionTimeLimit
7|rule_tokenize_shard_wildcards_4_00002|QOSMaxMemoryPerJob
8|rule_tokenize_shard_wildcards_4_00003|QOSMaxJobsPerUserLimit
9|rule_tokenize_shard_wildcards_4_00004|None
10|rule_evaluate_wildcards_5|JobHeldUser
11||ReqNodeNotAvail, UnavailableNodes:node3
"""


def test_only_pending_jobs_that_never_start_are_reported() -> None:
    found = describe_stuck(LISTING)
    assert list(found) == ["5", "6", "7", "10"]
    assert "scontrol release 5." in found["5"] and "launch failed requeued held" in found["5"]
    assert "(rule_tokenize_shard_wildcards_4_00001) will not start by itself" in found["6"]
    assert "press Ctrl-C, fix profiles/slurm/config.yaml" in found["6"]


def test_each_job_is_reported_once_and_squeue_asked_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script in place of squeue records its arguments."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat <<END\n{LISTING}END\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    now = [1000.0]
    stuck = StuckJobs(clock=lambda: now[0])
    assert [len(stuck.find_new("a-run")) for _ in range(2)] == [4, 0]
    assert (tmp_path / "asked").read_text().count("--name a-run") == 1
    now[0] += 60.0
    assert stuck.find_new("a-run") == []
    assert (tmp_path / "asked").read_text().count("--name a-run") == 2


def test_without_squeue_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert StuckJobs().find_new("a-run") == []
