"""Bytes against error: Retort's cache methods beside other caches, on distributions over 32,768 tokens.

    python -m benchmarks.cache [--logits FOLDER] [--distillkit PATH] [--megatron PATH] [--figure FILE.svg]

Retort's rows are what a cache holds: one record for each sequence of 512 tokens, which is what a training step reads,
and the tables of one part of all sequences. Speeds are of one core, in positions per second of processor time: encoding
after selection, decoding to what a batch is made of, and reading sequences in random order out of a file, every check
included. Opponents: `opponents.py`; metrics: `metrics.py`; the distributions: `python -m benchmarks.distributions`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.cache import distillkit, megatron, table
from benchmarks.cache.metrics import Exact, measure, sum_exact
from benchmarks.cache.opponents import run_opponents
from benchmarks.cache.ours import make_codec, measure_ours
from benchmarks.cache.stored import Stored
from benchmarks.common import checkout_of, make_parser
from benchmarks.distributions.build import Distributions, default_folder, load_or_make

TOP_P = (0.02, 0.01, 0.005, 0.003, 0.002, 0.001, 0.0008, 0.0005)
SAMPLED = (0.1, 0.055, 0.05, 0.03, 0.02, 0.01, 0.005)


@dataclass
class Points:
    """(bytes, error) of all rows: KLs of truncations, variances of unbiased methods."""

    kl: table.Curves = field(default_factory=dict)
    variance: table.Curves = field(default_factory=dict)

    def add(self, group: str, row: dict[str, float], *, unbiased: bool) -> None:
        """Add a row to the curve of its group."""
        curves, key = (self.variance, "squared_error") if unbiased else (self.kl, "full_kl")
        curves.setdefault(group, []).append((row["bytes"], row[key]))


def print_ours(data: Distributions, exact: Exact) -> Points:
    """Print Retort's rows; return their points, by method."""
    points = Points()
    for method, thresholds in (("top_p", TOP_P), ("sampled", SAMPLED)):
        for threshold in thresholds:
            ours = measure_ours(data, make_codec(method, threshold, data))
            row = measure(exact, ours.stored)
            print(table.format_row(ours.stored.name, row, ours), flush=True)
            points.add(f"Retort {method}", row, unbiased=ours.stored.unbiased)
    return points


def print_opponents(
    data: Distributions, exact: Exact, *, distillkit: Path | None, megatron: Path | None
) -> tuple[Points, Points]:
    """Print the opponents' rows; return their points, by name and by the group that shares a curve."""
    by_name, by_group = Points(), Points()
    opponents = run_opponents(
        data.logprobs,
        data.unigram_counts,
        distillkit_checkout=distillkit,
        megatron_checkout=megatron,
    )
    for name, result in opponents:
        if not isinstance(result, Stored):
            print(table.format_opponent_not_run(name, str(result)), flush=True)
            continue
        row = measure(exact, result)
        print(table.format_row(name, row), flush=True)
        by_name.add(name, row, unbiased=result.unbiased)
        by_group.add(name if result.unbiased else name_group(name), row, unbiased=result.unbiased)
    return by_name, by_group


def name_group(name: str) -> str:
    """Return the name of the curve that a truncation belongs to."""
    return "top-k, 4 bytes an id" if name.startswith("top-") else name.partition(" ")[0]


def main() -> None:
    """Print the table, the ratios and the temperatures; draw the figure."""
    parser = make_parser("benchmarks.cache", __doc__)
    parser.add_argument(
        "--logits",
        type=Path,
        default=default_folder(),
        help="the distributions, made there if there are none (default: %(default)s)",
    )
    parser.add_argument(
        "--distillkit",
        type=checkout_of(distillkit.REPOSITORY, holds="distillkit/compression"),
        help=f"a checkout of github.com/{distillkit.REPOSITORY}",
    )
    parser.add_argument(
        "--megatron",
        type=checkout_of(megatron.REPOSITORY, holds=megatron.FOLDER),
        help=f"a checkout of github.com/{megatron.REPOSITORY}",
    )
    parser.add_argument("--figure", type=Path, help="where the curves are drawn, as SVG")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    data = load_or_make(flags.logits)
    exact = sum_exact(data.logprobs, data.unigram_counts)
    entropy = -exact.negative_entropy.mean()
    print(f"{len(data.logprobs):,} positions, mean entropy {entropy:.2f} nats")
    print(table.format_heads())
    ours = print_ours(data, exact)
    others, groups = print_opponents(
        data, exact, distillkit=flags.distillkit, megatron=flags.megatron
    )
    print("\nbytes a position at equal error")
    table.print_ratios(ours.kl["Retort top_p"], others.kl, "full KL")
    table.print_ratios(ours.variance["Retort sampled"], others.variance, "variance")
    table.print_temperatures(data)
    if flags.figure:
        table.draw_figure(flags.figure, ours.kl | groups.kl, ours.variance | groups.variance)


if __name__ == "__main__":
    main()
