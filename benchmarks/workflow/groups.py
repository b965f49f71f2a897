"""How well workers share the teacher's pass: from one GPU group to eight, and fast groups beside slow ones.

    python -m benchmarks.workflow.groups [--parts 480] [--seconds 120]

The work is simulated: the teacher's forward pass sleeps in proportion to its tokens, so two cores are enough for eight
groups. All else is real: processes, leases of simulated GPU ids, the worker's loop, claims, parts written and read
back. Time runs from when all processes have started (eight groups on a cluster import as fast as one) to when the last
one has ended. *efficiency*: time(1 group) / (groups * time). *idle*: from a fast worker's last part to the end, as a
share of the whole.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import make_parser
from retort.cache.parts import part_path
from retort.cache.reader import CacheHeader
from retort.cache.top_k_codec import TopKCodec
from retort.cluster.leases import lease
from retort.io.fingerprints import TokenizerIdentity
from retort.models.causal_lm import CausalLM, RowBounds
from retort.models.heads import Head
from retort.teacher.scoring import Scorer
from retort.teacher.worker import run_worker
from retort.tokens.index import TokenIndex
from retort.tokens.indexing import write_index
from retort.tokens.sequences import SequenceTable, build_table
from retort.tokens.shards import write_token_shard

VOCABULARY = 64
SEQUENCES = 8  # in a part
HEADER = CacheHeader("0" * 12, "0" * 12, "0" * 12, TopKCodec((1.0,), VOCABULARY, 8))


@dataclass(frozen=True)
class SleepingTeacher(CausalLM):
    """A teacher whose forward pass sleeps for each token."""

    seconds_per_token: float = 0.0

    def features(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None,
        *,
        position_ids_BT: Tensor | None = None,
        bounds: RowBounds | None = None,
    ) -> Tensor:
        """Return the same hidden states for every token, after the sleep."""
        num_tokens = (
            input_ids_BT.numel() if attention_mask_BT is None else int(attention_mask_BT.sum())
        )
        time.sleep(self.seconds_per_token * num_tokens)
        return torch.ones((*input_ids_BT.shape, 4))


def load(seconds_per_token: float) -> SleepingTeacher:
    """Return a teacher of that speed."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    weight_VD = torch.randn((VOCABULARY, 4), generator=torch.Generator().manual_seed(0))
    return SleepingTeacher(
        LlamaForCausalLM(config),
        Head(weight_VD),
        VOCABULARY,
        is_split=True,
        seconds_per_token=seconds_per_token,
    )


def make_table(num_documents: int) -> SequenceTable:
    """Return documents of one sequence of 16 to 64 random tokens."""
    rng = np.random.default_rng(0)
    rows = []
    for document in range(num_documents):
        length = int(rng.integers(16, 65))
        mask = [t < length - 1 for t in range(length)]
        rows.append((rng.integers(0, VOCABULARY, length).tolist(), mask, document, ("", "")))
    return build_table(rows)


def work(
    folder: Path,
    worker: int,
    groups: list[list[str]],
    seconds_per_token: float,
    start: Barrier,
    results: Any,
) -> None:
    """Run one worker, in its own process; put (worker, end of its last part, end, parts) into `results`."""
    torch.set_num_threads(1)
    index = TokenIndex.read(folder / "index.json")
    teacher = load(seconds_per_token)
    start.wait()
    parts = folder / "parts"
    with lease([*groups[worker:], *groups[:worker]], folder=folder):
        report = run_worker(
            index,
            parts,
            HEADER,
            worker=worker,
            num_workers=len(groups),
            open_scorer=lambda: Scorer(teacher, SEQUENCES),
        )
    written = [part_path(parts, name, HEADER).stat().st_mtime for name in report.parts]
    results.put((worker, max(written, default=0.0), time.time(), len(report.parts)))


def measure(
    groups: list[list[str]], slowness: list[float], *, parts: int, seconds: float
) -> tuple[float, list[float], list[int]]:
    """Run one pass; return its seconds, every worker's idle seconds at the end, and every worker's parts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["retort.teacher.worker"])
    with tempfile.TemporaryDirectory(prefix="retort-groups-") as name:
        folder = Path(name)
        table = make_table(parts * SEQUENCES)
        counts = {"documents": {"read": parts * SEQUENCES + 1}}
        tokenizer = TokenizerIdentity(fingerprint="0" * 12, size=VOCABULARY)
        tables = {"train": table, "val": make_table(1)}
        write_token_shard(folder / "shard_00000.h5", tables, counts=counts, tokenizer=tokenizer)
        write_index(
            folder / "index.json", [folder / "shard_00000.h5"], streaming_chunk_size=SEQUENCES
        )
        start, results = context.Barrier(len(groups) + 1), context.Queue()
        per_token = seconds / len(table.ids)
        workers = [
            context.Process(target=work, args=(folder, w, groups, per_token * slow, start, results))
            for w, slow in enumerate(slowness)
        ]
        for worker in workers:
            worker.start()
        start.wait()
        began = time.monotonic()
        found = sorted(results.get() for _ in workers)
        for worker in workers:
            worker.join()
    end = max(ended for _, _, ended, _ in found)
    return end - began, [end - last for _, last, _, _ in found], [done for *_, done in found]


def main() -> None:
    """Print both tables."""
    parser = make_parser("benchmarks.workflow.groups", __doc__)
    parser.add_argument("--parts", type=int, default=480, help="default: 480")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="that one group sleeps in all; default: 120"
    )
    parser.add_argument(
        "--groups",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="numbers of groups; the first must be 1",
    )
    flags = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print(f"{flags.parts} parts, {flags.seconds:.0f} s of simulated work")
    print(f"\n{'groups':>6} {'seconds':>8} {'efficiency':>11} {'idle at the end':>16}")
    alone = 0.0
    for number in flags.groups:
        groups = [[str(gpu)] for gpu in range(number)]
        took, idle, _ = measure(groups, [1.0] * number, parts=flags.parts, seconds=flags.seconds)
        alone = alone or took
        share = statistics.mean(idle) / took
        print(f"{number:>6} {took:>8.2f} {alone / number / took:>11.1%} {share:>16.1%}", flush=True)
    groups = [["0"], ["1"], ["2"], ["3"], ["4", "5"], ["6", "7"], ["8", "9", "10"], ["11"]]
    slowness = [1.0, 3.0] * 4
    took, idle, done = measure(groups, slowness, parts=flags.parts, seconds=flags.seconds)
    ideal = flags.seconds / sum(1 / slow for slow in slowness)
    fast = statistics.mean(idle[::2]) / took
    print("\n4 fast groups and 4 of a third of their speed, of 1, 2 and 3 GPUs")
    print(f"seconds {took:.2f} (at best {ideal:.2f}), parts fast {done[::2]}, slow {done[1::2]}")
    print(f"idle time of the fast ones at the end: {fast:.1%} of the whole")


if __name__ == "__main__":
    main()
