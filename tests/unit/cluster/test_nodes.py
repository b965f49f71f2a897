"""Launchers of several nodes find each other by what SLURM says of their step, and only there."""

import os

import pytest

from retort.cluster.leases import lock_folder
from retort.cluster.ranks import find_meeting, first_node
from retort.config.checks import ConfigError, require_even_share

STEP = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu-[007,009]",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def _in_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)


def start_by_srun(monkeypatch: pytest.MonkeyPatch, **other: str) -> None:
    for name, value in (STEP | other).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("node1", "node1"),
        ("node[1-4]", "node1"),
        ("node[3,7-9]", "node3"),
        ("gpu-[003-007,9],big1", "gpu-003"),
        ("big1,gpu-[003-007]", "big1"),
        ("rack[1-2]n[08-10]", "rack1n08"),
        ("cn[12,14]-ib0.site,cn9", "cn12-ib0.site"),
    ],
)
def test_the_first_of_slurms_lists_of_nodes(listed: str, first: str) -> None:
    assert first_node(listed) == first


def test_one_node_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_meeting(1) == ["--standalone"]
    start_by_srun(monkeypatch)
    assert find_meeting(1) == ["--standalone"]


def test_the_nodes_of_a_step_meet_at_its_first_at_a_port_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_by_srun(monkeypatch)
    mine = find_meeting(2)
    assert mine[:3] == ["--nnodes=2", "--node-rank=1", "--master-addr=gpu-007"]
    ports = set()
    for job in range(70001, 70041):
        for step in ("0", "1"):
            start_by_srun(monkeypatch, SLURM_JOB_ID=str(job), SLURM_STEP_ID=step)
            ports.add(int(find_meeting(2)[3].removeprefix("--master-port=")))
    assert len(ports) == 80, "jobs and steps beside each other"
    assert min(ports) >= 1024 and max(ports) < 32768


@pytest.mark.parametrize(
    "other",
    [
        {"SLURM_STEP_NUM_NODES": "1"},
        {"SLURM_STEP_NUM_TASKS": "4"},  # twice on each node
        {"SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "3"},
    ],
)
def test_several_nodes_without_one_launcher_on_each_are_refused(
    other: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"training.nodes is 2, but srun has not started"):
        find_meeting(2)
    start_by_srun(monkeypatch, **other)
    with pytest.raises(ValueError, match=r"training.nodes is 2, but srun has not started"):
        find_meeting(2)


def test_gpu_0_of_two_nodes_is_two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("RETORT_LOCK_DIR", str(tmp_path))
    folders = set()
    for node in ("node1", "node2"):
        start_by_srun(monkeypatch, SLURMD_NODENAME=node)
        folders.add(lock_folder())
    assert len(folders) == 2


def test_the_ranks_of_all_nodes_share_a_step() -> None:
    require_even_share(4, 2, 2 * 4)
    with pytest.raises(ConfigError, match=r"gpus x training.nodes is 6, .* 6 GPUs cannot share"):
        require_even_share(4, 2, 2 * 3)
