"""Digests depend on content only; readers never see a half-written file."""

import errno
import fcntl
import os
import platform
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from retort.config.schema import flatten
from retort.io.digests import digest, digest_file
from retort.io.files import (
    file_lock,
    read_json,
    remove_stale_temporaries,
    replacing,
    require_writable,
    temporary_name,
    write_atomically,
    write_json,
)
from retort.io.fingerprints import fingerprint_tokenizer, fingerprint_weights
from retort.io.run_record import RunRecord, describe_run, name_cpu
from support.sections import section

MIB = 1 << 20


def test_a_digest_is_of_the_value_not_of_the_order_of_its_keys() -> None:
    value = {"top_k": 8, "temperatures": [1.0, 2.0], "revision": None}
    reordered = {"revision": None, "temperatures": [1.0, 2.0], "top_k": 8}
    assert digest(value) == digest(reordered) == "daf9acbdd57a"
    assert digest(value | {"top_k": 8.0}) != digest(value) != digest(value | {"revision": ""})


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_bytes(random.Random(0).randbytes(17 * MIB))
    return path


def flip(path: Path, place: int) -> None:
    """Change one bit, and put the modification time back to what it was."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_cached_digest_notices_a_change_that_keeps_size_and_date(big: Path) -> None:
    memo = big.parent / "made" / "memo.json"
    first = digest_file(big, memos=[memo])
    assert first == digest_file(big)
    time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
    flip(big, 5 * MIB)
    assert digest_file(big, memos=[memo]) == digest_file(big) != first


def test_a_cached_digest_is_not_computed_again(big: Path) -> None:
    memo = big.parent / "memo.json"
    digest_file(big, memos=[memo])
    known = read_json(memo)
    (key,) = known
    known[key][-1] = "cached"
    write_json(memo, known)
    assert digest_file(big, memos=[memo]) == "cached"


def test_what_one_memo_knows_is_written_to_the_others(big: Path) -> None:
    """As on a cluster whose nodes share the results, but no home."""
    home, others, shared = (big.parent / f"{name}.json" for name in ("home", "others", "shared"))
    known = digest_file(big, memos=[home])
    content = read_json(home)
    content[str(big)][-1] = "cached"
    write_json(home, content)
    assert digest_file(big, memos=[shared, home]) == "cached" != known
    assert digest_file(big, memos=[shared, others]) == "cached"
    assert read_json(others) == read_json(shared) == content


def test_a_damaged_or_unwritable_memo_is_not_used(big: Path) -> None:
    memo = big.parent / "memo.json"
    memo.write_text('{"torn": [1, ')
    assert digest_file(big, memos=[memo]) == digest_file(big)
    assert digest_file(big, memos=[big / "below a file" / "memo.json"]) == digest_file(big)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    rng = random.Random(0)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "small.safetensors").write_bytes(rng.randbytes(1000))
    (folder / "big.safetensors").write_bytes(rng.randbytes(20 * MIB))
    return folder


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("config.json", 3),
        ("small.safetensors", 0),
        ("small.safetensors", 999),
        *[("big.safetensors", place) for place in (0, 7 * MIB + 5, 13 * MIB, 20 * MIB - 1)],
    ],
)
def test_one_bit_of_the_weights_changes_their_fingerprint(
    model: Path, name: str, place: int
) -> None:
    before = fingerprint_weights(model)
    flip(model / name, place)
    changed = fingerprint_weights(model)
    flip(model / name, place)
    assert changed != before == fingerprint_weights(model)


def test_a_user_without_a_home_gets_the_same_fingerprints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    expected = fingerprint_weights(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54_321)  # not in /etc/passwd
    with pytest.raises(RuntimeError):
        Path.home()
    assert fingerprint_weights(tmp_path) == expected


def test_a_moved_model_keeps_its_fingerprint_and_other_files_are_ignored(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b" / "c"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
    (folders[1] / "README.md").write_text("notes")
    assert fingerprint_weights(folders[0]) == fingerprint_weights(folders[1])


def test_a_folder_without_weights_or_tokenizer_is_refused(tmp_path: Path) -> None:
    for fingerprint in (fingerprint_weights, fingerprint_tokenizer):
        with pytest.raises(ValueError, match=str(tmp_path)):
            fingerprint(tmp_path)
    with pytest.raises(ValueError, match="absent"):
        fingerprint_weights(tmp_path / "absent")


def test_one_byte_of_any_tokenizer_file_changes_its_fingerprint(tmp_path: Path) -> None:
    found = set()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
        found.add(fingerprint_tokenizer(tmp_path))
        (tmp_path / name).write_text("{ ")
        found.add(fingerprint_tokenizer(tmp_path))
    assert len(found) == 6


WRITER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from retort.io.files import write_json
path, number = Path(sys.argv[1]), int(sys.argv[2])
while True:
    write_json(path, {"number": number, "filler": ["x" * 100] * (number * 7919 % 3000)})
    number += 1
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path, rng = tmp_path / "state.json", random.Random(0)
    number = 0
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(number + 1)])
        limit = time.monotonic() + 20
        while (not path.exists() or read_json(path)["number"] <= number) and writer.poll() is None:
            assert time.monotonic() < limit
        stop = time.monotonic() + rng.uniform(0, 0.05)
        while time.monotonic() < stop:  # readers see whole files only
            read_json(path)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        found = read_json(path)
        assert found["number"] > number
        number = found["number"]


def test_a_write_replaces_the_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for value in ({"a": 1}, [1.5, None, "\u00e9"]):
        write_json(path, value)
        assert read_json(path) == value
    write_atomically(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "loss.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b'{"worker": ', b"\xff\xfe"])
def test_a_file_that_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metadata_worker0.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"metadata_worker0\.json is not JSON \(.*delete it"):
        read_json(path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(ValueError, match=r"\.lock cannot be locked.*-o flock.*results_dir"),
        file_lock(tmp_path / ".lock", busy=""),
    ):
        pass
    with pytest.raises(ValueError, match=r"does not support flock.*-o flock.*output\.results_dir"):
        require_writable(tmp_path / "results")  # before any job


def test_old_temporaries_and_those_of_dead_writers_are_removed(tmp_path: Path) -> None:
    old, young = temporary_name(tmp_path / "old.h5"), temporary_name(tmp_path / "young.h5")
    kept, mine = tmp_path / "kept.h5", f".{os.getpid()}.tmp"
    with subprocess.Popen(["true"]) as ended:
        pass
    dead = young.with_name(young.name.replace(mine, f".{ended.pid}.tmp"))
    elsewhere = dead.with_name(dead.name.replace(f".{platform.node()}.", ".another-node."))
    for path in (old, young, kept, dead, elsewhere):
        path.touch()
    for path in (old, kept):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    remove_stale_temporaries(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([young, kept, elsewhere])


def test_a_writer_may_finish_while_others_temporaries_are_looked_for(tmp_path: Path) -> None:
    """As shards that are tokenized side by side do."""

    def write() -> None:
        for number in range(1000):
            with replacing(tmp_path / f"{number}.h5") as temporary:
                temporary.touch()

    with ThreadPoolExecutor() as pool:
        writer = pool.submit(write)
        while not writer.done():
            remove_stale_temporaries(tmp_path)
        writer.result()
    assert len(list(tmp_path.iterdir())) == 1000


def test_a_run_record_has_config_time_and_versions(tmp_path: Path) -> None:
    cache = section("cache", temperatures=(1.0, 2.0))
    record = describe_run(section={"cache": cache}, seconds=1.23456, versions={"mine": "0.1"})
    record.write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json") == record
    assert dict(flatten(record.config))["cache.temperatures"] == [1.0, 2.0]
    assert record.seconds == 1.235
    assert {"torch", "transformers", "h5py", "mine"} <= set(record.versions)
    assert record.device == name_cpu()
