"""Any two models on any text, without a pipeline: what evaluate.py --model --teacher --data does.

Both models read the same whole documents. With one tokenizer they are compared as in a run; with two, each is measured
on its own tokens, and only bits per byte, which counts by the text, says which of them is better.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retort.config.schema import fill_defaults, section_schema
from retort.config.sections import Dataset, Evaluation, Teacher, build_section
from retort.corpus.documents import Counts, Document
from retort.corpus.reading import read_documents
from retort.evaluation.formatting import format_metric, name_metric
from retort.evaluation.intervals import Estimate
from retort.evaluation.run import evaluate_student
from retort.evaluation.scores import METRICS, METRICS_FORMAT, METRICS_VERSION, OF_BOTH, Scores
from retort.evaluation.text_bytes import count_next_bytes
from retort.io.files import write_json
from retort.models.load import (
    CausalLM,
    choose_device,
    choose_dtype,
    describe_device,
    load_model_config,
    load_pretrained,
    load_teacher,
    require_causal,
    split_model,
)
from retort.teacher.features import OTHER_TOKENIZER, TeacherFeatures, digest_keys
from retort.teacher.validation import collect_features
from retort.tokens.sequences import SequenceTable
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from retort.tokens.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_PACKED = (".gz", ".zst")
_WIDTH = 28  # of a column of the table


def choose_loader(paths: Sequence[str]) -> str:
    """Return which loader reads the files: by their ending, what is not json, csv or parquet is text.

    Raises ValueError where they end in different ways.
    """
    endings = [[s for s in Path(path).suffixes if s not in _PACKED][-1:] for path in paths]
    loaders = {_LOADERS.get("".join(ending), "text") for ending in endings}
    if len(loaders) > 1:
        raise ValueError(
            f"--data names files of different kinds ({', '.join(sorted(loaders))}): give files of one kind."
        )
    return loaders.pop()


def choose_loading(*, device: str, dtype: str, trust_remote_code: bool) -> Teacher:
    """Return how both models are loaded, as a section of the config; what is not said is at its default."""
    values = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    section: Teacher = build_section("teacher", fill_defaults(values, section_schema("teacher")))
    return section


@dataclass(frozen=True)
class Side:
    """A model to measure, by path or Hub id, with its tokenizer and the documents cut by it."""

    path: str
    tokenizer: Any
    table: SequenceTable

    @property
    def next_bytes(self) -> Any:
        """Bytes of the token that each counted position predicts, [P]."""
        return count_next_bytes(self.table, self.tokenizer)


def evaluate_by_hand(
    model_path: str,
    teacher_path: str | None,
    *,
    dataset: Dataset,
    evaluation: Evaluation,
    loading: Teacher,
    cpu_threads: int,
) -> dict[str, Any]:
    """Return what metrics.json says of a model, and of a teacher where one is given, on whole documents.

    Documents are read until `evaluation.max_positions` is reached by the model's tokenizer. `loading` says how models
    are loaded: device, dtype, trust_remote_code. Raises ValueError for files and models that cannot be read, and for
    text in which nothing can be predicted.
    """
    torch.set_num_threads(cpu_threads)
    dataset = _fit(dataset, [model_path, *([teacher_path] if teacher_path else [])], loading)
    documents, model = _read(model_path, dataset, evaluation.max_positions, loading)
    logger.info(
        f"{model.table.num_positions:,} positions of {len(documents):,} documents, {_name_files(dataset)}"
    )
    if teacher_path is None:
        return _finish(_evaluate(model, None, evaluation, loading), model, None, loading)
    teacher = _cut(teacher_path, documents, dataset, loading)
    if _is_shared(model, teacher):
        features = _score(teacher, evaluation, loading)
        return _finish(_evaluate(model, features, evaluation, loading), model, teacher, loading)
    logger.info("the two have different tokenizers: each is measured on its own tokens.")
    alone = _evaluate(teacher, None, evaluation, loading)
    scores = _evaluate(model, None, evaluation, loading)
    return _finish(_join(scores, alone), model, teacher, loading)


def _fit(dataset: Dataset, paths: Sequence[str], loading: Teacher) -> Dataset:
    """Return the dataset with sequences that all models can read, every document of one shard and to be measured."""
    configs = [load_model_config(p, trust_remote_code=loading.trust_remote_code) for p in paths]
    limits = [getattr(c.get_text_config(), "max_position_embeddings", None) for c in configs]
    length = min([dataset.max_length, *(limit for limit in limits if limit and limit > 1)])
    if length < dataset.max_length:
        logger.info(f"sequences of at most {length:,} tokens: the shortest context of the models")
    return replace(
        dataset,
        max_length=length,
        num_shards=1,
        sharding="interleaved",
        validation_fraction=1.0,  # nothing here is trained on
    )


def _read(
    path: str, dataset: Dataset, max_positions: int, loading: Teacher
) -> tuple[list[Document], Side]:
    """Return the documents that are measured, and the model's side of them."""
    tokenizer = load_tokenizer(path, trust_remote_code=loading.trust_remote_code)
    documents: list[Document] = []
    positions = 0
    for document in read_documents(dataset, shard=0, num_shards=1, counts=Counts()):
        documents.append(document)
        positions += tokenize_documents(
            [document], tokenizer, dataset, counts=TokenCounts()
        ).num_positions
        if positions >= max_positions:
            break
    if positions == 0:
        raise ValueError(
            f"nothing can be predicted in {_name_files(dataset)}: {len(documents):,} documents, none of which has two "
            "tokens. Give a file with text; of JSON, --dataset-text-column says where it is."
        )
    return documents, _cut(path, documents, dataset, loading)


def _name_files(dataset: Dataset) -> str:
    files = dataset.data_files
    return files if isinstance(files, str) else ", ".join(files or ())


def _cut(path: str, documents: list[Document], dataset: Dataset, loading: Teacher) -> Side:
    tokenizer = load_tokenizer(path, trust_remote_code=loading.trust_remote_code)
    table = tokenize_documents(documents, tokenizer, dataset, counts=TokenCounts())
    return Side(path, tokenizer, table)


def _is_shared(one: Side, other: Side) -> bool:
    """Say whether two models read the same tokens: one vocabulary, and the documents cut alike."""
    return digest_keys(one.table) == digest_keys(other.table) and (
        one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    )


def _score(side: Side, evaluation: Evaluation, loading: Teacher) -> TeacherFeatures:
    """Return what the teacher says of its table; the teacher itself is not kept."""
    teacher = load_teacher(side.path, loading)
    _refuse_narrow(side, teacher.vocabulary)
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
    return evaluate_student(
        model,
        side.table,
        teacher=teacher.to(model.device) if teacher else None,
        batch_size=evaluation.batch_size,
        next_bytes=side.next_bytes,
    )


def _load(side: Side, loading: Teacher) -> CausalLM:
    device = choose_device(loading.device)
    model = load_pretrained(
        side.path,
        dtype=choose_dtype(loading.dtype, device),
        trust_remote_code=loading.trust_remote_code,
    )
    require_causal(model.to(device).eval(), name=side.path)
    split = split_model(model)
    _refuse_narrow(side, split.vocabulary)
    return split


def _refuse_narrow(side: Side, vocabulary: int) -> None:
    """Raise ValueError when a tokenizer gives ids for which the model has no output."""
    largest = int(side.table.ids.max())
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer of {side.path} gives token {largest}, but the model's output layer has {vocabulary:,} ids "
            "only: the two do not belong together."
        )


def _join(scores: Scores, teacher: Scores) -> Scores:
    """Return the scores of two models with different tokenizers: the teacher's own beside the model's."""
    found, other = scores.sections, teacher.sections
    found["not_defined"] |= dict.fromkeys(OF_BOTH, OTHER_TOKENIZER)
    found["teacher_validation"] = other["validation"]
    found["intervals"]["teacher_validation"] = other["intervals"]["validation"]
    found["reliability"]["teacher"] = other["reliability"]["student"]
    return scores


def _finish(scores: Scores, model: Side, teacher: Side | None, loading: Teacher) -> dict[str, Any]:
    about = {
        "format": METRICS_FORMAT,
        "version": METRICS_VERSION,
        "model": model.path,
        "teacher": teacher.path if teacher else None,
        "device": describe_device(choose_device(loading.device)),
    }
    return about | scores.sections


def write_metrics(path: Path, found: dict[str, Any]) -> None:
    """Write metrics.json, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)


def render_metrics(found: dict[str, Any]) -> str:
    """Return the table of a model and its teacher: a line for each metric, values with their intervals."""
    sides = [("validation", "model"), ("teacher_validation", "teacher")]
    shown = [
        (found[section], found["intervals"][section], name)
        for section, name in sides
        if found[section]
    ]
    names = [
        name for name in METRICS if any(values.get(name) is not None for values, _, _ in shown)
    ]
    titles = {name: name_metric(name) for name in names}
    width = max(map(len, titles.values()))
    lines = [f"{whose:<8} {found[whose]}" for whose in ("model", "teacher") if found[whose]]
    lines += ["", " " * width + "".join(f"{name:>{_WIDTH}}" for _, _, name in shown)]
    for name in names:
        cells = [_cell(name, values, ends) for values, ends, _ in shown]
        lines.append(f"{titles[name]:<{width}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells))
    lines += ["", "In brackets: 95 % intervals, from drawing the documents anew."]
    reasons: dict[str, list[str]] = {}
    for name, reason in found["not_defined"].items():
        reasons.setdefault(reason, []).append(METRICS[name].title)
    lines += [
        f"Not defined: {', '.join(t)}; {why}." for why, t in reasons.items() if found["teacher"]
    ]
    if OTHER_TOKENIZER in reasons:
        lines.append("Losses are of each model's own tokens: compare bits per byte.")
    return "\n".join(lines)


def _cell(name: str, values: dict[str, Any], ends: dict[str, list[float] | None]) -> str:
    if values.get(name) is None:
        return "-"
    text, interval = format_metric(name, Estimate(values[name], *(ends.get(name) or (None, None))))
    return f"{text} ({interval})" if interval else text
