"""The fingerprint of a tokenizer changes with every file that decides its ids or how it renders chats."""

import re
from pathlib import Path

import pytest
import transformers

from retort.io.fingerprints import fingerprint_tokenizer, list_tokenizer_files

FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model.v3",
    "tekken.json",
    "qwen.tiktoken",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "tokenization_mine.py",
)


@pytest.mark.parametrize("name", FILES)
def test_every_file_counts(tmp_path: Path, name: str) -> None:
    (tmp_path / "vocab.txt").write_text("first")
    found = {fingerprint_tokenizer(tmp_path)}
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for content in ("a", "b"):
        path.write_text(content)
        found.add(fingerprint_tokenizer(tmp_path))
    assert len(found) == 3


def test_files_of_the_model_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    before = fingerprint_tokenizer(tmp_path)
    for name in (
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "README.md",
        "modeling_x.py",
    ):
        (tmp_path / name).write_text("{}")
    assert fingerprint_tokenizer(tmp_path) == before


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"no tokenizer in .*: expected tokenizer.json, tokenizer.model"
    ):
        fingerprint_tokenizer(tmp_path)


def test_every_file_that_a_tokenizer_of_transformers_reads_counts(tmp_path: Path) -> None:
    models = Path(transformers.__file__).parent / "models"
    names: set[str] = set()
    for source in models.glob("*/tokenization*.py"):
        for declared in re.findall(r"VOCAB_FILES_NAMES = \{([^}]*)\}", source.read_text()):
            names |= set(re.findall(r': "([^"]+)"', declared))
    assert {"vocab.txt", "spiece.model", "merges.txt"} <= names
    for name in names:
        (tmp_path / name).write_text("x")
    assert {path.name for path in list_tokenizer_files(tmp_path)} == names
