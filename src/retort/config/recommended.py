"""Values for a first config, with their evidence. The keys' defaults are the established ones; these serve better.

`retort init` writes them, the examples and the README use them (a test holds them to it), and `check_inputs` names them
where a costly default was left.

cache: every token above 0.001 at temperature 1. In bytes a position, against top_k 64: stories260K 21 and 197; a
teacher of 2 nats of entropy and 32,768 tokens 42 and 256 (docs/benchmarks.md).

temperature, alpha, learning_rate: stories260K, students with random weights, 300 steps, 3 seeds. A learning rate of
1e-4 ends at 5.27 nats of held-out loss, 3e-3 at 2.97; temperature 2 and alpha 0.5 are 0.03 better than cross-entropy,
temperature 1 and alpha 0.1 0.12 to 0.21.
"""

from retort.config.cache import Cache

CACHE = Cache(method="top_p", min_probability=0.001, temperatures=(1.0,))
TEMPERATURE = 1.0
ALPHA = 0.1
_LARGE = 50_000_000  # parameters


def choose_learning_rate(num_parameters: int, *, is_pretrained: bool) -> float:
    """Return the peak learning rate for a student of a size, with weights of its own or random ones."""
    if is_pretrained:
        return 2e-5
    return 3e-4 if num_parameters >= _LARGE else 1e-3
