"""Score the held-out sequences, and a sample of the training sequences, with the teacher.

    python workflow/scripts/score_validation.py --index results/tokens/mine/index.json --teacher models/teacher \\
        --fingerprint results/teachers/mine/fingerprint.json \\
        --output results/validation/mine/teacher_validation.safetensors

The teacher's continuations of some prompts are written to samples.json beside the output.
"""

from pathlib import Path

from retort.cli import run_script, script_parser
from retort.cluster.leases import lease_teacher
from retort.config.flags import add_section_flags, section_from_args


def main() -> None:
    """Write the teacher's exact distributions as hidden states and head."""
    parser = script_parser(__doc__)
    parser.add_argument("--index", required=True, type=Path, help="index.json of the tokens")
    parser.add_argument(
        "--fingerprint", required=True, type=Path, help="fingerprint.json of the teacher"
    )
    parser.add_argument("--teacher", required=True, help="folder or Hub id of the teacher")
    parser.add_argument("--output", required=True, type=Path, help="teacher_validation.safetensors")
    for section in ("teacher", "teacher.generation", "evaluation"):
        add_section_flags(parser, section)
    args = parser.parse_args()
    section = section_from_args(args, "teacher")
    with lease_teacher(section.generation, worker=0, device=section.device):
        from retort.teacher.validation import score_validation

        score_validation(
            args.output,
            index_path=args.index,
            teacher_path=args.teacher,
            fingerprint_path=args.fingerprint,
            section=section,
            evaluation=section_from_args(args, "evaluation"),
        )


if __name__ == "__main__":
    run_script(main)
