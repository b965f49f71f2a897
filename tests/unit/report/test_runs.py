"""Runs and their files: which runs can be compared, and what is refused."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from retort.config.sections import Training
from retort.report.findings import find_caches
from retort.report.runs import find_folder, load_results, read_documents
from retort.report.tables import NO_BASELINE
from support.reports import (
    LOG_HEAD,
    compare,
    find_all_warnings,
    find_rows,
    summarise,
    write_run,
    write_trained,
)

# For each setting of a training that matters to its result whatever the loss, a value that is not the default.
OTHER_TRAINING = {
    "packing": True,
    "padding_free": False,
    "learning_rate": 0.002,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "use_mixed_precision": False,
    "mixed_precision_dtype": "fp16",
    "resume_from_checkpoint": "checkpoint-10",
    "optim": "muon",
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "lr_scheduler_kwargs": {"num_cycles": 2.5},
    "lora": {"rank": 8},
    "freeze": ["embed_tokens"],
    "attn_implementation": "eager",
    "torch_compile": True,
    "load_best_model_at_end": True,
    "save_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"steps": 401},
        {"student_parameters": 54_273},
        {"validation__positions": 65_535},
        {"validation__documents": 411},
        {"validation__tokens": "another corpus"},
        {"distillation_type": "logit"},
        {"trained": {"commit": "0123456789abcdef"}},
        *({"trained": {"training": {key: value}}} for key, value in OTHER_TRAINING.items()),
        {"trained": {"student": {"config": "other.json"}, "training": {"alpha": 1.0}}},
        {"trained": {"student": {"model_path": "weights"}, "training": {"alpha": 1.0}}},
    ],
)
def test_no_margin_against_a_run_of_other_conditions(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    paths = [write_run(tmp_path, "output", "output", **changes), write_run(tmp_path, "hybrid")]
    assert compare(paths).runs.baseline.isna().all()
    assert find_rows(paths)["hybrid"]["margin"] == NO_BASELINE
    assert "No margin for" in find_all_warnings(paths)


def test_in_any_order_a_run_is_compared_with_the_one_of_its_settings(
    tmp_path: Path,
) -> None:
    paths = [
        write_trained(tmp_path, "slow", "output", 3.3, learning_rate=0.001),
        write_trained(tmp_path, "fast", "output", 3.5, learning_rate=0.002),
        write_trained(tmp_path, "again", "output", 3.6, learning_rate=0.002, logging_steps=5),
        write_trained(tmp_path, "hybrid", learning_rate=0.002),
    ]
    for order in itertools.permutations(paths):
        hybrid = compare(order).runs.loc["hybrid"]
        assert hybrid.baseline == "fast"
        assert hybrid.margin == pytest.approx(-0.3)
    assert "No margin" not in find_all_warnings(paths)


def test_loss_settings_and_machine_settings_may_differ_from_the_baselines(tmp_path: Path) -> None:
    may_differ: dict[str, Any] = {
        "distillation_type": "output",
        "alpha": 1.0,
        "temperature": 1.0,
        "divergence": "skew_reverse_kl",
        "skew": 0.2,
        "position_weights": "teacher_entropy",
        "alpha_end": 0.5,
        "temperature_end": 1.5,
        "use_cached_logits": False,
        "max_steps": 400,
        "num_epochs": 3.0,
        "use_gradient_checkpointing": True,
        "cpu_threads": 8,
        "device": "cuda",
        "cache_copy": "/dev/shm",
        "cache_copy_gb": 5.0,
        "gpus": 2,
        "nodes": 2,
        "strategy": "fsdp",
        "dataloader_num_workers": 4,
        "loss_chunk_size": 64,
        "logging_steps": 1,
        "eval_steps": 4,
        "eval_sequences": 9,
        "metric_for_best_model": "eval_loss",
        "save_minutes": 1.0,
        "save_steps": 1,
        "save_total_limit": 9,
    }
    paths = [
        write_trained(tmp_path, "output", "output", **may_differ),
        write_trained(tmp_path, "hybrid"),
    ]
    assert compare(paths).runs.baseline["hybrid"] == "output"
    # Together these are all settings.
    assert may_differ.keys() | OTHER_TRAINING.keys() | {"seed"} == Training.model_fields.keys()


def test_each_seed_is_compared_with_its_own_baseline(tmp_path: Path) -> None:
    paths = []
    for seed, loss in ((0, 3.3), (1, 3.5)):
        paths.append(write_run(tmp_path, f"o{seed}", "output", seed=seed, validation__loss=loss))
        paths.append(write_run(tmp_path, f"h{seed}", seed=seed, validation__loss=3.2))
    runs = compare(paths).runs
    assert list(runs.margin.dropna()) == pytest.approx([-0.1, -0.3])
    assert list(runs.baseline.dropna()) == ["o0", "o1"]


def test_a_run_trained_on_text_only_uses_no_cache(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path, "hybrid"),
        write_run(tmp_path, "other", distillation_type="output"),
    ]
    assert list(find_caches(compare(paths).runs).index) == ["hybrid"]


def test_the_runs_folder_is_found_from_both_places_of_metrics(tmp_path: Path) -> None:
    path = write_run(tmp_path, "hybrid")
    assert (find_folder(path) / "training_log.csv").exists()
    assert find_folder(Path("runs/mine/metrics.json")) == Path("runs/mine")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 6', '"version": 3', "was written by an older Retort (version 3)"),
        ('"value": 3.213', '"value": NaN', "has scores.student.metrics.loss.value = nan"),
        ('"kl": 3.1e-05', '"kl": Infinity', "has cache.fidelity.kl = inf"),
        ('"steps": 400', '"steps": true', "has training.summary.steps = True"),
        ('"not_defined": {}', '"not_defined": ["loss"]', "has scores.not_defined = ['loss']"),
        ('"sequences": 500,', "", "has no 'sequences'"),
    ],
)
def test_metrics_that_are_old_or_damaged_are_refused_by_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = write_run(tmp_path, "run")
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(f"{path} {message}")) as caught:
        load_results([path])
    assert str(caught.value).endswith(": evaluate the run again.")


def test_metrics_of_version_4_are_read_without_the_counts_of_the_text(tmp_path: Path) -> None:
    path = write_run(tmp_path, "run")
    old = json.loads(path.read_text()) | {"version": 4}
    del old["text"]
    path.write_text(json.dumps(old))
    assert load_results([path]).metrics["run"].text is None
    assert "rows read" not in summarise([path]) and "rows were skipped" not in summarise([path])


def test_metrics_of_version_5_are_read_without_the_parameters_that_are_trained(
    tmp_path: Path,
) -> None:
    path = write_run(tmp_path, "run")
    old = json.loads(path.read_text()) | {"version": 5}
    del old["training"]["summary"]["trained_parameters"]
    path.write_text(json.dumps(old))
    found = load_results([path]).metrics["run"]
    assert found.text is not None and found.training.summary.trained_parameters is None


def test_a_log_that_diverged_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path, "run")
    log = find_folder(path) / "training_log.csv"
    log.write_text(f"{LOG_HEAD}\n10,1,1,,2,1e-4,9\n20,nan,nan,,nan,1e-4,9\n")
    with pytest.raises(ValueError, match="hard_loss is nan at step 20"):
        load_results([path])
    log.write_text("step,loss\n10,3\n")
    with pytest.raises(ValueError, match="is not a training log of `train`"):
        load_results([path])


def test_missing_and_repeated_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs to report on"):
        load_results([])
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        load_results([tmp_path / "nowhere.json"])
    path = write_run(tmp_path, "run")
    with pytest.raises(ValueError, match="is given twice"):
        load_results([path, path])


def test_runs_of_one_name_are_told_apart_by_their_ids(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, "same", id="aaaaaaaaaaaa"), write_run(tmp_path, "same")]
    assert list(load_results(paths).runs.index) == ["same aaaaaa", "same 000000"]


@pytest.mark.parametrize(
    "text", ["", "document,positions\n1,2\n", "document,positions,loss\n1,2,x\n"]
)
def test_a_foreign_file_of_documents_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "documents.csv").write_text(text)
    with pytest.raises(ValueError, match="is not what `evaluate` writes"):
        read_documents(tmp_path / "documents.csv")
