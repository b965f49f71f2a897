"""Standalone comparison of two models on files: against transformers' own loss, document by document."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from retort.evaluation.compare import (
    choose_loader,
    evaluate_models,
    render_comparison,
)
from retort.evaluation.intervals import FEW_DOCUMENTS
from retort.evaluation.records import Comparison
from retort.evaluation.scores import METRICS, OF_BOTH
from retort.tokens.tokenizer import load_tokenizer
from support.jobs import make_job
from support.sections import section

REPOSITORY = Path(__file__).resolve().parents[3]
LOADING = section("teacher", device="cpu")


def make_text(num_words: int, *, seed: int) -> str:
    """Return common words in a random order."""
    known = ("the", "bird", "can", "see", "a", "house", "by", "old", "trees", "in", "nights")
    return " ".join(random.Random(seed).choices(known, k=num_words))


def save_model(folder: Path, tokenizer: Any, *, width: int, context: int = 64) -> Path:
    """Save a random Llama of one layer with a tokenizer."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=width,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A model with the teacher's tokenizer."""
    tokenizer = load_tokenizer(str(tiny_teacher))
    return save_model(tmp_path_factory.mktemp("student"), tokenizer, width=300)


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose own tokenizer has 400 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([make_text(2000, seed=5)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
    return save_model(tmp_path_factory.mktemp("other_tokenizer"), tokenizer, width=400)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [make_text(3 + 4 * i, seed=i) for i in range(12)] + ["Größe 東京"]


@pytest.fixture
def data(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run_script(*words: Any) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "workflow" / "scripts" / "compare.py"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def measure(model: Path, teacher: Path | None, data: Path, **values: Any) -> Comparison:
    job = make_job(dataset=section("dataset", **values), teacher=LOADING)
    return evaluate_models(str(model), str(teacher) if teacher else None, [str(data)], job)


def own_loss(folder: Path, texts: list[str]) -> tuple[float, int, int]:
    """Return (summed loss, positions, predicted bytes) by transformers' loss; documents must fit the context."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    loss, positions, size = 0.0, 0, 0
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        with torch.inference_mode():
            mean = float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss)
        loss += mean * (len(ids) - 1)
        positions += len(ids) - 1
        size += len(text.encode()) - len(tokenizer.convert_ids_to_tokens(ids[0]))
    return loss, positions, size


@pytest.mark.slow
def test_the_script_prints_the_table_and_writes_metrics_json(
    student: Path, tiny_teacher: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "metrics.json"
    done = run_script(
        "--model", student, "--teacher", tiny_teacher, "--data", data, "--output", out
    )
    assert done.returncode == 0, done.stderr
    found = Comparison.read(out)
    metrics = found.scores.student.metrics
    for name, metric in METRICS.items():
        assert metric.title in done.stdout
        assert name in metrics
    loss = metrics["loss"]
    assert f"{loss.value:.3f} ({loss.low:.3f} to {loss.high:.3f})" in done.stdout
    assert found.scores.teacher is not None
    assert f"{found.scores.teacher.metrics['loss'].value:.3f} (" in done.stdout
    assert (found.model, found.teacher) == (str(student), str(tiny_teacher))
    assert found.scores.not_defined == {} and "Not defined" not in done.stdout
    assert "sequences of at most 64 tokens" in done.stderr
    assert "13 documents" in done.stderr


def test_losses_and_bits_per_byte_are_those_of_the_models_themselves(
    student: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    short = [make_text(3 + i, seed=i) for i in range(8)] + ["Größe 東京"]
    (tmp_path / "short.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in short)
    )
    found = measure(student, other_tokenizer, tmp_path / "short.jsonl")
    for card, folder in ((found.scores.student, student), (found.scores.teacher, other_tokenizer)):
        loss, positions, size = own_loss(folder, short)
        assert card is not None and (card.positions, card.bytes) == (positions, size)
        assert card.metrics["loss"].value == pytest.approx(loss / positions, rel=1e-5)
        bits = loss / math.log(2) / size
        assert card.metrics["bits_per_byte"].value == pytest.approx(bits, rel=1e-5)


@pytest.mark.slow
def test_with_two_tokenizers_only_bits_per_byte_are_compared(
    student: Path, other_tokenizer: Path, data: Path
) -> None:
    done = run_script("--model", student, "--teacher", other_tokenizer, "--data", data)
    assert done.returncode == 0, done.stderr
    assert "different tokenizers" in done.stderr
    assert "Not defined: KL(teacher || student), KL(student || teacher)" in done.stdout
    assert "compare bits per byte" in done.stdout
    found = measure(student, other_tokenizer, data)
    assert set(found.scores.not_defined) == set(OF_BOTH)
    assert all("different tokenizers" in why for why in found.scores.not_defined.values())
    teacher = found.scores.teacher
    assert teacher is not None and teacher.metrics["bits_per_byte"].ends is not None
    assert teacher.reliability and teacher.documents == 13


def test_a_model_alone_needs_no_teacher(student: Path, data: Path) -> None:
    found = measure(student, None, data)
    assert found.teacher is None and found.scores.teacher is None
    text = render_comparison(found)
    assert found.scores.student.documents >= FEW_DOCUMENTS and "too narrow" not in text
    assert "perplexity" in text and "KL" not in text and "Not defined" not in text


def test_whole_documents_are_read_until_there_are_enough_positions(
    student: Path, tiny_teacher: Path, other_tokenizer: Path, data: Path, texts: list[str]
) -> None:
    few = make_job(evaluation=section("evaluation", max_positions=100), teacher=LOADING)
    for teacher in (tiny_teacher, other_tokenizer):
        found = evaluate_models(str(student), str(teacher), [str(data)], few)
        read = found.scores.student.documents
        assert 100 <= found.scores.student.positions < 300 and 1 < read < len(texts)
        warning = f"They are too narrow: {read} documents are too few to resample."
        assert (warning in render_comparison(found)) == (read < FEW_DOCUMENTS)
        if teacher is other_tokenizer:
            assert found.scores.teacher is not None and found.scores.teacher.documents == read


def test_only_responses_to_prompts_are_measured(
    student: Path, tiny_teacher: Path, tmp_path: Path, texts: list[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"ask": "What then?", "say": text, "lang": "ab"[i % 2]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt_column": "ask", "response_column": "say", "language_column": "lang"}
    found = measure(student, tiny_teacher, path, **columns)
    assert found.scores.student.bytes == sum(len(text.encode()) for text in texts)
    assert [row.name for row in found.scores.breakdown["language"]] == ["a", "b"]


@pytest.mark.parametrize("extension", ["txt", "csv"])
def test_plain_text_and_tables_are_read_too(
    student: Path, tmp_path: Path, texts: list[str], extension: str
) -> None:
    path = tmp_path / f"some.{extension}"
    lines = ["text", *(f'"{text}"' for text in texts)] if extension == "csv" else texts
    path.write_text("\n".join(lines))
    assert measure(student, None, path).scores.student.positions > 100


def test_bad_files_and_models_are_refused(
    student: Path, other_tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n{"text": ""}\n')
    with pytest.raises(ValueError, match=r"nothing to predict in .*empty\.jsonl"):
        measure(student, None, tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="cannot load the model 'nowhere/at/all'"):
        measure(Path("nowhere/at/all"), None, data)
    with pytest.raises(ValueError, match=r"different kinds \(csv, json\)"):
        choose_loader(["a.jsonl", "b.csv"])
    narrow = save_model(tmp_path / "narrow", load_tokenizer(str(student)), width=40)
    with pytest.raises(ValueError, match="output layer has only 40 ids"):
        measure(narrow, None, data)
    with pytest.raises(ValueError, match="output layer has only 40 ids"):
        measure(student, narrow, data)


@pytest.mark.parametrize(
    ("names", "loader"),
    [
        (["a.jsonl.gz", "b.json"], "json"),
        (["a.csv"], "csv"),
        (["a.parquet"], "parquet"),
        (["notes"], "text"),
        (["a.md", "b.txt.zst"], "text"),
    ],
)
def test_the_loader_is_chosen_by_file_extension(names: list[str], loader: str) -> None:
    assert choose_loader(names) == loader
