"""Say why two results have two ids: the keys that differ, or the files, followed down through what they are made of.

    python workflow/scripts/diff.py results/runs/soft/<id> results/runs/soft/<other id>
    python workflow/scripts/diff.py mine.yaml other.yaml
    python workflow/scripts/diff.py mine.yaml:text mine.yaml:soft
    python workflow/scripts/diff.py mine.yaml results/logits/<id> --run soft

Of two configs, the runs of one name are compared; they need not have been run.
"""

from retort.cli import print_text, run_script, script_parser


def main() -> None:
    """Print the comparison."""
    parser = script_parser(__doc__)
    parser.add_argument("first", metavar="A", help="a result's folder, a config, or CONFIG:RUN")
    parser.add_argument("second", metavar="B", help="the same")
    parser.add_argument("--run", metavar="NAME", help="the run of the configs")
    args = parser.parse_args()
    from retort.inventory.differing import explain

    print_text(explain(args.first, args.second, run=args.run))


if __name__ == "__main__":
    run_script(main)
