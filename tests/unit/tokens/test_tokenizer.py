"""Tokenizers: identified by files or vocabulary, loaded without PyTorch, refused with the next step."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retort.tokens.tokenizer import encode_prompt, identify_tokenizer, load_tokenizer
from support.tiny import CHAT_TEMPLATE


def test_a_local_tokenizer_is_identified_by_its_files(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    found = identify_tokenizer(str(tiny_teacher), tokenizer)
    assert found.size == 300
    assert found != identify_tokenizer("hub/id", tokenizer)


def test_a_hub_tokenizer_is_identified_by_vocabulary_and_template(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    found = [identify_tokenizer("hub/id", tokenizer)]
    tokenizer.chat_template = CHAT_TEMPLATE
    found.append(identify_tokenizer("hub/id", tokenizer))
    tokenizer.add_tokens(["<new>"])
    found.append(identify_tokenizer("hub/id", tokenizer))
    assert len({f.fingerprint for f in found}) == 3


@pytest.mark.parametrize(
    ("path", "says"), [("./absent", "no such folder"), ("empty", "save_pretrained")]
)
def test_a_folder_that_is_not_a_tokenizer_is_refused_with_the_next_step(
    path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=says) as caught:
        load_tokenizer(path)
    assert repr(path) in str(caught.value)


_WITHOUT_TORCH = """
import json, sys
from retort.tokens.tokenizer import encode_prompt, identify_tokenizer, without_torch, load_tokenizer
with without_torch():
    tokenizer = load_tokenizer(sys.argv[1])
text = sys.argv[2]
found = [tokenizer(text)["input_ids"], encode_prompt(text, tokenizer)]
found.append(identify_tokenizer("hub/id", tokenizer).model_dump())
assert "torch" not in sys.modules
from datasets.fingerprint import Hasher
Hasher.hash(tokenizer)  # looks for "torch" in sys.modules
import torch
print(json.dumps([*found, torch.ones(2).tolist()]))
"""


def test_a_tokenizer_is_the_same_without_pytorch_which_can_be_imported_afterwards(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    text = "The quick brown fox, and a day."
    command = [sys.executable, "-c", _WITHOUT_TORCH, str(folder), text]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch" in sys.modules
    tokenizer = load_tokenizer(str(folder))
    ids, prompt = tokenizer(text)["input_ids"], encode_prompt(text, tokenizer)
    assert len(prompt) > len(ids) > 0
    fingerprint = identify_tokenizer("hub/id", tokenizer)
    assert json.loads(done.stdout) == [ids, prompt, fingerprint.model_dump(), [1.0, 1.0]]


def test_merging_needs_no_transformers() -> None:
    code = "import sys, retort.teacher.merge; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
