"""Shards of any size, tokenized byte by byte: no library beside Retort's own is loaded, so memory can be told apart.

    python tests/support/bytewise.py corpus.jsonl folder

tokenizes the corpus into one shard, indexes it and reads a part; prints the process's peak after each step, in MB.
"""

import json
import random
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np

from retort.config.sections import Dataset
from retort.corpus.documents import Counts
from retort.corpus.reading import read_shard_documents
from retort.io.fingerprints import TokenizerIdentity
from retort.tokens.index import TokenIndex
from retort.tokens.indexing import write_index
from retort.tokens.sequences import SequenceTable, build_table
from retort.tokens.shards import (
    read_shard_metadata,
    read_token_shard,
    tokenize_shard,
    write_token_shard,
)

FINGERPRINT = TokenizerIdentity(fingerprint="0123456789ab", size=257)


class Bytes:
    """The simplest tokenizer: a byte is a token; the same in every version of every library."""

    eos_token_id = 256
    chat_template = None

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        texts = [text] if isinstance(text, str) else text
        ids = [list(t.encode()) for t in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def write_corpus(path: Path, num_documents: int, *, length: int = 1000) -> Path:
    """Write documents of about `length` bytes, a third of them under each of three labels."""
    chance = random.Random(0)
    with path.open("w") as file:
        for i in range(num_documents):
            words = [str(chance.randrange(10**6)) for _ in range(length // 7)]
            row = {"text": " ".join(words), "category": ("code", "prose", "")[i % 3]}
            file.write(json.dumps(row) + "\n")
    return path


def make_dataset(corpus: Path, **keys: Any) -> Any:
    """Return a dataset section: one shard, sequences of up to 256 tokens, a tenth held out."""
    values = {"name": "json", "data_files": str(corpus), "num_shards": 1, "max_length": 256}
    values |= {"validation_fraction": 0.1} | keys
    return Dataset.model_validate(values)


def tokenize(out: Path, corpus: Path, **keys: Any) -> str:
    """Tokenize a corpus into one shard; return what was counted."""
    dataset = make_dataset(corpus, **keys)
    return tokenize_shard(out, dataset, Bytes(), identity=FINGERPRINT, shard=0, snapshot=None)


def tokenize_at_once(dataset: Any) -> dict[str, SequenceTable]:
    """Return the sequences of a shard by split, in memory and as simply as possible."""
    rows: dict[str, list[Any]] = {"train": [], "val": []}
    for document in read_shard_documents(dataset, shard=0, num_shards=1, counts=Counts()):
        head = list(f"{document.prompt}\n".encode()) if document.prompt is not None else []
        ids = [*head, *document.text.encode(), Bytes.eos_token_id]
        label = (document.category or "", document.language or "")
        length, at = dataset.max_length, 0
        while at < len(ids) - 1:
            if at == 0:  # as much of the prompt as fits, at least half a sequence
                kept = min(len(head), max(length // 2, length - len(ids) + len(head)))
                piece = ids[len(head) - kept : len(head) - kept + length]
                num_known = max(kept, 1)
                at = len(head) - kept + len(piece) - 1
            else:  # the end of the prompt, then the last token so far
                kept = min(len(head), length // 2, length - 2)
                rest = ids[at : at + length - kept]
                piece = head[len(head) - kept :] + rest
                num_known = kept + 1
                at += len(rest) - 1
            mask = [t + 1 >= num_known for t in range(len(piece) - 1)] + [False]
            rows[document.split].append((piece, mask, document.index, label))
    return {split: build_table(found) for split, found in rows.items()}


def assert_as_at_once(shard: Path, corpus: Path, **keys: Any) -> None:
    """Assert that a shard has the bytes and columns of `tokenize_at_once`."""
    tokenizer, counts = read_shard_metadata(shard)
    once = shard.with_name("once.h5")
    expected = tokenize_at_once(make_dataset(corpus, **keys))
    given = counts.model_dump(exclude_none=True) | {"tokens": counts.tokens.to_json()}
    write_token_shard(once, expected, counts=given, tokenizer=tokenizer)
    assert (shard).read_bytes() == (once).read_bytes()
    for split, table in expected.items():
        found = vars(read_token_shard(shard, split))
        assert found.pop("label_names") == table.label_names
        for name, values in found.items():
            assert values.dtype == getattr(table, name).dtype
            assert np.array_equal(values, getattr(table, name)), name


def main(corpus: str, folder: str) -> None:
    """Take a corpus from text to a part, and print the peaks of memory."""
    peaks = []
    shard, index_path = Path(folder) / "shard_00000.h5", Path(folder) / "index.json"

    def measure() -> None:
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    tokenize(shard, Path(corpus))
    measure()
    write_index(index_path, [shard], streaming_chunk_size=50)
    measure()
    index = TokenIndex.read(index_path)
    index.read_part(index.parts[-1])
    measure()
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(*sys.argv[1:])
