"""Sharding by index, by file and by a user's function; lost and repeated documents are detected."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retort.artifacts.build import build_project
from retort.config.load import load_runs
from retort.config.sections import Dataset
from retort.corpus.checking import check_corpus
from retort.corpus.documents import Counts
from retort.corpus.reading import list_corpus_files, read_shard_documents
from retort.corpus.sharding import Assignment, check_assignments, check_shard_function, find_module
from support.corpora import DEFAULTS, read_all, read_shards, refusal, write_jsonl
from support.sections import replace

MakeDataset = Callable[..., Dataset]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeDataset:
    """A function to the section of 40 documents in 4 files, sharded by a function with the given body."""
    for file in range(4):
        rows = [{"text": f"file {file} row {row}"} for row in range(10)]
        write_jsonl(tmp_path / f"{file}.jsonl", rows)
    monkeypatch.chdir(tmp_path)

    def make_dataset(
        body: str = "return document_index % num_shards", head: str = "", **keys: Any
    ) -> Dataset:
        for name in [n for n in sys.modules if n.startswith("my_")]:
            del sys.modules[name]
        Path("my_sharding.py").write_text(
            f"{head}\ndef shard_of(document_index, num_shards):\n    {body}\n"
        )
        os.utime(
            "my_sharding.py", (1, len(body))
        )  # or Python may use the bytecode of another test's module
        every = {"name": "json", "data_files": "*.jsonl", "sharding": "my_sharding:shard_of"}
        return replace(DEFAULTS, **every | {"num_shards": 3} | keys)

    return make_dataset


def assign_all(dataset: Dataset) -> list[Assignment]:
    """What each shard records."""
    records = []
    for shard in range(dataset.num_shards):
        assignment = Assignment()
        documents = read_shard_documents(
            dataset,
            shard=shard,
            num_shards=dataset.num_shards,
            counts=Counts(),
            assignment=assignment,
        )
        list(documents)
        records.append(assignment)
    return records


@pytest.mark.parametrize("sharding", ["interleaved", "contiguous", "files", "my_sharding:shard_of"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("max_samples", [None, 17])
def test_every_sharding_assigns_every_document_once(
    make: MakeDataset, sharding: str, shuffle: bool, max_samples: int | None
) -> None:
    keys = {"sharding": sharding, "shuffle": shuffle, "max_samples": max_samples}
    dataset = make("return (document_index // 4) % num_shards", **keys)
    shards, counts = read_shards(dataset, 3)
    indices = [d.index for shard in shards for d in shard]
    assert len(indices) == len(set(indices)) == counts.read == (max_samples or 40)
    assert len({d.text for shard in shards for d in shard}) == counts.read
    assert all([d.index for d in shard] == sorted(d.index for d in shard) for shard in shards)
    check_assignments(assign_all(dataset), sharding=sharding)


def test_sharding_by_files_keeps_files_whole_and_splits_max_samples_evenly(
    make: MakeDataset,
) -> None:
    dataset = make(sharding="files")
    shards, _ = read_shards(dataset, 3)
    files = [{int(d.text.split()[1]) for d in shard} for shard in shards]
    assert files == [{0, 3}, {1}, {2}]
    assert [d.index for d in shards[1]] == list(range(1, 31, 3))
    few, _ = read_shards(replace(dataset, max_samples=11), 3)
    assert [len(shard) for shard in few] == [4, 4, 3]
    for shard, whole in zip(few, shards, strict=True):
        assert [d.text for d in shard] == [d.text for d in whole[: len(shard)]]
    with pytest.raises(
        ValueError, match=r"num_shards is 5, but the source has 4 files.*: 4 or less"
    ):
        list_corpus_files(replace(dataset, num_shards=5))


@pytest.mark.parametrize("result", ["True", "None", "1.0", "3", "-1", "'0'"])
def test_a_result_that_is_not_a_shard_is_refused(make: MakeDataset, result: str) -> None:
    dataset = make(f"return {result} if document_index == 7 else 0")
    said = f"returned {result} for document_index 7, num_shards 3: expected a whole"
    assert said in refusal(dataset)
    with pytest.raises(ValueError, match="document_index 7"):
        read_all(replace(dataset, num_shards=3))


def test_a_numpy_integer_is_a_shard(make: MakeDataset) -> None:
    dataset = make("return numpy.int64(document_index % num_shards)", head="import numpy")
    assert check_shard_function(dataset) == 10_000
    assert check_shard_function(replace(dataset, max_samples=5)) == 5


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("", "return hash(str(document_index)) % num_shards"),
        ("import random", "return random.randrange(num_shards)"),
        ("import itertools; calls = itertools.count()", "return next(calls) % num_shards"),
        (
            "import os; own = int.from_bytes(os.urandom(8))",  # of each process
            "return (own * document_index >> 20) % num_shards",
        ),
    ],
)
def test_a_function_that_is_not_deterministic_is_refused(
    make: MakeDataset, head: str, body: str
) -> None:
    dataset = make(body, head=head, num_shards=101)
    with pytest.raises(ValueError, match=r"is not deterministic: document_index \d+.* gave \d+ in"):
        check_corpus(dataset)


def test_lost_and_repeated_documents_are_detected(make: MakeDataset) -> None:
    """As from a function that changes after the ten thousand tried indices, or with the date."""
    right = assign_all(make())
    wrong = assign_all(make("return 0 if document_index < 5 else document_index % num_shards"))
    with pytest.raises(ValueError, match=r"shards have 43, 3 more were repeated than lost"):
        check_assignments([wrong[0], *right[1:]], sharding="my_sharding:shard_of")
    with pytest.raises(ValueError, match=r"shards have 37, 3 more were lost than repeated"):
        check_assignments([right[0], *wrong[1:]], sharding="my_sharding:shard_of")
    shorter = assign_all(make(max_samples=30))
    with pytest.raises(ValueError, match=r"different versions of the source \(30 .*, 40 "):
        check_assignments([shorter[0], *right[1:]], sharding="interleaved")


@pytest.mark.parametrize(
    ("sharding", "said"),
    [
        ("nowhere:f", "names the module 'nowhere', which does not exist (looked in "),
        ("package.nowhere:f", "put package/nowhere.py into the folder in which snakemake"),
        (
            "my_sharding:f",
            "my_sharding.py has no function 'f'; it has shard_of. Expected def f(document_index",
        ),
        ("broken:f", "broken.py cannot be imported (ZeroDivisionError: division by zero)"),
        ("json:f", "another module named 'json' is loaded already"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused_with_the_next_step(
    make: MakeDataset, sharding: str, said: str
) -> None:
    Path("broken.py").write_text("1 / 0\n")
    Path("json.py").write_text("def f(document_index, num_shards): return 0\n")
    assert said in refusal(replace(make(), sharding=sharding))


def test_a_function_in_a_package_is_found_and_imported(make: MakeDataset) -> None:
    Path("my_package").mkdir()
    Path("my_package/__init__.py").touch()
    Path("my_package/even.py").write_text("def f(document_index, num_shards): return 0\n")
    assert find_module("my_package.even") == Path("my_package/even.py").resolve()
    assert check_shard_function(replace(make(), sharding="my_package.even:f", max_samples=3)) == 3


def test_an_edited_function_changes_the_corpus_id_and_a_moved_one_does_not(
    make: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("student.json").write_text('{"model_type": "llama"}')

    def name() -> str:
        section: dict[str, Any] = {"name": "json", "data_files": str(tmp_path / "*.jsonl")}
        section |= {"sharding": "my_sharding:shard_of", "num_shards": 3}
        student = {"config": str(tmp_path / "student.json")}
        raw = {"dataset": section, "student": student, "teacher": {"model_path": "a/b"}}
        (corpus,) = build_project(load_runs(raw)).corpora
        return corpus

    make()
    first = name()
    text = Path("my_sharding.py").read_text()
    make("return 0")
    assert name() != first
    Path("elsewhere").mkdir()
    Path("elsewhere/my_sharding.py").write_text(text)
    monkeypatch.chdir("elsewhere")
    assert name() == first
