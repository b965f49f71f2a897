"""Results made by an earlier version stay valid, or their revision says that they do not.

Whoever changes what a stage makes of the same input must raise its number in `retort.artifacts.build.REVISIONS`, which
makes every user's results of that stage again, and write the new digests here. Otherwise something is broken.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retort.artifacts.build import REVISIONS, build_project
from retort.cache.codec import Codec, SparseTargets
from retort.cache.entropy_codec import EntropyCodec
from retort.cache.merged import merge_parts
from retort.cache.parts import part_path, write_part
from retort.cache.reader import CacheHeader, LogitCache
from retort.cache.top_k_codec import TopKCodec
from retort.config.load import load_runs
from retort.config.sections import Dataset, Synthesis
from retort.corpus.documents import Document
from retort.io.fingerprints import TokenizerIdentity
from retort.synthesis.contamination import ProblemNgrams
from retort.synthesis.filters import AnswerFilter
from retort.synthesis.journal import Journal
from retort.synthesis.prompts import read_prompts
from retort.synthesis.providers import Answer
from retort.synthesis.run import collect_examples
from retort.tokens.index import TokenIndex
from retort.tokens.indexing import write_index
from retort.tokens.sequences import SequenceTable
from retort.tokens.shards import write_token_shard
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from support.bytewise import Bytes
from support.synthetic import CODED, ORDER, split_targets, streams_of

# What the digests below were made with.
GOLDEN_REVISIONS = {
    "answers": 1,
    "synthesis": 3,
    "corpus": 1,
    "teacher": 3,
    "demo_teacher": 2,
    "tokens": 4,
    "logits": 5,
    "validation": 3,
    "pruned": 1,
    "run": 3,
    "run_at_two": 1,
    "evaluation": 4,
    "benchmark": 2,
    "report": 4,
}
GOLDEN_SYNTHESIS = "f5bd73d65b9ca6b813b067107383f95bd8e210c6452c6e6a2c876d83cade2183"
GOLDEN_TOKENS = "f21b80ab3a95e6959a8bf974108865e3c2e26bdfc32e7ac84b2f52d5a3ecfc2c"
GOLDEN_INDEX = "fff6f9814aeb387526cfeb2e365cabfd6204e62623486c29a1725fcc5898475f"
GOLDEN_CACHE = "07790f9e4537d17732908a57574a3f5173eb24bfd870a56aebe57b959f04b255"
GOLDEN_FILES = {
    "shard_00000.h5": "cbae5e4b867eadb1ad6adec2048a5c0bef653d2f969af7bd0519e05f20be5efe",
    "teacher_logits.h5": "65d22987664bb6c4ad481f912bac6fa465bb0b8d4d35dbc21a5020fa7d65df76",
    "top_p.h5": "2d6364964fc074779d78b31c1260ad8d140f6da5c0a6fd81d8e77fd62b7ff895",
    "sampled.h5": "febb6f4780b70e97d3622bc32d112500f7de0a4fd740d77a29981dfceb903843",
}
GOLDEN_PARTS = {"teacher": "2f885fed3557", "other": "c6f0ceab1233"}
GOLDEN_IDS = {
    "corpus": "cd03bc9bdc81",
    "teacher": "fdff9ff27789",
    "tokens": "84fcb405c154",
    "logits": "93b9f14a662a",
    "validation": "4098c99ce42e",
    "hard": ["db456810a366", "8eb3388eae0f"],
    "both": ["f6546a6c9785", "8eb3388eae0f"],
    "live": ["3b7209e30cc5", "8eb3388eae0f"],
    "check": "3ad38ed3b42d",
    "report": "77663de881fc",
}

REPOSITORY = Path(__file__).resolve().parents[2]
CODEC = TopKCodec(temperatures=(1.0, 2.0), vocabulary=300, top_k=6)


def tokenize(prompts: bool, long_documents: str) -> SequenceTable:
    values = {"max_length": 16, "long_documents": long_documents}
    if prompts:
        values |= {"prompt_column": "prompt", "response_column": "response"}
    dataset = Dataset.model_validate(values)
    documents = [
        Document(
            i, "h\u00e9llo " * i + "bird", "which" if prompts else None, "ab"[i % 2], None, "train"
        )
        for i in range(9)
    ]
    return tokenize_documents(documents, Bytes(), dataset, counts=TokenCounts())


def make_targets(table: SequenceTable) -> SparseTargets:
    """Distributions from whole numbers and sums of powers of two: no rounding, so the same on every machine."""
    p = np.arange(table.num_positions, dtype=np.int64)[:, None]
    k = np.arange(6, dtype=np.int64)[None]  # top_k
    steps = (p * 7919 + k * 104729) % 251 + 1
    return SparseTargets.from_rows(
        ((p * 31 + k * 53) % CODEC.vocabulary).astype(np.int32),
        (-np.cumsum(steps, axis=1) / 256).astype(np.float32),
        tail_logprobs=-((p * 613 + np.array([[5, 11]])) % 4096 / 512).astype(np.float32),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard, its index and a merged cache of each method."""
    folder = tmp_path_factory.mktemp("golden")
    tables = {"train": tokenize(False, "split"), "val": tokenize(True, "truncate")}
    shard = folder / "shard_00000.h5"
    tokenizer = TokenizerIdentity(fingerprint="0123456789ab", size=257)
    write_token_shard(shard, tables, counts={"documents": {"read": 18}}, tokenizer=tokenizer)
    write_index(folder / "index.json", [shard], streaming_chunk_size=4)
    index = TokenIndex.read(folder / "index.json")
    codecs: dict[str, Codec] = {"teacher_logits": CODEC, **CODED}
    for name, codec in codecs.items():
        header = CacheHeader("feedc0ffee00", "0123456789ab", index.record.content, codec)
        for part in index.parts:
            table, path = index.read_part(part), part_path(folder, part.name, header)
            if isinstance(codec, EntropyCodec):
                write_part(path, table, streams_of(table, codec), header, ORDER)
            else:
                write_part(path, table, split_targets(make_targets(table), table), header)
        merge_parts(index, folder, header, folder / f"{name}.h5")
    return folder


def sha256(*pieces: bytes) -> str:
    return hashlib.sha256(b"".join(pieces)).hexdigest()


def explain(stage: str, found: Any) -> str:
    return (
        f"{stage} are not what they were, so results made before would be taken for something else, or made again. If "
        "that is meant, raise the stage's number in retort.artifacts.build.REVISIONS and write here what was found: "
        f"{found!r}"
    )


def test_revisions_are_those_that_the_digests_were_made_with() -> None:
    assert REVISIONS == GOLDEN_REVISIONS, "a revision was raised: make the digests here again"


def test_the_same_templates_and_answers_give_the_same_corpus(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    pytest.importorskip("py3langid")
    path = tmp_path / "templates.yaml"
    given = {
        "categories": {"a": 0.7, "b": 0.3},
        "languages": {"python": 0.5, "bash": 0.5},
        "templates": {"a": ["Do {topic} in {language}."], "b": ["Say {topic}.", "Tell {topic}."]},
        "topics": [f"thing {i}" for i in range(20)],
    }
    path.write_text(json.dumps(given))  # JSON is YAML
    values = {"templates": str(path), "num_examples": 20, "near_duplicates": 0.5}
    section = Synthesis.model_validate(values)
    prompts = read_prompts(section).prompts
    with Journal(tmp_path / "journal.jsonl", prompts) as journal:
        for place in range(len(prompts)):
            words = " ".join(f"w{place // 4}-{i + (place % 4) * (place % 3)}" for i in range(30))
            finish = "length" if place % 7 == 3 else "stop"
            journal.add_answer(
                place, Answer(words, finish, input_tokens=1, output_tokens=2, model="m")
            )
        answer_filter = AnswerFilter(section, ProblemNgrams(["Say thing 3"], length=3))
        found = collect_examples(section, prompts, journal, answer_filter, lambda indices: None)
    dropped = {reason for reason, number in found.num_dropped.items() if number}
    assert dropped == {"truncated", "duplicate", "near_duplicate"} and len(found.rows) == 18
    digest = sha256(json.dumps([found.rows, found.num_asked, found.num_dropped]).encode())
    assert digest == GOLDEN_SYNTHESIS, explain("responses", digest)


def test_the_same_documents_give_the_same_sequences() -> None:
    pieces = []
    for prompts in (False, True):
        for long_documents in ("split", "truncate"):
            table = tokenize(prompts, long_documents)
            names = json.dumps(table.label_names).encode()
            columns = {k: v for k, v in vars(table).items() if k != "label_names"}
            pieces += [
                names,
                *(np.ascontiguousarray(columns[k]).tobytes() for k in sorted(columns)),
            ]
    assert sha256(*pieces) == GOLDEN_TOKENS, explain("sequences", sha256(*pieces))


def test_the_same_sequences_give_the_same_parts(folder: Path) -> None:
    found = sha256((folder / "index.json").read_bytes())
    assert found == GOLDEN_INDEX, explain("the index and its parts", found)


def test_the_same_distributions_are_read_from_a_cache(folder: Path) -> None:
    cache = LogitCache(folder / "teacher_logits.h5")
    pieces = [json.dumps(cache.header.to_json(), sort_keys=True).encode()]
    for i in range(len(cache)):
        targets = cache.read_targets(i)
        pieces += [
            cache.table[i].key,
            *(v.tobytes() for v in asdict(targets).values() if v is not None),
        ]
    assert sha256(*pieces) == GOLDEN_CACHE, explain("the cache's contents", sha256(*pieces))


def test_the_files_are_the_same_byte_for_byte(folder: Path) -> None:
    lock = (REPOSITORY / "requirements.lock").read_text()
    for package in ("h5py", "zstandard"):
        (pinned,) = re.findall(rf"^{package}==([^\s;]+)", lock, flags=re.MULTILINE)
        if metadata.version(package) != pinned:
            pytest.skip(f"{package} is not {pinned}, and another version may lay files out anew")
    found = {name: sha256((folder / name).read_bytes()) for name in GOLDEN_FILES}
    assert found == GOLDEN_FILES, explain("files", found)


def test_the_same_config_has_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus.jsonl").write_bytes(b'{"text": "bird"}\n{"text": "house"}\n')
    Path("student.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    project = build_project(
        load_runs(
            {
                "dataset": {"name": "json", "data_files": "corpus.jsonl", "max_length": 32},
                "teacher": {"model_path": "somebody/teacher", "dtype": "bfloat16"},
                "cache": {"top_k": 8},
                "student": {"config": "student.json"},
                "training": {"learning_rate": 0.002, "max_steps": 5},
                "runs": {
                    "hard": {"training": {"distillation_type": "output"}},
                    "both": {"training": {"alpha": 0.3}},
                    "live": {"training": {"use_cached_logits": False}},
                },
            }
        )
    )
    single: dict[str, Iterable[Any]] = {
        "corpus": project.corpora,
        "teacher": project.teachers,
        "tokens": project.tokens,
        "logits": project.logits,
        "validation": project.validations,
    }
    found: dict[str, Any] = {}
    for name, artefacts in single.items():
        (found[name],) = artefacts
    found |= {run.name: [run.id, run.evaluation_id] for run in project.runs.values()}
    found |= {"check": project.check_id, "report": project.report_id}
    assert found == GOLDEN_IDS, explain("ids", found)


def test_the_same_part_of_the_same_model_has_the_same_id() -> None:
    """Of the teacher, and of another model on the Hub."""
    runs = {
        "teacher": {"student": {"from_teacher": {"layers": 4}}},
        "other": {"student": {"from_teacher": {"layers": 4}, "model_path": "somebody/other"}},
    }
    teacher = {"model_path": "somebody/teacher"}
    raw = {"dataset": {"name": "somebody/texts"}, "teacher": teacher, "runs": runs}
    project = build_project(load_runs(raw))
    found = {name: run.pruned.id for name, run in project.runs.items() if run.pruned}
    assert found == GOLDEN_PARTS, explain("pruned", found)
