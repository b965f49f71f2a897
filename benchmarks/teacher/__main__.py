"""The teacher's pass beside the bare forward of the same batches, and beside the plain loop that most scripts have.

    python -m benchmarks.teacher [--shape 70m] [--vocabulary 32768] [--device cuda --dtype bfloat16]

Three tables. *Overhead*: a Llama with random weights reads sequences of one length, and what is kept of every
position is selected, coded, written and read back; the opponent is `model(input_ids, attention_mask)` on the same
batches, which keeps nothing. `half counted` counts half the positions, so the head runs on half of them. `plain loop`
is that forward, then `logits.float().log_softmax(-1).topk(64)` and a write of float16. *Lengths*: documents of
log-normal lengths; the opponent is the plain loop over batches in the corpus' order, padded to the longest. *Coding*: a
part without the teacher, from selected tokens to a file that was read back, by one thread and by several.

All ways take turns in one process; a figure is the median over turns of its ratio to the opponent in the same turn. On
a CPU, processor time is counted, which other processes disturb less. The share of the device's speed counts 2 FLOP for
each parameter of a matrix product and token, and attention's products, against the fastest of some square products.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import make_parser
from benchmarks.teacher.coding import print_coding
from retort.cache.codec import Codec, TokenOrder
from retort.cache.methods import build_codec
from retort.cache.parts import write_part
from retort.cache.reader import CacheHeader
from retort.config.sections import Cache
from retort.models.causal_lm import CausalLM, split_model
from retort.teacher.batches import Batch, batch_by_length, pad_batch
from retort.teacher.scoring import Scorer, score_part
from retort.tokens.sequences import SequenceTable, build_table

# hidden, intermediate, layers, heads, key-value heads
SHAPES = {
    "tiny": (32, 64, 2, 4, 2),  # for tests
    "20m": (256, 688, 8, 8, 8),
    "70m": (640, 1728, 10, 10, 10),
    "1b": (2048, 8192, 16, 32, 8),
    "7b": (4096, 14336, 32, 32, 8),
}
METHODS: dict[str, dict[str, Any]] = {
    "top_p": {"method": "top_p", "min_probability": 0.001, "temperatures": (1.0, 2.0)},
    "sampled": {"method": "sampled", "head_probability": 0.05, "temperatures": (1.0,)},
    "top_k": {"method": "top_k", "temperatures": (1.0, 2.0)},
}
Way = Callable[[], object]


def build_teacher(shape: str, vocabulary: int, *, device: str, dtype: torch.dtype) -> CausalLM:
    """Return a Llama with random weights, whose logits vary by 6: 2.1 nats and 36 tokens above 0.001 at 32,768 ids."""
    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=shape != "7b",
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.get_output_embeddings().weight.mul_(300 / hidden**0.5)
    return split_model(model)


def make_table(lengths: list[int], *, vocabulary: int, counted: float = 1.0) -> SequenceTable:
    """Return random sequences; the first positions of each carry no loss where `counted` is below 1."""
    rng = np.random.default_rng(0)
    rows = []
    for document, length in enumerate(lengths):
        ids = (vocabulary ** rng.random(length)).astype(np.int64).tolist()
        prompt = round((1 - counted) * (length - 1))
        mask = [t >= prompt for t in range(length - 1)] + [False]
        rows.append((ids, mask, document, ("", "")))
    return build_table(rows)


@dataclass(frozen=True)
class TeacherPass:
    """A teacher, its sequences, and the codec of the cache: what is measured, and the two opponents."""

    teacher: CausalLM
    table: SequenceTable
    codec: Codec
    order: TokenOrder
    batch_size: int

    @classmethod
    def prepare(
        cls, teacher: CausalLM, table: SequenceTable, method: str, batch_size: int
    ) -> "TeacherPass":
        """Build the codec as the pipeline does."""
        keys = {"top_k": 64, "min_probability": None, "head_probability": None}
        counts = np.bincount(table.ids, minlength=teacher.vocabulary)
        codec = build_codec(
            Cache(**(keys | METHODS[method])), vocabulary=teacher.vocabulary, token_counts=counts
        )
        return cls(teacher, table, codec, codec.order_tokens(counts), batch_size)

    def _read(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        """Yield the model's own logits [B, T, V], with the mask that most scripts give."""
        for batch in batches:
            inputs = pad_batch(batch.rows, device=self.teacher.device)
            ids_BT, attention_BT = inputs.ids, inputs.attention
            yield self.teacher.model(
                input_ids=ids_BT, attention_mask=attention_BT, use_cache=False
            ).logits

    @torch.inference_mode()
    def bare(self) -> None:
        """The model's own forward on our batches."""
        for _ in self._read(batch_by_length(self.table, self.batch_size)):
            pass

    @torch.inference_mode()
    def plain(self) -> None:
        """The loop that most scripts have, in the corpus' order."""
        starts = range(0, len(self.table), self.batch_size)
        order = np.arange(len(self.table))
        batches = (Batch(self.table, order[s : s + self.batch_size]) for s in starts)
        with tempfile.TemporaryFile() as file:
            for logits_BTV in self._read(batches):
                top = logits_BTV.float().log_softmax(dim=-1).topk(64, dim=-1)
                file.write(top.values.half().cpu().numpy().tobytes())
                file.write(top.indices.int().cpu().numpy().tobytes())

    def ours(self) -> None:
        """Select, code, write, read back."""
        scorer = Scorer(self.teacher, self.batch_size)
        width = self.teacher.vocabulary
        scored = score_part(scorer, self.table, self.codec, num_tokens=width, order=self.order)
        header = CacheHeader("teacher", "tokenizer", "tokens", self.codec)
        with tempfile.TemporaryDirectory() as folder:
            write_part(Path(folder) / "part.h5", self.table, scored.sequences, header, self.order)


def measure(way: Way, device: str) -> float:
    """Return the seconds that a way takes: the processor's on a CPU, the clock's on a GPU."""
    if device == "cpu":
        started = time.process_time()
        way()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    way()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(ours: Way, opponent: Way, *, device: str, turns: int) -> tuple[list[float], float]:
    """Return the ratio of our time to the opponent's in every turn, and our median seconds."""
    ours()  # numba compiles, memory grows
    ratios, seconds = [], []
    for _ in range(turns):
        theirs = measure(opponent, device)
        seconds.append(measure(ours, device))
        ratios.append(seconds[-1] / theirs)
    return ratios, statistics.median(seconds)


def measure_matmul(device: str, dtype: torch.dtype) -> float:
    """Return the FLOP a second of the fastest of some square products."""
    best = 0.0
    for size in (1024, 2048) if device == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        way = partial(torch.mm, a, b, out=out)
        way()
        best = max(best, *(2 * size**3 / measure(way, device) for _ in range(5)))
    return best


def count_flop(teacher_pass: TeacherPass) -> float:
    """Return the FLOP of the products that reading the table takes: weights, attention, the head where it counts."""
    config = teacher_pass.teacher.model.config
    width, layers = config.hidden_size, config.num_hidden_layers
    head = teacher_pass.teacher.vocabulary * width
    body = teacher_pass.teacher.num_parameters - head * (1 if config.tie_word_embeddings else 2)
    lengths = teacher_pass.table.lengths.astype(np.float64)
    attention = 2 * 2 * layers * width * float((lengths**2).sum()) / 2  # a causal mask halves it
    counted = teacher_pass.table.num_positions
    return float(2 * body * lengths.sum() + attention + 2 * head * counted)


def measure_memory(way: Way) -> str:
    """Return the most memory that a way takes on a GPU, weights included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    way()
    return f"{torch.cuda.max_memory_allocated() / 2**30:8.1f} GiB"


def print_overhead(flags: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print the first table."""
    device = flags.device
    teacher = build_teacher(flags.shape, flags.vocabulary, device=device, dtype=dtype)
    peak = measure_matmul(device, dtype)
    lengths = [flags.length + 1] * flags.sequences
    print(
        f"{flags.shape} Llama, {teacher.num_parameters / 1e6:,.0f} million parameters, {flags.vocabulary:,} "
        f"ids, {flags.sequences} x {flags.length} positions, batches of {flags.batch_size}, "
        f"{device}, {dtype}"
    )
    print(f"{'':24s}{'of bare forward':>16s}{'turns':>18s}{'tokens/s':>12s}{'of matmul':>11s}")
    rows: list[tuple[str, str, float]] = [(m, m, 1.0) for m in METHODS]
    rows += [("top_p, half counted", "top_p", 0.5), ("plain loop, top-64", "plain", 1.0)]
    for name, method, counted in rows:
        table = make_table(lengths, vocabulary=flags.vocabulary, counted=counted)
        teacher_pass = TeacherPass.prepare(
            teacher, table, "top_k" if method == "plain" else method, flags.batch_size
        )
        way = teacher_pass.plain if method == "plain" else teacher_pass.ours
        memory = measure_memory(way) if device == "cuda" else ""
        ratios, seconds = compare(way, teacher_pass.bare, device=device, turns=flags.turns)
        speed, share = len(table.ids) / seconds, count_flop(teacher_pass) / seconds / peak
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(
            f"{name:24s}{statistics.median(ratios):16.2f}{spread:>18s}{speed:12,.0f}{share:11.1%}{memory}",
            flush=True,
        )


def print_lengths(flags: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print the second table."""
    vocabulary = 8192
    teacher = build_teacher("20m", vocabulary, device=flags.device, dtype=dtype)
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(5.4, 1.0, flags.documents), 8, 2048).astype(int).tolist()
    table = make_table(lengths, vocabulary=vocabulary)
    teacher_pass = TeacherPass.prepare(teacher, table, "top_p", 8)
    ratios, seconds = compare(
        teacher_pass.ours, teacher_pass.plain, device=flags.device, turns=max(1, flags.turns // 2)
    )
    faster = sorted(1 / ratio for ratio in ratios)
    batches = list(batch_by_length(table, 8))
    padded = sum(batch.padded_size for batch in batches)
    order = [table.lengths[s : s + 8] for s in range(0, len(table), 8)]
    plain = sum(len(b) * int(b.max()) for b in order)
    print(
        f"\n{flags.documents} documents of log-normal lengths, {len(table.ids):,} tokens (mean "
        f"{np.mean(lengths):.0f}), 20m Llama, {vocabulary:,} ids, batches of 8"
    )
    print(
        f"real tokens/s: {statistics.median(faster):.2f} times the plain loop's ({faster[0]:.2f}-{faster[-1]:.2f}), "
        f"{len(table.ids) / seconds:,.0f} a second; padding: {1 - len(table.ids) / padded:.1%} of our tokens, "
        f"{1 - len(table.ids) / plain:.1%} of the plain loop's"
    )


def main() -> None:
    """Measure and print."""
    parser = make_parser("benchmarks.teacher", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="70m")
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--length", type=int, default=512, help="positions in a sequence")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--documents", type=int, default=300, help="of the second table; 0: none")
    parser.add_argument(
        "--threads", type=int, nargs="*", default=[2], help="of the third table; none: none"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU on this machine")
    dtype: torch.dtype = getattr(torch, flags.dtype)
    print_overhead(flags, dtype)
    if flags.documents:
        print_lengths(flags, dtype)
    if flags.threads:
        table = make_table(
            [flags.length + 1] * max(flags.sequences, 16), vocabulary=flags.vocabulary
        )
        print_coding(table, flags.vocabulary, threads=flags.threads, turns=flags.turns)


if __name__ == "__main__":
    main()
