"""Claims: one worker gets a part, and a claim without a live worker is void."""

import os
import platform
import time
from pathlib import Path

import pytest

from retort.teacher.claims import Claims


def test_of_two_workers_one_gets_the_claim(tmp_path: Path) -> None:
    with (
        Claims(tmp_path).claim("part") as first,
        Claims(tmp_path).claim("part") as second,
    ):
        assert first and not second
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_wakes_leaves_the_claim_of_who_took_over(tmp_path: Path) -> None:
    with Claims(tmp_path).claim("part") as is_own:
        assert is_own
        taken_over = tmp_path / "part.claim"
        taken_over.write_text("another-node 17\n")
    assert taken_over.read_text() == "another-node 17\n"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe torn", b"", b"node 99999999999999999999", "node \u00b2".encode()]
)
def test_a_claim_that_is_no_claim_ages_like_any_other(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "part.claim"
    path.write_bytes(content.replace(b"node", platform.node().encode()))
    assert Claims(tmp_path).is_claimed("part")
    os.utime(path, (0, 0))
    with Claims(tmp_path).claim("part") as is_own:
        assert is_own


def test_a_dead_nodes_claim_from_the_future_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "part.claim"
    path.write_text("another-node 17\n")
    for hours, is_claimed in ((0, True), (3, False), (-3, False)):
        written = time.time() + 3600 * hours
        os.utime(path, (written, written))
        assert Claims(tmp_path).is_claimed("part") == is_claimed
    with Claims(tmp_path).claim("part") as is_own:
        assert is_own


def test_in_a_folder_that_was_merged_and_removed_nothing_is_claimed(tmp_path: Path) -> None:
    gone = tmp_path / "parts"
    assert not Claims(gone).is_claimed("part")
    with Claims(gone).claim("part") as is_own:
        assert not is_own
