"""Datasets in DistillKit's format, written from its description, or by its own code.

RETORT_DISTILLKIT names a checkout of arcee-ai/DistillKit, whose compressor is then used.
"""

import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

CHECKOUT = os.environ.get("RETORT_DISTILLKIT")
RECOMMENDED: dict[str, Any] = {
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "normalize_t": True,
}
QUICK_START: dict[str, Any] = {
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, 2],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": True,
}
_TYPES = {"float16": np.float16, "float32": np.float32, "float64": np.float64}


def compress(
    ids_PK: NDArray[np.int64], logprobs_PK: NDArray[np.float32], config: dict[str, Any]
) -> dict[str, list[Any]]:
    """Return the columns of some positions: a list for each."""
    if CHECKOUT:
        return _compress_there(ids_PK, logprobs_PK, config)
    if "polynomial_degree" in config:
        return _compress_legacy(ids_PK, logprobs_PK, config)
    bits = int(np.ceil(np.log2(config["d"])))
    values = logprobs_PK.astype(np.float64)
    if config["delta_encoding"]:
        values = np.diff(values, axis=1, prepend=0.0)
    exact, fitted = values[:, : config["exact_k"]], values[:, config["exact_k"] :]
    pieces = [_to_bytes(exact, config["exact_dtype"])]
    if terms := config["polynomial_terms"]:
        number = fitted.shape[1]
        t = np.linspace(0, 1, number) if config.get("normalize_t") else np.arange(number)
        table = np.stack([np.sqrt(t) if term == "sqrt" else t**term for term in terms], axis=1)
        coefficients = np.linalg.lstsq(table.astype(np.float64), fitted.T, rcond=None)[0].T
        pieces.append(_to_bytes(coefficients, config["term_dtype"]))
        fitted = fitted - coefficients @ table.T
    first = 0
    for bin in config["residual_bins"]:
        part = fitted[:, first : first + bin["num_elements"]]
        first += bin["num_elements"]
        half = 1 << (bin["element_bits"] - 1)
        scale = np.maximum(np.abs(part).max(axis=1, keepdims=True) / half, 1e-30)
        pieces.append(_to_bytes(scale, bin["scale_dtype"]))
        levels = np.clip(np.rint(part / scale), -half, half - 1).astype(np.int64) + half
        pieces.append(pack(levels, bin["element_bits"]))
    joined = np.concatenate(pieces, axis=1)
    return {
        "bytepacked_indices": list(pack(ids_PK, bits)),
        "compressed_logprobs": list(joined),
    }


def pack(numbers_PK: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Return numbers as bytes [P, B], `bits` of each, the highest first."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits(
        (numbers_PK[:, :, None] >> shifts & 1).astype(np.uint8).reshape(len(numbers_PK), -1), axis=1
    )


def _to_bytes(values: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    if dtype == "bfloat16":
        rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint8)
        return rounded.numpy().reshape(len(values), -1)
    return np.ascontiguousarray(values.astype(_TYPES[dtype])).view(np.uint8)


def _compress_legacy(
    ids_PK: NDArray[np.int64], values_PK: NDArray[np.float32], config: dict[str, Any]
) -> dict[str, list[Any]]:
    bits = int(np.ceil(np.log2(config["vocab_size"])))
    at_once = 64 // bits
    missing = -ids_PK.shape[1] % at_once
    padded = np.pad(ids_PK, ((0, 0), (0, missing))).reshape(len(ids_PK), -1, at_once)
    packed = np.bitwise_or.reduce(padded << (bits * np.arange(at_once)), axis=2)
    exact, fitted = values_PK[:, : config["exact_k"]], values_PK[:, config["exact_k"] :]
    t = np.arange(1, fitted.shape[1] + 1, dtype=np.float64)
    sign = -1 if config.get("invert_polynomial", True) else 1
    table = np.stack([t ** (sign * i) for i in range(config["polynomial_degree"] + 1)], axis=1)
    coefficients = np.linalg.lstsq(table, fitted.T.astype(np.float64), rcond=None)[0].T
    if not fitted.shape[1]:
        coefficients = coefficients[:, :0]
    return {
        "packed_indices": list(packed.astype(np.uint64)),
        "exact_values": list(exact.astype(np.float16).astype(np.float32)),
        "coeffs": list(coefficients.astype(np.float32)),
    }


def _compress_there(
    ids_PK: NDArray[np.int64], logprobs_PK: NDArray[np.float32], config: dict[str, Any]
) -> dict[str, list[Any]]:
    package = types.ModuleType("distillkit")  # its own __init__ imports its whole trainer
    package.__path__ = [f"{CHECKOUT}/distillkit"]
    sys.modules.setdefault("distillkit", package)
    from distillkit.compression.compressor import LogprobCompressor  # type: ignore[import-not-found]
    from distillkit.compression.config import (  # type: ignore[import-not-found]
        DistributionQuantizationConfig,
        LegacyLogitCompressionConfig,
    )

    if "polynomial_degree" in config:
        compressor = LogprobCompressor(legacy_config=LegacyLogitCompressionConfig(**config))
    else:
        compressor = LogprobCompressor(DistributionQuantizationConfig(**config))
    found = compressor.compress_from_sparse(
        torch.from_numpy(ids_PK)[None], torch.from_numpy(logprobs_PK)[None]
    )
    return {name: list(column[0].numpy()) for name, column in found.items()}


@torch.inference_mode()
def score(model: Any, ids: list[int]) -> NDArray[np.float32]:
    """Return a model's log-probabilities [T - 1, V] of the tokens after each but the last."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    logprobs: NDArray[np.float32] = logits.log_softmax(dim=-1).numpy()
    return logprobs


@torch.inference_mode()
def sample_texts(teacher: Path, number: int, *, num_tokens: int, length: int) -> list[list[int]]:
    """Return texts of 2 to `length` tokens that a teacher writes: of others a random one knows no next token."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    torch.manual_seed(0)
    prompts = torch.randint(3, num_tokens, (number, 1))
    written = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=20,
        suppress_tokens=[0, 1, 2, *range(num_tokens, model.config.vocab_size)],
        max_length=length,
        min_length=length,
    )
    return [ids[: 2 + 37 * row % (length - 1)].tolist() for row, ids in enumerate(written)]


def write_dataset(
    folder: Path,
    texts: list[list[int]],
    teacher: Path,
    config: dict[str, Any],
    *,
    num_tokens: int,
    rows_per_file: int = 30,
) -> None:
    """Write parquet files data_0, data_1, ... of texts that a teacher read, and the compression's config beside them.

    num_tokens: of the tokenizer; ids beyond it have no probability.
    """
    folder.mkdir(parents=True)
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    model = AutoModelForCausalLM.from_pretrained(teacher)
    for number, first in enumerate(range(0, len(texts), rows_per_file)):
        rows: list[dict[str, Any]] = []
        for ids in texts[first : first + rows_per_file]:
            logprobs = score(model, ids)
            logprobs[:, num_tokens:] = -1e4
            best = np.argsort(-logprobs, axis=1, kind="stable")[:, : config["k"]]
            values = np.take_along_axis(logprobs, best, axis=1)
            rows.append({"input_ids": ids, **compress(best, values, config)})
        write_rows(folder / f"data_{number}.parquet", rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the column types of DistillKit."""
    inner = {
        "bytepacked_indices": pa.uint8(),
        "compressed_logprobs": pa.uint8(),
        "packed_indices": pa.uint64(),
        "exact_values": pa.float32(),
        "coeffs": pa.float32(),
    }
    fields = {name: pa.list_(pa.list_(kind)) for name, kind in inner.items() if name in rows[0]}
    flat = {name: pa.list_(pa.int64()) for name in ("labels", "attention_mask") if name in rows[0]}
    schema = pa.schema([("input_ids", pa.list_(pa.uint64())), *flat.items(), *fields.items()])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=13)
