"""Turn one shard of the corpus into sequences of tokens.

    python workflow/scripts/tokenize_shard.py --shard 0 --tokenizer gpt2 --dataset-name text \\
        --dataset-data-files book.txt --output results/tokens/mine/shard_00000.h5
"""

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

from retort.artifacts.syntheses import refuse_other_responses
from retort.cli import logger, run_script
from retort.config.flags import add_section_flags, section_from_args


def main() -> None:
    """Read the shard's documents, tokenize them, write the shard, say what was counted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shard", required=True, type=int, help="which shard, from 0")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id")
    parser.add_argument("--tokenizer-revision", help="revision of a Hub tokenizer")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run a tokenizer's own code"
    )
    parser.add_argument("--corpus", type=Path, help="folder of a drawn corpus, where there is one")
    parser.add_argument(
        "--synthesis", type=Path, help="synthesis.json: refuse responses that are not what it says"
    )
    parser.add_argument(
        "--corpus-stamp",
        help="refuse local files whose sizes and times have another digest than this",
    )
    parser.add_argument(
        "--expected-tokenizer",
        help="refuse tokenizer files that have another fingerprint than this",
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
        fingerprint_of_tokenizer,
        hidden_torch,
        load_tokenizer,
        refuse_other_tokenizer,
    )

    runs_user_code = args.trust_remote_code or is_custom(dataset)  # which may want models
    with nullcontext() if runs_user_code else hidden_torch():
        tokenizer = load_tokenizer(
            args.tokenizer,
            revision=args.tokenizer_revision,
            trust_remote_code=args.trust_remote_code,
        )
    fingerprint = fingerprint_of_tokenizer(args.tokenizer, tokenizer)
    refuse_other_tokenizer(fingerprint, expected=args.expected_tokenizer, path=args.tokenizer)
    line = tokenize_shard(
        args.output,
        dataset,
        tokenizer,
        fingerprint=fingerprint,
        shard=args.shard,
        drawn=args.corpus,
        stamp=args.corpus_stamp,
    )
    logger.info(line)


if __name__ == "__main__":
    run_script(main)
