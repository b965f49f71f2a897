"""Run one worker of the teacher's pass: it does parts of the index until every part has a file.

    python workflow/scripts/generate_logits.py --index results/tokens/mine/index.json --teacher models/teacher \\
        --fingerprint results/teachers/mine/fingerprint.json --worker 0 --num-workers 1 \\
        --output results/logits/mine/metadata_worker0.json
"""

from pathlib import Path

from retort.cli import quiet_terminal, run_script, script_parser
from retort.cluster.leases import lease_teacher
from retort.config.flags import add_section_flags, section_from_args


def main() -> None:
    """Lease one GPU group, do parts, write the receipt."""
    parser = script_parser(__doc__)
    parser.add_argument("--index", required=True, type=Path, help="index.json of the tokens")
    parser.add_argument(
        "--fingerprint", required=True, type=Path, help="fingerprint.json of the teacher"
    )
    parser.add_argument("--teacher", required=True, help="folder or Hub id of the teacher")
    parser.add_argument("--worker", type=int, default=0, help="which worker this is, from 0")
    parser.add_argument(
        "--num-workers", type=int, default=1, help="workers that share the parts; changes no result"
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="the receipt; parts/ is beside it"
    )
    for section in ("teacher", "teacher.generation", "cache"):
        add_section_flags(parser, section)
    args = parser.parse_args()
    section = section_from_args(args, "teacher")
    if args.worker > 0:
        quiet_terminal()  # the first one shows the progress of all
    with lease_teacher(section.generation, worker=args.worker, device=section.device):
        from retort.teacher.worker import generate_logits

        generate_logits(
            args.output,
            index_path=args.index,
            teacher_path=args.teacher,
            fingerprint_path=args.fingerprint,
            section=section,
            cache=section_from_args(args, "cache"),
            worker=args.worker,
            num_workers=args.num_workers,
        )


if __name__ == "__main__":
    run_script(main)
