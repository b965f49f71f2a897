"""The rendezvous of launchers on several nodes, from the environment of a SLURM step."""

import os

import pytest

from retort.cluster.leases import lock_folder
from retort.cluster.ranks import first_node, rendezvous_flags
from retort.config.schema import ConfigError
from retort.config.training import require_even_share

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
def test_the_first_node_of_slurms_lists(listed: str, first: str) -> None:
    assert first_node(listed) == first


def test_one_node_needs_no_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rendezvous_flags(1) == ["--standalone"]
    start_by_srun(monkeypatch)
    assert rendezvous_flags(1) == ["--standalone"]


def test_each_step_meets_at_its_first_node_at_its_own_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_by_srun(monkeypatch)
    flags = rendezvous_flags(2)
    assert flags[:3] == ["--nnodes=2", "--node-rank=1", "--master-addr=gpu-007"]
    ports = set()
    for job in range(70001, 70041):
        for step in ("0", "1"):
            start_by_srun(monkeypatch, SLURM_JOB_ID=str(job), SLURM_STEP_ID=step)
            ports.add(int(rendezvous_flags(2)[3].removeprefix("--master-port=")))
    assert len(ports) == 80, "of concurrent jobs and steps"
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
        rendezvous_flags(2)
    start_by_srun(monkeypatch, **other)
    with pytest.raises(ValueError, match=r"training.nodes is 2, but srun has not started"):
        rendezvous_flags(2)


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
