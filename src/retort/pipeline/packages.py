"""Packages that models need beside transformers: for attention, quantized weights, and optimizers."""

from collections.abc import Iterator
from importlib.util import find_spec

from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retort.config.sections import Teacher, Training
from retort.models.attention import has_softcap
from retort.models.quantized import find_faults

# Each needs one of these; `kernels` downloads the same code compiled.
_ATTENTION = {
    "flash_attention_2": (("flash_attn", "flash-attn"), ("kernels", "kernels")),
    "flash_attention_3": (("flash_attn_interface", "flash-attn-3"), ("kernels", "kernels")),
    "flash_attention_4": (("flash_attn", "flash-attn-4"), ("kernels", "kernels")),
}

# Optimizers that need one, as its module and its name for pip.
_OPTIMIZERS = {
    (
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "lion_32bit",
    ): ("bitsandbytes", "bitsandbytes"),
    ("adamw_torch_8bit", "adamw_torch_4bit"): ("torchao", "torchao"),
    ("stable_adamw",): ("optimi", "torch-optimi"),
}


def find_missing_packages(model: PretrainedConfig, section: Teacher) -> Iterator[str]:
    """Yield what is wrong with a teacher's weights and attention, naming the packages that are missing."""
    name = f"teacher.model_path {section.model_path!r}"
    faults = (
        *find_faults(model, on_cpu=section.device == "cpu"),
        *_find_attention_faults(model, section.attn_implementation, "teacher"),
    )
    for fault in faults:
        yield f"{name} {fault}"


def find_missing_for_training(
    model: PretrainedConfig, training: Training, *, name: str
) -> Iterator[str]:
    """Yield what is wrong with a student's attention and optimizer; `model`: its config, `name`: in messages."""
    for fault in _find_attention_faults(model, training.attn_implementation, "training"):
        yield f"{name} {fault}"
    if training.lora.rank is not None and find_spec("peft") is None:
        yield (
            f"training.lora.rank is {training.lora.rank}, for which peft must be installed. Type: pip install peft "
            "(Retort's extra lora), or use training.lora: null."
        )
    needed = next((n for kinds, n in _OPTIMIZERS.items() if training.optim in kinds), None)
    if needed is not None and find_spec(needed[0]) is None:
        yield (
            f"training.optim is {training.optim!r}, for which {needed[1]} must be installed. Type: pip install "
            f"{needed[1]}, or use another optimizer."
        )


def _find_attention_faults(
    model: PretrainedConfig, attention: str | None, section: str
) -> Iterator[str]:
    """Yield what is wrong with the attn_implementation of a section, teacher or training."""
    if attention is None or "/" in attention:  # a kernel on the Hub
        return
    key = f"has {section}.attn_implementation {attention!r}"
    if attention == "sdpa" and has_softcap(model):
        yield (
            f"has a softcap in its attention, which {section}.attn_implementation 'sdpa' leaves out. Set eager, "
            "flex_attention or flash_attention_2, or leave the key out."
        )
    known = sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    if attention not in known:
        yield f"{key}, but transformers knows {', '.join(n for n in known if '|' not in n)}. Set one of these."
    needed = _ATTENTION.get(attention, ())
    if needed and all(find_spec(module) is None for module, _ in needed):
        names = " or ".join(pip for _, pip in needed)
        yield f"{key}, for which {names} must be installed. Install it, or leave the key out."
