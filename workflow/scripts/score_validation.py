"""Score the held-out sequences, and a sample of the training sequences, with the teacher.

    python workflow/scripts/score_validation.py --config mine.yaml --index results/tokens/<id>/index.json \\
        --fingerprint results/teachers/<id>/fingerprint.json --output mine/teacher_validation.safetensors

The teacher's continuations of some prompts are written to samples.json beside the output.
"""

from retort.cli import run_script
from retort.cluster.leases import lease_teacher
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Write the teacher's exact distributions as hidden states and head."""
    parser = job_parser(
        __doc__, "validation", "index", "fingerprint", output="teacher_validation.safetensors"
    )
    args = parser.parse_args()
    job = read_job(args)
    section = job.config.teacher
    with lease_teacher(section.generation, worker=0, device=section.device):
        from retort.teacher.validation import score_validation

        score_validation(args.output, job, index_path=args.index, fingerprint_path=args.fingerprint)
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
