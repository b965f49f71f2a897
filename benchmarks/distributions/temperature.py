"""The one temperature of all positions: that at which a position has as many different samples as RS-KD reports.

Legend: P positions, V vocabulary.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

UNIQUE_TARGET = 12.3  # different ids in NUM_SAMPLES samples: RS-KD's table has 12.1 at 50
NUM_SAMPLES = 50


def count_unique(logprobs_PV: torch.Tensor) -> torch.Tensor:
    """Return the expected number of different ids in NUM_SAMPLES samples with replacement, of each position."""
    return -torch.expm1(NUM_SAMPLES * torch.log1p(-logprobs_PV.exp().clamp(max=1 - 1e-7))).sum(
        dim=-1
    )


def compute_mean_unique(logprobs_PV: NDArray[np.float32], temperature: float) -> float:
    """Return the mean over positions of `count_unique` at a temperature."""
    total = 0.0
    for start in range(0, len(logprobs_PV), 64):
        chunk = torch.from_numpy(np.array(logprobs_PV[start : start + 64]))
        total += count_unique(torch.log_softmax(chunk / temperature, dim=-1)).sum().item()
    return total / len(logprobs_PV)


def find_temperature(logprobs_PV: NDArray[np.float32]) -> float:
    """Return the temperature at which a position has UNIQUE_TARGET different ids on average.

    Bisection on every 16th position; then again, corrected by how all positions differ from these.
    """
    sample = np.array(logprobs_PV[::16])
    target, temperature = UNIQUE_TARGET, math.nan
    for attempt in range(2):
        low, high = 0.4, 2.0
        for _ in range(11):
            temperature = (low + high) / 2
            found = compute_mean_unique(sample, temperature)
            low, high = (temperature, high) if found < target else (low, temperature)
        if attempt == 0:
            target += found - compute_mean_unique(logprobs_PV, temperature)
    return temperature
