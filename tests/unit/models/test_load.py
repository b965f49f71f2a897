"""Backbone and head, teachers and their records, and the error for each model that cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from retort.io import digests
from retort.io.files import read_json
from retort.io.fingerprints import TeacherRecord, TokenizerIdentity
from retort.models.causal_lm import require_causal, split_model
from retort.models.heads import Head
from retort.models.load import (
    choose_device,
    choose_dtype,
    fingerprint_model,
    load_model_config,
    load_pretrained,
    load_recorded_teacher,
    load_teacher,
    output_width,
    record_teacher,
    require_weights,
)
from retort.tokens.tokenizer import identify_tokenizer, load_tokenizer
from support.sections import section
from support.tiny import NUM_TOKENS, WIDTH, record

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama, tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2, tied": lambda: GPT2Config(**GPT2, vocab_size=37, initializer_range=0.5),
    "gemma2, capped": lambda: Gemma2Config(**SMALL, final_logit_softcapping=2.0),
    "cohere, scaled": lambda: CohereConfig(**SMALL, logit_scale=0.0625),
    "granite, divided": lambda: GraniteConfig(**SMALL, logits_scaling=8.0),
    "neox, untied": lambda: GPTNeoXConfig(**SMALL),
    "phi, with a bias": lambda: PhiConfig(**SMALL),
}


def make_model(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32
        ).eval()
        head = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            torch.nn.init.normal_(head.bias)  # zero would hide that it is left out
    return model


def padded_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, 37, (3, 11), generator=generator)
    attention_BT = torch.ones_like(ids_BT)
    attention_BT[1, 7:] = 0
    return ids_BT, attention_BT


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_backbone_and_head_give_the_models_own_logits(name: str) -> None:
    model = make_model(CONFIGS[name]())
    split = split_model(model)
    ids_BT, attention_BT = padded_batch()
    expected = model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits
    features_BTD = split.features(ids_BT, attention_BT)
    assert split.is_split and split.vocabulary == 37
    assert features_BTD.shape == (3, 11, 16)  # hidden states, not logits
    found = split.head.logits(features_BTD)
    mask = attention_BT.bool()
    assert float(expected[mask].std()) > 0.05  # else anything would be close
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-5)


class Doubling(LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found


class Headless(LlamaForCausalLM):  # type: ignore[misc]
    def get_output_embeddings(self) -> None:
        return None


class Narrow(LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = found.logits[..., :30]
        return found


@pytest.mark.parametrize("kind", [Doubling, Headless, Narrow])
@torch.inference_mode()
def test_a_head_of_unknown_form_means_the_whole_model_and_is_said(
    kind: type[LlamaForCausalLM], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SMALL)).eval()
    whole = split_model(model)
    assert not whole.is_split
    assert kind.__name__ in caplog.text
    ids_BT, attention_BT = padded_batch()
    expected = model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits
    found = whole.head.logits(whole.features(ids_BT, attention_BT))
    torch.testing.assert_close(found, expected)


def test_splitting_leaves_training_mode_as_it_was() -> None:
    model = make_model(CONFIGS["llama"]())
    assert not split_model(model.eval()).model.training
    assert split_model(model.train()).model.training


def test_head_rounds_features_to_its_own_dtype_and_returns_float32() -> None:
    weight = torch.randn(5, 4, dtype=torch.bfloat16)
    features_PD = torch.randn(3, 4)
    found = Head(weight).logits(features_PD)
    assert found.dtype == torch.float32
    expected = (features_PD.bfloat16() @ weight.T).float()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_models_pass_and_keep_their_gradients(name: str) -> None:
    model = make_model(CONFIGS[name]()).train()
    require_causal(model, name="model")
    assert model.training
    ids_BT, _ = padded_batch()
    model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()  # no inference tensors


@pytest.mark.parametrize("initializer_range", [0.02, 0.5])
def test_a_model_that_sees_later_tokens_is_refused(initializer_range: float) -> None:
    small = SMALL | {"initializer_range": initializer_range}
    with pytest.raises(ValueError, match=r"the student.*not a causal language model.*Llama"):
        require_causal(make_model(BertConfig(**small)), name="the student")
    require_causal(make_model(BertConfig(**small, is_decoder=True)), name="the student")


# ---------------------------------------------------------------------------------------------------------
# Teachers


def test_a_teacher_is_frozen_split_and_of_the_recorded_width(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    path = record(tmp_path, tiny_teacher)
    content = TeacherRecord.read(path)
    assert content.vocabulary == WIDTH and content.tokenizer.size == NUM_TOKENS
    assert content.name == str(tiny_teacher) and content.revision is None
    teacher = load_recorded_teacher(
        str(tiny_teacher), section("teacher", device="cpu"), record_path=path
    )
    assert teacher.is_split and teacher.vocabulary == WIDTH
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.num_parameters == sum(p.numel() for p in teacher.model.parameters())


def test_other_weights_than_the_recorded_ones_are_refused(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    path = record(tmp_path, tiny_teacher)
    other = tmp_path / "other"
    model = load_pretrained(str(tiny_teacher))
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0
    model.save_pretrained(other)
    load_tokenizer(str(tiny_teacher)).save_pretrained(other)
    require_weights(TeacherRecord.read(path), str(tiny_teacher), source=path)
    found = fingerprint_model(str(other))[0]
    with pytest.raises(ValueError, match=rf"other weights.*{found}.*force_regenerate") as refusal:
        load_recorded_teacher(str(other), section("teacher", device="cpu"), record_path=path)
    assert TeacherRecord.read(path).weights in str(refusal.value)


def test_a_record_of_another_hub_id_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    path = record(tmp_path, tiny_teacher)
    with pytest.raises(ValueError, match=rf"'some/body' is not the teacher that {path} records"):
        require_weights(TeacherRecord.read(path), "some/body", source=path)


def test_a_teacher_whose_files_change_while_it_works_is_refused(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    path = record(tmp_path, tmp_path / "teacher")
    teacher = load_recorded_teacher(
        str(tmp_path / "teacher"), section("teacher", device="cpu"), record_path=path
    )
    teacher.require_unchanged()
    with (tmp_path / "teacher" / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    with pytest.raises(ValueError, match="changed while the teacher was running"):
        teacher.require_unchanged()


def test_one_edit_anywhere_in_large_weights_is_another_fingerprint(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memo"))
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "model.safetensors"
    path.write_bytes(bytes(40 << 20))
    seen = {fingerprint_model(str(tmp_path / "teacher"))[0]}
    for place in range(1, 40 << 20, 9_999_991):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.add(fingerprint_model(str(tmp_path / "teacher"))[0])
    assert len(seen) == 6


def test_nodes_without_a_common_home_hash_large_weights_once(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = tmp_path / "teacher", tmp_path / "results" / "fingerprint.json"
    shutil.copytree(tiny_teacher, folder)
    large = folder / "more.safetensors"
    large.write_bytes(bytes(20 << 20))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home of a node"))
    record = TeacherRecord(
        weights=fingerprint_model(str(folder), record=path)[0],
        revision=None,
        name=str(folder),
        tokenizer=TokenizerIdentity(fingerprint="", size=1),
        vocabulary=1,
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home of another"))
    hashed: list[Path] = []

    def hash_file(file: Path, hash_it: Callable[[Path], str] = digests.hash_file) -> str:
        hashed.append(file)
        return hash_it(file)

    monkeypatch.setattr(digests, "hash_file", hash_file)
    require_weights(record, str(folder), source=path)
    assert hashed and large not in hashed  # small files are
    large.write_bytes(bytes(21 << 20))
    with pytest.raises(ValueError, match="holds other weights"):
        require_weights(record, str(folder), source=path)


def test_teachers_dtype_is_the_configs(tiny_teacher: Path) -> None:
    teacher = load_teacher(str(tiny_teacher), section("teacher", device="cpu", dtype="bfloat16"))
    assert teacher.model.dtype == torch.bfloat16 and teacher.is_split
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("float16", cpu) == torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_refused_only_where_it_was_asked_for() -> None:
    with pytest.raises(ValueError, match=r"device 'cuda'.*sees no GPU.*device: auto"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpus_that_were_given_and_are_not_seen_are_refused(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6")
    with pytest.raises(ValueError, match=r"GPUs 7,6 were given.*sees none.*VISIBLE_DEVICES=\"\""):
        choose_device(device)
    assert choose_device("cpu") == torch.device("cpu"), "the CPU was asked for"


@pytest.mark.parametrize("load", [load_model_config, load_pretrained, load_tokenizer])
def test_a_missing_folder_is_one_sentence(load: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load the (model|tokenizer).*no such folder"):
        load(str(tmp_path / "nothing" / "here"))


@pytest.mark.parametrize("load", [load_model_config, load_pretrained, load_tokenizer])
def test_a_folder_that_is_no_model_is_one_sentence(
    load: Callable[[str], Any], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("nothing of use")
    with pytest.raises(
        ValueError, match=r"cannot load.*must contain what save_pretrained"
    ) as refusal:
        load(str(tmp_path))
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("load", [load_model_config, load_pretrained, load_tokenizer])
def test_a_hub_id_without_a_network_is_one_sentence_at_once(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # HF_HUB_OFFLINE=1
    with pytest.raises(
        ValueError, match=r"cannot load.*'nobody/no-such-model'.*Hub id.*HF_HUB_OFFLINE"
    ):
        load("nobody/no-such-model")


def test_damaged_weights_are_one_sentence(tmp_path: Path, tiny_teacher: Path) -> None:
    content = (tiny_teacher / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "config.json").write_text((tiny_teacher / "config.json").read_text())
    with pytest.raises(ValueError, match="cannot load the model"):
        load_pretrained(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------
# Tokenizers


def test_tokenizers_of_one_size_are_told_apart_by_their_tokens(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    folders = [tmp_path / "same", tmp_path / "other"]
    for folder in folders:
        shutil.copytree(tiny_teacher, folder)
    content = read_json(folders[1] / "tokenizer.json")
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folders[1] / "tokenizer.json").write_text(json.dumps(content, indent=2, ensure_ascii=False))
    same, other = (identify_tokenizer(str(f), load_tokenizer(str(f))) for f in folders)
    mine = identify_tokenizer(str(tiny_teacher), tokenizer)
    assert mine == same
    assert other.size == mine.size == NUM_TOKENS
    assert other.fingerprint != mine.fingerprint


def test_a_hub_tokenizers_fingerprint_is_of_its_vocabulary(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    before = identify_tokenizer("some/hub-id", tokenizer)
    assert before == identify_tokenizer("another/name", tokenizer)
    tokenizer.add_tokens(["<new>"])
    after = identify_tokenizer("some/hub-id", tokenizer)
    assert after.fingerprint != before.fingerprint and after.size == NUM_TOKENS + 1


def test_record_of_a_teacher_without_a_tokenizer_is_refused(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    load_pretrained(str(tiny_teacher)).save_pretrained(tmp_path / "model")
    teacher = section("teacher", model_path=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="tokenizer"):
        record_teacher(tmp_path / "fingerprint.json", teacher)


def test_width_is_the_text_models_of_a_model_that_also_sees() -> None:
    config = AutoConfig.for_model("gemma3", text_config={"vocab_size": 99})
    assert output_width(config) == 99
