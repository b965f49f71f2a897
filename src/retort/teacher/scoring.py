"""The teacher reads sequences: batches of like length become distributions at every counted position.

Legend: B sequences in a batch, T positions, P counted positions, D width, V vocabulary, W the same in whole blocks.

What a batch holds is fixed by a part's content and the config. Only a device that runs out of memory changes it: then
the batch is halved, and what was made that way is counted.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retort.cache.codec import Codec, SparseTargets, TokenOrder
from retort.cache.sparse_codec import Selection, hash_to_uniform, to_streams
from retort.cache.sparse_streams import Streams
from retort.cli import is_out_of_memory
from retort.models.load import CausalLM
from retort.teacher.selection import NotFiniteError, pad_width, select_probable, select_top_k
from retort.tokens.sequences import Sequence, SequenceTable

logger = logging.getLogger(__name__)

# Rows of logits held at once. On a CPU a product of 64 rows takes a quarter longer a row than one of 128 and more; a
# GPU wants more at once.
_HEAD_ROWS = {"cpu": 256, "cuda": 2048}
_MOST_PADDING = 0.125  # of a row


def batch_by_length(table: SequenceTable, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield indices of sequences in batches of like length, longest first.

    A batch holds at most as many padded tokens as `batch_size` of the longest sequences, so of shorter ones there are
    more; and no sequence that is more than an eighth shorter than its longest. Padding is 5.6 % of 1,000 documents of
    log-normal lengths (mean 294, batch_size 8), in 40 batches; without the eighth 7.7 % in 23, of 150 documents 32 %.
    """
    lengths = table.lengths
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order]
    room = batch_size * int(lengths.max(initial=0))
    start = 0
    while start < len(order):
        longest = int(falling[start])
        like = int(np.searchsorted(-falling, -longest * (1 - _MOST_PADDING), side="right"))
        stop = min(start + room // longest, like)
        yield order[start:stop]
        start = stop


def pad_batch(rows: Rows[Sequence], *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return input ids, attention mask and loss mask, each [B, T], padded on the right to the longest row."""
    width = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros((len(rows), width), dtype=torch.long)
    attention_BT = torch.zeros((len(rows), width), dtype=torch.long)
    loss_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.ids)] = torch.from_numpy(np.array(row.ids, dtype=np.int64))
        attention_BT[b, : len(row.ids)] = 1
        loss_BT[b, : len(row.ids)] = torch.from_numpy(np.array(row.loss_mask))
    return ids_BT.to(device), attention_BT.to(device), loss_BT.to(device)


def pack_batch(rows: Rows[Sequence], *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return input ids, position ids and loss mask, each [1, N]: all rows one after the other, without padding."""
    ids_N = torch.from_numpy(np.concatenate([row.ids for row in rows]).astype(np.int64))
    places_N = torch.cat([torch.arange(len(row.ids)) for row in rows])
    loss_N = torch.from_numpy(np.concatenate([row.loss_mask for row in rows]))
    return ids_N[None].to(device), places_N[None].to(device), loss_N[None].to(device)


@dataclass
class Scorer:
    """A teacher, how much it reads at once, and what it learned of its device's memory."""

    teacher: CausalLM
    batch_size: int
    too_many: int | None = None  # padded tokens for which memory did not suffice
    halved: int = field(default=0, init=False)  # batches that had to be halved

    @torch.inference_mode()
    def read(self, table: SequenceTable) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yield (indices of sequences, features [P, D] at all their counted positions) batch by batch."""
        for indices in batch_by_length(table, self.batch_size):
            yield from self._read_batch(table, indices)

    def _read_batch(
        self, table: SequenceTable, indices: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yield one batch, in halves where the device has no memory for it."""
        size = len(indices) * int(table.lengths[indices[0]])
        if self.too_many is None or size < self.too_many or len(indices) == 1:
            try:
                features_PD = self._run(table, indices)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(indices) == 1:
                    raise ValueError(
                        f"out of memory with one sequence of {size:,} tokens: spread the teacher over more GPUs "
                        "(teacher.generation.gpus_per_model), take a smaller teacher.dtype, or lower "
                        "dataset.max_length (which makes other tokens)."
                    ) from None
                self._remember(size, len(indices))
            else:
                yield indices, features_PD
                return
        self.halved += 1
        middle = (len(indices) + 1) // 2
        for half in (indices[:middle], indices[middle:]):
            yield from self._read_batch(table, half)

    def _run(self, table: SequenceTable, indices: NDArray[np.int64]) -> Tensor:
        rows = [table[int(i)] for i in indices]
        if self.teacher.packs_sequences:
            ids_1N, places_1N, loss_1N = pack_batch(rows, device=self.teacher.device)
            features_1ND = self.teacher.features(ids_1N, None, position_ids_BT=places_1N)
            return features_1ND[loss_1N.to(features_1ND.device)]
        ids_BT, attention_BT, loss_BT = pad_batch(rows, device=self.teacher.device)
        features_BTD = self.teacher.features(ids_BT, attention_BT)
        return features_BTD[loss_BT.to(features_BTD.device)]

    def _remember(self, size: int, num_sequences: int) -> None:
        self.too_many = size
        logger.warning(
            f"out of memory with {num_sequences} sequences ({size:,} tokens) at once: such batches are halved from now "
            "on. A lower teacher.generation.batch_size avoids the attempt."
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def score_features(
    scorer: Scorer, table: SequenceTable, *, on_batch: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (sequence index, features [P, D] at its counted positions), batch by batch in length order."""
    counts = np.diff(table.position_offsets)
    for indices, features_PD in scorer.read(table):
        pieces = torch.split(features_PD, counts[indices].tolist())
        yield from zip(indices.tolist(), pieces, strict=True)
        on_batch(int(table.lengths[indices].sum()))


class Scored:
    """What the teacher says of the sequences of one part, in the table's order, as far as it was asked for yet.

    With an executor, streams are made behind the teacher's back; `targets` waits for them.
    """

    def __init__(self, num_sequences: int, behind: Executor | None) -> None:
        self._found: list[Any] = [None] * num_sequences
        self._behind = behind
        self.halved = 0  # batches that had to be halved for want of memory

    def put(self, index: int, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Let `work` make what belongs to a sequence."""
        if self._behind is None:
            self._found[index] = work(*args, **kwargs)
        else:
            self._found[index] = self._behind.submit(work, *args, **kwargs)

    @property
    def targets(self) -> SparseTargets | list[Streams]:
        """All sequences' distributions: rows of `top_k`, every sequence's streams of the other methods."""
        found = [f.result() if isinstance(f, Future) else f for f in self._found]
        return SparseTargets.concatenate(found) if isinstance(found[0], SparseTargets) else found


@torch.inference_mode()
def score_part(
    scorer: Scorer,
    table: SequenceTable,
    codec: Codec,
    *,
    num_tokens: int,
    order: TokenOrder | None = None,
    behind: Executor | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Scored:
    """Return the teacher's distributions at every counted position of the table.

    A codec that codes needs `order`; what was selected is not kept longer than until it is coded.
    Raises ValueError with the place of a logit that is no number.
    """
    scored = Scored(len(table), behind)
    counts = np.diff(table.position_offsets)
    halved = scorer.halved
    head = _Head(scorer.teacher, codec, num_tokens=num_tokens)
    for indices, features_PD in scorer.read(table):
        uniform_P = _draw_uniform(table, indices) if codec.is_coded else np.empty(0)
        try:
            pieces = head.select(features_PD, uniform_P)
        except NotFiniteError as error:
            raise _explain(error, table, indices) from None
        ends = np.cumsum(counts[indices])
        for index, first, stop in zip(indices.tolist(), ends - counts[indices], ends, strict=True):
            mine = pieces[int(first) : int(stop)]
            if isinstance(mine, SparseTargets):
                scored.put(index, lambda found: found, mine)
                continue
            row = table[index]
            next_ids = row.ids[1:][row.loss_mask[:-1]]
            scored.put(index, to_streams, mine, codec, order, next_ids=next_ids, key=row.key)
        on_batch(int(table.lengths[indices].sum()))
    scored.halved = scorer.halved - halved
    return scored


def _draw_uniform(table: SequenceTable, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a number for each counted position, by its sequence's content key and its place in it alone."""
    rows = [table[int(i)] for i in indices]
    return np.concatenate([hash_to_uniform(row.key, np.arange(row.num_positions)) for row in rows])


def _explain(error: NotFiniteError, table: SequenceTable, indices: NDArray[np.int64]) -> ValueError:
    """Return the sentence that says where a teacher's logit is no number."""
    places = [(int(i), t) for i in indices for t in np.flatnonzero(table[int(i)].loss_mask)]
    index, place = places[error.row]
    return ValueError(
        f"the teacher's logit of token {error.token} is {error.value} at position {place} of a sequence of document "
        f"{table.documents[index]} (sequence {index} of its part). Nothing of the part was stored. Try teacher.dtype: "
        "float32, and check the teacher's weights."
    )


class _Head:
    """The output layer applied to some rows at a time, in one piece of memory: a fresh one for every product costs a
    fifth of the product (72 of 610 microseconds a row at V = 32,768 on one core go to the kernel's zeroing)."""

    def __init__(self, teacher: CausalLM, codec: Codec, *, num_tokens: int) -> None:
        self.head, self.codec, self.num_tokens = teacher.head, codec, num_tokens
        self.width = teacher.vocabulary
        self.logits_RW = torch.empty(0)

    def select(
        self, features_PD: Tensor, uniform_P: NDArray[np.float64]
    ) -> SparseTargets | Selection:
        """Return what the codec keeps of all rows, in order."""
        at_once = _HEAD_ROWS[features_PD.device.type]
        if len(self.logits_RW) < min(at_once, len(features_PD)):
            shape = (min(at_once, len(features_PD)), pad_width(self.width))
            weight = self.head.weight  # on another GPU of the group than the last layer, perhaps
            device = features_PD.device if weight is None else weight.device
            self.logits_RW = torch.empty(shape, dtype=torch.float32, device=device)
        pieces: list[Any] = []
        for start in range(0, len(features_PD), at_once):
            stop = min(start + at_once, len(features_PD))
            logits_RW = self.logits_RW[: stop - start]
            self.head.logits(features_PD[start:stop], out=logits_RW[:, : self.width])
            if self.codec.is_coded:
                uniform = uniform_P[start:stop]
                pieces.append(
                    select_probable(
                        logits_RW, self.codec, num_tokens=self.num_tokens, uniform_P=uniform
                    )
                )
            else:
                pieces.append(select_top_k(logits_RW, self.codec, num_tokens=self.num_tokens))
        found: SparseTargets | Selection = type(pieces[0]).concatenate(pieces)
        return found
