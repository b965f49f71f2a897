"""Make a 32,768-token teacher's distributions from text found on this machine: offline, on the CPU, in minutes.

    python -m benchmarks.distributions [--out FOLDER] [--quick] [--vocabulary 131072 --sequences 8]

The teacher is a mixture: a small GPT, n-grams up to order 5, and the n-grams of the sequence itself so far (the copying
that a large model does), each fitted on text of its own; then one temperature for all positions, chosen so that 50
samples of a position have 12.3 different ids on average, as RS-KD (arXiv 2503.16870) reports of its real teachers. The
folder holds, for S held-out sequences of T tokens (P = S * T positions, position s * T + t being token t of sequence s)
and a vocabulary of V:

    tokens.npy          int32 [S, T]    what the teacher read
    next_tokens.npy     int32 [P]       the token that follows each position
    logprobs.npy        float32 [P, V]  natural log; memory-mappable
    unigram_counts.npy  int64 [V]       of the training text
    tokenizer.json      the byte-level BPE
    settings.json       what it was made of and what was measured; written last, compared before it is made again
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import make_parser
from benchmarks.distributions.build import default_folder, ensure
from benchmarks.distributions.settings import QUICK, Settings


def main() -> None:
    """Make the distributions unless they are there, and print what they are."""
    parser = make_parser("benchmarks.distributions", __doc__)
    parser.add_argument("--out", type=Path, default=default_folder(), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a crude teacher in a minute, to try")
    parser.add_argument("--sequences", type=int, help="held out; default: 32 (64 MiB each)")
    parser.add_argument("--vocabulary", type=int, help="ids of the tokenizer; default: 32768")
    parser.add_argument("--steps", type=int, help="training steps of the GPT; default: 600")
    parser.add_argument("--threads", type=int, default=1, help="of the processor; default: 1")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    os.environ["RAYON_NUM_THREADS"] = str(flags.threads)
    asked = {
        "num_sequences": flags.sequences,
        "num_steps": flags.steps,
        "vocabulary": flags.vocabulary,
    }
    changes: dict[str, Any] = QUICK if flags.quick else {}
    changes = changes | {name: value for name, value in asked.items() if value is not None}
    data = ensure(flags.out, Settings(**changes))
    print(json.dumps(data.measured, indent=2))
    print(f"{flags.out}: logprobs {data.logprobs.shape}, tokens {data.tokens.shape}")


if __name__ == "__main__":
    main()
