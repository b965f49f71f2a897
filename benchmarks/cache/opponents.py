"""What others' caches keep of a distribution, in how many bytes: the opponents of the cache benchmark.

An opponent turns logprobs [P, V] (float32, natural log) into a `Stored`: bytes for a position, and what a reader gets
back. DistillKit and Megatron-LM run their own code (`distillkit.py`, `megatron.py`).

Legend: P positions, V vocabulary, K most ids kept at any position.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from benchmarks.cache import distillkit, megatron
from benchmarks.cache.stored import BLOCK, Logprobs, Stored, iterate_chunks
from benchmarks.common import UnavailableError


def keep_top_k(logprobs_PV: Logprobs, k: int = 64) -> Stored:
    """Keep the k most probable: id in 16 bits (32 for a larger vocabulary), logprob in float16."""
    ids, values = select_top_k(logprobs_PV, k)
    id_bytes = 2 if logprobs_PV.shape[1] <= 1 << 16 else 4
    rounded = values.astype(np.float16).astype(np.float32)
    return Stored(f"top-{k}, u{8 * id_bytes} + f16", k * (id_bytes + 2), ids, rounded)


def select_top_k(logprobs_PV: Logprobs, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return (ids, logprobs) [P, k], most probable first, exactly."""
    found = [chunk.topk(k, dim=-1) for chunk in iterate_chunks(logprobs_PV)]
    ids = torch.cat([f.indices for f in found]).to(torch.int32)
    return ids.numpy(), torch.cat([f.values for f in found]).numpy()


def sample_rs_kd(logprobs_PV: Logprobs, num_samples: int = 50, seed: int = 0) -> Stored:
    """RS-KD (arXiv 2503.16870): num_samples with replacement; t_i = c_i / num_samples. 24 bits for each different id.

    The authors released no code: this is their estimator for q = t, and their table's format (17 bits of id, 7 of
    count). Sum of squares of its error: (1 - sum of p squared) / num_samples.
    """
    torch.manual_seed(seed)
    samples = torch.cat(
        [c.exp().multinomial(num_samples, replacement=True) for c in iterate_chunks(logprobs_PV)]
    )
    P, V = logprobs_PV.shape
    keys = samples.numpy().astype(np.int64) + np.arange(P, dtype=np.int64)[:, None] * V
    unique, counts = np.unique(keys, return_counts=True)
    rows = unique // V
    per_row = np.bincount(rows, minlength=P)
    slots = np.arange(len(unique)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    ids = np.full((P, per_row.max()), -1, np.int32)
    logprobs = np.full(ids.shape, -np.inf, np.float32)
    ids[rows, slots] = unique % V
    logprobs[rows, slots] = np.log(counts / num_samples)
    return Stored(
        f"RS-KD N={num_samples}, 24 bit/id", 3 * per_row.mean(), ids, logprobs, unbiased=True
    )


def recode_rs_kd(
    stored: Stored, unigram_counts_V: NDArray[np.int64], num_samples: int = 50
) -> Stored:
    """The same samples, compressed by us: gaps of unigram ranks, counts and sizes in columns through zstd -19.

    Nobody publishes this; beside the published format it is the fair opponent of an entropy-coded one.
    """
    rank_V = np.empty(len(unigram_counts_V), np.int64)
    rank_V[np.argsort(-unigram_counts_V, kind="stable")] = np.arange(len(rank_V))
    num_bytes, compressor = 0, zstandard.ZstdCompressor(level=19)
    for start in range(0, len(stored.ids), BLOCK):
        ids, kept = stored.ids[start : start + BLOCK], stored.ids[start : start + BLOCK] >= 0
        ranks = np.where(kept, rank_V[ids], np.iinfo(np.int64).max)
        order = np.argsort(ranks, axis=1)
        kept_first = np.sort(kept, axis=1)[:, ::-1]
        gaps = np.diff(np.take_along_axis(ranks, order, 1), axis=1, prepend=0)[kept_first]
        counts = np.rint(np.exp(stored.logprobs[start : start + BLOCK]) * num_samples)
        counts = np.take_along_axis(counts, order, 1)[kept_first]
        columns = (kept.sum(axis=1), gaps & 255, gaps >> 8, counts)
        num_bytes += sum(len(compressor.compress(c.astype(np.uint8).tobytes())) for c in columns)
    name = f"RS-KD N={num_samples}, our zstd"
    return dataclasses.replace(stored, name=name, bytes_per_position=num_bytes / len(stored.ids))


def run_opponents(
    logprobs_PV: Logprobs,
    unigram_counts_V: NDArray[np.int64],
    *,
    distillkit_checkout: Path | None,
    megatron_checkout: Path | None,
) -> Iterator[tuple[str, Stored | UnavailableError]]:
    """Yield (name, what it stored) of each opponent, or why it cannot run."""
    for k in (12, 50, 64, 256):
        top_k = keep_top_k(logprobs_PV, k)
        yield top_k.name, top_k
    try:
        for saved in megatron.save(logprobs_PV, megatron_checkout):
            yield saved.name, saved
    except UnavailableError as error:
        yield "Megatron-LM top-64", error
    try:
        for config in distillkit.CONFIGS:
            compressed = distillkit.compress(logprobs_PV, distillkit_checkout, config)
            yield compressed.name, compressed
    except UnavailableError as error:
        yield "DistillKit", error
    sampled = sample_rs_kd(logprobs_PV)
    yield sampled.name, sampled
    recoded = recode_rs_kd(sampled, unigram_counts_V)
    yield recoded.name, recoded
