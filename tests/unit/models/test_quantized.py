"""Checkpoints with quantized weights: those that transformers loads here are teachers like any other."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from retort.io.files import read_json, write_json
from retort.models import quantized
from retort.models.load import load_pretrained, load_recorded_teacher, load_teacher, record_teacher
from retort.models.quantized import find_faults, name_method
from support.sections import section

BLOCK = 128
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> tuple[Path, Path]:
    """A checkpoint whose linear layers are float8 with a scale per block, and one with the same numbers in float32."""
    root = tmp_path_factory.mktemp("fp8")
    plain, coded = root / "plain", root / "coded"
    torch.manual_seed(0)
    shape = {"hidden_size": BLOCK, "intermediate_size": 2 * BLOCK, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **shape, **heads)).save_pretrained(plain)
    for path in tiny_teacher.glob("tokenizer*"):
        shutil.copy2(path, plain)
    weights, compressed = load_file(plain / "model.safetensors"), dict[str, Tensor]()
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            rows, columns = (size // BLOCK for size in weight.shape)
            blocks = weight.view(rows, BLOCK, columns, BLOCK)
            scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
            numbers = (blocks / scale).to(torch.float8_e4m3fn)
            weights[name] = (numbers.float() * scale).view_as(weight).contiguous()
            compressed[name] = numbers.view_as(weight)
            compressed[f"{name}_scale_inv"] = scale.view(rows, columns)
        else:
            compressed[name] = weight
    shutil.copytree(plain, coded)
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(compressed, coded / "model.safetensors", metadata={"format": "pt"})
    config = read_json(coded / "config.json") | {"quantization_config": FP8}
    write_json(coded / "config.json", config)
    return plain, coded


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is computed in float8")
def test_an_fp8_checkpoint_is_a_teacher_whose_weights_are_its_numbers(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    plain, coded = folders
    settings = section("teacher", model_path=str(coded), device="cpu", dtype="float32")
    record_teacher(tmp_path / "fingerprint.json", settings)
    teacher = load_recorded_teacher(str(coded), settings, record_path=tmp_path / "fingerprint.json")
    assert teacher.is_split and teacher.vocabulary == 320
    expected = load_teacher(str(plain), settings)
    ids_BT = torch.arange(40)[None]
    with torch.inference_mode():
        found = teacher.head.logits(teacher.features(ids_BT, None))
        logits = expected.head.logits(expected.features(ids_BT, None))
    # Without its scales a weight would be off by a factor of some thousand.
    torch.testing.assert_close(found, logits, rtol=2e-2, atol=2e-2)


def test_weights_of_an_unknown_method_are_not_taken_for_plain_ones(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """transformers warns and loads such numbers as they are."""
    folder = tmp_path / "unknown"
    shutil.copytree(folders[1], folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"quantization_config": {"quant_method": "new"}})
    assert load_pretrained(str(folder))
    teacher = section("teacher", model_path=str(folder), device="cpu")
    record_teacher(tmp_path / "fingerprint.json", teacher)
    with pytest.raises(ValueError, match="quantized with new, which this version"):
        load_recorded_teacher(str(folder), teacher, record_path=tmp_path / "fingerprint.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_only_a_job_has_is_no_fault_unless_the_teacher_runs_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda _: object())  # its package is installed
    config = LlamaConfig(quantization_config={"quant_method": "fbgemm_fp8"})
    assert not list(find_faults(config, on_cpu=False))
    (fault,) = find_faults(config, on_cpu=True)
    assert "requires a GPU" in fault


def test_methods_are_named_as_transformers_knows_them() -> None:
    for keys, name in (
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes_8bit"),
        ({"load_in_4bit": True}, "bitsandbytes_4bit"),
        ({"quant_method": "fp8"}, "fp8"),
    ):
        assert name_method(keys) == name and name in AUTO_QUANTIZER_MAPPING
    assert not list(find_faults(LlamaConfig(), on_cpu=True))
