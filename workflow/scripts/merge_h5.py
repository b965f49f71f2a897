"""Merge the parts of a cache in the index's order, measure its fidelity, and remove the parts.

    python workflow/scripts/merge_h5.py --config mine.yaml --index results/tokens/<id>/index.json \\
        --fingerprint results/teachers/<id>/fingerprint.json --output mine/logits/manifest.json
"""

from pathlib import Path

from retort.cli import logger, run_script
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Write teacher_logits.h5 and manifest.json."""
    parser = job_parser(
        __doc__,
        "logits",
        "index",
        "fingerprint",
        output="manifest.json; the cache is written beside it",
    )
    parser.add_argument(
        "--features",
        type=Path,
        nargs="?",
        help="teacher_validation.safetensors, to measure the fidelity",
    )
    args = parser.parse_args()
    job = read_job(args)
    from retort.teacher.merge import merge_h5

    line = merge_h5(
        args.output,
        job,
        index_path=args.index,
        fingerprint_path=args.fingerprint,
        features_path=args.features,
    )
    logger.info(line)
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
