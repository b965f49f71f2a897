"""Chats are found in rows of the common formats, by themselves or by one key, and made into one form."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from retort.config.sections import Dataset
from retort.corpus.checking import check_corpus
from retort.corpus.documents import Counts, Document, make_document
from retort.corpus.reading import read_shard_documents
from retort.corpus.snapshot import read_snapshot, write_snapshot
from support.corpora import DEFAULTS, read_all, write_jsonl
from support.sections import replace

ASK, SAY = {"role": "user", "content": "which?"}, {"role": "assistant", "content": "bird"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [ASK, SAY, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "fox"}]


def corpus(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> Dataset:
    path = write_jsonl(folder / "rows.jsonl", rows)
    return replace(DEFAULTS, name="json", data_files=str(path), num_shards=1, **keys)


def read_one(folder: Path, row: dict[str, Any], **keys: Any) -> Document:
    (document,) = read_all(corpus(folder, [row], **keys))
    return document


def without_weights(document: Document) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k != "weight"} for m in document.messages or ()]


def share(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in chat]


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"messages": CHAT}, {}),
        ({"messages": CHAT}, {"messages_column": "messages"}),
        ({"messages": CHAT}, {"text_column": "messages"}),
        ({"messages": json.dumps(CHAT)}, {}),
        ({"dialog": CHAT, "text": "other"}, {"messages_column": "dialog"}),
        ({"conversations": share(CHAT), "id": 7}, {}),
        ({"conversation": share(CHAT)}, {}),
        ({"prompt": CHAT[:3], "completion": CHAT[3:]}, {}),
        ({"prompt": CHAT[:3], "completion": "fox"}, {}),
        ({"p": CHAT[:3], "r": CHAT[3:]}, {"prompt_column": "p", "response_column": "r"}),
        ({"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]}, {}),
        ({"messages": [{**m, "tool_calls": None, "name": None} for m in CHAT], "tools": None}, {}),
    ],
)  # fmt: skip
def test_a_chat_is_found_in_every_format(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, Any]
) -> None:
    document = read_one(tmp_path, row, **keys)
    assert without_weights(document) == CHAT
    assert (document.prompt, document.text) == ("which?\nand?", "bird\nfox")
    assert document.tools is None


def test_text_is_read_where_there_is_text(tmp_path: Path) -> None:
    document = read_one(tmp_path, {"text": "a text", "messages": CHAT})
    assert (document.text, document.prompt, document.messages) == ("a text", None, None)


def test_prompt_and_completion_of_text_are_found(tmp_path: Path) -> None:
    document = read_one(tmp_path, {"prompt": "which?", "completion": "bird"})
    assert (document.prompt, document.text) == ("which?", "bird")
    assert document.messages == [ASK, SAY]


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"messages": CHAT, "sys": "Be brief."}, {}),
        ({"messages": [SYSTEM, *CHAT], "sys": "another"}, {}),
        ({"conversations": share(CHAT), "sys": "Be brief."}, {}),
        ({"p": CHAT[:3], "r": "fox", "sys": "Be brief."}, {"prompt_column": "p", "response_column": "r"}),
    ],
)  # fmt: skip
def test_a_system_column_comes_first_where_the_chat_has_none(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, Any]
) -> None:
    document = read_one(tmp_path, row, system_column="sys", **keys)
    assert without_weights(document) == [SYSTEM, *CHAT]


def test_a_system_column_goes_before_prompts_too(tmp_path: Path) -> None:
    keys = {"prompt_column": "p", "response_column": "r", "system_column": "sys"}
    row = {"p": "which?", "r": "bird", "sys": "Be brief."}
    assert read_one(tmp_path, row, **keys).messages == [SYSTEM, ASK, SAY]


def test_tools_reasoning_and_calls_are_kept(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    chat = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "Let me see."},
        {"role": "tool", "content": "2", "tool_call_id": "a", "name": "add"},
        SAY,
    ]
    found = read_one(tmp_path, {"messages": chat, "tools": json.dumps([tool])})
    assert found.tools == [tool]
    assert found.messages == [
        ASK,
        {"role": "assistant", "content": "", "reasoning_content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "a", "name": "add"},
        SAY,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["observation", "tool"])
def test_calls_and_results_in_sharegpts_form_are_calls_and_results(
    tmp_path: Path, name: str
) -> None:
    """A row as in the examples of LLaMA-Factory, with two calls at once in the second message."""
    call = {"name": "get_weather", "arguments": {"city": "Jinan"}}
    chat = [
        {"from": "human", "value": "which?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": name, "value": '{"temperature": 20}'},
        {"from": "function_call", "value": json.dumps([call, call])},
        {"from": name, "value": "[20, 20]"},
        {"from": "gpt", "value": "bird"},
    ]
    wrapped = {"type": "function", "function": call}
    assert read_one(tmp_path, {"conversations": chat}).messages == [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [wrapped]},
        {"role": "tool", "content": '{"temperature": 20}'},
        {"role": "assistant", "content": "", "tool_calls": [wrapped, wrapped]},
        {"role": "tool", "content": "[20, 20]"},
        SAY,
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *(
            ([{"from": "function_call", "value": text}, SAY], "bad_tool_calls")
            for text in ("get_weather(Jinan)", " ", '{"city": "Jinan"}', "[7]")
        ),
        ([], "not_a_chat"),
        ("no JSON", "not_a_chat"),
        (["which?"], "not_a_chat"),
        ([{"role": "narrator", "content": "a"}], "unknown_role"),
        ([{**ASK, "content": 7}], "not_text"),
        ([{**ASK, "content": [{"type": "image", "url": "a"}]}, SAY], "not_text"),
        ([ASK], "empty_response"),
        ([ASK, {"role": "assistant", "content": " "}], "empty_response"),
    ],
)
def test_a_row_with_nothing_to_learn_is_counted_with_its_number(
    tmp_path: Path, value: Any, reason: str
) -> None:
    rows = [{"messages": CHAT}, {"messages": value}, {"messages": CHAT}]
    counts = Counts()
    found = [*read_shard_documents(corpus(tmp_path, rows), shard=0, num_shards=1, counts=counts)]
    assert [d.index for d in found] == [0, 2]
    assert (counts.skipped, counts.rows) == ({reason: 1}, {reason: [1]})
    read = TypeAdapter(Counts).validate_python(counts.to_json())
    assert (read.skipped, read.rows) == (counts.skipped, counts.rows)


def test_a_corpus_of_such_rows_is_refused_with_their_numbers(tmp_path: Path) -> None:
    rows = [{"messages": [ASK]}] * 5 + [{"messages": []}]
    with pytest.raises(
        ValueError, match=r"6 read, 5 empty_response, 1 not_a_chat skipped \(first documents "
        r"empty_response: 0, 1, 2; not_a_chat: 5\)"
    ):  # fmt: skip
        check_corpus(corpus(tmp_path, rows))


def test_no_text_and_no_chat_is_a_missing_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'text' is not in .*messages_column"):
        read_one(tmp_path, {"body": "a text"})
    with pytest.raises(ValueError, match="column 'chat' is not in"):
        read_one(tmp_path, {"messages": CHAT}, messages_column="chat")


def test_chats_in_parquet_and_in_a_snapshot_are_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": CHAT, "extra": 1}, {"messages": [SYSTEM, *CHAT], "extra": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    table = replace(corpus(tmp_path, rows), name="parquet", data_files=str(tmp_path / "*.parquet"))
    expected = read_all(corpus(tmp_path, rows))
    assert read_all(table) == expected
    streamed = corpus(tmp_path, rows, streaming=True, max_samples=10)
    write_snapshot(streamed, tmp_path / "snapshot")
    found = [*read_snapshot(tmp_path / "snapshot", shard=0, counts=Counts())]
    assert [d.messages for d in found] == [d.messages for d in expected]


def test_characters_that_tokenizers_refuse_are_cleaned_in_chats() -> None:
    row = {"messages": [ASK, {"role": "assistant", "content": "bi\0rd \ud800"}]}
    counts = Counts()
    found = make_document(row, DEFAULTS, index=0, split="train", counts=counts)
    assert found is not None and found.messages is not None
    assert found.messages[1]["content"] == "bird \ufffd"
    assert counts.cleaned == {"nul": 1, "lone_surrogate": 1}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}


def row_with(**keys: Any) -> dict[str, Any]:
    return {"messages": [ASK, {"role": "assistant", "content": None, **keys}]}


@pytest.mark.parametrize(
    "keys",
    [
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": CALL},
        {"tool_calls": [json.dumps(CALL)]},
        {"function_call": CALL["function"]},
    ],
)
def test_tool_calls_are_read_in_other_forms(tmp_path: Path, keys: dict[str, Any]) -> None:
    messages = read_one(tmp_path, row_with(**keys)).messages
    assert messages is not None
    assert messages[1]["tool_calls"] == [CALL]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (row_with(tool_calls=7), "bad_tool_calls"),
        (row_with(tool_calls=["f"]), "bad_tool_calls"),
        (row_with(tool_calls=[{"function": "f"}]), "bad_tool_calls"),
        (row_with(function_call="f"), "bad_tool_calls"),
        ({"messages": CHAT, "tools": "f(x)"}, "bad_tools"),
        ({"messages": [ASK, {**SAY, "reasoning_content": ["a"]}]}, "not_text"),
        ({"messages": [ASK, {**SAY, "weight": 0}]}, "no_learned_turn"),
    ],
)
def test_what_is_no_chat_is_skipped_by_reason(row: dict[str, Any], reason: str) -> None:
    counts = Counts()
    assert make_document(row, DEFAULTS, index=4, split=None, counts=counts) is None
    assert counts.rows == {reason: [4]}


def test_one_tool_weight_and_value_are_read(tmp_path: Path) -> None:
    tool = {"name": "f"}
    chat = [ASK, {**SAY, "weight": 0}, ASK, {"role": "assistant", "content": None, "value": "fox"}]
    document = read_one(tmp_path, {"messages": chat, "tools": tool})
    assert document.tools == [tool]
    assert document.messages == [
        ASK,
        {**SAY, "weight": 0},
        ASK,
        {"role": "assistant", "content": "fox"},
    ]


def test_turns_of_a_prompt_carry_no_loss(tmp_path: Path) -> None:
    messages = read_one(tmp_path, {"prompt": CHAT[:3], "completion": CHAT[3:]}).messages
    assert messages == [ASK, {**SAY, "weight": 0}, *CHAT[2:]]


def test_a_wrong_system_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column 'nope' is not in"):
        read_one(tmp_path, {"messages": CHAT}, system_column="nope")
