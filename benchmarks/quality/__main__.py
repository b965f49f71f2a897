"""Quality for bytes: students trained from 14 to 256 bytes a position, beside the whole distribution and none.

    make benchmark-quality
    python benchmarks/quality.py [--out FOLDER] [--seeds 5] [--steps 300] [--figure FILE.svg] [--quick]

The teacher is that of the cache benchmark (`cache_logits.py`: 32,768 ids), scored on one run of 512 tokens of each of
232 held-out documents (15 GB); students train on 208 of them and are measured on the other 24. At one seed all ways
have the same first weights and the same batches; they differ in what the student is told of the teacher alone:

    CE               nothing: cross-entropy with the text's own tokens
    FullKD           all 32,768 probabilities, KL(teacher || student)
    Retort           what its cache gives back, coded and decoded; kept tokens and one bucket for the tail
    RS-KD            50 draws with replacement, c / 50 each (arXiv 2503.16870), 3 bytes for each different id
    top-k            the k most probable, scaled to sum to one as is common; 4 bytes an id

All but CE train on the teacher alone (alpha = 0), at temperature 1. A finished student is a line of results.jsonl: a
run that was stopped goes on where it was, and `--table` prints what there is.

Legend: P positions, T those of a sequence, C those of a chunk, V vocabulary, D width of the student.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path

import cache_logits
import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray
from quality_students import Bench, Plan, compute_gradient, evaluate, train_student
from quality_ways import MAKERS
from torch.nn import functional as F

WAYS = ("CE", "FullKD", *MAKERS)
STATES = ("half", "end")  # of FullKD's training: gradients are compared there
# Student's t: how many standard errors the 95 % interval of a mean of n values reaches, by n - 1.
T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# 232 + 16 of the 251 held-out documents that are long enough: no two sequences are of one document.
PLAN = Plan(cache_logits.Settings(num_sequences=232, held_out_of=12))
QUICK = Plan(cache_logits.Settings(**cache_logits.QUICK), steps=12, num_evaluated=4, num_angle=2)


def measure_angles(bench: Bench, state: str) -> dict[str, float]:
    """Return each way's angle to FullKD's gradient, degrees, at the weights of FullKD's student of seed 0."""
    if (state, 0) in bench.results or not bench.state_path(state).exists():
        return bench.results.get((state, 0), {})
    model = bench.build_student(seed=0)
    model.load_state_dict(torch.load(bench.state_path(state)))
    exact = compute_gradient(bench, model, "FullKD").double()
    angles = {"FullKD": 0.0}
    for way in (w for w in WAYS if w != "FullKD"):
        gradient = compute_gradient(bench, model, way).double()
        cosine = F.cosine_similarity(gradient, exact, dim=0).item()
        angles[way] = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    bench.add(state, 0, angles)
    return angles


def run_students(bench: Bench, num_seeds: int) -> None:
    """Train and measure every student that is missing: all ways of a seed, then the next seed."""
    everything = [(way, seed) for seed in range(num_seeds) for way in WAYS]
    missing = [entry for entry in everything if entry not in bench.results]
    started = time.time()
    for done, (way, seed) in enumerate(missing, 1):
        begun = time.time()
        found = evaluate(bench, train_student(bench, way, seed=seed))
        bench.add(way, seed, found)
        left = (time.time() - started) / done * (len(missing) - done)
        print(
            f"seed {seed}, {way}: loss {found['loss']:.4f}, KL {found['kl']:.4f}, {time.time() - begun:.0f} s; "
            f"{done} of {len(missing)} done, {left / 60:.0f} minutes left",
            flush=True,
        )


# --- table ---


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over seeds, and how far its 95 % interval (Student's t) reaches to either side; nan of one seed."""

    value: float
    reach: float

    @classmethod
    def over(cls, values: NDArray[np.float64]) -> "Mean":
        """Return that of independent values."""
        if len(values) == 1:
            return cls(float(values[0]), math.nan)
        error = float(values.std(ddof=1)) / math.sqrt(len(values))
        return cls(float(values.mean()), T_975[len(values) - 1] * error)

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} +- {self.reach:{spec}}"


def compute_gain(bench: Bench, way: str, seeds: list[int], metric: str) -> NDArray[np.float64]:
    """Return by how much a way's students are better than CE's of the same seed."""
    found = bench.results
    return np.array([found["CE", s][metric] - found[way, s][metric] for s in seeds])


HEADS = ("bytes", "loss", "above FullKD", "share of gain", "KL", "share of its gain")
WIDTHS = (8, 8, 17, 18, 8, 19, 7, 8, 7, 7, 7)
Points = dict[str, tuple[float, Mean]]


def print_table(bench: Bench, num_seeds: int) -> Points:
    """Print a line a way; return bytes and share of the gain of those that store something."""

    def print_line(name: str, cells: list[str]) -> None:
        line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
        print(f"{name:22}{line}")

    angles = [measure_angles(bench, state) for state in STATES]
    print_line("", [*HEADS, "ECE", "accept", *STATES, "seeds"])
    points: Points = {}
    for way in WAYS:
        done = [{seed for w, seed in bench.results if w == name} for name in ("CE", "FullKD", way)]
        seeds = sorted(set.intersection(*done) & set(range(num_seeds)))
        if not seeds:
            continue
        rows = [bench.results[way, seed] for seed in seeds]
        mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        targets = bench.load_targets(way)
        gains = {m: compute_gain(bench, way, seeds, m) for m in ("loss", "kl")}
        exact = {m: compute_gain(bench, "FullKD", seeds, m) for m in ("loss", "kl")}
        above = Mean.over(exact["loss"] - gains["loss"])
        shares = [Mean.over(gains[m] / exact[m]) for m in ("loss", "kl")]
        size = targets.bytes_per_position if targets else math.nan
        if targets:
            points[way] = (size, shares[0])
        cells = [
            f"{size:.1f}" if targets else "-",
            f"{mean['loss']:.3f}",
            f"{above:.3f}",
            f"{shares[0]:.1%}",
            f"{mean['kl']:.3f}",
            f"{shares[1]:.1%}",
            f"{mean['ece']:.1%}",
            f"{mean['acceptance']:.1%}",
            *(f"{a.get(way, math.nan):.1f}" for a in angles),
            f"{len(rows)}",
        ]
        print_line(way, cells)
    return points


def draw_figure(path: Path, points: Points) -> None:
    """Draw the share of the gain over bytes a position."""
    matplotlib.rcParams.update({"svg.hashsalt": "retort", "font.size": 9})
    figure, panel = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    groups: dict[str, list[tuple[float, Mean]]] = {}
    for way, point in points.items():
        group = "top-12, 50, 64 renormalised" if way.startswith("top-") else way.split(" 0.")[0]
        groups.setdefault(group, []).append(point)
    for (group, found), marker in zip(groups.items(), "os^D", strict=True):
        xs, shares = zip(*found, strict=True)
        ys, reaches = [s.value for s in shares], [s.reach for s in shares]
        panel.errorbar(xs, ys, reaches, marker=marker, capsize=3, label=group)
    panel.axhline(0.95, color="gray", linewidth=0.8, linestyle=":")
    title = "share of the gain from CE to FullKD, 95 % intervals"
    panel.set(xscale="log", xlabel="bytes per position", title=title)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=cache_logits.default_folder().parent / "quality",
        help="folder for 16 GB (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, help="default: 5 (--quick: 2)", choices=range(1, len(T_975) + 1)
    )
    parser.add_argument("--steps", type=int, help=f"default: {PLAN.steps}")
    parser.add_argument("--quick", action="store_true", help="a smoke test of three minutes")
    parser.add_argument("--table", action="store_true", help="only of finished students")
    parser.add_argument("--figure", type=Path, help="where the curve is drawn, as SVG")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    plan = QUICK if flags.quick else PLAN
    plan = dataclasses.replace(plan, steps=flags.steps or plan.steps)
    bench = Bench(flags.out / "quick" if flags.quick else flags.out, plan)
    num_seeds = flags.seeds or (2 if flags.quick else 5)
    if not flags.table:
        run_students(bench, num_seeds)
    points = print_table(bench, num_seeds)
    teacher = evaluate(bench, None)
    print(f"the teacher itself: loss {teacher['loss']:.3f}, ECE {teacher['ece']:.1%}")
    if flags.figure:
        draw_figure(flags.figure, points)


if __name__ == "__main__":
    main()
