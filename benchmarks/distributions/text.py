"""Text found on this machine, and its tokens: documents, a held-out split, a byte-level BPE, sequences."""

import dataclasses
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.common import log
from benchmarks.distributions.settings import Settings
from retort.corpus import demo_text

# Their whole sources are read, beside the standard library's; `retort.corpus.demo_text` adds the docstrings of four
# more. All are pinned in requirements.lock. transformers is left out: what is held out of it repeats the training text.
PACKAGES = (
    "PIL",
    "accelerate",
    "datasets",
    "docutils",
    "fontTools",
    "fsspec",
    "h5py",
    "huggingface_hub",
    "hypothesis",
    "jinja2",
    "mpmath",
    "networkx",
    "pyarrow",
    "snakemake",
    "sqlalchemy",
    "sympy",
)
SUFFIXES = frozenset({".py", ".rst", ".txt", ".md"})
TEST_FOLDERS = frozenset({"test", "tests", "testing", "site-packages", "__pycache__"})
MAX_FILE_BYTES = 300_000  # longer files are tables
END_OF_TEXT = "<|endoftext|>"


def describe_text(settings: Settings) -> dict[str, Any]:
    """Return the settings and the versions of everything whose text is read. Equal entries give equal text."""
    installed = {name: _version(name) for name in PACKAGES if util.find_spec(name) is not None}
    return {
        "settings": dataclasses.asdict(settings),
        "python": platform.python_version(),
        "packages": installed | demo_text.describe_demo(),
    }


def _version(module: str) -> str:
    names = metadata.packages_distributions().get(module, [module])
    return f"{names[0]} {metadata.version(names[0])}"


def read_documents(settings: Settings) -> list[str]:
    """Return the documents without duplicates, in the order of a hash of their text, up to max_text_mb."""
    found: dict[int, str] = {}
    for text in (*demo_text.read_demo_text(seed=settings.seed), *_read_sources()):
        if len(text) >= 2000:
            found.setdefault(xxhash.xxh3_64_intdigest(text.encode(), settings.seed), text)
    documents, num_bytes = [], 0
    for _, text in sorted(found.items()):
        num_bytes += len(text.encode())
        if num_bytes > settings.max_text_mb * 1_000_000:
            break
        documents.append(text)
    return documents


def _read_sources() -> Iterator[str]:
    """Yield the text files of the standard library and of PACKAGES, without their tests."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in PACKAGES:
        spec = util.find_spec(name)
        if spec is None or spec.origin is None:
            log(f"text: {name} is not installed, so its text is missing")
        else:
            roots.append(Path(spec.origin).parent)
    for root in roots:
        for path in sorted(root.rglob("*")):
            within = path.relative_to(root).parts
            is_text = path.suffix in SUFFIXES and TEST_FOLDERS.isdisjoint(within)
            if is_text and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
                yield path.read_text(encoding="utf-8", errors="replace")


def split_documents(documents: list[str], settings: Settings) -> tuple[list[str], list[str]]:
    """Return (training, held-out) documents: every held_out_of-th in hash order is held out."""
    held_out = documents[:: settings.held_out_of]
    training = [d for i, d in enumerate(documents) if i % settings.held_out_of]
    return training, held_out


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE; id 0 is END_OF_TEXT. Little text may give fewer than `vocabulary` ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Long runs of one character (rulers, padding) would become tokens of no use.
    shortened = (re.sub(r"([^\w\s])\1{7,}", r"\1\1\1\1", d) for d in documents)
    tokenizer.train_from_iterator(shortened, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, documents: list[str]) -> list[NDArray[np.int32]]:
    """Return each document's ids, END_OF_TEXT first."""
    encoded: list[NDArray[np.int32]] = []
    for start in range(0, len(documents), 256):
        batch = tokenizer.encode_batch(documents[start : start + 256])
        encoded.extend(np.array([0, *encoding.ids], np.int32) for encoding in batch)
    return encoded


def cut_sequences(
    encoded: list[NDArray[np.int32]], count: int, length: int, seed: int
) -> NDArray[np.int32]:
    """Return int32 [count, length + 1]: one window of each document that is long enough, then a second one of each.

    Raises ValueError when that would take more than four windows of a document.
    """
    rng = np.random.default_rng(seed)
    long = [ids for ids in encoded if len(ids) > 2 * length + 1]
    if not long or count > 4 * len(long):
        raise ValueError(
            f"{count} held-out sequences of {length} tokens need {-(-count // 4)} long held-out documents; there are "
            f"{len(long)}. Ask for fewer sequences, or install more of the packages whose text is read."
        )
    sequences = []
    for i in range(count):
        ids = long[i % len(long)]
        start = int(rng.integers(len(ids) - length))
        sequences.append(ids[start : start + length + 1])
    return np.stack(sequences)


@dataclasses.dataclass(frozen=True)
class Text:
    """The text as tokens; `described` goes into settings.json."""

    tokenizer: Tokenizer
    stream: NDArray[np.int32]  # all training documents, concatenated
    sequences: NDArray[np.int32]  # [num_sequences, T + 1], held out
    fit_sequences: NDArray[np.int32]  # [num_fit_sequences, T + 1], held out too
    described: dict[str, Any]


def prepare_text(settings: Settings) -> Text:
    """Read the text, split it, train the tokenizer and tokenize."""
    documents = read_documents(settings)
    training, held_out = split_documents(documents, settings)
    megabytes = sum(len(d.encode()) for d in documents) / 1e6
    log(f"text: {megabytes:.1f} MB, {len(documents):,} documents, {len(held_out)} of them held out")
    tokenizer = train_tokenizer(training, settings.vocabulary)
    stream = np.concatenate(tokenize(tokenizer, training))
    log(f"tokens: {len(stream):,} to train on, {tokenizer.get_vocab_size():,} ids")
    count = settings.num_sequences + settings.num_fit_sequences
    sequences = cut_sequences(
        tokenize(tokenizer, held_out), count, settings.sequence_length, settings.seed
    )
    described = {
        "text_mb": round(megabytes, 1),
        "text_digest": xxhash.xxh3_128_hexdigest("\0".join(documents).encode()),
        "training_tokens": len(stream),
    }
    # The last ones come from other documents than the first, where there are enough.
    cut = settings.num_sequences
    return Text(tokenizer, stream, sequences[:cut], sequences[cut:], described)
