"""`retort import` of logits in DistillKit's format beside reading and decoding them: tokens a second of one core.

    python -m benchmarks.cache.importing [--tokens 2] [--distillkit /a/checkout]

A dataset of 128 of 50,257 tokens a position, 16 of them exact and a fit of the others, is written, then imported by the
command itself, one thread. Times are of the processor, and the import's are without those of an import of one text,
which loads libraries and tokenizer. Opponents read the same files: pyarrow alone, which no import can be faster than,
and DistillKit's own decompressor, which gives dense or sparse logits and stores nothing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.cache.distillkit import REPOSITORY, load_codec
from benchmarks.common import (
    UnavailableError,
    checkout_of,
    format_not_run,
    make_parser,
)

VOCABULARY, LENGTH, ROWS = 50_257, 1024, 64  # of a file
CONFIG: dict[str, Any] = {
    "d": VOCABULARY,
    "k": 128,
    "exact_k": 16,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, 2],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
}
_ID_BITS = 16


def make_row(rng: np.random.Generator) -> dict[str, Any]:
    """Return a text whose tokens are among the most probable ones, and the distributions at its positions."""
    k, exact_k = CONFIG["k"], CONFIG["exact_k"]
    ids_PK = (rng.integers(VOCABULARY, size=(LENGTH, 1)) + 389 * np.arange(k)) % VOCABULARY
    flatness_P1 = rng.uniform(0.6, 1.4, (LENGTH, 1))
    weights_PK = np.arange(1, k + 1) ** -flatness_P1
    logprobs_PK = np.log(0.97 * weights_PK / weights_PK.sum(axis=1, keepdims=True))
    said = ids_PK[np.arange(LENGTH), np.minimum(rng.geometric(0.2, LENGTH), k) - 1]
    bits = ids_PK[:, :, None] >> np.arange(_ID_BITS - 1, -1, -1) & 1
    terms = np.arange(k - exact_k)[:, None] ** np.array(CONFIG["polynomial_terms"])
    fit = np.linalg.lstsq(terms.astype(float), logprobs_PK[:, exact_k:].T, rcond=None)[0].T
    values = np.concatenate([logprobs_PK[:, :exact_k], fit], axis=1).astype("<f4")
    return {
        "input_ids": np.concatenate([[0], said]).astype(np.uint64),
        "bytepacked_indices": list(np.packbits(bits.astype(np.uint8).reshape(LENGTH, -1), axis=1)),
        "compressed_logprobs": list(values.view(np.uint8)),
    }


def write_dataset(folder: Path, *, num_files: int, num_rows: int = ROWS) -> int:
    """Write parquet files and the compression's config; return the number of positions. Files have equal texts."""
    folder.mkdir()
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(CONFIG))
    rng = np.random.default_rng(0)
    columns = pa.list_(pa.list_(pa.uint8()))
    fields = {"bytepacked_indices": columns, "compressed_logprobs": columns}
    schema = pa.schema([("input_ids", pa.list_(pa.uint64())), *fields.items()])
    table = pa.Table.from_pylist([make_row(rng) for _ in range(num_rows)], schema=schema)
    for number in range(num_files):
        pq.write_table(table, folder / f"data_{number}.parquet", row_group_size=16)
    return num_files * num_rows * LENGTH


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of as many words."""
    words = WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)


def run_import(dataset: Path, tokenizer: Path, out: Path, held_out: float) -> tuple[int, float]:
    """Import a dataset; return how many positions are stored, and the seconds of processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "retort", "import", "distillkit", str(dataset)]
    options = [
        "--tokenizer",
        str(tokenizer),
        "--output",
        str(out),
        "--validation-fraction",
        str(held_out),
    ]
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "NUMBA", "MKL")}
    subprocess.run([*words, *options], check=True, env=os.environ | threads)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads((out / "manifest.json").read_text())["positions"], seconds


def read_columns(dataset: Path) -> Iterator[dict[str, NDArray[np.uint8]]]:
    """Yield both columns [P, bytes] of 16 texts at a time, as pyarrow reads them."""
    for path in sorted(dataset.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(16, use_threads=False):
            positions = 16 * LENGTH
            yield {
                name: np.asarray(batch.column(name).values.values).reshape(positions, -1)
                for name in ("bytepacked_indices", "compressed_logprobs")
            }


def time_reading(dataset: Path) -> float:
    """Return the seconds of processor that reading alone takes."""
    started = time.process_time()
    for _ in read_columns(dataset):
        pass
    return time.process_time() - started


def time_distillkit(dataset: Path, checkout: Path | None) -> float:
    """Return the seconds of processor that reading and DistillKit's decompressor take.

    Raises UnavailableError when there is no checkout, or what it imports is not installed.
    """
    codec = load_codec(checkout, CONFIG)
    torch.set_num_threads(1)
    started = time.process_time()
    for columns in read_columns(dataset):
        row = {name: torch.from_numpy(values.copy())[None] for name, values in columns.items()}
        codec.decompress_to_sparse(row)
    return time.process_time() - started


def compare(folder: Path, flags: argparse.Namespace) -> None:
    """Write both datasets, import and read them, and print the table."""
    dataset, one, tokenizer = folder / "dataset", folder / "one", folder / "tokenizer"
    positions = write_dataset(dataset, num_files=max(1, round(flags.tokens * 1e6 / ROWS / LENGTH)))
    write_dataset(one, num_files=1, num_rows=8)
    write_tokenizer(tokenizer)
    run_import(one, tokenizer, folder / "first", 0.2)  # compiles what is not compiled yet
    few, loading = run_import(one, tokenizer, folder / "start", 0.2)
    many, whole = run_import(dataset, tokenizer, folder / "whole", 0.01)
    ways = {
        "retort import": (many - few, whole - loading),
        "the same, with loading": (many, whole),
        "pyarrow, reading alone": (positions, time_reading(dataset)),
    }
    print(f"{positions / 1e6:.1f} million tokens of 128 logits; loading took {loading:.1f} s")
    print(f"{'':26}{'tokens/s':>10}")
    for name, (tokens, seconds) in ways.items():
        print(f"{name:26}{tokens / seconds:10,.0f}")
    try:
        print(
            f"{'DistillKit, decoding':26}{positions / time_distillkit(dataset, flags.distillkit):10,.0f}"
        )
    except UnavailableError as error:
        print(format_not_run("DistillKit, decoding", str(error), width=26))


def main() -> None:
    """Write a dataset, import it, and print the table."""
    parser = make_parser("benchmarks.cache.importing", __doc__)
    parser.add_argument("--tokens", type=float, default=2, help="millions; default: 2")
    parser.add_argument(
        "--distillkit",
        type=checkout_of(REPOSITORY, holds="distillkit"),
        help=f"a checkout of github.com/{REPOSITORY}",
    )
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        compare(Path(name), flags)


if __name__ == "__main__":
    main()
