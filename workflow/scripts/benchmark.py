"""Run one benchmark on the student of a run or on a teacher: a task of lm-evaluation-harness, or humaneval.

    python workflow/scripts/benchmark.py --config mine.yaml --run soft --task hellaswag \\
        --record results/runs/soft/<id>/training.json --output mine/hellaswag/benchmark.json
    python workflow/scripts/benchmark.py --config mine.yaml --run soft --task humaneval \\
        --record results/teachers/<id>/fingerprint.json --output mine/teacher_humaneval/benchmark.json
"""

from pathlib import Path

from retort.cli import logger, run_script
from retort.cluster.leases import lease_teacher, lease_training
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Write benchmark.json; a student uses one GPU, a teacher a GPU group."""
    parser = job_parser(__doc__, "task", output="benchmark.json")
    parser.add_argument("--task", required=True, help="name of the task")
    parser.add_argument(
        "--record",
        required=True,
        type=Path,
        help="training.json of a run, with final/ beside it, or fingerprint.json of the teacher",
    )
    args = parser.parse_args()
    job = read_job(args)
    teacher, training = job.config.teacher, job.config.training
    is_teacher = args.record.name == "fingerprint.json"
    with (
        lease_teacher(teacher.generation, worker=0, device=teacher.device)
        if is_teacher
        else lease_training(1, device=training.device, among=teacher.generation.gpus)
    ):
        from retort.evaluation import tasks

        run_task = tasks.run_task_on_teacher if is_teacher else tasks.run_task_on_student
        logger.info(run_task(args.output, job, name=args.task, record_path=args.record))
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
