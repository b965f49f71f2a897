"""A cache whose parts are objects in a store: the same one, and the same students, whatever is killed meanwhile."""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from retort.cache.reader import CACHE_FILE, LogitCache
from retort.cache.stored import BLOCK_BYTES
from retort.teacher.features import read_features
from support.forks import Forks
from support.place import REPOSITORY, Place, sha256, tiny, wait_until
from support.store import BUCKET, Store, Wire, serve_google_store, serve_store

pytestmark = pytest.mark.slow

PREFIX = "ours/tiny"
URL = f"s3://{BUCKET}/{PREFIX}"


@pytest.fixture(scope="module")
def store(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store whose clients' variables never change, so that they are forked too."""
    with serve_store(tmp_path_factory.mktemp("store")) as store:
        forks.serve(Place(REPOSITORY, env=store.env).environment())
        yield store


@pytest.fixture
def place(fresh: Place, store: Store) -> Iterator[Place]:
    """The tiny workflow, with an empty store."""
    fresh.write_config(tiny(output={"cache_dir": URL}))
    yield replace(fresh, env=fresh.env | store.env)
    files = store.open()
    if files.exists(f"{BUCKET}/{PREFIX}"):
        files.rm(f"{BUCKET}/{PREFIX}", recursive=True)


def read_manifest(place: Place) -> dict[str, object]:
    content: dict[str, object] = json.loads((place.cache / "manifest.json").read_text())
    return content


def find_students(place: Place) -> dict[str, str]:
    """Return the digests of the finished students' weights, by run."""
    found = place.results.glob("runs/*/*/final/model.safetensors")
    return {path.parents[2].name: sha256(path) for path in found}


def read_whole(place: Place, store: Store) -> list[bytes]:
    """Return every record of a cache."""
    os.environ.update(store.env)
    cache = LogitCache(place.cache / CACHE_FILE)
    return [cache.read_record(index) for index in range(len(cache))]


def test_is_the_cache_of_a_disk_and_makes_its_students(
    place: Place, finished: Place, store: Store
) -> None:
    before = len(store.requests())
    place.snakemake()
    requests = store.requests()[before:]
    mine, local = read_manifest(place), read_manifest(finished)
    differing = {key for key in mine if mine[key] != local[key]}
    assert differing == {"mode", "file_bytes", "digest"} and mine["mode"] == "stored"
    assert place.cache.name == finished.cache.name, "the store is in no id"
    assert read_whole(place, store) == read_whole(finished, store)
    assert find_students(place) == find_students(finished)

    cache, stored = LogitCache(place.cache / CACHE_FILE), store.objects(PREFIX)
    folder = f"{PREFIX}/logits/{place.cache.name}/parts"
    urls = {one.url.removeprefix(f"s3://{BUCKET}/") for one in cache.stored}
    assert set(stored) == urls, "the parts, and nothing else"
    assert all(path.startswith(folder) for path in stored)
    assert not (place.cache / "parts").exists(), "receipts go once they are merged"

    # What is asked for: of each part a PUT, a GET to read it back and a HEAD; lists, by each worker and the merge; each
    # training sequence that the teacher scored again; and the blocks that the one student with a teacher reads.
    (features,) = place.results.glob("validation/*/teacher_validation.safetensors")
    scored_again = len(read_features(features).train_sequences)
    blocks = sum(-(-one.size // BLOCK_BYTES) for one in cache.stored)
    of_parts = [
        request.method for request in requests if "/parts/" in request.path.partition("?")[0]
    ]
    assert of_parts.count("PUT") == of_parts.count("HEAD") == len(stored)
    assert of_parts.count("GET") <= len(stored) + scored_again + blocks
    assert sum("list-type" in request.path for request in requests) <= 2 * 2 + 1
    assert place.plan() == {}


def test_a_store_of_google_is_used_the_same_way(
    fresh: Place, finished: Place, forks: Forks, tmp_path: Path
) -> None:
    fresh.write_config(tiny(output={"cache_dir": f"gs://{BUCKET}/tiny/"}))
    with serve_google_store(tmp_path) as env:
        place = replace(fresh, env=fresh.env | env)
        forks.serve(place.environment())
        place.snakemake()
        os.environ.update(env)
        cache = LogitCache(place.cache / CACHE_FILE)
        local = LogitCache(finished.cache / CACHE_FILE)
        assert {one.url.partition("/logits/")[0] for one in cache.stored} == {f"gs://{BUCKET}/tiny"}
        for index in range(len(local)):
            assert cache.read_record(index) == local.read_record(index)
    assert find_students(place) == find_students(finished)


def test_a_kill_during_an_upload_leaves_whole_objects_and_the_same_command_goes_on(
    place: Place, finished: Place, store: Store
) -> None:
    wire = Wire(store)
    place = replace(place, env=place.env | wire.env)
    wire.hold(after=3)
    process = place.start("--quiet")
    wait_until(wire.is_held.is_set, process=process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # the store sees that the connection is gone
    before = store.objects(PREFIX)
    assert 0 < len(before) < len(read_index(place)["parts"])
    assert_whole(before)
    wire.release()
    mark = len(store.requests())
    place.snakemake("--unlock")
    place.snakemake()
    after = store.objects(PREFIX)
    assert_whole(after)
    assert before.items() <= after.items() and len(after) == len(read_index(place)["parts"])
    sent_again = [r.path for r in store.requests()[mark:] if r.method == "PUT"]
    assert not any(path in " ".join(sent_again) for path in before), (
        "what was stored is not sent again"
    )
    assert read_manifest(place)["sha256"] == read_manifest(finished)["sha256"]
    assert find_students(place) == find_students(finished)


def test_another_folder_of_results_finds_the_parts_in_the_store(
    place: Place, finished: Place, store: Store
) -> None:
    target = str((finished.cache / "manifest.json").relative_to(finished.path))
    place.snakemake(target)
    first = place.results.rename(place.path / "elsewhere")
    mark = len(store.requests())
    place.snakemake(target)
    assert not [r for r in store.requests()[mark:] if r.method == "PUT" and "/parts/" in r.path]
    assert sha256(place.cache / CACHE_FILE) == sha256(
        first / "logits" / place.cache.name / CACHE_FILE
    )
    logs = "".join(path.read_text() for path in place.path.glob("logs/generate_logits/*"))
    assert "is in the store already" in logs


def test_gc_names_the_objects_that_stay(place: Place, store: Store) -> None:
    place.snakemake()
    cache, kept = place.cache.name, store.objects(PREFIX)
    place.write_config(tiny(runs={"hard": {"training": {"distillation_type": "output"}}}))
    command = [sys.executable, "-m", "retort", "gc", "--keep", "tiny.yaml", "--yes"]
    said = place.execute(command).output
    assert f"aws s3 rm --recursive {URL}/logits/{cache}/parts" in said
    assert not list(place.results.glob("logits/*")) and store.objects(PREFIX) == kept


def test_a_store_that_cannot_be_used_stops_the_check(place: Place) -> None:
    place.write_config(tiny(output={"cache_dir": "s3://no-such-bucket/tiny"}))
    done = place.try_snakemake()
    assert done.returncode != 0 and "there is no bucket 'no-such-bucket'" in done.output
    assert not (place.path / "logs" / "generate_logits").exists()


def read_index(place: Place) -> dict[str, list[object]]:
    (path,) = place.results.glob("tokens/*/index.json")
    content: dict[str, list[object]] = json.loads(path.read_text())
    return content


def assert_whole(objects: dict[str, bytes]) -> None:
    """Assert that the bytes of every object are those that its name has the checksum of."""
    for path, content in objects.items():
        digits = path.removesuffix(".h5").rpartition("-")[2]
        assert hashlib.sha256(content).hexdigest().startswith(digits), path
