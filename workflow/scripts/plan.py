"""Estimate the size of a cache before the teacher's pass; fails if the disk cannot hold it.

    python workflow/scripts/plan.py --config mine.yaml --index results/tokens/<id>/index.json \\
        --fingerprint results/teachers/<id>/fingerprint.json --output mine/logits/plan.json
"""

from pathlib import Path

from retort.cli import logger, run_script
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Write plan.json."""
    parser = job_parser(__doc__, "logits", "index", "fingerprint", output="plan.json")
    parser.add_argument(
        "--features",
        type=Path,
        nargs="?",
        help="teacher_validation.safetensors, to measure the bytes of this teacher's distributions",
    )
    args = parser.parse_args()
    job = read_job(args)
    from retort.cache.cost import describe_cost
    from retort.estimate.plan import plan_cache

    cost = plan_cache(
        args.output.parent,
        job,
        index_path=args.index,
        fingerprint_path=args.fingerprint,
        features_path=args.features,
    )
    logger.info(describe_cost(cost))
    cost.write(args.output)
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
