"""Show a result: a logit cache, with the teacher's distributions as text, or the main facts of anything else.

    python workflow/scripts/show.py results/logits/<id>
    python workflow/scripts/show.py results/logits/<id> --sequence 3
    python workflow/scripts/show.py results/logits/<id> --sequence 3 --position 20 --top 10
    python workflow/scripts/show.py results/runs/soft/<id>

A sequence's text is marked where it surprised the teacher, in colours on a terminal (NO_COLOR is respected). Numbers
begin at 0; a position is one whose next token is predicted.
"""

from pathlib import Path

from retort.cli import print_text, run_script, script_parser


def main() -> None:
    """Print it."""
    parser = script_parser(__doc__)
    parser.add_argument("path", type=Path, help="a result's folder, or a file in it")
    parser.add_argument("--sequence", type=int, metavar="N", help="of a cache: this one's text")
    parser.add_argument("--position", type=int, metavar="N", help="of that sequence: its tokens")
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="tokens of a position (10)"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="the sequence's text as a page too"
    )
    parser.add_argument("--tokenizer", help="folder or Hub id, where the recorded one is gone")
    args = parser.parse_args()
    if args.top < 1:
        parser.error(f"--top is {args.top}: give 1 or more.")
    from retort.inventory.showing import Choice, show_path

    choice = Choice(args.sequence, args.position, args.top, args.html, args.tokenizer)
    print_text(show_path(args.path, choice))


if __name__ == "__main__":
    run_script(main)
