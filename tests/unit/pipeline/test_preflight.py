"""What the checks before any expensive job find and refuse."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaModel,
    T5Config,
)

from retort.io.files import read_json
from retort.models.load import record_teacher
from retort.pipeline.demo_teacher import DEMO_TEACHER
from retort.tokens.tokenizer import load_tokenizer
from support.checked import Setting, copy_teacher
from support.corpora import write_jsonl
from support.sections import section
from support.store import BUCKET, Store
from support.tiny import NUM_TOKENS, WIDTH, name_token, swap_tokens

SMALL: dict[str, Any] = {
    "vocab_size": WIDTH,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_results_inside_a_folder_that_is_read_whole_are_refused(setting: Setting) -> None:
    (setting.folder / "hub").mkdir()
    write_jsonl(setting.folder / "hub" / "train.jsonl", [{"text": "a text"}] * 9)
    dataset = {"name": str(setting.folder / "hub"), "data_files": None}
    inside = {"results_dir": str(setting.folder / "hub" / "results")}
    setting.refuse(
        r"results go to '.*hub/results', inside the folder", dataset=dataset, output=inside
    )
    outside = {"cache_dir": str(setting.folder / "hub" / "cache")}
    setting.refuse(
        r"results go to '.*hub/cache', inside the folder", dataset=dataset, output=outside
    )


def test_the_check_says_that_such_files_are_trained_on(setting: Setting) -> None:
    for name in ("train", "dev"):
        write_jsonl(setting.folder / f"{name}.jsonl", [{"text": f"the {name} text"}] * 9)
    said = setting.check(dataset={"data_files": str(setting.folder / "*.jsonl")})
    (note,) = (note for note in said if "students train on" in note)
    assert f"{setting.folder}/dev.jsonl, matched by dataset.data_files" in note
    assert "name them as dataset.validation_files" in note
    apart = {
        "data_files": str(setting.folder / "train.jsonl"),
        "validation_files": str(setting.folder / "dev.jsonl"),
    }
    assert not [note for note in setting.check(dataset=apart) if "students train on" in note]


def test_a_copy_of_a_teacher_with_results_is_said_to_be_the_same(
    setting: Setting, tmp_path: Path, tiny_teacher: Path
) -> None:
    copy = shutil.copytree(tiny_teacher, tmp_path / "copy")
    record_teacher(
        tmp_path / "results" / "teachers" / "0123456789ab" / "fingerprint.json",
        section("teacher", model_path=str(tiny_teacher)),
    )
    said = f"copy has the weights and the tokenizer of {tiny_teacher}"
    assert not [note for note in setting.check() if "has the weights" in note]
    (note,) = (
        n for n in setting.check(teacher={"model_path": str(copy)}) if "has the weights" in n
    )
    assert said in note and f"Set teacher.model_path: {tiny_teacher}" in note
    (copy / "tokenizer_config.json").write_text("{}")
    changed = setting.check(teacher={"model_path": str(copy)})
    assert not [note for note in changed if "has the weights" in note]


def test_a_tracker_that_is_missing_or_would_ask_for_a_login_is_refused(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    wanted = {"use_wandb": True}
    setting.refuse(r"no login for api.wandb.ai\. Type: wandb login", tracking=wanted)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    setting.check(tracking=wanted)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    setting.refuse(r"no login for wandb.example.org", tracking=wanted)
    monkeypatch.setenv("WANDB_MODE", "offline")
    setting.check(tracking=wanted)
    monkeypatch.setattr("retort.pipeline.preflight.find_spec", lambda name: None)
    setting.refuse("wandb is not installed here. Type: pip install wandb", tracking=wanted)


def test_a_good_config_passes_and_says_what_was_found(setting: Setting) -> None:
    notes = setting.check()
    assert re.fullmatch(r"corpus: json, 1 files, 0\.0 MB", notes[0])
    beyond = WIDTH - NUM_TOKENS
    assert (
        f"llama, {WIDTH} ids ({beyond} ids beyond its tokenizer get probability zero)" in notes[1]
    )
    assert re.search(r"run student: student of [\d,]+ parameters, hybrid, alpha 0\.5", notes[2])


def test_parameters_in_the_note_are_those_of_the_student(
    setting: Setting, tiny_student: Path
) -> None:
    content = read_json(tiny_student)
    width, inner = content["hidden_size"], content["intermediate_size"]
    expected = 2 * WIDTH * width + 4 * width**2 + 3 * width * inner + 3 * width
    assert f"student of {expected:,} parameters" in setting.check()[2]


def test_every_run_is_checked_and_common_notes_are_given_once(setting: Setting) -> None:
    runs = {
        "a": {"training": {"distillation_type": "output"}},
        "b": {"training": {"distillation_type": "logit"}},
    }
    notes = setting.check(runs=runs)
    kinds = [note.split(":")[0] for note in notes]
    assert kinds == [
        "corpus",
        "teacher",
        "run a",
        "costly default",
        "run b",
        *["costly default"] * 2,
        *["estimate"] * 3,  # text, cache, trainings
    ]
    setting.refuse(
        "vocab_size is 9 ", runs=runs | {"c": {"student": {"config": _student(setting, 9)}}}
    )


def _student(setting: Setting, vocabulary: int, **changes: Any) -> str:
    content = read_json(Path(setting.config["student"]["config"])) | {"vocab_size": vocabulary}
    path = setting.folder / f"student_{vocabulary}.json"
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("key", ["results_dir", "cache_dir"])
def test_a_folder_that_cannot_be_written_is_refused(key: str, setting: Setting) -> None:
    (setting.folder / "file").write_text("not a folder")
    for folder in (setting.folder / "file" / "results", Path("/proc/retort")):
        setting.refuse(
            rf"cannot write to '{folder}' .*output\.results_dir", output={key: str(folder)}
        )


def test_a_store_that_cannot_be_used_is_refused(setting: Setting, store: Store) -> None:
    setting.refuse(
        r"output\.cache_dir: s3://nowhere/a: there is no bucket 'nowhere'",
        output={"cache_dir": "s3://nowhere/a"},
    )
    setting.check(output={"cache_dir": f"s3://{BUCKET}/checked"})
    assert not store.objects("checked")


def test_checking_leaves_nothing_in_the_results_folder(setting: Setting) -> None:
    setting.check()
    assert list((setting.folder / "results").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------
# Teachers


def test_a_missing_teacher_is_refused(setting: Setting) -> None:
    folder = setting.folder / "models" / "none"
    setting.refuse(
        f"cannot load the model '{folder}': there is no such", teacher={"model_path": str(folder)}
    )


def test_a_folder_that_is_no_model_is_refused(setting: Setting, tiny_corpus: Path) -> None:
    setting.refuse(
        "must contain what save_pretrained", teacher={"model_path": str(tiny_corpus.parent)}
    )


def test_a_teacher_without_weights_is_refused(setting: Setting, tiny_teacher: Path) -> None:
    folder = copy_teacher(setting.folder / "bare", tiny_teacher)
    (folder / "model.safetensors").unlink()
    setting.refuse("no model weights in", teacher={"model_path": str(folder)})


def test_a_teacher_without_a_tokenizer_is_refused(setting: Setting, tiny_teacher: Path) -> None:
    folder = copy_teacher(setting.folder / "mute", tiny_teacher)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    setting.refuse("tokenizer", teacher={"model_path": str(folder)})


def test_a_masked_language_model_is_no_teacher(setting: Setting, tiny_teacher: Path) -> None:
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(setting.folder / "bert")
    load_tokenizer(str(tiny_teacher)).save_pretrained(setting.folder / "bert")
    message = setting.refuse(
        r"'bert' model \(BertForMaskedLM\), which is not a causal language model",
        teacher={"model_path": str(setting.folder / "bert")},
    )
    assert "AutoModelForCausalLM" in message


def test_a_model_saved_without_its_head_is_no_teacher(setting: Setting, tiny_teacher: Path) -> None:
    # AutoModelForCausalLM would load it, with random weights for the head.
    LlamaModel(LlamaConfig(**SMALL)).save_pretrained(setting.folder / "headless")
    load_tokenizer(str(tiny_teacher)).save_pretrained(setting.folder / "headless")
    headless = {"model_path": str(setting.folder / "headless")}
    setting.refuse(r"\(LlamaModel\), which is not a causal language model", teacher=headless)


def test_an_encoder_and_decoder_is_no_teacher(setting: Setting, tiny_teacher: Path) -> None:
    folder = copy_teacher(setting.folder / "t5", tiny_teacher)
    T5Config(vocab_size=WIDTH).save_pretrained(folder)
    setting.refuse("'t5' model .*not a causal language model", teacher={"model_path": str(folder)})


def test_a_tokenizer_with_ids_beyond_the_output_layer_is_refused(
    setting: Setting, tiny_teacher: Path
) -> None:
    narrow = copy_teacher(setting.folder / "narrow", tiny_teacher, vocab_size=NUM_TOKENS - 1)
    setting.refuse(
        rf"has {NUM_TOKENS} tokens, but the output layer of teacher '{narrow}' has only {NUM_TOKENS - 1}",
        teacher={"model_path": str(narrow)},
    )
    exact = copy_teacher(setting.folder / "exact", tiny_teacher, vocab_size=NUM_TOKENS)
    notes = setting.check(teacher={"model_path": str(exact)})
    assert f"{NUM_TOKENS} ids" in notes[1] and "beyond" not in notes[1]


@pytest.mark.parametrize("cached", [True, False])
def test_a_tokenizer_with_other_ids_than_the_teachers_is_refused(
    cached: bool, setting: Setting, tiny_teacher: Path
) -> None:
    other = {"tokenizer": str(swap_tokens(setting.folder / "other", tiny_teacher))}
    training = {"use_cached_logits": cached}
    setting.refuse(
        rf"tokenizer '{other['tokenizer']}' and that of the teacher '{tiny_teacher}' give different ids: '[ab]', id",
        dataset=other,
        training=training,
    )
    setting.check(dataset=other, training={"distillation_type": "output"})


def test_a_tokenizer_with_another_chat_template_is_for_a_live_teacher_only(
    setting: Setting, tiny_teacher: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(setting.folder / "chat")
    chat = {"tokenizer": str(setting.folder / "chat")}
    setting.check(dataset=chat, training={"use_cached_logits": False})
    setting.refuse("gives the ids of the teacher .* but its files differ", dataset=chat)


def test_sequences_longer_than_the_teachers_context_are_refused(setting: Setting) -> None:
    setting.refuse(
        r"dataset\.max_length is 129 tokens, but teacher .* at most 128 positions.*max_length: 128 or less",
        dataset={"max_length": 129},
    )
    setting.check(dataset={"max_length": 128})


# ---------------------------------------------------------------------------------------------------------
# Students


def test_a_student_with_too_small_a_vocabulary_is_refused(setting: Setting) -> None:
    needed = NUM_TOKENS
    setting.refuse(
        rf"vocab_size is {needed - 1} .*smaller than the {needed} ids.*vocab_size: {needed}",
        student={"config": _student(setting, needed - 1)},
    )
    for width in (needed, WIDTH - 1, WIDTH, WIDTH + 64):  # narrower and wider than the teacher's
        setting.check(student={"config": _student(setting, width)})


def test_sequences_longer_than_the_students_context_are_refused(setting: Setting) -> None:
    short = _student(setting, WIDTH, max_position_embeddings=47)
    setting.refuse(
        r"dataset\.max_length is 48 tokens, but the student .* at most 47 positions",
        student={"config": short},
    )


def test_a_student_from_a_checkpoint_is_checked_like_any_other(
    setting: Setting, tiny_teacher: Path
) -> None:
    student = {"config": None, "model_path": str(tiny_teacher)}
    assert "run student: student of" in setting.check(student=student)[2]
    missing = {"config": None, "model_path": str(setting.folder / "a" / "b")}
    setting.refuse("cannot load the model", student=missing)


@pytest.mark.parametrize("kind", ["output", "logit"])
def test_a_student_whose_own_tokenizer_has_other_ids_is_refused(
    kind: str, setting: Setting, tiny_teacher: Path
) -> None:
    other = swap_tokens(setting.folder / "other", tiny_teacher)
    setting.refuse(
        rf"that of the student '{other}' give different ids: 'a', id \d+ in the first, is id \d+ in the second",
        student={"config": None, "model_path": str(other)},
        training={"distillation_type": kind},
    )


def test_a_student_whose_tokenizer_has_one_more_token_or_is_missing_passes(
    setting: Setting, tiny_teacher: Path
) -> None:
    more = name_token(setting.folder / "more", tiny_teacher, "<|user|>")
    found = setting.check(student={"config": None, "model_path": str(more)})
    assert len([n for n in found if not n.startswith(("costly default", "estimate"))]) == 3
    for path in more.glob("tokenizer*"):
        path.unlink()
    notes = setting.check(student={"config": None, "model_path": str(more)})
    assert "own tokenizer was not compared" in notes[3]


@pytest.mark.parametrize("key", ["packing", "padding_free"])
def test_a_layout_that_the_student_cannot_have_is_refused(key: str, setting: Setting) -> None:
    config = setting.folder / "bloom.json"
    config.write_text(json.dumps({"model_type": "bloom", "hidden_size": 8, "n_head": 2}))
    student = {"config": str(config)}
    setting.refuse(
        rf"training.{key} is true, but .*Bloom.*training.{key}: auto",
        student=student,
        training={key: True},
    )
    setting.check(student=student, training={key: "auto"})
    setting.check(training={key: True})


def test_without_a_teacher_the_tokenizer_determines_the_students_vocabulary(
    setting: Setting, tiny_teacher: Path
) -> None:
    sections: dict[str, Any] = {
        "teacher": {"model_path": None},
        "dataset": {"tokenizer": str(tiny_teacher)},
        "training": {"distillation_type": "output"},
    }
    notes = setting.check(**sections)
    assert notes[1] == f"no teacher; tokenizer of {NUM_TOKENS} tokens"
    setting.check(student={"config": _student(setting, NUM_TOKENS)}, **sections)
    setting.refuse(
        f"vocab_size is {NUM_TOKENS - 1} ",
        student={"config": _student(setting, NUM_TOKENS - 1)},
        **sections,
    )


def test_the_shape_of_a_part_is_known_before_it_is_pruned(
    setting: Setting, tmp_path: Path, tiny_teacher: Path
) -> None:
    half = {"config": None, "from_teacher": {"layers": 1}}
    small = AutoModelForCausalLM.from_pretrained(tiny_teacher, num_hidden_layers=1)
    (note,) = (note for note in setting.check(student=half) if "parameters" in note)
    assert f"student of {small.num_parameters():,} parameters" in note
    notes = setting.check(student=half, teacher={"model_path": "demo"})
    size = 512 * 128 + (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 128  # ids, a layer, a norm
    assert any(f"student of {size:,} parameters" in note for note in notes)
    deep = {"config": None, "from_teacher": {"layers": 5}}
    setting.refuse("the demo's teacher has 4", student=deep, teacher={"model_path": "demo"})
    path = copy_teacher(tmp_path / "quantized", tiny_teacher, quantization_config={"bits": 4})
    setting.refuse("unquantized weights", student=half | {"model_path": str(path)})
    other = swap_tokens(tmp_path / "swapped", tiny_teacher)
    setting.refuse("give different ids", student=half | {"model_path": str(other)})
    text = {"distillation_type": "output"}
    setting.refuse(
        "give different ids", student=half, dataset={"tokenizer": str(other)}, training=text
    )


def test_the_demos_teacher_is_known_before_it_exists(setting: Setting) -> None:
    notes = setting.check(teacher={"model_path": "demo"})
    assert notes[1] == "teacher: the demo's own, trained first"
    small = {"config": _student(setting, DEMO_TEACHER.vocabulary - 1)}
    setting.refuse(
        f"the {DEMO_TEACHER.vocabulary} ids", teacher={"model_path": "demo"}, student=small
    )


# ---------------------------------------------------------------------------------------------------------
# Corpora: tests/unit/corpus/test_reading.py has all cases


def test_a_missing_column_is_refused_here_too(setting: Setting) -> None:
    setting.refuse("column", dataset={"text_column": "body"})
