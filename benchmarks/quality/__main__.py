"""Quality for bytes: students trained from 14 to 256 bytes a position, beside the whole distribution and none.

    python -m benchmarks.quality [--out FOLDER] [--seeds 5] [--steps 300] [--figure FILE.svg] [--quick]

The teacher is that of the cache benchmark (`python -m benchmarks.distributions`), scored on 512 tokens of each of 232
held-out documents (15 GB); students train on 208 of them and are measured on the other 24. At one seed all ways
have the same initial weights and the same batches; only what they learn from differs:

    CE               nothing: cross-entropy with the text's own tokens
    FullKD           all 32,768 probabilities, KL(teacher || student)
    Retort           what its cache gives back, encoded and decoded; kept tokens and one bucket for the tail
    RS-KD            50 samples with replacement, c / 50 each (arXiv 2503.16870), 3 bytes for each different id
    top-k            the k most probable, scaled to sum to one as is common; 4 bytes an id

All but CE train on the teacher alone (alpha = 0), at temperature 1. A finished student is a line of results.jsonl:
rerun the command to resume; `--table` prints the finished students.

Legend: P positions, T those of a sequence, C those of a chunk, V vocabulary, D width of the student.
"""

import dataclasses
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.common import make_parser
from benchmarks.distributions import settings
from benchmarks.distributions.build import default_folder
from benchmarks.distributions.settings import Settings
from benchmarks.quality.evaluation import evaluate
from benchmarks.quality.experiment import STATES, WAYS, Experiment, Plan
from benchmarks.quality.students import compute_gradient, train_student
from benchmarks.quality.table import T_975, draw_figure, print_table

# 232 + 16 of the 251 held-out documents that are long enough: no two sequences are of one document.
PLAN = Plan(Settings(num_sequences=232, held_out_of=12))
QUICK = Plan(Settings(**settings.QUICK), steps=12, num_evaluated=4, num_angle=2)


def measure_angles(experiment: Experiment, state: str) -> dict[str, float]:
    """Return each way's angle to FullKD's gradient, degrees, at the weights of FullKD's student of seed 0."""
    if (state, 0) in experiment.results or not experiment.state_path(state).exists():
        return experiment.results.get((state, 0), {})
    model = experiment.build_student(seed=0)
    model.load_state_dict(torch.load(experiment.state_path(state)))
    exact = compute_gradient(experiment, model, "FullKD").double()
    angles = {"FullKD": 0.0}
    for way in (w for w in WAYS if w != "FullKD"):
        gradient = compute_gradient(experiment, model, way).double()
        cosine = F.cosine_similarity(gradient, exact, dim=0).item()
        angles[way] = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    experiment.add(state, 0, angles)
    return angles


def run_students(experiment: Experiment, num_seeds: int) -> None:
    """Train and measure every student that is missing: all ways of a seed, then the next seed."""
    everything = [(way, seed) for seed in range(num_seeds) for way in WAYS]
    missing = [entry for entry in everything if entry not in experiment.results]
    started = time.time()
    for done, (way, seed) in enumerate(missing, 1):
        begun = time.time()
        found = evaluate(experiment, train_student(experiment, way, seed=seed))
        experiment.add(way, seed, found)
        left = (time.time() - started) / done * (len(missing) - done)
        print(
            f"seed {seed}, {way}: loss {found['loss']:.4f}, KL {found['kl']:.4f}, {time.time() - begun:.0f} s; "
            f"{done} of {len(missing)} done, {left / 60:.0f} minutes left",
            flush=True,
        )


def main() -> None:
    """Make what is missing, and print the table."""
    parser = make_parser("benchmarks.quality", __doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=default_folder().parent / "quality",
        help="folder for 16 GB (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, help="default: 5 (--quick: 2)", choices=range(1, len(T_975) + 1)
    )
    parser.add_argument("--steps", type=int, help=f"default: {PLAN.steps}")
    parser.add_argument("--quick", action="store_true", help="a smoke test of three minutes")
    parser.add_argument(
        "--table", action="store_true", help="train nothing: print the finished students"
    )
    parser.add_argument("--figure", type=Path, help="where the curve is drawn, as SVG")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    plan = QUICK if flags.quick else PLAN
    plan = dataclasses.replace(plan, steps=flags.steps or plan.steps)
    experiment = Experiment(flags.out / "quick" if flags.quick else flags.out, plan)
    num_seeds = flags.seeds or (2 if flags.quick else 5)
    if not flags.table:
        run_students(experiment, num_seeds)
    angles = {state: measure_angles(experiment, state) for state in STATES}
    points = print_table(experiment, angles, num_seeds=num_seeds)
    teacher = evaluate(experiment, None)
    print(f"the teacher itself: loss {teacher['loss']:.3f}, ECE {teacher['ece']:.1%}")
    if flags.figure:
        draw_figure(flags.figure, points)


if __name__ == "__main__":
    main()
