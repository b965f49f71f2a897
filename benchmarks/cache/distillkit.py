"""DistillKit's cache (github.com/arcee-ai/DistillKit), by its own code from a checkout."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cache.stored import Logprobs, Stored, iterate_chunks
from benchmarks.common import import_opponent, require_checkout

REPOSITORY = "arcee-ai/DistillKit"
_RECOMMENDED = {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]}
CONFIGS: dict[str, dict[str, Any]] = {  # the README's, at a61c2e7
    "budget": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
    "recommended": _RECOMMENDED,
    "recommended, normalize_t": _RECOMMENDED | {"normalize_t": True},
}


def compress(logprobs_PV: Logprobs, checkout: Path | None, config: str) -> Stored:
    """Return what its LogprobCompressor gives back: its bytes, and logprobs as its loss reads them.

    Raises UnavailableError when there is no checkout, or what it imports is not installed.
    """
    entries = {
        "exact_dtype": "bfloat16",
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
    }
    entries |= {"d": logprobs_PV.shape[1], "error_diffusion": False, **CONFIGS[config]}
    codec = load_codec(checkout, entries)
    ids, logprobs, num_bytes = [], [], 0
    for chunk in iterate_chunks(logprobs_PV):
        row = codec.compress(chunk[None])
        num_bytes += sum(column.numel() for column in row.values())
        decoded_ids, decoded = codec.decompress_to_sparse(row)
        ids.append(decoded_ids[0].to(torch.int32))
        logprobs.append(decoded[0].float())
    size = num_bytes / len(logprobs_PV)
    return Stored(f"DistillKit {config}", size, torch.cat(ids).numpy(), torch.cat(logprobs).numpy())


def load_codec(checkout: Path | None, entries: dict[str, Any]) -> Any:
    """Return its LogprobCompressor for these entries of a compression's config.

    Raises UnavailableError when there is no checkout, or what it imports is not installed.
    """
    checkout = require_checkout(checkout, repository=REPOSITORY, flag="--distillkit")
    install = f"pip install what {checkout}/pyproject.toml names"
    with import_from(checkout):
        configuration = import_opponent("distillkit.compression.config", install=install)
        compressor = import_opponent("distillkit.compression.compressor", install=install)
    return compressor.LogprobCompressor(configuration.DistributionQuantizationConfig(**entries))


@contextlib.contextmanager
def import_from(folder: Path) -> Iterator[None]:
    """Look for modules in `folder` first."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
