"""The whole pipeline on a teacher and a dataset of a Hub: from the config to the report, streamed or not."""

import shutil
from pathlib import Path

from support.hub import MODEL, NAME, serve
from support.place import Place, sha256, tiny

RUN = {"hybrid": {"training": {"distillation_type": "hybrid", "alpha": 0.5}}}


def test_a_dataset_of_the_hub_makes_the_same_student_streamed_or_not(
    fresh: Place, tmp_path: Path
) -> None:
    stories, model = tmp_path / "stories", tmp_path / "model"
    stories.mkdir()
    shutil.move(fresh.path / "documents.jsonl", stories / "train.jsonl")
    shutil.move(fresh.path / "teacher", model)
    teacher = {"model_path": MODEL, "generation": {"num_workers": 1}}
    with serve(stories, model=model) as hub:
        home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
        fresh.env.update(hub.environment | home)
        for reading in ({"streaming": False}, {"streaming": True, "max_samples": 120}):
            dataset = {"name": NAME, "data_files": None} | reading
            training = {"max_steps": 4}
            fresh.write_config(tiny(dataset=dataset, teacher=teacher, training=training, runs=RUN))
            fresh.snakemake()
            assert "hybrid" in (fresh.results / "summary.txt").read_text()
    assert hub.requests["model.safetensors"] == 1
    students = [sha256(path) for path in fresh.results.glob("runs/*/*/final/model.safetensors")]
    assert len(students) == 2 and len(set(students)) == 1
