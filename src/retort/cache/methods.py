"""The codec of a config's `cache` section, and of a header."""

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.cache.codec import Codec, TokenOrder
from retort.cache.entropy_codec import EntropyCodec, choose_steps
from retort.cache.top_k_codec import TopKCodec
from retort.config.sections import Cache

# Defaults of cache.min_probability and cache.head_probability, as in the schema's descriptions.
_DEFAULT_PROBABILITY = {"top_p": 0.001, "sampled": 0.05}


def read_codec(entry: dict[str, Any]) -> Codec:
    """Return the codec of a header's entry. Raises ValueError for sizes that cannot be coded."""
    kind = TopKCodec if entry["method"] == "top_k" else EntropyCodec
    values = {field.name: entry[field.name] for field in fields(kind)}
    return kind(**values | {"temperatures": tuple(entry["temperatures"])})


def build_codec(
    cache: Cache, *, vocabulary: int, token_counts: NDArray[np.int64] | None = None
) -> Codec:
    """Return the codec of a `cache` section for a teacher whose output layer has `vocabulary` ids.

    token_counts int64 [at most V]: how often each id occurs in the training text; needed to write or read files.
    Raises ValueError when temperature 1, at which every cache is measured, is not among those stored, or when the
    vocabulary is too large for the method.
    """
    if 1.0 not in cache.temperatures:
        raise ValueError(
            f"cache.temperatures is {list(cache.temperatures)}, but the cache's fidelity is measured at temperature 1. "
            f"Add it: {sorted([1.0, *cache.temperatures])}."
        )
    if cache.method == "top_k":
        top_k = vocabulary if cache.top_k == "full" else min(int(cache.top_k), vocabulary)
        return TopKCodec(tuple(cache.temperatures), vocabulary, top_k)
    given = cache.min_probability if cache.method == "top_p" else cache.head_probability
    least = _DEFAULT_PROBABILITY[cache.method] if given is None else given
    order = None
    if token_counts is not None:
        order = TokenOrder.from_counts(token_counts, vocabulary=vocabulary).digest()
    # Temperature 1 comes first: sizes and levels are predicted from its tail. A sample is unbiased at no other.
    others = tuple(t for t in cache.temperatures if t != 1.0 and cache.method != "sampled")
    steps = choose_steps(cache.method, least)
    return EntropyCodec((1.0, *others), vocabulary, cache.method, least, steps, order)
