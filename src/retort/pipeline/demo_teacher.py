"""The demo's teacher: a small causal LM with its own BPE tokenizer, trained on the corpus' training documents.

It replaces the model that a user would bring, without a download: the demo's corpus is the documentation found on the
machine. It never sees held-out documents.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from retort.config.handoff import Job
from retort.config.sections import Dataset, Student, Tracking, Training
from retort.corpus.documents import Counts, Document
from retort.corpus.snapshot import read_documents
from retort.io.files import file_lock, write_json
from retort.io.fingerprints import TeacherRecord
from retort.io.run_record import RUN_FILE, describe_run
from retort.models.load import fingerprint_model
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from retort.tokens.tokenizer import identify_tokenizer
from retort.training.record import TrainingSummary

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class DemoTeacher:
    """Size and training of the demo's teacher: about three minutes on two cores.

    After a change of a value, raise REVISIONS["demo_teacher"].
    """

    vocabulary: int = 512
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    max_steps: int = 820
    batch_size: int = 8
    learning_rate: float = 3e-3
    cpu_threads: int = 2
    tokenizer_documents: int = 1500


DEMO_TEACHER = DemoTeacher()


@dataclass(frozen=True)
class DemoTokenizer:
    """What is known about the demo's tokenizer before it is trained."""

    vocabulary: int = DEMO_TEACHER.vocabulary
    bos_token_id = eos_token_id = pad_token_id = 0
    chat_template = None

    def __len__(self) -> int:
        return self.vocabulary

    def get_vocab(self) -> dict[str, int]:
        """Return no token: none is known yet."""
        return {}


def make_demo_teacher(
    record_path: Path,
    job: Job,
    *,
    snapshot: Path | None,
    size: DemoTeacher = DEMO_TEACHER,
) -> None:
    """Train tokenizer and model into model/ beside `record_path`, then write their fingerprint to it.

    `snapshot`: the folder that draw_corpus made of the corpus, None where it is read directly. Raises ValueError when
    no training document has any text.
    """
    # Imported here: it takes seconds, and check_inputs needs this module's constants only.
    from retort.training.job import TrainingJob
    from retort.training.loop import train_student

    folder, dataset = record_path.parent, job.dataset
    folder.mkdir(parents=True, exist_ok=True)
    busy = "another process trains this teacher: waiting for it"
    with file_lock(folder / ".demo_teacher.lock", busy=busy):
        tokenizer = train_tokenizer(_read_training_documents(dataset, snapshot), size)
        table = tokenize_documents(
            _read_training_documents(dataset, snapshot), tokenizer, dataset, counts=TokenCounts()
        )
        if table.num_positions == 0:
            raise ValueError(
                "no document is left to train the demo's teacher on: all were held out or empty. Raise "
                f"dataset.max_samples (now {dataset.max_samples}), or lower dataset.validation_fraction "
                f"(now {dataset.validation_fraction})."
            )
        logger.info(
            f"demo teacher: {len(table.ids):,} tokens to train on, vocabulary {len(tokenizer)}"
        )
        config_path = folder / "architecture.json"
        write_json(config_path, _model_config(size, dataset))
        work = TrainingJob(
            name="demo teacher",
            identity=folder.name,
            source=table,
            student=Student(config=str(config_path), model_path=None),
            training=_training(size),
            tracking=Tracking(),
            tokenizer=tokenizer,
            vocabulary=len(tokenizer),
            facts={"text": f"{dataset.name}, {table.num_positions:,} positions"},
        )
        summary = train_student(folder, work)
        _write_records(record_path, dataset, tokenizer, size, summary)


def _write_records(
    record_path: Path,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    size: DemoTeacher,
    summary: TrainingSummary,
) -> None:
    """Let model/ be the finished student's folder, and write run.json, then the record."""
    folder = record_path.parent
    model = folder / "model"
    if not model.exists():
        model.symlink_to("final")
    weights, _ = fingerprint_model(str(model))
    describe_run(
        section={"demo_teacher": size, "dataset": dataset},
        seed=0,
        dtype=summary.dtype,
        device=summary.device,
        seconds=summary.seconds,
    ).write(folder / RUN_FILE)
    TeacherRecord(
        weights=weights,
        revision=None,
        name="demo",
        tokenizer=identify_tokenizer(str(model), tokenizer),
        vocabulary=len(tokenizer),
    ).write(record_path)


def _read_training_documents(dataset: Dataset, snapshot: Path | None) -> Iterator[Document]:
    """Yield the corpus' documents that are not held out, shard by shard."""
    for shard in range(dataset.num_shards):
        documents = read_documents(dataset, shard=shard, snapshot=snapshot, counts=Counts())
        yield from (document for document in documents if document.split == "train")


def foresee_tokenizer(dataset: Dataset) -> Any:
    """Return the tokenizer that the demo's teacher will have, which takes a second or two."""
    return train_tokenizer(_read_training_documents(dataset, None))


def train_tokenizer(documents: Iterator[Document], size: DemoTeacher = DEMO_TEACHER) -> Any:
    """Train a byte-level BPE tokenizer of `size.vocabulary` tokens on `size.tokenizer_documents` documents."""
    texts = (d.text for d in islice(documents, size.tokenizer_documents))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def _model_config(size: DemoTeacher, dataset: Dataset) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": size.hidden_size,
        "intermediate_size": size.hidden_size * 3,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_heads,
        "max_position_embeddings": dataset.max_length,
        "tie_word_embeddings": True,
    }


def demo_config(dataset: Dataset) -> PretrainedConfig:
    """Return the config that the demo's teacher will have."""
    content = _model_config(DEMO_TEACHER, dataset) | {"vocab_size": DEMO_TEACHER.vocabulary}
    return AutoConfig.for_model(content.pop("model_type"), **content)


def _training(size: DemoTeacher) -> Training:
    return Training(
        distillation_type="output",
        alpha=1.0,
        learning_rate=size.learning_rate,
        warmup_steps=20,
        max_steps=size.max_steps,
        batch_size=size.batch_size,
        save_steps=200,
        save_total_limit=2,
        cpu_threads=size.cpu_threads,
    )
