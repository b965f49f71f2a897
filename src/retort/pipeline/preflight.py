"""Cheap checks before any expensive job: folders, corpora, models, vocabularies, context lengths, logins.

Each check raises ValueError with the value found, what was expected and what to do. None needs a GPU.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import AutoModelForCausalLM

from retort.artifacts.imported import complete_import
from retort.config.dataset import SYNTHESIS, name_source
from retort.config.sections import Config, Dataset, Output, Tracking, Training
from retort.corpus.checking import check_corpus
from retort.corpus.documents import Document
from retort.corpus.sources import find_named_for_evaluation, is_hub, list_files
from retort.evaluation.tasks import check_tasks
from retort.io.files import require_writable
from retort.io.objects import require_usable
from retort.io.records import Record
from retort.io.run_record import RunRecord, describe_run
from retort.models.attention import set_attention
from retort.models.causal_lm import split_model
from retort.models.frozen import check_freeze
from retort.models.load import (
    count_parameters,
    refuse_short_context,
)
from retort.models.lora import count_adapters
from retort.models.students import describe_ids, name_student, student_config
from retort.pipeline.costly_defaults import find_costly_defaults
from retort.pipeline.demo_teacher import DemoTokenizer
from retort.pipeline.estimating import estimate_in_short
from retort.pipeline.mistakes import Mistakes
from retort.pipeline.packages import find_missing_for_training
from retort.pipeline.pruned_student import shape_student
from retort.pipeline.teacher_checks import (
    check_other_teachers,
    check_teacher,
    find_same_teachers,
)
from retort.synthesis.run import check_synthesis_inputs
from retort.tokens.characters import find_lost_characters
from retort.tokens.tokenize import TokenCounts, require_template, tokenize_documents
from retort.tokens.vocabularies import require_student_ids
from retort.training.checkpoints import require_start
from retort.training.packing import find_layout_faults

_SAMPLE_CHARACTERS = 300_000  # tokenized in about a second
_PROBED_PARAMETERS = 200_000_000  # of a student that is built for a probe: a second or two, 0.8 GB


class CheckRecord(Record, format="retort-check", version=2):
    """checks/<id>.json: the names of the runs whose inputs are usable, and lines about what was found."""

    runs: tuple[str, ...]
    notes: tuple[str, ...]
    made: RunRecord


def check_project(configs: Mapping[str, Config], *, kept_path: Path | None = None) -> CheckRecord:
    """Check the inputs of every run. Raises ValueError with all mistakes.

    kept_path: where the estimate is written, for the report, unless one is kept there already.
    """
    started = time.monotonic()
    notes: list[str] = []
    mistakes = Mistakes()
    for name, config in configs.items():
        for folder in (config.output.results_dir, config.output.cache_folder):
            with mistakes:
                require_writable(Path(folder))
        with mistakes:
            if config.output.store:
                _check_store(config.output.store)
        sample: list[Document] = []
        if config.teacher.imported:
            config = complete_import(config)
        with mistakes:
            notes += [] if config.teacher.imported else _check_corpus(config, sample)
        with mistakes:
            tokenizer, width, note = check_teacher(config, mistakes)
            notes.append(note)
            with mistakes:
                notes += _check_tokens(config, tokenizer, sample)
            with mistakes:
                found, *others = _check_student(config, tokenizer, width, mistakes)
                notes += [f"run {name}: {found}", *_check_students_tokenizer(config, tokenizer)]
                notes += others
            notes += check_other_teachers(config, tokenizer, mistakes)
            for one in config.teacher.members:
                notes += find_same_teachers(config.model_copy(update={"teacher": one}))
        with mistakes:
            _check_start(config.training)
        with mistakes:
            _check_trackers(config.tracking)
        with mistakes:
            notes += check_tasks(config.evaluation)
    mistakes.require_none()
    with mistakes:
        lines, faults = estimate_in_short(configs, kept_path=kept_path)
        notes += lines
        mistakes.found |= dict.fromkeys(faults)
    mistakes.require_none()
    made = describe_run(section={"runs": configs}, seconds=time.monotonic() - started)
    return CheckRecord(runs=tuple(configs), notes=tuple(dict.fromkeys(notes)), made=made)


def _check_store(url: str) -> None:
    """Raise ValueError when nothing can be written to the store of the caches' parts, or read from it."""
    try:
        require_usable(url)
    except ValueError as error:
        raise ValueError(f"output.cache_dir: {error}") from None


def _check_start(training: Training) -> None:
    """Raise ValueError when the checkpoint that training starts from cannot be used."""
    if training.resume_from_checkpoint is not None:
        require_start(training, max_steps=training.max_steps)


def _check_trackers(tracking: Tracking) -> None:
    """Raise ValueError when a tracker is not installed, or would ask for a login hours later."""
    wanted = {"wandb": tracking.use_wandb, "tensorboard": tracking.use_tensorboard}
    for name, is_wanted in wanted.items():
        if is_wanted and find_spec(name) is None:
            raise ValueError(
                f"tracking.use_{name} is true, but {name} is not installed here. Type: pip install {name}, or leave "
                "the key out: every run writes training_log.csv without it."
            )
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    is_offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
    if tracking.use_wandb and not (is_offline or _has_login(host)):
        raise ValueError(
            f"tracking.use_wandb is true, but there is no login for {host}. Type: wandb login, or set WANDB_API_KEY, "
            "or, without a network, export WANDB_MODE=offline and upload later with wandb sync."
        )


def _has_login(host: str) -> bool:
    """Return whether W&B would find an API key for `host`, in the environment or in .netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc(str(path)).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _check_corpus(config: Config, sample: list[Document]) -> list[str]:
    """Return notes about the corpus; add its first documents to `sample`."""
    if config.dataset.name == SYNTHESIS:
        return check_synthesis_inputs(config)
    notes: list[str] = []
    mistakes = Mistakes()
    for number, dataset in enumerate(config.dataset.sources):
        with mistakes, _named_source(number if config.dataset.mix else None):
            _refuse_results_in_dataset(dataset, config.output)
            found = check_corpus(dataset, sample=sample)
            files = found.get("files") or []
            size = f", {len(files)} files, {found['bytes'] / 1e6:,.1f} MB" if files else ""
            notes += [f"corpus: {dataset.name}{size}", *_name_evaluation_files(dataset)]
    mistakes.require_none()
    return notes


@contextmanager
def _named_source(number: int | None) -> Iterator[None]:
    """Name the source of a mixture in the errors of this block."""
    try:
        yield
    except ValueError as error:
        if number is None:
            raise
        raise ValueError(f"dataset.mix[{number}]: {name_source(str(error), number)}") from error


def _name_evaluation_files(dataset: Dataset) -> list[str]:
    """Return a note where files that are named as a validation or test split are trained on."""
    if is_hub(dataset) or not (found := find_named_for_evaluation(list_files(dataset))):
        return []
    names = ", ".join(map(str, found[:3])) + ", ..." * (len(found) > 3)
    return [
        f"students train on {names}, matched by dataset.data_files: to evaluate on such files instead, name them as "
        "dataset.validation_files, and match the others alone by dataset.data_files"
    ]


def _refuse_results_in_dataset(dataset: Dataset, output: Output) -> None:
    """Raise ValueError when results go into a folder that `datasets` reads whole: they would become text."""
    folder = Path(dataset.name).resolve()
    for place in (output.results_dir, output.cache_folder):
        if is_hub(dataset) and Path(place).resolve().is_relative_to(folder):
            raise ValueError(
                f"results go to {place!r}, inside the folder {dataset.name!r} that dataset.name has read as "
                "text. Set output.results_dir (and output.cache_dir) to a folder outside of it."
            )


def _check_tokens(config: Config, tokenizer: Any, sample: list[Document]) -> list[str]:
    """Tokenize the corpus's first documents; return a note of characters without a token.

    Raises ValueError when the tokenizer or its chat template cannot encode them.
    """
    if isinstance(tokenizer, DemoTokenizer):
        for document in sample:
            require_template(document)
    if isinstance(tokenizer, DemoTokenizer) or not sample:
        return []
    sizes = accumulate(len(document.text) + len(document.prompt or "") for document in sample)
    first = [d for d, size in zip(sample, sizes, strict=True) if size <= _SAMPLE_CHARACTERS]
    documents = first or [replace(sample[0], text=sample[0].text[:_SAMPLE_CHARACTERS])]
    counts = TokenCounts()
    tokenize_documents(documents, tokenizer, config.dataset, counts=counts)
    notes = []
    if counts.with_control_tokens:
        notes.append(
            f"control tokens are written out in {counts.with_control_tokens:,} of the first {len(documents):,} "
            f"documents: dataset.control_tokens takes them as {config.dataset.control_tokens}"
        )
    lost = find_lost_characters(documents, tokenizer)
    if not lost:
        return notes
    named = ", ".join(map(repr, lost[:5])) + (", ..." if len(lost) > 5 else "")
    return [
        *notes,
        f"the tokenizer has no token for {len(lost):,} of the characters in the first {len(documents):,} documents "
        f"({named}): they are left out, or are unknown tokens",
    ]


def _check_student(config: Config, tokenizer: Any, width: int, mistakes: Mistakes) -> list[str]:
    """Return notes about the student, the first of its size and loss; the last about defaults that cost much.

    What is missing to train it is added to `mistakes`.
    """
    training, name = config.training, name_student(config.student)
    pruned = None
    if config.student.is_pruned:
        pruned, wrong = shape_student(config)
        mistakes.found |= dict.fromkeys(wrong)
    model = student_config(config.student, vocabulary=width, tokenizer=tokenizer, pruned=pruned)
    refuse_short_context(model, config.dataset.max_length, name, what="dataset.max_length")
    missing = list(find_missing_for_training(model, training, name=name))
    mistakes.found |= dict.fromkeys(missing)
    check_freeze(model, training.freeze, name=name)
    parameters = count_parameters(model)
    if True in (training.packing, training.padding_free) and parameters <= _PROBED_PARAMETERS:
        probed = AutoModelForCausalLM.from_config(model)
        set_attention(probed, training.attn_implementation, device="cpu")
        find_layout_faults([split_model(probed)], training)
    adapters = ""
    if training.lora.rank is not None and not missing:
        trained = count_adapters(model, training.lora, name=name)
        adapters = f", LoRA of rank {training.lora.rank} ({trained:,} parameters)"
    ids = describe_ids(config.student, model, vocabulary=width)
    return [
        f"student of {parameters:,} parameters{adapters}, {training.distillation_type}, alpha {training.alpha}",
        *([ids] if ids else []),
        *find_costly_defaults(config, vocabulary=width, num_parameters=parameters),
    ]


def _check_students_tokenizer(config: Config, tokenizer: Any) -> list[str]:
    """Return a note where a pretrained student's tokenizer cannot be compared with the text's.

    Raises ValueError when their ids differ.
    """
    path, revision = config.student.model_path, config.student.revision
    if config.student.is_pruned and path is None and config.dataset.tokenizer is not None:
        path, revision = config.teacher.model_path, config.teacher.revision
    if path is None or isinstance(tokenizer, DemoTokenizer):  # which does not exist yet
        return []
    source = str(config.dataset.tokenizer or config.teacher.model_path)
    note = require_student_ids(tokenizer, source=source, student=path, revision=revision)
    return [note] if note else []
