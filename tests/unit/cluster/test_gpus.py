"""GPU groups, with simulated ids: no GPU is needed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from retort.cluster.gpus import (
    count_workers,
    describe_machine,
    detect_gpus,
    list_gpus,
    parse_groups,
)
from support.gpus import EIGHT, LISTED, make_generation, write_nvidia_smi


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("RETORT_LOCK_DIR", str(tmp_path))
    yield


# --- Groups


@pytest.mark.parametrize(("per_model", "groups"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_eight_gpus_make_whole_groups(per_model: int, groups: int) -> None:
    found = parse_groups(None, gpus_per_model=per_model, detected=EIGHT)
    assert len(found.groups) == groups
    assert [g for group in found.groups for g in group] == list(EIGHT)
    assert found.left_over == ()


def test_only_the_listed_gpus_are_used() -> None:
    found = parse_groups("1,3,5,7", gpus_per_model=2, detected=EIGHT)
    assert found.groups == (("1", "3"), ("5", "7"))


def test_uneven_groups_are_taken_as_written() -> None:
    found = parse_groups(("0", "1", "2,3"), gpus_per_model=1, detected=EIGHT)
    assert found.groups == (("0",), ("1",), ("2", "3"))


def test_a_remainder_is_in_no_group_and_shown() -> None:
    seven = EIGHT[:7]
    assert parse_groups(None, gpus_per_model=2, detected=seven).left_over == ("6",)
    table = describe_machine(make_generation(gpus_per_model=2), detected=seven)
    assert "In no group" in table
    assert "6" in table


def test_fewer_gpus_than_a_model_needs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gpus_per_model is 4, but there are only 2 GPUs \(0,1\)"):
        parse_groups(None, gpus_per_model=4, detected=("0", "1"))


def test_without_gpus_there_is_no_group_even_if_some_are_listed() -> None:
    assert parse_groups("0,1", gpus_per_model=1, detected=()).groups == ()
    assert "CPU" in describe_machine(make_generation(), detected=())


def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(ValueError, match=r"lists GPU 9, but this machine has 0, 1"):
        parse_groups("0,9", gpus_per_model=1, detected=("0", "1"))


def test_a_gpu_in_two_groups_is_named() -> None:
    with pytest.raises(ValueError, match="lists GPU 1 twice"):
        parse_groups(("0,1", "1"), gpus_per_model=1, detected=EIGHT)


def test_the_number_of_workers_is_the_configs_or_the_groups_or_one() -> None:
    assert count_workers(make_generation(num_workers=5), detected=EIGHT) == 5
    assert count_workers(make_generation(gpus_per_model=2), detected=EIGHT) == 4
    assert count_workers(make_generation(), detected=()) == 1
    # Listed groups count as listed on any machine: a login node plans what the compute node runs.
    for detected in ((), ("0",), EIGHT):
        assert (
            count_workers(make_generation(gpus="0,1,2,3", gpus_per_model=2), detected=detected) == 2
        )


def test_a_uuid_is_an_id_and_is_not_compared_with_an_index() -> None:
    assert parse_groups("GPU-89f", gpus_per_model=1, detected=("0", "1")).groups == (("GPU-89f",),)
    assert parse_groups("GPU-89f", gpus_per_model=1, detected=("GPU-89f932",)).groups
    with pytest.raises(ValueError, match="lists GPU GPU-71"):
        parse_groups("GPU-71", gpus_per_model=1, detected=("GPU-89f932",))


def test_gpus_are_counted_only_when_their_number_matters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvidia_smi(tmp_path, "echo 'driver not loaded'; exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert count_workers(make_generation(num_workers=4)) == 4
    assert count_workers(make_generation(gpus="0,1,2,3")) == 4
    with pytest.raises(
        ValueError, match=r"driver not loaded.*set teacher\.generation\.num_workers"
    ):
        count_workers(make_generation())


def test_slurms_assignment_is_shown_whatever_the_config_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")
    table = describe_machine(make_generation(gpus="0,1,2,3"), detected=detect_gpus())
    assert "GPU groups          [6]" in table


# --- Detection


def test_visible_devices_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    assert detect_gpus() == ("2", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect_gpus() == ()


def test_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect_gpus() == ()
    write_nvidia_smi(tmp_path, "printf '0\\n1\\n'")
    assert detect_gpus() == ("0", "1")


def test_a_broken_driver_is_an_error_not_a_cpu_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvidia_smi(tmp_path, "echo 'Failed to initialize NVML: version mismatch'; exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="version mismatch"):
        detect_gpus()


def test_a_driver_without_a_gpu_is_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_nvidia_smi(tmp_path, "echo 'No devices were found'; exit 6")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert detect_gpus() == ()


def test_output_that_is_not_a_list_of_gpus_is_a_broken_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvidia_smi(tmp_path, "echo 'Unable to determine the device handle: Unknown Error'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="Unable to determine the device handle"):
        detect_gpus()


def test_a_slurm_job_without_gpus_does_not_take_its_nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvidia_smi(tmp_path, "printf '0\\n1\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert detect_gpus() == ("0", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert detect_gpus() == ()


@pytest.mark.parametrize(("text", "ids"), [("0,-1,1", ("0",)), ("-1", ()), ("NoDevFiles", ())])
def test_visible_devices_end_where_cuda_stops(
    monkeypatch: pytest.MonkeyPatch, text: str, ids: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert detect_gpus() == ids


def test_gpus_are_listed_by_every_name_and_a_split_one_as_its_first_slice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus() == {}
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    write_nvidia_smi(tmp_path, LISTED)
    listed = list_gpus()
    assert listed["0"] == "GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f"
    assert listed["1"] == listed["GPU-77777777-d268-c3f3-1b07-005d5ae1dc3f"]
    assert listed["1"] == "MIG-a1111111-1111-5111-8111-111111111111"
    assert len(set(listed.values())) == 3
