"""Where a text ends: at the ends of the tokenizer, its chat template and the generation config together."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from retort.models.ends import list_ends_beside, list_eos_ids, set_special_ids
from support import chat_templates as published
from support.chat_templates import build_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    """A tokenizer whose template ends a turn with another token than a text."""
    return build_tokenizer(published.GEMMA_3)


def make_model(**special: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        **special,
    )
    return LlamaForCausalLM(config)


def test_all_ends_count(tokenizer: Any, tmp_path: Path) -> None:
    text, turn = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert text != turn
    assert list_eos_ids(None, tokenizer) == [text, turn]
    assert list_eos_ids(GenerationConfig(eos_token_id=7), tokenizer) == [text, 7, turn]
    assert list_eos_ids(GenerationConfig(eos_token_id=[turn, 9]), tokenizer) == [text, turn, 9]
    assert list_ends_beside(str(tmp_path), tokenizer) == [text, turn]
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(tmp_path)
    assert list_ends_beside(str(tmp_path), tokenizer) == [text, 7, 9, turn]


def test_a_template_that_is_not_for_chats_has_no_end(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}"
    assert list_eos_ids(None, tokenizer) == [tokenizer.eos_token_id]


def test_special_ids_of_a_copied_config_become_the_tokenizers(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(eos_token_id=151645, bos_token_id=3)
    set_special_ids(model, tokenizer, list_eos_ids(None, tokenizer))
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    ends = list_eos_ids(None, tokenizer)
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    assert loaded.config.bos_token_id == loaded.generation_config.bos_token_id
    assert loaded.config.bos_token_id == tokenizer.bos_token_id
    assert loaded.generation_config.eos_token_id == ends


def test_an_id_outside_of_the_vocabulary_is_dropped_where_the_tokenizer_has_none() -> None:
    tokenizer = build_tokenizer(published.GEMMA_3)
    assert tokenizer.pad_token_id is None
    model = make_model(eos_token_id=[151645, 151643])
    model.config.pad_token_id = 151643
    set_special_ids(model, tokenizer, [*list_eos_ids(None, tokenizer), 151645])
    assert model.config.pad_token_id is None
    assert model.generation_config.eos_token_id == list_eos_ids(None, tokenizer)
