"""Runs share results, a config means the same on every machine, and the documented commands work."""

import json
import re
import shutil
from typing import Any

import pytest

from support.place import REPOSITORY, Place, tiny

SHARDS = 2
WORKERS = 2


def distil(**sections: Any) -> dict[str, Any]:
    """Return the overrides of a run that learns from the teacher only."""
    return {"training": {"distillation_type": "logit"}} | sections


def plan_runs(place: Place, runs: dict[str, Any], **sections: Any) -> dict[str, int]:
    """Return the number of jobs by rule of a config with these runs."""
    place.write_config(tiny(runs=runs, **sections))
    return place.plan()


ONE_RUN = {
    "check_inputs": 1,
    "resolve_teacher": 1,
    "tokenize_shard": SHARDS,
    "index_tokens": 1,
    "score_validation": 1,
    "plan": 1,
    "generate_logits": WORKERS,
    "merge_h5": 1,
    "train": 1,
    "evaluate": 1,
    "report": 1,
}


def test_one_run_needs_every_job_once(fresh: Place) -> None:
    assert plan_runs(fresh, {"only": distil()}) == ONE_RUN


def test_workers_depend_on_the_index_not_on_every_shard(fresh: Place) -> None:
    generation = {"generation": {"num_workers": 3}}
    fresh.write_config(tiny(runs={"only": distil()}, dataset={"num_shards": 7}, teacher=generation))
    edges = read_dag(fresh.snakemake("--dag"))
    assert edges["tokenize_shard"] == {"resolve_teacher"}, "many jobs, one input each"
    assert edges["index_tokens"] == {"tokenize_shard"}
    for rule in ("score_validation", "plan", "generate_logits", "merge_h5", "train", "evaluate"):
        assert "tokenize_shard" not in edges[rule], rule
    assert edges["generate_logits"] == {"index_tokens", "resolve_teacher", "plan", "check_inputs"}


def test_two_top_k_share_tokens_and_the_held_out_pass(fresh: Place) -> None:
    runs = {"few": distil(cache={"top_k": 4}), "many": distil(cache={"top_k": 16})}
    twice = {"plan": 2, "generate_logits": 2 * WORKERS, "merge_h5": 2, "train": 2, "evaluate": 2}
    assert plan_runs(fresh, runs) == ONE_RUN | twice


def test_two_teachers_share_only_the_tokens_of_a_tokenizer_that_is_set(fresh: Place) -> None:
    shutil.copytree(fresh.path / "teacher", fresh.path / "other")
    runs = {"first": distil(), "second": distil(teacher={"model_path": "other"})}
    twice = {rule: 2 * count for rule, count in ONE_RUN.items()} | {"check_inputs": 1, "report": 1}
    assert plan_runs(fresh, runs) == twice
    shared = twice | {"tokenize_shard": SHARDS, "index_tokens": 1}
    assert plan_runs(fresh, runs, dataset={"tokenizer": "teacher"}) == shared


def test_two_corpora_share_the_teacher(fresh: Place) -> None:
    lines = (fresh.path / "documents.jsonl").read_text().splitlines(keepends=True)
    (fresh.path / "half.jsonl").write_text("".join(lines[::2]))
    runs = {"all": distil(), "half": distil(dataset={"data_files": "half.jsonl"})}
    twice = {rule: 2 * count for rule, count in ONE_RUN.items()}
    shared = {"check_inputs": 1, "resolve_teacher": 1, "report": 1}
    assert plan_runs(fresh, runs) == twice | shared


def test_runs_that_differ_in_training_or_student_share_everything_else(fresh: Place) -> None:
    student = json.loads((fresh.path / "student.json").read_text())
    (fresh.path / "small.json").write_text(json.dumps(student | {"hidden_size": 4}))
    runs = {
        "seed0": distil(),
        "seed1": {"training": {"distillation_type": "logit", "seed": 1}},
        "longer": {"training": {"distillation_type": "hybrid", "max_steps": 20}},
        "small": distil(student={"config": "small.json"}),
        "text": {"training": {"distillation_type": "output"}},
    }
    assert plan_runs(fresh, runs) == ONE_RUN | {"train": 5, "evaluate": 5}


def test_students_that_learn_from_text_only_need_no_cache(fresh: Place) -> None:
    planned = plan_runs(fresh, {"text": {"training": {"distillation_type": "output"}}})
    assert not {"plan", "generate_logits", "merge_h5"} & planned.keys()
    without = {
        "teacher": {"model_path": None, "generation": {}},
        "dataset": {"tokenizer": "teacher"},
    }
    planned = plan_runs(fresh, {"text": {"training": {"distillation_type": "output"}}}, **without)
    assert planned.keys() == {
        "check_inputs",
        "tokenize_shard",
        "index_tokens",
        "train",
        "evaluate",
        "report",
    }


def test_a_live_teacher_needs_no_cache(fresh: Place) -> None:
    live = {"training": {"distillation_type": "logit", "use_cached_logits": False}}
    planned = plan_runs(fresh, {"live": live})
    assert not {"plan", "generate_logits", "merge_h5"} & planned.keys()
    assert planned["score_validation"] == 1


@pytest.fixture
def shipped(fresh: Place) -> Place:
    """A folder with the repository's config/, like a fresh clone."""
    (fresh.path / "config").symlink_to(REPOSITORY / "config")
    return fresh


def test_the_shipped_config_is_planned_without_any_flag(shipped: Place) -> None:
    planned = shipped.plan(config=None)
    assert planned["demo_teacher"] == 1
    assert planned["train"] == 9, "three kinds of training, three seeds"
    with_gpus = shipped.plan("--resources", "gpu=8", config=None, cores=8)
    assert with_gpus == planned
    assert not shipped.results.exists(), "a dry run makes nothing"


def test_lint_finds_only_that_rules_have_no_container(shipped: Place) -> None:
    said = shipped.try_snakemake("--lint", config=None).output
    found = set(re.findall(r"^    \* (.*):$", said, re.MULTILINE))
    # Retort is a package: its environment has what every rule needs.
    assert found == {"Specify a conda environment or container for each rule."}, said


def test_a_key_on_the_command_line_changes_only_that_key(fresh: Place) -> None:
    changes = ["dataset={max_samples: 10}", "training={learning_rate: 2e-3, max_steps: 5}"]
    said = fresh.snakemake("-n", "-p", "--config", *changes)
    assert '"max_samples": 10' in said
    assert '"learning_rate": 0.002' in said
    assert '"max_steps": 5' in said
    as_text = fresh.outputs("--config", *changes)
    fresh.write_config(
        tiny(dataset={"max_samples": 10}, training={"learning_rate": 0.002, "max_steps": 5})
    )
    assert as_text == fresh.outputs()


def test_a_wrong_type_on_the_command_line_is_refused(fresh: Place) -> None:
    refused = fresh.try_snakemake("-n", "--config", "dataset={max_samples: ten}")
    assert refused.returncode != 0
    assert "dataset.max_samples is 'ten'" in refused.output
    assert "Traceback" not in refused.output


def test_a_config_file_replaces_the_demo(shipped: Place) -> None:
    plain = tiny(runs=None, training=None, cache=None)
    shipped.write_config(plain)
    made = shipped.outputs()
    assert {path.split("/")[2] for path in made if "/runs/" in path} == {"student"}
    shipped.write_config(plain | {"runs": {"student": {}}})
    assert shipped.outputs() == made
    assert shipped.plan().keys().isdisjoint({"demo_teacher", "draw_corpus"})


def test_of_two_config_files_the_later_overrides_key_by_key(fresh: Place) -> None:
    second = fresh.write_config({"cache": {"top_k": 16}, "training": {"seed": 3}}, "second.yaml")
    both = [*fresh.command("--summary"), str(second)]
    said = fresh.execute(both)
    assert said.returncode == 0, said.output
    fresh.write_config(tiny(cache={"top_k": 16}, training={"seed": 3}))
    merged = fresh.execute(fresh.command("--summary"))
    assert _rows(said.output) == _rows(merged.output)


def test_the_same_config_means_the_same_on_every_machine(fresh: Place) -> None:
    machines = {
        gpus: Place(fresh.path, env={"CUDA_VISIBLE_DEVICES": gpus}) for gpus in ("", "0,1,2,3", "7")
    }
    # The number of workers is fixed by num_workers, or by the listed GPUs.
    for generation in ({"num_workers": 2}, {"num_workers": None, "gpus": ["0", "1", "2,3"]}):
        fresh.write_config(tiny(teacher={"generation": generation}))
        on_cpu, on_four = (machines[g].outputs() for g in ("", "0,1,2,3"))
        assert on_cpu == on_four
    # Otherwise there is one worker per GPU, and nothing else differs.
    fresh.write_config(tiny(teacher={"generation": {"num_workers": None}}))
    found = {gpus: place.outputs() for gpus, place in machines.items()}
    receipts = {gpus: {p for p in made if "metadata_worker" in p} for gpus, made in found.items()}
    assert [len(receipts[gpus]) for gpus in machines] == [1, 4, 1]
    assert len({frozenset(found[gpus] - receipts[gpus]) for gpus in machines}) == 1


def test_a_machine_without_gpus_says_so_once_if_a_teacher_runs(done: Place) -> None:
    shutil.rmtree(done.results / "reports")
    assert "No GPU found here" not in done.snakemake("--resources", "gpu=8", cores=8)
    for made in ("validation", "reports"):
        shutil.rmtree(done.results / made)
    for run in (done.results / "runs").glob("*/*/evaluation"):
        shutil.rmtree(run)
    said = done.snakemake("--resources", "gpu=8", cores=8)
    assert said.count("No GPU found here") == 1


def read_dag(said: str) -> dict[str, set[str]]:
    """Return the rules that each rule depends on, from Snakemake's --dag."""
    names = dict(re.findall(r'^\s*(\d+)\[label = "(\w+)', said, flags=re.MULTILINE))
    edges: dict[str, set[str]] = {name: set() for name in names.values()}
    for source, target in re.findall(r"^\s*(\d+) -> (\d+)", said, flags=re.MULTILINE):
        edges[names[target]].add(names[source])
    return edges


def _rows(said: str) -> set[str]:
    return {line.split("\t")[0] for line in said.splitlines() if line.count("\t") == 5}
