"""Standalone comparison of any two models on any text: compare.py --model --teacher --data.

Both models read the same whole documents. With one tokenizer they are compared as in a run. With two, each is measured
on its own tokens, and only bits per byte, which does not depend on the tokens, tells which model is better.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from retort.config.handoff import Job
from retort.config.sections import Dataset, Evaluation, Teacher
from retort.corpus.documents import Counts, Document
from retort.corpus.reading import read_shard_documents
from retort.evaluation.formatting import format_metric, name_metric
from retort.evaluation.intervals import FEW_DOCUMENTS
from retort.evaluation.records import Comparison, Scorecard, Scores
from retort.evaluation.run import evaluate_student
from retort.evaluation.scores import METRICS, OF_BOTH, UNITS
from retort.evaluation.text_bytes import count_next_bytes
from retort.io.run_record import describe_run
from retort.io.text_files import LOADER_OF, find_ending
from retort.models.causal_lm import CausalLM, require_causal, split_model
from retort.models.generate import find_context_length
from retort.models.load import (
    choose_device,
    choose_dtype,
    describe_device,
    load_model_config,
    load_pretrained,
    load_teacher,
    name_dtype,
)
from retort.teacher.features import OTHER_TOKENIZER, TeacherFeatures, digest_keys
from retort.teacher.validation import collect_features
from retort.tokens.sequences import SequenceTable
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from retort.tokens.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def choose_loader(paths: Sequence[str]) -> str:
    """Return the loader for the files by their extension: json, csv, parquet, else text.

    Raises ValueError when the files need different loaders.
    """
    loaders = {LOADER_OF.get(find_ending(Path(path)), "text") for path in paths}
    if len(loaders) > 1:
        raise ValueError(
            f"--data has files of different kinds ({', '.join(sorted(loaders))}): give files of one kind."
        )
    return loaders.pop()


@dataclass(frozen=True)
class Side:
    """One of the models: its path or Hub id, its tokenizer, and the documents tokenized with it."""

    path: str
    tokenizer: Any
    table: SequenceTable
    normalized: int  # documents whose length in bytes the tokenizer changed

    @property
    def next_bytes(self) -> NDArray[np.int64] | str:
        """Bytes of text of the token that each counted position predicts, int64 [P], or why there are none."""
        return count_next_bytes(self.table, self.tokenizer, changed=self.normalized)


def evaluate_models(
    model_path: str, teacher_path: str | None, files: Sequence[str], job: Job
) -> Comparison:
    """Return the scores of a model, beside a teacher's if given, on the whole documents of files.

    Documents are read until they have `evaluation.max_positions` positions in the model's tokens. The section `teacher`
    gives device, dtype, threads and trust_remote_code of both models.
    Raises ValueError when a file or model cannot be read, and when the text has no position to predict.
    """
    started = time.monotonic()
    evaluation, loading = job.config.evaluation, job.config.teacher
    torch.set_num_threads(loading.generation.cpu_threads)
    source = {
        "name": choose_loader(files),
        "data_files": tuple(files),
        "validation_files": None,
        "mix": (),
    }
    dataset = job.config.dataset.model_copy(update=source)
    dataset = _fit_context(
        dataset, [model_path, *([teacher_path] if teacher_path else [])], loading
    )
    documents, model = _read_documents(model_path, dataset, evaluation.max_positions, loading)
    logger.info(
        f"{model.table.num_positions:,} positions of {len(documents):,} documents, {_name_files(dataset)}"
    )
    teacher = _tokenize(teacher_path, documents, dataset, loading) if teacher_path else None
    device = choose_device(loading.device)
    return Comparison(
        model=model_path,
        teacher=teacher_path,
        units=UNITS,
        scores=_compare(model, teacher, evaluation, loading),
        made=describe_run(
            section={"dataset": dataset, "evaluation": evaluation},
            dtype=name_dtype(choose_dtype(loading.dtype, device)),
            device=describe_device(device),
            seconds=time.monotonic() - started,
        ),
    )


def _compare(model: Side, teacher: Side | None, evaluation: Evaluation, loading: Teacher) -> Scores:
    """Return the scores of a model and its teacher: compared, if they have the same tokens."""
    if teacher is None:
        return _evaluate(model, None, evaluation, loading)
    if _have_same_tokens(model, teacher):
        features = _score_teacher(teacher, evaluation, loading)
        return _evaluate(model, features, evaluation, loading)
    logger.info("the two models have different tokenizers: each is measured on its own tokens.")
    alone = _evaluate(teacher, None, evaluation, loading)
    scores = _evaluate(model, None, evaluation, loading)
    reasons = alone.not_defined | scores.not_defined | dict.fromkeys(OF_BOTH, OTHER_TOKENIZER)
    return scores.model_copy(update={"teacher": alone.student, "not_defined": reasons})


def _fit_context(dataset: Dataset, paths: Sequence[str], loading: Teacher) -> Dataset:
    """Return the dataset with sequences that fit every model's context, one shard, and all documents held out."""
    configs = [load_model_config(p, trust_remote_code=loading.trust_remote_code) for p in paths]
    length = min([dataset.max_length, *filter(None, map(find_context_length, configs))])
    if length < dataset.max_length:
        logger.info(f"sequences of at most {length:,} tokens: the shortest context of the models")
    return dataset.model_copy(
        update={
            "max_length": length,
            "num_shards": 1,
            "sharding": "interleaved",
            "validation_fraction": 1.0,  # nothing here is trained on
        }
    )


def _read_documents(
    path: str, dataset: Dataset, max_positions: int, loading: Teacher
) -> tuple[list[Document], Side]:
    """Return the documents to measure on, and the model with its tokens of them."""
    tokenizer = load_tokenizer(path, trust_remote_code=loading.trust_remote_code)
    documents: list[Document] = []
    positions = 0
    for document in read_shard_documents(dataset, shard=0, num_shards=1, counts=Counts()):
        documents.append(document)
        positions += tokenize_documents(
            [document], tokenizer, dataset, counts=TokenCounts()
        ).num_positions
        if positions >= max_positions:
            break
    if positions == 0:
        raise ValueError(
            f"nothing to predict in {_name_files(dataset)}: none of its {len(documents):,} documents has two tokens. "
            "Give a file with text; for JSON, --set dataset.text_column=NAME names the column."
        )
    return documents, _tokenize(path, documents, dataset, loading)


def _name_files(dataset: Dataset) -> str:
    files = dataset.data_files
    return files if isinstance(files, str) else ", ".join(files or ())


def _tokenize(path: str, documents: list[Document], dataset: Dataset, loading: Teacher) -> Side:
    tokenizer = load_tokenizer(path, trust_remote_code=loading.trust_remote_code)
    counts = TokenCounts()
    table = tokenize_documents(documents, tokenizer, dataset, counts=counts)
    return Side(path, tokenizer, table, counts.held_out_normalized)


def _have_same_tokens(one: Side, other: Side) -> bool:
    """Whether two models have one vocabulary and the same tokens of the documents."""
    return digest_keys(one.table) == digest_keys(other.table) and (
        one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    )


def _score_teacher(side: Side, evaluation: Evaluation, loading: Teacher) -> TeacherFeatures:
    """Return the teacher's hidden states and head for its table; the teacher itself is freed."""
    teacher = load_teacher(side.path, loading)
    _require_outputs(side, teacher.vocabulary)
    features = collect_features(
        teacher, side.table, batch_size=evaluation.batch_size, on_batch=lambda _: None
    )
    return TeacherFeatures(
        features={"val": features},
        train_sequences=np.zeros(0, np.int64),
        head=teacher.head,
        num_tokens=len(side.tokenizer),
        teacher="",
        name=side.path,
        num_parameters=teacher.num_parameters,
        keys={"val": digest_keys(side.table)},
    )


def _evaluate(
    side: Side, teacher: TeacherFeatures | None, evaluation: Evaluation, loading: Teacher
) -> Scores:
    model = _load(side, loading)
    scores, _ = evaluate_student(
        model,
        side.table,
        teacher=teacher.to(model.device) if teacher else None,
        batch_size=evaluation.batch_size,
        next_bytes=side.next_bytes,
        name=repr(side.path),
    )
    return scores


def _load(side: Side, loading: Teacher) -> CausalLM:
    device = choose_device(loading.device)
    model = load_pretrained(
        side.path,
        dtype=choose_dtype(loading.dtype, device),
        trust_remote_code=loading.trust_remote_code,
    )
    require_causal(model.to(device).eval(), name=side.path)
    split = split_model(model)
    _require_outputs(side, split.vocabulary)
    return split


def _require_outputs(side: Side, vocabulary: int) -> None:
    """Raise ValueError when a tokenizer gives ids beyond the model's output layer."""
    largest = int(side.table.ids.max())
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer of {side.path} gives token {largest}, but the model's output layer has only {vocabulary:,} "
            "ids: tokenizer and model do not match. Use the tokenizer that the model was trained with."
        )


def render_comparison(found: Comparison) -> str:
    """Return a table of a model and its teacher for the terminal: a line for each metric, values with intervals."""
    shown = {"model": (found.model, found.scores.student)}
    if found.teacher is not None and found.scores.teacher is not None:
        shown["teacher"] = (found.teacher, found.scores.teacher)
    rows = {
        name_metric(name): [_cell(name, card) for _, card in shown.values()]
        for name in METRICS
        if any(name in card.metrics for _, card in shown.values())
    }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=[f"  {whose}" for whose in shown])
    lines = [f"{whose:<8} {path}" for whose, (path, _) in shown.items()]
    lines += ["", *table.to_string().splitlines()]
    lines += ["", "In brackets: 95 % intervals, from resampling the documents."]
    if (count := found.scores.student.documents) < FEW_DOCUMENTS:
        lines += [f"They are too narrow: {count} documents are too few to resample."]
    reasons: dict[str, list[str]] = {}
    for name, reason in found.scores.not_defined.items():
        reasons.setdefault(reason, []).append(METRICS[name].title)
    lines += [f"Not defined: {', '.join(t)}; {why}." for why, t in reasons.items() if found.teacher]
    if OTHER_TOKENIZER in reasons:
        lines.append("Losses are per token of each model's own tokenizer: compare bits per byte.")
    return "\n".join(lines)


def _cell(name: str, card: Scorecard) -> str:
    if name not in card.metrics:
        return "-"
    text, interval = format_metric(name, card.metrics[name])
    return f"{text} ({interval})" if interval else text
