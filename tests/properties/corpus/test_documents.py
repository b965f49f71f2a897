"""Any row is used or skipped for a reason; a larger held-out fraction contains a smaller one."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from retort.corpus.documents import Counts, is_held_out, make_document
from support.corpora import DEFAULTS
from support.sections import replace

VALUES = st.one_of(
    st.none(),
    st.integers(),
    st.sampled_from(
        ["", " \n", "\0", "a\0b", "\ud800", "x\udfffy", "plain", "pr\u00e9t \U0001f600"]
    ),
    st.text(st.characters(), max_size=5),
)


@settings(max_examples=300)
@given(rows=st.lists(st.fixed_dictionaries({}, optional={"prompt": VALUES, "response": VALUES})))
def test_every_row_is_used_or_skipped_for_a_reason_and_what_is_used_is_clean(
    rows: list[dict[str, Any]],
) -> None:
    dataset = replace(DEFAULTS, prompt_column="prompt", response_column="response")
    counts = Counts()
    for index, row in enumerate(rows):
        document = make_document(row, dataset, index=index, split=None, counts=counts)
        if document is not None:
            content = (document.prompt or "") + document.text
            content.encode("utf-8")
            assert "\0" not in content
            assert document.text.strip()
    counts.reconcile()
    assert counts.read == len(rows)
    assert set(counts.skipped) <= {"empty", "empty_response", "not_text"}
    assert TypeAdapter(Counts).validate_json(TypeAdapter(Counts).dump_json(counts)) == counts


@given(text=st.text(), seed=st.integers(0, 2**32 - 1), fraction=st.floats(0, 1))
def test_more_is_held_out_by_a_larger_fraction_never_less(
    text: str, seed: int, fraction: float
) -> None:
    content = text.encode("utf-8", "replace").decode()
    assert not is_held_out(content, seed=seed, fraction=0.0)
    if is_held_out(content, seed=seed, fraction=fraction):
        assert is_held_out(content, seed=seed, fraction=(fraction + 1) / 2)
