"""Prune the teacher, or the model of student.model_path, to the part that students start from.

    python workflow/scripts/prune_teacher.py --config mine.yaml --set student.from_teacher.layers=4 \\
        --fingerprint results/teachers/<id>/fingerprint.json --output mine/pruned/pruned.json
"""

from pathlib import Path

from retort.cli import run_script
from retort.cluster.leases import lease_teacher
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
    parser.add_argument(
        "--index",
        type=Path,
        nargs="?",
        help="index.json of the tokens, on which activations are measured for other sizes than layers",
    )
    args = parser.parse_args()
    job = read_job(args)
    section = job.config.teacher
    device = section.device if job.config.student.from_teacher.is_measured else "cpu"
    with lease_teacher(section.generation, worker=0, device=device):
        from retort.pruning.run import prune_model

        prune_model(args.output, job, fingerprint_path=args.fingerprint, index_path=args.index)
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
