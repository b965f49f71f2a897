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

from retort.config.schema import fill_defaults, section_schema
from retort.config.sections import build_section
from retort.tokens.index import TokenIndex, write_index
from retort.tokens.shards import tokenize_shard

FINGERPRINT = {"fingerprint": "0123456789ab", "size": 257}


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
    return build_section("dataset", fill_defaults(values, section_schema("dataset")))


def tokenize(out: Path, corpus: Path, **keys: Any) -> str:
    """Tokenize a corpus into one shard; return what was counted."""
    dataset = make_dataset(corpus, **keys)
    return tokenize_shard(out, dataset, Bytes(), fingerprint=FINGERPRINT, shard=0, drawn=None)


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
