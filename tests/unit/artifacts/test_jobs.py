"""The job of each artifact: the sections that its script gets, resolved, and what it expects of its inputs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from retort.artifacts.build import build_project
from retort.artifacts.jobs import Jobs, write_argument
from retort.artifacts.project import Project
from retort.config.handoff import SECTIONS, read_config_argument
from retort.config.load import load_runs
from support.place import REPOSITORY, tiny


@pytest.fixture
def folder(
    tmp_path: Path,
    tiny_teacher: Path,
    tiny_corpus: Path,
    tiny_student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    shutil.copy(tiny_corpus, tmp_path / "documents.jsonl")
    shutil.copy(tiny_student, tmp_path / "student.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(**over: Any) -> Project:
    return build_project(load_runs(tiny(**over)))


def _jobs(project: Project) -> Jobs:
    return Jobs(project, source="a.yaml", write=lambda content: json.dumps(content))


def read(project: Project, kind: str, **names: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_jobs(project).format(kind, names))
    assert set(found["config"]) <= set(SECTIONS[kind])
    assert found.pop("source") == "a.yaml"
    return found


def test_shards_get_the_corpus_and_where_the_tokenizer_is(folder: Path) -> None:
    project = build(teacher={"dtype": "float32"}, dataset={"tokenizer": None})
    (tokens,) = project.tokens.values()
    found = read(project, "tokens", tokens=tokens.id, shard="00001")
    assert found == {
        "expected": {"corpus": tokens.corpus.stamp},
        "config": {"dataset": tiny()["dataset"], "teacher": {"model_path": "teacher"}},
    }


def test_a_local_tokenizer_is_expected_to_stay_the_same(folder: Path) -> None:
    project = build(dataset={"tokenizer": "teacher"})
    (tokens,) = project.tokens.values()
    found = read(project, "tokens", tokens=tokens.id, shard="00000")
    assert found["expected"] == {"corpus": tokens.corpus.stamp, "tokenizer": tokens.fingerprint}
    assert "teacher" not in found["config"]


@pytest.mark.parametrize("word", ["a", "é東京", "\ud800"])
def test_a_long_config_is_handed_over_in_a_file(word: str, tmp_path: Path) -> None:
    short, long = ({"dataset": {"data_files": [word] * count}} for count in (9, 30_000))
    assert json.loads(write_argument(short, tmp_path)) == short
    assert list(tmp_path.iterdir()) == []
    planned = write_argument(long, tmp_path, is_dry_run=True)
    assert list(tmp_path.iterdir()) == []
    path = write_argument(long, tmp_path)
    assert path == planned
    assert read_config_argument(path).values == long
    assert write_argument(long, tmp_path) == path and list(tmp_path.iterdir()) == [Path(path)]


def test_short_configs_stay_readable(tmp_path: Path) -> None:
    assert write_argument({"run": "東京"}, tmp_path) == '{"run": "東京"}'


def test_all_jobs_of_a_folder_get_one_text(folder: Path) -> None:
    project = build()
    jobs, (tokens,) = _jobs(project), project.tokens.values()
    first, second = (
        jobs.format("tokens", {"tokens": tokens.id, "shard": shard}) for shard in ("00000", "00001")
    )
    assert first is second, "ten thousand jobs format it"


def test_a_cache_gets_teacher_cache_and_merge(folder: Path) -> None:
    project = build(merge={"mode": "virtual"})
    (logits,) = project.logits.values()
    config = {name: tiny()[name] for name in ("teacher", "cache")}
    found = read(project, "logits", logits=logits.id, worker="0")
    assert found == {"config": config | {"merge": {"mode": "virtual"}}}


def test_held_out_scores_get_no_settings_of_students(folder: Path) -> None:
    evaluation = {"max_positions": 99, "batch_size": 3, "benchmarks": {"tasks": ["a"]}}
    project = build(evaluation=evaluation)
    (validation,) = project.validations.values()
    found = read(project, "validation", validation=validation.id)
    assert found["config"]["evaluation"] == {"max_positions": 99}


def test_a_run_has_its_name_its_alpha_and_its_students_digest(folder: Path) -> None:
    project = build()
    run = project.runs["hard"]
    found = read(project, "run", run="hard", id=run.id)
    assert (found["run"], found["expected"]) == ("hard", {"student": run.student})
    assert found["config"]["training"]["alpha"] == 1.0
    assert found["config"]["dataset"]["data_files"] == "documents.jsonl"
    of_student = read(project, "evaluation", run="hard", id=run.id, evaluation=run.evaluation_id)
    assert of_student["run"] == "hard" and "expected" not in of_student
    assert "student" not in of_student["config"]


def test_a_benchmark_gets_its_own_settings_of_student_and_teacher(folder: Path) -> None:
    benchmarks = {"tasks": ["arc_easy", "piqa"], "limit": 7, "teacher": True}
    project = build(evaluation={"benchmarks": benchmarks}, training={"device": "cpu"})
    student, teacher = project.runs["both"].tasks[1], next(iter(project.teacher_tasks.values()))
    names = {"task": student.name, "benchmark": student.id}
    found = read(project, "task", run="both", id=project.runs["both"].id, **names)
    assert found["run"] == "both" and found["config"]["training"]["device"] == "cpu"
    assert found["config"]["evaluation"] == {"benchmarks": {"limit": 7}}
    names = {"task": teacher.name, "benchmark": teacher.id}
    (owner,) = project.teachers
    assert "run" not in read(project, "task", teacher=owner, **names)


def test_the_demos_teacher_is_the_folder_that_it_is_trained_into(folder: Path) -> None:
    dataset = {"name": "demo", "data_files": None}
    project = build(dataset=dataset, teacher={"model_path": "demo", "generation": {}})
    (teacher,) = project.teachers.values()
    made = str(teacher.folder / "model")
    (logits,), (tokens,) = project.logits, project.tokens
    for kind, names in {
        "tokens": {"tokens": tokens},
        "logits": {"logits": logits},
        "run": {"run": "both"},
    }.items():
        found = read(project, kind, **names)
        assert found["config"]["teacher"]["model_path"] == made
        assert "corpus" not in found.get("expected", {}), "a snapshot is checked by its record"
    found = read(project, "demo_teacher", teacher=teacher.id)
    assert found["config"]["dataset"]["max_length"] == 64
    (corpus,) = project.corpora
    assert read(project, "corpus", corpus=corpus)["config"].keys() == {"dataset"}


def test_a_synthesized_corpus_is_read_from_its_file(folder: Path) -> None:
    (folder / "prompts.txt").write_text("Say one\n")
    synthesis = {"provider": "openai", "model": "m", "prompts": "prompts.txt"}
    project = build(dataset={"name": "synthesis", "data_files": None}, synthesis=synthesis)
    (responses,), (tokens,) = project.syntheses.values(), project.tokens.values()
    found = read(project, "synthesis", answers=responses.answers_id, synthesis=responses.id)
    assert found == {"expected": {"prompts": responses.stamp}, "config": {"synthesis": synthesis}}
    for kind, names in (("tokens", {"tokens": tokens.id}), ("run", {"run": "both"})):
        dataset = read(project, kind, **names)["config"]["dataset"]
        assert dataset["name"] == "json"
        assert dataset["data_files"] == str(responses.folder / "responses.jsonl")
    local = build(
        dataset={"name": "synthesis", "data_files": None},
        synthesis={"provider": "local", "prompts": "prompts.txt"},
    )
    (responses,) = local.syntheses.values()
    found = read(local, "synthesis", answers=responses.answers_id, synthesis=responses.id)
    assert found["config"]["teacher"]["model_path"] == "teacher", "which answers"


def test_a_rule_and_its_script_name_the_same_kind() -> None:
    texts = "".join(p.read_text() for p in (REPOSITORY / "workflow" / "rules").glob("*.smk"))
    kinds = {"compare": "comparison"}
    kinds |= re.findall(r'\*\*command\("(\w+)", "(\w+)"\)', texts)
    assert len(kinds) == 15
    for script, kind in kinds.items():
        text = (REPOSITORY / "workflow" / "scripts" / f"{script}.py").read_text()
        assert re.search(rf'job_parser\(\s*__doc__,\s*"{kind}"', text), script


def test_a_part_gets_its_model_and_what_to_keep(folder: Path) -> None:
    student: dict[str, Any] = {"config": None, "from_teacher": {"layers": 1}}
    teacher = {"dtype": "float32", "generation": {"num_workers": 3}}
    project = build(student=student, teacher=teacher)
    (pruned,) = project.pruned.values()
    found = read(project, "pruned", pruned=pruned.id)
    assert found["config"] == {
        "teacher": {"model_path": "teacher"},
        "student": {"from_teacher": {"layers": 1}},
    }
    assert found["expected"] == {"student": pruned.content}
    student |= {"model_path": "teacher"}
    (other,) = build(student=student).pruned.values()
    found = read(build(student=student), "pruned", pruned=other.id)
    assert found["config"] == {
        "student": {"model_path": "teacher", "from_teacher": {"layers": 1}},
    }
