"""Which cache method, temperature, alpha and learning rate serve best without thought, by size of the student.

    python -m benchmarks.defaults [--out FOLDER] [--teachers stories260K demo] [--steps 200] [--seeds 3] [--table]

Two teachers on held-out documents of their own text: stories260K (../shared/data), and the demo's, which is trained
first. For each, students of two sizes with random weights. The pipeline makes corpora and caches, its own functions
train and measure each student, and every student is a run in FOLDER/results, so a rerun of the command resumes. For
each teacher and size:

    rates    cross-entropy, and 0.1 of it with the teacher's distributions, at five learning rates
    ways     at the latter's best rate: methods, temperatures and alphas; and what the keys' defaults say

each with all seeds. The best rate has the lowest mean over them.

Legend: way: all settings of a student but its seed.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import log, make_parser
from benchmarks.defaults.experiment import CACHES, TEACHERS, Experiment, Found, Way
from benchmarks.quality.table import Mean

STUDENTS = ((32, 3), (64, 2))  # width, layers; the teachers have 64, 5 and 128, 4
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 5e-3)
ALPHAS = (0.0, 0.1, 0.3, 0.5)
Results = dict[Way, Found]


def list_rates(way: Way) -> list[Way]:
    """Return the same settings at all learning rates."""
    return [replace(way, rate=rate) for rate in RATES]


def list_ways(best: Way) -> list[Way]:
    """Return methods, temperatures and alphas at a learning rate, and the keys' defaults; `best` has top_p 0.001."""
    found = [replace(best, temperature=t, alpha=a) for t in (1.0, 2.0) for a in ALPHAS]
    others = [cache for cache in CACHES if cache != best.cache]
    found += [replace(best, cache=cache, alpha=a) for cache in others for a in (0.0, best.alpha)]
    defaults = replace(best, cache="top_k 64", temperature=2.0, alpha=0.5)
    return [*found, defaults, replace(defaults, rate=1e-4)]


def list_seeds(way: Way, results: Results) -> list[Way]:
    """Return the measured students of a way."""
    return [found for found in results if replace(found, seed=0) == way]


def choose_best(ways: list[Way], results: Results) -> Way:
    """Return the one with the lowest mean held-out loss, of those that were measured."""

    def average(way: Way) -> float:
        return float(np.mean([results[own].loss for own in list_seeds(way, results)]))

    return min((way for way in ways if way in results), key=average)


def without_teacher(way: Way) -> Way:
    """Return cross-entropy alone, at the same rate and seed."""
    return replace(way, cache=None, temperature=1.0, alpha=1.0)


def measure_all(experiment: Experiment, ways: list[Way], results: Results, *, is_new: bool) -> None:
    """Train and measure those that are missing; unless `is_new`, find those that are not."""
    for way in ways:
        if way not in results and (found := experiment.measure(way, is_new=is_new)):
            results[way] = found
            if is_new:
                log(
                    f"{way.name}: loss {found.loss:.4f}, KL {found.kl:.4f}, {found.bytes:.1f} bytes"
                )


def compare(experiment: Experiment, first: Way, *, num_seeds: int, is_new: bool) -> None:
    """Make all students of the teacher and size of `first`, unless `is_new` is false, and print their tables."""
    results: Results = {}

    def measure(ways: list[Way]) -> None:
        seeds = [replace(way, seed=seed) for seed in range(num_seeds) for way in ways]
        measure_all(experiment, seeds, results, is_new=is_new)

    text = without_teacher(first)
    measure([*list_rates(text), *list_rates(first)])
    if not results:
        return
    best_text, best = (choose_best(list_rates(way), results) for way in (text, first))
    ways = list_ways(best)
    measure(ways)
    size = f"{results[best].parameters:,} parameters ({first.width} x {first.layers})"
    print(f"\n{first.teacher}, a student of {size}:")
    shown = [*list_rates(text), *list_rates(first), *ways]
    for line in format_table([*dict.fromkeys(shown)], best_text, best, results):
        print(line)


def format_table(ways: list[Way], best_text: Way, best: Way, results: Results) -> Iterator[str]:
    """Yield a line for each way: means over its seeds, and how much lower its loss is than that of two others.

    These are compared seed by seed: cross-entropy, and top_p 0.001 with temperature 1 and alpha 0.1, each at its best
    rate.
    """
    yield (
        f"{'':14}  T alpha      lr  bytes   loss     KL  {'below cross-entropy':>20}  {'below top_p, 1, 0.1':>20}"
        "  seeds"
    )
    for way in ways:
        own = list_seeds(way, results)
        if not own:
            continue
        gains = []
        for other in (best_text, best):
            pairs = [(results.get(replace(other, seed=w.seed)), results[w]) for w in own]
            differences = [base.loss - found.loss for base, found in pairs if base]
            mean = Mean.over(np.array(differences)) if differences else None
            gains.append(
                "-" if mean is None else f"{mean if len(differences) > 1 else mean.value:.3f}"
            )
        loss, kl, size = (
            np.mean([getattr(results[w], name) for w in own]) for name in ("loss", "kl", "bytes")
        )
        yield (
            f"{way.cache or 'cross-entropy':14}{way.temperature:3g}{way.alpha:6g}{way.rate:8g}{size:7.1f}{loss:7.3f}"
            f"{kl:7.3f}  {gains[0]:>20}  {gains[1]:>20}{len(own):7}"
        )


def read_command_line() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = make_parser("benchmarks.defaults", __doc__)
    folder = Path(tempfile.gettempdir()) / "retort-defaults"
    parser.add_argument("--out", type=Path, default=folder, help="folder (default: %(default)s)")
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument(
        "--table", action="store_true", help="train nothing: print the finished students"
    )
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Make what is missing, and print the tables."""
    flags = read_command_line()
    torch.set_num_threads(1)
    experiment = Experiment(flags.out, steps=flags.steps)
    for teacher in flags.teachers:
        first = [
            Way(teacher, *size, rate=1e-3, cache="top_p 0.001", alpha=0.1) for size in STUDENTS
        ]
        if not flags.table:
            if teacher == "demo":
                experiment.make_demo_teacher()
            experiment.prepare([replace(first[0], cache=cache) for cache in CACHES])
        for way in first:
            compare(experiment, way, num_seeds=flags.seeds, is_new=not flags.table)


if __name__ == "__main__":
    main()
