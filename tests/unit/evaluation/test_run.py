"""Held-out metrics against a numpy implementation that scores each position alone."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaConfig

from retort.evaluation.records import Metrics
from retort.evaluation.run import evaluate_run, evaluate_student
from retort.evaluation.scores import METRICS, OF_BOTH
from retort.evaluation.text_bytes import count_next_bytes
from retort.io.digests import digest, digest_folder
from retort.io.fingerprints import TeacherRecord
from retort.models.causal_lm import CausalLM, split_model
from retort.models.load import load_pretrained, load_teacher
from retort.report.runs import load_results, read_documents
from retort.teacher.features import TeacherFeatures, digest_keys, read_features
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable, concatenate_tables
from retort.tokens.tokenizer import load_tokenizer
from retort.training.record import TrainingRecord
from support.jobs import make_job
from support.records import make_manifest, make_run_record, make_training_record
from support.sections import section
from support.tiny import NUM_TOKENS, WIDTH, score_held_out, swap_tokens

Matrix = NDArray[np.float64]


@pytest.fixture(scope="module")
def features_path(
    tmp_path_factory: pytest.TempPathFactory, index: TokenIndex, tiny_teacher: Path
) -> Path:
    return score_held_out(tmp_path_factory.mktemp("validation"), index, tiny_teacher)


@pytest.fixture(scope="module")
def features(features_path: Path) -> TeacherFeatures:
    return read_features(features_path)


def make_student(vocabulary: int, *, seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return split_model(model)


def log_probabilities(model: Any, table: SequenceTable, *, num_tokens: int | None = None) -> Matrix:
    """Return log-probabilities of each counted position in float64; ids from `num_tokens` on have none."""
    rows = []
    for i in range(len(table)):
        ids = torch.from_numpy(np.asarray(table[i].ids, dtype=np.int64))
        with torch.inference_mode():
            z_TV = model(input_ids=ids[None]).logits[0].double().numpy()
        for t in range(len(ids)):
            if table[i].loss_mask[t]:
                z_V = z_TV[t].copy()
                z_V[num_tokens:] = z_V[num_tokens:] if num_tokens is None else -np.inf
                rows.append(z_V - z_V.max() - np.log(np.exp(z_V - z_V.max()).sum()))
    return np.array(rows)


def expected_tokens(table: SequenceTable) -> list[int]:
    return [
        int(table[i].ids[t + 1])
        for i in range(len(table))
        for t in range(len(table[i].ids))
        if table[i].loss_mask[t]
    ]


def test_next_tokens_are_those_after_the_counted_positions(index: TokenIndex) -> None:
    table = index.read_split("val")
    assert table.next_ids.tolist() == expected_tokens(table)


@pytest.mark.parametrize("width", [NUM_TOKENS, WIDTH, WIDTH + 10])
def test_metrics_are_those_of_a_reference(
    width: int, index: TokenIndex, features: TeacherFeatures, tiny_teacher: Path
) -> None:
    table, student = index.read_split("val"), make_student(width)
    found, _ = evaluate_student(student, table, teacher=features, batch_size=3)
    log_q = log_probabilities(student.model, table)
    log_p = log_probabilities(load_pretrained(str(tiny_teacher)), table, num_tokens=NUM_TOKENS)
    tokens, n = np.array(expected_tokens(table)), len(log_q)
    loss = -log_q[np.arange(n), tokens].mean()
    kept = slice(0, NUM_TOKENS)
    kl = (np.exp(log_p[:, kept]) * (log_p[:, kept] - log_q[:, kept])).sum(axis=1).mean()
    agreement = (log_p.argmax(axis=1) == log_q.argmax(axis=1)).mean()
    teacher_loss = -log_p[np.arange(n), tokens].mean()
    scores = {name: estimate.value for name, estimate in found.student.metrics.items()}
    assert found.teacher is not None
    assert scores["loss"] == pytest.approx(loss, abs=1e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert scores["kl_to_teacher"] == pytest.approx(kl, abs=1e-5)
    assert scores["agreement"] == pytest.approx(agreement, abs=1e-9)
    assert (found.student.positions, found.student.documents) == (
        n,
        len(set(table.documents.tolist())),
    )
    assert found.teacher.metrics["loss"].value == pytest.approx(teacher_loss, abs=1e-5)
    assert found.teacher.metrics["perplexity"].value == pytest.approx(
        np.exp(teacher_loss), rel=1e-4
    )


def test_a_teacher_is_its_own_best_student(
    index: TokenIndex, features: TeacherFeatures, tiny_teacher: Path
) -> None:
    table = index.read_split("val")
    teacher = load_teacher(str(tiny_teacher), section("teacher", device="cpu"))
    found, _ = evaluate_student(
        teacher, table, teacher=replace(features, num_tokens=WIDTH), batch_size=3
    )
    assert found.teacher is not None
    assert abs(found.student.metrics["kl_to_teacher"].value) < 1e-6
    assert found.student.metrics["agreement"].value == 1.0
    assert found.student.metrics["loss"].value == pytest.approx(
        found.teacher.metrics["loss"].value, abs=1e-6
    )


def test_a_student_that_prefers_ids_unknown_to_its_teacher_does_not_agree(
    index: TokenIndex, features: TeacherFeatures, tiny_teacher: Path
) -> None:
    model = load_pretrained(str(tiny_teacher)).eval()
    model.resize_token_embeddings(WIDTH + 2, mean_resizing=False)
    with torch.no_grad():  # whatever the hidden state, one of the two has the largest logit
        model.get_output_embeddings().weight[-2:] = torch.tensor([[100.0], [-100.0]])
    found, _ = evaluate_student(
        split_model(model), index.read_split("val"), teacher=features, batch_size=8
    )
    assert found.student.metrics["agreement"].value < 0.05


def test_batches_do_not_change_the_metrics(index: TokenIndex, features: TeacherFeatures) -> None:
    table, student = index.read_split("val"), make_student(WIDTH)
    one, many = (
        evaluate_student(student, table, teacher=features, batch_size=b)[0].student for b in (1, 16)
    )
    assert one.bytes is many.bytes is None  # without next_bytes
    assert one.metrics.keys() == many.metrics.keys() == METRICS.keys() - {"bits_per_byte"}
    for name, estimate in one.metrics.items():
        assert many.metrics[name].value == pytest.approx(estimate.value, rel=1e-6, abs=1e-6)


def test_without_a_teacher_there_is_nothing_to_compare_with(index: TokenIndex) -> None:
    found, _ = evaluate_student(
        make_student(WIDTH), index.read_split("val"), teacher=None, batch_size=4
    )
    assert found.teacher is None
    assert not found.student.metrics.keys() & set(OF_BOTH)
    assert found.not_defined["kl_to_teacher"] == "there is no teacher to compare with"
    assert found.student.metrics["loss"].value > 0


def test_nothing_held_out_is_refused(index: TokenIndex) -> None:
    empty = index.read_split("val").slice(0, 0)
    with pytest.raises(ValueError, match=r"no held-out position.*validation_fraction"):
        evaluate_student(make_student(WIDTH), empty, teacher=None, batch_size=4)


# evaluate_run


TRAINED = make_training_record("mine", "logit", trained_positions=400, seconds=1.5, teacher=None)
CODEC = {"method": "top_k", "top_k": 8, "min_probability": None}
HEADER = {"teacher": "c0ffee", "codec": CODEC}
MANIFEST = make_manifest(positions=400, bytes_per_position=50.0, top_k=8, header=HEADER)


@pytest.fixture
def trained(tmp_path: Path, tiny_teacher: Path, index: TokenIndex) -> Path:
    """training.json of a finished run, its student beside it."""
    make_student(WIDTH).model.save_pretrained(tmp_path / "final")
    load_tokenizer(str(tiny_teacher)).save_pretrained(tmp_path / "final")
    change_record(
        tmp_path / "training.json",
        tokens=index.record.content,
        cache=digest(HEADER),
        final=digest_folder(tmp_path / "final"),
    )
    return tmp_path / "training.json"


def change_record(path: Path, **values: Any) -> None:
    record = TrainingRecord.read(path) if path.exists() else TRAINED
    record.model_copy(update=values).write(path)


def read_metrics(trained: Path) -> Metrics:
    return Metrics.read(trained.parent / "evaluation" / "metrics.json")


def run_rule(
    trained: Path,
    index: TokenIndex,
    features_path: Path | None,
    *,
    fingerprint: Path | None = None,
    **values: Any,
) -> str:
    if not (trained.parent / "manifest.json").exists():
        MANIFEST.write(trained.parent / "manifest.json")
    if features_path and not fingerprint and TrainingRecord.read(trained).teacher is None:
        record = TeacherRecord.read(features_path.with_name("fingerprint.json"))
        change_record(trained, teacher=record.weights)  # it learned from the cache
    manifest = trained.parent / "manifest.json" if features_path else None
    training = section("training", device="cpu", cpu_threads=1)
    return evaluate_run(
        trained.parent / "evaluation" / "metrics.json",
        make_job(evaluation=section("evaluation", **values), training=training),
        index_path=index.path,
        training_path=trained,
        features_paths=[features_path] if features_path else [],
        signal_paths=[path for path in (fingerprint or manifest,) if path],
    )


def test_the_card_gets_the_numbers_and_may_be_edited(
    trained: Path, index: TokenIndex, features_path: Path
) -> None:
    card = trained.parent / "final" / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# Mine\n")
    change_record(trained, final=digest_folder(card.parent))
    run_rule(trained, index, features_path)
    first = card.read_text()
    loss = read_metrics(trained).scores.student.metrics["loss"].value
    assert f"| held-out loss, nats/token | {loss:.3f}" in first and "top-1 agreement" in first
    card.write_text(first.replace("# Mine", "# My own words"))
    run_rule(trained, index, features_path)
    assert card.read_text() == first.replace("# Mine", "# My own words")


def test_metrics_file_holds_what_the_report_reads(
    trained: Path,
    index: TokenIndex,
    features_path: Path,
    features: TeacherFeatures,
    tiny_teacher: Path,
) -> None:
    line = run_rule(trained, index, features_path)
    path = trained.parent / "evaluation" / "metrics.json"
    found = read_metrics(trained)
    table = index.read_split("val")
    direct, _ = evaluate_student(
        make_student(WIDTH),
        table,
        teacher=features,
        batch_size=8,
        next_bytes=count_next_bytes(table, load_tokenizer(str(tiny_teacher))),
        token_counts=index.read_token_counts(),
    )
    assert found.scores == direct
    assert found.content == digest_keys(table)
    assert (found.sequences, found.leaked_sequences) == (len(table), 0)
    assert set(found.scores.breakdown) == {"place", "frequency"}  # every entropy is in one class
    metrics = found.scores.student.metrics
    assert metrics["bits_per_byte"].value > 1 and found.scores.not_defined == {}
    by_document = read_documents(path.with_name("documents.csv"))
    loss = by_document["loss"].sum() / by_document["positions"].sum()
    assert loss == pytest.approx(metrics["loss"].value)
    assert found.training == TrainingRecord.read(trained)
    assert found.teacher == str(tiny_teacher) and (found.teacher_parameters or 0) > 1000
    assert found.cache == MANIFEST
    assert f"{metrics['loss'].value:.4f} nats/token" in line and "evaluate mine" in line
    read = load_results([path])  # the report's own reader accepts it
    assert list(read.runs.loss) == [metrics["loss"].value]
    assert found.tokens == index.record.content


def test_a_run_without_a_teacher_has_metrics_too(trained: Path, index: TokenIndex) -> None:
    line = run_rule(trained, index, None)
    found = read_metrics(trained)
    assert found.teacher is None and found.cache is None and "KL" not in line
    runs = load_results([trained.parent / "evaluation" / "metrics.json"]).runs
    assert runs.kl_to_teacher.isna().all()


@pytest.mark.parametrize("weight", [math.nan, 1e38])
def test_a_run_that_diverged_is_named(
    weight: float, trained: Path, index: TokenIndex, features_path: Path
) -> None:
    student = make_student(WIDTH).model
    with torch.no_grad():
        student.get_output_embeddings().weight.fill_(weight)
    student.save_pretrained(trained.parent / "final")
    change_record(trained, final=digest_folder(trained.parent / "final"))
    with pytest.raises(ValueError, match=r"run 'mine' diverged .*not finite at .*learning_rate"):
        run_rule(trained, index, features_path)
    assert not (trained.parent / "evaluation" / "metrics.json").exists()


def test_without_a_loadable_tokenizer_only_bits_per_byte_is_missing(
    trained: Path, index: TokenIndex, features_path: Path
) -> None:
    (trained.parent / "final" / "tokenizer.json").write_text("{}")
    change_record(trained, final=digest_folder(trained.parent / "final"))
    run_rule(trained, index, features_path)
    found = read_metrics(trained)
    assert (
        "bits_per_byte" not in found.scores.student.metrics
        and found.scores.student.metrics["loss"].value > 0
    )
    assert "cannot load the tokenizer" in found.scores.not_defined["bits_per_byte"]


def test_a_teacher_with_another_tokenizer_is_not_compared_with(
    trained: Path, index: TokenIndex, features_path: Path, tmp_path: Path
) -> None:
    fingerprint = TeacherRecord.read(features_path.parent / "fingerprint.json")
    fingerprint.write(tmp_path / "same.json")
    run_rule(trained, index, features_path, fingerprint=tmp_path / "same.json")
    assert read_metrics(trained).scores.student.metrics["kl_to_teacher"].value > 0
    # Other files, the same ids.
    files = fingerprint.tokenizer.model_copy(update={"fingerprint": "0123456789ab"})
    fingerprint = fingerprint.model_copy(update={"tokenizer": files})
    fingerprint.write(tmp_path / "files.json")
    run_rule(trained, index, features_path, fingerprint=tmp_path / "files.json")
    assert read_metrics(trained).scores.student.metrics["kl_to_teacher"].value > 0
    other = str(swap_tokens(tmp_path / "other", Path(fingerprint.name)))
    fingerprint.model_copy(update={"name": other}).write(tmp_path / "other.json")
    run_rule(trained, index, features_path, fingerprint=tmp_path / "other.json")
    found = read_metrics(trained)
    assert found.teacher is None and found.scores.teacher is None
    assert set(found.scores.not_defined) == set(OF_BOTH)
    assert "different tokenizers" in found.scores.not_defined["kl_to_teacher"]
    assert found.scores.student.metrics["bits_per_byte"].value > 0


def test_features_of_other_held_out_sequences_are_refused(
    trained: Path, index: TokenIndex, features_path: Path
) -> None:
    with pytest.raises(ValueError, match="other val sequences"):
        run_rule(trained, index, features_path, max_positions=100)
    assert not (trained.parent / "evaluation" / "metrics.json").exists()


def test_a_missing_student_is_refused(
    trained: Path, index: TokenIndex, features_path: Path
) -> None:
    (trained.parent / "final" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"final is not what .*model\.safetensors is missing"):
        run_rule(trained, index, features_path)


def test_a_replaced_student_is_refused(
    trained: Path, index: TokenIndex, features_path: Path
) -> None:
    make_student(WIDTH, seed=1).model.save_pretrained(trained.parent / "final")
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was written"):
        run_rule(trained, index, features_path)


def test_a_student_is_not_compared_with_another_teacher(
    trained: Path, index: TokenIndex, features_path: Path, features: TeacherFeatures
) -> None:
    change_record(trained, teacher="0123456789ab")
    with pytest.raises(ValueError, match=f"scored by teacher {features.teacher}.*0123456789ab"):
        run_rule(trained, index, features_path)
    change_record(trained, teacher=features.teacher)
    run_rule(trained, index, features_path)


def test_a_student_without_a_teacher_is_compared_only_with_a_recorded_one(
    trained: Path, index: TokenIndex, features_path: Path, tmp_path: Path
) -> None:
    change_record(trained, teacher=None)
    paths: dict[str, Any] = {"index_path": index.path, "training_path": trained}
    paths["features_paths"] = [features_path]
    with pytest.raises(ValueError, match=r"does not say whose features these are. Give --signal"):
        evaluate_run(tmp_path / "metrics.json", make_job(), signal_paths=[], **paths)
    fingerprint = features_path.with_name("fingerprint.json")
    TeacherRecord.read(fingerprint).model_copy(update={"weights": "0123456789ab"}).write(
        tmp_path / "other.json"
    )
    with pytest.raises(ValueError, match=r"scored by teacher .*0123456789ab"):
        run_rule(trained, index, features_path, fingerprint=tmp_path / "other.json")
    run_rule(trained, index, features_path, fingerprint=fingerprint)
    assert read_metrics(trained).scores.teacher is not None


def test_an_index_of_other_tokens_is_refused(trained: Path, index: TokenIndex) -> None:
    change_record(trained, tokens="0123456789ab")
    with pytest.raises(ValueError, match=f"other tokens .*{index.record.content}.*0123456789ab"):
        run_rule(trained, index, None)
    assert not (trained.parent / "evaluation" / "metrics.json").exists()


@pytest.mark.parametrize(
    "changes",
    [{"method": "entropy"}, {"top_k": 9}, {"header": HEADER | {"codec": CODEC | {"top_k": 9}}}],
)
def test_a_manifest_of_another_cache_is_refused(
    changes: dict[str, Any], trained: Path, index: TokenIndex, features_path: Path
) -> None:
    top_k = changes.get("header", HEADER)["codec"]["top_k"]
    found = MANIFEST.model_copy(update={"top_k": top_k} | changes)
    found.write(trained.parent / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json does not describe the cache that"):
        run_rule(trained, index, features_path)


def test_the_run_record_of_another_run_is_refused(trained: Path, index: TokenIndex) -> None:
    own = {"distillation_type": "logit", "alpha": 0.0, "temperature": 2.0, "seed": 0}
    make_run_record({"training": own}, run="mine").write(trained.parent / "run.json")
    run_rule(trained, index, None)
    for settings, run in ((own, "other"), (own | {"distillation_type": "hybrid"}, "mine")):
        make_run_record({"training": settings}, run=run).write(trained.parent / "run.json")
        with pytest.raises(ValueError, match=r"run\.json is of another run"):
            run_rule(trained, index, None)


def test_held_out_sequences_that_are_trained_on_are_counted(
    index: TokenIndex, tmp_path: Path
) -> None:
    held_out, train = index.read_split("val"), index.read_split("train")
    assert index.count_leaked(held_out) == 0
    mixed = concatenate_tables([held_out.slice(0, 5), train.slice(2, 6), train.slice(2, 3)])
    assert index.count_leaked(mixed) == 5
    assert index.count_leaked(train) == len(train)
