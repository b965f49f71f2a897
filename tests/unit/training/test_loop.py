"""Training: losses as computed by hand, every kind of training, what a run writes and what it refuses."""

import csv
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from retort.artifacts.starts import student_content
from retort.cache.entropy_codec import EntropyCodec
from retort.cache.reader import LogitCache
from retort.config.schema import flatten
from retort.config.training import DEFAULT_ALPHA
from retort.io.digests import digest
from retort.io.files import read_json, write_json
from retort.io.run_record import RunRecord
from retort.teacher.merge import build_manifest
from retort.teacher.records import CacheRun, Manifest
from retort.tokens.tokenizer import load_tokenizer
from retort.training.arguments import CHECKPOINTING, training_arguments
from retort.training.batches import find_tail_column
from retort.training.curve import LOG_COLUMNS, write_log
from retort.training.loop import build_trainer
from retort.training.record import TrainingRecord
from retort.training.run import train_run
from support.batches import take_order
from support.bench import Bench, assert_same_curve, assert_same_weights, read_log, read_weights
from support.jobs import make_job
from support.records import make_run_record, make_worker_record
from support.sections import replace, section
from support.tiny import NUM_TOKENS, WIDTH, make_cache, record, swap_tokens, tokenize


def compute_by_hand(
    bench: Bench, source: LogitCache, sequences: list[int], *, temperature: float
) -> tuple[float, float, int]:
    """Hard loss, soft loss and positions of the untrained student, in float64, one sequence at a time."""
    torch.manual_seed(0)
    config = read_json(bench.student_path)
    student = AutoModelForCausalLM.from_config(
        _student_config(config), dtype=torch.float32
    ).double()
    hard = soft = 0.0
    positions = 0
    codec = source.header.codec
    for index in sequences:
        row, targets = source.table[index], source.read_targets(index)
        ids = torch.from_numpy(np.array(row.ids, dtype=np.int64))
        with torch.no_grad():
            logits_TV = student(input_ids=ids[None]).logits[0]
        for i, t in enumerate(np.flatnonzero(row.loss_mask)):
            hard -= float(logits_TV[t].log_softmax(-1)[ids[t + 1]])
            q = (logits_TV[t] / temperature).softmax(-1).numpy()
            tail = math.exp(targets.tail_logprobs[i, codec.temperatures.index(temperature)])
            tokens = slice(*targets.offsets[i : i + 2])
            kept = np.exp(targets.logprobs[tokens].astype(np.float64) / temperature)
            kept *= (1 - tail) / kept.sum()
            q_kept = q[targets.ids[tokens]]
            kl = float((kept * np.log(kept / q_kept)).sum())
            kl += tail * math.log(tail / (1 - q_kept.sum()))
            soft += temperature**2 * kl
            positions += 1
    return hard / positions, soft / positions, positions


def _student_config(content: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    rest = {k: v for k, v in content.items() if k != "model_type"}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(content["model_type"], vocab_size=WIDTH, **special, **rest)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_first_steps_losses_are_those_computed_by_hand(
    temperature: float, bench: Bench, tmp_path: Path
) -> None:
    bench.train(
        tmp_path,
        bench.cache,
        max_steps=1,
        gradient_accumulation_steps=2,
        temperature=temperature,
        alpha=0.3,
    )
    order = take_order(bench.table, 8)
    hard, soft, _ = compute_by_hand(bench, bench.cache, order, temperature=temperature)
    (row,) = read_log(tmp_path)
    assert float(row["hard_loss"]) == pytest.approx(hard, abs=1e-5)
    assert float(row["soft_loss"]) == pytest.approx(soft, abs=1e-5)
    assert float(row["total_loss"]) == pytest.approx(0.3 * hard + 0.7 * soft, abs=1e-5)
    assert float(row["perplexity"]) == pytest.approx(math.exp(hard), rel=1e-4)


def test_accumulating_two_batches_of_four_is_one_batch_of_eight(
    bench: Bench, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-3}
    bench.train(tmp_path / "two", bench.cache, batch_size=4, gradient_accumulation_steps=2, **keys)
    bench.train(tmp_path / "one", bench.cache, batch_size=8, gradient_accumulation_steps=1, **keys)
    two, one = read_weights(tmp_path / "two"), read_weights(tmp_path / "one")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)
    lengths = bench.table.lengths[take_order(bench.table, 8)]
    assert len(set(lengths.tolist())) > 2  # with equal halves a mean of means would be right too
    for mine, theirs in zip(read_log(tmp_path / "two"), read_log(tmp_path / "one"), strict=True):
        for name in ("total_loss", "hard_loss", "soft_loss"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-5)


@pytest.mark.parametrize(
    ("temperature", "divergence"),
    [
        (2.0, "forward_kl"),
        pytest.param(1.0, "forward_kl", marks=pytest.mark.slow),
        pytest.param(1.0, "reverse_kl", marks=pytest.mark.slow),
        pytest.param(2.0, "jensen_shannon", marks=pytest.mark.slow),
    ],
)
def test_a_live_teacher_gives_the_losses_of_a_full_cache(
    temperature: float, divergence: str, bench: Bench, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"max_steps": 6, "temperature": temperature, "learning_rate": 1e-2}
    keys["divergence"] = divergence
    bench.train(tmp_path / "cached", bench.full, **keys)
    bench.train(tmp_path / "live", bench.table, live=True, use_cached_logits=False, **keys)
    cached, live = read_log(tmp_path / "cached"), read_log(tmp_path / "live")
    assert len(cached) == 6
    for mine, theirs in zip(cached, live, strict=True):
        for name in ("total_loss", "hard_loss", "soft_loss"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-3)


@pytest.mark.parametrize("kind", ["teacher_entropy", "teacher_confidence"])
def test_weights_of_positions_are_those_of_a_live_teacher_too(
    kind: str, bench: Bench, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-2, "position_weights": kind}
    bench.train(tmp_path / "cached", bench.full, **keys)
    bench.train(tmp_path / "live", bench.table, live=True, use_cached_logits=False, **keys)
    for mine, theirs in zip(
        read_log(tmp_path / "cached"), read_log(tmp_path / "live"), strict=True
    ):
        for name in ("total_loss", "hard_loss", "soft_loss"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-3)


def test_alpha_of_a_schedule_is_that_of_the_step_also_after_a_restart(
    bench: Bench, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"alpha": 1.0, "alpha_end": 0.0, "max_steps": 5, "save_steps": 3}
    bench.train(tmp_path / "whole", bench.cache, **keys)
    for row in read_log(tmp_path / "whole"):
        alpha = 1 - (int(row["step"]) - 1) / 4
        hard, soft = float(row["hard_loss"]), float(row["soft_loss"])
        assert float(row["total_loss"]) == pytest.approx(alpha * hard + (1 - alpha) * soft, 1e-5)
    checkpoint = "checkpoint-3"
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "resumed" / checkpoint)
    bench.train(tmp_path / "resumed", bench.cache, **keys)
    whole, resumed = read_weights(tmp_path / "whole"), read_weights(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("kept", ["cache", "full", "live"])
def test_a_temperature_on_its_way_is_that_of_the_step_also_after_a_restart(
    kept: str, bench: Bench, tmp_path: Path
) -> None:
    source = bench.table if kept == "live" else getattr(bench, kept)
    # So small a rate leaves the weights as they are: a step's loss is that of a training at its temperature.
    keys: dict[str, Any] = {"max_steps": 5, "save_steps": 3, "learning_rate": 1e-30}
    ends: dict[str, Any] = {"temperature": 2.0, "temperature_end": 1.0}
    keys |= {"live": True, "use_cached_logits": False} if kept == "live" else {}
    bench.train(tmp_path / "whole", source, **keys, **ends)
    found = [row["soft_loss"] for row in read_log(tmp_path / "whole")]
    line = [2.0, 2.0, 1.0, 1.0, 1.0] if kept == "cache" else [2.0, 1.75, 1.5, 1.25, 1.0]
    for temperature in set(line):
        folder = tmp_path / f"at {temperature}"
        bench.train(folder, source, **keys, temperature=temperature)
        for row, mine, at in zip(read_log(folder), found, line, strict=True):
            assert row["soft_loss"] == mine or at != temperature
    checkpoint = "checkpoint-3"
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "resumed" / checkpoint)
    bench.train(tmp_path / "resumed", source, **keys, **ends)
    assert_same_curve(tmp_path / "whole", tmp_path / "resumed")
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize(("written", "is_on"), [(None, False), (False, False), (True, True)])
def test_activations_are_recomputed_where_the_config_says_and_change_no_id(
    bench: Bench, tmp_path: Path, written: bool | None, is_on: bool
) -> None:
    keys: dict[str, Any] = {} if written is None else {"use_gradient_checkpointing": written}
    job = bench.job(bench.full, device="cpu", temperature=1.0, **keys)
    trainer = build_trainer(training_arguments(tmp_path, job), job)
    assert getattr(trainer.args, CHECKPOINTING) is is_on
    assert job.identity == bench.job(bench.full, device="cpu", temperature=1.0).identity


def test_learning_from_text_alone_has_no_soft_loss(bench: Bench, tmp_path: Path) -> None:
    bench.train(tmp_path, bench.table, distillation_type="output")
    rows = read_log(tmp_path)
    assert list(rows[0]) == list(LOG_COLUMNS)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    for row in rows:
        assert row["soft_loss"] == ""
        assert float(row["total_loss"]) == float(row["hard_loss"]) > 0
        assert float(row["learning_rate"]) >= 0 and float(row["tokens_per_second"]) > 0


def test_the_student_learns(bench: Bench, tmp_path: Path) -> None:
    for kind in ("output", "logit"):
        source = bench.table if kind == "output" else bench.full
        keys: dict[str, Any] = {"max_steps": 25, "batch_size": 8, "learning_rate": 3e-2}
        bench.train(tmp_path / kind, source, distillation_type=kind, **keys)
        rows = read_log(tmp_path / kind)
        assert float(rows[-1]["total_loss"]) < 0.9 * float(rows[0]["total_loss"])


def test_epochs_end_where_max_steps_are_not_given(bench: Bench, tmp_path: Path) -> None:
    summary = bench.train(tmp_path, bench.cache, max_steps=None, num_epochs=2.0, batch_size=16)
    steps = math.ceil(2 * len(bench.table) / 16)
    assert summary.steps == steps
    counts = [int(bench.table[i].loss_mask.sum()) for i in take_order(bench.table, 16 * steps)]
    assert summary.trained_positions == sum(counts) >= 2 * bench.table.num_positions


@pytest.mark.parametrize("kind", ["output", "hybrid"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    kind: str, bench: Bench, tmp_path: Path
) -> None:
    source = bench.table if kind == "output" else bench.cache
    with pytest.raises(
        ValueError,
        match=r"the loss is (nan|-?inf) from sequences (.*) of .* at step 2\b.*learning_rate",
    ) as caught:
        bench.train(tmp_path, source, distillation_type=kind, learning_rate=1e30, save_steps=1)
    sequences = take_order(bench.table, 8)[4:]
    assert f"sequences {sequences} of" in str(caught.value)
    assert not (tmp_path / "final").exists()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_weights_that_are_not_finite_are_never_kept(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no longer finite numbers after step 1\b.*learning_rate"):
        bench.train(tmp_path, bench.cache, learning_rate=1e39, max_steps=1)
    assert not (tmp_path / "final").exists() and not list(tmp_path.glob("*/complete.json"))


def test_the_umask_says_who_reads_a_student_and_its_checkpoints(
    bench: Bench, tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        bench.train(tmp_path, bench.cache, max_steps=1)
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.glob("*/*")}
    assert len([path for path in modes if path.suffix == ".safetensors"]) == 2
    assert set(modes.values()) == {0o640}, modes


def test_the_curve_ends_with_the_last_step(bench: Bench, tmp_path: Path) -> None:
    bench.train(tmp_path, bench.cache, max_steps=3, logging_steps=2)
    assert [row["step"] for row in read_log(tmp_path)] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "change", [{"hidden_act": "nope"}, {"num_key_value_heads": 7}, {"head_dim": "four"}]
)
def test_a_student_that_cannot_be_built_is_refused(
    change: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "student.json"
    write_json(path, read_json(bench.student_path) | change)
    with pytest.raises(ValueError, match=rf"student.*{path.name}"):
        bench.train(tmp_path / "run", bench.cache, student=path)


def test_a_temperature_that_the_cache_lacks_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"temperature is 3\.0.*\(1\.0, 2\.0\) only.*cache\.temperatures"
    ):
        bench.train(tmp_path, bench.cache, temperature=3.0)
    # The whole vocabulary has no tail.
    bench.train(tmp_path, bench.full, temperature=3.0, max_steps=1)


def test_final_folder_loads_and_generates(bench: Bench, tmp_path: Path) -> None:
    summary = bench.train(tmp_path, bench.cache)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert len(tokenizer) == NUM_TOKENS and model.config.vocab_size == WIDTH
    prompt = tokenizer("The fox ", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    assert tokenizer.decode(out[0]).startswith("The fox ")
    assert summary.student_parameters == model.num_parameters()
    assert summary.steps == 4 and summary.device.startswith("cpu")


# ---------------------------------------------------------------------------------------------------------
# A run, as the rule `train` calls it


def run_rule(bench: Bench, out: Path, **given: Any) -> TrainingRecord:
    keys: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "temperature": 1.0, "device": "cpu"}
    training = section("training", **(keys | given.pop("training", {})))
    if training.alpha is None:
        training = replace(training, alpha=DEFAULT_ALPHA[training.distillation_type])
    tokenizer = given.pop("tokenizer_path", None)
    job = make_job(
        run="mine",
        expected=given.pop("expected", {}),
        dataset=section("dataset", tokenizer=tokenizer),
        teacher=section("teacher", model_path=str(bench.teacher_path), device="cpu"),
        student=given.pop("student", section("student", config=str(bench.student_path))),
        training=training,
    )
    paths: dict[str, Any] = {"index_path": bench.index_path, "signal_paths": [bench.cache.path]}
    train_run(out, job, **(paths | given))
    return TrainingRecord.read(out)


def test_a_student_of_a_copied_cache_is_the_same_and_the_copy_is_removed(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = tmp_path / "node"
    plain = run_rule(bench, tmp_path / "abc" / "training.json")
    copied = run_rule(bench, tmp_path / "def" / "training.json", training={"cache_copy": str(node)})
    assert copied.cache == plain.cache
    one, other = (tmp_path / run / "final" / "model.safetensors" for run in ("abc", "def"))
    assert one.read_bytes() == other.read_bytes()
    assert f"copying {bench.cache.path}" in caplog.text
    assert not [*node.rglob("*.h5")]


def test_record_of_a_run_holds_what_evaluate_needs(bench: Bench, tmp_path: Path) -> None:

    found = run_rule(bench, tmp_path / "abc" / "training.json")
    assert (found.run, found.id, found.alpha) == ("mine", "abc", 0.5)
    assert found.tokens == bench.index.record.content
    build_manifest(bench.cache, bench.index).write(tmp_path / "manifest.json")
    assert found.cache == digest(Manifest.read(tmp_path / "manifest.json").header)
    made = RunRecord.read(tmp_path / "abc" / "run.json")
    settings = dict(flatten(made.config))
    assert settings["training.max_steps"] == 2
    for name in ("distillation_type", "alpha", "temperature", "seed"):
        assert settings[f"training.{name}"] == getattr(found, name)
    assert found.student == digest(
        student_content(section("student", config=str(bench.student_path)))
    )


def test_record_of_a_run_holds_how_its_teacher_was_loaded(bench: Bench, tmp_path: Path) -> None:
    def find_teacher(signal_path: Path | None, **training: Any) -> Any:
        out = tmp_path / str(training or "cached") / "training.json"
        run_rule(bench, out, signal_paths=[signal_path] if signal_path else [], training=training)
        return RunRecord.read(out.with_name("run.json")).config.get("teacher")

    live = find_teacher(record(tmp_path, bench.teacher_path), use_cached_logits=False)
    assert live["dtype"] == "float32" and "attn_implementation" in live and "generation" not in live
    assert find_teacher(None, distillation_type="output") is None
    # Another config than the cache was made with.
    cache_path = tmp_path / "cache" / "manifest.json"
    shutil.copytree(bench.cache.path.parent, cache_path.parent)
    loaded = {"teacher": {"dtype": "auto", "attn_implementation": "eager"}}
    made = make_run_record(loaded, dtype="bfloat16")
    worker = make_worker_record(made=made)
    CacheRun(**dict(made), workers=(worker,), kinds=()).write(cache_path.with_name("run.json"))
    assert find_teacher(cache_path) == {"dtype": "bfloat16", "attn_implementation": "eager"}


def test_final_folder_ends_where_template_and_generation_config_do(
    bench: Bench, tmp_path: Path
) -> None:
    chat, corpus = tmp_path / "chat", tmp_path / "chats.jsonl"
    shutil.copytree(bench.teacher_path, chat)
    tokenizer = load_tokenizer(str(chat))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    tokenizer.save_pretrained(chat)
    GenerationConfig(eos_token_id=[5]).save_pretrained(chat)
    rows = [{"prompt": letter, "response": "bird"} for letter in "abcdefghijklmnopqrst"]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"prompt_column": "prompt", "response_column": "response"}
    write_json(tmp_path / "student.json", read_json(bench.student_path) | {"eos_token_id": 151645})
    run_rule(
        bench,
        tmp_path / "run" / "training.json",
        index_path=tokenize(tmp_path / "tokens", corpus, chat, **keys),
        tokenizer_path=str(chat),
        signal_paths=[],
        student=section("student", config=str(tmp_path / "student.json")),
        training={"distillation_type": "output", "max_steps": 150, "learning_rate": 0.01},
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    turn = saved.convert_tokens_to_ids("<turn>")
    assert saved.chat_template == tokenizer.chat_template
    assert model.config.eos_token_id == saved.eos_token_id
    assert model.generation_config.eos_token_id == [saved.eos_token_id, turn, 5]
    prompt = saved("a<turn>", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert saved.decode(out[0]) == "a<turn>bird<turn>"


def test_a_student_that_changed_since_the_run_was_named_is_refused(
    bench: Bench, tmp_path: Path
) -> None:
    named = digest(student_content(section("student", config=str(bench.student_path))))
    run_rule(bench, tmp_path / "a" / "training.json", expected={"student": named})
    with pytest.raises(ValueError, match="changed since the command began"):
        run_rule(bench, tmp_path / "b" / "training.json", expected={"student": "0123456789ab"})
    assert not (tmp_path / "b" / "training.json").exists()


def test_another_tokenizer_than_that_of_the_tokens_is_refused(bench: Bench, tmp_path: Path) -> None:
    shutil.copytree(bench.teacher_path, tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="is not the one that made the tokens"):
        run_rule(bench, tmp_path / "a" / "training.json", tokenizer_path=str(tmp_path / "teacher"))


def test_a_student_of_text_alone_is_as_wide_as_those_with_a_teacher(
    bench: Bench, tmp_path: Path
) -> None:
    output = {"distillation_type": "output"}
    run_rule(
        bench, tmp_path / "a" / "training.json", signal_paths=[bench.fingerprint], training=output
    )
    assert read_json(tmp_path / "a" / "final" / "config.json")["vocab_size"] == WIDTH
    run_rule(
        bench,
        tmp_path / "b" / "training.json",
        signal_paths=[],
        training=output,
    )
    assert read_json(tmp_path / "b" / "final" / "config.json")["vocab_size"] == NUM_TOKENS


def test_a_live_teacher_is_loaded_where_no_cache_is_given(bench: Bench, tmp_path: Path) -> None:
    found = run_rule(
        bench,
        tmp_path / "run" / "training.json",
        signal_paths=[bench.fingerprint],
    )
    assert found.alpha == 0.5 and found.summary.steps == 2


def test_a_live_teacher_of_another_tokenizer_of_the_same_size_is_refused(
    bench: Bench, tiny_corpus: Path, tmp_path: Path
) -> None:
    other = swap_tokens(tmp_path / "other", bench.teacher_path)
    given: dict[str, Any] = {
        "index_path": tokenize(tmp_path / "tokens", tiny_corpus, other),
        "tokenizer_path": str(other),
        "signal_paths": [bench.fingerprint],
    }
    message = rf"tokenizer '{other}' and that of the teacher '{bench.teacher_path}' give different ids: '[ab]', id"
    with pytest.raises(ValueError, match=message):
        run_rule(bench, tmp_path / "run" / "training.json", **given)
    assert not (tmp_path / "run").exists()


def test_a_live_teacher_with_another_chat_template_is_learned_from(
    bench: Bench, tiny_corpus: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(bench.teacher_path))
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "chat")
    found = run_rule(
        bench,
        tmp_path / "run" / "training.json",
        index_path=tokenize(tmp_path / "tokens", tiny_corpus, tmp_path / "chat"),
        tokenizer_path=str(tmp_path / "chat"),
        signal_paths=[bench.fingerprint],
    )
    assert found.summary.steps == 2


def test_a_student_that_means_other_tokens_is_refused(bench: Bench, tmp_path: Path) -> None:
    other = swap_tokens(tmp_path / "other", bench.teacher_path)
    with pytest.raises(ValueError, match=rf"that of the student '{other}' give different ids"):
        run_rule(
            bench,
            tmp_path / "training.json",
            student=section("student", config=None, model_path=str(other)),
        )


def test_distilling_without_a_teacher_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'hybrid' \(alpha 0\.5\) learns from a teacher: give --signal"
    ):
        run_rule(bench, tmp_path / "training.json", signal_paths=[])


def test_a_cache_of_other_tokens_is_refused(
    bench: Bench, tiny_corpus: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    other = tokenize(tmp_path / "tokens", tiny_corpus, tiny_teacher, max_length=32)
    foreign = make_cache(tmp_path / "logits", other, tiny_teacher, top_k=4)
    with pytest.raises(ValueError, match=r"distributions for other tokens.*made from this index"):
        run_rule(bench, tmp_path / "training.json", signal_paths=[foreign.path])


def test_a_cache_that_is_gone_is_reported(bench: Bench, tmp_path: Path) -> None:
    for signal in ("teacher_logits.h5", "manifest.json"):
        with pytest.raises(ValueError, match=r"teacher_logits\.h5 does not exist.*manifest"):
            run_rule(bench, tmp_path / "training.json", signal_paths=[tmp_path / signal])


def test_log_survives_numbers_that_json_cannot_hold(tmp_path: Path) -> None:
    write_log(tmp_path / "log.csv", [{"step": 1, "total_loss": 800.0, "perplexity": math.inf}])
    (row,) = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    assert float(row["perplexity"]) == math.inf and json.loads(row["step"]) == 1


def test_a_sampled_cache_needs_temperature_1_and_forward_kl() -> None:
    codec = EntropyCodec((1.0, 2.0), 300, "sampled", 0.05, 36, "0" * 32)
    plain = section("training", temperature=1.0)
    assert find_tail_column(codec, plain, path=Path("cache.h5")) == 0
    for changes in ({"temperature": 2.0}, {"temperature": 1.0, "divergence": "reverse_kl"}):
        with pytest.raises(ValueError, match="unbiased for forward_kl at temperature 1 alone"):
            find_tail_column(codec, section("training", **changes), path=Path("cache.h5"))
