"""Estimate the size of a cache before the teacher starts; fails if the disk cannot hold it.

    python workflow/scripts/plan.py --index results/tokens/mine/index.json \\
        --fingerprint results/teachers/mine/fingerprint.json --output results/logits/mine/plan.json
"""

from pathlib import Path

from retort.cache.cost import describe_cost, estimate_cost
from retort.cli import logger, run_script, script_parser
from retort.config.flags import add_section_flags, section_from_args
from retort.io.fingerprints import TeacherRecord
from retort.tokens.index import IndexRecord


def main() -> None:
    """Write plan.json."""
    parser = script_parser(__doc__)
    parser.add_argument("--index", required=True, type=Path, help="index.json of the tokens")
    parser.add_argument(
        "--fingerprint", required=True, type=Path, help="fingerprint.json of the teacher"
    )
    parser.add_argument("--output", required=True, type=Path, help="plan.json")
    add_section_flags(parser, "cache")
    add_section_flags(parser, "merge")
    args = parser.parse_args()
    cost = estimate_cost(
        IndexRecord.read(args.index),
        section_from_args(args, "cache"),
        section_from_args(args, "merge"),
        vocabulary=TeacherRecord.read(args.fingerprint).vocabulary,
        folder=args.output.parent.resolve(),
    )
    logger.info(describe_cost(cost))
    cost.write(args.output)


if __name__ == "__main__":
    run_script(main)
