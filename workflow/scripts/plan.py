"""Estimate the size of a cache before the teacher starts; fails if the disk cannot hold it.

    python workflow/scripts/plan.py --config mine.yaml --index results/tokens/<id>/index.json \\
        --fingerprint results/teachers/<id>/fingerprint.json --output mine/logits/plan.json
"""

from retort.cache.cost import describe_cost, estimate_cost
from retort.cli import logger, run_script
from retort.config.handoff import job_parser, read_job
from retort.io.fingerprints import TeacherRecord
from retort.tokens.index import IndexRecord


def main() -> None:
    """Write plan.json."""
    parser = job_parser(__doc__, "logits", "index", "fingerprint", output="plan.json")
    args = parser.parse_args()
    job = read_job(args)
    cost = estimate_cost(
        IndexRecord.read(args.index),
        job.config.cache,
        job.config.merge,
        vocabulary=TeacherRecord.read(args.fingerprint).vocabulary,
        folder=args.output.parent.resolve(),
    )
    logger.info(describe_cost(cost))
    cost.write(args.output)
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
