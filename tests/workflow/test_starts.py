"""Students that start as a part of a model: from a user's config to the report."""

import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.evaluation.records import Metrics
from retort.pruning.record import PruningRecord
from support.place import Place, sha256, tiny


def part(**sizes: Any) -> dict[str, Any]:
    return {"config": None, "from_teacher": sizes}


@pytest.mark.slow
def test_runs_share_the_part_of_the_teacher_that_they_start_from(fresh: Place) -> None:
    whole = AutoModelForCausalLM.from_pretrained(fresh.path / "teacher").state_dict()
    of_text = {"training": {"distillation_type": "output"}}
    narrow = part(layers=1, hidden_size=8, intermediate_size=20, num_attention_heads=1)
    narrow["from_teacher"]["calibration_samples"] = 20
    runs = {
        "random": of_text,
        "narrow": of_text | {"student": narrow},
        "hard": of_text | {"student": part(layers=1)},
        "soft": {"training": {"distillation_type": "logit"}, "student": part(layers=[1, 2])},
        "given": of_text | {"student": part(layer_indices=[1]) | {"model_path": "teacher"}},
    }
    fresh.write_config(tiny(runs=runs, cache={"top_k": 8}, training={"max_steps": 2}))
    fresh.snakemake()
    records = {
        path: PruningRecord.read(path) for path in fresh.results.glob("pruned/*/pruned.json")
    }
    kept = sorted(((r.layers, r.part) for r in records.values()), key=str)
    measured = narrow["from_teacher"]
    assert [found for found in kept if found[1] != measured] == [
        ((0, 1), {"layers": 2}),
        ((0,), {"layers": 1}),
        ((1,), {"layer_indices": [1]}),
    ]
    for path, record in records.items():
        small = AutoModelForCausalLM.from_pretrained(path.parent / "model")
        assert len(AutoTokenizer.from_pretrained(path.parent / "model")) == 300
        if record.part == measured:
            assert small.config.hidden_size == 8 and small.config.num_attention_heads == 1
            assert small.config.head_dim == 8 and small.config.intermediate_size == 20
            continue
        for name, weight in small.state_dict().items():
            first = record.layers[0]
            assert torch.equal(weight, whole[name.replace("layers.0", f"layers.{first}")]), name
    # The report says where each began, and so does its card.
    (page,) = fresh.results.glob("reports/*/report.html")
    text = page.read_text()
    for words in ("part of teacher: layers 1", "part of teacher: layers 2", "random weights"):
        assert words in text
    assert "part of teacher: layer_indices [1]" in text
    (card,) = fresh.results.glob("runs/hard/*/final/README.md")
    assert "| started from | layers 1 of `" in card.read_text()
    found = {
        path.parts[-5]: Metrics.read(path).training
        for path in fresh.results.glob("runs/*/*/evaluation/*/metrics.json")
    }
    names = {"random", "narrow", "hard", "soft-layers_1", "soft-layers_2", "given"}
    assert found.keys() == names
    assert found["hard"].student == found["soft-layers_1"].student != found["given"].student
    assert fresh.plan() == {}
    # Made again, it is the same byte for byte.
    before = {path: sha256(path.parent / "model" / "model.safetensors") for path in records}
    shutil.rmtree(fresh.results / "pruned")
    fresh.snakemake(*(str(path.relative_to(fresh.path)) for path in records))
    assert before == {path: sha256(path.parent / "model" / "model.safetensors") for path in records}


def test_mistakes_in_what_is_kept_are_told_before_the_first_job(fresh: Place) -> None:
    runs = {
        "deep": {"student": part(layers=3)},
        "beyond": {"student": part(layer_indices=[2])},
        "wide": {"student": part(hidden_size=17)},
        "few": {"student": part(vocab_size=299)},
    }
    fresh.write_config(tiny(runs=runs))
    said = fresh.try_snakemake()
    text = " ".join(said.output.split())
    assert said.returncode != 0
    assert "student.from_teacher.layers is 3, but the model 'teacher' has 2 layers" in said.output
    assert "student.from_teacher.layer_indices has 2, but the layers" in said.output
    assert "student.from_teacher.hidden_size is 17, but that of the model 'teacher' is 16" in text
    assert "Set student.from_teacher.vocab_size: 300 or more" in text
    assert not (fresh.results / "tokens").exists()
