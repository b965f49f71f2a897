"""Chats from a config to the report: a student that learned turns from a file of either form ends its own."""

import json
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.io.files import read_json
from retort.tokens.index import TokenIndex
from support.place import Place, tiny

TEMPLATE = (
    "{% for m in messages %}{{ '<turn>' + m.role + ': ' + m.content + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant: ' }}{% endif %}"
)
FORMS = {"messages": ("role", "content"), "conversations": ("from", "value")}
NAMES = {"messages": ("user", "assistant"), "conversations": ("human", "gpt")}


def write_chats(place: Place, form: str) -> None:
    """Write chats of two turns, and one row with nothing to learn."""
    (role, content), (user, assistant) = FORMS[form], NAMES[form]
    rows: list[Any] = []
    for letter in "abcdefghijklmnopqrstuvwx":
        said = [(user, letter), (assistant, "bird"), (user, letter * 2), (assistant, "blue bird")]
        rows.append({form: [{role: who, content: what} for who, what in said]})
    rows.append({form: [{role: user, content: "a question"}]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place.path / "chats.jsonl").write_text(lines)


def add_template(place: Place) -> None:
    """Give the teacher a chat template whose turns end with a token of their own, in a spare row of its layer."""
    tokenizer = AutoTokenizer.from_pretrained(place.path / "teacher")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "</turn>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place.path / "teacher")


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_chats_make_a_student_that_ends_its_turns(fresh: Place, form: str) -> None:
    write_chats(fresh, form)
    add_template(fresh)
    dataset = {"data_files": "chats.jsonl", "validation_fraction": 0.2, "num_shards": 1}
    training = {"max_steps": 120, "save_steps": 120, "logging_steps": 60}
    runs = {"hybrid": {"training": {"distillation_type": "hybrid", "alpha": 1.0}}}
    evaluation = {"samples": {"num_samples": 2, "max_new_tokens": 12, "prompts": ["a"]}}
    fresh.write_config(tiny(dataset=dataset, training=training, evaluation=evaluation, runs=runs))
    fresh.snakemake()
    assert "hybrid" in (fresh.results / "summary.txt").read_text()
    (path,) = fresh.results.glob("tokens/*/index.json")
    documents = TokenIndex.read(path).record.counts.documents
    assert (documents.skipped, documents.rows) == ({"empty_response": 1}, {"empty_response": [24]})
    (final,) = fresh.results.glob("runs/hybrid/*/final")
    tokenizer = AutoTokenizer.from_pretrained(final)
    student = AutoModelForCausalLM.from_pretrained(final)
    assert tokenizer.chat_template == TEMPLATE
    ends = tokenizer.convert_tokens_to_ids(["</s>", "</turn>"])
    assert student.generation_config.eos_token_id == ends
    prompt = tokenizer("<turn>user: a</turn>\n<turn>assistant: ", return_tensors="pt")
    out = student.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(out[0]).endswith("assistant: bird</turn>")
    (samples,) = fresh.results.glob("runs/hybrid/*/evaluation/*/samples.json")
    found = read_json(samples)
    assert found["prompts"][-1]["text"] == "a"
    assert found["models"]["student"]["continued"][-1]["greedy"] == "bird"
