"""Write index.json: all token shards of a corpus, their totals, and the parts of the teacher's work.

    python workflow/scripts/index_tokens.py --shards results/tokens/mine/shard_*.h5 \\
        --output results/tokens/mine/index.json
"""

from pathlib import Path

from retort.cli import logger, run_script, script_parser
from retort.tokens.index import describe_index, write_index


def main() -> None:
    """Verify the shards, write the index, report the counts."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--shards", required=True, type=Path, nargs="+", help="all shards, in order"
    )
    parser.add_argument("--streaming-chunk-size", type=int, default=1000, help="documents per part")
    parser.add_argument(
        "--output", required=True, type=Path, help="index.json, in the shards' folder"
    )
    args = parser.parse_args()
    index = write_index(args.output, args.shards, streaming_chunk_size=args.streaming_chunk_size)
    logger.info(describe_index(index))


if __name__ == "__main__":
    run_script(main)
