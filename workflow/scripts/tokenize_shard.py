"""Tokenize one shard of the corpus into sequences.

python workflow/scripts/tokenize_shard.py --config mine.yaml --shard 0 --output mine/tokens/shard_00000.h5
"""

import os
from contextlib import nullcontext
from pathlib import Path

from retort.artifacts.responses import refuse_other_responses
from retort.cli import logger, run_script
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Read the shard's documents, tokenize them, write the shard, report the counts."""
    parser = job_parser(__doc__, "tokens", output="the token shard")
    parser.add_argument("--shard", required=True, type=int, help="which shard, from 0")
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="?",
        help="record of the corpus, if a rule made it: of draw_corpus, or synthesis.json",
    )
    args = parser.parse_args()
    job = read_job(args)
    dataset, trust = job.dataset, job.config.teacher.trust_remote_code
    os.environ["RAYON_NUM_THREADS"] = str(dataset.num_proc)
    is_synthesis = args.corpus is not None and args.corpus.name == "synthesis.json"
    if is_synthesis:
        refuse_other_responses(args.corpus)
    from retort.corpus.sharding import is_custom
    from retort.tokens.shards import tokenize_shard
    from retort.tokens.tokenizer import (
        identify_tokenizer,
        load_tokenizer,
        refuse_other_tokenizer,
        without_torch,
    )

    path, revision = job.tokenizer
    runs_user_code = trust or is_custom(dataset)  # it may need PyTorch
    with nullcontext() if runs_user_code else without_torch():
        tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust)
    identity = identify_tokenizer(path, tokenizer)
    refuse_other_tokenizer(identity, expected=job.expected.get("tokenizer"), path=path)
    line = tokenize_shard(
        args.output,
        dataset,
        tokenizer,
        identity=identity,
        shard=args.shard,
        snapshot=args.corpus.parent if args.corpus and not is_synthesis else None,
        stamp=job.expected.get("corpus"),
    )
    logger.info(line)
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
