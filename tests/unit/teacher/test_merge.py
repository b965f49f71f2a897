"""Merging makes one measured cache and a manifest after any interruption, and refuses misaligned distributions."""

import importlib
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retort.cache.codec import SparseTargets
from retort.cache.kinds import PartKind, UnlikePartsError
from retort.cache.merged import merge_parts
from retort.cache.parts import build_header, part_path, write_part
from retort.cache.reader import CACHE_FILE, CacheHeader, LogitCache
from retort.cache.top_k_codec import TopKCodec
from retort.config.sections import Merge
from retort.io.files import read_json, write_json
from retort.models.heads import Head
from retort.teacher.claims import Claims
from retort.teacher.features import TeacherFeatures, digest_keys, write_features
from retort.teacher.merge import merge_h5
from retort.teacher.records import CacheRun, KindCount, Manifest
from retort.teacher.selection import select_top_k
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from support.jobs import make_job
from support.records import make_teacher_record, make_worker_record
from support.sections import section
from support.synthetic import TOKENIZER, make_table, split_targets, write_tokens

WIDTH = 300
CACHE = section("cache", top_k=5)
RECORD = make_teacher_record(tokenizer=TOKENIZER, vocabulary=WIDTH)


def logits_of(table: SequenceTable) -> Tensor:
    """A teacher's logits [P, V] at the counted positions: each sequence's follow from its content key."""
    pieces = []
    for i in range(len(table)):
        rng = np.random.default_rng(int.from_bytes(table[i].key[:7], "little"))
        pieces.append(3 * rng.standard_normal((table[i].num_positions, WIDTH)))
    return torch.from_numpy(np.concatenate(pieces)).float()


def targets_of(table: SequenceTable, codec: TopKCodec) -> SparseTargets:
    return select_top_k(logits_of(table), codec, num_tokens=TOKENIZER.size)


@dataclass(frozen=True)
class Place:
    """One folder of a cache to be merged, and what it is made from."""

    folder: Path
    index: TokenIndex
    header: CacheHeader
    sources: Path

    def merge(self, *, merge: Merge = section("merge"), **changes: Any) -> str:  # noqa: B008
        paths: dict[str, Any] = {
            "index_path": self.index.path,
            "fingerprint_path": self.sources / "fingerprint.json",
            "features_path": self.sources / "features.safetensors",
        }
        job = make_job(cache=CACHE, merge=merge)
        return merge_h5(self.manifest, job, **(paths | changes))

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def file(self) -> Path:
        return self.folder / CACHE_FILE

    @property
    def parts(self) -> Path:
        return self.folder / "parts"


def write_teacher_features(path: Path, index: TokenIndex, **changes: Any) -> None:
    places, training = index.read_sample(num_positions=40)
    tables = {"val": index.read_split("val"), "train": training}
    values: dict[str, Any] = {
        "features": {split: logits_of(table) for split, table in tables.items()},
        "train_sequences": places,
        "head": Head(None),
        "num_tokens": TOKENIZER.size,
        "teacher": RECORD.weights,
        "name": "synthetic",
        "num_parameters": 1,
        "keys": {split: digest_keys(table) for split, table in tables.items()},
    }
    write_features(path, TeacherFeatures(**(values | changes)))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    tables = [make_table(9, seed=0), make_table(8, seed=1, first_document=100)]
    index = write_tokens(folder, tables, chunk_size=3)
    RECORD.write(folder / "fingerprint.json")
    write_teacher_features(folder / "features.safetensors", index)
    return folder


@pytest.fixture
def prepare(sources: Path, tmp_path: Path) -> Callable[..., Place]:
    """A function that writes all parts into a new folder, in an order shuffled by `seed`."""

    def prepare(seed: int = 0, targets_of: Any = targets_of) -> Place:
        index = TokenIndex.read(sources / "index.json")
        header = build_header(index, RECORD, CACHE, source=sources / "fingerprint.json")
        place = Place(tmp_path / f"cache{seed}", index, header, sources)
        place.parts.mkdir(parents=True)
        order = list(index.parts)
        random.Random(seed).shuffle(order)
        for part in order:
            table = index.read_part(part)
            path = part_path(place.parts, part.name, header)
            targets = targets_of(table, header.codec)
            write_part(path, table, split_targets(targets, table), header)
        make_worker_record(tokens=seed).write(place.folder / "metadata_worker0.json")
        return place

    return prepare


def test_the_manifest_says_what_is_in_the_cache(prepare: Callable[..., Place]) -> None:
    place = prepare()
    line = place.merge()
    manifest, cache = Manifest.read(place.manifest), LogitCache(place.file)
    train = place.index.record.train
    assert (manifest.sequences, manifest.tokens) == (train.sequences, train.tokens)
    assert manifest.positions == train.positions
    assert manifest.file_bytes == place.file.stat().st_size
    assert manifest.bytes_per_position == cache.record_bytes / train.positions
    assert (manifest.method, manifest.top_k) == ("top_k", 5)
    assert manifest.header == place.header.to_json()
    assert f"{train.positions:,} positions" in line
    assert not place.parts.exists()
    assert CacheRun.read(place.folder / "run.json").workers == (make_worker_record(),)


def test_the_fidelity_of_a_true_cache_is_its_rounding(prepare: Callable[..., Place]) -> None:
    place = prepare()
    place.merge()
    found = Manifest.read(place.manifest).fidelity
    places, table = place.index.read_sample(num_positions=40)
    assert found is not None and found.positions == table.num_positions > 20
    # float16 rounds a logprob by up to 1 / 4096 of it; 0.6e-5 and 1.0e-5 were seen, by a last bit of one of them.
    assert found.kl < 2e-5
    assert found.agreement == 1.0
    assert isinstance(place.header.codec, TopKCodec)
    tail = np.exp(targets_of(table, place.header.codec).tail_logprobs[:, 0])
    assert found.tail_mass == pytest.approx(tail.mean(), rel=1e-5)
    assert len(places) > 1


def test_cache_and_manifest_are_the_same_whatever_order_the_parts_were_made_in(
    prepare: Callable[..., Place],
) -> None:
    places = [prepare(seed) for seed in range(3)]
    for place in places:
        place.merge()
    assert len({place.file.read_bytes() for place in places}) == 1
    assert len({place.manifest.read_bytes() for place in places}) == 1


def test_unlike_parts_are_merged_only_if_asked_for_and_the_record_says_so(
    prepare: Callable[..., Place], caplog: pytest.LogCaptureFixture
) -> None:
    expected, place = prepare(1), prepare()
    expected.merge()
    part = place.index.parts[0]
    table, path = place.index.read_part(part), part_path(place.parts, part.name, place.header)
    kind = PartKind("NVIDIA L4", "bfloat16", "2.13.0", "5.23.0")
    assert isinstance(place.header.codec, TopKCodec)
    targets = targets_of(table, place.header.codec)
    write_part(path, table, split_targets(targets, table), place.header, kind=kind)
    receipt = place.folder / "metadata_worker0.json"
    with pytest.raises(UnlikePartsError, match="unlike kinds"):
        place.merge()
    assert not receipt.exists(), "Snakemake runs the workers again"
    place.merge(merge=section("merge", accept_unlike_parts=True))
    assert "merge.accept_unlike_parts" in caplog.text and "1 part: NVIDIA L4" in caplog.text
    others = len(place.index.parts) - 1
    kinds = CacheRun.read(place.folder / "run.json").kinds
    assert kinds == (KindCount(kind=None, parts=others), KindCount(kind=kind, parts=1))
    assert place.file.read_bytes() == expected.file.read_bytes()
    assert place.manifest.read_bytes() == expected.manifest.read_bytes()


def test_a_merge_waits_for_a_part_that_a_worker_of_an_earlier_run_is_at(
    prepare: Callable[..., Place],
) -> None:
    place = prepare()
    part = place.index.parts[1]
    path = part_path(place.parts, part.name, place.header)
    elsewhere = path.rename(place.folder / "elsewhere.h5")
    claims = Claims(place.parts)
    with claims, claims.claim(part.name), ThreadPoolExecutor() as threads:
        merging = threads.submit(place.merge)
        with pytest.raises(TimeoutError):
            merging.result(timeout=0.5)
        elsewhere.rename(path)
        merging.result()
    assert place.manifest.exists()


def test_a_record_without_kinds_is_read(prepare: Callable[..., Place]) -> None:
    place = prepare()
    place.merge()
    path = place.folder / "run.json"
    old = read_json(path) | {"version": 2}
    del old["kinds"]
    write_json(path, old)
    assert CacheRun.read(path).kinds == ()


def test_parts_stay_until_the_manifest_is_written(
    prepare: Callable[..., Place], tmp_path: Path
) -> None:
    place = prepare()
    before = sorted(path.name for path in place.parts.iterdir())
    with pytest.raises(ValueError, match=r"absent\.safetensors"):
        place.merge(features_path=tmp_path / "absent.safetensors")
    place.manifest.mkdir()  # where no file can be written
    with pytest.raises(OSError, match="manifest"):
        place.merge()
    assert sorted(path.name for path in place.parts.iterdir()) == before
    place.manifest.rmdir()
    place.merge()
    assert not place.parts.exists()


def test_a_merge_without_its_manifest_needs_no_parts(prepare: Callable[..., Place]) -> None:
    place = prepare()
    place.merge()
    manifest, written = place.manifest.read_bytes(), place.file.stat()
    place.manifest.unlink()
    place.merge()
    assert place.manifest.read_bytes() == manifest
    assert place.file.stat().st_ino == written.st_ino
    assert place.file.stat().st_mtime_ns == written.st_mtime_ns


def test_missing_parts_are_all_named_and_nothing_is_made(prepare: Callable[..., Place]) -> None:
    place = prepare()
    removed = sorted(place.parts.glob("*.h5"))[:2]
    for path in removed:
        path.unlink()
    with pytest.raises(ValueError, match="2 of 6 parts cannot be merged") as caught:
        place.merge()
    assert all(str(path) in str(caught.value) for path in removed)
    assert not place.file.exists()
    assert len(list(place.parts.glob("*.h5"))) == 4


def test_parts_that_cannot_be_merged_are_there_to_be_made_again(
    prepare: Callable[..., Place],
) -> None:
    place = prepare()
    receipt = place.folder / "metadata_worker0.json"
    make_worker_record().write(receipt)
    missing, damaged, *good = sorted(place.parts.glob("*.h5"))
    missing.unlink()
    content = damaged.read_bytes()
    at = content.index(LogitCache(damaged).read_record(0)) + 3
    damaged.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(ValueError, match="2 of 6 parts cannot be merged"):
        place.merge()
    # With a receipt, or a file under the part's name, no worker would run again.
    assert not receipt.exists()
    assert sorted(place.parts.glob("*.h5")) == good
    damaged.with_suffix(".damaged").rename(damaged)
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match="1 of 6 parts cannot be merged"):
        place.merge()


@pytest.mark.parametrize(
    "moment", ["retort.cache.merged._read_parts", "retort.cache.merged._require_free_space"]
)
def test_of_two_merges_at_once_the_slower_one_finds_the_work_done(
    prepare: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The other one finishes, and removes the parts, just before this one reads or copies them."""
    place = prepare()
    module, name = moment.rsplit(".", 1)
    continue_ = getattr(importlib.import_module(module), name)

    def be_overtaken(*arguments: Any) -> Any:
        monkeypatch.undo()
        place.merge()
        assert not place.parts.exists()
        return continue_(*arguments)

    monkeypatch.setattr(moment, be_overtaken)
    place.merge()
    alone = prepare(1)
    alone.merge()
    assert place.file.read_bytes() == alone.file.read_bytes()
    assert place.manifest.read_bytes() == alone.manifest.read_bytes()


def test_a_damaged_merged_cache_is_merged_again_while_its_parts_are_there(
    prepare: Callable[..., Place],
) -> None:
    place = prepare()
    merge_parts(place.index, place.parts, place.header, place.file)
    whole = place.file.read_bytes()
    at = whole.index(LogitCache(place.file).read_record(0)) + 3
    for torn in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[: len(whole) // 2]):
        place.file.write_bytes(torn)
        kept = {path: path.read_bytes() for path in place.parts.glob("*.h5")}
        place.merge()
        assert place.file.read_bytes() == whole
        for path, content in kept.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        place.manifest.unlink()


def test_a_virtual_merge_keeps_its_parts_and_says_the_same(prepare: Callable[..., Place]) -> None:
    place, virtually = prepare(), section("merge", mode="virtual")
    said = place.merge(merge=virtually)
    virtual = read_json(place.manifest)
    assert len(list(place.parts.glob("*.h5"))) == len(place.index.parts)
    # A cache that is virtual stays so: its parts hold the only records.
    place.manifest.unlink()
    assert place.merge() == said
    assert read_json(place.manifest) == virtual
    place.manifest.unlink()
    place.file.unlink()
    assert place.merge() == said
    copied = read_json(place.manifest)
    assert (virtual.pop("mode"), copied.pop("mode")) == ("virtual", "copy")
    assert virtual.pop("file_bytes") < copied.pop("file_bytes")
    assert virtual.pop("digest") != copied.pop("digest")
    assert virtual == copied
    assert not place.parts.exists()


def test_a_virtual_cache_that_lost_a_part_is_merged_again(prepare: Callable[..., Place]) -> None:
    place, virtually = prepare(), section("merge", mode="virtual")
    place.merge(merge=virtually)
    place.manifest.unlink()
    min(place.parts.glob("*.h5")).unlink()
    with pytest.raises(ValueError, match="1 of 6 parts cannot be merged"):
        place.merge(merge=virtually)


def test_a_disk_without_room_for_the_merged_cache_is_said_before_it_is_begun(
    prepare: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = prepare()
    free = shutil.disk_usage(place.folder)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(ValueError, match=r"has only 0\.0 MB free.*nothing is lost"):
        place.merge()
    assert not place.file.exists() and len(list(place.parts.glob("*.h5"))) == 6
    assert (place.folder / "metadata_worker0.json").exists(), "no worker has to run again"


def test_a_merge_killed_at_any_moment_is_finished_by_the_same_call(
    prepare: Callable[..., Place],
) -> None:
    whole = prepare(0)
    started = time.monotonic()
    whole.merge()
    seconds = time.monotonic() - started
    # A fork starts at once; it may not be able to use torch, but it only lives to be killed.
    processes, rng = multiprocessing.get_context("fork"), random.Random(0)
    killed = 0
    for seed in range(1, 6):
        place = prepare(seed)
        process = processes.Process(target=place.merge)
        process.start()
        limit = time.monotonic() + 30
        while not list(place.folder.glob(".*.tmp")) and not place.file.exists():
            assert time.monotonic() < limit
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        process.join()
        killed += process.exitcode == -9
        place.merge()
        assert place.file.read_bytes() == whole.file.read_bytes()
        assert place.manifest.read_bytes() == whole.manifest.read_bytes()
        assert not place.parts.exists()
    assert killed > 0


def rolled(table: SequenceTable, codec: TopKCodec) -> SparseTargets:
    """Return every distribution one position too late, as an off-by-one error of the worker would write it."""
    found = targets_of(table, codec)
    columns: list[Any] = [*found.to_rows(), found.tail_logprobs]
    return SparseTargets.from_rows(*(np.roll(column, 1, axis=0) for column in columns))


def test_a_cache_shifted_by_one_position_is_refused(prepare: Callable[..., Place]) -> None:
    place = prepare(targets_of=rolled)
    with pytest.raises(ValueError, match=r"does not hold this teacher's distributions") as caught:
        place.merge()
    assert str(place.file) in str(caught.value)
    assert not place.manifest.exists()
    assert place.parts.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": "another"}, "was scored by teacher another"),
        ({"train_sequences": np.array([0, 1])}, "was scored on other train sequences"),
        ({"train_sequences": np.array([10**6])}, "was scored on other train sequences"),
    ],
    ids=["teacher", "sequences", "beyond"],
)
def test_fidelity_is_measured_against_the_same_teacher_on_the_same_sequences(
    prepare: Callable[..., Place], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    place = prepare()
    path = tmp_path / "other.safetensors"
    write_teacher_features(path, place.index, **changes)
    with pytest.raises(ValueError, match=says) as caught:
        place.merge(features_path=path)
    assert str(path) in str(caught.value)
    assert place.parts.exists()


def test_without_features_the_fidelity_is_not_measured(prepare: Callable[..., Place]) -> None:
    place = prepare()
    assert "its fidelity was not measured" in place.merge(features_path=None)
    assert Manifest.read(place.manifest).fidelity is None


def test_a_merged_cache_of_something_else_is_refused(
    prepare: Callable[..., Place], tmp_path: Path
) -> None:
    place = prepare()
    place.merge()
    other = tmp_path / "fingerprint.json"
    RECORD.model_copy(update={"weights": "other"}).write(other)
    with pytest.raises(ValueError, match="made with another teacher"):
        place.merge(fingerprint_path=other)
