"""Tables fit their width; sizes and ages are in words."""

import pytest

from retort.inventory.tables import format_age, format_size, render_table


def test_a_table_fits_its_width_and_loses_nothing() -> None:
    rows = [["a" * 30, "finished", "dataset.max_length=32 " * 6], ["b", "", ""]]
    for width in (80, 100, 120):
        lines = render_table(rows, width=width)
        assert all(len(line) <= width for line in lines)
        assert " ".join(lines).split() == [
            word for row in rows for cell in row for word in cell.split()
        ]
    assert render_table([], width=80) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (59, "59 s"),
        (61, "1 min"),
        (7200, "2 h"),
        (86400 * 5, "5 d"),
        (86400 * 200, "7 months"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    assert format_age(seconds) == text


def test_sizes() -> None:
    assert [format_size(n) for n in (0, 999, 1000, 10**12)] == ["0 B", "999 B", "1.0 kB", "1.0 TB"]
