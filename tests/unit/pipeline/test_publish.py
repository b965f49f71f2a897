"""`retort publish`, against a Hub on 127.0.0.1: what is uploaded, who may read it, what is refused, no token shown."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from transformers import AutoModelForCausalLM, LlamaConfig

from retort.cache.reader import LogitCache
from retort.io.digests import digest_folder
from retort.pipeline.publish import publish
from retort.teacher.merge import build_manifest
from retort.teacher.records import Manifest
from retort.tokens.index import TokenIndex
from retort.tokens.tokenizer import load_tokenizer
from retort.training.model_card import MODEL, SCORES
from support.hub_uploads import TOKEN, UploadHub, serve_uploads
from support.records import make_training_record
from support.reports import write_run
from support.tiny import WIDTH, make_cache, tokenize

REPO = "someone/student"
CARD = f"---\ntags: [retort]\n---\n# soft\n{SCORES[0]}\nNot measured yet.\n{SCORES[1]}\n`{MODEL}`\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serve_uploads(tmp_path) as hub:
        yield hub


@pytest.fixture
def run(tmp_path: Path, tiny_teacher: Path) -> Path:
    """A finished run with its evaluation."""
    final = tmp_path / "run" / "final"
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=WIDTH, num_attention_heads=2, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(final)
    load_tokenizer(str(tiny_teacher)).save_pretrained(final)
    (final / "README.md").write_text(CARD)
    record = make_training_record("soft", "hybrid", final=digest_folder(final))
    record.write(final.with_name("training.json"))
    metrics = write_run(tmp_path / "other", "soft").read_bytes()
    path = final.parent / "evaluation" / "0123456789ab" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(metrics)
    return final.parent


def send(hub: UploadHub, path: Path, repo: str = REPO, **given: Any) -> str:
    return publish(path, repo, api=HfApi(endpoint=hub.endpoint), **given)


@pytest.mark.slow
def test_a_published_student_is_private_and_loads_from_the_hub(hub: UploadHub, run: Path) -> None:
    (run / "final" / ".hidden").touch()
    environment = os.environ | hub.environment
    words = ["-m", "retort", "publish", str(run), "--repo", REPO]
    done = subprocess.run(
        [sys.executable, *words],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"To the new model {REPO}, private:")
    size = (run / "final" / "model.safetensors").stat().st_size
    assert f"{size:>15,}  model.safetensors" in done.stdout
    assert done.stdout.strip().endswith(f"{REPO}/commit/{hub.sha}")
    assert TOKEN not in done.stdout + done.stderr + str(words)
    assert hub.private == {f"models/{REPO}"}
    stored = {p.name for p in hub.repositories[f"models/{REPO}"].iterdir()}
    assert stored == {p.name for p in (run / "final").iterdir()} - {".hidden"}
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M;"
        f"torch.save(M.from_pretrained({REPO!r}).state_dict(), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(run / "loaded")], env=environment, check=True)
    mine = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    loaded = torch.load(run / "loaded")
    assert mine.keys() == loaded.keys() and all(torch.equal(mine[k], loaded[k]) for k in mine)


def test_the_card_that_is_uploaded_has_the_numbers_and_the_id(hub: UploadHub, run: Path) -> None:
    (run / "run.json").write_text(
        json.dumps({"config": {"student": {"config": "/home/me/s.json"}}})
    )
    before = CARD + "learned from /home/me/s.json\n"
    (run / "final" / "README.md").write_text(before)
    send(hub, run / "final")
    card = (hub.repositories[f"models/{REPO}"] / "README.md").read_text()
    assert "held-out loss" in card and f"`{REPO}`" in card and MODEL not in card
    assert "learned from s.json" in card and "/home/me" not in card
    assert ModelCard(card).data.to_dict()["tags"] == ["retort"]
    assert (run / "final" / "README.md").read_text() == before


def test_adapters_name_the_model_that_they_are_of_without_its_path(
    hub: UploadHub, run: Path
) -> None:
    path = run / "final" / "adapter" / "adapter_config.json"
    path.parent.mkdir()
    for base, published in (("/home/me/base", "base"), ("someone/base", "someone/base")):
        path.write_text(json.dumps({"base_model_name_or_path": base, "r": 8}))
        send(hub, run, "someone/" + published.replace("/", "-"))
        stored = hub.repositories["models/someone/" + published.replace("/", "-")]
        settings = json.loads((stored / "adapter" / "adapter_config.json").read_text())
        assert settings == {"base_model_name_or_path": published, "r": 8}


def test_what_an_interrupted_upload_had_sent_is_not_sent_again(hub: UploadHub, run: Path) -> None:
    hub.lost = 1
    with pytest.raises(ValueError, match="the Hub refused"):
        send(hub, run)
    assert hub.received == [] and hub.private == {f"models/{REPO}"}
    send(hub, run)
    assert len(hub.received) == 1
    send(hub, run, revision="second")
    assert len(hub.received) == 1
    assert f"POST /api/models/{REPO}/branch/second" in hub.seen


def test_a_repository_that_all_can_read_is_written_to_only_where_that_was_said(
    hub: UploadHub, run: Path
) -> None:
    hub.create(f"models/{REPO}", is_private=False)
    with pytest.raises(ValueError, match="exists and is public: give --public"):
        send(hub, run)
    assert not [*hub.repositories[f"models/{REPO}"].iterdir()] and not hub.received
    send(hub, run, is_public=True)
    send(hub, run, "someone/private")
    with pytest.raises(ValueError, match="exists and is private"):
        send(hub, run, "someone/private", is_public=True)
    assert hub.private == {"models/someone/private"}


def test_without_a_token_or_with_a_wrong_one_nothing_is_made(
    hub: UploadHub, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = "hf_" + "wrong" * 6
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(ValueError, match="the Hub refused") as refused:
        send(hub, run)
    assert wrong not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(ValueError, match=r"there is no token .* HF_TOKEN"):
        send(hub, run)
    assert not hub.repositories


def test_a_broken_connection_is_one_sentence(hub: UploadHub, run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(
        ValueError, match=r"connection to the Hub broke .* the same command"
    ) as broken:
        publish(run, REPO, api=HfApi(endpoint=f"http://127.0.0.1:{port}"))  # where nobody listens
    assert TOKEN not in str(broken.value)


def test_an_unfinished_or_changed_student_is_refused(hub: UploadHub, run: Path) -> None:
    (run / "final" / "README.md").rename(run / "card")
    with pytest.raises(ValueError, match="needs its card"):
        send(hub, run)
    (run / "final" / "README.md").write_text(CARD.replace("tags", "license: my own\ntags"))
    with pytest.raises(ValueError, match='license" must be one of'):
        send(hub, run)
    (run / "final" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"final is not what .*config\.json"):
        send(hub, run)
    (run / "training.json").unlink()
    with pytest.raises(ValueError, match="Its training has not ended"):
        send(hub, run)
    assert not hub.received


def test_a_cache_becomes_a_dataset_that_opens(
    hub: UploadHub, tmp_path: Path, tiny_corpus: Path, tiny_teacher: Path
) -> None:
    index_path = tokenize(tmp_path / "tokens", tiny_corpus, tiny_teacher)
    folder = tmp_path / "cache"
    cache = make_cache(folder, index_path, tiny_teacher, top_k=8)
    with pytest.raises(ValueError, match="is not a finished cache"):
        send(hub, folder)
    build_manifest(cache, TokenIndex.read(index_path)).write(folder / "manifest.json")
    record = {"workers": [{"made": {"config": {"teacher": {"model_path": str(tiny_teacher)}}}}]}
    (folder / "run.json").write_text(json.dumps(record))
    send(hub, folder, "someone/logits")
    stored = hub.repositories["datasets/someone/logits"]
    assert {p.name for p in stored.iterdir()} == {"teacher_logits.h5", "manifest.json", "README.md"}
    assert LogitCache(stored / "teacher_logits.h5").header == cache.header
    card = (stored / "README.md").read_text()
    for part in (
        cache.header.tokenizer,
        cache.header.tokens,
        "top_k",
        f"`{tiny_teacher.name}` (local)",
    ):
        assert part in card
    assert str(tiny_teacher.parent) not in card + (stored / "manifest.json").read_text()
    manifest = Manifest.read(folder / "manifest.json")
    manifest.model_copy(update={"file_bytes": 1}).write(folder / "manifest.json")
    with pytest.raises(ValueError, match="is not the cache that"):
        send(hub, folder, "someone/logits")
    manifest.model_copy(update={"mode": "virtual"}).write(folder / "manifest.json")
    with pytest.raises(ValueError, match="is virtual"):
        send(hub, folder, "someone/logits")
