"""Remove the results that some configs do not need; without --yes, say what would be removed.

    python workflow/scripts/gc.py --keep mine.yaml other.yaml
    python workflow/scripts/gc.py --keep mine.yaml other.yaml --yes

All that these configs make is kept, finished or not. Never removed: what a running job, Snakemake, lock or claim holds;
files that Retort did not write; what is behind a symbolic link. The answers of a synthesis go with --journal only.
"""

from pathlib import Path

from retort.cli import print_text, run_script, script_parser


def main() -> None:
    """Print what is removed, or would be."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--keep",
        nargs="+",
        type=Path,
        required=True,
        metavar="CONFIG",
        help="configs (YAML) to keep",
    )
    parser.add_argument("--yes", action="store_true", help="remove")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="folder of results (those of the configs)"
    )
    parser.add_argument(
        "--journal",
        nargs="+",
        default=[],
        metavar="ID",
        help="folders in syntheses/ whose answers, which were paid for, may go too",
    )
    args = parser.parse_args()
    from retort.inventory.removal import plan_removal, remove, render_plan

    plan = plan_removal(args.keep, args.results, journals=args.journal)
    stayed = remove(plan) if args.yes else []
    print_text(render_plan(plan, is_done=args.yes, stayed=stayed))


if __name__ == "__main__":
    run_script(main)
