"""Sections at the schema's defaults, and the tiny corpus taken through the real steps before the one under test."""

import multiprocessing
import shutil
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

from retort.cache.merged import merge_parts
from retort.cache.parts import build_header
from retort.cache.reader import LogitCache
from retort.io.files import read_json, write_json
from retort.io.fingerprints import TeacherRecord
from retort.models.load import load_recorded_teacher, record_teacher
from retort.teacher.scoring import Scorer
from retort.teacher.validation import score_validation
from retort.teacher.worker import run_worker
from retort.tokens.index import TokenIndex
from retort.tokens.indexing import write_index
from retort.tokens.shards import tokenize_shard
from retort.tokens.tokenizer import identify_tokenizer, load_tokenizer
from support.jobs import make_job
from support.sections import section

torch.set_num_threads(1)  # on matrices of this size a second thread only costs

NUM_TOKENS = 300  # of the tiny teacher's tokenizer
WIDTH = 320  # of its output layer
# It has none; tests may set this one.
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def tiny_dataset(corpus: Path, **values: Any) -> Any:
    """Return the dataset section of the tiny corpus: 2 shards, sequences of 48 tokens, one in five held out."""
    keys = {
        "name": "json",
        "data_files": str(corpus),
        "max_length": 48,
        "num_shards": 2,
        "streaming_chunk_size": 20,
        "validation_fraction": 0.2,
    }
    return section("dataset", **(keys | values))


def tokenize(folder: Path, corpus: Path, teacher: Path, **values: Any) -> Path:
    """Tokenize the corpus into `folder` and return its index.json."""
    dataset = tiny_dataset(corpus, **values)
    tokenizer = load_tokenizer(str(teacher))
    fingerprint = identify_tokenizer(str(teacher), tokenizer)
    shards = [folder / f"shard_{i}.h5" for i in range(dataset.num_shards)]
    for i, path in enumerate(shards):
        tokenize_shard(path, dataset, tokenizer, identity=fingerprint, shard=i, snapshot=None)
    write_index(folder / "index.json", shards, streaming_chunk_size=dataset.streaming_chunk_size)
    return folder / "index.json"


def record(folder: Path, teacher: Path) -> Path:
    """Write the teacher's fingerprint.json into `folder` and return it."""
    path = folder / "fingerprint.json"
    record_teacher(path, section("teacher", model_path=str(teacher)))
    return path


def score_held_out(folder: Path, index: TokenIndex, teacher: Path, **evaluation: Any) -> Path:
    """Score the held-out sequences, and some training sequences; return the file of features."""
    path = folder / "features.safetensors"
    score_validation(
        path,
        make_job(
            teacher=section("teacher", model_path=str(teacher), device="cpu"),
            evaluation=section("evaluation", **evaluation),
        ),
        index_path=index.path,
        fingerprint_path=record(folder, teacher),
    )
    return path


def make_cache(folder: Path, index_path: Path, teacher: Path, **cache: Any) -> LogitCache:
    """Score all parts with one worker, merge them, return the cache."""
    index, fingerprint = TokenIndex.read(index_path), record(folder, teacher)
    header = build_header(
        index, TeacherRecord.read(fingerprint), section("cache", **cache), source=fingerprint
    )
    teacher_section = section("teacher", model_path=str(teacher), device="cpu")
    run_worker(
        index,
        folder / "parts",
        header,
        worker=0,
        num_workers=1,
        open_scorer=lambda: Scorer(
            load_recorded_teacher(str(teacher), teacher_section, record_path=fingerprint), 8
        ),
    )
    merge_parts(index, folder / "parts", header, folder / "teacher_logits.h5")
    return LogitCache(folder / "teacher_logits.h5")


def real_processes() -> ForkServerContext:
    """Return a context whose processes can be killed; torch and transformers are imported once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["retort.training.loop", "retort.teacher.scoring"])
    return context


def swap_tokens(folder: Path, teacher: Path) -> Path:
    """Copy a teacher into `folder`, with the ids of two letters of its tokenizer exchanged."""
    shutil.copytree(teacher, folder)
    content = read_json(folder / "tokenizer.json")
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    write_json(folder / "tokenizer.json", content)
    return folder


def name_token(folder: Path, teacher: Path, token: str) -> Path:
    """Copy a teacher into `folder`, with a token more in its tokenizer, at the first id that was not named."""
    shutil.copytree(teacher, folder)
    tokenizer = load_tokenizer(str(teacher))
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)
    return folder
