"""What the distributions depend on, besides the text."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """The defaults are those of docs/benchmarks.md; QUICK replaces some for a smoke test."""

    vocabulary: int = 32_768
    sequence_length: int = 512
    num_sequences: int = 32  # held out, to measure on; P = num_sequences * sequence_length
    num_fit_sequences: int = 16  # held out too, to fit the mixture's weights on
    max_text_mb: int = 100
    held_out_of: int = 32  # one document in so many is held out
    width: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_steps: int = 600
    batch_size: int = 4  # sequences in a step
    num_candidates: int = 4096  # ids sampled for a step's softmax
    learning_rate: float = 2e-3
    seed: int = 0


QUICK = {"num_steps": 25, "num_sequences": 16, "num_fit_sequences": 4, "max_text_mb": 16}
