"""Upload a finished student, or a logit cache, with its card to the Hugging Face Hub, into a private repository.

    python workflow/scripts/publish.py results/runs/soft/<id> --repo someone/student
    python workflow/scripts/publish.py results/logits/<id> --repo someone/teacher-logits

A student becomes a model, a cache a dataset. The token is that of `hf auth login`, or of the variable HF_TOKEN. Files
that an interrupted upload had finished are not sent again.
"""

from pathlib import Path

from retort.cli import run_script, script_parser


def main() -> None:
    """Upload, and print the address."""
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="of a run, its final/, or a cache")
    parser.add_argument(
        "--repo", required=True, metavar="USER/NAME", help="on the Hub; made if new"
    )
    parser.add_argument("--public", action="store_true", help="a repository that all can read")
    parser.add_argument("--revision", help="a branch; made if new")
    parser.add_argument("--yes", action="store_true", help="do not ask, on a terminal either")
    args = parser.parse_args()
    from retort.pipeline.publish import publish

    url = publish(
        args.folder,
        args.repo,
        is_public=args.public,
        revision=args.revision,
        is_sure=args.yes,
    )
    print(url)


if __name__ == "__main__":
    run_script(main)
