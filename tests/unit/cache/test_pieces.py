"""Any number of threads codes a part to the same bytes, and the error of one reaches the caller."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from retort.cache import entropy_codec
from retort.cache.codec import Codec
from retort.cache.entropy_codec import EntropyCodec
from retort.cache.parts import write_part
from retort.cache.pieces import cut_pieces, do_pieces
from retort.cache.reader import CacheHeader, LogitCache
from support.synthetic import CODEC, CODED, ORDER, make_table, streams_of, targets_of

CODECS: dict[str, Codec] = {"top_k": CODEC, **CODED}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.mark.parametrize("sizes", [[], [1], [0, 0, 0], [7, 1, 1, 1, 9, 0, 2], [3] * 50])
def test_pieces_cover_everything_once_and_are_large_enough(sizes: list[int]) -> None:
    found = cut_pieces(sizes, least=5)
    assert [i for piece in found for i in range(piece.start, piece.stop)] == list(range(len(sizes)))
    totals = [sum(sizes[piece]) for piece in found]
    assert all(total >= 5 for total in totals[:-1])
    assert all(sum(sizes[p.start : p.stop - 1]) < 5 for p in found), "no larger than needed"


@pytest.mark.parametrize("method", CODECS)
def test_a_part_has_the_same_bytes_from_any_number_of_threads(
    method: str, pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, table = CODECS[method], make_table(60, seed=3)
    header = CacheHeader("teacher", "tokenizer", "tokens", codec)
    is_coded = isinstance(codec, EntropyCodec)
    order = ORDER if is_coded else codec.order_tokens(np.empty(0, np.int64))
    sequences = streams_of(table, codec) if is_coded else targets_of(table, codec)  # type: ignore[arg-type]
    write_part(tmp_path / "alone.h5", table, sequences, header, order)
    monkeypatch.setattr(entropy_codec, "_INTEGERS_AT_ONCE", 200)
    monkeypatch.setattr(cut_pieces, "__kwdefaults__", {"least": 20})
    assert len(cut_pieces(np.diff(table.position_offsets))) > 8
    write_part(tmp_path / "pool.h5", table, sequences, header, order, pool=pool)
    assert (tmp_path / "pool.h5").read_bytes() == (tmp_path / "alone.h5").read_bytes()


def test_what_a_thread_finds_damaged_is_refused(
    pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_pieces, "__kwdefaults__", {"least": 20})
    path, table = tmp_path / "part.h5", make_table(60, seed=3)
    write_part(path, table, targets_of(table), CacheHeader("t", "t", "t", CODEC))
    cache = LogitCache(path)
    cache.verify(pool)
    content = bytearray(path.read_bytes())
    content[sum(cache.byte_ranges["records"]) - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"record of sequence {len(table) - 1} does not match"):
        LogitCache(path).verify(pool)


@pytest.mark.parametrize("is_pooled", [False, True])
def test_pieces_are_in_order_and_the_first_error_is_raised(
    is_pooled: bool, pool: ThreadPoolExecutor
) -> None:
    given = cut_pieces(range(40), least=3)
    found = do_pieces(lambda piece: piece.start, given, pool if is_pooled else None)
    assert found == [piece.start for piece in given]

    def fail(piece: slice) -> None:
        if piece.start > 5:
            raise ValueError(f"at {piece.start}")

    first = next(piece.start for piece in given if piece.start > 5)
    with pytest.raises(ValueError, match=f"at {first}$"):
        do_pieces(fail, given, pool if is_pooled else None)
