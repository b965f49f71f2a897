"""Which shard a document goes to: by its index, by its file, or by a function of one's own; and the proof of it.

Shards are read by jobs that know nothing of each other. Each therefore notes what it was dealt and what there was to
deal, as a number and a sum of hashes; `reconcile` compares them when all shards are there. A function that answers
differently in another process loses documents, and would do so without a word.
"""

import importlib
import json
import operator
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import xxhash

from retort.config.sections import Dataset

_TRIED = 10_000
_TRIAL_S = 300


@dataclass
class Dealt:
    """What one shard was dealt, beside what there was to deal: a number, and a sum of hashes modulo 2**64.

    The units are documents, by index; with `files`, the source's files.
    """

    number: int = 0
    hashes: int = 0
    number_of_all: int = 0
    hashes_of_all: int = 0

    def see(self, name: bytes, *, is_mine: bool) -> None:
        """Note one unit."""
        value = xxhash.xxh3_64_intdigest(name)
        self.number_of_all += 1
        self.hashes_of_all = (self.hashes_of_all + value) % 2**64
        if is_mine:
            self.number += 1
            self.hashes = (self.hashes + value) % 2**64

    def to_json(self) -> dict[str, int]:
        """Return the numbers as a JSON object."""
        return asdict(self)


def reconcile(shards: Iterable[Mapping[str, int]], *, sharding: str) -> None:
    """Raise ValueError where the shards were not dealt every unit exactly once. `shards` are as of `Dealt.to_json`."""
    dealt = [Dealt(**shard) for shard in shards]
    totals = {(d.number_of_all, d.hashes_of_all) for d in dealt}
    number = sum(d.number for d in dealt)
    unit = "files" if sharding == "files" else "documents"
    next_step = (
        "The source or the function changed while the shards were written: delete the shards' folder and run the same "
        "command again"
    )
    if ":" in sharding:
        next_step += "; the function must depend on document_index and num_shards alone"
    if len(totals) > 1:
        numbers = ", ".join(f"{n:,} {unit}" for n in sorted({n for n, _ in totals}))
        raise ValueError(
            f"dataset.sharding {sharding!r}: the shards do not agree on what there was to deal ({numbers}, in "
            f"{len(totals)} versions). {next_step}; of a dataset on the Hub, set dataset.revision to a commit."
        )
    [(number_of_all, hashes_of_all)] = totals
    if number == number_of_all and sum(d.hashes for d in dealt) % 2**64 == hashes_of_all:
        return
    lost = number_of_all - number
    what = (
        f"{lost:,} more were lost than repeated"
        if lost > 0
        else f"{-lost:,} more were repeated than lost"
        if lost < 0
        else "as many were lost as repeated"
    )
    raise ValueError(
        f"dataset.sharding {sharding!r} did not deal every one of {number_of_all:,} {unit} exactly once: the shards "
        f"hold {number:,}, {what}. {next_step}."
    )


def is_custom(dataset: Dataset) -> bool:
    """Say whether documents are dealt by the user's own function."""
    return ":" in dataset.sharding


def choose_sharding(dataset: Dataset, count: Callable[[], int]) -> Callable[[int], int]:
    """Return the function from a document's index to its shard; `count` gives the number of documents.

    Raises ValueError for a function that cannot be imported; it raises one for an answer that is no shard.
    """
    num_shards = dataset.num_shards
    if is_custom(dataset):
        return _checking(load_function(dataset.sharding), dataset)
    if dataset.sharding == "contiguous":
        assert not dataset.streaming, "config_checks refuses it"
        size = count()
        return lambda index: ((index + 1) * num_shards - 1) // size
    # With `files` an index says the shard too: a shard's documents are numbered shard, shard + num_shards, ...
    return lambda index: index % num_shards


def choose_files(dataset: Dataset, num_files: int, shard: int | None) -> list[int]:
    """Return the numbers of the files that are read, in order: all, or with `files` those of one shard."""
    files = range(num_files)
    return list(files if shard is None else files[shard :: dataset.num_shards])


def choose_quota(dataset: Dataset, shard: int | None) -> int:
    """Return how many documents are read of a split: max_samples, or with `files` one shard's even share of it."""
    if dataset.max_samples is None:
        return sys.maxsize
    if shard is None:
        return dataset.max_samples
    share, rest = divmod(dataset.max_samples, dataset.num_shards)
    return share + (shard < rest)


def require_files(dataset: Dataset, num_files: int) -> None:
    """Raise ValueError where `files` has fewer files than shards to deal them to."""
    if dataset.sharding == "files" and num_files < dataset.num_shards:
        raise ValueError(
            f"dataset.sharding is 'files' and dataset.num_shards is {dataset.num_shards}, but the source has "
            f"{num_files} file{'' if num_files == 1 else 's'}, so some shards would have none. Set "
            f"dataset.num_shards: {num_files} or less, or dataset.sharding: interleaved."
        )


# ---------------------------------------------------------------------------------------------------------
# A function of one's own


def find_module(name: str) -> Path:
    """Return the source file of a module, found without importing it, here or on PYTHONPATH.

    Raises ValueError where there is none.
    """
    first, *rest = name.split(".")
    with _here_first():
        spec = PathFinder.find_spec(first)  # whatever of that name may be loaded already
    if spec is not None and not rest and spec.origin is not None:
        return Path(spec.origin).resolve()
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        base = Path(folder).joinpath(*rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path.resolve()
    raise ValueError(
        f"dataset.sharding names the module {name!r}, which is not there (looked in {Path.cwd()} and on PYTHONPATH): "
        f"put {first}{'/' if rest else ''}{'/'.join(rest)}.py into the folder in which snakemake is started."
    )


def load_function(sharding: str) -> Callable[[int, int], Any]:
    """Import `module:function`. Raises ValueError, naming both, where that fails."""
    name, _, function = sharding.partition(":")
    path = find_module(name)
    try:
        with _here_first():
            module = importlib.import_module(name)
    except Exception as error:  # whatever the user's file does when it is imported
        raise ValueError(
            f"dataset.sharding {sharding!r}: {path} cannot be imported ({type(error).__name__}: {error}). Mend it; "
            f"`python -c 'import {name}'` shows the whole error."
        ) from error
    if Path(str(getattr(module, "__file__", None))).resolve() != path:
        raise ValueError(
            f"dataset.sharding {sharding!r}: another module named {name!r} is loaded already, from "
            f"{getattr(module, '__file__', 'Python itself')}. Give {path} another name."
        )
    found = getattr(module, function, None)
    if not callable(found):
        known = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(
            f"dataset.sharding {sharding!r}: {path} has no function {function!r}; it has "
            f"{', '.join(known) or 'none'}. Expected def {function}(document_index, num_shards) -> shard."
        )
    return found  # type: ignore[no-any-return]


def check_function(dataset: Dataset) -> int:
    """Try the user's function on the first indices, here and in another process; return how many were tried.

    The other process has other hash seeds and asks in reverse order. Raises ValueError for an answer that is no
    shard, or is another there than here.
    """
    number = min(dataset.max_samples or _TRIED, _TRIED)
    shard_of = choose_sharding(dataset, lambda: number)
    here = [shard_of(index) for index in range(number)]
    there = _ask_elsewhere(dataset, number)
    for index, (first, second) in enumerate(zip(here, there, strict=True)):
        if first != second:
            raise ValueError(
                f"dataset.sharding {dataset.sharding!r} is not the same everywhere: document_index {index}, num_shards "
                f"{dataset.num_shards} gave {first} in one process and {second} in another, so documents would be lost "
                "and repeated. It must depend on its two arguments alone: no chance, no time, no hash() of text, no "
                "counting of calls."
            )
    return number


def _ask_elsewhere(dataset: Dataset, number: int) -> list[int]:
    code = (
        "import json, sys; from retort.corpus.sharding import load_function; "
        "name, number, num_shards = json.loads(sys.argv[1]); function = load_function(name); "
        "answers = [int(function(i, num_shards)) for i in reversed(range(number))]; "
        "print(); print(json.dumps(answers[::-1]))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    asked = json.dumps([dataset.sharding, number, dataset.num_shards])
    done = subprocess.run(
        [sys.executable, "-c", code, asked],
        capture_output=True,
        text=True,
        check=False,
        timeout=_TRIAL_S,
        env=os.environ | {"PYTHONHASHSEED": seed},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ValueError(
            f"dataset.sharding {dataset.sharding!r} answered in one process, but failed in another: {last}. "
            "It must depend on document_index and num_shards alone."
        )
    answers: list[int] = json.loads(done.stdout.splitlines()[-1])
    return answers


def _checking(function: Callable[[int, int], Any], dataset: Dataset) -> Callable[[int], int]:
    """Return the function from an index to the user's answer, if that is a shard."""
    num_shards = dataset.num_shards

    def shard_of(index: int) -> int:
        try:
            answer = function(index, num_shards)
        except Exception as error:  # whatever the user's function raises
            raise ValueError(
                f"dataset.sharding {dataset.sharding!r} failed for document_index {index}, num_shards {num_shards} "
                f"({type(error).__name__}: {error}). Mend the function."
            ) from error
        if type(answer) is int and 0 <= answer < num_shards:  # quick: asked once a document
            return answer
        try:
            shard = (
                -1 if isinstance(answer, bool) else operator.index(answer)
            )  # numpy's integers too
        except TypeError:
            shard = -1
        if not 0 <= shard < num_shards:
            raise ValueError(
                f"dataset.sharding {dataset.sharding!r} returned {answer!r} for document_index {index}, num_shards "
                f"{num_shards}: expected a whole number from 0 to {num_shards - 1}. Mend the function."
            )
        return shard

    return shard_of


@contextmanager
def _here_first() -> Iterator[None]:
    """Look for modules in the folder in which snakemake is started, before anywhere else."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
