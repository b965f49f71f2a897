"""The summary's table, for any names and numbers."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.reports import check_alignment

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", fullmatch=True)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    loss=st.floats(0, 690),
    parameters=st.integers(1, 10**13),
    width=st.integers(80, 160),
)
def test_columns_align_and_no_line_is_wider_than_the_terminal(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    loss: float,
    parameters: int,
    width: int,
) -> None:
    check_alignment(tmp_path_factory.mktemp("runs"), names, loss, parameters, width)
