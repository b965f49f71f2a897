"""Values for a first config, with their evidence. The keys' defaults are the established ones; these serve better.

`retort init` writes them, the README and the examples use them (a test holds them to it), and `check_inputs` names them
where a costly default was left.

Cache: every token above 0.001 at temperature 1. In bytes a position: stories260K 21 (top_k 64: 197), the demo's teacher
61, a teacher of 2 nats of entropy and 32,768 tokens 42 (top_k 64: 256; docs/benchmarks.md).

Temperature, alpha: stories260K, students with random weights, 300 steps, 3 seeds: temperature 2 and alpha 0.5 end 0.03
nats below cross-entropy, temperature 1 and alpha 0.1 0.12 to 0.21.

Learning rate of random weights: on stories260K 1e-4 ends at 5.27 nats, 3e-3 at 2.97. Above 1M parameters from GPT-3
(arXiv 2005.14165, table 2.1: 125M 6e-4, 350M 3e-4, 1.3B 2e-4, 6.7B 1.2e-4) and Pythia (19M to 70M 1e-3). Of pretrained
weights: 1e-4 in Minitron (arXiv 2408.11796), 5e-5 transformers' default, 2e-5 that of TRL's SFT.
"""

from retort.config.cache import Cache

CACHE = Cache(method="top_p", min_probability=0.001, temperatures=(1.0,))
TEMPERATURE = 1.0
ALPHA = 0.1
# (parameters, the rate of students with fewer)
_RANDOM = ((1e6, 3e-3), (50e6, 1e-3), (250e6, 6e-4), (1e9, 3e-4), (7e9, 2e-4))
_PRETRAINED = ((1e9, 1e-4), (7e9, 5e-5))


def choose_learning_rate(num_parameters: int, *, is_pretrained: bool) -> float:
    """Return the peak learning rate for a student of a size, with weights of its own or random ones."""
    table, largest = (_PRETRAINED, 2e-5) if is_pretrained else (_RANDOM, 1e-4)
    return next((rate for below, rate in table if num_parameters < below), largest)


def choose_warmup(num_steps: int) -> int:
    """Return the steps in which the rate rises: a tenth of a short training, 2 % of a long one."""
    return min(num_steps // 10, max(100, num_steps // 50))
