"""Values for a first config, with their evidence. The keys' defaults are the established ones; these serve better.

`retort init` writes them, the README and the examples use them (a test holds them to it), and `check_inputs` names them
where a costly default was left.

Cache: every token above 0.001. In bytes a position: stories260K 21 to 23 (top_k 64: 197; top_p 0.005 and sampled 0.01:
14), the demo's teacher 61, a teacher of 2 nats of entropy and 32,768 tokens 42 (top_k 64: 256; docs/benchmarks.md).

Held-out loss in nats of students with random weights, 200 steps of 1,024 tokens, means of three seeds, each method at
its best rate (5e-3 for 56k parameters, 3e-3 for 139k) but where another is named (`make benchmark-defaults`):

| teacher, parameters of the student            | stories260K, 56k | 139k | the demo's, 56k | 139k |
|-----------------------------------------------|------------------|------|-----------------|------|
| text alone                                    | 4.12             | 3.84 | 4.89            | 4.63 |
| text alone, at 1e-4                           | 5.86             | 5.56 | 5.99            | 5.80 |
| the keys' defaults: top_k 64, 2, 0.5, at 1e-4 | 5.84             | 5.52 | 5.96            | 5.75 |
| the same at the best rate                     | 4.07             | 3.75 | 4.75            | 4.64 |
| these: top_p 0.001, 1, 0.1                    | 3.90             | 3.49 | 4.41            | 4.15 |
| the same with temperature 2                   | 4.21             | 3.83 | 4.72            | 4.61 |
| the same with alpha 0                         | 3.93             | 3.53 | 4.40            | 4.13 |
| the same with alpha 0.5                       | 3.99             | 3.62 | 4.62            | 4.32 |
| top_k 64, 1, 0.1                              | 3.94             | 3.51 | 4.40            | 4.16 |
| sampled 0.01, 1, 0.1                          | 3.96             | 3.53 | 4.40            | 4.16 |

Learning rates above 1M parameters are not measured here. Random weights: Pythia (70M, of which 19M are not embeddings,
1e-3; 160M 6e-4; 410M and 1B 3e-4; 1.4B 2e-4; 6.9B 1.2e-4). Pretrained weights: 1e-4 in Minitron (arXiv 2408.11796, in
large batches), 5e-5 transformers' default, 2e-5 that of TRL's SFT.
"""

from retort.config.cache import Cache

CACHE = Cache(method="top_p", min_probability=0.001, temperatures=(1.0,))
TEMPERATURE = 1.0
ALPHA = 0.1
# (parameters, the rate of students with fewer)
_RANDOM = ((1e6, 3e-3), (50e6, 1e-3), (250e6, 6e-4), (1e9, 3e-4), (7e9, 2e-4))
_PRETRAINED = ((50e6, 1e-4), (1e9, 5e-5))


def choose_learning_rate(num_parameters: int, *, is_pretrained: bool) -> float:
    """Return the peak learning rate for a student of a size, with weights of its own or random ones."""
    table, largest = (_PRETRAINED, 2e-5) if is_pretrained else (_RANDOM, 1e-4)
    return next((rate for below, rate in table if num_parameters < below), largest)


def choose_warmup(num_steps: int) -> int:
    """Return the steps in which the rate rises: a tenth of a short training, 2 % of a long one."""
    return min(num_steps // 10, max(100, num_steps // 50))
