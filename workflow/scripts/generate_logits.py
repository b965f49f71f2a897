"""Run one worker of the teacher's pass: it does parts of the index until every part has a file.

    python workflow/scripts/generate_logits.py --config mine.yaml --index results/tokens/<id>/index.json \\
        --fingerprint results/teachers/<id>/fingerprint.json --output mine/logits/metadata_worker0.json
"""

from retort.cli import quiet_terminal, run_script
from retort.cluster.leases import lease_teacher
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Lease one GPU group, do parts, write the receipt."""
    parser = job_parser(
        __doc__, "logits", "index", "fingerprint", output="the receipt; parts/ is beside it"
    )
    parser.add_argument("--worker", type=int, default=0, help="which worker this is, from 0")
    parser.add_argument(
        "--num-workers", type=int, default=1, help="workers that share the parts; changes no result"
    )
    args = parser.parse_args()
    job = read_job(args)
    section = job.config.teacher
    if args.worker > 0:
        quiet_terminal()  # the first one shows the progress of all
    with lease_teacher(section.generation, worker=args.worker, device=section.device):
        from retort.teacher.worker import generate_logits

        generate_logits(
            args.output,
            job,
            index_path=args.index,
            fingerprint_path=args.fingerprint,
            worker=args.worker,
            num_workers=args.num_workers,
        )
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
