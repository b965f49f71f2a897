"""Merge the parts of a cache in the index's order, measure its fidelity, and remove the parts.

    python workflow/scripts/merge_h5.py --index results/tokens/mine/index.json \\
        --fingerprint results/teachers/mine/fingerprint.json --output results/logits/mine/manifest.json
"""

from pathlib import Path

from retort.cli import logger, run_script, script_parser
from retort.config.flags import add_section_flags, section_from_args


def main() -> None:
    """Write teacher_logits.h5 and manifest.json."""
    parser = script_parser(__doc__)
    parser.add_argument("--index", required=True, type=Path, help="index.json of the tokens")
    parser.add_argument(
        "--fingerprint", required=True, type=Path, help="fingerprint.json of the teacher"
    )
    parser.add_argument(
        "--features",
        type=Path,
        nargs="?",
        help="teacher_validation.safetensors, to measure the fidelity",
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="manifest.json; the cache is written beside it"
    )
    add_section_flags(parser, "cache")
    add_section_flags(parser, "merge")
    args = parser.parse_args()
    from retort.teacher.merge import merge_h5

    line = merge_h5(
        args.output,
        index_path=args.index,
        fingerprint_path=args.fingerprint,
        features_path=args.features,
        cache=section_from_args(args, "cache"),
        merge=section_from_args(args, "merge"),
    )
    logger.info(line)


if __name__ == "__main__":
    run_script(main)
