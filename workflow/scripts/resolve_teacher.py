"""Record a teacher's fingerprint: the digest of a folder's weights, or the current commit of a Hub id.

    python workflow/scripts/resolve_teacher.py --teacher-model-path models/teacher \\
        --output results/teachers/mine/fingerprint.json
"""

from pathlib import Path

from retort.cli import run_script, script_parser
from retort.config.flags import add_section_flags, section_from_args


def main() -> None:
    """Write fingerprint.json."""
    parser = script_parser(__doc__)
    parser.add_argument("--output", required=True, type=Path, help="fingerprint.json")
    add_section_flags(parser, "teacher")
    add_section_flags(parser, "teacher.generation")
    args = parser.parse_args()
    from retort.models.load import record_teacher

    record_teacher(args.output, section_from_args(args, "teacher"))


if __name__ == "__main__":
    run_script(main)
