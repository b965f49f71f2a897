"""Write index.json: all token shards of a corpus, their totals, and the parts of the teacher's work.

    python workflow/scripts/index_tokens.py --config mine.yaml --shards mine/tokens/shard_*.h5 \\
        --output mine/tokens/index.json
"""

from pathlib import Path

from retort.cli import logger, run_script
from retort.config.handoff import job_parser, read_job
from retort.tokens.index import describe_index
from retort.tokens.indexing import write_index


def main() -> None:
    """Verify the shards, write the index, report the counts."""
    parser = job_parser(__doc__, "tokens", output="index.json, in the shards' folder")
    parser.add_argument(
        "--shards", required=True, type=Path, nargs="+", help="all shards, in order"
    )
    args = parser.parse_args()
    job = read_job(args)
    chunk_size = job.config.dataset.streaming_chunk_size
    index = write_index(args.output, args.shards, streaming_chunk_size=chunk_size)
    logger.info(describe_index(index))
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
