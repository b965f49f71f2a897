"""Which waiting jobs time does not help."""

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


def test_of_waiting_jobs_only_those_that_never_start_are_said() -> None:
    found = describe_stuck(LISTING)
    assert list(found) == ["5", "6", "7", "10"]
    assert "scontrol release 5." in found["5"] and "launch failed requeued held" in found["5"]
    assert "(rule_tokenize_shard_wildcards_4_00001) will not start by itself" in found["6"]
    assert "Ctrl-C, mend profiles/slurm/config.yaml" in found["6"]


def test_each_is_said_once_and_squeue_is_asked_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program in squeue's place, which notes how it is asked."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat <<END\n{LISTING}END\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    watch = StuckJobs()
    assert [len(watch.look("a-run")) for _ in range(2)] == [4, 0]
    assert (tmp_path / "asked").read_text().count("--name a-run") == 1
    watch._next_s = 0.0
    assert watch.look("a-run") == []
    assert (tmp_path / "asked").read_text().count("--name a-run") == 2


def test_without_squeue_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert StuckJobs().look("a-run") == []
