"""A cache whose parts are objects in a store: the same one, and the same students, whatever is killed while it is made."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from retort.cache.reader import CACHE_FILE, LogitCache
from support.place import Place, sha256, snapshot, tiny, wait_until
from support.store import BUCKET, Store, serve_store

pytestmark = pytest.mark.slow

PREFIX = "ours/tiny"
URL = f"s3://{BUCKET}/{PREFIX}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with serve_store(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture
def place(fresh: Place, store: Store) -> Iterator[Place]:
    """The tiny workflow with an empty store, by commands of interpreters that see its settings."""
    fresh.write_config(tiny(output={"cache_dir": URL}))
    yield replace(fresh, env=fresh.env | store.env).as_it_is
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
    assert differing == {"mode", "file_bytes"} and mine["mode"] == "stored"
    assert place.cache.name == finished.cache.name, "the store is in no id"
    assert read_whole(place, store) == read_whole(finished, store)
    assert find_students(place) == find_students(finished)

    cache, stored = LogitCache(place.cache / CACHE_FILE), store.objects(PREFIX)
    folder = f"{PREFIX}/logits/{place.cache.name}/parts"
    urls = {place.url.removeprefix(f"s3://{BUCKET}/") for place in cache.stored}
    assert set(stored) == urls, "the parts, and nothing else"
    assert all(path.startswith(folder) for path in stored)
    assert not (place.cache / "parts").exists(), "receipts go once they are merged"

    # What is asked for: of each part a PUT, a GET to read it back and a HEAD; a list for each worker and for the merge;
    # of each batch that is trained on, or measured, what is not kept here yet.
    parts = len(stored)
    puts = [r for r in requests if r.method == "PUT" and "/parts/" in r.path]
    gets = [r for r in requests if r.method == "GET" and "/parts/" in r.path]
    lists = [r for r in requests if "list-type" in r.path]
    assert len(puts) == parts and len(lists) <= 2 + 1 + 2
    blocks = sum(-(-s.size // (1 << 20)) for s in cache.stored)
    measured = len(gets) - parts - 2 * blocks
    assert len(gets) <= parts + 2 * blocks + 60, (len(gets), parts, blocks, measured)
    assert place.plan() == {}
