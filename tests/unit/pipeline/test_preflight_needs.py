"""What a job would need and not find hours later is found by the checks, all of it at once."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from retort.io.files import read_json, write_json
from retort.models.quantized import name_method
from retort.pipeline import packages
from retort.training.checkpoints import CheckpointId, Progress, shared_settings, write_marker
from support.checked import Setting, copy_teacher
from support.corpora import write_jsonl
from support.sections import section


@pytest.fixture
def teacher(setting: Setting, tiny_teacher: Path) -> Path:
    """A copy of the teacher, to be changed."""
    folder = copy_teacher(setting.folder / "changed", tiny_teacher)
    setting.config["teacher"]["model_path"] = str(folder)
    return folder


def quantize(folder: Path, **keys: Any) -> None:
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"quantization_config": keys})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install -U bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "pip install optimum gptqmodel,"),
        ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "pip install compressed-tensors"),
        ({"quant_method": "fbgemm_fp8"}, "pip install fbgemm-gpu,"),
        ({"quant_method": "nvfp4"}, "is not supported"),
        ({"quant_method": "modelopt"}, "which this version of transformers does not load"),
    ],
)
def test_what_quantized_weights_need_is_said_before_any_job(
    setting: Setting, teacher: Path, keys: dict[str, Any], said: str
) -> None:
    if name_method(keys) in AUTO_QUANTIZER_MAPPING and find_spec(said.split()[-1].strip(",")):
        pytest.skip("it is installed here")
    quantize(teacher, **keys)
    assert said in setting.refuse(f"weights quantized with {name_method(keys)}")


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_quantized_weights_that_need_nothing_pass(
    setting: Setting, teacher: Path, method: str
) -> None:
    quantize(teacher, quant_method=method)
    assert setting.check()


def test_quantized_weights_and_other_mistakes_are_given_at_once(
    setting: Setting, teacher: Path
) -> None:
    quantize(teacher, quant_method="modelopt")
    with pytest.raises(ValueError, match="the config has 3 mistakes:") as caught:
        setting.check(dataset={"text_column": "body"}, teacher={"attn_implementation": "flash"})
    assert all(part in str(caught.value) for part in ("modelopt", "'flash'", "column 'body'"))


def test_an_attention_that_is_not_installed_or_unknown_is_refused(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    flash = {"attn_implementation": "flash_attention_2"}
    setting.refuse(r"'flash_attention_2', for which flash-attn or kernels must", teacher=flash)
    wrong = {"attn_implementation": "flash"}
    setting.refuse(r"'flash', but transformers knows eager, flash_attention_2,", teacher=wrong)
    for name in ("eager", "sdpa", "flex_attention", "someone/flash-attn3"):
        setting.check(teacher={"attn_implementation": name})


def test_what_a_students_optimizer_and_attention_need_is_said_before_any_job(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    for optim, package in (
        ("paged_adamw_8bit", "bitsandbytes"),
        ("adamw_torch_8bit", "torchao"),
        ("stable_adamw", "torch-optimi"),
    ):
        said = f"optim is '{optim}', for which {package} must be installed. Type: pip install {package}"
        setting.refuse(said, training={"optim": optim})
    flash = {"attn_implementation": "flash_attention_2"}
    setting.refuse(r"the student .* has training.attn_implementation 'flash_a.*", training=flash)
    for name in ("eager", "sdpa", "flex_attention"):
        setting.check(training={"attn_implementation": name, "optim": "muon"})


def test_what_freezes_nothing_or_everything_is_refused_before_any_job(setting: Setting) -> None:
    setting.refuse(
        "has 'no_such', which is found in no parameter", training={"freeze": ["no_such"]}
    )
    setting.refuse("together freeze every parameter of the", training={"freeze": ["e"]})
    setting.check(training={"freeze": [r"layers\.0\.mlp", "lm_head"]})


def test_what_lora_needs_is_said_before_any_job(
    setting: Setting, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = {"config": None, "model_path": str(tiny_teacher)}
    notes = setting.check(student=student, training={"lora": {"rank": 4}})
    trained = 2 * 4 * (4 * (16 + 16) + 3 * (16 + 32))
    assert any(f"LoRA of rank 4 ({trained:,} parameters)" in note for note in notes)
    for targets, said in (("query", "is no module of"), ("lm_head", "the embedding or output")):
        lora = {"rank": 4, "target_modules": ["q_proj", targets]}
        setting.refuse(f"has '{targets}', .*{said}", student=student, training={"lora": lora})
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    said = r"lora.rank is 4, for which peft must be installed. Type: pip install peft"
    setting.refuse(said, student=student, training={"lora": {"rank": 4}})
    setting.check(student=student)


def test_a_checkpoint_to_start_from_must_be_there_before_the_end_and_of_the_same_settings(
    setting: Setting,
) -> None:
    folder = setting.folder / "checkpoint-7"
    start: dict[str, Any] = {"resume_from_checkpoint": str(folder)}
    setting.refuse("checkpoint-7', which lacks trainer_state.json, scheduler.pt", training=start)
    folder.mkdir()
    (folder / "scheduler.pt").write_bytes(b"x")
    (folder / "optimizer.pt").write_bytes(b"x")
    write_json(folder / "trainer_state.json", {"global_step": 7, "max_steps": 8})
    start |= {"learning_rate": 0.01, "weight_decay": 0.1, "max_steps": 8}
    setting.refuse("whose optimizer.pt cannot be read", training=start)
    groups = [{"initial_lr": 0.01, "weight_decay": decay} for decay in (0.1, 0.0)]
    torch.save({"state": {}, "param_groups": groups}, folder / "optimizer.pt")
    setting.check(training=start)  # another tool's checkpoint says no more
    progress = Progress(step=7, seconds=1.0, positions=1.0, window={})
    settings = shared_settings(section("training", **start))
    write_marker(folder, CheckpointId("another", "ddp", settings), progress)
    setting.check(training=start)
    setting.check(training=start | {"max_steps": None, "num_epochs": 1})
    setting.check(training=start | {"batch_size": 4, "gradient_accumulation_steps": 2})
    said = "which goes on with {0} {1}, but training.{0} is {2}. Use {1} here too, or"
    for key, own, mine in (
        ("learning_rate", 0.01, 0.02),
        ("weight_decay", 0.1, 0.0),
        ("lr_scheduler_type", "cosine", "linear"),
        ("warmup_steps", 0, 3),
        ("max_steps", 8, 9),
    ):
        setting.refuse(said.format(key, own, mine), training=start | {key: mine})
    said = said.format("batch_size x gradient_accumulation_steps", 8, 16)
    setting.refuse(said, training=start | {"gradient_accumulation_steps": 2})
    settings["lr_scheduler_type"] = "constant"  # whose rate does not depend on the end
    (folder / "complete.json").unlink()
    write_marker(folder, CheckpointId("another", "ddp", settings), progress)
    start |= {"lr_scheduler_type": "constant"}
    setting.check(training=start | {"max_steps": 9})
    late = start | {"max_steps": 7}
    setting.refuse("of step 7, but this run ends at step 7: raise training.max_", training=late)


def test_all_mistakes_are_given_at_once(setting: Setting) -> None:
    with pytest.raises(ValueError, match="the config has 3 mistakes:") as caught:
        setting.check(
            dataset={"text_column": "body"},
            training={"resume_from_checkpoint": "/no/such"},
            teacher={"attn_implementation": "flash"},
            runs={"a": {"training": {"alpha": 0.5}}, "b": {"training": {"alpha": 0.4}}},
        )
    lines = str(caught.value).splitlines()
    assert [line[:3] for line in lines[1:]] == ["1. ", "2. ", "3. "]
    for line, part in zip(lines[1:], ("column 'body'", "'flash'", "/no/such"), strict=True):
        assert part in line


# ---------------------------------------------------------------------------------------------------------
# Characters


def without(letters: str, *, kind: Any) -> Any:
    """Return a tokenizer of single characters without some, and with no token for unknown text."""
    names = ["<s>", *(chr(i) for i in range(1, 127) if chr(i) not in letters)]
    if kind is models.Unigram:
        tokenizer = Tokenizer(models.Unigram([(name, 0.0) for name in names]))
    else:
        tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def give(setting: Setting, folder: Path, tokenizer: Any, rows: list[dict[str, str]]) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    path = write_jsonl(setting.folder / "rows.jsonl", rows)
    setting.config["dataset"]["data_files"] = str(path)


def test_a_line_break_that_the_tokenizer_cannot_encode_is_found(
    setting: Setting, teacher: Path
) -> None:
    rows = [{"text": "", "ask": "a"}, {"text": "b", "ask": "a"}]
    give(setting, teacher, without("\n", kind=models.Unigram), rows)
    columns = {"prompt_column": "ask", "response_column": "text"}
    setting.refuse(
        r"cannot encode '\\n', between prompt and response of document 1, and has no token for unknown",
        dataset=columns,
    )
    setting.check()  # texts without a prompt have no line break here


def test_a_character_of_the_text_that_the_tokenizer_cannot_encode_is_found(
    setting: Setting, teacher: Path
) -> None:
    rows = [{"text": "plain"}, {"text": "caf\u00e9"}]
    give(setting, teacher, without("", kind=models.Unigram), rows)
    said = setting.refuse(r"cannot encode '\u00e9', in the text of document 1")
    assert json.dumps(said)


def test_a_character_that_the_tokenizer_leaves_out_is_noted(
    setting: Setting, teacher: Path
) -> None:
    rows = [{"text": "plain"}, {"text": "caf\u00e9 {x}"}]
    give(setting, teacher, without("{", kind=models.BPE), rows)
    (note,) = [note for note in setting.check() if "no token" in note]
    assert "for 2 of the characters in the first 2 documents ('{', '\u00e9')" in note


def test_a_student_with_far_more_ids_than_tokens_is_noted(
    setting: Setting, tiny_student: Path
) -> None:
    for ids, is_noted in ((330, False), (4000, True)):
        path = setting.folder / "wide.json"
        write_json(path, read_json(tiny_student) | {"vocab_size": ids})
        notes = "\n".join(setting.check(student={"config": str(path)}))
        assert ("has 4,000 ids, 3,680 more than there are tokens" in notes) == is_noted
