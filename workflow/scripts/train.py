"""Train one student: from the text (output), from the teacher's distributions (logit), or from both (hybrid).

    python workflow/scripts/train.py --config mine.yaml --run soft --set training.alpha=0.3 \\
        --index results/tokens/<id>/index.json --signal results/logits/<id>/manifest.json \\
        --output mine/soft/training.json
"""

import argparse
from pathlib import Path

from retort.cli import is_rank, logger, run_script
from retort.cluster.leases import hold_parent_gpus, lease_training
from retort.cluster.ranks import die_with_parent, launch_ranks, rank, rendezvous_flags
from retort.config.handoff import Job, job_parser, read_job


def read_command_line() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = job_parser(
        __doc__, "run", "index", output="training.json; the student goes to the same folder"
    )
    parser.add_argument(
        "--signal",
        type=Path,
        nargs="*",
        default=[],
        help="what it learns from: manifest.json or teacher_logits.h5 of a cache, fingerprint.json of a live teacher "
        "(an output run takes only the width of its output layer from it); several in the order of teacher.mix",
    )
    parser.add_argument(
        "--start",
        type=Path,
        nargs="?",
        help="what it starts from, where student.from_teacher is set: pruned.json",
    )
    parser.add_argument(
        "--features",
        type=Path,
        nargs="*",
        default=[],
        help="teacher_validation.safetensors of its teacher (several in the order of teacher.mix), to log the KL from "
        "it on held-out text (see training.eval_steps)",
    )
    return parser.parse_args()


def train(args: argparse.Namespace, job: Job) -> None:
    """Train in this process."""
    from retort.training.run import train_run

    train_run(
        args.output,
        job,
        index_path=args.index,
        signal_paths=args.signal,
        start_path=args.start,
        features_paths=args.features,
    )


def train_rank(args: argparse.Namespace, job: Job) -> None:
    """Train as one of several ranks; when another rank has ended, or all got SIGTERM, exit without a traceback."""
    try:
        train(args, job)
    except RuntimeError as error:
        if "onnection" not in str(error) and "killed by signal: Terminated" not in str(error):
            raise
        if rank() == 0:
            logger.warning(
                "another rank ended, so this one ends too; see the error message of the other rank"
            )
        raise SystemExit(1) from None


def main() -> None:
    """Write checkpoint-*/, final/, training_log.csv and training.json."""
    args = read_command_line()
    job = read_job(args)
    if is_rank():
        hold_parent_gpus()
        die_with_parent()  # last: a parent that is alive here held the GPUs until hold_parent_gpus did
        train_rank(args, job)
        return
    training = job.config.training
    count, device = training.gpus, training.device
    rendezvous = rendezvous_flags(training.nodes)
    with lease_training(count, device=device, among=job.config.teacher.generation.gpus) as gpus:
        # Without GPUs one process trains, unless device: cpu asks for several.
        ranks = count if gpus or device == "cpu" else 1
        if ranks * training.nodes > 1:
            launch_ranks(ranks, rendezvous=rendezvous, threads=training.cpu_threads)
        else:
            train(args, job)
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
