"""The whole pipeline on a teacher and a dataset of a Hub: from the config to the report, streamed or not."""

import shutil
from pathlib import Path
from typing import Any

from retort.io.files import read_json
from support.hub import MODEL, NAME, SHA, Hub
from support.place import Place, sha256, tiny

RUN = {"hybrid": {"training": {"distillation_type": "hybrid", "alpha": 0.5}}}


def test_a_dataset_of_the_hub_makes_the_same_student_streamed_or_not(
    fresh: Place, hub: Hub, tmp_path: Path
) -> None:
    teacher = {"model_path": MODEL, "generation": {"num_workers": 1}}
    hub.publish_inputs(fresh, tmp_path)
    for reading in ({"streaming": False}, {"streaming": True, "max_samples": 120}):
        dataset = {"name": NAME, "data_files": None} | reading
        training = {"max_steps": 4}
        fresh.write_config(tiny(dataset=dataset, teacher=teacher, training=training, runs=RUN))
        fresh.snakemake()
        assert "hybrid" in (fresh.results / "summary.txt").read_text()
    assert hub.requests["model.safetensors"] == 1
    (record,) = fresh.results.glob("teachers/*/fingerprint.json")
    assert read_json(record)["revision"] == SHA
    students = [sha256(path) for path in fresh.results.glob("runs/*/*/final/model.safetensors")]
    assert len(students) == 2 and len(set(students)) == 1


def test_a_student_of_the_hub_stays_at_the_commit_of_its_first_start(
    fresh: Place, hub: Hub, tmp_path: Path
) -> None:
    """A newer commit is another student, for a run that starts then, and not for one that is started again."""
    model, newer = tmp_path / "model", "f" * 40
    shutil.copytree(fresh.path / "teacher", model)
    training = {"max_steps": 2, "distillation_type": "output"}
    student = {"config": None, "model_path": MODEL}
    teacher = {"model_path": None}
    dataset = {"tokenizer": "teacher", "num_shards": 1}
    hub.publish(tmp_path, model=model)
    fresh.env.update(hub.environment)

    def train(run: str, seed: int) -> dict[str, Any]:
        runs = {run: {"training": {"seed": seed}}}
        sections = {"dataset": dataset, "teacher": teacher, "student": student}
        fresh.write_config(tiny(**sections, training=training, runs=runs))
        fresh.snakemake("--until", "train")
        (path,) = fresh.results.glob(f"runs/{run}/*/training.json")
        found: dict[str, Any] = read_json(path)
        made, start = (read_json(path.with_name(f"{n}.json")) for n in ("run", "student"))
        assert made["config"]["student"]["revision"] == start["commit"]
        path.unlink()
        return found

    first = train("one", 0)
    (start,) = fresh.results.glob("runs/one/*/student.json")
    assert read_json(start)["commit"] == SHA
    hub.sha = newer
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert train("one", 0)["student"] == first["student"], "it is started again"
    assert train("other", 1)["student"] != first["student"]
