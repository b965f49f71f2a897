# ruff: noqa: E501, RUF001 - templates as they are published
"""Which tokens of a chat are learned, compared with texts written by hand for the templates of many families."""

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest

from retort.tokens.chat import ChatFormat
from retort.tokens.said import ChatError, Message
from support import chat_templates as published
from support.chat_templates import Family, build_tokenizer

DATE = "2024-07-26"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is one and one?"},
    {"role": "assistant", "content": "It is two."},
    {"role": "user", "content": "And one more?"},
    {"role": "assistant", "content": "Three,\nI say."},
    {"role": "user", "content": "Thank you."},
    {"role": "assistant", "content": "You are welcome."},
]
Q1, Q2, Q3 = (str(CHAT[i]["content"]) for i in (1, 3, 5))
A1, A2, A3 = (str(CHAT[i]["content"]) for i in (2, 4, 6))

# One line each: what is rendered, in pieces; every second piece, from the second on, is said by the assistant.
_LLAMA = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
_CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_GEMMA = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
_GPT = "<|start|>user<|message|>{}<|end|><|start|>assistant"
_FINAL = "<|channel|>final<|message|>"
_SMOL = "<|im_start|>user\n{}<|im_end|>\n"
_DEEPSEEK = "<｜User｜>{}<｜Assistant｜>"
_GLM = "<|user|>\n{}<|assistant|>"
_PHI = "<|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>"
_SMOL_SYSTEM = (
    "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 26 July 2024\n"
    "Reasoning Mode: /think\n\n## Custom Instructions\n\nBe brief.\n\n<|im_end|>\n"
)
_GPT_SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2024-07-26\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be "
    "included for every message.<|end|><|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|>"
)
ORACLES: dict[str, list[str]] = {
    "LLAMA_31": [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nBe brief." + _LLAMA.format(Q1),
        A1 + "<|eot_id|>",
        _LLAMA.removeprefix("<|eot_id|>").format(Q2),
        A2 + "<|eot_id|>",
        _LLAMA.removeprefix("<|eot_id|>").format(Q3),
        A3 + "<|eot_id|>",
    ],
    "QWEN_25": [
        "<|im_start|>system\nBe brief.<|im_end|>\n" + _CHATML.format(Q1),
        A1 + "<|im_end|>",
        "\n" + _CHATML.format(Q2),
        A2 + "<|im_end|>",
        "\n" + _CHATML.format(Q3),
        A3 + "<|im_end|>",
        "\n",
    ],
    "QWEN_3": [
        "<|im_start|>system\nBe brief.<|im_end|>\n" + _CHATML.format(Q1),
        A1 + "<|im_end|>",
        "\n" + _CHATML.format(Q2),
        A2 + "<|im_end|>",
        "\n" + _CHATML.format(Q3) + "<think>\n\n</think>\n\n",
        A3 + "<|im_end|>",
        "\n",
    ],
    "GEMMA_3": [
        "<bos><start_of_turn>user\nBe brief.\n\n"
        + _GEMMA.removeprefix("<start_of_turn>user\n").format(Q1),
        A1 + "<end_of_turn>",
        "\n" + _GEMMA.format(Q2),
        A2 + "<end_of_turn>",
        "\n" + _GEMMA.format(Q3),
        A3 + "<end_of_turn>",
        "\n",
    ],
    "MISTRAL": [
        f"<s> [INST] Be brief.\n\n{Q1} [/INST]",
        f" {A1}</s>",
        f" [INST] {Q2} [/INST]",
        f" {A2}</s>",
        f" [INST] {Q3} [/INST]",
        f" {A3}</s>",
    ],
    "GPT_OSS": [
        _GPT_SYSTEM + _GPT.format(Q1),
        _FINAL + A1 + "<|end|>",
        _GPT.format(Q2),
        _FINAL + A2 + "<|end|>",
        _GPT.format(Q3),
        _FINAL + A3 + "<|return|>",
    ],
    "SMOLLM_3": [  # it marks the whole message, with its header
        _SMOL_SYSTEM + _SMOL.format(Q1),
        f"<|im_start|>assistant\n{A1}<|im_end|>\n",
        _SMOL.format(Q2),
        f"<|im_start|>assistant\n{A2}<|im_end|>\n",
        _SMOL.format(Q3),
        f"<|im_start|>assistant\n{A3}<|im_end|>\n",
    ],
    "DEEPSEEK_R1": [
        "<｜begin▁of▁sentence｜>Be brief." + _DEEPSEEK.format(Q1),
        A1 + "<｜end▁of▁sentence｜>",
        _DEEPSEEK.format(Q2),
        A2 + "<｜end▁of▁sentence｜>",
        _DEEPSEEK.format(Q3),
        A3 + "<｜end▁of▁sentence｜>",
    ],
    "GLM_4": [
        "[gMASK]<sop><|system|>\nBe brief." + _GLM.format(Q1),
        "\n" + A1,
        _GLM.format(Q2),
        "\n" + A2,
        _GLM.format(Q3),
        "\n" + A3 + "<|endoftext|>",
    ],
    "GLM_45": [
        "[gMASK]<sop><|system|>\nBe brief." + _GLM.format(Q1) + "\n<think></think>",
        "\n" + A1,
        _GLM.format(Q2) + "\n<think></think>",
        "\n" + A2,
        _GLM.format(Q3) + "\n<think></think>",
        "\n" + A3 + "<|endoftext|>",
    ],
    "PHI_4": [
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|>" + _PHI.format(Q1),
        A1 + "<|im_end|>",
        _PHI.format(Q2),
        A2 + "<|im_end|>",
        _PHI.format(Q3),
        A3 + "<|im_end|>",
    ],
}


def chat_format(family: Family) -> ChatFormat:
    return ChatFormat(build_tokenizer(family), date=DATE)


def expected(tokenizer: Any, pieces: list[str]) -> tuple[list[int], list[bool]]:
    """Return the ids of the pieces, and which are of every second one."""
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    mask = [[number % 2 == 1] * len(piece) for number, piece in enumerate(ids)]
    return [*chain.from_iterable(ids)], [*chain.from_iterable(mask)]


def said(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    return str(tokenizer.decode([i for i, is_said in zip(ids, mask, strict=True) if is_said]))


@pytest.mark.parametrize("name", ORACLES)
def test_every_turn_of_a_published_template_is_found_token_by_token(name: str) -> None:
    chat = chat_format(getattr(published, name))
    ((ids, mask),) = chat.encode(CHAT)
    assert (ids, mask) == expected(chat.tokenizer, ORACLES[name])
    *_, last = chat.encode(CHAT, turns="last")
    pieces = ORACLES[name]
    first = 5 if len(pieces) > 5 else 1
    joined = ["".join(pieces[:first]), *pieces[first:]]
    assert last == expected(chat.tokenizer, joined)


def test_marks_are_those_that_transformers_finds() -> None:
    tokenizer = build_tokenizer(published.SMOLLM_3)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    template = tokenizer.chat_template.replace('strftime_now("%d %B %Y")', '"26 July 2024"')
    theirs = tokenizer.apply_chat_template(CHAT, chat_template=template, **options)
    ((ids, mask),) = ChatFormat(tokenizer, date=DATE).encode(CHAT)
    assert ids == theirs["input_ids"]
    assert mask == [bool(m) for m in theirs["assistant_masks"]]


def test_a_system_prompt_that_a_template_moves_is_kept_before_each_turn() -> None:
    chat = chat_format(published.MISTRAL_V3)
    found = chat.encode(CHAT[:5])
    first = [f"<s>[INST] Be brief.\n\n{Q1}[/INST]", f" {A1}</s>"]
    second = [f"<s>[INST] {Q1}[/INST] {A1}</s>[INST] Be brief.\n\n{Q2}[/INST]", f" {A2}</s>"]
    assert found == [expected(chat.tokenizer, first), expected(chat.tokenizer, second)]


THOUGHT = "<think>\nOne and one.\n</think>\n\nIt is two."


@pytest.mark.parametrize(
    ("name", "message", "response"),
    [
        ("QWEN_3", {"content": THOUGHT}, THOUGHT + "<|im_end|>"),
        (
            "QWEN_3",
            {"content": "It is two.", "reasoning_content": "One and one."},
            THOUGHT + "<|im_end|>",
        ),
        (
            "DEEPSEEK_R1",
            {"content": THOUGHT},
            THOUGHT.removeprefix("<think>\n") + "<｜end▁of▁sentence｜>",
        ),
        (
            "GPT_OSS",
            {"content": "It is two.", "reasoning_content": "One and one."},
            "<|channel|>analysis<|message|>One and one.<|end|><|start|>assistant"
            + _FINAL
            + "It is two.<|return|>",
        ),
        (
            "GLM_45",
            {"content": "It is two.", "reasoning_content": "One and one."},
            "\n<think>One and one.</think>\nIt is two.<|endoftext|>",
        ),
    ],
)
def test_reasoning_is_said_too(name: str, message: dict[str, str], response: str) -> None:
    chat = chat_format(getattr(published, name))
    ((ids, mask),) = chat.encode([*CHAT[:2], {"role": "assistant", **message}])
    assert said(chat.tokenizer, ids, mask) == response
    assert ids[: mask.index(True)] == chat.encode_prompt(CHAT[:2])


@pytest.mark.parametrize("name", ["QWEN_3", "DEEPSEEK_R1"])
def test_an_earlier_turn_whose_reasoning_a_template_drops_is_rendered_by_itself(name: str) -> None:
    chat = chat_format(getattr(published, name))
    thought = [{**m, "content": THOUGHT} if m["role"] == "assistant" else m for m in CHAT]
    found = [
        (chat.tokenizer.decode(ids), said(chat.tokenizer, ids, mask))
        for ids, mask in chat.encode(thought)
    ]
    assert len(found) == 3
    assert [text.count("One and one.") for text, _ in found] == [1, 1, 1]
    assert all("It is two." in part and "One and one." in part for _, part in found)
    assert sorted(text.count("It is two.") for text, _ in found) == [1, 2, 3]


def test_calls_of_tools_are_said() -> None:
    chat = chat_format(published.QWEN_25)
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": "one"}'}}
    turns: list[Message] = [
        *CHAT[:2],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "two"},
        CHAT[2],
    ]
    ((ids, mask),) = chat.encode(turns)
    assert said(chat.tokenizer, ids, mask) == (
        '<tool_call>\n{"name": "add", "arguments": {"a": "one"}}\n</tool_call><|im_end|>It is two.<|im_end|>'
    )


_USER = "{% if m['role']=='user' %}{{'USER: '+m['content']+' ASSISTANT:'}}{% else %}{{' '+m['content']}}{% endif %}"
NO_END = replace(
    published.PHI_4, template="{% for m in messages %}" + _USER + "{% endfor %}", eos="</s>"
)
HEADERS = "{% for m in messages %}{{'<|im_start|>'+m['role']+'\\n'+m['content']+'<|im_end|>\\n'}}{% endfor %}"
PARTS = "{% for m in messages %}<|im_start|>{% for c in m['content'] %}{{c['text']}}{% endfor %}<|im_end|>{% endfor %}"


def test_a_turn_that_nothing_ends_gets_the_end_of_text_once() -> None:
    chat = chat_format(NO_END)
    assert chat.end_ids == []
    ((ids, mask),) = chat.encode(CHAT[1:5])
    assert (ids, mask) == expected(
        chat.tokenizer, [f"USER: {Q1} ASSISTANT:", f" {A1}", f"USER: {Q2} ASSISTANT:", f" {A2}</s>"]
    )
    ((ids, mask),) = chat.encode(CHAT[1:3], append_eos=False)
    assert said(chat.tokenizer, ids, mask) == f" {A1}"


def test_the_header_is_not_said_where_there_is_no_generation_prompt() -> None:
    chat = chat_format(replace(published.QWEN_25, template=HEADERS))
    ((ids, mask),) = chat.encode(CHAT[1:3])
    assert said(chat.tokenizer, ids, mask) == A1 + "<|im_end|>"


def test_content_is_given_as_parts_where_the_template_wants_them() -> None:
    chat = chat_format(replace(published.QWEN_25, template=PARTS))
    ((ids, mask),) = chat.encode(CHAT[1:3])
    assert chat.tokenizer.decode(ids) == f"<|im_start|>{Q1}<|im_end|><|im_start|>{A1}<|im_end|>"
    assert said(chat.tokenizer, ids, mask) == A1 + "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('no') }}", "renders neither .*no"),
        ("{{ messages | length }}", "renders neither"),
        ("{{ unknown.attribute }}", "renders neither .*UndefinedError"),
    ],
)
def test_a_template_that_renders_nothing_is_refused_at_once(template: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        chat_format(replace(published.QWEN_25, template=template))


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (HEADERS.replace("{{'<", "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{'<"), "refuses it .*no system"),
        (HEADERS.replace("{{'<", "{% if m.role != 'system' %}{{'<").replace("n'}}", "n'}}{% endif %}"), "leaves out what the system says .'Be brief.'"),
        (HEADERS.replace("m['content']", "m['content'].replace('one and', '')"), "leaves out what the user says .'What is one"),
        (HEADERS.replace("m['content']", "m['content'].replace('welcome', '')"), "leaves out what the assistant says .'You are welcome"),
    ],
)  # fmt: skip
def test_a_chat_that_is_not_rendered_whole_is_refused(template: str, error: str) -> None:
    chat = chat_format(replace(published.QWEN_25, template=template))
    with pytest.raises(ChatError, match=error):
        chat.encode(CHAT)


def test_what_follows_the_last_turn_is_left_out() -> None:
    chat = chat_format(published.GEMMA_3)
    assert chat.encode(CHAT[:6]) == chat.encode(CHAT[:5])
    with pytest.raises(ChatError, match="no assistant's turn"):
        chat.encode(CHAT[:2])


def test_the_date_is_the_given_one() -> None:
    tokenizer = build_tokenizer(published.LLAMA_31)
    texts = [
        tokenizer.decode(ChatFormat(tokenizer, date=d).encode_prompt(CHAT[:2]))
        for d in (DATE, "2025-01-02")
    ]
    assert ["26 Jul 2024" in texts[0], "02 Jan 2025" in texts[1]] == [True, True]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("GEMMA_3", "<end_of_turn>"),
        ("QWEN_3", "<|im_end|>"),
        ("GPT_OSS", "<|return|>"),
        ("GLM_4", None),
    ],
)
def test_the_token_that_ends_a_turn_is_known(name: str, end: str | None) -> None:
    chat = chat_format(getattr(published, name))
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_ids) == ([end] if end else [])


def said_by(chat: ChatFormat, messages: list[Any], **keys: Any) -> list[str]:
    (rendering,) = chat.encode(messages, **keys)
    ids, mask = rendering
    return [chat.tokenizer.decode([t for t, is_said in zip(ids, mask, strict=True) if is_said])]


def test_a_turn_marked_in_two_blocks_is_learned_whole() -> None:
    marked = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = chat_format(replace(published.QWEN_25, template=marked))
    assert said_by(chat, CHAT, turns="last") == [A3 + "<|im_end|>"]


def test_a_turn_of_weight_0_carries_no_loss() -> None:
    chat = chat_format(published.QWEN_25)
    weighted = [{**m, "weight": 0} if m["content"] == A1 else m for m in CHAT]
    assert said_by(chat, weighted) == [f"{A2}<|im_end|>{A3}<|im_end|>"]


def test_dropped_tools_repeated_turns_and_printed_parts_are_refused() -> None:
    no_tools = chat_format(replace(published.QWEN_25, template=HEADERS))
    with pytest.raises(ChatError, match="leaves out the tool 'add'"):
        no_tools.encode(CHAT, tools=[{"type": "function", "function": {"name": "add"}}])
    first = HEADERS.replace(
        "in messages", "in (messages if messages[0] != messages[1] else messages[1:])"
    )
    twice = [CHAT[1], CHAT[1], CHAT[2]]
    with pytest.raises(ChatError, match="leaves out what the user says"):
        chat_format(replace(published.QWEN_25, template=first)).encode(twice)
    parts = HEADERS.replace(
        "m['content']", "(m['content'] | string if m['content'] is not string else '')"
    )
    with pytest.raises(ValueError, match="renders neither"):
        chat_format(replace(published.QWEN_25, template=parts))
