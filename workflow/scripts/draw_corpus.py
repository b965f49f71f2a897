"""Write a snapshot of a corpus that is not in local files: the demo's text, or the first documents of a stream.

python workflow/scripts/draw_corpus.py --dataset-name demo --output results/corpora/mine/corpus.json
"""

from pathlib import Path

from retort.cli import run_script, script_parser
from retort.config.flags import add_section_flags, section_from_args
from retort.corpus.snapshot import write_snapshot


def main() -> None:
    """Write documents_*.jsonl.gz and their record into the output's folder; an interrupted run is resumed."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="corpus.json, or a reader's corpus_<reader>.json; the documents are written to its folder",
    )
    parser.add_argument(
        "--reader", type=int, default=0, help="with --dataset-sharding files: the shard to read"
    )
    parser.add_argument(
        "--corpus-stamp",
        help="fail if the digest of the local files' sizes and times is not this",
    )
    add_section_flags(parser, "dataset")
    args = parser.parse_args()
    dataset = section_from_args(args, "dataset")
    folder = args.output.parent
    write_snapshot(dataset, folder, reader=args.reader, stamp=args.corpus_stamp)


if __name__ == "__main__":
    run_script(main)
