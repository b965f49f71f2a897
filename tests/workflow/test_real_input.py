"""A real teacher and real stories: at equal steps, the distilled student beats the one that learned from text alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from retort.evaluation.records import Metrics
from retort.report.runs import load_results
from support.place import Place

SEEDS = (0, 1)
STUDENT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,  # at the usual 0.02 so narrow a model is slow to start to learn
}


def describe(data: Path) -> dict[str, Any]:
    """Return the config: a teacher of 260k parameters, students of 54k, 500 stories of 410 tokens."""
    runs: dict[str, Any] = {}
    for seed in SEEDS:
        runs[f"text_{seed}"] = {"training": {"distillation_type": "output", "seed": seed}}
        runs[f"both_{seed}"] = {
            "training": {"distillation_type": "hybrid", "alpha": 0.1, "seed": seed}
        }
    return {
        "dataset": {
            "name": "json",
            "data_files": str(data / "text" / "tinystories" / "train.jsonl"),
            "append_eos": False,  # the teacher was not trained with it
            "max_samples": 500,
            "max_length": 256,
            "num_shards": 2,
            "streaming_chunk_size": 100,
            "validation_fraction": 0.06,
        },
        "teacher": {
            "model_path": str(data / "models" / "stories260K"),
            "generation": {"num_workers": 2, "batch_size": 16},
        },
        "cache": {"top_k": 64, "temperatures": [1.0]},
        "student": {"config": "student.json"},
        "training": {
            "temperature": 1.0,
            "max_steps": 300,
            "batch_size": 8,
            "learning_rate": 1.0e-2,
            "warmup_steps": 30,
            "save_steps": 150,
            "logging_steps": 50,
        },
        "runs": runs,
    }


def test_a_real_teacher_is_distilled_from_its_stories_to_a_report(
    shared_data: Path, tmp_path: Path
) -> None:
    """Few stories and steps: too few to compare students, enough for a cache that its live teacher confirms."""
    place = Place(tmp_path)
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    config = describe(shared_data)
    config["dataset"] |= {"max_samples": 60, "streaming_chunk_size": 20}
    config["training"] |= {"max_steps": 8, "warmup_steps": 2, "save_steps": 8, "logging_steps": 4}
    config["runs"] = {"both": config["runs"]["both_0"]}
    place.write_config(config)
    place.snakemake()
    (path,) = place.results.glob("runs/both/*/evaluation/*/metrics.json")
    found = Metrics.read(path)
    assert found.cache is not None and found.cache.fidelity is not None
    assert found.cache.fidelity.kl < 1e-4
    assert found.scores.teacher is not None
    losses = [card.metrics["loss"].value for card in (found.scores.teacher, found.scores.student)]
    assert losses[0] < 2.0 < losses[1], "nats per token"
    assert "both" in (place.results / "summary.txt").read_text()
    assert place.plan() == {}


@pytest.mark.slow
def test_distilled_students_beat_those_that_learned_from_text_alone(
    shared_data: Path, tmp_path: Path
) -> None:
    place = Place(tmp_path)
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    place.write_config(describe(shared_data))
    place.snakemake()

    paths = place.results.glob("runs/*/*/evaluation/*/metrics.json")
    runs = dict(load_results(list(paths)).runs.iterrows())
    losses = {name: run.loss for name, run in runs.items()}
    print(losses)
    for seed in SEEDS:
        text, both = runs[f"text_{seed}"], runs[f"both_{seed}"]
        for key in ("student_parameters", "steps", "trained_positions", "seed"):
            assert getattr(text, key) == getattr(both, key), key
        assert both.loss < text.loss, losses
        assert both.kl_to_teacher < text.kl_to_teacher
        assert both.agreement > text.agreement
        assert both.cache_fidelity_kl < 1e-4
    assert runs["both_0"].student_parameters == 54_240
    teacher = runs["both_0"].teacher_loss
    assert teacher is not None
    assert teacher < min(losses.values()), "a teacher that knows more than its students"
    (student,) = place.results.glob("runs/both_0/*/final")
    assert_generates(student)
    assert place.plan() == {}


def assert_generates(folder: Path) -> None:
    """Load a finished student as anyone would, and let it tell a story."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    start = "Once upon a time"
    ids = tokenizer(start, return_tensors="pt").input_ids
    story = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert story.shape[1] > ids.shape[1]
    text = tokenizer.decode(story[0], skip_special_tokens=True)
    assert text.startswith(start) and len(text) > len(start) + 20, text
