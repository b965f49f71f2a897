"""The teacher reads sequences, in batches of similar length, and returns distributions at every counted position.

Legend: B sequences in a batch, T positions, P counted positions, D width, V vocabulary, W the vocabulary in whole
blocks, N tokens of a packed batch, R rows of logits at once.

Batches follow from a part's content and the config alone. Only if the device runs out of memory is a batch halved, and
parts that were scored that way are counted.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from retort.cache.codec import NO_ORDER, Codec, Selected, TokenOrder
from retort.cache.entropy_codec import hash_to_uniform
from retort.cli import is_out_of_memory
from retort.models.load import CausalLM
from retort.teacher.selection import NotFiniteError, pad_width, select
from retort.tokens.sequences import Sequence, SequenceTable

logger = logging.getLogger(__name__)

# Rows of logits at once, by device. On a CPU a product of 64 rows takes a quarter longer per row than one of 128 or
# more; a GPU needs more.
_HEAD_ROWS = {"cpu": 256, "cuda": 2048}
_MAX_PADDING = 0.125  # of a row


def batch_by_length(table: SequenceTable, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield indices of sequences, int64 [B], in batches of similar length, longest first.

    A batch has at most as many tokens, padding included, as `batch_size` of the longest sequences (so there are more of
    shorter ones), and no sequence more than an eighth shorter than its longest. Padding is 5.6 % of 1,000 documents of
    log-normal lengths (mean 294, batch_size 8), in 40 batches; without the eighth 7.7 % in 23, of 150 documents 32 %.
    """
    lengths = table.lengths
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    max_tokens = batch_size * int(lengths.max(initial=0))
    start = 0
    while start < len(order):
        longest = int(descending[start])
        similar = int(np.searchsorted(-descending, -longest * (1 - _MAX_PADDING), side="right"))
        stop = min(start + max_tokens // longest, similar)
        yield order[start:stop]
        start = stop


def pad_batch(rows: Many[Sequence], *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return input ids and attention mask, int64, and loss mask, bool, each [B, T], padded on the right."""
    ids = [torch.from_numpy(row.ids.astype(np.int64)) for row in rows]
    loss = [torch.from_numpy(np.array(row.loss_mask)) for row in rows]
    columns = ids, [torch.ones_like(row) for row in ids], loss
    ids_BT, attention_BT, loss_BT = (pad_sequence(c, batch_first=True).to(device) for c in columns)
    return ids_BT, attention_BT, loss_BT


def pack_batch(rows: Many[Sequence], *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return input ids and position ids, int64, and loss mask, bool, each [1, N]: all rows in one, without padding."""
    ids_N = torch.from_numpy(np.concatenate([row.ids for row in rows]).astype(np.int64))
    positions_N = torch.cat([torch.arange(len(row.ids)) for row in rows])
    loss_N = torch.from_numpy(np.concatenate([row.loss_mask for row in rows]))
    return ids_N[None].to(device), positions_N[None].to(device), loss_N[None].to(device)


@dataclass
class Scorer:
    """A model that reads sequences in batches, which are halved where memory runs out."""

    teacher: CausalLM
    batch_size: int
    failed_size: int | None = None  # tokens of a batch, with padding, that ran out of memory
    num_halved: int = field(default=0, init=False)  # batches

    @torch.inference_mode()
    def read(self, table: SequenceTable) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yield (indices of sequences [B], features [P, D] at all their counted positions) batch by batch.

        Raises ValueError where memory runs out with a single sequence.
        """
        for indices in batch_by_length(table, self.batch_size):
            yield from self._read_batch(table, indices)

    def _read_batch(
        self, table: SequenceTable, indices: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Yield one batch, in halves if the device runs out of memory."""
        size = len(indices) * int(table.lengths[indices[0]])
        if self.failed_size is None or size < self.failed_size or len(indices) == 1:
            try:
                features_PD = self._run(table, indices)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(indices) == 1:
                    raise ValueError(
                        f"out of memory with one sequence of {size:,} tokens: spread the teacher over more GPUs "
                        "(teacher.generation.gpus_per_model), use a smaller teacher.dtype, or lower "
                        "dataset.max_length (which tokenizes the corpus again)."
                    ) from None
                self._remember(size, len(indices))
            else:
                yield indices, features_PD
                return
        self.num_halved += 1
        middle = (len(indices) + 1) // 2
        for half in (indices[:middle], indices[middle:]):
            yield from self._read_batch(table, half)

    def _run(self, table: SequenceTable, indices: NDArray[np.int64]) -> Tensor:
        rows = [table[int(i)] for i in indices]
        if self.teacher.packs_sequences:
            ids_1N, positions_1N, loss_1N = pack_batch(rows, device=self.teacher.device)
            features_1ND = self.teacher.features(ids_1N, None, position_ids_BT=positions_1N)
            return features_1ND[loss_1N.to(features_1ND.device)]
        ids_BT, attention_BT, loss_BT = pad_batch(rows, device=self.teacher.device)
        features_BTD = self.teacher.features(ids_BT, attention_BT)
        return features_BTD[loss_BT.to(features_BTD.device)]

    def _remember(self, size: int, num_sequences: int) -> None:
        self.failed_size = size
        logger.info(
            f"out of memory with {num_sequences} sequences ({size:,} tokens) at once: such batches are halved from now "
            "on. A lower teacher.generation.batch_size avoids this."
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def score_features(
    scorer: Scorer, table: SequenceTable, *, on_batch: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of a sequence, features [P, D] at its counted positions), longest sequences first.

    on_batch: called with the number of tokens of each batch. Raises ValueError as `Scorer.read` does.
    """
    counts = np.diff(table.position_offsets)
    for indices, features_PD in scorer.read(table):
        pieces = torch.split(features_PD, counts[indices].tolist())
        yield from zip(indices.tolist(), pieces, strict=True)
        on_batch(int(table.lengths[indices].sum()))


class PartTargets:
    """The teacher's distributions on the sequences of one part, in the table's order.

    With an executor, sequences are prepared in the background while the teacher reads on; `sequences` waits for them.
    """

    def __init__(self, num_sequences: int, executor: Executor | None) -> None:
        self._found: list[Any] = [None] * num_sequences
        self._executor = executor
        self.num_halved = 0  # batches that were halved because memory ran out

    def put(self, index: int, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Set a sequence's targets to what `work` returns."""
        if self._executor is None:
            self._found[index] = work(*args, **kwargs)
        else:
            self._found[index] = self._executor.submit(work, *args, **kwargs)

    @property
    def sequences(self) -> list[Any]:
        """What the codec made of each sequence, ready to be encoded."""
        return [f.result() if isinstance(f, Future) else f for f in self._found]


@torch.inference_mode()
def score_part(
    scorer: Scorer,
    table: SequenceTable,
    codec: Codec,
    *,
    num_tokens: int,
    order: TokenOrder = NO_ORDER,
    executor: Executor | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> PartTargets:
    """Return the teacher's distributions at every counted position of the table.

    num_tokens: size of the tokenizer; ids from there on get probability zero. order: `codec.order_tokens`.
    executor, on_batch: see `PartTargets`, `score_features`. Raises ValueError naming the position of a logit that is
    NaN or infinite, and as `Scorer.read` does.
    """
    scored = PartTargets(len(table), executor)
    counts = np.diff(table.position_offsets)
    num_halved = scorer.num_halved
    selector = _Selector(scorer.teacher, codec, num_tokens=num_tokens)
    for indices, features_PD in scorer.read(table):
        try:
            selected = selector.select(features_PD, _compute_uniform(table, indices))
        except NotFiniteError as error:
            raise _explain(error, table, indices) from None
        ends = np.cumsum(counts[indices])
        for index, first, stop in zip(indices.tolist(), ends - counts[indices], ends, strict=True):
            row, piece = table[index], selected[int(first) : int(stop)]
            scored.put(index, codec.prepare, piece, order, next_ids=row.next_ids, key=row.key)
        on_batch(int(table.lengths[indices].sum()))
    scored.num_halved = scorer.num_halved - num_halved
    return scored


def _compute_uniform(table: SequenceTable, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each counted position, from its sequence's content key and its index in it."""
    rows = [table[int(i)] for i in indices]
    return np.concatenate([hash_to_uniform(row.key, np.arange(row.num_positions)) for row in rows])


def _explain(error: NotFiniteError, table: SequenceTable, indices: NDArray[np.int64]) -> ValueError:
    """Return the error that names the position of a logit that is NaN or infinite."""
    positions = [(int(i), t) for i in indices for t in np.flatnonzero(table[int(i)].loss_mask)]
    index, position = positions[error.row]
    return ValueError(
        f"the teacher's logit of token {error.token} is {error.value} at position {position} of a sequence of document "
        f"{table.documents[index]} (sequence {index} of its part). The part was not saved. Try teacher.dtype: float32, "
        "and check the teacher's weights."
    )


class _Selector:
    """Applies the head to some rows at a time, in the same memory, and selects the tokens to keep.

    New memory for every product costs a fifth of the product: of 610 microseconds a row at V = 32,768 on one core, the
    kernel's zeroing takes 72.
    """

    def __init__(self, teacher: CausalLM, codec: Codec, *, num_tokens: int) -> None:
        self.head, self.codec, self.num_tokens = teacher.head, codec, num_tokens
        self.width = teacher.vocabulary
        self.logits_RW = torch.empty(0)

    def select(self, features_PD: Tensor, uniform_P: NDArray[np.float64]) -> Selected:
        """Return what the codec keeps of all P rows, in order; uniform_P: see `select_probable`."""
        at_once = _HEAD_ROWS[features_PD.device.type]
        if len(self.logits_RW) < min(at_once, len(features_PD)):
            shape = (min(at_once, len(features_PD)), pad_width(self.width))
            weight = self.head.weight  # may be on another GPU of the group than the features
            device = features_PD.device if weight is None else weight.device
            self.logits_RW = torch.empty(shape, dtype=torch.float32, device=device)
        pieces = []
        for start in range(0, len(features_PD), at_once):
            stop = min(start + at_once, len(features_PD))
            logits_RW = self.logits_RW[: stop - start]
            self.head.logits(features_PD[start:stop], out=logits_RW[:, : self.width])
            uniform = uniform_P[start:stop]
            found = select(logits_RW, self.codec, num_tokens=self.num_tokens, uniform_P=uniform)
            pieces.append(found)
        return type(pieces[0]).concatenate(pieces)
