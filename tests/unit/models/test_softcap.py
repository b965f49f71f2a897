"""A softcap in the attention is never left out, whatever attention transformers chooses by itself."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2PreTrainedModel

from retort.io.files import read_json, write_json
from retort.models.load import load_pretrained, load_teacher
from retort.models.students import build_student
from retort.pipeline.packages import find_missing_packages
from retort.tokens.tokenizer import load_tokenizer
from support.sections import section
from support.tiny import WIDTH

SIZES: dict[str, Any] = {
    "vocab_size": WIDTH,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 1,  # great scores, which the softcap changes
    "initializer_range": 0.5,
}


@pytest.fixture
def gemma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a softcap, which transformers loads with sdpa as some versions do."""
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, attn_logit_softcapping=1.0, attn_implementation="eager")
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    assert (
        Gemma2ForCausalLM.from_pretrained(tmp_path / "gemma").config._attn_implementation == "sdpa"
    )
    return tmp_path / "gemma"


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.arange(1, 30)[None]).logits
    return found


def test_the_softcap_is_kept_and_said(gemma: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    expected = logits(Gemma2ForCausalLM.from_pretrained(gemma, attn_implementation="eager"))
    bare = Gemma2ForCausalLM.from_pretrained(gemma, attn_implementation="eager")
    for layer in bare.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (logits(bare) - expected).abs().max() > 1e-3  # it matters here
    found = load_pretrained(str(gemma), dtype=torch.float32)
    assert torch.equal(logits(found), expected)
    assert "uses eager attention: its attention has a softcap" in caplog.text
    teacher = load_teacher(str(gemma), section("teacher", device="cpu", dtype="float32"))
    assert torch.equal(logits(teacher.model), expected)


def test_sdpa_by_name_is_refused_before_any_job(gemma: Path) -> None:
    config = Gemma2Config.from_pretrained(gemma)
    teacher = section("teacher", model_path="gemma", attn_implementation="sdpa")
    (fault,) = find_missing_packages(config, teacher)
    assert re.search(r"'gemma' has a softcap .*'sdpa' leaves out", fault)
    assert not [*find_missing_packages(Gemma2Config(attn_logit_softcapping=None), teacher)]
    teacher = section("teacher", model_path="gemma", attn_implementation="flex_attention")
    assert not [*find_missing_packages(config, teacher)]


def test_a_student_from_a_config_keeps_it_too(
    gemma: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    write_json(tmp_path / "own.json", read_json(gemma / "config.json"))
    built = build_student(
        section("student", config=str(tmp_path / "own.json")),
        vocabulary=WIDTH,
        tokenizer=load_tokenizer(str(tiny_teacher)),
        seed=0,
    )
    assert built.config._attn_implementation == "eager"


def test_models_without_a_softcap_keep_sdpa(tiny_teacher: Path) -> None:
    model = load_pretrained(str(tiny_teacher), dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa"
