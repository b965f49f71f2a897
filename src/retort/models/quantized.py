"""Checkpoints with quantized weights: what transformers' quantizers need to load them, before they are loaded."""

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from transformers import PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

# (module, name for pip) where a quantizer asks for a GPU before it names its packages, or names the first of two only.
_PACKAGES = {
    "aqlm": (("aqlm", "aqlm"),),
    "fbgemm_fp8": (("fbgemm_gpu", "fbgemm-gpu"),),
    "fp_quant": (("fp_quant", "fp_quant"),),
    "gptq": (("optimum", "optimum"), ("gptqmodel", "gptqmodel")),
    "higgs": (("flute", "flute-kernel"), ("fast_hadamard_transform", "fast-hadamard-transform")),
    "hqq": (("hqq", "hqq"),),
    "quark": (("quark", "amd-quark"),),
    "spqr": (("spqr_quant", "spqr_quant"),),
    "torchao": (("torchao", "torchao"),),
}


def find_quantization(config: PretrainedConfig) -> dict[str, Any]:
    """Return a model's quantization_config, {} if its weights are not quantized."""
    found: Any = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else dict(found.to_dict())


def name_method(quantization: dict[str, Any]) -> str:
    """Return the quant_method of a quantization_config by the name under which transformers knows it."""
    for key, name in (("load_in_4bit", "bitsandbytes_4bit"), ("load_in_8bit", "bitsandbytes_8bit")):
        if quantization.get(key):
            return name
    return str(quantization.get("quant_method"))


def find_faults(config: PretrainedConfig, *, on_cpu: bool) -> Iterator[str]:
    """Yield why a model with quantized weights cannot be loaded here, as "has weights ...".

    on_cpu: it is to run on a CPU; else that there is no GPU on this machine, of which a job may have one, is no fault.
    """
    quantization = find_quantization(config)
    if not quantization:
        return
    method = name_method(quantization)
    if method not in AUTO_QUANTIZER_MAPPING:
        # transformers would warn, and take the quantized numbers for the weights
        yield (
            f"has weights quantized with {method}, which this version of transformers does not load (it knows "
            f"{', '.join(sorted(AUTO_QUANTIZER_MAPPING))}). Use a checkpoint of one of these, or unquantized weights."
        )
        return
    if missing := [pip for name, pip in _PACKAGES.get(method, ()) if find_spec(name) is None]:
        yield (
            f"has weights quantized with {method}, for which {' and '.join(missing)} must be installed. Type: pip "
            f"install {' '.join(missing)}, or use the model with unquantized weights."
        )
    elif said := _ask_quantizer(quantization, on_cpu=on_cpu):
        yield (
            f"has weights quantized with {method}, which transformers cannot load here: {said} Or use the model with "
            "unquantized weights."
        )


def _ask_quantizer(quantization: dict[str, Any], *, on_cpu: bool) -> str | None:
    """Return what transformers' quantizer has against its environment, None if it has nothing."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of the GPU that is missing here
    try:
        quantizer = AutoHfQuantizer.from_config(dict(quantization), pre_quantized=True)
        quantizer.validate_environment(device_map="auto")
    except Exception as error:
        said = " ".join(str(error).split())
        wants_gpu = "GPU" in said and "install" not in said
        if wants_gpu and not on_cpu:
            return None
        return said if said.endswith(".") else f"{said}."
    finally:
        logger.setLevel(level)
    return None
