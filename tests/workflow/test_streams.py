"""Streams and dealing through Snakemake, from the draw to the index."""

from pathlib import Path

from retort.io.files import read_json
from retort.tokens.index import IndexRecord
from support.place import Place, sha256, tiny, wait_until


def make_files(place: Place, number: int) -> None:
    lines = (place.path / "documents.jsonl").read_text().splitlines(keepends=True)
    (place.path / "data").mkdir()
    for file in range(number):
        (place.path / f"data/part-{file}.jsonl").write_text("".join(lines[file::number]))


def index_of(place: Place) -> Path:
    return place.path / place.find_output(r"tokens/\w+/index.json")


def test_a_stream_is_drawn_by_a_reader_for_each_shard_and_taken_up_after_a_kill(
    fresh: Place,
) -> None:
    make_files(fresh, 3)
    section = {"data_files": "data/*.jsonl", "streaming": True, "sharding": "files"}
    section |= {"max_samples": 60, "shuffle": True, "streaming_buffer_size": 8}
    fresh.write_config(tiny(dataset=section))
    undisturbed = fresh.copy_to(fresh.path.with_name("undisturbed"))
    target = str(index_of(fresh).relative_to(fresh.path))
    assert undisturbed.plan(target)["draw_corpus"] == 2
    undisturbed.snakemake(target)
    index = IndexRecord.read(undisturbed.path / target)
    assert index.counts.documents.read == 60
    process = fresh.start(target)
    wait_until(lambda: list(fresh.results.glob("corpora/*/.draw_*")), process=process)
    process.kill()
    process.wait()
    fresh.snakemake("--unlock")
    fresh.snakemake(target)
    assert sha256(fresh.path / target) == sha256(undisturbed.path / target)
    assert fresh.plan(target) == {}


def test_a_function_of_ones_own_deals_and_one_that_lies_is_refused(fresh: Place) -> None:
    fresh.write_config(tiny(dataset={"sharding": "mydeal:shard_of", "num_shards": 3}))
    said = fresh.try_snakemake("-n").output
    assert "names the module 'mydeal', which does not exist" in said
    code = "def shard_of(document_index, num_shards):\n    return document_index % 7 % num_shards\n"
    (fresh.path / "mydeal.py").write_text(code)
    target = str(index_of(fresh).relative_to(fresh.path))
    fresh.snakemake(target)
    assert IndexRecord.read(fresh.path / target).counts.documents.read == 120
    code = (
        "import random\ndef shard_of(document_index, num_shards):\n    return random.randrange(3)\n"
    )
    (fresh.path / "mydeal.py").write_text(code)
    other = str(index_of(fresh).relative_to(fresh.path))
    assert other != target
    failed = fresh.try_snakemake(other)
    assert failed.returncode != 0
    assert "'mydeal:shard_of' is not deterministic: document_index" in failed.output
    assert not (fresh.path / other).exists()


def test_a_stream_has_the_same_sequences_as_the_files_that_it_streams(fresh: Place) -> None:
    make_files(fresh, 3)
    found = []
    for streaming in (False, True):
        section = {"data_files": "data/*.jsonl", "streaming": streaming, "max_samples": 90}
        fresh.write_config(tiny(dataset=section))
        target = index_of(fresh)
        fresh.snakemake(str(target.relative_to(fresh.path)))
        found.append(read_json(target))
    assert found[0] == found[1]
