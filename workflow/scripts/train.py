"""Train one student: from the text (output), from the teacher's distributions (logit), or from both (hybrid).

    python workflow/scripts/train.py --name mine --index results/tokens/mine/index.json --tokenizer models/teacher \\
        --student-config config/students/llama_100m.json --distillation-type hybrid --alpha 0.5 \\
        --cache results/logits/mine/teacher_logits.h5 --output results/runs/mine/training.json
"""

import argparse
from pathlib import Path

from retort.cli import is_rank, logger, run_script, script_parser
from retort.cluster.leases import hold_parent_gpus, lease_training
from retort.cluster.ranks import die_with_parent, launch_ranks, rank, rendezvous_flags
from retort.config.flags import add_section_flags, section_from_args


def read_command_line() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = script_parser(__doc__)
    parser.add_argument("--name", default="student", help="the run's name, for its log lines")
    parser.add_argument("--index", required=True, type=Path, help="index.json of the tokens")
    parser.add_argument(
        "--tokenizer", required=True, help="folder or Hub id of the tokenizer that made the tokens"
    )
    parser.add_argument("--tokenizer-revision", help="revision of a Hub tokenizer")
    parser.add_argument(
        "--expected-student", help="stop if the student's config or weights have another digest"
    )
    parser.add_argument("--cache", type=Path, help="teacher_logits.h5, for logit and hybrid")
    parser.add_argument("--teacher", help="folder or Hub id of a live teacher, instead of --cache")
    parser.add_argument(
        "--fingerprint", type=Path, help="fingerprint.json of the teacher, if there is one"
    )
    parser.add_argument(
        "--among-gpus", help="GPUs of this machine to choose from, such as 1,3,5,7 (default: all)"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="training.json; the student goes to the same folder",
    )
    for section in ("student", "training", "tracking", "teacher"):
        add_section_flags(parser, section)
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    """Train in this process."""
    from retort.training.run import train_run

    train_run(
        args.output,
        name=args.name,
        index_path=args.index,
        tokenizer_path=args.tokenizer,
        tokenizer_revision=args.tokenizer_revision,
        cache_path=args.cache,
        teacher_path=args.teacher,
        fingerprint_path=args.fingerprint,
        student=section_from_args(args, "student"),
        expected_student=args.expected_student,
        training=section_from_args(args, "training"),
        tracking=section_from_args(args, "tracking"),
        teacher_section=section_from_args(args, "teacher"),
    )


def train_rank(args: argparse.Namespace) -> None:
    """Train as one of several ranks; when another rank has ended, or all got SIGTERM, exit without a traceback."""
    try:
        train(args)
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
    if is_rank():
        hold_parent_gpus()
        die_with_parent()  # last: a parent that is alive here held the GPUs until hold_parent_gpus did
        train_rank(args)
        return
    training = section_from_args(args, "training")
    count, device = training.gpus, training.device
    rendezvous = rendezvous_flags(training.nodes)
    with lease_training(count, device=device, among=args.among_gpus) as gpus:
        # Without GPUs one process trains, unless device: cpu asks for several.
        ranks = count if gpus or device == "cpu" else 1
        if ranks * training.nodes > 1:
            launch_ranks(ranks, rendezvous=rendezvous, threads=training.cpu_threads)
        else:
            train(args)


if __name__ == "__main__":
    run_script(main)
