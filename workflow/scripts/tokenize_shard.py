"""Tokenize one shard of the corpus into sequences.

    python workflow/scripts/tokenize_shard.py --shard 0 --tokenizer gpt2 --dataset-name text \\
        --dataset-data-files book.txt --output results/tokens/mine/shard_00000.h5
"""

import logging
import os
from contextlib import nullcontext
from pathlib import Path

from retort.artifacts.responses import refuse_other_responses
from retort.cli import run_script, script_parser
from retort.config.flags import add_section_flags, section_from_args

logger = logging.getLogger(__name__)


def main() -> None:
    """Read the shard's documents, tokenize them, write the shard, report the counts."""
    parser = script_parser(__doc__)
    parser.add_argument("--shard", required=True, type=int, help="which shard, from 0")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id")
    parser.add_argument("--tokenizer-revision", help="revision of a Hub tokenizer")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run a tokenizer's own code"
    )
    parser.add_argument(
        "--corpus", type=Path, help="folder of the corpus's snapshot, if it has one"
    )
    parser.add_argument(
        "--synthesis",
        type=Path,
        help="synthesis.json: fail if the responses are not those it records",
    )
    parser.add_argument(
        "--corpus-stamp",
        help="fail if the digest of the local files' sizes and times is not this",
    )
    parser.add_argument(
        "--expected-tokenizer",
        help="fail if the fingerprint of the tokenizer's files is not this",
    )
    parser.add_argument("--output", required=True, type=Path, help="the token shard")
    add_section_flags(parser, "dataset")
    args = parser.parse_args()
    dataset = section_from_args(args, "dataset")
    os.environ["RAYON_NUM_THREADS"] = str(dataset.num_proc)
    if args.synthesis:
        refuse_other_responses(args.synthesis)
    from retort.corpus.sharding import is_custom
    from retort.tokens.shards import tokenize_shard
    from retort.tokens.tokenizer import (
        identify_tokenizer,
        load_tokenizer,
        refuse_other_tokenizer,
        without_torch,
    )

    runs_user_code = args.trust_remote_code or is_custom(dataset)  # it may need PyTorch
    with nullcontext() if runs_user_code else without_torch():
        tokenizer = load_tokenizer(
            args.tokenizer,
            revision=args.tokenizer_revision,
            trust_remote_code=args.trust_remote_code,
        )
    identity = identify_tokenizer(args.tokenizer, tokenizer)
    refuse_other_tokenizer(identity, expected=args.expected_tokenizer, path=args.tokenizer)
    line = tokenize_shard(
        args.output,
        dataset,
        tokenizer,
        identity=identity,
        shard=args.shard,
        snapshot=args.corpus,
        stamp=args.corpus_stamp,
    )
    logger.info(line)


if __name__ == "__main__":
    run_script(main)
