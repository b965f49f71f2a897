"""Sections as command-line flags, and back."""

import argparse

import pytest

from retort.config.flags import add_section_flags, section_flags, section_from_args
from retort.config.sections import Generation, Teacher
from support.configs import load


def test_flags_are_read_back_as_the_section() -> None:
    config = load(
        {
            "dataset": {
                "data_files": ["-a b", "%s"],
                "append_eos": False,
                "max_samples": 3,
                "name": "json",
            }
        },
        {"cache": {"top_k": "full", "temperatures": [1.0, 4]}},
    )
    for section in ("dataset", "cache"):
        parser = argparse.ArgumentParser()
        add_section_flags(parser, section)
        record = getattr(config, section)
        assert section_from_args(parser.parse_args(section_flags(record)), section) == record


def test_a_section_at_its_defaults_needs_no_flags() -> None:
    config = load()
    assert section_flags(config.dataset) == section_flags(config.teacher.generation) == []
    assert section_flags(config.training) == ["--alpha", "0.5"]


def test_a_teacher_has_its_generation_from_flags_if_there_are_any() -> None:
    config = load({"teacher": {"model_path": "m", "generation": {"batch_size": 9}}})
    teacher = config.teacher
    parser = argparse.ArgumentParser()
    add_section_flags(parser, "teacher")
    alone = section_from_args(parser.parse_args(section_flags(teacher)), "teacher")
    add_section_flags(parser, "teacher.generation")
    flags = section_flags(teacher) + section_flags(teacher.generation)
    assert section_from_args(parser.parse_args(flags), "teacher") == teacher
    assert alone == Teacher(**{**vars(teacher), "generation": Generation()})


@pytest.mark.parametrize(
    "sections",
    [
        ("student", "training", "tracking", "teacher"),
        ("teacher", "teacher.generation", "evaluation"),
        ("teacher", "teacher.generation", "cache", "dataset"),
    ],
)
def test_sections_of_one_script_have_flags_of_different_names(
    sections: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    for section in sections:
        add_section_flags(parser, section)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "Default:" in capsys.readouterr().out


def test_the_number_of_workers_has_no_flag() -> None:
    config = load({"teacher": {"generation": {"num_workers": 5}}})
    assert section_flags(config.teacher.generation) == []


def test_flags_have_the_names_that_users_know(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    for section in ("student", "training", "teacher", "dataset", "cache", "tracking"):
        add_section_flags(parser, section)
    argv = ["--distillation-type", "logit", "--alpha", "null", "--temperature", "1"]
    argv += ["--student-config", "s.json", "--no-use-mixed-precision", "--num-workers", "2"]
    argv += ["--teacher-model-path", "m", "--dataset-max-samples", "5", "--cache-top-k", "full"]
    argv += ["--cache-temperatures", "[1, 4]", "--use-wandb", "--max-steps", "7"]
    args = parser.parse_args(argv)
    training = section_from_args(args, "training")
    assert (training.distillation_type, training.alpha) == ("logit", None)
    assert (training.use_mixed_precision, training.dataloader_num_workers) == (False, 2)
    assert section_from_args(args, "cache").temperatures == (1.0, 4.0)
    assert section_from_args(args, "tracking").use_wandb
    with pytest.raises(SystemExit):
        parser.parse_args(["--alpha", "2"])
    assert "training.alpha is 2.0, but a number from 0 to 1" in capsys.readouterr().err
