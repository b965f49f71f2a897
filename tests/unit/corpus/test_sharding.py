"""Dealing: by files, by a function of one's own, and the proof that every document was dealt exactly once."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retort.artifacts.plan import plan_project
from retort.config.load import load_runs
from retort.config.sections import Dataset
from retort.corpus.documents import Counts
from retort.corpus.reading import check_corpus, corpus_files, read_documents
from retort.corpus.sharding import Dealt, check_function, find_module, reconcile
from unit.corpus.test_reading import DEFAULTS, read_all, read_shards, write_jsonl

Deal = Callable[..., Dataset]


@pytest.fixture
def deal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deal:
    """A corpus of 40 documents in 4 files, dealt by a function whose body is given."""
    for file in range(4):
        rows = [{"text": f"file {file} row {row}"} for row in range(10)]
        write_jsonl(tmp_path / f"{file}.jsonl", rows)
    monkeypatch.chdir(tmp_path)

    def make(body: str = "return document_index % num_shards", head: str = "", **keys: Any) -> Any:
        for name in [n for n in sys.modules if n.startswith("mydeal")]:
            del sys.modules[name]
        Path("mydeal.py").write_text(
            f"{head}\ndef shard_of(document_index, num_shards):\n    {body}\n"
        )
        os.utime("mydeal.py", (1, len(body)))  # else Python may take bytecode of another test's
        every = {"name": "json", "data_files": "*.jsonl", "sharding": "mydeal:shard_of"}
        return replace(DEFAULTS, **every | {"num_shards": 3} | keys)

    return make


def deal_all(dataset: Dataset) -> list[dict[str, int]]:
    """What each shard notes."""
    noted = []
    for shard in range(dataset.num_shards):
        dealt = Dealt()
        options = {"shard": shard, "num_shards": dataset.num_shards, "counts": Counts()}
        list(read_documents(dataset, dealt=dealt, **options))
        noted.append(dealt.to_json())
    return noted


@pytest.mark.parametrize("sharding", ["interleaved", "contiguous", "files", "mydeal:shard_of"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("max_samples", [None, 17])
def test_every_way_to_deal_deals_everything_once(
    deal: Deal, sharding: str, shuffle: bool, max_samples: int | None
) -> None:
    keys = {"sharding": sharding, "shuffle": shuffle, "max_samples": max_samples}
    dataset = deal("return (document_index // 4) % num_shards", **keys)
    shards, counts = read_shards(dataset, 3)
    indices = [d.index for shard in shards for d in shard]
    assert len(indices) == len(set(indices)) == counts.read == (max_samples or 40)
    assert len({d.text for shard in shards for d in shard}) == counts.read
    assert all([d.index for d in shard] == sorted(d.index for d in shard) for shard in shards)
    reconcile(deal_all(dataset), sharding=sharding)


def test_files_are_dealt_whole_and_max_samples_evenly(deal: Deal) -> None:
    dataset = deal(sharding="files")
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
        corpus_files(replace(dataset, num_shards=5))


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("True", "True"),
        ("None", "None"),
        ("1.0", "1.0"),
        ("3", "3"),
        ("-1", "-1"),
        ("'0'", "'0'"),
    ],
)
def test_an_answer_that_is_no_shard_is_refused(deal: Deal, answer: str, shown: str) -> None:
    dataset = deal(f"return {answer} if document_index == 7 else 0")
    with pytest.raises(ValueError) as caught:
        check_corpus(dataset)
    assert f"returned {shown} for document_index 7, num_shards 3: expected a whole" in str(
        caught.value
    )
    with pytest.raises(ValueError, match="document_index 7"):
        read_all(replace(dataset, num_shards=3))


def test_an_integer_of_numpy_is_a_shard(deal: Deal) -> None:
    dataset = deal("return numpy.int64(document_index % num_shards)", head="import numpy")
    assert check_function(dataset) == 10_000
    assert check_function(replace(dataset, max_samples=5)) == 5


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("", "return hash(str(document_index)) % num_shards"),
        ("import random", "return random.randrange(num_shards)"),
        ("import itertools; calls = itertools.count()", "return next(calls) % num_shards"),
        ("import os", "return os.getpid() * document_index % num_shards"),
    ],
)
def test_a_function_that_answers_otherwise_elsewhere_is_refused(
    deal: Deal, head: str, body: str
) -> None:
    dataset = deal(body, head=head, num_shards=101)
    with pytest.raises(
        ValueError, match=r"not the same everywhere: document_index \d+.* gave \d+ in"
    ):
        check_corpus(dataset)


def test_a_function_that_loses_and_repeats_is_found_at_the_end(deal: Deal) -> None:
    """As by an answer that changes after the first ten thousand documents, or with the day."""
    honest = deal_all(deal())
    lies = deal_all(deal("return 0 if document_index < 5 else document_index % num_shards"))
    with pytest.raises(ValueError, match=r"shards hold 43, 3 more were repeated than lost"):
        reconcile([lies[0], *honest[1:]], sharding="mydeal:shard_of")
    with pytest.raises(ValueError, match=r"shards hold 37, 3 more were lost than repeated"):
        reconcile([honest[0], *lies[1:]], sharding="mydeal:shard_of")
    shorter = deal_all(deal(max_samples=30))
    with pytest.raises(ValueError, match=r"do not agree on what there was to deal \(30 .*, 40 "):
        reconcile([shorter[0], *honest[1:]], sharding="interleaved")


@given(
    size=st.integers(1, 40), change=st.integers(0, 39), shards=st.integers(2, 5), seed=st.integers()
)
def test_no_exchange_of_documents_goes_unnoticed(
    size: int, change: int, shards: int, seed: int
) -> None:
    dealt = [Dealt() for _ in range(shards)]
    for index in range(size):
        for shard, note in enumerate(dealt):
            owner = (index + (index == change % size)) % shards if shard == 0 else index % shards
            note.see(index.to_bytes(8, "little"), is_mine=owner == shard)
    noted = [d.to_json() for d in dealt]
    moved = change % size
    if moved % shards == 0 or (moved + 1) % shards == 0:  # shard 0 gave it away, or took it too
        with pytest.raises(ValueError, match="exactly once"):
            reconcile(noted, sharding="mydeal:shard_of")
    else:
        reconcile(noted, sharding="mydeal:shard_of")


@pytest.mark.parametrize(
    ("sharding", "said"),
    [
        ("nowhere:f", "names the module 'nowhere', which is not there (looked in "),
        ("package.nowhere:f", "put package/nowhere.py into the folder in which snakemake"),
        (
            "mydeal:f",
            "mydeal.py has no function 'f'; it has shard_of. Expected def f(document_index",
        ),
        ("broken:f", "broken.py cannot be imported (ZeroDivisionError: division by zero)"),
        ("json:f", "another module named 'json' is loaded already"),
    ],
)
def test_a_function_that_is_not_there_is_said_in_one_sentence(
    deal: Deal, sharding: str, said: str
) -> None:
    Path("broken.py").write_text("1 / 0\n")
    Path("json.py").write_text("def f(document_index, num_shards): return 0\n")
    with pytest.raises(ValueError) as caught:
        check_corpus(replace(deal(), sharding=sharding))
    assert said in str(caught.value)


def test_a_module_in_a_package_is_found_and_imported(deal: Deal) -> None:
    Path("mydealers").mkdir()
    Path("mydealers/__init__.py").touch()
    Path("mydealers/even.py").write_text("def f(document_index, num_shards): return 0\n")
    assert find_module("mydealers.even") == Path("mydealers/even.py").resolve()
    assert check_function(replace(deal(), sharding="mydealers.even:f", max_samples=3)) == 3


def test_an_edited_function_makes_another_corpus_and_a_moved_one_does_not(
    deal: Deal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("student.json").write_text('{"model_type": "llama"}')

    def name() -> str:
        section = {"name": "json", "data_files": str(tmp_path / "*.jsonl")}
        section |= {"sharding": "mydeal:shard_of", "num_shards": 3}
        student = {"config": str(tmp_path / "student.json")}
        raw = {"dataset": section, "student": student, "teacher": {"model_path": "a/b"}}
        (corpus,) = plan_project(load_runs(raw)).corpora
        return corpus

    deal()
    first = name()
    text = Path("mydeal.py").read_text()
    deal("return 0")
    assert name() != first
    Path("elsewhere").mkdir()
    Path("elsewhere/mydeal.py").write_text(text)
    monkeypatch.chdir("elsewhere")
    assert name() == first
