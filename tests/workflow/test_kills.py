"""Workers by hand, ended in every way at random moments: the same command goes on, and nothing is done twice."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.place import REPOSITORY, Place, sha256, wait_until

Process = subprocess.Popen[bytes]
SCRIPTS = REPOSITORY / "workflow" / "scripts"


def kill(process: Process) -> None:
    """End it as the kernel does."""
    process.kill()


def terminate(process: Process) -> None:
    """End it as a time limit does."""
    process.terminate()


def take_memory_away(process: Process) -> None:
    """Let it have no byte more than it has now: it fails at its next large allocation, or its next thread."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
    resource.prlimit(process.pid, resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)


def fill_disk(disk: Path) -> Callable[[Process], None]:
    """Return a way to end a worker: leave its disk no room."""

    def fill(process: Process) -> None:
        with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass

    return fill


@dataclass
class Pass:
    """One teacher's pass over the tiny corpus, a document a part, by processes that may be ended."""

    place: Place
    folder: Path  # of the cache
    rescored: int = 0
    interruptions: int = 0

    def start(self, worker: int = 0, num_workers: int = 1) -> Process:
        """Start a worker, by the command that a user would type."""
        (fingerprint,) = self.place.results.glob("teachers/*/fingerprint.json")
        words = [sys.executable, str(SCRIPTS / "generate_logits.py"), "--index", str(self.index)]
        words += ["--fingerprint", str(fingerprint), "--set", "teacher.model_path=teacher"]
        # One sequence at a time: without memory a larger batch would be halved, and the cache would say so.
        words += ["--set", "cache.top_k=8", "--set", "teacher.generation.batch_size=1"]
        words += ["--worker", str(worker), "--num-workers", str(num_workers)]
        words += ["--output", str(self.folder / f"metadata_worker{worker}.json")]
        self.folder.mkdir(exist_ok=True, parents=True)
        with (self.place.path / "kills.log").open("ab") as log:
            return subprocess.Popen(
                words, cwd=self.place.path, env=self.place.environment(), stdout=log, stderr=log
            )

    @property
    def index(self) -> Path:
        (folder,) = self.place.results.glob("tokens/*/")
        return folder / "by_document.json"

    def log(self) -> str:
        return (self.place.path / "kills.log").read_text()

    def parts(self) -> dict[str, tuple[int, int]]:
        """The finished parts; another number or time says that one was written again."""
        found = {}
        for path in (self.folder / "parts").glob("*.h5"):
            status = path.stat()
            found[path.name] = (status.st_ino, status.st_mtime_ns)
        return found

    def end(self, process: Process, way: Callable[[Process], None], *, after: int) -> None:
        """End a worker once it has made some parts (or soon after its start); count what it did again."""
        before = self.parts()
        started = time.monotonic()
        pause = 0.2 * after
        while process.poll() is None and len(self.parts()) < len(before) + after:
            if after < 3 and time.monotonic() - started > pause + 1.0:
                break  # while it starts and loads
            time.sleep(0.002)
        assert process.poll() is None, self.log()[-3000:]
        way(process)
        assert process.wait(timeout=120) != 0, "it had finished"
        again = [name for name, stamp in self.parts().items() if before.get(name, stamp) != stamp]
        assert len(again) <= 1
        assert before.keys() <= self.parts().keys(), "a finished part is never lost"
        self.rescored += len(again)
        self.interruptions += 1

    def finish(self) -> str:
        """Let one worker finish, merge, and return the digest of the cache."""
        assert self.start().wait(timeout=600) == 0, self.log()[-3000:]
        (fingerprint,) = self.place.results.glob("teachers/*/fingerprint.json")
        words = [sys.executable, str(SCRIPTS / "merge_h5.py"), "--index", str(self.index)]
        words += ["--fingerprint", str(fingerprint), "--set", "cache.top_k=8"]
        done = self.place.execute([*words, "--output", str(self.folder / "manifest.json")])
        assert done.returncode == 0, done.output
        return sha256(self.folder / "teacher_logits.h5")


@pytest.fixture
def work(done: Place) -> Pass:
    """The tiny corpus again, with a part for every document: about a hundred."""
    work = Pass(done, done.path / "by-hand")
    (tokens,) = done.results.glob("tokens/*/")
    words = [sys.executable, str(SCRIPTS / "index_tokens.py")]
    words += ["--set", "dataset.streaming_chunk_size=1"]
    shards = map(str, sorted(tokens.glob("shard_*.h5")))
    indexed = done.execute([*words, "--output", str(work.index), "--shards", *shards])
    assert indexed.returncode == 0, indexed.output
    return work


@pytest.fixture
def undisturbed(work: Pass) -> str:
    """The digest of the cache that nobody disturbed."""
    folder, work.folder = work.folder, work.folder.with_name("undisturbed")
    found = work.finish()
    work.folder = folder
    return found


WAYS = (kill, terminate, take_memory_away)


@pytest.mark.parametrize(
    ("count", "seed"),
    [
        (3, 0),
        pytest.param(15, 2, marks=pytest.mark.slow),
        pytest.param(50, 1, marks=pytest.mark.campaign),
    ],
    ids=["some", "fifteen", "fifty"],
)
def test_ended_in_any_way_the_same_command_goes_on(
    work: Pass, undisturbed: str, count: int, seed: int
) -> None:
    chance = random.Random(seed)
    while work.interruptions < count:
        way = WAYS[work.interruptions % len(WAYS)]
        work.end(work.start(), way, after=chance.randrange(8))
        if len(work.parts()) > 60:  # enough: begin anew
            assert work.finish() == undisturbed
            shutil.rmtree(work.folder)
    assert work.finish() == undisturbed
    assert work.rescored == 0


def test_a_sigterm_ends_a_worker_in_a_moment_and_frees_its_part(work: Pass) -> None:
    process = work.start()
    wait_until(work.parts, process=process)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not list((work.folder / "parts").glob("*.claim"))
    assert not list((work.folder / "parts").glob(".*.tmp"))


@pytest.mark.slow
def test_two_processes_as_one_worker_do_no_harm(work: Pass, undisturbed: str) -> None:
    twins = [work.start(), work.start()]
    assert [twin.wait(timeout=600) for twin in twins] == [0, 0], work.log()[-3000:]
    assert work.finish() == undisturbed


@pytest.mark.slow
def test_one_then_four_then_two_workers(work: Pass, undisturbed: str) -> None:
    """Of the four one is stopped and one killed: what they were at is done by the others."""
    work.end(work.start(), kill, after=5)
    first = work.parts()
    four = [work.start(w, 4) for w in range(4)]
    wait_until(lambda: len(work.parts()) > len(first) + 12, process=four[2])
    four[0].send_signal(signal.SIGSTOP)
    four[1].kill()
    try:
        second = work.parts()
        for worker in four[2:]:
            worker.kill()
        # The stopped one shows no sign of life for a minute: so do its files say.
        for claim in (work.folder / "parts").glob("*.claim"):
            os.utime(claim, (0, 0))
        two = [work.start(w, 2) for w in range(2)]
        assert [worker.wait(timeout=600) for worker in two] == [0, 0], work.log()[-3000:]
        third = work.parts()
        assert first.items() <= second.items() <= third.items(), "nothing finished is done again"
    finally:
        four[0].send_signal(signal.SIGCONT)
    assert four[0].wait(timeout=600) == 0, "it wakes, and finds nothing to do"
    for worker in four[1:]:
        worker.wait()
    assert work.finish() == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB, in a mount namespace of its own that lives as long as the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=4m none {folder} && echo mounted && exec sleep 3000"
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount]
    if shutil.which("unshare") is None:
        pytest.skip("a small disk cannot be mounted here (no unshare)")
    holder = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        inside = Path(f"/proc/{holder.pid}/root{folder}")
        if holder.stdout.readline() != b"mounted\n" or not os.access(inside, os.W_OK):
            pytest.skip("a small disk cannot be mounted here (unshare and mount without rights)")
        yield inside
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.campaign)])
def test_a_full_disk_ends_a_worker_in_one_sentence_and_the_same_command_goes_on(
    work: Pass, undisturbed: str, small_disk: Path, count: int
) -> None:
    work.folder = small_disk / "cache"
    chance = random.Random(0)
    for attempt in range(1, count + 1):
        work.end(work.start(), fill_disk(small_disk), after=chance.randrange(3, 8))
        assert work.log().count("error: the disk is full") == attempt
        (small_disk / "filler").unlink()
    assert work.rescored == 0
    assert work.finish() == undisturbed
