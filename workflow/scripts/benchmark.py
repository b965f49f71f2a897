"""Run one benchmark on the student of a run or on a teacher: a task of lm-evaluation-harness, or humaneval.

    python workflow/scripts/benchmark.py --benchmark hellaswag --record results/runs/mine/training.json \\
        --output results/runs/mine/benchmarks/hellaswag/benchmark.json
    python workflow/scripts/benchmark.py --benchmark humaneval --evaluation-humaneval-allow-code-execution \\
        --evaluation-humaneval-file HumanEval.jsonl.gz --teacher models/teacher \\
        --record results/teachers/mine/fingerprint.json --output teacher_humaneval/benchmark.json
"""

import argparse
from pathlib import Path

from retort.cli import logger, run_script, script_parser
from retort.cluster.leases import lease_teacher, lease_training
from retort.config.flags import add_section_flags, section_from_args


def main() -> None:
    """Write benchmark.json."""
    parser = script_parser(__doc__)
    parser.add_argument("--benchmark", required=True, help="name of the task")
    parser.add_argument(
        "--record",
        required=True,
        type=Path,
        help="training.json of a run, with final/ beside it, or fingerprint.json of the teacher",
    )
    parser.add_argument("--teacher", help="folder or Hub id of the teacher; default: the student")
    parser.add_argument("--output", required=True, type=Path, help="benchmark.json")
    parser.add_argument(
        "--among-gpus", help="GPUs for a student to choose from, such as 1,3,5,7; default: all"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="device of a student"
    )
    for section in ("evaluation", "teacher", "teacher.generation"):
        add_section_flags(parser, section)
    args = parser.parse_args()
    benchmark_teacher(args) if args.teacher else benchmark_run(args)


def benchmark_run(args: argparse.Namespace) -> None:
    """Run the task on the student of a run."""
    with lease_training(1, device=args.device, among=args.among_gpus):
        from retort.evaluation import tasks

        line = tasks.run_task_on_student(
            args.output,
            name=args.benchmark,
            training_path=args.record,
            settings=section_from_args(args, "evaluation"),
            device=args.device,
            cpu_threads=section_from_args(args, "teacher.generation").cpu_threads,
        )
    logger.info(line)


def benchmark_teacher(args: argparse.Namespace) -> None:
    """Run the task on a teacher, on a GPU group."""
    section = section_from_args(args, "teacher")
    with lease_teacher(section.generation, worker=0, device=section.device):
        from retort.evaluation import tasks

        line = tasks.run_task_on_teacher(
            args.output,
            name=args.benchmark,
            teacher_path=args.teacher,
            fingerprint_path=args.record,
            section=section,
            settings=section_from_args(args, "evaluation"),
        )
    logger.info(line)


if __name__ == "__main__":
    run_script(main)
