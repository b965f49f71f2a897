"""Assignment of documents to shards: by index, by file, or by a user's function; and its verification.

Shards are read by independent jobs. Each records what it was assigned and what the whole source has, as a count and a
sum of hashes; `check_assignments` compares these once all shards exist. Otherwise a user's function that is not
deterministic would silently lose documents.
"""

import importlib
import json
import operator
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, cast

import xxhash

from retort.config.sections import Dataset

_NUM_TRIED = 10_000
_TRIAL_TIMEOUT_S = 300


@dataclass
class Assignment:
    """What one shard was assigned (`number`, `hashes`) and what the whole source has (`..._of_all`).

    Counts, and sums of xxh3-64 hashes modulo 2**64, over the source's units: documents, or its files if sharding is
    `files`.
    """

    number: int = 0
    hashes: int = 0
    number_of_all: int = 0
    hashes_of_all: int = 0

    def add(self, name: bytes, *, is_mine: bool) -> None:
        """Count one unit of the source; `is_mine`: it is assigned to this shard."""
        value = xxhash.xxh3_64_intdigest(name)
        self.number_of_all += 1
        self.hashes_of_all = (self.hashes_of_all + value) % 2**64
        if is_mine:
            self.number += 1
            self.hashes = (self.hashes + value) % 2**64


def check_assignments(assigned: Sequence[Assignment], *, sharding: str) -> None:
    """Raise ValueError unless every unit was assigned to exactly one shard."""
    totals = {(a.number_of_all, a.hashes_of_all) for a in assigned}
    number = sum(a.number for a in assigned)
    unit = "files" if sharding == "files" else "documents"
    next_step = (
        "The source or the function changed while the shards were written: delete the shards' folder and rerun the "
        "same command"
    )
    if ":" in sharding:
        next_step += "; the function must depend only on document_index and num_shards"
    if len(totals) > 1:
        numbers = ", ".join(f"{n:,} {unit}" for n in sorted({n for n, _ in totals}))
        raise ValueError(
            f"dataset.sharding {sharding!r}: the shards were read from different versions of the source ({numbers}, "
            f"{len(totals)} versions). {next_step}; for a dataset on the Hub, set dataset.revision to a commit."
        )
    [(number_of_all, hashes_of_all)] = totals
    if number == number_of_all and sum(a.hashes for a in assigned) % 2**64 == hashes_of_all:
        return
    lost = number_of_all - number
    if lost > 0:
        what = f"{lost:,} more were lost than repeated"
    elif lost < 0:
        what = f"{-lost:,} more were repeated than lost"
    else:
        what = "as many were lost as repeated"
    raise ValueError(
        f"dataset.sharding {sharding!r} did not assign each of {number_of_all:,} {unit} to exactly one shard: the "
        f"shards have {number:,}, {what}. {next_step}."
    )


def is_custom(dataset: Dataset) -> bool:
    """Return whether documents are assigned by a user's function."""
    return ":" in dataset.sharding


def build_shard_function(dataset: Dataset, count: Callable[[], int]) -> Callable[[int], int]:
    """Return the function from a document's index to its shard; `count` returns the number of documents.

    Raises ValueError when a user's function cannot be imported; the returned function, when the result is not a shard.
    """
    num_shards = dataset.num_shards
    if is_custom(dataset):
        return _validated(load_shard_function(dataset.sharding), dataset)
    if dataset.sharding == "contiguous":
        assert not dataset.streaming, "retort.config.dataset refuses it"
        size = count()
        return lambda index: ((index + 1) * num_shards - 1) // size
    # With `files` too: a shard's documents are numbered shard, shard + num_shards, ...
    return lambda index: index % num_shards


def select_files(dataset: Dataset, num_files: int, shard: int | None) -> list[int]:
    """Return the numbers of the files to read, in order: all, or those of `shard` if sharding is `files`."""
    files = range(num_files)
    return list(files if shard is None else files[shard :: dataset.num_shards])


def compute_quota(dataset: Dataset, shard: int | None) -> int:
    """Return how many documents of a split to read at most: max_samples, or one shard's equal share of it."""
    if dataset.max_samples is None:
        return sys.maxsize
    if shard is None:
        return dataset.max_samples
    share, rest = divmod(dataset.max_samples, dataset.num_shards)
    return share + (shard < rest)


def require_enough_files(dataset: Dataset, num_files: int) -> None:
    """Raise ValueError when sharding is `files` and the source has fewer files than shards."""
    if dataset.sharding == "files" and num_files < dataset.num_shards:
        raise ValueError(
            f"dataset.sharding is 'files' and dataset.num_shards is {dataset.num_shards}, but the source has "
            f"{num_files} file{'' if num_files == 1 else 's'}, so some shards would have none. Set "
            f"dataset.num_shards: {num_files} or less, or dataset.sharding: interleaved."
        )


# ---------------------------------------------------------------------------------------------------------
# A user's function


def find_module(name: str) -> Path:
    """Return the source file of a module, found without importing it, in the working folder or on PYTHONPATH.

    Raises ValueError when there is none.
    """
    first, *rest = name.split(".")
    with _working_folder_first():
        spec = PathFinder.find_spec(first)  # even if a module of that name is loaded
    if spec is not None and not rest and spec.origin is not None:
        return Path(spec.origin).resolve()
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        base = Path(folder).joinpath(*rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path.resolve()
    raise ValueError(
        f"dataset.sharding names the module {name!r}, which does not exist (looked in {Path.cwd()} and on "
        f"PYTHONPATH): put {'/'.join([first, *rest])}.py into the folder in which snakemake is started."
    )


def load_shard_function(sharding: str) -> Callable[[int, int], Any]:
    """Return the function of `module:function`. Raises ValueError when it cannot be imported."""
    name, _, function = sharding.partition(":")
    path = find_module(name)
    try:
        with _working_folder_first():
            module = importlib.import_module(name)
    except Exception as error:  # anything in the user's file
        raise ValueError(
            f"dataset.sharding {sharding!r}: {path} cannot be imported ({type(error).__name__}: {error}). Fix it; "
            f"`python -c 'import {name}'` shows the whole error."
        ) from error
    if Path(str(getattr(module, "__file__", None))).resolve() != path:
        raise ValueError(
            f"dataset.sharding {sharding!r}: another module named {name!r} is loaded already, from "
            f"{getattr(module, '__file__', 'Python itself')}. Rename {path}."
        )
    found: Any = getattr(module, function, None)
    if not callable(found):
        known = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(
            f"dataset.sharding {sharding!r}: {path} has no function {function!r}; it has "
            f"{', '.join(known) or 'none'}. Expected def {function}(document_index, num_shards) -> shard."
        )
    return cast(Callable[[int, int], Any], found)


def check_shard_function(dataset: Dataset) -> int:
    """Call the user's function on the first 10,000 indices, here and in another process; return how many it was.

    The other process has another hash seed and goes in reverse order. Raises ValueError when a result is not a shard,
    or differs between the two.
    """
    number = min(dataset.max_samples or _NUM_TRIED, _NUM_TRIED)
    shard_of = build_shard_function(dataset, lambda: number)
    here = [shard_of(index) for index in range(number)]
    there = _call_in_other_process(dataset, number)
    for index, (first, second) in enumerate(zip(here, there, strict=True)):
        if first != second:
            raise ValueError(
                f"dataset.sharding {dataset.sharding!r} is not deterministic: document_index {index}, num_shards "
                f"{dataset.num_shards} gave {first} in one process and {second} in another, so documents would be lost "
                "and repeated. It must depend only on its two arguments: not on random numbers, the time, hash() of "
                "text or earlier calls."
            )
    return number


def _call_in_other_process(dataset: Dataset, number: int) -> list[int]:
    """Return the user's function's results for indices 0 to number - 1, from a new process."""
    code = (
        "import json, sys; from retort.corpus.sharding import load_shard_function; "
        "name, number, num_shards = json.loads(sys.argv[1]); function = load_shard_function(name); "
        "shards = [int(function(i, num_shards)) for i in reversed(range(number))]; "
        "print(); print(json.dumps(shards[::-1]))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    arguments = json.dumps([dataset.sharding, number, dataset.num_shards])
    done = subprocess.run(
        [sys.executable, "-c", code, arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=_TRIAL_TIMEOUT_S,
        env=os.environ | {"PYTHONHASHSEED": seed},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"dataset.sharding {dataset.sharding!r} worked in one process, but failed in another: {last}. "
            "It must depend only on document_index and num_shards."
        )
    shards: list[int] = json.loads(done.stdout.splitlines()[-1])
    return shards


def _validated(function: Callable[[int, int], Any], dataset: Dataset) -> Callable[[int], int]:
    """Return the function from an index to the user's result, which raises ValueError when that is not a shard."""
    num_shards = dataset.num_shards

    def shard_of(index: int) -> int:
        try:
            result = function(index, num_shards)
        except Exception as error:  # anything in the user's function
            raise ValueError(
                f"dataset.sharding {dataset.sharding!r} failed for document_index {index}, num_shards {num_shards} "
                f"({type(error).__name__}: {error}). Fix the function."
            ) from error
        if type(result) is int and 0 <= result < num_shards:  # the fast path, for every document
            return result
        try:
            shard = (
                -1 if isinstance(result, bool) else operator.index(result)
            )  # also numpy integers
        except TypeError:
            shard = -1
        if not 0 <= shard < num_shards:
            raise ValueError(
                f"dataset.sharding {dataset.sharding!r} returned {result!r} for document_index {index}, num_shards "
                f"{num_shards}: expected a whole number from 0 to {num_shards - 1}. Fix the function."
            )
        return shard

    return shard_of


@contextmanager
def _working_folder_first() -> Iterator[None]:
    """Search the working folder, in which snakemake is started, for modules before all others."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
