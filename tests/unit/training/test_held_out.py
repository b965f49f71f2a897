"""The held-out loss while a student is trained: exact, without an effect on the training, and the best one kept."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retort.evaluation.run import evaluate_student
from retort.io.files import write_json
from retort.losses.terms import LossTerms
from retort.models.causal_lm import split_model
from retort.teacher.features import digest_keys, read_features
from retort.tokens.sequences import concatenate_tables
from retort.training.checkpoints import remove_old_checkpoints
from retort.training.held_out import HeldOut, choose_eval_steps, choose_sample, open_held_out
from retort.training.loss_window import LossWindow
from support.bench import (
    GPT2_WITH_DROPOUT,
    SAMPLE,
    Bench,
    assert_same_curve,
    assert_same_weights,
    read_log,
    read_weights,
)
from support.sections import replace, section
from support.tiny import score_held_out

# The loss rises again after some steps.
WILD: dict[str, Any] = {
    "max_steps": 14,
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "save_steps": 5,
    "save_total_limit": 2,
    "eval_steps": 3,
    "metric_for_best_model": "eval_kl",
    "load_best_model_at_end": True,
}


@pytest.fixture(scope="module")
def features(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return score_held_out(tmp_path_factory.mktemp("features"), bench.index, bench.teacher_path)


def measured(folder: Path) -> dict[int, dict[str, float]]:
    """Return the evaluations of a run's log by step."""
    return {
        int(row["step"]): {key: float(row[key]) for key in ("eval_loss", "eval_kl") if row[key]}
        for row in read_log(folder)
        if row["eval_loss"]
    }


@pytest.mark.parametrize("kind", ["hybrid", "output"])
def test_it_is_what_the_evaluation_finds_on_the_same_sequences(
    kind: str, bench: Bench, features: Path, tmp_path: Path
) -> None:
    held_out = bench.hold_out(features if kind == "hybrid" else None)
    source = bench.cache if kind == "hybrid" else bench.table
    keys: dict[str, Any] = {"distillation_type": kind, "eval_steps": 3, "max_steps": 4}
    bench.train(tmp_path, source, held_out=held_out, **keys)
    found = measured(tmp_path)
    assert list(found) == [3, 4], "every three steps, and after the last one"
    teacher = read_features(features)
    whole = bench.index.read_split("val")
    chosen = [round(i) for i in np.linspace(0, len(whole) - 1, SAMPLE) - 0.499]
    table = concatenate_tables(whole.slice(i, i + 1) for i in chosen)
    bounds = whole.position_offsets
    rows = torch.cat([teacher.features["val"][bounds[i] : bounds[i + 1]] for i in chosen])
    teacher = replace_features(teacher, rows, digest_keys(table))
    student = split_model(AutoModelForCausalLM.from_pretrained(tmp_path / "final"))
    scores, _ = evaluate_student(student, table, teacher=teacher, batch_size=4)
    metrics = scores.student.metrics
    assert found[4]["eval_loss"] == pytest.approx(metrics["loss"].value, abs=1e-6)
    assert found[3]["eval_loss"] != pytest.approx(metrics["loss"].value, abs=1e-6)
    if kind == "hybrid":
        assert found[4]["eval_kl"] == pytest.approx(metrics["kl_to_teacher"].value, abs=1e-6)
    else:
        assert set(found[4]) == {"eval_loss"}


def replace_features(teacher: Any, rows: torch.Tensor, key: str) -> Any:
    from dataclasses import replace as replace_fields

    return replace_fields(teacher, features={"val": rows}, keys={"val": key})


def test_evaluations_change_neither_weights_nor_the_rest_of_the_log(
    bench: Bench, features: Path, tmp_path: Path
) -> None:
    student = tmp_path / "gpt2.json"
    write_json(student, GPT2_WITH_DROPOUT)
    held_out = bench.hold_out(features)
    keys: dict[str, Any] = {"student": student, "max_steps": 6, "gradient_accumulation_steps": 2}
    bench.train(tmp_path / "without", bench.cache, **keys)
    bench.train(tmp_path / "with", bench.cache, held_out=held_out, eval_steps=1, **keys)
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    assert len(measured(tmp_path / "with")) == 6
    for mine, theirs in zip(
        read_log(tmp_path / "with"), read_log(tmp_path / "without"), strict=True
    ):
        ignored = {"eval_loss": "", "eval_kl": "", "tokens_per_second": ""}
        assert mine | ignored == theirs | ignored and theirs["eval_loss"] == ""


def test_a_student_of_a_live_teacher_is_measured_by_the_same_numbers(
    bench: Bench, features: Path, tmp_path: Path
) -> None:
    held_out = bench.hold_out(features)
    keys: dict[str, Any] = {"distillation_type": "logit", "max_steps": 2, "eval_steps": 2}
    bench.train(tmp_path / "cached", bench.full, held_out=held_out, **keys)
    keys["use_cached_logits"] = False
    bench.train(tmp_path / "live", bench.table, live=True, held_out=held_out, **keys)
    (cached,), (live,) = (measured(tmp_path / way).values() for way in ("cached", "live"))
    assert live == pytest.approx(cached, abs=1e-3)
    for way in ("cached", "live"):
        for row in read_log(tmp_path / way):  # alpha is 0, and the text's loss is logged too
            assert float(row["total_loss"]) == float(row["soft_loss"]) != float(row["hard_loss"])


@pytest.fixture(scope="module")
def wild(bench: Bench, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wild")
    bench.train(folder, bench.cache, held_out=bench.hold_out(features), **WILD)
    return folder


def find_best(folder: Path, metric: str = "eval_kl") -> int:
    found = {step: values[metric] for step, values in measured(folder).items()}
    return min(found, key=lambda step: found[step])


def list_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


def test_the_best_checkpoint_is_kept_beside_the_last_and_is_the_student(
    wild: Path, bench: Bench, features: Path, tmp_path: Path
) -> None:
    best = find_best(wild)
    assert best < 9, measured(wild)
    assert list_steps(wild) == [best, 10, 14]
    kept = AutoModelForCausalLM.from_pretrained(wild / f"checkpoint-{best}").state_dict()
    final = read_weights(wild)
    assert all(torch.equal(final[name], kept[name]) for name in final)
    card = (wild / "final" / "README.md").read_text()
    assert f"the student is that of step | {best}, the best" in card
    assert f"| held-out loss | {measured(wild)[best]['eval_loss']:.4f} |" in card
    # Kept, but not the student.
    keys = WILD | {"load_best_model_at_end": False, "metric_for_best_model": "eval_loss"}
    held_out = bench.hold_out(features)
    summary = bench.train(tmp_path, bench.cache, held_out=held_out, **keys)
    assert summary.best_step is None
    assert list_steps(tmp_path) == [find_best(tmp_path, "eval_loss"), 14] == [12, 14]
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-14").state_dict()
    assert all(torch.equal(w, last[name]) for name, w in read_weights(tmp_path).items())


@pytest.mark.parametrize("lost", ["the last steps", "the last marker", "final"])
def test_a_killed_training_remembers_the_best_one(
    lost: str, wild: Path, bench: Bench, features: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(wild, folder)
    shutil.rmtree(folder / "final")
    if lost == "the last steps":
        shutil.rmtree(folder / "checkpoint-14")
    elif lost == "the last marker":
        (folder / "checkpoint-14" / "complete.json").unlink()
    else:
        (folder / "training_log.csv").unlink()
    summary = bench.train(folder, bench.cache, held_out=bench.hold_out(features), **WILD)
    assert summary.best_step == find_best(wild)
    assert_same_weights(folder, wild)
    assert_same_curve(folder, wild)
    shutil.rmtree(folder / "final")
    (folder / f"checkpoint-{summary.best_step}" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"load_best_model_at_end\), is damaged .*rerun the same"):
        bench.train(folder, bench.cache, held_out=bench.hold_out(features), **WILD)


def test_the_checkpoint_of_another_run_brings_no_best_one(
    wild: Path, bench: Bench, features: Path, tmp_path: Path
) -> None:
    state = json.loads((wild / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["best_global_step"] == find_best(wild)
    keys = WILD | {"resume_from_checkpoint": str(wild / "checkpoint-10")}
    summary = bench.train(tmp_path, bench.cache, held_out=bench.hold_out(features), **keys)
    assert summary.best_step == find_best(tmp_path) > 10


def test_an_interrupt_during_an_evaluation_loses_nothing(
    bench: Bench, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out, measure = bench.hold_out(features), HeldOut.measure
    keys = WILD | {"max_steps": 8, "save_steps": 8}
    bench.train(tmp_path / "whole", bench.cache, held_out=held_out, **keys)

    def interrupt(self: HeldOut, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return measure(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(HeldOut, "measure", interrupt)
        bench.train(tmp_path / "stopped", bench.cache, held_out=held_out, **keys)
    assert list_steps(tmp_path / "stopped") == [3, 4], "the evaluated one, and the step after it"
    bench.train(tmp_path / "stopped", bench.cache, held_out=held_out, **keys)
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")
    assert_same_curve(tmp_path / "stopped", tmp_path / "whole")


def test_the_time_of_an_evaluation_is_not_in_the_tokens_per_second() -> None:
    now = 0.0
    window = LossWindow(torch.device("cpu"), clock=lambda: now)
    one = torch.ones(())
    window.add(LossTerms(one, one, None), positions=100, normalizer=1, sequences=one)
    now = 3.0
    with window.paused():
        now = 50.0
    now = 52.0
    assert window.take()["tokens_per_second"] == pytest.approx(100 / 5)


def test_a_best_checkpoint_is_removed_only_once_a_newer_one_is_complete(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-2.bak").mkdir()
    remove_old_checkpoints(tmp_path, limit=2, best=4)
    names = ["checkpoint-10", "checkpoint-2.bak", "checkpoint-4", "checkpoint-8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_student_that_diverged_is_told(bench: Bench, features: Path, tmp_path: Path) -> None:
    # The last step's weights are finite, and their logits are not.
    keys: dict[str, Any] = {"learning_rate": 1e38, "max_steps": 1, "eval_steps": 1}
    keys["lr_scheduler_type"] = "constant"
    with pytest.raises(
        ValueError, match=r"'eval_loss': (nan|inf).* after step 1\. .*learning_rate"
    ):
        bench.train(tmp_path, bench.cache, held_out=bench.hold_out(features), **keys)


def test_the_sample_is_evenly_spaced_and_the_same_for_all(bench: Bench, features: Path) -> None:
    assert choose_sample(10, 4) == [0, 3, 6, 9] and choose_sample(3, 64) == [0, 1, 2]
    assert choose_sample(5, 1) == [0]
    one, other = bench.hold_out(features), bench.hold_out(None, seed=3, alpha=0.1)
    assert (one.table.keys == other.table.keys).all() and len(one.table) == SAMPLE
    (teacher,) = one.teachers
    assert not other.teachers
    sizes = [len(rows) for rows in teacher.features]
    assert sizes == np.diff(one.table.position_offsets).tolist()


def test_auto_takes_two_hundredths_of_the_time_at_most(bench: Bench, features: Path) -> None:
    plain, compared = bench.hold_out(None), bench.hold_out(features)
    (teacher,) = compared.teachers
    assert teacher.head.weight is not None
    tokens, head = len(plain.table.ids), teacher.head.weight.numel()

    def choose(held_out: HeldOut, times: float, **keys: Any) -> int | None:
        training = section("training", **keys)
        return choose_eval_steps(
            training, held_out, max_steps=1000, num_tokens=times * tokens, parameters=head
        )

    # An evaluation is a third of a training of as many tokens, with a head of the student's size two thirds.
    assert choose(plain, 1e6) == choose(compared, 1e6) == 100
    for held_out, share in ((plain, 1 / 3), (compared, 2 / 3)):
        assert choose(held_out, 50.01 * share) == 1000 and choose(held_out, 49.99 * share) is None
        assert choose(held_out, 3.01 * 50 * share) == math.ceil(1000 / 3)
    assert choose(plain, 1.0, eval_steps=7) == 7


def test_what_cannot_be_measured_is_refused(bench: Bench, features: Path) -> None:
    with pytest.raises(ValueError, match=r"metric_for_best_model is eval_kl.*--features"):
        bench.hold_out(None, metric_for_best_model="eval_kl")
    with pytest.raises(ValueError, match=r"features\.safetensors was scored by teacher .*"):
        open_held_out(
            bench.index,
            section("training", eval_steps=3),
            section("evaluation"),
            features={features: "another"},
        )
    with pytest.raises(ValueError, match=r"was scored on other val sequences"):
        open_held_out(
            bench.index,
            section("training", eval_steps=3),
            section("evaluation", max_positions=100),
            features={features: None},
        )
    training = section("training", eval_steps=None)
    off = open_held_out(bench.index, training, section("evaluation"), features={features: None})
    assert off is None and replace(training, eval_steps=4).eval_steps == 4
