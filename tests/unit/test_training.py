"""Training: the same batches whatever the loss, losses as computed by hand, and kills that leave no trace."""

import csv
import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NUM_TOKENS, WIDTH, make_cache, real_processes, record, section, tokenize
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.artefacts import student_content
from retort.batches import IGNORE_INDEX, Collator, Item, ShuffledStream, count_steps
from retort.cache import LogitCache
from retort.checkpoints import Stamp, find_checkpoint
from retort.codec import Codec, SparseTargets
from retort.config import identity
from retort.config_checks import DEFAULT_ALPHA
from retort.models import CausalLM, load_teacher
from retort.provenance import digest, read_json, write_json
from retort.ranks import cut_global_batch
from retort.shards import TokenIndex
from retort.tokens import SequenceTable, build_table, load_tokenizer
from retort.training import (
    LOG_COLUMNS,
    Job,
    build_trainer,
    find_tail,
    train_run,
    train_student,
    training_arguments,
)


class Bench:
    """The tiny corpus as tokens and as caches, and what `train_student` needs beside them."""

    def __init__(self, folder: Path, corpus: Path, teacher: Path, student: Path) -> None:
        self.folder, self.teacher_path, self.student_path = folder, teacher, student
        self.index_path = tokenize(folder / "tokens", corpus, teacher)
        self.fingerprint = record(folder, teacher)
        self.index = TokenIndex.read(self.index_path)
        self.table = self.index.read_split("train")
        self.cache = make_cache(folder / "top8", self.index_path, teacher, top_k=8)
        self.full = make_cache(folder / "full", self.index_path, teacher, top_k="full")

    def train(
        self,
        folder: Path,
        source: SequenceTable | LogitCache,
        *,
        live: bool = False,
        **training: Any,
    ) -> dict[str, Any]:
        student = training.pop("student", self.student_path)
        say = training.pop("say", lambda _: None)
        keys = {
            "max_steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "temperature": 1.0,
            "device": "cpu",
        } | training
        teacher_section = section("teacher", device="cpu")
        job = self.job(
            source,
            student=student,
            tracking=keys.get("tracking"),
            teacher=load_teacher(str(self.teacher_path), teacher_section) if live else None,
            **({k: v for k, v in keys.items() if k != "tracking"}),
        )
        return train_student(folder, job, say=say)

    def job(
        self,
        source: SequenceTable | LogitCache,
        *,
        student: Path | None = None,
        teacher: CausalLM | None = None,
        tracking: dict[str, Any] | None = None,
        **keys: Any,
    ) -> Job:
        """Return a training of the tiny student; its identity is that of its keys."""
        kind = keys.get("distillation_type", "hybrid")
        training = section("training", **({"alpha": DEFAULT_ALPHA[kind]} | keys))
        return Job(
            name="run",
            identity=digest(identity(training)),
            source=source,
            student=section("student", config=str(student or self.student_path)),
            training=training,
            tracking=section("tracking", **(tracking or {})),
            tokenizer=load_tokenizer(str(self.teacher_path)),
            vocabulary=WIDTH,
            teacher=teacher,
        )


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_corpus: Path,
    tiny_teacher: Path,
    tiny_student: Path,
) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), tiny_corpus, tiny_teacher, tiny_student)


def read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    return weights


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "training_log.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = read_weights(one), read_weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


# ---------------------------------------------------------------------------------------------------------
# Batches


def read_batches(bench: Bench, source: SequenceTable | LogitCache, folder: Path) -> list[Any]:
    kind = "logit" if isinstance(source, LogitCache) else "output"
    job = bench.job(
        source, distillation_type=kind, batch_size=4, seed=3, device="cpu", temperature=1.0
    )
    return list(build_trainer(training_arguments(folder, job), job).get_train_dataloader())


def test_batches_are_the_same_whatever_is_learned_from(bench: Bench, tmp_path: Path) -> None:
    from_text = read_batches(bench, bench.table, tmp_path)
    assert sum(len(b["input_ids"]) for b in from_text) == 4 * math.ceil(len(bench.table) / 4)
    for source in (bench.cache, bench.full):
        from_cache = read_batches(bench, source, tmp_path)
        for mine, theirs in zip(from_text, from_cache, strict=True):
            for name in ("input_ids", "attention_mask", "labels", "places"):
                assert torch.equal(mine[name], theirs[name])
            assert "teacher" in theirs and "teacher" not in mine


def take_order(table: SequenceTable, count: int) -> list[int]:
    return list(ShuffledStream(len(table), seed=0, count=count))


@given(
    number=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    epochs=st.integers(1, 4),
    more=st.integers(0, 200),
)
def test_the_stream_is_one_permutation_after_the_other(
    number: int, seed: int, epochs: int, more: int
) -> None:
    count = epochs * number + min(more, number - 1)
    order = list(ShuffledStream(number, seed=seed, count=count))
    assert len(order) == count == len(ShuffledStream(number, seed=seed, count=count))
    passes = [order[e * number : (e + 1) * number] for e in range(epochs)]
    assert all(sorted(found) == list(range(number)) for found in passes)
    assert order == list(ShuffledStream(number, seed=seed, count=count + 1))[:count]
    if number > 20:  # two shuffles of 20 are equal once in 10^18
        assert order[:number] != list(ShuffledStream(number, seed=seed + 1, count=number))
        assert all(a != b for a, b in itertools.pairwise(passes))


@given(
    sequences=st.integers(1, 1000),
    batch=st.integers(1, 64),
    epochs=st.floats(0.01, 5),
)
def test_steps_are_whole_global_batches(sequences: int, batch: int, epochs: float) -> None:
    steps = count_steps(sequences, global_batch=batch, max_steps=None, num_epochs=epochs)
    assert steps >= 1 and steps * batch >= epochs * sequences - 1e-6
    assert steps == 1 or (steps - 1) * batch < epochs * sequences
    assert count_steps(sequences, global_batch=batch, max_steps=7, num_epochs=epochs) == 7


@given(size=st.integers(1, 64), accumulation=st.integers(1, 64), ranks=st.integers(1, 16))
def test_every_number_of_ranks_shares_the_same_global_batch(
    size: int, accumulation: int, ranks: int
) -> None:
    if size * accumulation % ranks:
        with pytest.raises(
            ValueError, match=rf"{size * accumulation} sequences a step, which {ranks}"
        ):
            cut_global_batch(size, accumulation, ranks)
        return
    mine, passes = cut_global_batch(size, accumulation, ranks)
    assert mine * passes * ranks == size * accumulation
    assert mine <= max(1, size // ranks)  # no rank needs more memory than its share of one batch
    if size % ranks == 0:
        assert (mine, passes) == (size // ranks, accumulation)


@settings(deadline=None)
@given(data=st.data())
def test_labels_and_targets_belong_to_the_same_positions(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=6))
    masks = [data.draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1)) for n in lengths]
    rows = [
        ([100 * d + t for t in range(n)], [*mask, False], d, ("", ""))
        for d, (n, mask) in enumerate(zip(lengths, masks, strict=True))
    ]
    table = build_table(rows)
    items = []
    for d in range(len(table)):
        counted = np.flatnonzero(table[d].loss_mask)
        marks = (100 * d + counted).astype(np.int32)[:, None]  # the token at the position itself
        tails = np.stack([-counted - 1.0, -counted - 100.0], axis=1).astype(np.float32)
        items.append(
            Item(d, table[d], SparseTargets.from_rows(marks, -marks.astype(np.float32), tails))
        )
    batch = Collator(temperature_place=1)(items)
    assert batch["places"].tolist() == list(range(len(items)))
    rows, place = batch["teacher"], 0
    for b, item in enumerate(items):
        ids, mask = item.sequence.ids.tolist(), item.sequence.loss_mask.tolist()
        width = batch["labels"].shape[1]
        assert batch["input_ids"][b].tolist() == ids + [0] * (width - len(ids))
        assert batch["attention_mask"][b].tolist() == [1] * len(ids) + [0] * (width - len(ids))
        for t in range(width):
            counts = t < len(ids) and mask[t]
            label = int(batch["labels"][b, t + 1]) if t + 1 < width else IGNORE_INDEX
            assert label == (ids[t + 1] if counts else IGNORE_INDEX)
            if counts:  # targets' next row is this position's
                assert int(rows.offsets[place]) == place
                assert int(rows.ids[place]) == ids[t]
                assert float(rows.logprobs[place]) == -ids[t]
                assert float(rows.tail_logprobs[place]) == -t - 100.0
                place += 1
    assert place == len(rows.ids) == int((batch["labels"] != IGNORE_INDEX).sum())


# ---------------------------------------------------------------------------------------------------------
# The step


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
    assert len(set(lengths.tolist())) > 2  # with equal halves a mean of means would pass as well
    for mine, theirs in zip(read_log(tmp_path / "two"), read_log(tmp_path / "one"), strict=True):
        for name in ("total_loss", "hard_loss", "soft_loss"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-5)


@pytest.mark.parametrize(
    ("temperature", "divergence"),
    [(1.0, "forward_kl"), (2.0, "forward_kl"), (1.0, "reverse_kl"), (2.0, "jensen_shannon")],
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
    assert summary["steps"] == steps
    counts = [int(bench.table[i].loss_mask.sum()) for i in take_order(bench.table, 16 * steps)]
    assert summary["trained_positions"] == sum(counts) >= 2 * bench.table.num_positions


@pytest.mark.parametrize("kind", ["output", "hybrid"])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(
    kind: str, bench: Bench, tmp_path: Path
) -> None:
    source = bench.table if kind == "output" else bench.cache
    with pytest.raises(
        ValueError,
        match=r"the loss is (nan|-?inf) from sequences (.*) of .* at step 2\b.*learning_rate",
    ) as caught:
        bench.train(tmp_path, source, distillation_type=kind, learning_rate=1e30, save_steps=1)
    places = take_order(bench.table, 8)[4:]
    assert f"sequences {places} of" in str(caught.value)
    assert not (tmp_path / "final").exists()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_temperature_that_the_cache_lacks_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"temperature is 3\.0.*\(1\.0, 2\.0\) only.*cache\.temperatures"
    ):
        bench.train(tmp_path, bench.cache, temperature=3.0)
    bench.train(
        tmp_path, bench.full, temperature=3.0, max_steps=1
    )  # the whole vocabulary has no tail


def test_final_folder_loads_and_generates(bench: Bench, tmp_path: Path) -> None:
    summary = bench.train(tmp_path, bench.cache)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert len(tokenizer) == NUM_TOKENS and model.config.vocab_size == WIDTH
    prompt = tokenizer("The fox ", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    assert tokenizer.decode(out[0]).startswith("The fox ")
    assert summary["student_parameters"] == model.num_parameters()
    assert summary["steps"] == 4 and summary["device"].startswith("cpu")


# ---------------------------------------------------------------------------------------------------------
# Kills


GPT2_WITH_DROPOUT = {
    "model_type": "gpt2",
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 128,
    "resid_pdrop": 0.2,  # its random numbers must go on where they stopped
}
LONG: dict[str, Any] = {
    "max_steps": 36,
    "save_steps": 3,
    "save_total_limit": 20,
    "batch_size": 24,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",  # a rate of 0 at the end would hide a step too many
}


def stamp_of(folder: Path) -> Stamp:
    mark = read_json(next(folder.glob("checkpoint-*/complete.json")))
    return Stamp(mark["run"], mark["strategy"])


def train_in_a_process(bench: Bench, folder: Path, student: Path, log: Path) -> None:
    def say(line: str) -> None:
        with log.open("a") as file:
            file.write(line + "\n")

    bench.train(folder, bench.cache, student=student, say=say, **LONG)


def wait_for(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def dropout_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "gpt2.json"
    write_json(path, GPT2_WITH_DROPOUT)
    return path


@pytest.fixture(scope="module")
def undisturbed(
    bench: Bench, dropout_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    epochs = LONG["max_steps"] * LONG["batch_size"] / len(bench.table)
    assert epochs > 2  # the order of a later epoch must be found again too
    bench.train(folder, bench.cache, student=dropout_student, **LONG)
    return folder


def test_a_run_killed_at_random_steps_ends_with_the_weights_of_an_undisturbed_one(
    bench: Bench, dropout_student: Path, undisturbed: Path, tmp_path: Path
) -> None:
    chance = random.Random(0)
    folder, log = tmp_path / "run", tmp_path / "log"
    context, kills = real_processes(), 0
    while not (folder / "final").exists():
        process = context.Process(
            target=train_in_a_process, args=(bench, folder, dropout_student, log)
        )
        process.start()
        if kills < 3:
            before = set(folder.glob("checkpoint-*"))
            wait_for(lambda before=before: bool(set(folder.glob("checkpoint-*")) - before))
            time.sleep(chance.random() * 0.03)
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        process.join()
        assert kills < 3 or process.exitcode in (0, -signal.SIGKILL)
    assert kills == 3
    assert "going on from checkpoint-" in log.read_text()
    assert_same_weights(folder, undisturbed)
    # A window of one step never spans a checkpoint, so the curve is the same too.
    for mine, theirs in zip(read_log(folder), read_log(undisturbed), strict=True):
        assert {k: mine[k] for k in LOG_COLUMNS[:-1]} == {k: theirs[k] for k in LOG_COLUMNS[:-1]}


def test_a_torn_checkpoint_is_removed_and_the_one_before_is_used(
    bench: Bench, dropout_student: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "final")
    newest, before = folder / "checkpoint-36", folder / "checkpoint-33"
    (newest / "complete.json").unlink()
    (newest / "model.safetensors").write_bytes(b"torn")
    assert find_checkpoint(folder, stamp_of(undisturbed)) == before
    assert not newest.exists()
    said: list[str] = []
    bench.train(folder, bench.cache, student=dropout_student, say=said.append, **LONG)
    assert "train run: going on from checkpoint-33" in said
    assert_same_weights(folder, undisturbed)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "complete.json"])
def test_a_damaged_checkpoint_is_not_gone_on_from(
    name: str, undisturbed: Path, tmp_path: Path
) -> None:
    for step in (33, 36):
        shutil.copytree(undisturbed / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damaged = tmp_path / "checkpoint-36" / name
    content = damaged.read_bytes()
    for bad in (None, content[: len(content) // 2], content[:-3] + b"?" + content[-2:]):
        if bad is None:
            damaged.unlink()
        else:
            shutil.copytree(undisturbed / "checkpoint-36", tmp_path / "checkpoint-36")
            damaged.write_bytes(bad)
        said: list[str] = []
        found = find_checkpoint(tmp_path, stamp_of(undisturbed), say=said.append)
        assert found == tmp_path / "checkpoint-33"
        assert len(said) == 1 and "checkpoint-36" in said[0] and "removed" in said[0]
        assert (name in said[0]) == (not (name == "complete.json" and bad is None))


def test_going_on_at_an_epochs_end_or_within_one_gives_the_same_weights(
    bench: Bench, dropout_student: Path, undisturbed: Path, tmp_path: Path
) -> None:
    steps_per_epoch = len(bench.table) // LONG["batch_size"]
    assert len(bench.table) == steps_per_epoch * LONG["batch_size"] and steps_per_epoch % 3 == 0
    for step in (3, steps_per_epoch, steps_per_epoch + 3):
        folder = tmp_path / str(step)
        checkpoint = f"checkpoint-{step}"
        shutil.copytree(undisturbed / checkpoint, folder / checkpoint)
        bench.train(folder, bench.cache, student=dropout_student, **LONG)
        assert_same_weights(folder, undisturbed)


def test_a_run_killed_after_its_last_step_only_writes_what_is_missing(
    bench: Bench, dropout_student: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "final")
    (folder / "training_log.csv").unlink()
    summary = bench.train(folder, bench.cache, student=dropout_student, **LONG)
    assert_same_weights(folder, undisturbed)
    assert read_log(folder) == read_log(undisturbed)
    assert summary["steps"] == 36


def test_seconds_and_positions_add_up_over_attempts(
    bench: Bench, dropout_student: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "checkpoint-36")
    mark = read_json(folder / "checkpoint-33" / "complete.json")
    write_json(folder / "checkpoint-33" / "complete.json", mark | {"seconds": 1000.0})
    summary = bench.train(folder, bench.cache, student=dropout_student, **LONG)
    assert summary["seconds"] > 1000.0
    whole = read_json(undisturbed / "checkpoint-36" / "complete.json")
    assert summary["trained_positions"] == whole["positions"] > mark["positions"]


@pytest.mark.parametrize("limit", [1, 3])
def test_old_checkpoints_are_removed_but_two_are_kept(
    limit: int, bench: Bench, tmp_path: Path
) -> None:
    bench.train(tmp_path, bench.cache, max_steps=5, save_steps=1, save_total_limit=limit)
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert (
        names == [f"checkpoint-{n}" for n in (3, 4, 5)][-max(2, limit) :]
    )  # the newest may be torn


def test_a_second_process_on_the_same_run_waits(
    bench: Bench, dropout_student: Path, undisturbed: Path, tmp_path: Path
) -> None:
    context, folder = real_processes(), tmp_path / "run"
    first, second = (
        context.Process(
            target=train_in_a_process, args=(bench, folder, dropout_student, tmp_path / name)
        )
        for name in ("first", "second")
    )
    first.start()
    wait_for(lambda: (folder / "checkpoint-3" / "complete.json").exists())
    second.start()
    for process in (first, second):
        process.join()
        assert process.exitcode == 0
    assert "going on" not in (tmp_path / "first").read_text()
    # Had it not waited, it would have gone on from an earlier checkpoint.
    assert (tmp_path / "second").read_text().startswith("train run: going on from checkpoint-36")
    assert_same_weights(folder, undisturbed)


# ---------------------------------------------------------------------------------------------------------
# The rule's work


def run_rule(bench: Bench, out: Path, **given: Any) -> dict[str, Any]:
    keys: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "temperature": 1.0, "device": "cpu"}
    training = section("training", **(keys | given.pop("training", {})))
    options: dict[str, Any] = {
        "cache_path": bench.cache.path,
        "teacher_path": None,
        "fingerprint_path": bench.fingerprint,
        "tokenizer_path": str(bench.teacher_path),
    }
    train_run(
        out,
        name="mine",
        index_path=bench.index_path,
        tokenizer_revision=None,
        student=section("student", config=str(bench.student_path)),
        training=training,
        tracking=section("tracking"),
        teacher_section=section("teacher", device="cpu"),
        say=lambda _: None,
        **(options | given),
    )
    found: dict[str, Any] = read_json(out)
    return found


def test_record_of_a_run_holds_what_evaluate_needs(bench: Bench, tmp_path: Path) -> None:
    from retort.evaluation import METRICS_FROM_TRAINING

    found = run_rule(bench, tmp_path / "abc" / "training.json")
    assert set(METRICS_FROM_TRAINING) <= set(found)
    assert (found["run"], found["id"], found["alpha"]) == ("mine", "abc", 0.5)
    assert read_json(tmp_path / "abc" / "run.json")["config"]["training"]["max_steps"] == 2


def test_a_student_that_changed_since_it_was_named_is_refused(bench: Bench, tmp_path: Path) -> None:
    named = digest(student_content(section("student", config=str(bench.student_path))))
    run_rule(bench, tmp_path / "a" / "training.json", expected_student=named)
    with pytest.raises(ValueError, match="changed since the command began"):
        run_rule(bench, tmp_path / "b" / "training.json", expected_student="0123456789ab")
    assert not (tmp_path / "b" / "training.json").exists()


def test_another_tokenizer_than_the_tokens_is_not_shipped(bench: Bench, tmp_path: Path) -> None:
    shutil.copytree(bench.teacher_path, tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="is not the one that made the tokens"):
        run_rule(bench, tmp_path / "a" / "training.json", tokenizer_path=str(tmp_path / "teacher"))


def test_a_student_of_text_alone_is_as_wide_as_its_siblings(bench: Bench, tmp_path: Path) -> None:
    output = {"distillation_type": "output"}
    run_rule(bench, tmp_path / "a" / "training.json", cache_path=None, training=output)
    assert read_json(tmp_path / "a" / "final" / "config.json")["vocab_size"] == WIDTH
    run_rule(
        bench,
        tmp_path / "b" / "training.json",
        cache_path=None,
        fingerprint_path=None,
        training=output,
    )
    assert read_json(tmp_path / "b" / "final" / "config.json")["vocab_size"] == NUM_TOKENS


def test_a_live_teacher_is_loaded_where_no_cache_is_given(bench: Bench, tmp_path: Path) -> None:
    found = run_rule(
        bench,
        tmp_path / "run" / "training.json",
        cache_path=None,
        teacher_path=str(bench.teacher_path),
        training={"use_cached_logits": False},
    )
    assert found["alpha"] == 0.5
    assert float(read_json(tmp_path / "run" / "training.json")["steps"]) == 2


def test_distilling_without_a_teacher_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'hybrid' \(alpha 0\.5\) learns from a teacher: give --cache"
    ):
        run_rule(bench, tmp_path / "training.json", cache_path=None)


def test_a_cache_of_other_tokens_is_refused(
    bench: Bench, tiny_corpus: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    other = tokenize(tmp_path / "tokens", tiny_corpus, tiny_teacher, max_length=32)
    foreign = make_cache(tmp_path / "logits", other, tiny_teacher, top_k=4)
    with pytest.raises(ValueError, match=r"distributions for other tokens.*made from this index"):
        run_rule(bench, tmp_path / "training.json", cache_path=foreign.path)


def test_a_cache_that_is_gone_is_said_so(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.h5 is gone.*manifest"):
        run_rule(bench, tmp_path / "training.json", cache_path=tmp_path / "none.h5")


def test_log_survives_numbers_that_json_cannot_hold(tmp_path: Path) -> None:
    from retort.training import write_log

    write_log(tmp_path / "log.csv", [{"step": 1, "total_loss": 800.0, "perplexity": math.inf}])
    (row,) = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    assert float(row["perplexity"]) == math.inf and json.loads(row["step"]) == 1


def test_draws_are_trained_from_as_they_are_unbiased_or_not_at_all() -> None:
    codec = Codec("sampled", None, (1.0, 2.0), 300, 0.05, 36, "0" * 32)
    plain = section("training", temperature=1.0)
    assert find_tail(codec, plain, path=Path("cache.h5")) == 0
    for changes in ({"temperature": 2.0}, {"temperature": 1.0, "divergence": "reverse_kl"}):
        with pytest.raises(ValueError, match="unbiased for forward_kl at temperature 1 alone"):
            find_tail(codec, section("training", **changes), path=Path("cache.h5"))
