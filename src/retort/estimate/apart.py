"""Measuring in a process of its own, whose memory is that of the measured work, as it is in the job."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def call_apart(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Return what a function returns in a new Python process. Raises what it raises."""
    # Not forked: a copy of this process would have its memory.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()
