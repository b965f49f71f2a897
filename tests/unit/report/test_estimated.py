"""What was estimated beside what was taken: ratios, and no ratio where a number would mislead."""

from pathlib import Path
from typing import Any

import pytest

from retort.estimate.records import (
    CacheEstimate,
    Device,
    Estimate,
    RunEstimate,
    StudentMemory,
    TeacherEstimate,
    TeacherMemory,
    TextEstimate,
)
from retort.evaluation.records import Metrics
from retort.report.estimated import Records, compare_with_estimate
from retort.teacher.records import CacheRun
from support.records import (
    make_index_record,
    make_manifest,
    make_metrics,
    make_run_record,
    make_training_record,
    make_worker_record,
)
from support.reports import render_page, write_run

CPU = "cpu (Some Processor), 1 thread of 2 cores"
BEFORE, MADE, AFTER = (f"2026-11-29T0{hour}:00:00Z" for hour in (3, 4, 5))
MEMORY = StudentMemory(
    program=0, weights=100, gradients=100, optimizer=200, activations=500, loss=100, peak=1000
)


def make_estimate(**values: Any) -> Estimate:
    """Return an estimate of a text of 900 tokens, a pass of 20 s by two workers, and a training of 50 s."""
    run = RunEstimate(
        name="mine",
        parameters=9,
        trained_parameters=9,
        is_checkpointed=False,
        layout="packed",
        memory=MEMORY,
        measured_memory=None,
        memory_plain=MEMORY,
        memory_checkpointed=MEMORY,
        steps=400,
        tokens=900,
        epochs=1.0,
        operations=1.0,
        hours=50 / 3600,
        device_hours=50 / 3600,
        is_timed=True,
        slots=1,
    )
    teacher = TeacherEstimate(
        id="logits",
        name="it",
        parameters=9,
        active_parameters=9,
        dtype="float32",
        memory=TeacherMemory(program=0, weights=500, activations=300, selection=200),
        measured_memory=None,
        gpus_per_model=1,
        smallest_group=None,
        copies=2,
        operations=1.0,
        hours=10 / 3600,
        device_hours=20 / 3600,
        is_timed=False,
        slots=1,
    )
    cache = CacheEstimate(
        id="logits",
        method="top_p 0.001",
        bytes_per_position=10.0,
        relative_error=None,
        basis="table",
        record_bytes=10_000,
        disk_bytes=1,
        free_bytes=1,
    )
    text = TextEstimate(
        id="tokens",
        name="text",
        documents=9,
        sequences=9,
        tokens=1000,
        positions=990,
        longest=101,
        basis="counted",
        relative_error=0.0,
    )
    about: dict[str, Any] = {
        "made": MADE,
        "device": Device(name="Some Processor, cores", number=2, memory=None, peak=1.0),
        "texts": (text,),
        "caches": (cache,),
        "teachers": (teacher,),
        "runs": (run,),
        "break_even": None,
        "device_hours": 1.0,
        "wall_hours": 1.0,
        "price": None,
        "assumptions": (),
        "faults": (),
    }
    return Estimate(**(about | values))


def write_records(
    folder: Path, *, finished: str = AFTER, tokens: int = 450, **values: Any
) -> Records:
    """Write an estimate and the records of its text and cache; `tokens`: of each of the two workers."""
    records = Records(
        folder / "estimate.json", [folder / "tokens/index.json"], [folder / "logits/manifest.json"]
    )
    make_estimate(**values).write(records.estimate)
    make_index_record(900).write(records.tokens[0])
    made = make_run_record(finished=finished, device=CPU, seconds=15.0)
    made.write(folder / "tokens/run.json")
    make_manifest(tokens=900, positions=800, bytes_per_position=11.0).write(records.caches[0])
    workers = tuple(
        make_worker_record(worker=w, tokens=tokens, made=made, peak_memory=1100 + w) for w in (0, 1)
    )
    CacheRun(**dict(made), workers=workers, kinds=()).write(folder / "logits/run.json")
    return records


def make_run(*, finished: str = AFTER, **values: Any) -> dict[str, Metrics]:
    summary: dict[str, Any] = {"device": CPU, "seconds": 60.0, "peak_memory": 900}
    training = make_training_record("mine", **(summary | values))
    trained = make_run_record({"training": {"alpha": 0.5}}, finished=finished)
    return {"mine": make_metrics(training, trained=trained)}


def read_ratios(records: Records, metrics: dict[str, Metrics]) -> dict[tuple[str, str], Any]:
    """Return the ratio of each row, or why there is none."""
    table = compare_with_estimate(records, metrics)
    return {
        (row.subject.split()[0], row.quantity): row.actual
        if row.ratio != row.ratio
        else round(row.ratio, 3)
        for row in table.itertuples()
    }


def test_each_number_stands_beside_its_estimate(tmp_path: Path) -> None:
    assert read_ratios(write_records(tmp_path), make_run()) == {
        ("text", "tokens"): 0.9,
        ("cache", "bytes"): 0.88,
        ("pass", "time"): 1.5,  # of both workers
        ("pass", "peak memory"): 1.101,  # of the greater
        ("training", "time"): 1.2,
        ("training", "peak memory"): 0.9,
    }


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"resumed_step": 200}, "resumed"),
        ({"finished": BEFORE}, "before the estimate"),
        ({"steps": 300}, "300 of 400 steps"),
        ({"device": "NVIDIA H100 x 1"}, "another device"),
    ],
)
def test_a_training_that_was_not_measured_whole_has_no_ratio(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    found = read_ratios(write_records(tmp_path), make_run(**changes))
    for quantity in ("time", "peak memory"):
        assert "not measured" in found["training", quantity], found
        assert why in found["training", quantity], found


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"tokens": 300}, "resumed"), ({"finished": BEFORE}, "before the estimate")],
)
def test_a_pass_that_was_not_measured_whole_has_no_ratio(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    found = read_ratios(write_records(tmp_path, **changes), make_run())
    assert why in found["pass", "time"] and why in found["pass", "peak memory"]
    assert found["training", "time"] == 1.2


def test_older_records_have_a_time_and_no_memory(tmp_path: Path) -> None:
    found = read_ratios(write_records(tmp_path), make_run(peak_memory=None))
    assert found["training", "time"] == 1.2
    assert found["training", "peak memory"] == "not measured"


def test_the_page_shows_it_only_if_there_was_an_estimate(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, "mine", device=CPU, training_seconds=60.0)]
    assert "Estimated and taken" not in render_page(tmp_path, paths)
    page = render_page(tmp_path, paths, estimated=write_records(tmp_path))
    assert "Estimated and taken" in page and "training of mine" in page and "1.20" in page
