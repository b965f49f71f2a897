"""The bytes of a teacher's distributions in a cache, from a sample of them that is selected and encoded as workers do.

Legend: P counted positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retort.cache.codec import Codec, TokenOrder
from retort.cache.cost import SampledBytes
from retort.cache.entropy_codec import hash_to_uniform
from retort.teacher.features import read_features
from retort.teacher.selection import select
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable

# Of the head, on a CPU: some 20 seconds. A head of 128,256 x 8,192 gets 950 positions.
_MOST_OPERATIONS = 2e12
_NORMAL_95 = 1.96


def sample_features(
    features_path: Path, index: TokenIndex, codec: Codec, *, weights: str
) -> SampledBytes | None:
    """Return the bytes of the distributions in a teacher's held-out scores, at the sample of training positions.

    None where it has none. weights: fingerprint of the teacher's. Raises ValueError for scores of another teacher or of
    other sequences.
    """
    teacher = read_features(features_path)
    teacher.require_teacher(weights, source=features_path, made_from=index.path)
    table = index.read_sequences(teacher.train_sequences)
    teacher.require("train", table, source=features_path)
    if table.num_positions == 0:
        return None
    width = 1 if teacher.head.weight is None else teacher.head.weight.shape[1]
    most = int(_MOST_OPERATIONS / (2 * width * codec.vocabulary))
    offsets = table.position_offsets.tolist()

    def compute_logits(sequence: int) -> Tensor:
        rows = slice(offsets[sequence], offsets[sequence + 1])
        return teacher.head.logits(teacher.features["train"][rows])

    chosen = choose_sequences(table, num_positions=most)
    order = codec.order_tokens(index.read_token_counts())
    return measure_bytes(table, chosen, compute_logits, codec, order, num_tokens=teacher.num_tokens)


def choose_sequences(table: SequenceTable, *, num_positions: int) -> NDArray[np.int64]:
    """Return the numbers of evenly spaced sequences of about so many positions, at least two if there are as many."""
    count = max(2, round(len(table) * num_positions / max(1, table.num_positions)))
    spread = np.linspace(0, len(table) - 1, min(count, len(table)))
    numbers: NDArray[np.int64] = np.unique(spread.astype(np.int64))
    return numbers


@torch.inference_mode()
def measure_bytes(
    table: SequenceTable,
    sequences: NDArray[np.int64],
    compute_logits: Callable[[int], Tensor],
    codec: Codec,
    order: TokenOrder,
    *,
    num_tokens: int,
) -> SampledBytes:
    """Encode some sequences of a table as one part, and return their bytes.

    compute_logits: from a sequence's number to its float32 logits [P, V]. num_tokens: size of the tokenizer.
    """
    prepared: list[Any] = []
    positions = []
    for number in sequences.tolist():
        row = table[number]
        if row.num_positions == 0:
            continue
        uniform = hash_to_uniform(row.key, np.arange(row.num_positions))
        kept = select(compute_logits(number), codec, num_tokens=num_tokens, uniform_P=uniform)
        prepared.append(codec.prepare(kept, order, next_ids=row.next_ids, key=row.key))
        positions.append(row.num_positions)
    return bytes_of_records(*codec.encode(prepared), positions)


def bytes_of_records(
    records: Sequence[bytes], tables: bytes, positions: Sequence[int]
) -> SampledBytes:
    """Return the bytes of the records of some sequences, of so many counted positions each, and of their tables.

    The interval is that of a ratio of sums over sequences (Cochran, Sampling Techniques, 1977, equation 6.13).
    """
    pairs = [(len(r), n) for r, n in zip(records, positions, strict=True) if n]
    sizes, counts = np.array(pairs, float).reshape(-1, 2).T
    ratio = float(sizes.sum() / counts.sum())
    n = len(sizes)
    spread = float(np.sqrt(((sizes - ratio * counts) ** 2).sum() * n / max(1, n - 1)))
    return SampledBytes(
        positions=int(counts.sum()),
        per_position=ratio,
        per_part=len(tables),
        relative_error=_NORMAL_95 * spread / float(sizes.sum()) if n > 1 else 1.0,
    )
