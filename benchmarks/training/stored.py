"""How long a training step waits for its batch when the cache is in an object store, and what it asks the store for.

    python -m benchmarks.training.stored [--store s3://bucket/prefix] [--latency-ms 30] [--steps 40]

The student of `student.py` (13 million parameters, 2 x 512 tokens a step) trains by Retort's own trainer, with one
process that reads ahead (the default), from a part of 256 sequences of random distributions (top_k 17, about 70 bytes a
position). Without --store it is in moto's server on this machine, which shares its processors, behind a wire that
delays what the server sends by --latency-ms; a request to Amazon's S3 takes some 30. *disk*: the same part as a file.
*kept*: blocks of 1 MiB are kept on this machine as they are read. *not kept*: each sequence is asked for
(cache_copy_gb: 0). Each is run twice, with few steps and with more, and the difference is shown: what the first steps
cost drops out of it.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import numpy as np

from benchmarks.common import make_parser
from benchmarks.training.feeding import run
from benchmarks.training.student import KEPT, SHAPES
from retort.cache.codec import SparseTargets
from retort.cache.local_copy import keep_blocks
from retort.cache.parts import store_part, write_part
from retort.cache.reader import CacheHeader, LogitCache
from retort.cache.top_k_codec import TopKCodec
from retort.tokens.sequences import SequenceTable, build_table

_VOCABULARY, _SEQUENCES = 32_768, 256
_FEW_STEPS = 4
_NO_HASH = "0" * 12


class Wire:
    """Passes bytes between clients and a server, delays what the server sends, and counts what it is asked for."""

    def __init__(self, port: int, latency_s: float) -> None:
        self.server, self.latency_s, self.requests = ("127.0.0.1", port), latency_s, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self.server)
            for pump, ends in ((self._ask, (client, server)), (self._answer, (server, client))):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                self.requests += data.startswith(b"GET ")
                server.sendall(data)
        server.close()

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        asked = -1
        with suppress(OSError):
            while data := server.recv(1 << 20):
                if asked != self.requests:  # the first bytes of an answer
                    asked = self.requests
                    time.sleep(self.latency_s)
                client.sendall(data)
        client.close()


@contextmanager
def serve(folder: Path, latency_s: float) -> Iterator[Wire]:
    """Yield the wire to moto's server on this machine, in whose bucket `benchmark` nothing is."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "server.log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while True:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.1)
        wire = Wire(port, latency_s)
        os.environ |= {
            "AWS_ENDPOINT_URL": wire.endpoint,
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        fsspec.filesystem("s3").mkdir("benchmark")
        yield wire
    finally:
        server.kill()
        server.wait()


def make_table() -> SequenceTable:
    """Return sequences of random tokens."""
    rng, length = np.random.default_rng(0), SHAPES["small"].length
    mask = [True] * (length - 1) + [False]
    rows = (rng.integers(0, _VOCABULARY, length) for _ in range(_SEQUENCES))
    return build_table((ids, mask, number, ("", "")) for number, ids in enumerate(rows))


def write_random_part(path: Path) -> None:
    """Write a part of random distributions."""
    rng, table, codec = np.random.default_rng(1), make_table(), TopKCodec((1.0,), _VOCABULARY, KEPT)

    def draw(num_positions: int) -> SparseTargets:
        ids = rng.integers(0, _VOCABULARY // KEPT, (num_positions, KEPT)) * KEPT + np.arange(KEPT)
        logprobs = np.log(rng.dirichlet([0.3] * (KEPT + 1), num_positions) + 1e-6)
        kept, tails = logprobs[:, :KEPT].astype(np.float32), logprobs[:, KEPT:].astype(np.float32)
        return SparseTargets.from_rows(ids.astype(np.int32), kept, tails)

    header = CacheHeader(_NO_HASH, _NO_HASH, _NO_HASH, codec)
    sequences = [draw(table[number].num_positions) for number in range(len(table))]
    write_part(path, table, sequences, header)


def measure(
    name: str, folder: Path, cache: LogitCache, wire: Wire | None, flags: argparse.Namespace
) -> None:
    """Train, and print a line."""
    steps, options = flags.steps, {"workers": 1, "threads": flags.threads}
    asked = wire.requests if wire else 0
    few = run(folder / name, cache, steps=_FEW_STEPS, **options)
    begun = wire.requests if wire else 0
    more = run(folder / name, cache, steps=_FEW_STEPS + steps, **options)
    seconds, waited = ((m - f) / steps for f, m in zip(few, more, strict=True))
    line = f"{name:9} a step takes {seconds:.3f} s, of which {1000 * waited:6.2f} ms ({waited / seconds:.2%}) waiting"
    if wire:
        line += f"; {begun - asked} requests for {_FEW_STEPS} steps, {wire.requests - begun} for {_FEW_STEPS + steps}"
    print(line, flush=True)


def main() -> None:
    """Print the table."""
    parser = make_parser("benchmarks.training.stored", __doc__)
    parser.add_argument("--store", help="a folder in a store, in place of a server on this machine")
    parser.add_argument("--latency-ms", type=float, default=30.0, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="measured steps; default: 40")
    parser.add_argument("--threads", type=int, default=2, help="of the student; default: 2")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for way in ("disk", "kept", "not kept"):
            (folder / way).mkdir()
        part, receipt = folder / "part.h5", folder / "receipt.h5"
        write_random_part(part)
        measure("disk", folder, LogitCache(part), None, flags)
        if flags.store:
            store_part(part, receipt, flags.store)
            measure_stored(folder, receipt, None, flags)
        else:
            with serve(folder, flags.latency_ms / 1000) as wire:
                store_part(part, receipt, "s3://benchmark/parts")
                measure_stored(folder, receipt, wire, flags)


def measure_stored(
    folder: Path, receipt: Path, wire: Wire | None, flags: argparse.Namespace
) -> None:
    """Train from the store, with and without blocks that are kept here."""
    cache = LogitCache(receipt)
    with keep_blocks(cache, str(folder / "blocks"), most_bytes=1 << 40) as kept:
        measure("kept", folder, kept, wire, flags)
    measure("not kept", folder, cache, wire, flags)


if __name__ == "__main__":
    main()
