"""Prune the teacher, or the model of student.model_path, to the part that students start from.

    python workflow/scripts/prune_teacher.py --config mine.yaml --set student.from_teacher.layers=4 \\
        --fingerprint results/teachers/<id>/fingerprint.json --output mine/pruned/pruned.json
"""

from pathlib import Path

from retort.cli import run_script
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Write model/ and pruned.json."""
    parser = job_parser(__doc__, "pruned", output="pruned.json; model/ goes to the same folder")
    parser.add_argument(
        "--fingerprint",
        type=Path,
        nargs="?",
        help="fingerprint.json of the teacher, whose weights must be the recorded ones",
    )
    args = parser.parse_args()
    job = read_job(args)
    from retort.pruning.run import prune_model

    prune_model(args.output, job, fingerprint_path=args.fingerprint)
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
