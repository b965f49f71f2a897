"""What `retort init` finds out: files and columns of a corpus, its tokens, a teacher's size, a student's shape."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from retort.config.load import complete
from retort.config.sections import Dataset
from retort.corpus.chats import CHAT_COLUMNS
from retort.corpus.checking import check_corpus
from retort.corpus.documents import Document
from retort.corpus.hub import count_split_rows
from retort.corpus.reading import count_rows
from retort.corpus.sources import expand_pattern, find_named_for_evaluation, is_hub
from retort.io.files import is_path
from retort.io.text_files import LOADER_OF, find_ending
from retort.io.units import format_count
from retort.tokens.tokenize import TokenCounts, tokenize_documents

# Columns that are tried in this order; chats, and prompt with completion, are found without a name.
_COLUMNS: tuple[dict[str, str], ...] = (
    {},
    {"prompt_column": "prompt", "response_column": "response"},
    {"prompt_column": "question", "response_column": "answer"},
    {"prompt_column": "problem", "response_column": "solution"},
    {"text_column": "content"},
    {"text_column": "story"},
)
_SAMPLE_CHARACTERS = 2_000_000
_COUNTED_BYTES = 1_000_000_000  # of files; the documents of larger corpora are estimated
_READ = 1000  # documents that `check_corpus` reads, if there are as many
_LARGE = 1_000_000  # rows of a Hub dataset that is streamed
_STREAMED = 100_000  # rows that are taken of it
_LONGEST = 10**9  # longer than any document


@dataclass(frozen=True)
class Corpus:
    """keys: of the section `dataset`; lengths: tokens of the sampled documents; num_documents: may be estimated."""

    keys: dict[str, Any]
    kind: str
    lengths: list[int]
    num_documents: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole corpus, estimated from the sample."""
        return round(self.num_documents * sum(self.lengths) / len(self.lengths))

    def count_sequences(self, max_length: int) -> int:
        """Return the number of sequences of at most `max_length` tokens, estimated from the sample."""
        pieces = sum(-(-length // max_length) for length in self.lengths)
        return round(self.num_documents * pieces / len(self.lengths))


def look_at_corpus(corpus: str, given: Mapping[str, Any], tokenizer: Any) -> Corpus:
    """Return what is found in files, a folder or a dataset on the Hub; `given`: keys of `dataset` that are set.

    Raises ValueError when there is nothing, it cannot be read, or no column is known.
    """
    sample: list[Document] = []
    named, found = _find_columns(_find_files(corpus) | dict(given), sample)
    chats = [name for name in CHAT_COLUMNS if name in found["columns"]]
    if sample[0].messages and chats:
        named.setdefault("messages_column", chats[0])
    dataset = complete({"dataset": named}).dataset
    num_documents = _count_documents(dataset, found["bytes"], sample)
    if is_hub(dataset) and not given.keys() & {"streaming", "max_samples"}:
        rows, read = count_split_rows(dataset), found["scanned"]["read"]
        num_documents = rows.get(dataset.split, read if read < _READ else _LARGE)
        if num_documents >= _LARGE:
            num_documents = _STREAMED
            named |= {"streaming": True, "max_samples": _STREAMED}
        if "validation" in rows:
            named.setdefault("validation_split", "validation")
    sizes = accumulate(len(d.text) + len(d.prompt or "") for d in sample)
    documents = [d for d, s in zip(sample, sizes, strict=True) if s <= _SAMPLE_CHARACTERS]
    uncut = dataset.model_copy(update={"max_length": _LONGEST})
    table = tokenize_documents(documents or sample[:1], tokenizer, uncut, counts=TokenCounts())
    first = sample[0]
    kind = "text" if first.prompt is None else "prompts and responses"
    return Corpus(
        named,
        "chats" if first.messages else kind,
        np.diff(table.offsets).tolist() or [1],
        num_documents,
    )


def _find_files(corpus: str) -> dict[str, Any]:
    """Return the keys of `dataset` that name the files of a corpus, or its Hub id.

    Of a folder, the kind of files with the most bytes; files named as a validation split are held out.
    """
    path = Path(corpus).expanduser()
    is_local = path.exists() or is_path(corpus) or path.suffix in LOADER_OF or "*" in corpus
    if not is_local:
        return {"name": corpus}
    if path.is_dir():
        sizes: Counter[str] = Counter()
        for file in expand_pattern(f"{corpus}/**/*", key="--corpus"):
            if (kind := find_ending(file)) in LOADER_OF:
                sizes["".join(file.suffixes[file.suffixes.index(kind) :])] += file.stat().st_size
        if not sizes:
            raise ValueError(
                f"--corpus {corpus!r} has no file that ends in {', '.join(LOADER_OF)}."
            )
        corpus = f"{corpus.rstrip('/')}/**/*{sizes.most_common(1)[0][0]}"
    files = expand_pattern(corpus, key="--corpus")
    loader = LOADER_OF.get(find_ending(files[0]), "text")
    if not (named := find_named_for_evaluation(files)):
        return {"name": loader, "data_files": corpus}
    held_out = [file for file in named if re.search("val|dev", file.name.lower())] or named
    texts = [str(file) for file in files if file not in named]
    return {"name": loader, "data_files": texts, "validation_files": [*map(str, held_out)]}


def _find_columns(
    keys: dict[str, Any], sample: list[Document]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys with the columns that are there, and what `check_corpus` found; add documents to `sample`."""
    is_named = any(key.endswith("_column") for key in keys)
    first: ValueError | None = None
    for columns in _COLUMNS[:1] if is_named else _COLUMNS:
        dataset = complete({"dataset": keys | columns}).dataset
        try:
            return keys | columns, check_corpus(dataset, sample=sample)
        except ValueError as error:
            if not re.match("column .* is not in", str(error)):
                raise
            first = first or error
            sample.clear()
    raise ValueError(
        f"{first} In this command: --set dataset.text_column=NAME, or --set dataset.prompt_column=NAME --set "
        "dataset.response_column=NAME."
    )


def _count_documents(dataset: Dataset, num_bytes: int, sample: list[Document]) -> int:
    if is_hub(dataset):
        return dataset.max_samples or _STREAMED
    if num_bytes <= _COUNTED_BYTES:
        return count_rows(dataset)
    read = sum(len(f"{d.prompt or ''}{d.text}".encode()) for d in sample)
    return min(round(num_bytes * len(sample) / read), dataset.max_samples or _LONGEST)


def shape_student(num_parameters: int, *, vocabulary: int) -> dict[str, Any]:
    """Return the transformers config of a Llama of about so many parameters, its embeddings tied.

    Of all widths, the one whose ratio to the number of layers is nearest to 48. Raises ValueError when the embedding
    alone is larger.
    """
    shapes = []
    for width in [*range(16, 256, 16), *range(256, 8193, 64)]:
        inner = -(-width * 8 // 3 // 16) * 16
        layers = round((num_parameters - vocabulary * width) / (4 * width**2 + 3 * width * inner))
        if layers >= 2:
            head = 64 if width % 64 == 0 and width >= 256 else 16
            shapes.append((abs(width / layers - 48), width, inner, layers, width // head))
    if not shapes:
        raise ValueError(
            f"--student: {format_count(num_parameters)} parameters are too few for the teacher's "
            f"{vocabulary:,} ids, whose embedding has {format_count(16 * vocabulary)} even at a width of 16. Give "
            f"{format_count(64 * vocabulary)} or more."
        )
    _, width, inner, layers, heads = min(shapes)
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


def read_size(text: str) -> int | None:
    """Return the number of parameters that a text such as 100M or 1.5b means, None if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb])", text.strip().lower())
    return round(float(found[1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[found[2]]) if found else None
