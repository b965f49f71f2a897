"""Record a teacher's fingerprint: the digest of a folder's weights, or the current commit of a Hub id.

    python workflow/scripts/resolve_teacher.py --set teacher.model_path=models/teacher \\
        --output mine/teacher/fingerprint.json
"""

from retort.cli import run_script
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Write fingerprint.json."""
    parser = job_parser(__doc__, "teacher", output="fingerprint.json")
    args = parser.parse_args()
    job = read_job(args)
    section = job.config.teacher.model_copy(update={"model_path": job.teacher_path})
    from retort.models.load import record_teacher

    record_teacher(args.output, section)
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
