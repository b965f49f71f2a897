"""Students from configs and from checkpoints, and the error for each that cannot be built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from retort.io.files import read_json, write_json
from retort.models.load import output_width
from retort.models.students import build_student, describe_ids, student_config
from retort.tokens.tokenizer import load_tokenizer
from support.sections import section
from support.tiny import WIDTH


def build(student: Any, teacher: Path, *, seed: int = 0) -> PreTrainedModel:
    tokenizer = load_tokenizer(str(teacher))
    return build_student(student, vocabulary=WIDTH, tokenizer=tokenizer, seed=seed)


def test_student_config_fills_in_vocabulary_and_special_tokens(
    tiny_student: Path, tiny_teacher: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    student = section("student", config=str(tiny_student))
    found = student_config(student, vocabulary=WIDTH, tokenizer=tokenizer)
    assert output_width(found) == WIDTH
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 1, 2)


def test_student_config_keeps_what_the_json_says(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    content = read_json(tiny_student) | {"vocab_size": 400, "eos_token_id": 7}
    write_json(tmp_path / "own.json", content)
    found = student_config(
        section("student", config=str(tmp_path / "own.json")),
        vocabulary=WIDTH,
        tokenizer=load_tokenizer(str(tiny_teacher)),
    )
    assert output_width(found) == 400 and found.eos_token_id == 7


def test_a_smaller_vocabulary_is_refused_with_both_numbers(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    write_json(tmp_path / "own.json", read_json(tiny_student) | {"vocab_size": WIDTH})
    tokenizer = load_tokenizer(str(tiny_teacher))
    of_json = section("student", config=str(tmp_path / "own.json"))
    of_model = section("student", model_path=str(tiny_teacher))
    tokenizer.add_tokens([f"<{i}>" for i in range(WIDTH - len(tokenizer))])
    for student in (of_json, of_model):
        assert output_width(student_config(student, vocabulary=400, tokenizer=tokenizer)) == WIDTH
    tokenizer.add_tokens(["<one more>"])
    refusals = [
        (of_json, f"vocab_size: {WIDTH + 1} or more, or leave it out"),
        (of_model, "a student of the same tokenizer"),
    ]
    for student, advice in refusals:
        words = rf"vocab_size is {WIDTH} .* the {WIDTH + 1} ids of the tokenizer.*{advice}"
        with pytest.raises(ValueError, match=words):
            student_config(student, vocabulary=WIDTH, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "content", [{"model_type": "no-such-model"}, {"model_type": "llama", "hidden_size": "wide"}]
)
def test_a_config_that_transformers_refuses_is_one_sentence(
    content: dict[str, Any], tmp_path: Path, tiny_teacher: Path
) -> None:
    write_json(tmp_path / "own.json", content)
    student = section("student", config=str(tmp_path / "own.json"))
    with pytest.raises(ValueError, match=r"own\.json' is not a valid transformers"):
        student_config(student, vocabulary=WIDTH, tokenizer=load_tokenizer(str(tiny_teacher)))


def test_students_weights_depend_on_the_seed_only(tiny_student: Path, tiny_teacher: Path) -> None:
    student = section("student", config=str(tiny_student))
    first = build(student, tiny_teacher, seed=3).state_dict()
    torch.manual_seed(99)
    again = build(student, tiny_teacher, seed=3).state_dict()
    other = build(student, tiny_teacher, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert all(value.dtype == torch.float32 for value in first.values())


def test_a_student_from_a_checkpoint_starts_with_its_weights(tiny_teacher: Path) -> None:
    found = build(section("student", model_path=str(tiny_teacher)), tiny_teacher).state_dict()
    expected = LlamaForCausalLM.from_pretrained(tiny_teacher).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_bert_student_is_refused_when_it_is_built(tmp_path: Path, tiny_teacher: Path) -> None:
    path = tmp_path / "bert.json"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    path.write_text(json.dumps({"model_type": "bert", "num_attention_heads": 2, **sizes}))
    with pytest.raises(ValueError, match=r"bert\.json\).*not a causal language model"):
        build_student(
            section("student", config=str(path)),
            vocabulary=WIDTH,
            tokenizer=load_tokenizer(str(tiny_teacher)),
            seed=0,
        )


def test_a_student_with_fewer_ids_than_the_tokenizer_grows_on_request(
    tmp_path: Path, tiny_teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.add_tokens([f"<{i}>" for i in range(WIDTH - len(tokenizer) + 3)])
    student = section("student", model_path=str(tiny_teacher), grow_embedding=True)
    grown = build_student(student, vocabulary=WIDTH, tokenizer=tokenizer, seed=0)
    assert f"grows from {WIDTH} ids to {WIDTH + 3}" in caplog.text
    own = LlamaForCausalLM.from_pretrained(tiny_teacher)
    for found, before in (
        (grown.get_input_embeddings().weight, own.get_input_embeddings().weight),
        (grown.get_output_embeddings().weight, own.get_output_embeddings().weight),
    ):
        assert torch.equal(found[:WIDTH], before)
        assert len(found) == WIDTH + 3 and torch.isfinite(found).all()
    grown.save_pretrained(tmp_path / "grown")
    assert output_width(LlamaForCausalLM.from_pretrained(tmp_path / "grown").config) == WIDTH + 3
    again = build_student(student, vocabulary=WIDTH, tokenizer=tokenizer, seed=0)
    assert torch.equal(again.get_input_embeddings().weight, grown.get_input_embeddings().weight)
    wide = student_config(student, vocabulary=WIDTH, tokenizer=tokenizer)
    assert "grows from 320 ids to the 323" in str(describe_ids(student, wide, vocabulary=WIDTH))
    enough = load_tokenizer(str(tiny_teacher))
    same = build_student(student, vocabulary=WIDTH, tokenizer=enough, seed=0)
    assert output_width(same.config) == WIDTH


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "has a quantization_config, but students are trained in full precision",
        ),
        (
            {
                "model_type": "qwen3_moe",
                "output_router_logits": True,
                "router_aux_loss_coef": 100.0,
            },
            r"the loss that balances its experts \(weight 100\), which is not part",
        ),
    ],
)
def test_what_would_be_left_out_or_could_not_be_loaded_is_refused(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path, keys: dict[str, Any], said: str
) -> None:
    path = tmp_path / "own.json"
    write_json(path, read_json(tiny_student) | keys)
    with pytest.raises(ValueError, match=said):
        build(section("student", config=str(path)), tiny_teacher)
    loose = keys | {"quantization_config": None, "output_router_logits": False, "num_experts": 2}
    sizes = {"moe_intermediate_size": 8, "num_experts_per_tok": 1}
    write_json(path, read_json(tiny_student) | loose | sizes)
    assert build(section("student", config=str(path)), tiny_teacher)
