"""The flags of `retort init`, which are read before what takes seconds to load."""

import argparse
import sys
from collections.abc import Sequence

_ABOUT = "Looks at a corpus and a teacher, and writes a commented config with good values for them."


def read_init_flags(words: Sequence[str]) -> argparse.Namespace:
    """Return the flags of `retort init`; on a terminal, ask for a corpus and a teacher that are not given.

    Exits with status 2 where words are wrong or one of the two is missing.
    """
    parser = argparse.ArgumentParser("retort init", description=_ABOUT)
    for name, text in {
        "--corpus": "a file, a glob in quotes, a folder, or a dataset on the Hub",
        "--teacher": "a model: a folder or a Hub id",
        "--student": "a size such as 100M (default: a tenth of the teacher), a config (.json) or a model",
        "--output": "the config to write (default: mine.yaml); never overwritten",
    }.items():
        parser.add_argument(name, help=text, default="mine.yaml" if name == "--output" else None)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of dataset or teacher",
    )
    parser.add_argument(
        "--examples", action="store_true", help="copy config/ and profiles/slurm/ instead"
    )
    args = parser.parse_args(words)
    args.corpus = args.corpus or ask("Corpus: a file, a glob, a folder or a dataset on the Hub: ")
    args.teacher = args.teacher or ask("Teacher: a folder or a Hub id: ")
    if not (args.corpus and args.teacher):
        parser.error("give --corpus and --teacher (without a terminal nothing is asked)")
    return args


def ask(question: str) -> str:
    """Return the answer of the person at the terminal; "" where there is none."""
    return input(question).strip() if sys.stdin.isatty() else ""
