"""Where a student comes from, as its card says it: no local path, ids of the Hub as links, the licence."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from retort.config.load import complete
from retort.config.sections import Config
from retort.training.model_card import MODEL, write_card
from retort.training.origin import describe_origin
from retort.training.record import TrainingSummary

SUMMARY = TrainingSummary(
    steps=10,
    trained_positions=1000,
    seconds=1.0,
    seconds_waiting_for_data=0.0,
    student_parameters=12_345,
    device="cpu",
    dtype="float32",
)


def read_data(text: str) -> Any:
    return ModelCard(text).data


def write(config: Config, *, has_teacher: bool = True, is_chat: bool = False) -> str:
    return write_card(
        "soft",
        origin=describe_origin(config, has_teacher=has_teacher),
        facts={"tokens": "abcdef"},
        summary=SUMMARY,
        student=config.student,
        training=config.training,
        curve=[],
        is_chat=is_chat,
    )


def test_what_is_on_the_hub_is_named_by_its_ids() -> None:
    config = complete(
        {
            "student": {"model_path": "small/model", "revision": "abc"},
            "teacher": {"model_path": "large/model"},
            "dataset": {"name": "someone/stories", "config_name": "short"},
        }
    )
    text = write(config, is_chat=True)
    data = read_data(text)
    assert data.base_model == "small/model" and data.get("base_model_relation") == "finetune"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.datasets == ["someone/stories"] and data.tags == ["retort", "distillation"]
    assert "| teacher | [large/model](https://huggingface.co/large/model) |" in text
    assert "(https://huggingface.co/datasets/someone/stories) (short)" in text
    assert data.license is None and "| licence | **fill in**" in text
    assert f'model="{MODEL}"' in text and f"vllm serve {MODEL}" in text
    assert '"role": "user"' in text and '"role": "user"' not in write(config)


def test_no_path_of_this_machine_is_in_it(tmp_path: Path, tiny_teacher: Path) -> None:
    secret = tmp_path / "secret place"
    secret.mkdir()
    for name in ("base", "text.jsonl", "student.json"):
        (secret / name).write_text("{}")
    resumed = {"resume_from_checkpoint": str(secret / "checkpoint-10")}
    common: dict[str, Any] = {
        "teacher": {"model_path": str(tiny_teacher)},
        "dataset": {"name": "json", "data_files": [str(secret / "text.jsonl")]},
        "training": resumed | {"cache_copy": str(secret)},
    }
    for student in (
        {"config": str(secret / "student.json")},
        {"model_path": str(secret)},
        {"from_teacher": {"layers": 1}},
    ):
        text = write(complete(common | {"student": student}))
        assert str(tmp_path) not in text and str(tiny_teacher.parent) not in text
        assert "`text.jsonl` (local)" in text and f"`{tiny_teacher.name}` (local)" in text
        shown = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
        assert shown["training"]["resume_from_checkpoint"] == "checkpoint-10"
        data = read_data(text)
        assert data.base_model is None and data.datasets is None
    assert "layers 1 of" in text


def test_text_alone_has_no_teacher() -> None:
    config = complete(
        {
            "teacher": {"model_path": "large/model"},
            "student": {"config": "x.json"},
            "training": {"distillation_type": "output"},
        }
    )
    text = write(config, has_teacher=False)
    assert "large/model" not in text and read_data(text).tags == ["retort"]
    assert "random weights, in the shape of `x.json`" in text


@pytest.mark.parametrize("named", [None, "mit"])
def test_the_licence_is_the_configs_or_that_of_the_base_models_card(
    tmp_path: Path, named: str | None
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    student = {"model_path": str(tmp_path)} | ({"license": named} if named else {})
    text = write(complete({"student": student}), has_teacher=False)
    assert read_data(text).license == (named or "apache-2.0")
    assert ("that of" in text) == (named is None) and "fill in" not in text


def test_a_licence_without_a_name_on_the_hub_is_left_to_be_filled_in(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\n---\n# A model\n")
    config = complete({"student": {"model_path": str(tmp_path)}})
    assert "**fill in**" in write(config, has_teacher=False)
