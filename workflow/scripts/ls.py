"""List the results of a folder: sizes, ages, whose they are, and in which keys they differ.

    python workflow/scripts/ls.py
    python workflow/scripts/ls.py mine.yaml --results scratch/results

Without a config, each artifact shows the keys in which it differs from most others of its kind. With configs, it says
which of them need it; one that none needs shows in what it differs from what they do need.
"""

import json
from pathlib import Path

from retort.cli import print_text, run_script, script_parser


def main() -> None:
    """Print the list."""
    parser = script_parser(__doc__)
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", help="configs (YAML)")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="folder of results (of the configs, else results)",
    )
    parser.add_argument("--all", action="store_true", help="evaluations, checks and reports too")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    args = parser.parse_args()
    from retort.inventory.listing import render_inventory, take_inventory, to_json

    found = take_inventory(args.configs, args.results)
    print_text(
        json.dumps(to_json(found), indent=1)
        if args.json
        else render_inventory(found, is_long=args.all)
    )


if __name__ == "__main__":
    run_script(main)
