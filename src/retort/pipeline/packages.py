"""Packages that a model needs beside transformers: for its attention, and for quantized weights."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retort.models.attention import has_softcap

# (module, name for pip) of what transformers' quantizers ask for, by quant_method; others need nothing.
_QUANTIZATION = {
    "aqlm": (("aqlm", "aqlm"),),
    "auto-round": (("auto_round", "auto-round"),),
    "awq": (("gptqmodel", "gptqmodel"),),
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"),),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "eetq": (("kernels", "kernels"),),
    "gptq": (("optimum", "optimum"), ("gptqmodel", "gptqmodel")),
    "higgs": (("flute", "flute-kernel"), ("fast_hadamard_transform", "fast-hadamard-transform")),
    "hqq": (("hqq", "hqq"),),
    "quanto": (("optimum", "optimum-quanto"),),
    "quark": (("quark", "amd-quark"),),
    "spqr": (("spqr_quant", "spqr_quant"),),
    "torchao": (("torchao", "torchao"),),
    "vptq": (("vptq", "vptq"),),
}
# Each needs one of these; `kernels` downloads the same code compiled.
_ATTENTION = {
    "flash_attention_2": (("flash_attn", "flash-attn"), ("kernels", "kernels")),
    "flash_attention_3": (("flash_attn_interface", "flash-attn-3"), ("kernels", "kernels")),
    "flash_attention_4": (("flash_attn", "flash-attn-4"), ("kernels", "kernels")),
}


def require_packages(model: PretrainedConfig, attention: str | None, *, name: str) -> None:
    """Raise ValueError, naming the package, when weights or attention of the model `name` need one that is missing."""
    for fault in (*_missing_for_weights(model), *_missing_for_attention(attention)):
        raise ValueError(f"{name} {fault}")
    if attention == "sdpa" and has_softcap(model):
        raise ValueError(
            f"{name} has a softcap in its attention, which teacher.attn_implementation 'sdpa' leaves out. Set eager, "
            "flex_attention or flash_attention_2, or leave the key out."
        )


def _missing_for_weights(model: PretrainedConfig) -> Iterator[str]:
    quantization: Any = getattr(model, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = str(quantization.get("quant_method", "")).removesuffix("_4bit").removesuffix("_8bit")
    missing = [pip for module, pip in _QUANTIZATION.get(method, ()) if find_spec(module) is None]
    if missing:
        yield (
            f"has weights quantized with {method}, for which {' and '.join(missing)} must be installed. Type: pip "
            f"install {' '.join(missing)}, or use the model with unquantized weights."
        )


def _missing_for_attention(attention: str | None) -> Iterator[str]:
    """Yield what is wrong with teacher.attn_implementation."""
    if attention is None or "/" in attention:  # a kernel on the Hub
        return
    key = f"has teacher.attn_implementation {attention!r}"
    known = sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    if attention not in known:
        yield f"{key}, but transformers knows {', '.join(n for n in known if '|' not in n)}. Set one of these."
    needed = _ATTENTION.get(attention, ())
    if needed and all(find_spec(module) is None for module, _ in needed):
        names = " or ".join(pip for _, pip in needed)
        yield f"{key}, for which {names} must be installed. Install it, or leave the key out."
