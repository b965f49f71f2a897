"""Entropy coding: integers come back, and the machine code of the coder is that of its sources."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retort.cache.entropy import (
    NUM_SYMBOLS,
    SCALE,
    build_encoder,
    build_tables,
    pack_tables,
    unpack_tables,
)
from support.coded import check_integers


@pytest.mark.parametrize(
    "pairs",
    [[], [(0, 0)], [(5, 2**21 - 1)] * 3, [(i % 6, i * i * i % 2**21) for i in range(200)]],
    ids=["none", "zero", "largest", "many"],
)
def test_any_integers_take_what_their_statistics_allow(pairs: list[tuple[int, int]]) -> None:
    check_integers(pairs)


def test_machine_code_is_kept_apart_for_every_state_of_its_sources(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[3] / "src" / "retort"
    shutil.copytree(source, tmp_path / "retort", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import numba, retort.cache.entropy_codec; print(numba.config.CACHE_DIR)"
    found = []
    for module in (None, "entropy", None, "stream_reader"):
        if module is not None:
            with (tmp_path / "retort" / "cache" / f"{module}.py").open("a") as file:
                file.write("# another\n")
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(Path(done.stdout.strip()))
    first, changed, unchanged, other = found
    assert first != changed == unchanged != other != first
    assert all(path.is_dir() and path.is_relative_to(tmp_path) for path in found)


def test_tables_stay_whole_however_rare_their_symbols() -> None:
    counts = np.ones((1, NUM_SYMBOLS), np.int64)
    counts[0, 3] = 10**12
    tables = build_tables(counts)
    assert tables.sum() == SCALE and tables.min() == 1


def test_a_damaged_table_is_refused() -> None:
    tables = np.zeros((2, NUM_SYMBOLS), np.uint16)
    tables[0, 0] = SCALE - 1
    with pytest.raises(ValueError, match=f"do not sum to {SCALE}"):
        unpack_tables(pack_tables(tables), num_contexts=2)
    with pytest.raises(ValueError, match="damaged"):
        unpack_tables(b"nonsense", num_contexts=2)


def test_a_product_with_the_reciprocal_is_the_quotient() -> None:
    """Of every frequency and, around each multiple where a quotient changes, of states up to 2^62 - 1."""
    tables = np.zeros((SCALE, NUM_SYMBOLS), np.uint16)
    tables[:, 5] = frequencies = np.arange(1, SCALE + 1)
    factors = build_encoder(tables).reshape(SCALE, NUM_SYMBOLS)[:, 5]
    assert (factors["frequency"] == frequencies).all() and (factors["start"] == 0).all()
    rng = np.random.default_rng(0)
    for factor in factors:
        frequency, reciprocal = int(factor["frequency"]), int(factor["reciprocal"])
        assert reciprocal < 1 << 64
        quotients = [*rng.integers(0, (1 << 62) // frequency, 50).tolist(), (1 << 62) // frequency]
        for state in (q * frequency + d for q in quotients for d in (-1, 0, 1, frequency - 1)):
            if 0 <= state < 1 << 62:
                upper = ((state << 1) * reciprocal) >> 64  # as the processor's instruction
                assert upper >> int(factor["shift"]) == state // frequency, (state, frequency)
