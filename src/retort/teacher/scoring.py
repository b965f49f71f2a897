"""The teacher reads sequences, in batches of similar length, and returns distributions at every counted position.

Legend: P counted positions, D width, V vocabulary, W the vocabulary in whole blocks, R rows of logits at once.

Batches follow from a part's content and the config alone. Only if the device runs out of memory is a batch halved, and
parts that were scored that way are counted.
"""

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retort.cache.codec import NO_ORDER, Codec, Selected, TokenOrder
from retort.cache.entropy_codec import hash_to_uniform
from retort.cache.pieces import cut_pieces
from retort.cli import is_out_of_memory
from retort.models.causal_lm import CausalLM, take_rows
from retort.teacher.batches import Batch, batch_by_length, copy_to, pack_batch, pad_batch
from retort.teacher.selection import NotFiniteError, pad_width, select
from retort.teacher.streams import Queued, SideStreams
from retort.tokens.sequences import SequenceTable

logger = logging.getLogger(__name__)

# Rows of logits at once, by device. On a CPU a product of 64 rows takes a quarter longer per row than one of 128 or
# more; a GPU needs more.
_HEAD_ROWS = {"cpu": 256, "cuda": 2048}


@dataclass
class Scorer:
    """A model that reads sequences in batches, which are halved where memory runs out.

    batch_size, batch_tokens: see `batch_by_length`.
    """

    teacher: CausalLM
    batch_size: int
    batch_tokens: int | None = None
    failed_size: int | None = None  # tokens of a batch, with padding, that ran out of memory

    def batches(self, table: SequenceTable) -> Iterator[Batch]:
        """Yield the batches of a table."""
        return batch_by_length(table, self.batch_size, batch_tokens=self.batch_tokens)

    @torch.inference_mode()
    def read(
        self, batches: Iterable[Batch | None], *, ahead: int = 0
    ) -> Iterator[tuple[Batch, Queued]]:
        """Yield each batch, or in order the pieces of one that is halved, and its features [P, D] at counted positions.

        ahead: batches that are queued before the first is yielded. None among the batches: no other is known for now,
        so all that are queued are yielded. Raises ValueError where memory runs out with a single sequence.
        """
        queued: deque[tuple[Batch, Queued]] = deque()
        for given in batches:
            waiting = [given] if given else []
            while waiting:
                batch = waiting.pop(0)
                if self._is_too_large(batch):
                    waiting[:0] = batch.halve()
                    continue
                features = self._try(batch)
                if features is None and queued:  # with their memory free it may succeed
                    yield from _drain(queued)
                    features = self._try(batch)
                if features is None:
                    waiting[:0] = self._halve(batch)
                    continue
                queued.append((batch, Queued.mark(features)))
                del features
                if len(queued) > ahead:
                    yield queued.popleft()
            if given is None:
                yield from _drain(queued)
        yield from _drain(queued)

    def _is_too_large(self, batch: Batch) -> bool:
        if self.failed_size is None or len(batch.indices) == 1:
            return False
        return batch.padded_size >= self.failed_size

    def _try(self, batch: Batch) -> Tensor | None:
        """Return the features [P, D], or None where memory runs out."""
        try:
            return self._run(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Only here, after the exception is gone, are the activations free that its traceback held.
        free_memory()
        return None

    def _run(self, batch: Batch) -> Tensor:
        device = self.teacher.device
        if self.teacher.packs_sequences:
            inputs = pack_batch(batch.rows, device=device)
        else:
            inputs = pad_batch(batch.rows, device=device, needs_mask=self.teacher.needs_mask)
        features_BTD = self.teacher.features(
            inputs.ids, inputs.attention, position_ids_BT=inputs.positions
        )
        # From the host: a copy from the first GPU of a group would let it wait for the last one.
        return take_rows(features_BTD, copy_to(inputs.counted, features_BTD.device))

    def _halve(self, batch: Batch) -> list[Batch]:
        """Return the halves of a batch for which memory ran out. Raises ValueError if it has one sequence."""
        size = batch.padded_size
        if len(batch.indices) == 1:
            raise ValueError(
                f"out of memory with one sequence of {size:,} tokens: spread the teacher over more GPUs "
                "(teacher.generation.gpus_per_model), use a smaller teacher.dtype, or lower "
                "dataset.max_length (which tokenizes the corpus again)."
            )
        self.failed_size = size
        logger.info(
            f"out of memory with {len(batch.indices)} sequences ({size:,} tokens) at once: such batches are halved "
            "from now on. A lower teacher.generation.batch_size (or batch_tokens) avoids this."
        )
        return batch.halve()


def _drain(queued: deque[Any]) -> Iterator[Any]:
    while queued:
        yield queued.popleft()


def free_memory() -> None:
    """Give what PyTorch keeps for later back to the GPUs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def score_features(
    scorer: Scorer, table: SequenceTable, *, on_batch: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of a sequence, features [P, D] at its counted positions), longest sequences first.

    on_batch: called with the number of tokens of each batch. Raises ValueError as `Scorer.read` does.
    """
    for batch, features in scorer.read(scorer.batches(table)):
        pieces = torch.split(features.values, batch.counts.tolist())
        yield from zip(batch.indices.tolist(), pieces, strict=True)
        on_batch(batch.num_tokens)


class PartTargets:
    """The teacher's distributions on the sequences of one part, in the table's order.

    With a pool, its threads prepare sequences while the teacher reads on; `sequences` waits for them.
    """

    def __init__(
        self, table: SequenceTable, codec: Codec, order: TokenOrder, pool: Executor | None
    ) -> None:
        self.table, self.codec, self.order, self._pool = table, codec, order, pool
        self._found: list[Any] = [None] * len(table)
        self._at_work: list[Future[None]] = []
        self._left = len(table)
        self.is_halved = False  # whether memory ran out

    @property
    def is_complete(self) -> bool:
        """Whether all sequences were added."""
        return self._left == 0

    def add(self, batch: Batch, selected: Selected, *, is_halved: bool = False) -> None:
        """Add a batch of this part's sequences. is_halved: memory ran out for it."""
        assert batch.table is self.table
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(batch.counts)])
        for piece in cut_pieces(batch.counts):
            bounds = offsets[piece.start : piece.stop + 1]
            own = selected[int(bounds[0]) : int(bounds[-1])]
            work = partial(self._prepare, batch.indices[piece], own, bounds - bounds[0])
            if self._pool is None:
                work()
            else:
                self._at_work.append(self._pool.submit(work))
        self._left -= len(batch.indices)
        self.is_halved |= is_halved

    def _prepare(
        self, indices: NDArray[np.int64], selected: Selected, bounds: NDArray[np.int64]
    ) -> None:
        """Prepare sequences of the table, whose positions begin and end at `bounds`."""
        for index, (first, stop) in zip(indices.tolist(), pairwise(bounds.tolist()), strict=True):
            row, piece = self.table[index], selected[first:stop]
            prepared = self.codec.prepare(piece, self.order, next_ids=row.next_ids, key=row.key)
            self._found[index] = prepared

    @property
    def sequences(self) -> list[Any]:
        """What the codec made of each sequence, ready to be encoded. Raises the error of a thread."""
        for future in self._at_work:
            future.result()
        return self._found


@torch.inference_mode()
def select_batches(
    scorer: Scorer, batches: Iterable[Batch | None], codec: Codec, *, num_tokens: int
) -> Iterator[tuple[Batch, Selected, bool]]:
    """Yield (batch, what the codec keeps at all its counted positions, whether memory ran out for it).

    The batches may be of several tables; see `Scorer.read` for None and for pieces. num_tokens: size of the tokenizer;
    ids from there on get probability zero. Raises ValueError naming the position of a logit that is NaN or infinite,
    and as `Scorer.read` does.
    """
    selector = _Selector(scorer.teacher, codec, num_tokens=num_tokens)
    side = SideStreams(selector.devices)
    for batch, features in scorer.read(batches, ahead=scorer.teacher.num_gpus):
        try:
            with side.after(features) as features_PD:
                selected = selector.select(features_PD, _compute_uniform(batch))
        except NotFiniteError as error:
            raise _explain(error, batch) from None
        yield batch, selected, batch.is_halved or selector.is_halved


def score_part(
    scorer: Scorer,
    table: SequenceTable,
    codec: Codec,
    *,
    num_tokens: int,
    order: TokenOrder = NO_ORDER,
    pool: Executor | None = None,
) -> PartTargets:
    """Return the teacher's distributions at every counted position of the table.

    order: `codec.order_tokens`. pool: see `PartTargets`. Otherwise as `select_batches`.
    """
    scored = PartTargets(table, codec, order, pool)
    batches = scorer.batches(table)
    for batch, selected, is_halved in select_batches(scorer, batches, codec, num_tokens=num_tokens):
        scored.add(batch, selected, is_halved=is_halved)
    return scored


def _compute_uniform(batch: Batch) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each counted position, from its sequence's content key and its index in it."""
    rows = [hash_to_uniform(row.key, np.arange(row.num_positions)) for row in batch.rows]
    return np.concatenate(rows)


def _explain(error: NotFiniteError, batch: Batch) -> ValueError:
    """Return the error that names the position of a logit that is NaN or infinite."""
    table = batch.table
    positions = [
        (int(i), t) for i in batch.indices for t in np.flatnonzero(table[int(i)].loss_mask)
    ]
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
        self.devices = set(teacher.devices)
        self.num_rows = _HEAD_ROWS[teacher.device.type]
        self.is_halved = False  # whether memory ran out with so many rows as usual
        self.logits_RW = torch.empty(0)

    def select(self, features_PD: Tensor, uniform_P: NDArray[np.float64]) -> Selected:
        """Return what the codec keeps of all P rows, in order; uniform_P: see `select_probable`.

        Where memory runs out, fewer rows are done at once from then on.
        """
        while (selected := self._try(features_PD, uniform_P)) is None:
            self.logits_RW = torch.empty(0)
            free_memory()
            self.num_rows, self.is_halved = self.num_rows // 2, True
            logger.info(
                f"out of memory in the teacher's head: {self.num_rows} rows at once from now on."
            )
        return selected

    def _try(self, features_PD: Tensor, uniform_P: NDArray[np.float64]) -> Selected | None:
        """Return None where memory runs out with more than one row."""
        try:
            return self._select(features_PD, uniform_P)
        except Exception as error:
            if not is_out_of_memory(error) or self.num_rows == 1:
                raise
        return None

    def _select(self, features_PD: Tensor, uniform_P: NDArray[np.float64]) -> Selected:
        at_once = min(self.num_rows, len(features_PD))
        if len(self.logits_RW) < at_once:
            weight = self.head.weight  # may be on another GPU of the group than the features
            device = features_PD.device if weight is None else weight.device
            shape = (at_once, pad_width(self.width))
            self.logits_RW = torch.empty(shape, dtype=torch.float32, device=device)
        pieces = []
        for start in range(0, len(features_PD), self.num_rows):
            stop = min(start + self.num_rows, len(features_PD))
            logits_RW = self.logits_RW[: stop - start]
            self.head.logits(features_PD[start:stop], out=logits_RW[:, : self.width])
            uniform = uniform_P[start:stop]
            found = select(logits_RW, self.codec, num_tokens=self.num_tokens, uniform_P=uniform)
            pieces.append(found)
        return type(pieces[0]).concatenate(pieces)
