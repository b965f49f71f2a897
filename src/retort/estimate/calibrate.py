"""What a teacher reads in a second on the device at hand, and what it and its distributions take, from some seconds.

On a CPU the time is that of its cores, as if nothing else used them.
"""

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from retort.cache.codec import Codec, TokenOrder
from retort.cache.cost import SampledBytes
from retort.config.sections import Config
from retort.estimate.cache_bytes import bytes_of_records, choose_sequences
from retort.models.causal_lm import CausalLM
from retort.models.load import load_teacher, read_peak_memory
from retort.teacher.scoring import Scorer, score_part
from retort.tokens.sequences import SequenceTable, concatenate_tables

_SAMPLED_POSITIONS = 16_384
SECONDS = 12.0  # of work that is timed, at most a batch or step more


def choose_clock(threads: int) -> Callable[[], float]:
    """Return a clock: of a GPU's work that of the wall, of a CPU's the time of its threads divided by their number."""
    if torch.cuda.is_available():

        def read() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return read
    return lambda: time.process_time() / threads


@dataclass(frozen=True)
class TeacherSample:
    """What a teacher did with some sequences: their tokens and the seconds, and the bytes of its distributions.

    start_seconds: that it takes once, to load and to warm up. peak_memory: bytes of this process (`read_peak_memory`);
    held: bytes of what is kept of a position until its part is written.
    """

    tokens: int
    seconds: float
    start_seconds: float
    peak_memory: int
    held: float
    bytes: SampledBytes


def sample_teacher(
    path: str, config: Config, table: SequenceTable, codec: Codec, *, num_tokens: int
) -> TeacherSample:
    """Let the teacher read some sequences of a table as a worker does, and encode what it says.

    The longest sequences are read first, and timed alone: they take the most memory.
    """
    torch.set_num_threads(config.teacher.generation.cpu_threads)
    clock = choose_clock(torch.get_num_threads())
    started = clock()
    teacher = load_teacher(path, config.teacher)
    counts = np.bincount(table.ids, minlength=codec.vocabulary)[: codec.vocabulary]
    order = TokenOrder.from_counts(counts, vocabulary=codec.vocabulary)
    size = config.teacher.generation.batch_size
    longest = np.sort(np.argsort(-table.lengths, kind="stable")[:size])
    first = concatenate_tables(table.slice(i, i + 1) for i in longest.tolist())
    _score(teacher, first, codec, order, num_tokens, size)  # compiles what is compiled once
    ready = clock()
    again = _score(teacher, first, codec, order, num_tokens, size)[0]
    rate = again / max(1, first.num_positions)
    most = min(_SAMPLED_POSITIONS, max(512, int(SECONDS / max(rate, 1e-9))))
    chosen = choose_sequences(table, num_positions=most)
    sample = concatenate_tables(table.slice(i, i + 1) for i in chosen.tolist())
    seconds, scored, records, tables = _score(teacher, sample, codec, order, num_tokens, size)
    positions = np.diff(sample.position_offsets)
    return TeacherSample(
        tokens=len(sample.ids),
        seconds=seconds,
        start_seconds=max(0.0, ready - started - again),
        peak_memory=read_peak_memory(teacher.device),
        held=len(pickle.dumps(scored)) / max(1, sample.num_positions),
        bytes=bytes_of_records(records, tables, positions.tolist()),
    )


def _score(
    teacher: CausalLM,
    table: SequenceTable,
    codec: Codec,
    order: TokenOrder,
    num_tokens: int,
    batch_size: int,
) -> tuple[float, list[Any], list[bytes], bytes]:
    clock = choose_clock(torch.get_num_threads())
    started = clock()
    scored = score_part(
        Scorer(teacher, batch_size), table, codec, num_tokens=num_tokens, order=order
    )
    records, tables = codec.encode(scored.sequences)
    return clock() - started, scored.sequences, records, tables
