"""Packages that a teacher needs beside transformers: for its attention, and for quantized weights."""

from collections.abc import Iterator
from importlib.util import find_spec

from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retort.config.sections import Teacher
from retort.models.attention import has_softcap
from retort.models.quantized import find_faults

# Each needs one of these; `kernels` downloads the same code compiled.
_ATTENTION = {
    "flash_attention_2": (("flash_attn", "flash-attn"), ("kernels", "kernels")),
    "flash_attention_3": (("flash_attn_interface", "flash-attn-3"), ("kernels", "kernels")),
    "flash_attention_4": (("flash_attn", "flash-attn-4"), ("kernels", "kernels")),
}


def find_missing_packages(model: PretrainedConfig, section: Teacher) -> Iterator[str]:
    """Yield what is wrong with a teacher's weights and attention, naming the packages that are missing."""
    name = f"teacher.model_path {section.model_path!r}"
    faults = (
        *find_faults(model, on_cpu=section.device == "cpu"),
        *_missing_for_attention(section.attn_implementation),
    )
    for fault in faults:
        yield f"{name} {fault}"
    if section.attn_implementation == "sdpa" and has_softcap(model):
        yield (
            f"{name} has a softcap in its attention, which teacher.attn_implementation 'sdpa' leaves out. Set eager, "
            "flex_attention or flash_attention_2, or leave the key out."
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
