"""Bytes against error: Retort's three cache methods beside other caches, on real distributions of 32,768 tokens.

    make benchmark-cache
    python benchmarks/cache.py [--logits FOLDER] [--distillkit PATH] [--megatron PATH] [--figure FILE.svg]

Retort's rows are what a cache holds: one record for each sequence of 512 tokens, which is what a training step reads,
and the tables of one part of all sequences. Speeds are of one core, in positions per second of processor time: encoding
after selection, decoding to what a batch is made of, and reading sequences in random order out of a file, every check
included. Opponents and metrics: `cache_opponents.py`.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache_logits
import matplotlib
import numpy as np
import torch
from cache_opponents import (
    Stored,
    format_row,
    measure,
    run_opponents,
    sum_exact,
)
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from retort.cache import CacheHeader, LogitCache
from retort.codec import (
    Codec,
    SparseTargets,
    TokenOrder,
    build_codec,
)
from retort.config_schema import fill_defaults, section_schema
from retort.config_sections import build_section
from retort.entropy import build_lookup, unpack_tables
from retort.parts import write_part
from retort.selection import select_probable
from retort.sparse_codec import decode_streams, draw_uniform, encode_streams, to_streams
from retort.sparse_streams import Streams, count_contexts
from retort.tokens import SequenceTable, build_table

TOP_P = (0.02, 0.01, 0.005, 0.003, 0.002, 0.001, 0.0008, 0.0005)
SAMPLED = (0.1, 0.055, 0.05, 0.03, 0.02, 0.01, 0.005)
_REPEATS = 40


@dataclass(frozen=True)
class Ours:
    """One of Retort's rows: what was stored, and how fast."""

    stored: Stored
    table_bytes: float  # of bytes_per_position
    encoded_per_second: float
    decoded_per_second: float
    read_per_second: float


def fastest(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `work` returns, and the fewest seconds of processor time that it took."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.process_time()
        found = work()
        seconds.append(time.process_time() - started)
    return found, min(seconds)


def find_codec(
    method: str,
    dial: float,
    given: cache_logits.Distributions,
    temperatures: tuple[float, ...] = (1.0,),
) -> Codec:
    """Return the codec of a config's `cache` section."""
    key = "min_probability" if method == "top_p" else "head_probability"
    values = {"method": method, key: dial, "temperatures": list(temperatures)}
    cache = build_section("cache", fill_defaults(values, section_schema("cache")))
    vocabulary = given.logprobs.shape[1]
    return build_codec(cache, vocabulary=vocabulary, token_counts=given.unigram_counts)


def select_all(
    given: cache_logits.Distributions, codec: Codec
) -> tuple[SequenceTable, TokenOrder, Callable[[], list[Streams]]]:
    """Return the sequences, the order of their tokens, and what makes their streams."""
    length = given.tokens.shape[1]
    order = TokenOrder.from_counts(given.unigram_counts, vocabulary=codec.vocabulary)
    next_ids = given.next_tokens.astype(np.int64).reshape(-1, length)
    texts = [
        [*ids, following[-1]]
        for ids, following in zip(given.tokens.tolist(), next_ids.tolist(), strict=True)
    ]
    mask = [True] * length + [False]
    table = build_table([(text, mask, i, ("", "")) for i, text in enumerate(texts)])
    keys = [table[i].key for i in range(len(table))]
    selections = [
        select_probable(
            torch.from_numpy(np.array(given.logprobs[i * length : (i + 1) * length])),
            codec,
            num_tokens=codec.vocabulary,
            uniform_P=draw_uniform(keys[i], np.arange(length)),
        )
        for i in range(len(keys))
    ]

    def code() -> list[Streams]:
        return [
            to_streams(s, codec, order, next_ids=n, key=k)
            for s, n, k in zip(selections, next_ids, keys, strict=True)
        ]

    return table, order, code


def run_ours(given: cache_logits.Distributions, codec: Codec) -> Ours:
    """Encode and decode all positions."""
    next_ids = given.next_tokens.astype(np.int64).reshape(-1, given.tokens.shape[1])
    table, order, code = select_all(given, codec)
    (records, packed), encoding = fastest(lambda: encode_streams(code(), codec))
    tables = unpack_tables(packed, num_contexts=count_contexts(len(codec.temperatures)))
    lookup = build_lookup(tables)

    def decode() -> Iterator[SparseTargets]:
        for record, ids in zip(records, next_ids, strict=True):
            yield decode_streams(record, codec, order, lookup, next_ids=ids)

    decoded = list(decode())
    _, decoding = fastest(lambda: sum(map(len, decode())))  # each is dropped, as a trainer does
    header = CacheHeader("0" * 12, "0" * 12, "0" * 12, codec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.h5"
        write_part(path, table, code(), header, order)
        reading = time_reading(LogitCache(path))
    num_positions = len(given.logprobs)
    size = sum(map(len, records)) + len(packed)
    stored = to_stored(decoded, codec, size / num_positions)
    return Ours(
        stored,
        len(packed) / num_positions,
        num_positions / encoding,
        num_positions / decoding,
        num_positions / reading,
    )


def time_reading(cache: LogitCache) -> float:
    """Return the seconds that it takes to read every sequence in random order, all checks included."""
    order = np.random.default_rng(0).permutation(len(cache)).tolist()
    return fastest(lambda: [len(cache.read_targets(i)) for i in order])[1]


def to_stored(decoded: list[SparseTargets], codec: Codec, bytes_per_position: float) -> Stored:
    """Return decoded sequences as the metrics take them: -1 where a position keeps fewer."""
    joined = SparseTargets.concatenate(decoded)
    ids, logprobs = joined.to_rows()
    ids[np.isneginf(logprobs)] = -1
    is_drawn = codec.method == "sampled"
    tails = None if is_drawn else joined.tail_logprobs[:, 0]
    name = f"Retort {codec.method} {codec.min_probability:g}"
    return Stored(name, bytes_per_position, ids, logprobs, tails, unbiased=is_drawn)


Curves = dict[str, list[tuple[float, float]]]


def draw_figure(path: Path, kl: Curves, error: Curves) -> None:
    """Draw bytes against error: truncations by their KL, unbiased methods by their variance."""
    matplotlib.rcParams.update({"svg.hashsalt": "retort", "font.size": 9})
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels = (
        "KL(teacher || stored), nats, tail by frequency",
        "variance: mean squared error, summed over ids",
    )
    for panel, curves, label in zip(panels, (kl, error), labels, strict=True):
        for (name, points), marker in zip(curves.items(), "os^Dvx*", strict=False):
            style = "-" if name.startswith("Retort") else "none"
            xs, ys = zip(*sorted(points), strict=True)
            panel.plot(xs, ys, marker=marker, linestyle=style, label=name)
        panel.set(xscale="log", yscale="log", xlabel="bytes per position", title=label)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def print_row(name: str, row: dict[str, float] | None, ours: Ours | None = None) -> None:
    """Print a line of the table."""
    speeds = (
        f"{ours.encoded_per_second / 1e6:>8.2f}{ours.decoded_per_second / 1e6:>8.2f}"
        f"{ours.read_per_second / 1e6:>8.2f}"
        if ours
        else ""
    )
    print(format_row(name, row) + speeds, flush=True)


def print_temperatures(given: cache_logits.Distributions) -> None:
    """Print what other temperatures cost, and why draws serve one only."""
    print("\nbytes a position of top_p 0.003 with the tail at temperatures")
    for temperatures in ((1.0,), (1.0, 2.0), (1.0, 2.0, 4.0)):
        found = run_ours(given, find_codec("top_p", 0.003, given, temperatures)).stored
        names = ", ".join(f"{t:g}" for t in temperatures)
        print(f"  {names:10} {found.bytes_per_position:.1f} (top_k: 4 each before zstd)")
    dial = 0.05
    logprobs_PV = torch.from_numpy(np.array(given.logprobs[:2048]))
    is_tail_PV = logprobs_PV < math.log(dial)
    drawn_PV = torch.where(is_tail_PV, logprobs_PV, -torch.inf).softmax(dim=-1).nan_to_num()
    for temperature in (1.0, 2.0):
        probs_PV = (logprobs_PV / temperature).softmax(dim=-1)
        tail_PV = torch.where(is_tail_PV, probs_PV, 0.0)
        mass_P1 = tail_PV.sum(dim=-1, keepdim=True)
        bias = (mass_P1 * drawn_PV - tail_PV).abs().sum(dim=-1).mean() / 2
        print(
            f"  sampled {dial:g} at temperature {temperature:g}: the tail holds {mass_P1.mean():.2f}; draws "
            f"made at 1, used at {temperature:g}, put {bias:.3f} of the mass on other tokens"
        )


def print_ratios(ours: list[tuple[float, float]], others: Curves, error: str) -> None:
    """Print what Retort takes for each opponent's error, between its own settings by a power law."""
    sizes, errors = map(np.log, zip(*sorted(ours), strict=True))
    for name, points in others.items():
        for size, theirs in points:
            if not math.exp(errors.min()) <= theirs <= math.exp(errors.max()):
                continue
            mine = math.exp(np.interp(-math.log(theirs), -errors, sizes))
            print(
                f"  {name:36} {error} {theirs:.2e}: {size:6.1f} B, Retort {mine:5.1f} B ({size / mine:.1f}x)"
            )


def run(flags: argparse.Namespace, given: cache_logits.Distributions) -> None:
    """Print the table; draw the figure."""
    counts: NDArray[np.int64] = given.unigram_counts
    exact = sum_exact(given.logprobs, counts)
    entropy = -exact.negative_entropy.mean()
    print(f"{len(given.logprobs):,} positions, mean entropy {entropy:.2f} nats")
    heads = [
        "bytes",
        "ids",
        "head KL",
        "shape KL",
        "full KL",
        "sq. error",
        "sum > 1",
        "enc M/s",
        "dec M/s",
        "read",
    ]
    widths = (8, 7, 10, 10, 10, 10, 9, 8, 8, 8)
    print(" " * 36 + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True)))
    kl: Curves = {}
    error: Curves = {}
    named: dict[str, Curves] = {"full_kl": {}, "squared_error": {}}
    for method, dials in (("top_p", TOP_P), ("sampled", SAMPLED)):
        for dial in dials:
            ours = run_ours(given, find_codec(method, dial, given))
            row = measure(exact, ours.stored)
            print_row(ours.stored.name, row, ours)
            curve, key = (kl, "full_kl") if method == "top_p" else (error, "squared_error")
            curve.setdefault(f"Retort {method}", []).append((row["bytes"], row[key]))
    others = run_opponents(
        given.logprobs, counts, distillkit=flags.distillkit, megatron=flags.megatron
    )
    for name, stored in others:
        row = measure(exact, stored) if stored else None
        print_row(name, row)
        if row and stored:
            key = "squared_error" if stored.unbiased else "full_kl"
            named[key][name] = [(row["bytes"], row[key])]
        if row and stored and stored.unbiased:
            error.setdefault(name, []).append((row["bytes"], row["squared_error"]))
        elif row:
            group = "DistillKit" if "DistillKit" in name else name.partition(" ")[0]
            group = "top-k, 4 bytes an id" if group.startswith("top-") else group
            kl.setdefault(group, []).append((row["bytes"], row["full_kl"]))
    print("\nbytes a position at equal error")
    print_ratios(kl["Retort top_p"], named["full_kl"], "full KL")
    print_ratios(error["Retort sampled"], named["squared_error"], "variance")
    print_temperatures(given)
    if flags.figure:
        draw_figure(flags.figure, kl, error)


def main() -> None:
    """Make the distributions where there are none, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--logits", type=Path, default=cache_logits.default_folder())
    parser.add_argument(
        "--distillkit", type=Path, help="a checkout of github.com/arcee-ai/DistillKit"
    )
    parser.add_argument("--megatron", type=Path, help="a checkout of github.com/NVIDIA/Megatron-LM")
    parser.add_argument("--figure", type=Path, help="where the curve is drawn, as SVG")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    is_there = (flags.logits / "settings.json").exists()
    run(
        flags,
        cache_logits.load(flags.logits)
        if is_there
        else cache_logits.ensure(flags.logits, cache_logits.Settings()),
    )


if __name__ == "__main__":
    main()
