"""The sections `cache` and `merge`: what is stored of the teacher's distributions."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from retort.config.schema import Found, show
from retort.config.section import Count, NonEmptyUnique, Positive, Section

if TYPE_CHECKING:
    from retort.config.sections import Config


_METHOD_KEYS = {"top_k": "top_k", "top_p": "min_probability", "sampled": "head_probability"}


class Cache(Section):
    """What is stored of the teacher's distribution at each position."""

    method: Literal["top_k", "top_p", "sampled"] = "top_k"
    """top_k keeps the k most probable tokens, top_p every token above min_probability, sampled an exact head and an
    unbiased sample of the rest."""
    top_k: Count | Literal["full"] = 64
    """With method top_k, tokens kept per position; full keeps the whole vocabulary."""
    min_probability: Annotated[float, Field(ge=1e-06, lt=1)] | None = None
    """With method top_p, the smallest probability of a token that is kept; null means 0.001."""
    head_probability: Annotated[float, Field(ge=0.0001, lt=1)] | None = None
    """With method sampled, the smallest probability of a token that is stored exactly; null means 0.05."""
    temperatures: NonEmptyUnique[Positive] = (1.0, 2.0)
    """Temperatures at which the probability mass outside the kept tokens is stored (top_p and sampled round it to
    1/65,535)."""


class Merge(Section):
    """How the workers' parts are merged into one cache."""

    changes_ids: ClassVar[bool] = False

    mode: Literal["copy", "virtual"] = "copy"
    """copy makes one portable file and removes the parts; virtual refers to the parts and copies nothing."""
    accept_unlike_parts: bool = False
    """Merge parts that were computed on unlike devices (a CPU, models of GPUs), in unlike data types, or with other
    versions of torch or transformers. They round differently; with false it is an error."""


def check_method_keys(c: "Config") -> Found:
    method = c.cache.method
    for owner, key in _METHOD_KEYS.items():
        value = getattr(c.cache, key)
        if owner != method and value != getattr(Cache(), key):
            yield (
                f"cache.{key} is {show(value)}, but cache.method is {method}, which uses "
                f"cache.{_METHOD_KEYS[method]} instead. Remove cache.{key}, or set cache.method: {owner}."
            )


def check_temperatures(c: "Config") -> Found:
    stored = list(c.cache.temperatures)
    if 1.0 not in stored:
        yield (
            f"cache.temperatures is {stored}, but 1.0 must be among them: the kept tokens are stored at 1.0, and the "
            f"cache is measured there. Set cache.temperatures: {sorted([1.0, *stored])}."
        )
    elif c.cache.method == "sampled" and c.cache.temperatures not in (
        (1.0,),
        Cache().temperatures,
    ):
        yield (
            f"cache.temperatures is {stored}, but cache.method is 'sampled', whose samples are for temperature 1 only. "
            "Leave cache.temperatures out, or use cache.method: top_p."
        )
